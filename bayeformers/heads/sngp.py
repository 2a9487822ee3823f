r"""`RandomFeatureHead`: a Gaussian process over random Fourier features, the head of SNGP.

Liu et al. 2020 (arXiv 2006.10108) and 2022 (arXiv 2205.00403), Algorithm 1. With fixed frequencies
Omega_j ~ N(0, I / l^2) and phases b_j ~ U(0, 2 pi),

    phi_j(h) = sqrt(2) cos(Omega_j^T h + b_j),    f_k = w_k^T phi(h),    w_k ~ N(0, (a / D) I)

so that Cov(f_k(h), f_k(h')) = (a / D) phi(h)^T phi(h') -> a exp(-|h - h'|^2 / (2 l^2)) for many features D (Rahimi and
Recht 2007). The paper's beta is w sqrt(D): with features of unit size a weight trains at the rate of other layers.
Training finds the mode of w; its Laplace posterior is N(w_k, P_k^-1), with

    P_k = (D / a) I + sum_i h_ik phi_i phi_i^T,      h_ik = p_ik (1 - p_ik)  of classes and labels,  1 / sigma^2  else

summed once over the training data. ``covariance="shared"`` has one P for all classes, with max_k h_ik: at least every
P_k, so that no variance is larger than by one's own. For a Gaussian likelihood the posterior is exact.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..forward import wide
from ..likelihoods import ItemNLL, Likelihood
from ..sampling.generators import keyed_generator
from .base import Head
from .config import SNGPConfig

__all__ = ["RandomFeatureHead"]


class RandomFeatureHead(Head):
    """A last layer on random Fourier features, with the Laplace precision of its weights.

    ``weight`` (C, D') trains. ``frequencies`` (D', D), ``phases`` (D',), ``precision`` (D', D'), per class (C, D', D'),
    ``num_fitted`` (items that the precision has seen; 0: none yet) and the power iteration's ``direction_i`` are
    buffers.

    Args:
        in_features: D.
        out_features: C.
        config: how it is made.
        is_regression: whether the outputs are values with Gaussian noise.
        spectral_sizes: the number of inputs of each layer in ``config.spectral_layers``.
        device: of its tensors.
        dtype: of its tensors, float32 or wider.
    """

    config: SNGPConfig
    frequencies: Tensor
    phases: Tensor
    precision: Tensor
    num_fitted: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        config: SNGPConfig,
        *,
        is_regression: bool,
        spectral_sizes: tuple[int, ...] = (),
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(in_features, out_features, config, is_regression=is_regression)
        kwargs, size = {"device": device, "dtype": dtype}, config.num_features
        self.weight = nn.Parameter(torch.empty((out_features, size), **kwargs))
        self.register_buffer("frequencies", torch.empty((size, in_features), **kwargs))
        self.register_buffer("phases", torch.empty(size, **kwargs))
        leading = () if self.has_one_precision else (out_features,)
        self.register_buffer("precision", torch.empty((*leading, size, size), **kwargs))
        self.register_buffer("num_fitted", torch.zeros((), dtype=torch.int64, device=device))
        for i, width in enumerate(spectral_sizes):
            self.register_buffer(f"direction_{i}", torch.empty(width, **kwargs))
        self.add_noise(device, dtype)
        self._root: tuple[Tensor, int, Tensor] | None = None

    @property
    def has_one_precision(self) -> bool:
        """Whether all outputs share it: exact for a regression."""
        return self.is_regression or self.config.covariance == "shared"

    @property
    def prior_precision(self) -> float:
        """D / a."""
        return self.config.num_features / self.config.kernel_variance

    @torch.no_grad()
    def reset(self) -> None:
        """Weights 0, the prior's mean; new features of the configuration's seed; the prior's precision."""
        generator, size = keyed_generator(self.config.seed, torch.device("cpu")), self.config.num_features
        default = math.sqrt(self.in_features) if self.config.normalize else 1.0
        normals = torch.randn((size, self.in_features), generator=generator, dtype=torch.float64)
        self.frequencies.copy_(normals / (self.config.length_scale or default))
        self.phases.copy_(2 * math.pi * torch.rand(size, generator=generator, dtype=torch.float64))
        for name, buffer in self.named_buffers(recurse=False):
            if name.startswith("direction_"):
                buffer.copy_(torch.randn(buffer.shape, generator=generator, dtype=torch.float64))
        self.weight.zero_()
        self.reset_noise()
        self.forget()

    # -- the Gaussian ------------------------------------------------------------------------------------------------

    def random_features(self, features: Tensor) -> Tensor:
        """phi, (..., D) -> (..., D')."""
        features = wide(features).to(self.weight.dtype)
        if self.config.normalize:
            features = F.layer_norm(features, features.shape[-1:])
        phi: Tensor = math.sqrt(2) * F.linear(features, self.frequencies, self.phases).cos()
        return phi

    def mean(self, features: Tensor) -> Tensor:
        """w^T phi."""
        return F.linear(self.random_features(features), self.weight)

    def variance(self, features: Tensor) -> Tensor:
        """phi^T P^-1 phi of each output; a prior's before `fit_covariance`."""
        phi, root = self.random_features(features), self._cholesky()
        rows = phi.flatten(0, -2).mT  # (D', n)
        squares = torch.linalg.solve_triangular(root, rows, upper=False).square().sum(-2)  # (n,) or (C, n)
        squares = squares.expand(self.out_features, -1) if squares.dim() == 1 else squares
        variance: Tensor = squares.mT.reshape(*phi.shape[:-1], self.out_features)
        return variance

    def curvature(self, features: Tensor, *, is_bernoulli: bool = False) -> Tensor:
        """sum_i h_ik phi_i phi_i^T of the rows of (n, D), in float64.

        Args:
            features: what the head reads of each item.
            is_bernoulli: whether each output is a label of its own, else a softmax's logit.

        Returns:
            (D', D'), or (C, D', D') per class.
        """
        phi = self.random_features(features).double()
        if self.is_regression:
            return phi.mT @ phi / self.noise_variance.double()
        logits = F.linear(phi, self.weight.double())
        probs = logits.sigmoid() if is_bernoulli else logits.softmax(-1)
        weights = probs * (1 - probs)
        if self.has_one_precision:
            return phi.mT @ (phi * weights.amax(-1, keepdim=True))
        return torch.stack([phi.mT @ (phi * weight[:, None]) for weight in weights.unbind(-1)])

    @property
    def is_fitted(self) -> bool:
        """Whether the precision has seen the training data."""
        return int(self.num_fitted) > 0

    @torch.no_grad()
    def set_precision(self, curvature: Tensor, num_items: int) -> None:
        """P = (D / a) I + curvature.

        Args:
            curvature: summed over the training data.
            num_items: the items that it is of.
        """
        prior = self.prior_precision * torch.eye(self.config.num_features).to(curvature)
        self.precision.copy_(curvature + prior)
        self.num_fitted.fill_(num_items)

    @torch.no_grad()
    def forget(self) -> None:
        """The precision of the prior, that of no data: the weights train."""
        self.precision.copy_(self.prior_precision * torch.eye(self.config.num_features))
        self.num_fitted.zero_()

    def penalty(self) -> Tensor:
        """-log p(w) = (D / a) |w|^2 / 2 up to its constant, and -log p(sigma^2)."""
        return 0.5 * self.prior_precision * self.weight.square().sum() + self.noise_penalty()

    def sampled(self, index: int, seed: int) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """The weight of a draw."""
        generator = keyed_generator((seed << 32) + index, torch.device("cpu"))
        normals = torch.randn((*self.weight.shape, 1), generator=generator, dtype=torch.float64)
        root = torch.linalg.cholesky(self.precision.double())
        noise = torch.linalg.solve_triangular(root.mT, normals.to(root), upper=True).squeeze(-1)
        yield self.weight, self.weight.detach() + noise.to(self.weight)

    def _expected_square(self, features: Tensor, mean: Tensor) -> Tensor:
        """Nothing: the mode is trained."""
        return torch.zeros_like(mean)

    def _class_nll(self, features: Tensor, batch: Any, likelihood: Likelihood) -> ItemNLL:
        return likelihood.nll(self.mean(features), batch)

    def _cholesky(self) -> Tensor:
        """Of the precision, computed in float64 and kept until that changes."""
        held, own, version = self._root, self.precision, self.precision._version
        if held is None or held[0] is not own or held[1] != version:
            held = self._root = (own, version, torch.linalg.cholesky(own.detach().double()).to(own))
        return held[2]
