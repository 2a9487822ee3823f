"""Metrics of probabilistic predictions: pure functions of arrays, and `load` for their `evaluate` modules."""

from ._checks import UndefinedMetricError
from .bootstrap import BootstrapInterval, bootstrap_ci, paired_bootstrap
from .calibration import (
    Binning,
    ReliabilityBins,
    classwise_calibration_error,
    expected_calibration_error,
    fit_temperature,
    maximum_calibration_error,
    reliability_bins,
)
from .loading import load
from .ood import error_aupr, error_auroc, fpr_at_95_tpr, ood_aupr, ood_auroc
from .scaling import LinearMap, MapKind, fit_linear_map
from .scoring import (
    accuracy,
    brier_score,
    gaussian_negative_log_likelihood,
    negative_log_likelihood,
)
from .selective import (
    AccuracyVersusUncertainty,
    Refusal,
    RiskCoverageCurve,
    accuracy_vs_uncertainty,
    augrc,
    aurc,
    coverage_at_risk,
    e_aurc,
    prr,
    refusal_table,
    risk_at_coverage,
    risk_coverage_curve,
)
from .uncertainty import (
    CovarianceUncertainty,
    bernoulli_log_probs,
    covariance_uncertainty,
    expected_entropy,
    expected_pairwise_kl,
    mutual_information,
    predictive_entropy,
    variation_ratio,
)

__all__ = [
    "AccuracyVersusUncertainty",
    "Binning",
    "BootstrapInterval",
    "CovarianceUncertainty",
    "LinearMap",
    "MapKind",
    "Refusal",
    "ReliabilityBins",
    "RiskCoverageCurve",
    "UndefinedMetricError",
    "accuracy",
    "accuracy_vs_uncertainty",
    "augrc",
    "aurc",
    "bernoulli_log_probs",
    "bootstrap_ci",
    "brier_score",
    "classwise_calibration_error",
    "covariance_uncertainty",
    "coverage_at_risk",
    "e_aurc",
    "error_aupr",
    "error_auroc",
    "expected_calibration_error",
    "expected_entropy",
    "expected_pairwise_kl",
    "fit_linear_map",
    "fit_temperature",
    "fpr_at_95_tpr",
    "gaussian_negative_log_likelihood",
    "load",
    "maximum_calibration_error",
    "mutual_information",
    "negative_log_likelihood",
    "ood_aupr",
    "ood_auroc",
    "paired_bootstrap",
    "predictive_entropy",
    "prr",
    "refusal_table",
    "reliability_bins",
    "risk_at_coverage",
    "risk_coverage_curve",
    "variation_ratio",
]
