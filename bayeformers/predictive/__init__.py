"""What a prediction is: from draws of a model's output to probabilities and uncertainties."""

from ..likelihoods import (
    HEAD,
    IGNORED,
    PROBLEM_TYPES,
    NoiseStd,
    ProblemType,
    check_noise_std,
    check_problem_type,
    drawn_values,
    ignored_label,
    is_encoder_decoder_lm,
    logits_of,
    mean_and_variance,
    record_problem_type,
    regression_values,
    resized,
    resolve_problem_type,
    sequence_problem_type,
    token_mask,
    unwrapped,
    without_ignored,
)  # fmt: skip
from .mixture import MixturePredictive, mixture_of
from .prediction import Predictive
from .running import RunningPredictive
from .spans import span_scores

__all__ = [
    "HEAD", "IGNORED", "PROBLEM_TYPES", "MixturePredictive", "NoiseStd", "Predictive", "ProblemType",
    "RunningPredictive", "check_noise_std", "check_problem_type", "drawn_values", "ignored_label",
    "is_encoder_decoder_lm", "logits_of", "mean_and_variance", "mixture_of", "record_problem_type",
    "regression_values", "resized", "resolve_problem_type", "sequence_problem_type", "span_scores", "token_mask",
    "unwrapped", "without_ignored",
]  # fmt: skip
