"""Heads that are posteriors: VBLL, a variational last layer, and SNGP, a Gaussian process on random features."""

from .base import Head
from .config import HeadConfig, SNGPConfig, VBLLConfig
from .find import head_of
from .fit import fit_covariance
from .objective import head_loss
from .posterior import HeadPosterior
from .replace import to_plain_head, to_sngp, to_vbll
from .sngp import RandomFeatureHead
from .spectral import project_spectra
from .vbll import VariationalHead

__all__ = [
    "Head",
    "HeadConfig",
    "HeadPosterior",
    "RandomFeatureHead",
    "SNGPConfig",
    "VBLLConfig",
    "VariationalHead",
    "fit_covariance",
    "head_loss",
    "head_of",
    "project_spectra",
    "to_plain_head",
    "to_sngp",
    "to_vbll",
]
