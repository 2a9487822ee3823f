"""What a head's outputs mean: its problem type, its likelihood, and the noise of a regression."""

from .gaussian import LOG_VARIANCE_RANGE, gaussian_nll, split_variance_head
from .noise import HEAD, NoiseStd, check_noise_std, mean_and_variance
from .outputs import drawn_values, logits_of, regression_values, token_mask
from .pixels import IGNORED, ignored_label, resized, without_ignored
from .problem import (
    PROBLEM_TYPES,
    ProblemType,
    check_problem_type,
    is_encoder_decoder_lm,
    record_problem_type,
    resolve_problem_type,
    sequence_problem_type,
    unwrapped,
)

__all__ = [
    "HEAD",
    "IGNORED",
    "LOG_VARIANCE_RANGE",
    "PROBLEM_TYPES",
    "NoiseStd",
    "ProblemType",
    "check_noise_std",
    "check_problem_type",
    "drawn_values",
    "gaussian_nll",
    "ignored_label",
    "is_encoder_decoder_lm",
    "logits_of",
    "mean_and_variance",
    "record_problem_type",
    "regression_values",
    "resized",
    "resolve_problem_type",
    "sequence_problem_type",
    "split_variance_head",
    "token_mask",
    "unwrapped",
    "without_ignored",
]
