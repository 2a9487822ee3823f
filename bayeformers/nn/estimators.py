"""Estimators of the ELBO's gradient: how a layer that is linear in its weights sees their noise.

A layer knows shapes, an estimator knows noise: a new estimator is one class here, a new layer needs none. All are
unbiased; they differ in how much noise the gradient keeps, and in what their outputs are jointly:

===========================  ==========================================================================
`reparameterization`         one network for the whole batch
`flipout`                    one network per example, any two of them uncorrelated
`local_reparameterization`   every output element has weights of its own
===========================  ==========================================================================
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .variational import Variational

EstimatorName = Literal["reparameterization", "flipout", "local_reparameterization"]

Operation = Callable[..., Tensor]
"""A layer's arithmetic, ``operation(*inputs, weight, bias)``: linear in each input and in (weight, bias) together."""

Inputs = tuple[Tensor, ...]

_TINY = 1e-20  # variance under which the square root's infinite slope is cut off


@dataclass(frozen=True)
class Layout:
    """Where a layer's input and output have their examples and their features.

    Attributes:
        features: axis of the features of inputs and output, from the end.
        examples: axis of the examples.
        transposed: whether the weight is (in, out, ...) instead of (out, in, ...).
    """

    features: int = -1
    examples: int = 0
    transposed: bool = False

    def is_batched(self, input: Tensor) -> bool:
        """Whether an input has an axis of examples: a vector, or one image, has none."""
        return input.dim() > -self.features

    def signs(self, weight: Variational, axis: int, like: Tensor) -> Tensor:
        """Return random signs of one axis of a weight, per example and feature of a tensor, broadcastable to it.

        Args:
            weight: whose draw gives the signs.
            axis: of the weight, as long as ``like`` has features.
            like: inputs or outputs of the layer, which have the examples, the features and the dtype.
        """
        examples, features = like.shape[self.examples], like.shape[self.features]
        signs = weight.signs(axis, (examples, features), like.device).to(like.dtype)
        shape = [1] * like.dim()
        shape[self.examples], shape[self.features] = examples, features
        if self.examples % like.dim() > self.features % like.dim():
            signs = signs.mT
        return signs.reshape(shape)


LAST = Layout()
"""Examples first, features last: Linear and its kin."""


class Estimator(Protocol):
    """Gives a layer's output with random weights."""

    name: EstimatorName

    def affine(
        self, operation: Operation, inputs: Inputs, weight: Variational, bias: Variational | None, layout: Layout = LAST
    ) -> Tensor:
        """Return the random output of ``operation(*inputs, weight, bias)``, of the shape that it gives.

        Args:
            operation: the layer's arithmetic, linear in each input and in (weight, bias) together.
            inputs: the tensors that it multiplies by the weight, in the form that ``layout`` tells.
            weight: the random weight, (out, in, ...), or (in, out, ...) in a transposed layout.
            bias: the random bias, (out,); None: the layer has none.
            layout: where inputs and output have their examples and features.
        """

    def lookup(self, ids: Tensor, weight: Variational) -> Tensor:
        """Rows of a random table: ids (*) -> (*, width)."""


class Reparameterization:
    """One w = loc + scale * eps, shared by the whole batch (Blundell et al. 2015, arXiv 1505.05424, section 3.2)."""

    name: EstimatorName = "reparameterization"

    def affine(
        self, operation: Operation, inputs: Inputs, weight: Variational, bias: Variational | None, layout: Layout = LAST
    ) -> Tensor:
        """Return operation(*inputs, w, b) with w and b from the active draw.

        Args:
            operation: the layer's arithmetic.
            inputs: the tensors that it multiplies by the weight.
            weight: the random weight, of which one value serves the batch.
            bias: the random bias, (out,); None: the layer has none.
            layout: of inputs and output, which plays no part here.
        """
        return operation(*inputs, weight.sample(), None if bias is None else bias.sample())

    def lookup(self, ids: Tensor, weight: Variational) -> Tensor:
        """The looked-up rows of the active draw, and no others."""
        if torch.compiler.is_compiling():  # it cannot trace the data-dependent shape of `unique`
            return weight.sample_rows(ids.flatten()).view(*ids.shape, -1)
        rows, inverse = torch.unique(ids, return_inverse=True)
        return F.embedding(inverse, weight.sample_rows(rows))


class Flipout:
    """One draw whose signs change from example to example (Wen et al. 2018, arXiv 1803.04386, eq. 4).

    y = F(x; loc) + F(x * r; scale * eps) * t with r, t in {-1, 1} per example and feature. All tokens or positions of
    an example, and all uses of a tensor in a forward, share the example's signs and so its weight draw. Inputs without
    an axis of examples get plain reparameterization. Costs a second forward of the layer.
    """

    name: EstimatorName = "flipout"

    def affine(
        self, operation: Operation, inputs: Inputs, weight: Variational, bias: Variational | None, layout: Layout = LAST
    ) -> Tensor:
        """Return operation(*inputs, loc) + operation(*(x * r), scale * eps) * t.

        Args:
            operation: the layer's arithmetic.
            inputs: the tensors that it multiplies by the weight; each x gets signs r of its own.
            weight: the random weight, whose draw gives eps, r and t.
            bias: the random bias, (out,), under the same signs t; None: the layer has none.
            layout: where inputs and output have their examples and features.
        """
        if not layout.is_batched(inputs[0]):
            return REPARAMETERIZATION.affine(operation, inputs, weight, bias, layout)
        mean = operation(*inputs, weight.loc, None if bias is None else bias.loc)
        first = 0 if layout.transposed else 1  # the weight's axis that meets the input
        flipped = [x * layout.signs(weight, first + number, x) for number, x in enumerate(inputs)]
        noise = operation(*flipped, weight.perturbation, None if bias is None else bias.perturbation)
        return mean + noise * layout.signs(weight, 1 if layout.transposed else 0, noise)

    def lookup(self, ids: Tensor, weight: Variational) -> Tensor:
        """Return rows of the mean, plus rows of the noise times the example's signs of row and column, as in `affine`.

        A table tied to a Linear so is one draw per example in both uses.
        """
        if ids.dim() < 2:
            return REPARAMETERIZATION.lookup(ids, weight)
        if torch.compiler.is_compiling():
            noise = F.embedding(ids, weight.perturbation)
        else:
            rows, inverse = torch.unique(ids, return_inverse=True)
            noise = F.embedding(inverse, weight.rows(rows).perturbation)
        by_column = LAST.signs(weight, 1, noise)
        by_row = weight.signs(0, (len(ids), len(weight.loc)), ids.device)
        by_row = by_row.gather(1, ids.flatten(1)).reshape(*ids.shape, 1)
        return F.embedding(ids, weight.loc, weight.spec.unlearned_row) + noise * by_column * by_row.to(noise.dtype)


class LocalReparameterization:
    """Draws the layer's output instead of its weights (Kingma et al. 2015, arXiv 1506.02557, eq. 6).

    y ~ N(F(x; loc), F(x^2; scale^2)), each element on its own: exact in distribution where a layer sees one vector per
    example. With tokens or positions each is treated as having its own weights, and so is each use of a tensor. It is
    therefore for training only: a held draw, and with it every prediction, is one network. A lookup table keeps one
    draw of its rows.
    """

    name: EstimatorName = "local_reparameterization"

    def affine(
        self, operation: Operation, inputs: Inputs, weight: Variational, bias: Variational | None, layout: Layout = LAST
    ) -> Tensor:
        """Return operation(*inputs, loc) + sqrt(operation(*(x^2), scale^2)) * noise, by torch's default generator.

        Args:
            operation: the layer's arithmetic.
            inputs: the tensors x that it multiplies by the weight.
            weight: the random weight, of which means and variances are used.
            bias: the random bias, (out,); None: the layer has none.
            layout: of inputs and output, which plays no part here.
        """
        mean = operation(*inputs, weight.loc, None if bias is None else bias.loc)
        squares = tuple(_without_half(x).square() for x in inputs)
        dtype = squares[0].dtype
        with torch.autocast(mean.device.type, enabled=False):  # it would square in float16, which overflows
            variance = operation(*squares, weight.variance.to(dtype), None if bias is None else bias.variance.to(dtype))
        output: Tensor = _AddNoise.apply(mean, variance, torch.randn_like(variance))[0]  # type: ignore[no-untyped-call]
        return output

    def lookup(self, ids: Tensor, weight: Variational) -> Tensor:
        """As reparameterization: a row is the same at every position."""
        return REPARAMETERIZATION.lookup(ids, weight)


class _AddNoise(torch.autograd.Function):
    """mean + sqrt(variance) * noise, keeping one tensor of the output's size for the gradient instead of three."""

    generate_vmap_rule = True

    @staticmethod
    def forward(mean: Tensor, variance: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        scale = variance.clamp_min(_TINY).sqrt_()
        output = mean + (noise * scale).to(mean.dtype)
        slope = noise / F.threshold(scale, 1.5 * _TINY**0.5, torch.inf)  # 0 where the variance is cut off
        return output, slope

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None]:
        (slope,) = ctx.saved_tensors
        return grad, (grad * slope).mul_(0.5), None


def _without_half(tensor: Tensor) -> Tensor:
    """float16 as float32: its squares overflow from 256 on. bfloat16 has the range."""
    return tensor.float() if tensor.dtype == torch.float16 else tensor


REPARAMETERIZATION = Reparameterization()
ESTIMATORS: dict[str, Estimator] = {
    estimator.name: estimator for estimator in (REPARAMETERIZATION, Flipout(), LocalReparameterization())
}


def get_estimator(name: str) -> Estimator:
    """Return the estimator of that name.

    Raises:
        ValueError: unknown name.
    """
    if not isinstance(name, str) or name not in ESTIMATORS:
        raise ValueError(f"`estimator` must be one of {sorted(ESTIMATORS)}, got {name!r}.")
    return ESTIMATORS[name]
