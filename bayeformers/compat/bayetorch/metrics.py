"""`ELBO` and `Uncertainty`."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...metrics import covariance_uncertainty
from ...nn import fixed_draw
from ..checks import check_bool, check_number
from ..deprecation import deprecated
from ..sampling import fresh_seed


class ELBO(nn.Module):
    """N times the mean negative log-likelihood, plus the weighted KL: the negative ELBO of all N training examples.

    Now: `loss = nll + kl_divergence(model) / N`, which is this divided by N and so needs no other learning rate where N
    differs.

    Args:
        n_samples: N, the number of training examples (not of draws), >= 1.

    >>> log_probs = torch.tensor([[0.5, 0.5]]).log()
    >>> ELBO(n_samples=100)(log_probs, torch.tensor([0]), kld=torch.tensor(2.0))
    tensor(71.3147)
    """

    def __init__(self, n_samples: int) -> None:
        super().__init__()
        deprecated("bayetorch.metrics.ELBO", "`nll + bayeformers.kl_divergence(model) / N`")
        self.n_samples = _count("n_samples", n_samples)

    def forward(self, predictions: Tensor, targets: Tensor, kld: Tensor, kld_weight: float = 1.0) -> Tensor:
        """Return n_samples * nll + kld_weight * kld.

        Args:
            predictions: log-probabilities (B, C), averaged over draws by :meth:`log_mean_exp`.
            targets: (B,) classes.
            kld: the KL, once: not summed over draws.
            kld_weight: finite, >= 0.

        Raises:
            TypeError: an argument is of a wrong kind.
            ValueError: a wrong ``kld_weight``; ``predictions`` that are no log-probabilities.
        """
        if check_number("kld_weight", kld_weight) < 0:
            raise ValueError(f"`kld_weight` must be >= 0, got {kld_weight!r}.")
        if bool((predictions > 1e-3).any()):
            raise ValueError("`predictions` must be log-probabilities <= 0: apply `log_softmax` first.")
        return self.n_samples * F.nll_loss(predictions, targets) + kld_weight * kld

    @staticmethod
    def log_mean_exp(X: Tensor, dim: int | None = None, keepdim: bool = False) -> Tensor:
        """Return log mean exp of numbers. Now: `torch.logsumexp(x, dim) - math.log(n)`.

        Args:
            X: the numbers, of any shape.
            dim: the axis over which their exponentials are averaged; None: over all of them.
            keepdim: whether this axis stays, with size 1.
        """
        if dim is None:
            X, dim = X.reshape(-1), 0
        return X.logsumexp(dim, keepdim) - math.log(X.shape[dim])


class UncertaintyOfClasses(NamedTuple):
    """``epistemic`` and ``aleatoric`` (..., C, C), and the predicted class: (...), an int for one example."""

    epistemic: Tensor
    aleatoric: Tensor
    prediction: Tensor | int


class Uncertainty:
    """Covariance form of the uncertainty over draws, probabilities by softplus normalisation (Shridhar et al. 2018).

    Now: `bayeformers.predict`, or `bayeformers.metrics.covariance_uncertainty(logits, "softplus")` of your own draws.

    Args:
        samples: S >= 1 draws.
        batched: whether inputs have an axis of examples; as formerly, they have none.

    >>> from bayeformers.compat.bayetorch.layers import BayesianLinear
    >>> uncertainty = Uncertainty(samples=8, batched=True)
    >>> epistemic, aleatoric, prediction = uncertainty(BayesianLinear(4, 3), torch.ones(5, 4))
    >>> epistemic.shape, prediction.shape
    (torch.Size([5, 3, 3]), torch.Size([5]))
    """

    def __init__(self, samples: int, batched: bool = False) -> None:
        deprecated("bayetorch.metrics.Uncertainty", '`bayeformers.metrics.covariance_uncertainty(logits, "softplus")`')
        self.samples = _count("samples", samples)
        self.batched = check_bool("batched", batched)

    def __call__(self, model: nn.Module, X: Tensor) -> UncertaintyOfClasses:
        """Return the epistemic and aleatoric covariance of the classes, and the decision.

        Args:
            model: with Bayesian layers; gives logits (B, C), or (logits, kl).
            X: one example, or with ``batched=True`` a batch of them.

        Raises:
            TypeError: an argument is of a wrong kind.
            ValueError: ``X`` is no tensor; ``model`` has no Bayesian layer or gives no logits (B, C).
        """
        if not isinstance(X, Tensor):
            raise TypeError(f"`X` must be a tensor, got {type(X).__name__}.")
        seed, batch = fresh_seed(), X if self.batched else X[None]
        with torch.no_grad():
            logits = torch.stack([_logits_of_draw(model, batch, index, seed) for index in range(self.samples)])
        epistemic, aleatoric = covariance_uncertainty(logits, "softplus")
        p = F.softplus(logits)
        decision = (p / p.sum(-1, keepdim=True)).mean(0).argmax(-1)
        if self.batched:
            return UncertaintyOfClasses(epistemic, aleatoric, decision)
        return UncertaintyOfClasses(epistemic[0], aleatoric[0], int(decision[0]))


def _logits_of_draw(model: nn.Module, batch: Tensor, index: int, seed: int) -> Tensor:
    with fixed_draw(model, index, seed):
        output: Any = model(batch)
    logits = output[0] if isinstance(output, tuple) else output
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(batch):
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(
            f"`model` must give logits (B, C) for {len(batch)} examples, got {shape}. Is `X` a batch? Then "
            "`Uncertainty(samples, batched=True)`."
        )
    return logits


def _count(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"`{name}` must be a whole number >= 1, got {value!r}.")
    return value
