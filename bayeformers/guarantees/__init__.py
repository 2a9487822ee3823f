"""What holds of a model's answers whatever their distribution: refusing with a bound on the errors, prediction sets."""

from .abstention import certified_threshold, fit_abstention
from .attached import attach_sets, sets_of
from .bounds import clopper_pearson, error_allowance, least_examples, smallest_refusal
from .fit_intervals import fit_prediction_intervals
from .fit_sets import fit_prediction_sets
from .intervals import INTERVALS_FILE, PredictionIntervals
from .p_values import benjamini_hochberg, conformal_p_values
from .policy import POLICY_FILE, AbstentionPolicy
from .quantiles import conformal_quantile, coverage_interval
from .saving import attach_policy, policy_of
from .scores import SCORES, errors_of, score_of
from .sets import SETS_FILE, PredictionSets, SetScore

__all__ = [
    "INTERVALS_FILE", "POLICY_FILE", "SCORES", "SETS_FILE", "AbstentionPolicy", "PredictionIntervals",
    "PredictionSets", "SetScore", "attach_policy", "attach_sets", "benjamini_hochberg", "certified_threshold",
    "clopper_pearson", "conformal_p_values", "conformal_quantile", "coverage_interval", "error_allowance",
    "errors_of", "fit_abstention", "fit_prediction_intervals", "fit_prediction_sets", "least_examples", "policy_of",
    "score_of", "sets_of", "smallest_refusal",
]  # fmt: skip
