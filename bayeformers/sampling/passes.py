"""S passes of one model, each with its own draw of the weights; what does not depend on the draw is computed once.

The cost of S passes is that of the shared part plus S times the rest, and the outputs are exactly those of a plain
loop: sharing verifies itself on the first batch, and where it cannot be verified the plain loop runs.
"""

from __future__ import annotations

import functools
import logging
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from ..forward import Inputs, call, without_cache
from .random_state import all_equal, is_drawing, left_alone, rng_state, set_rng_state
from .shared_prefix import SharedPrefix, hidden_reference
from .snapshot import Refused, flatten, same_tensor

logger = logging.getLogger(__name__)

DEFAULT_PREFIX_BYTES = 2 * 2**30
Draw = Callable[[int, int], AbstractContextManager[None]]

# What the first batch taught about a model, for one random set and one kind of inputs: None, or why not to share.
_verdicts: WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], str | None]] = WeakKeyDictionary()
_logged: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()


def monte_carlo(
    model: nn.Module,
    draw: Draw,
    random: Iterable[nn.Parameter],
    inputs: Inputs,
    *,
    num_samples: int,
    seed: int = 0,
    share: bool = True,
    max_prefix_bytes: int = DEFAULT_PREFIX_BYTES,
    known_as: tuple[nn.Module, list[nn.Parameter]] | None = None,
    keeps_random_state: bool = False,
) -> Iterator[Any]:
    """The outputs ``model(inputs)`` under ``draw(0, seed)``, ..., ``draw(num_samples - 1, seed)``, without gradients.

    Between two yields the model is as the caller left it: no draw, no wrapped method, the caller's gradient mode.

    Args:
        model: used as it is; put it in ``eval()`` mode first (modules in training mode are not shared).
        draw: ``draw(index, seed)`` holds one draw of the weights in the model until it exits. It computes weights
            inside the layers' ``forward`` or copies them in place under ``torch.no_grad()``; writes through ``.data``
            are invisible to torch's version counters, hence forbidden.
        random: every Parameter that ``draw`` affects.
        inputs: what the model's ``forward`` takes, by name, or one tensor. ``use_cache=False`` is added where the
            model has that argument, for each draw would need a cache of its own.
        num_samples: number S of passes, at least 1.
        seed: handed to ``draw``.
        share: False for the plain loop.
        max_prefix_bytes: cap on the memory of shared outputs, which live for one batch.
        known_as: of a view, the model and its random Parameters: what one batch teaches is remembered of them.
        keeps_random_state: leave the default generators as they are, should the model draw from them.

    Returns:
        The outputs, one after the other.

    Raises:
        ValueError: ``num_samples`` is below 1.

    >>> model = nn.Linear(2, 1, bias=False).eval().requires_grad_(False)
    >>> from contextlib import contextmanager
    >>> @contextmanager
    ... def draw(index, seed):
    ...     kept = model.weight.clone()
    ...     model.weight.fill_(index)
    ...     yield
    ...     model.weight.copy_(kept)
    >>> [output.item() for output in monte_carlo(model, draw, [model.weight], torch.ones(1, 2), num_samples=3)]
    [0.0, 2.0, 4.0]
    """
    if num_samples < 1:
        raise ValueError(f"`num_samples` must be at least 1, got {num_samples!r}.")
    run = functools.partial(call, model, inputs, **without_cache(model))
    random = list(random)
    known, of_known = known_as or (model, random)
    seen = _verdicts.setdefault(known, {}), _signature(known, of_known, inputs)
    sharing = _Sharing(model, random, known, seen, max_prefix_bytes) if share and num_samples > 1 else None

    def passes() -> Iterator[Any]:
        try:
            for index in range(num_samples):
                kept = left_alone(known, run) if keeps_random_state else nullcontext()
                with torch.no_grad(), draw(index, seed), _fresh_casts(), kept:
                    output = sharing.run(run) if sharing else run()
                yield output
        finally:
            if sharing:
                sharing.clear()

    return passes()


@contextmanager
def _fresh_casts() -> Iterator[None]:
    """Autocast keeps low-precision copies of trainable weights until its context ends, whatever is written to them."""
    torch.clear_autocast_cache()
    try:
        yield
    finally:
        torch.clear_autocast_cache()


class _Sharing:
    """Runs passes with a shared prefix; on the first batch of a kind, what is reused is also run plainly."""

    def __init__(
        self,
        model: nn.Module,
        random: list[nn.Parameter],
        known: nn.Module,
        seen: tuple[dict[tuple[Any, ...], str | None], tuple[Any, ...]],
        max_bytes: int,
    ) -> None:
        self._model = known
        self._verdicts, self._signature = seen
        self._tested = self._signature in self._verdicts
        self._passes = 0
        self._prefix: SharedPrefix | None = None
        reason = self._verdicts[self._signature] if self._tested else _unsafe(model, random)
        reason = reason or _unsupported(model)
        if reason is None:
            self._prefix = SharedPrefix(model, random, max_bytes)
        else:
            _log_once(known, reason)

    def run(self, call: Callable[[], Any]) -> Any:
        """One pass."""
        if self._prefix is None:
            return call()
        if not self._tested:
            return self._verify(self._prefix, call)
        with self._prefix:
            return call()

    def clear(self) -> None:
        """Forget the outputs; a reference cycle would keep them until the next garbage collection."""
        if self._prefix is not None:
            self._prefix.clear()

    def _verify(self, prefix: SharedPrefix, call: Callable[[], Any]) -> Any:
        """One pass; if it reused anything, also in the plain way; from the same random state, if the model draws."""
        # the first pass only records, and children of a module that was refused record one pass later: the test goes on
        # until a pass after the first records nothing new
        reused, before = prefix.hits, rng_state()
        with prefix:
            output = call()
        self._passes += 1
        if prefix.hits > reused:
            shared, after = output, rng_state()
            if not all_equal(before, after) and is_drawing(self._model, call):
                set_rng_state(before)
            output = call()
            if not (_same_output(shared, output) and (all_equal(after, rng_state()) or threading.active_count() > 1)):
                self._conclude("its first batch differed from the plain loop")
                return output
        if self._passes > 1 and not prefix.recorded:
            self._conclude(None if prefix.hits else "no module has the same inputs in every pass")
        return output

    def _conclude(self, reason: str | None) -> None:
        self._tested, self._verdicts[self._signature] = True, reason
        if reason is not None:
            _log_once(self._model, reason)
            self.clear()
            self._prefix = None


def _unsupported(model: nn.Module) -> str | None:
    """Why nothing can be shared at this moment."""
    if torch.is_inference_mode_enabled():
        return "tensors made in inference mode have no version counter"
    has_hooks = torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks
    return "a global forward hook is registered" if has_hooks else None


def _unsafe(model: nn.Module, random: list[nn.Parameter]) -> str | None:
    """Why nothing can ever be shared in this model."""
    dynamo = sys.modules.get("torch._dynamo")  # takes seconds to import; until somebody did, nothing is compiled
    opaque = (nn.DataParallel, torch.jit.ScriptModule, *([dynamo.OptimizedModule] if dynamo else []))
    for module in model.modules():
        if isinstance(module, opaque) or module._compiled_call_impl is not None:
            return f"{type(module).__name__} does not call its submodules one by one in this process"
    if not {id(parameter) for parameter in random} <= {id(parameter) for parameter in model.parameters()}:
        return "a random Parameter is not registered in the model"
    devices = {parameter.device.type for parameter in model.parameters()}
    if not devices <= {"cpu", "cuda"}:
        return f"the random state of {sorted(devices)} cannot be compared"
    name = hidden_reference(model, random)
    return None if name is None else f"{name!r} reaches a random module that is not among its children"


def _signature(model: nn.Module, random: list[nn.Parameter], inputs: Inputs) -> tuple[Any, ...]:
    """What a verdict is valid for: the modules, the random set, and the kind of inputs."""
    kind: Any = type(inputs).__name__, len(inputs) if isinstance(inputs, (list, tuple)) else 0
    if isinstance(inputs, Mapping):
        kinds = (value if isinstance(value, bool | int | str) else type(value) for value in inputs.values())
        kind = tuple(zip(inputs, kinds, strict=True))
    return frozenset(map(id, model.modules())), frozenset(map(id, random)), kind


def _same_output(a: Any, b: Any) -> bool:
    try:
        leaves, others = flatten(a), flatten(b)
    except Refused:
        return False
    return len(leaves) == len(others) and all(
        same_tensor(x, y) if isinstance(x, Tensor) and isinstance(y, Tensor) else type(x) is type(y) and bool(x == y)
        for x, y in zip(leaves, others, strict=True)
    )


def _log_once(model: nn.Module, reason: str) -> None:
    if reason not in _logged.setdefault(model, set()):
        _logged[model].add(reason)
        logger.info("Monte-Carlo passes of %s run one by one: %s.", type(model).__name__, reason)
