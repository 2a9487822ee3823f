"""Bayesian layers: each is its torch (or transformers) layer with a Gaussian over every weight."""

from .attention import MultiheadAttention
from .base import BayesianModule, NamedVariational, variational_tensors
from .conv import Conv1d, Conv2d, Conv3d, ConvTranspose1d, ConvTranspose2d, ConvTranspose3d
from .draws import fixed_draw, one_draw_per_forward, posterior_mean, training_draw
from .embedding import Embedding, EmbeddingBag
from .estimators import ESTIMATORS, Estimator, Reparameterization
from .linear import Bilinear, Conv1D, Linear
from .norms import LayerNorm, RMSNorm
from .rank1 import FactorLinear, Rank1Linear, RankLinear
from .recurrent import GRU, LSTM
from .variational import Variational

__all__ = [
    "ESTIMATORS",
    "GRU",
    "LSTM",
    "BayesianModule",
    "Bilinear",
    "Conv1D",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
    "Embedding",
    "EmbeddingBag",
    "Estimator",
    "FactorLinear",
    "LayerNorm",
    "Linear",
    "MultiheadAttention",
    "NamedVariational",
    "RMSNorm",
    "Rank1Linear",
    "RankLinear",
    "Reparameterization",
    "Variational",
    "fixed_draw",
    "one_draw_per_forward",
    "posterior_mean",
    "training_draw",
    "variational_tensors",
]
