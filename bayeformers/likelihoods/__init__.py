"""What a head's outputs mean: its problem type, its likelihood, and the noise of a regression."""

from ..forward import IGNORED, logits_of
from .base import ItemNLL, Likelihood
from .classes import Categorical
from .gaussian import (
    HEAD,
    LOG_VARIANCE_RANGE,
    NoiseStd,
    check_noise_std,
    gaussian_log_prob,
    gaussian_nll,
    mean_and_variance,
    regression_values,
    split_variance_head,
)  # fmt: skip
from .registry import (
    PROBLEM_TYPES,
    ProblemType,
    check_problem_type,
    drawn_values,
    get_likelihood,
    ignored_label,
    is_encoder_decoder_lm,
    record_problem_type,
    register,
    resolve_problem_type,
    sequence_problem_type,
    token_mask,
    unwrapped,
    without_ignored,
)  # fmt: skip
from .segmentation import resized

__all__ = [
    "HEAD", "IGNORED", "LOG_VARIANCE_RANGE", "PROBLEM_TYPES", "Categorical", "ItemNLL", "Likelihood", "NoiseStd",
    "ProblemType", "check_noise_std", "check_problem_type", "drawn_values", "gaussian_log_prob", "gaussian_nll",
    "get_likelihood", "ignored_label", "is_encoder_decoder_lm", "logits_of", "mean_and_variance",
    "record_problem_type", "register", "regression_values", "resized", "resolve_problem_type",
    "sequence_problem_type", "split_variance_head", "token_mask", "unwrapped", "without_ignored",
]  # fmt: skip
