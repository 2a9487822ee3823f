"""What holds of a model's answers whatever their distribution: refusing with a bound on the errors, prediction sets."""

from .saving import attach_policy, policy_of
from .policy import POLICY_FILE, AbstentionPolicy
from .scores import SCORES, errors_of, score_of

__all__ = ["POLICY_FILE", "SCORES", "AbstentionPolicy", "attach_policy", "errors_of", "policy_of", "score_of"]
