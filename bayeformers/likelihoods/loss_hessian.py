r"""Square roots of the Hessian of -log p(y | f) in the logits f, its gradients, its value: what Laplace asks.

The generalised Gauss-Newton matrix is sum_n J_n^T H_n J_n with H_n the expected Hessian of one item's negative
log-likelihood in its logits. With H = sum_k S_k S_k^T, the columns S_k are what is backpropagated from the logits,
never a model's own loss, whose scaling differs from head to head (means over tokens, label smoothing, a missing 1/2).

| family | H | p(y given f) |
| --- | --- | --- |
| classification | diag(p) - p p^T, p = softmax(f) | Categorical(p) |
| multilabel | diag(p (1 - p)), p = sigmoid(f) | independent Bernoulli(p) |
| regression | I: noise 1, a noise s scales it by 1/s^2 | Normal(f, s^2 I) |
| ordinal | J^T (diag(p) - p p^T) J, J = d log p / d f | differences of cumulative logits, see `ordinal` |

Three ways to weigh the columns: `exact` (H itself), `mc` (E = H, with labels drawn from the model: the Fisher matrix),
`empirical` (the given labels' gradients, whose second moment is not H: it vanishes where the model fits perfectly).
Kunstner et al. 2019 (arXiv 1905.12558); Daxberger et al. 2021 (arXiv 2106.14806), section 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..checks import is_finite, is_whole
from ..forward import IGNORED, wide

__all__ = ["Fisher", "Generators", "LossHessian", "made", "uniform"]

Fisher = Literal["exact", "mc", "empirical"]
Generators = torch.Generator | Sequence[torch.Generator]


class LossHessian:
    """The Laplace side of a `Likelihood`.

    The methods check logits (..., C) and labels, compute in at least float32 without gradient, and give columns in the
    logits' dtype. All raise ValueError for logits of another shape, too few, NaN or +inf, and for labels that do not
    fit: integers (...) or (..., 1) in [0, C) of classes, (..., C) in [0, 1] of a multi-label head, finite numbers
    (..., C), or (...) if C = 1, of a regression; -100 ignores an item, or one label, but is a value of a regression.
    """

    family: ClassVar[str | None] = None  # for `laplace.fit(likelihood=...)`, of one formula; None: no Laplace posterior

    def num_columns(self, num_outputs: int) -> int:
        """How many columns `hessian_columns` gives, the rank of H: C - 1 for classes, else C."""
        rank = self._rank(num_outputs)
        if rank < 1:
            least, remedy = (1, "") if num_outputs < 1 else (2, "; one sigmoid logit is `multilabel`")
            raise ValueError(f"A {self.family} needs at least {least} output(s), got {num_outputs}{remedy}.")
        return rank

    def hessian_columns(self, logits: Tensor) -> Iterator[Tensor]:
        """Tensors S_k of the logits' shape, one at a time, whose sum_k S_k S_k^T is H of every item."""
        values = self._checked(logits)
        return (column.to(logits.dtype) for column in self._columns(values))

    def sampled_columns(self, logits: Tensor, *, num_samples: int, generator: Generators) -> Iterator[Tensor]:
        """Monte-Carlo columns S_m with E[sum_m S_m S_m^T] = H for every item, drawn independently per item (token).

        S_m is the gradient of -log p(yhat | f) / sqrt(M) for a label yhat that the model draws: its covariance is H.

        Args:
            logits: (..., C).
            num_samples: M >= 1, the number of columns.
            generator: of the CPU, so that draws are the same for every device; or one for each of the first axis.

        Returns:
            An iterator over M tensors of the logits' shape.

        Raises:
            ValueError: fewer than one sample, or a generator of another device.
        """
        values = self._checked(logits)
        if not is_whole(num_samples) or num_samples < 1:
            raise ValueError(f"`num_samples` must be an integer >= 1, got {num_samples!r}.")
        for one in [generator] if isinstance(generator, torch.Generator) else generator:
            if one.device.type != "cpu":
                raise ValueError(
                    f"`generator` must be of the CPU, so that draws agree on all devices, got {one.device}."
                )
        scale = math.sqrt(num_samples)
        return (self._sampled(values, generator).div_(scale).to(logits.dtype) for _ in range(num_samples))

    def empirical_column(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The gradient of -log p(labels | logits) in the logits; 0 where ignored."""
        values = self._checked(logits)
        return self._gradient(values, self._labels(values, labels)).to(logits.dtype)

    def log_likelihood(self, logits: Tensor, labels: Tensor, noise_std: float = 1.0) -> Tensor:
        """Sum log p(labels | logits) over all that is not ignored.

        Args:
            logits: (..., C).
            labels: see the class.
            noise_std: s > 0, of a regression, whose constant -log(s) - log(2 pi) / 2 per number is included.

        Returns:
            Nats: a float64 scalar on the CPU.

        Raises:
            ValueError: ``noise_std`` is not finite and > 0.
        """
        values = self._checked(logits)
        labels = self._labels(values, labels)
        if not (is_finite(noise_std) and noise_std > 0):
            raise ValueError(f"`noise_std` must be finite and > 0, got {noise_std!r}.")
        return -self._losses(values, labels, noise_std).cpu().double().sum()

    def label_mask(self, logits: Tensor, labels: Tensor) -> Tensor:
        """True where a logit enters the likelihood of these labels; (..., 1) for classes, else (..., C)."""
        return self._mask(self._labels(self._checked(logits), labels))

    # -- what a family defines; values are logits in float32 or wider, without gradient -------------------------------

    def _rank(self, num_outputs: int) -> int:
        return num_outputs

    def _diverged(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """(numbers, where they are wrong): what says that logits are not finite."""
        return values, ~values.isfinite()

    def _labels(self, values: Tensor, labels: Tensor) -> Tensor:
        """Checked, on the device of ``values``, in the shape and dtype in which the methods below take them."""
        raise NotImplementedError

    def _mask(self, labels: Tensor) -> Tensor:
        return labels != IGNORED

    def _columns(self, values: Tensor) -> Iterator[Tensor]:
        raise NotImplementedError

    def _gradient(self, values: Tensor, labels: Tensor) -> Tensor:
        raise NotImplementedError

    def _sampled(self, values: Tensor, generator: Generators) -> Tensor:
        """The gradient for labels that the model draws, one of every item; a new tensor."""
        raise NotImplementedError

    def _losses(self, values: Tensor, labels: Tensor, noise_std: float = 1.0) -> Tensor:
        """-log p(labels | f), not summed; 0 where ignored."""
        raise NotImplementedError

    def _checked(self, logits: Tensor) -> Tensor:
        if logits.dim() < 2 or not logits.is_floating_point():
            raise ValueError(f"`logits` must be floating point (..., C), got {logits.dtype} {tuple(logits.shape)}.")
        self.num_columns(logits.shape[-1])
        values = wide(logits.detach())
        numbers, wrong = self._diverged(values)
        if bool(wrong.any()):
            found = numbers[wrong][0].item()
            raise ValueError(f"`logits` must be finite, got {found}: the model diverged or overflowed.")
        return values


def uniform(like: Tensor, generator: Generators) -> Tensor:
    """U[0, 1) of one shape and device, in float64: float32 would draw outcomes rarer than 2^-24 too often or never."""
    dtype = torch.float32 if like.device.type == "mps" else torch.float64  # MPS has no float64
    return made(torch.rand, like.shape, generator, dtype).to(like.device)


def made(draw: Callable[..., Tensor], shape: torch.Size, generator: Generators, dtype: torch.dtype) -> Tensor:
    """Return random numbers of one generator, or of one for each of the first axis, on the CPU.

    Args:
        draw: a function of torch such as `torch.rand`.
        shape: the shape of the result.
        generator: one generator, or as many as the first axis is long.
        dtype: the numbers' dtype.
    """
    if isinstance(generator, torch.Generator):
        return draw(shape, generator=generator, dtype=dtype)
    return torch.stack([draw(shape[1:], generator=one, dtype=dtype) for one in generator])
