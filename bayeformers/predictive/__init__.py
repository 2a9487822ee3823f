"""What a prediction is: from draws of a model's output to probabilities and uncertainties."""

from .noise import HEAD, NoiseStd, check_noise_std, mean_and_variance
from .outputs import drawn_values, logits_of, regression_values, token_mask
from .prediction import IGNORED, Predictive
from .problem import ProblemType, record_problem_type, resolve_problem_type, sequence_problem_type, unwrapped
from .running import RunningPredictive
from .spans import span_scores

__all__ = [
    "HEAD",
    "IGNORED",
    "NoiseStd",
    "Predictive",
    "ProblemType",
    "RunningPredictive",
    "check_noise_std",
    "drawn_values",
    "logits_of",
    "regression_values",
    "mean_and_variance",
    "record_problem_type",
    "resolve_problem_type",
    "sequence_problem_type",
    "span_scores",
    "token_mask",
    "unwrapped",
]
