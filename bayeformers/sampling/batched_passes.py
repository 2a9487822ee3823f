"""Passes of one model under S draws, several draws at a time: where that pays, and gives what a loop gives."""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from ..forward import Inputs, batch_size, call, tensors_in, without_cache
from .batched import FAILURES, MAX_BYTES, BatchedDraws, CannotBatch, repeated, same_output
from .random_state import left_alone
from .views import View, modules_of, private_view

logger = logging.getLogger(__name__)

Draw = Callable[[int], AbstractContextManager[None]]

MAX_TOKENS = {"cpu": 256, "cuda": 4096}
"""So many tokens fill a device: beyond them a batch of draws costs what a loop costs."""
MIN_DRAWS = 3
MAX_SHARE = 0.1
"""Where more of the weights is random, a draw reads most of its weights anew, in a batch as in a loop."""
_PATCH = 768  # numbers of an image that count as a token

_verdicts: WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], str | None]] = WeakKeyDictionary()


class BatchedPasses:
    """S draws of thin random layers, in batches of draws.

    Args:
        model: whose passes.
        view: the private view of it in which draws are held; None: they are held in the model itself.
        random: the model's Parameters that a draw affects.
        draw: holds one draw.
        inputs: one batch, of B rows.

    Raises:
        CannotBatch: it cannot be done, or would not pay.
    """

    def __init__(
        self, model: nn.Module, view: View | None, random: list[nn.Parameter], draw: Draw, inputs: Inputs
    ) -> None:
        self._origin, self._draw, self._in_view, self._inputs = model, draw, view is not None, inputs
        self._known = _verdicts.setdefault(model, {})
        self._key = frozenset(map(id, modules_of(model))), frozenset(map(id, random)), _kind(inputs)
        reason = self._known.get(self._key)
        self._size = batch_size(inputs)
        self.at_once = self._limit(random)
        if reason is not None or self.at_once < MIN_DRAWS:
            raise CannotBatch(reason or "a single draw fills the device, or most weights are random")
        view = private_view(model) if view is None else view
        if view is None:
            raise CannotBatch("the model has no private view")
        self._view, self._batched = view, BatchedDraws(view, random)
        self._options = without_cache(view.model)

    def _limit(self, random: list[nn.Parameter]) -> int:
        """How many draws go into one batch; below 2 where a loop does as well."""
        share, ahead = _thinness(self._origin, random)
        if share > MAX_SHARE or ahead > 0.5:  # what lies ahead of the first random layer is computed once in a loop
            return 0
        tokens = _tokens(self._inputs) * self._size
        room = MAX_TOKENS.get(random[0].device.type, 0) // max(tokens, 1)
        return min(room, MAX_BYTES // max(sum(p.numel() * p.element_size() for p in random), 1))

    def run(self, num_samples: int) -> Iterator[Any]:
        """Run draws 0 to ``num_samples - 1``, without gradients.

        Yields:
            The output under each.

        Raises:
            CannotBatch: a batch failed, or its first and last draw, at first use, were not what a loop gives.
        """
        for start in range(0, num_samples, self.at_once):
            indices = range(start, min(start + self.at_once, num_samples))
            try:
                outputs = self._several(indices)
                reason = None if self._key in self._known else self._difference(indices, outputs)
            except FAILURES as error:
                reason = f"a batch of draws failed with {error!r}"
            self._known[self._key] = reason
            if reason is not None:
                raise CannotBatch(reason)
            yield from outputs

    def _several(self, indices: range) -> list[Any]:
        count, size = len(indices), self._size
        self._batched.read(map(self._draw, indices), in_view=self._in_view)
        run = functools.partial(call, self._view.model, repeated(self._inputs, size, count), **self._options)
        with torch.no_grad(), self._batched.installed([count * size]), left_alone(self._origin, run):
            whole = run()
        return [_part(whole, slice(place * size, (place + 1) * size), count * size) for place in range(count)]

    def _difference(self, indices: range, outputs: list[Any]) -> str | None:
        run = functools.partial(call, self._view.model, self._inputs, **self._options)
        for place in {0, len(indices) - 1}:
            with torch.no_grad(), self._draw(indices[place]), left_alone(self._origin, run):
                if not same_output(outputs[place], run()):
                    return "a batch of draws differed from the loop"
        return None


def in_batches(
    loop: Callable[[], Iterator[Any]],
    model: nn.Module,
    view: View | None,
    random: list[nn.Parameter],
    draw: Draw,
    inputs: Inputs,
    num_samples: int,
) -> Iterator[Any]:
    """Run S draws in batches of draws where that pays, and from where it fails on one by one.

    Args:
        loop: gives the outputs one by one.
        model: as of `BatchedPasses`, with all up to ``inputs``.
        view: in which draws are held.
        random: Parameters that a draw affects.
        draw: holds one.
        inputs: of B rows.
        num_samples: number S of draws.

    Yields:
        The output under each draw.
    """
    done = 0
    try:
        for output in BatchedPasses(model, view, random, draw, inputs).run(num_samples):
            done += 1
            yield output
    except CannotBatch as reason:
        logger.debug("Draws of %s run one by one: %s.", type(model).__name__, reason)
    if done < num_samples:
        yield from itertools.islice(loop(), done, None)


def _thinness(model: nn.Module, random: list[nn.Parameter]) -> tuple[float, float]:
    """Share of the matrices' elements that is random, and that lies ahead of the first random one."""
    chosen, tables = {id(parameter) for parameter in random}, {id(p) for p in _tables(model)}
    total = ahead = 0
    is_ahead = True
    for parameter in model.parameters():
        is_ahead = is_ahead and id(parameter) not in chosen
        if parameter.ndim > 1 and id(parameter) not in tables:
            total += parameter.numel()
            ahead += parameter.numel() * is_ahead
    return sum(p.numel() for p in random) / max(total, 1), ahead / max(total, 1)


def _tables(model: nn.Module) -> Iterator[Tensor]:
    """Weights that are looked up, which costs nothing: those of tables that are no head too."""
    return (module.weight for module in modules_of(model) if isinstance(module, nn.Embedding))


def _tokens(inputs: Inputs) -> int:
    """How many rows of a layer's input one example has, about."""
    first = next(tensors_in(inputs))
    if not first.is_floating_point():
        return int(first[0].numel()) if first.ndim else 1
    if first.ndim <= 3:
        return first.shape[1] if first.ndim == 3 else 1
    return max(1, int(first[0].numel()) // _PATCH)


def _kind(inputs: Inputs) -> tuple[Any, ...]:
    names = tuple(inputs) if isinstance(inputs, dict) else type(inputs).__name__
    return names, tuple((tensor.ndim, tensor.dtype) for tensor in tensors_in(inputs))


def _part(output: Any, rows: slice, size: int) -> Any:
    """Return one draw's rows of an output of ``size`` rows.

    Raises:
        CannotBatch: a tensor in it has no such rows.
    """
    if isinstance(output, Tensor):
        if not output.ndim or len(output) != size:
            raise CannotBatch(f"an output of shape {tuple(output.shape)} has no row for each of {size} inputs")
        return output[rows]
    if isinstance(output, ModelOutput):
        return type(output)(**{name: _part(value, rows, size) for name, value in output.items()})
    if isinstance(output, dict):
        return {name: _part(value, rows, size) for name, value in output.items()}
    if type(output) in (tuple, list):
        return type(output)(_part(value, rows, size) for value in output)
    if output is None or isinstance(output, bool | int | float | str):
        return output
    raise CannotBatch(f"an output holds a {type(output).__name__}")
