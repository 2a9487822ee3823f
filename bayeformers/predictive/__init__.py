"""What a prediction is: from draws of a model's output to probabilities and uncertainties."""

from .outputs import drawn_values, logits_of, token_mask
from .prediction import IGNORED, Predictive
from .problem import ProblemType, resolve_problem_type, sequence_problem_type, unwrapped
from .running import RunningPredictive

__all__ = [
    "IGNORED",
    "Predictive",
    "ProblemType",
    "RunningPredictive",
    "drawn_values",
    "logits_of",
    "resolve_problem_type",
    "sequence_problem_type",
    "token_mask",
    "unwrapped",
]
