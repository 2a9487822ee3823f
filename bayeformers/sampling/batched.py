"""All draws in one batch: S draws x B inputs are S * B rows, and each random layer multiplies its rows by their draw.

A draw of thin layers, such as adapters or a head, differs from another in a few small matrices. One pass of S * B rows
reads the frozen weights once, where a loop over draws reads them S times; each random layer becomes one batched
product. Rows are draw-major: row s * B + b is input b under draw s.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..forward import mapped, tensors_in
from .views import View, modules_of

Operation = Callable[[nn.Module, Tensor, Mapping[str, Tensor]], Tensor]
"""A layer's arithmetic for S draws, ``operation(layer, input, values)``, of an input with S * B rows: ``values`` has
each random tensor of the layer stacked over the draws, (S, ...)."""

_OPERATIONS: dict[type[nn.Module], Operation] = {}


MAX_BYTES = 2 * 2**30
"""Memory for the random tensors of one batch of draws."""


class CannotBatch(Exception):
    """Draws of this model, or of these inputs, do not go into one batch."""


FAILURES = (CannotBatch, RuntimeError, ValueError, TypeError, IndexError)
"""What a batch of draws raises where a loop over them may run."""


def register_batched(kind: type[nn.Module], operation: Operation) -> None:
    """Say how a layer is computed for several draws at once.

    Args:
        kind: the layer's exact class: a subclass may compute something else.
        operation: its arithmetic.
    """
    _OPERATIONS[kind] = operation


def repeated(inputs: Any, size: int, times: int) -> Any:
    """Return inputs whose tensors of ``size`` rows are repeated, draw-major; other tensors stay as they are.

    Args:
        inputs: tensors, nested as a model's forward takes them.
        size: number B of rows.
        times: number S of draws.
    """
    return mapped(inputs, lambda x: x.repeat(times, *[1] * (x.ndim - 1)) if x.ndim and len(x) == size else x)


class BatchedDraws:
    """Random layers of a private view that compute S draws at once.

    Args:
        view: a private view of the model.
        random: the model's Parameters that a draw affects.

    Raises:
        CannotBatch: one of them belongs to a layer that has no batched product, or a layer's forward is wrapped.
    """

    def __init__(self, view: View, random: Iterable[nn.Parameter]) -> None:
        chosen = {id(parameter) for parameter in random}
        self._view = view
        self._owners: list[tuple[nn.Module, nn.Module, list[str]]] = []
        found: set[int] = set()
        for module in modules_of(view.origin):
            names = [name for name, p in module._parameters.items() if p is not None and id(p) in chosen]
            if names:
                self._check(module)
                self._owners.append((module, view.module(module), names))
                found |= {id(module._parameters[name]) for name in names}
        if found != chosen or not found:
            raise CannotBatch("a random Parameter is not registered in the model, or there is none")
        self._stacks: dict[int, Tensor] = {}
        self.rows: frozenset[int] = frozenset()
        self._undrawn: int | None = None

    @staticmethod
    def _check(module: nn.Module) -> None:
        if type(module) not in _OPERATIONS:
            raise CannotBatch(f"a {type(module).__name__} has no batched product")
        if "forward" in vars(module):
            raise CannotBatch(f"the forward of a {type(module).__name__} is wrapped")

    @property
    def bytes_per_draw(self) -> int:
        """Memory of one draw of the random tensors."""
        tensors = {id(m._parameters[n]): m._parameters[n] for m, _, names in self._owners for n in names}
        return sum(p.numel() * p.element_size() for p in tensors.values() if p is not None)

    def read(self, draws: Iterable[AbstractContextManager[None]], *, in_view: bool) -> int:
        """Take the values of some draws.

        Args:
            draws: contexts, each of which holds one draw, in the view or in the model itself.
            in_view: which of the two.

        Returns:
            Their number.
        """
        values: dict[int, list[Tensor]] = {}
        count = 0
        for draw in draws:
            with torch.no_grad(), draw:
                for module, counterpart, names in self._owners:
                    for name in names:
                        held = values.setdefault(id(module._parameters[name]), [])
                        if len(held) == count:  # else another owner of the tensor gave it
                            held.append(getattr(counterpart if in_view else module, name).detach().clone())
            count += 1
        self._stacks = {key: torch.stack(held) for key, held in values.items()}
        return count

    @contextmanager
    def installed(self, rows: Iterable[int], undrawn: int | None = None) -> Iterator[None]:
        """The view computes the draws that were read, until exit.

        Args:
            rows: how many rows a layer's input may have: S times the number of inputs. Any other number means that the
                layer sees something else than the inputs in order, and raises `CannotBatch`.
            undrawn: so many rows are of inputs that no random layer has seen yet: each draw takes all of them.
        """
        self.rows, self._undrawn = frozenset(rows), undrawn
        kept = [dict(counterpart._parameters) for _, counterpart, _ in self._owners]
        try:
            for module, counterpart, names in self._owners:
                values = {name: self._stacks[id(module._parameters[name])] for name in names}
                vars(counterpart)["forward"] = self._forward(counterpart, values)
                for name in names:
                    counterpart._parameters[name] = _unreadable(values[name])
            yield
        finally:
            for (_, counterpart, _), parameters in zip(self._owners, kept, strict=True):
                vars(counterpart).pop("forward", None)
                counterpart._parameters.update(parameters)

    def _forward(self, module: nn.Module, values: Mapping[str, Tensor]) -> Callable[[Tensor], Tensor]:
        operation = _OPERATIONS[type(module)]

        @functools.wraps(type(module).forward)
        def forward(input: Tensor) -> Tensor:
            if input.ndim and len(input) == self._undrawn:
                count = len(next(iter(values.values())))
                input = input.repeat(count, *[1] * (input.ndim - 1))
            if not input.ndim or len(input) not in self.rows:
                raise CannotBatch(
                    f"a {type(module).__name__} sees {tuple(input.shape)}, which has none of {sorted(self.rows)} rows"
                )
            return operation(module, input, values)

        return forward


def _unreadable(values: Tensor) -> nn.Parameter:
    """In a random tensor's place: of its shape, dtype and device, but whoever computes with it gets NaN, not a draw."""
    nan = values.new_full((), torch.nan).expand(values.shape[1:])
    return nn.Parameter(nan, requires_grad=False)


def _affine(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Shape: input (S * B, *, in), weight (S, in, out), bias (S, out) or (out,) -> (S * B, *, out)."""
    rows = input.reshape(len(weight), -1, input.shape[-1])
    output = torch.bmm(rows, weight) if bias is None else torch.baddbmm(bias.unsqueeze(-2), rows, weight)
    return output.view(*input.shape[:-1], weight.shape[-1])


def _bias(module: nn.Module, values: Mapping[str, Tensor]) -> Tensor | None:
    return values["bias"] if "bias" in values else module._parameters.get("bias")


def _weight(module: nn.Module, values: Mapping[str, Tensor], count: int) -> Tensor:
    return values["weight"] if "weight" in values else module._parameters["weight"].expand(count, -1, -1)  # type: ignore[union-attr]


def linear(module: nn.Module, input: Tensor, values: Mapping[str, Tensor]) -> Tensor:
    """`torch.nn.Linear` for S draws.

    Args:
        module: the layer.
        input: (S * B, *, in).
        values: its random tensors, stacked.

    Returns:
        Outputs (S * B, *, out).
    """
    count = len(next(iter(values.values())))
    return _affine(input, _weight(module, values, count).mT, _bias(module, values))


def conv1d(module: nn.Module, input: Tensor, values: Mapping[str, Tensor]) -> Tensor:
    """`Conv1D` of transformers, whose weight is (in, out), for S draws; as :func:`linear`."""
    count = len(next(iter(values.values())))
    return _affine(input, _weight(module, values, count), _bias(module, values))


def embedding(module: nn.Module, input: Tensor, values: Mapping[str, Tensor]) -> Tensor:
    """`torch.nn.Embedding` for S draws: ids (S * B, *) -> (S * B, *, width)."""
    if module.max_norm is not None:
        raise CannotBatch("a table with `max_norm` changes its rows")
    weight = values["weight"]
    tables = torch.arange(len(weight), device=input.device).repeat_interleave(len(input) // len(weight))
    offsets = tables.view(-1, *[1] * (input.ndim - 1)) * weight.shape[1]
    return F.embedding(input + offsets, weight.flatten(0, 1))


register_batched(nn.Linear, linear)
register_batched(Conv1D, conv1d)
register_batched(nn.Embedding, embedding)


def same_output(batched: Any, looped: Any) -> bool:
    """Whether a draw's part of a batch is what the loop gives, but for rounding: their tensors, in order."""
    ours, theirs = list(tensors_in(batched)), list(tensors_in(looped))
    return len(ours) == len(theirs) and all(map(_close, ours, theirs))


def _close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    finite = b.isfinite()
    size = float(b[finite].abs().max()) if finite.any() else 0.0
    tolerance = _ROUNDING[b.element_size() > 2] * torch.finfo(b.dtype).eps * size
    return torch.equal(finite, a.isfinite()) and bool((a[finite] - b[finite]).abs().le(tolerance).all())


_ROUNDING = 2**3, 2**10  # units in the last place of the largest value: in 16 bits, and wider
