"""The layers, by their former names: `forward` returns (output, kl)."""

from .base import VariationalLayer
from .conv import (
    Conv1dFlipout,
    Conv1dReparameterization,
    Conv2dFlipout,
    Conv2dReparameterization,
    Conv3dFlipout,
    Conv3dReparameterization,
    ConvTranspose1dFlipout,
    ConvTranspose1dReparameterization,
    ConvTranspose2dFlipout,
    ConvTranspose2dReparameterization,
    ConvTranspose3dFlipout,
    ConvTranspose3dReparameterization,
)
from .linear import LinearFlipout, LinearReparameterization
from .lstm import LSTMFlipout, LSTMReparameterization

__all__ = [
    "Conv1dFlipout",
    "Conv1dReparameterization",
    "Conv2dFlipout",
    "Conv2dReparameterization",
    "Conv3dFlipout",
    "Conv3dReparameterization",
    "ConvTranspose1dFlipout",
    "ConvTranspose1dReparameterization",
    "ConvTranspose2dFlipout",
    "ConvTranspose2dReparameterization",
    "ConvTranspose3dFlipout",
    "ConvTranspose3dReparameterization",
    "LSTMFlipout",
    "LSTMReparameterization",
    "LinearFlipout",
    "LinearReparameterization",
    "VariationalLayer",
]
