r"""`VariationalHead`: a variational Bayesian last layer (Harrison, Willes and Snoek 2024, arXiv 2404.11599).

The weights of output k are w_k ~ q = N(m_k, S_k) over the features phi, of which the last is 1 where the layer has a
bias; the prior is N(0, s^2) per weight. The outputs are f_k = w_k^T phi + e, with e ~ N(0, sigma_k^2) of logits, so

    f_k | phi  ~  N(m_k^T phi, v_k),      v_k = phi^T S_k phi + sigma_k^2

and the loss of N items is  mean nll + (1 / N) (KL(q || p) - log p(sigma^2)),  with a bound of each item's -E log p(y):

* regression, y ~ N(f, sigma^2) (Theorem 1): (y - m^T phi)^2 / (2 sigma^2) + log(2 pi sigma^2) / 2
  + phi^T S phi / (2 sigma^2). It is exact;
* classes (Theorem 2, d-VBLL; Jensen's inequality on log E sum_k exp f_k): LSE_k(m_k^T phi + v_k / 2) - m_y^T phi;
* labels: softplus(v / 2 - s), s = m^T phi of a label that is present and -m^T phi of one that is not.

``bound="tight"`` takes the smaller of that and of another bound, item by item. Of classes it is Jensen's on the
margins, log(1 + sum_{k != y} exp(m_k - m_y + (v_k + v_y) / 2)), which is the smaller wherever
sum_{k != y} exp(m_k + v_k / 2 - m_y) <= 1: there it does not charge v_y / 2 for what the network has right. Of labels
it is softplus(-s) + v / 8, by softplus'' <= 1 / 4.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..forward import labels_of, wide
from ..likelihoods import ItemNLL, Likelihood
from ..likelihoods.classes import check_classes
from ..sampling.generators import keyed_generator
from .base import Head
from .config import VBLLConfig

__all__ = ["VariationalHead", "jensen_nll", "margin_nll"]


def jensen_nll(mean: Tensor, variance: Tensor, labels: Tensor) -> Tensor:
    """Return LSE_k(m_k + v_k / 2) - m_y >= -E log softmax(f)_y of independent f_k ~ N(m_k, v_k).

    Args:
        mean: m, (..., C).
        variance: v, (..., C).
        labels: classes y, (...).

    >>> jensen_nll(torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([0]))  # log 2: exact without variance
    tensor([0.6931])
    """
    return (mean + 0.5 * variance).logsumexp(-1) - _of_label(mean, labels)


def margin_nll(mean: Tensor, variance: Tensor, labels: Tensor) -> Tensor:
    """Return log(1 + sum_{k != y} exp(m_k - m_y + (v_k + v_y) / 2)) >= -E log softmax(f)_y.

    Args:
        mean: m, (..., C).
        variance: v, (..., C), of independent logits.
        labels: classes y, (...).

    >>> margin_nll(torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([0]))
    tensor([0.6931])
    """
    against = mean + 0.5 * variance - (_of_label(mean, labels) - 0.5 * _of_label(variance, labels))[..., None]
    return against.scatter(-1, labels[..., None], 0.0).logsumexp(-1)


def _of_label(values: Tensor, labels: Tensor) -> Tensor:
    return values.gather(-1, labels[..., None]).squeeze(-1)


class VariationalHead(Head):
    """A linear layer with a Gaussian over its weights, trained by a bound that needs no samples.

    ``weight`` (C, D) and ``bias`` (C,) are the means; ``log_std`` (C, D + 1) and ``factor`` set S_k: diag(std^2), plus
    U U^T with U = factor[k] (D + 1, R) of a low rank; or L L^T, L lower triangular with std on its diagonal.

    Args:
        in_features: D.
        out_features: C.
        config: how it is made.
        is_regression: whether the outputs are values with Gaussian noise.
        bias: whether it has one.
        device: of its tensors.
        dtype: of its tensors, float32 or wider.
    """

    config: VBLLConfig
    has_logit_noise = True

    def __init__(
        self,
        in_features: int,
        out_features: int,
        config: VBLLConfig,
        *,
        is_regression: bool,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(in_features, out_features, config, is_regression=is_regression)
        kwargs, size = {"device": device, "dtype": dtype}, in_features + bias
        self.weight = nn.Parameter(torch.empty((out_features, in_features), **kwargs))
        self.bias = nn.Parameter(torch.empty(out_features, **kwargs)) if bias else None
        self.log_std = nn.Parameter(torch.empty((out_features, size), **kwargs))
        widths = {"diagonal": None, "low_rank": config.rank, "dense": size}
        width = widths[config.covariance]
        self.factor = None if width is None else nn.Parameter(torch.empty((out_features, size, width), **kwargs))
        self.add_noise(device, dtype)

    @torch.no_grad()
    def reset(self) -> None:
        """Scales at their start: `initial_std` times the prior's; the means stay."""
        self.log_std.copy_((self.config.initial_std * self.prior_std()).log())
        if self.factor is not None:
            self.factor.zero_()
        if self.factor is not None and self.config.covariance == "low_rank":  # at 0 it would have no gradient
            generator = keyed_generator(0, torch.device("cpu"))
            noise = torch.randn(self.factor.shape, generator=generator, dtype=torch.float64)
            self.factor.copy_(noise.to(self.factor) * (self.log_std.exp() / math.sqrt(self.config.rank))[..., None])
        self.reset_noise()

    def prior_std(self) -> Tensor:
        """The scale s of each weight, the bias last, (D + 1,)."""
        scale = self.config.prior_std or 1 / math.sqrt(self.in_features)
        std = self.log_std.new_full((self.log_std.shape[-1],), scale)
        if self.bias is not None:
            std[-1] = self.config.bias_prior_std
        return std

    def scale_parameters(self) -> list[nn.Parameter]:
        """Those of S and of the noise."""
        own = [self.log_std] if self.factor is None else [self.log_std, self.factor]
        return own + super().scale_parameters()

    # -- the Gaussian ------------------------------------------------------------------------------------------------

    def mean(self, features: Tensor) -> Tensor:
        """m^T phi."""
        return F.linear(wide(features).to(self.weight.dtype), self.weight, self.bias)

    def variance(self, features: Tensor) -> Tensor:
        """phi^T S phi, of logits + sigma^2."""
        features = self._with_one(features)
        variance = F.linear(features.square(), (2 * self.log_std).exp())
        factor = self._off_diagonal()
        if factor is not None and self.config.covariance == "dense":
            projected = torch.einsum("...d,cdr->...cr", features, factor + self.log_std.exp().diag_embed())
            variance = projected.square().sum(-1)
        elif factor is not None:
            variance = variance + torch.einsum("...d,cdr->...cr", features, factor).square().sum(-1)
        return variance if self.is_regression else variance + self.noise_variance

    def covariances(self) -> Tensor:
        """S_k of every output, (C, D + 1, D + 1)."""
        diagonal, factor = (2 * self.log_std).exp().diag_embed(), self._off_diagonal()
        if factor is None:
            return diagonal
        if self.config.covariance == "dense":
            root = factor + self.log_std.exp().diag_embed()
            return root @ root.mT
        return diagonal + factor @ factor.mT

    def penalty(self) -> Tensor:
        """KL(q || p) - log p(sigma^2), summed over outputs and weights."""
        prior, factor = self.prior_std(), self._off_diagonal()
        means = self.weight if self.bias is None else torch.cat([self.weight, self.bias[:, None]], 1)
        marginals = (2 * self.log_std).exp()
        log_det = 2 * self.log_std.sum(-1)
        if factor is not None:
            marginals = marginals + factor.square().sum(-1)
        if factor is not None and self.config.covariance == "low_rank":  # the determinant lemma
            inner = factor.mT @ (factor * (-2 * self.log_std).exp()[..., None])
            log_det = log_det + (inner + torch.eye(inner.shape[-1]).to(inner)).logdet()
        terms = (means.square() + marginals) / prior.square() - 1 + 2 * prior.log()
        return 0.5 * (terms.sum() - log_det.sum()) + self.noise_penalty()

    def sampled(self, index: int, seed: int) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """The weight, and the bias, of a draw."""
        generator = keyed_generator((seed << 32) + index, torch.device("cpu"))
        normals = torch.randn((*self.log_std.shape, 1), generator=generator, dtype=torch.float64)
        root = torch.linalg.cholesky(self.covariances().detach().double())
        noise = (root @ normals.to(root)).squeeze(-1).to(self.weight)
        yield self.weight, self.weight.detach() + noise[:, : self.in_features]
        if self.bias is not None:
            yield self.bias, self.bias.detach() + noise[:, -1]

    def _class_nll(self, features: Tensor, batch: Any, likelihood: Likelihood) -> ItemNLL:
        mean, variance, is_tight = self.mean(features), self.variance(features), self.config.bound == "tight"
        if likelihood.is_bernoulli:
            likelihood.nll(mean.detach(), batch)  # which checks the labels
            labels = labels_of(batch).to(mean)
            present, absent = (_label_nll(sign * mean, variance, is_tight) for sign in (1, -1))
            values = (labels * present + (1 - labels) * absent).flatten(1).sum(1)
            return ItemNLL(values, torch.ones_like(values, dtype=torch.bool))
        _, labels = likelihood.labelled_logits(mean, batch)
        mask = labels != -100
        labels = check_classes(labels, mean.shape, mask).masked_fill(~mask, 0)
        values = jensen_nll(mean, variance, labels)
        if is_tight:
            values = torch.minimum(values, margin_nll(mean, variance, labels))
        return ItemNLL(values.masked_fill(~mask, 0.0), mask)

    def _with_one(self, features: Tensor) -> Tensor:
        features = wide(features).to(self.weight.dtype)
        return features if self.bias is None else F.pad(features, (0, 1), value=1.0)

    def _off_diagonal(self) -> Tensor | None:
        is_dense = self.config.covariance == "dense"
        return self.factor.tril(-1) if self.factor is not None and is_dense else self.factor


def _label_nll(margin: Tensor, variance: Tensor, is_tight: bool) -> Tensor:
    values = F.softplus(0.5 * variance - margin)
    return torch.minimum(values, F.softplus(-margin) + variance / 8) if is_tight else values
