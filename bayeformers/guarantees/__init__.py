"""What holds of a model's answers whatever their distribution: refusing with a bound on the errors, prediction sets."""

from .abstention import certified_threshold, fit_abstention
from .bounds import clopper_pearson, error_allowance, least_examples, smallest_refusal
from .policy import POLICY_FILE, AbstentionPolicy
from .saving import attach_policy, policy_of
from .scores import SCORES, errors_of, score_of

__all__ = [
    "POLICY_FILE", "SCORES", "AbstentionPolicy", "attach_policy", "certified_threshold", "clopper_pearson",
    "error_allowance", "errors_of", "fit_abstention", "least_examples", "policy_of", "score_of", "smallest_refusal",
]  # fmt: skip
