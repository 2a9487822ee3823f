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
from torch.nn.modules import module as torch_module
from transformers.utils.generic import ModelOutput

from ..forward import Inputs, batch_size, call, tensors_in, without_cache
from .batched import FAILURES, MAX_BYTES, BatchedDraws, CannotBatch, repeated, same_output
from .random_state import all_equal, is_drawing, left_alone, rng_state
from .snapshot import Refused, module_state, unchanged, versions
from .views import View, modules_of, private_view

logger = logging.getLogger(__name__)

Draw = Callable[[int], AbstractContextManager[None]]

MAX_TOKENS = {"cpu": 256, "cuda": 4096}
"""So many tokens fill a device: beyond them a batch of draws costs what a loop costs."""
MIN_DRAWS = 3
MAX_SHARE = 0.1
"""Where more of the weights is random, a draw reads most of its weights anew, in a batch as in a loop."""
MAX_ROWS_BYTES = 64 * 2**20
"""Memory for what one random layer makes of all draws, where the layers ahead of it run once."""
SHARED_DRAWS = 16
"""So many draws share the layers ahead of the random ones, or the loop, which shares them too, does as well."""
_PATCH = 768  # numbers of an image that count as a token

_verdicts: WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], str | None]] = WeakKeyDictionary()


class BatchedPasses:
    """S draws of thin random layers, in batches of draws.

    Where most of the model lies ahead of the first random layer, it runs once, on the B inputs, and that layer is the
    first to see S * B rows: it repeats its input. All that comes later either takes S * B rows, or fails, and then the
    loop runs. So it does where a pass depends on more than inputs and weights: random numbers, hooks, or a state that a
    pass changes.

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
        self._size = batch_size(inputs)
        share, ahead = _thinness(model, random)
        self._is_late = ahead > 0.5
        # a draw that is written into the model itself may write buffers too, which only the loop sees
        is_apart = bool(random) and (view is not None or not self._is_late)
        self.at_once = self._limit(random) if is_apart and share <= MAX_SHARE else 0
        modules, kind = frozenset(map(id, modules_of(model))), _kind(inputs)
        # one row fits many: that it went well says nothing about several
        self._key = modules, frozenset(map(id, random)), kind, self._is_late and self._size == 1
        reason = self._known.get(self._key)
        if reason is not None or self.at_once < MIN_DRAWS:
            raise CannotBatch(reason or "a single draw fills the device, or most weights are random")
        view = private_view(model) if view is None else view
        if view is None:
            raise CannotBatch("the model has no private view")
        self._view, self._batched = view, BatchedDraws(view, random)
        if self._is_late:
            _check_plain(view)
        self._options = without_cache(view.model)

    def _limit(self, random: list[nn.Parameter]) -> int:
        """How many draws go into one batch; below `MIN_DRAWS` where a loop does as well."""
        tokens, kept = _tokens(self._inputs) * self._size, sum(p.numel() * p.element_size() for p in random)
        in_memory = MAX_BYTES // max(kept, 1)
        if not self._is_late:
            return min(MAX_TOKENS.get(random[0].device.type, 0) // max(tokens, 1), in_memory)
        of_a_draw = tokens * max(max((*p.shape, 1)) * p.element_size() for p in random)
        found = min(MAX_ROWS_BYTES // max(of_a_draw, 1), in_memory)
        return found if found >= SHARED_DRAWS else 0

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
        if self._is_late:
            whole = self._once(count)
        else:
            run = functools.partial(call, self._view.model, repeated(self._inputs, size, count), **self._options)
            with torch.no_grad(), self._batched.installed([count * size]), left_alone(self._origin, run):
                whole = run()
        return [_part(whole, slice(place * size, (place + 1) * size), count * size) for place in range(count)]

    def _once(self, count: int) -> Any:
        """The model's output, of S * B rows, by one pass of the B inputs up to the first random layer."""
        run = functools.partial(call, self._view.model, self._inputs, **self._options)
        tensors = list(tensors_in(self._inputs))
        given, before = versions(tensors), rng_state()
        state = None if self._key in self._known else _state(self._view)
        with torch.no_grad(), self._batched.installed([count * self._size], self._size), left_alone(self._origin, run):
            whole = run()
            after = rng_state()
        if not all_equal(before, after) and is_drawing(self._origin, run):
            raise CannotBatch("the model draws random numbers, and each pass its own")
        if versions(tensors) != given:
            raise CannotBatch("the model changes its inputs")
        if state is not None and not unchanged(state, _state(self._view)):
            raise CannotBatch("a pass changes the model")
        return whole

    def _difference(self, indices: range, outputs: list[Any]) -> str | None:
        run = functools.partial(call, self._view.model, self._inputs, **self._options)
        for place in {0, len(indices) - 1}:
            with torch.no_grad(), self._draw(indices[place]), left_alone(self._origin, run):
                if not same_output(outputs[place], run()):
                    return "a batch of draws differed from the loop"
        return None


def _check_plain(view: View) -> None:
    """Raise CannotBatch where a pass is more than the layers' forwards, or cannot be compared with another."""
    if torch.is_inference_mode_enabled():
        raise CannotBatch("tensors made in inference mode have no version counter")
    hooked = (module for module in view.modules.values() if module._forward_hooks or module._forward_pre_hooks)
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks or any(hooked):
        raise CannotBatch("a forward hook would run once for all draws")


def _state(view: View) -> list[Any]:
    try:
        return module_state(view.model)
    except Refused as error:
        raise CannotBatch(str(error)) from error


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
