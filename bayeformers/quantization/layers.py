"""Layers whose weight is held in INT8: torch's layers with the codes in place of the Parameter.

`weight` is a property, so every operation of the layer, and whoever reads the weight, gets its value under the draw
that is held. A Linear or Conv1D can multiply in INT8; the others compute in float with the weight they hold.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
import transformers.pytorch_utils
from torch import Tensor, nn

from ..conversion.registry import bayesian_class
from ..nn import BayesianModule
from .codes import Codes, int8_product
from .drawn import Drawn

Arithmetic = Literal["int8", "float"]


class QuantizedLayer(nn.Module):
    """Mixin over a torch layer: its weight is ``weight_codes`` (int8) times ``weight_step`` (float32, per channel).

    Inference only: the weight has no gradient. In `train()` as in `eval()` it is the mean, unless a draw is held.

    Attributes:
        axis: of the channels in the weight.
        arithmetic: of the layer's products.
        drawn: the weight under the held draw; None: the mean.
        dtype: what `weight` is read as.
    """

    torch_class: ClassVar[type[nn.Module]]
    axis: ClassVar[int] = 0
    multiplies: ClassVar[bool] = False

    arithmetic: Arithmetic
    drawn: Drawn | None
    dtype: torch.dtype
    weight_codes: Tensor
    weight_step: nn.Parameter

    def become_quantized(self, codes: Tensor, step: nn.Parameter, arithmetic: Arithmetic, dtype: torch.dtype) -> None:
        """Give up the float weight; layers with tied weights are given the same two tensors.

        Args:
            codes: int8, of the shape of the weight.
            step: float32, of size 1 on all axes but the channels'.
            arithmetic: how the layer multiplies, in "int8" or in "float".
            dtype: what `weight` is read as.
        """
        del self._parameters["weight"]
        self.register_buffer("weight_codes", codes)
        self.register_parameter("weight_step", step)
        self.arithmetic, self.dtype, self.drawn = arithmetic, dtype, None

    @property
    def mean(self) -> Codes:
        """The posterior mean."""
        return Codes(self.weight_codes, self.weight_step)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Devices and the dtype of `weight` change as asked; steps stay float32."""
        step = self.weight_step.data
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.weight_step.data = step.to(self.weight_step.device)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=step.device)).dtype
        return self

    if TYPE_CHECKING:  # torch's annotations know no property
        weight: Any
        bias: Any
    else:

        @property
        def weight(self) -> Tensor:
            """The weight under the held draw, in float: made anew at every reading."""
            value = self.mean.dequantize() if self.drawn is None else self.drawn.value()
            return value.to(self.dtype)


class _Product(QuantizedLayer):
    """y = x W^T + b; in INT8 with codes for each row of x."""

    multiplies = True

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer with its mean or the held draw."""
        if self.arithmetic == "float" or not x.is_cpu or not x.numel():
            output: Tensor = super().forward(x)
            return output
        coded = self.mean if self.drawn is None else self.drawn.codes()
        return product(x, coded, self.bias, self.axis)


class Linear(_Product, nn.Linear):
    """`torch.nn.Linear` in INT8. Shape: (*, in_features) -> (*, out_features)."""

    torch_class = nn.Linear


class Conv1D(_Product, transformers.pytorch_utils.Conv1D):
    """transformers' `Conv1D` in INT8, weight (nx, nf). Shape: (*, nx) -> (*, nf)."""

    torch_class = transformers.pytorch_utils.Conv1D
    axis = 1


class Embedding(QuantizedLayer, nn.Embedding):
    """`torch.nn.Embedding` with a table in INT8: only the rows that are looked up become float."""

    torch_class = nn.Embedding

    def forward(self, input: Tensor) -> Tensor:
        """Look the ids up in the mean or the held draw."""
        return (self.mean.rows(input) if self.drawn is None else self.drawn.rows(input)).to(self.dtype)


class Conv1d(QuantizedLayer, nn.Conv1d):
    """`torch.nn.Conv1d` with weights in INT8, computed in float."""

    torch_class = nn.Conv1d


class Conv2d(QuantizedLayer, nn.Conv2d):
    """`torch.nn.Conv2d` with weights in INT8, computed in float."""

    torch_class = nn.Conv2d


class Conv3d(QuantizedLayer, nn.Conv3d):
    """`torch.nn.Conv3d` with weights in INT8, computed in float."""

    torch_class = nn.Conv3d


class ConvTranspose1d(QuantizedLayer, nn.ConvTranspose1d):
    """`torch.nn.ConvTranspose1d` with weights in INT8, computed in float."""

    torch_class = nn.ConvTranspose1d
    axis = 1


class ConvTranspose2d(QuantizedLayer, nn.ConvTranspose2d):
    """`torch.nn.ConvTranspose2d` with weights in INT8, computed in float."""

    torch_class = nn.ConvTranspose2d
    axis = 1


class ConvTranspose3d(QuantizedLayer, nn.ConvTranspose3d):
    """`torch.nn.ConvTranspose3d` with weights in INT8, computed in float."""

    torch_class = nn.ConvTranspose3d
    axis = 1


_KINDS: tuple[type[QuantizedLayer], ...] = (
    Linear, Conv1D, Embedding, Conv1d, Conv2d, Conv3d, ConvTranspose1d, ConvTranspose2d, ConvTranspose3d,
)  # fmt: skip
KINDS: dict[type[nn.Module], type[QuantizedLayer]] = {kind.torch_class: kind for kind in _KINDS}


def product(x: Tensor, coded: Codes, bias: Tensor | None, axis: int = 0) -> Tensor:
    """Return x W^T + b in INT8, (*, m), in the dtype of ``x``; the bias is added in float.

    Args:
        x: (*, k), in float, which becomes INT8 row by row.
        coded: W, (m, k), or (k, m) with ``axis`` 1.
        bias: b, (m,) in float; None: the layer has none.
        axis: of the m channels in W.
    """
    codes = coded.codes if axis == 0 else coded.codes.t()
    found = int8_product(x.reshape(-1, x.shape[-1]), codes, coded.step.flatten())
    if bias is not None:
        found = found + bias
    return found.to(x.dtype).view(*x.shape[:-1], len(codes))


def quantized_kind(
    module: nn.Module, owner: nn.Module | None, attribute: str
) -> tuple[type[QuantizedLayer] | None, str]:
    """Return the INT8 class for this instance, or None and the reason why it stays float.

    Args:
        module: a deterministic layer.
        owner: the module that has it.
        attribute: under which name.
    """
    kind, reason = bayesian_class(module, owner, attribute)
    if kind is None:
        return None, reason
    torch_class = next((base for base in kind.__mro__ if base in KINDS), None)
    is_layer = issubclass(kind, BayesianModule) and not getattr(kind, "is_read", False)
    if torch_class is None or not is_layer:
        return None, f"no INT8 for {type(module).__name__}"
    found = KINDS[torch_class]
    return (found if type(module) is torch_class else _cooperative(type(module), found)), ""  # type: ignore[arg-type]


@functools.cache
def _cooperative(source: type[nn.Module], kind: type[QuantizedLayer]) -> type[QuantizedLayer]:
    """A subclass that adds to `super().forward(...)` finds the INT8 layer there."""
    members = {"torch_class": source, "__module__": __name__, "__reduce_ex__": _reduce}
    return type(source.__name__, (source, kind), members)


def _reduce(self: QuantizedLayer, protocol: Any) -> tuple[Any, ...]:
    """Pickle by the source class: the class itself is made on demand and has no importable name."""
    kind = next(base for base in type(self).__mro__ if base in KINDS.values())
    return _rebuild, (type(self).torch_class, kind), self.__getstate__()  # type: ignore[no-untyped-call]


def _rebuild(source: type[nn.Module], kind: type[QuantizedLayer]) -> nn.Module:
    made = _cooperative(source, kind)  # type: ignore[arg-type]
    return made.__new__(made)
