"""How familiar an input is: scores of predictions, densities of features, and thresholds by a false-alarm rate."""

from .density import FeatureDensity
from .features import Place
from .fit import fit_density
from .score import score_ood
from .thresholds import false_alarm_interval, threshold
from .words import word_attributions

__all__ = [
    "FeatureDensity", "Place", "false_alarm_interval", "fit_density", "score_ood", "threshold",
    "word_attributions",
]  # fmt: skip
