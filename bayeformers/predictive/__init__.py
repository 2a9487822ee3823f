"""What a prediction is: from draws of a model's output to probabilities and uncertainties."""

from ..likelihoods.noise import HEAD, NoiseStd, check_noise_std, mean_and_variance
from ..likelihoods.outputs import drawn_values, logits_of, regression_values, token_mask
from ..likelihoods.pixels import IGNORED, ignored_label, resized, without_ignored
from ..likelihoods.problem import (
    PROBLEM_TYPES,
    ProblemType,
    check_problem_type,
    is_encoder_decoder_lm,
    record_problem_type,
    resolve_problem_type,
    sequence_problem_type,
    unwrapped,
)
from .prediction import Predictive
from .running import RunningPredictive
from .spans import span_scores

__all__ = [
    "HEAD",
    "IGNORED",
    "PROBLEM_TYPES",
    "NoiseStd",
    "Predictive",
    "ProblemType",
    "RunningPredictive",
    "check_noise_std",
    "check_problem_type",
    "drawn_values",
    "ignored_label",
    "is_encoder_decoder_lm",
    "logits_of",
    "regression_values",
    "mean_and_variance",
    "record_problem_type",
    "resized",
    "resolve_problem_type",
    "sequence_problem_type",
    "span_scores",
    "token_mask",
    "unwrapped",
    "without_ignored",
]
