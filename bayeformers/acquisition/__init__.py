"""Active learning: which rows of a pool to label next."""

from .acquire import STRATEGIES, Acquisition, Strategy, acquire
from .batchbald import Configurations, batchbald, joint_mutual_information
from .gaussian import gaussian_bald, gaussian_batchbald, gaussian_entropy, gaussian_epig
from .scores import bald, entropy, epig, margin

__all__ = [
    "STRATEGIES",
    "Acquisition",
    "Configurations",
    "Strategy",
    "acquire",
    "bald",
    "batchbald",
    "entropy",
    "epig",
    "gaussian_bald",
    "gaussian_batchbald",
    "gaussian_entropy",
    "gaussian_epig",
    "joint_mutual_information",
    "margin",
]
