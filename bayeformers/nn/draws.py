"""Which draw a layer takes: the mean, a held draw, or the training draw of the forward that is running.

State belongs to a model, never to the process; within a model to the caller that made it, for one model may be asked
by several threads. A held draw wins over `train()`/`eval()`.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import weakref
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..random_state import note_draw
from ..scalars import check_draw
from .adapters import LATE, allow_merges, late_adapters, note_adapters, refuse_merges
from .forwards import Forwards
from .holds import holding
from .noise import noise_key
from .reading import MEAN
from .variational import Draw, TracedDraw, renamed

if TYPE_CHECKING:
    from .base import BayesianModule

logger = logging.getLogger(__name__)

FORWARD = (
    "A forward of %s in train() without gradients: every call draws a network of its own. Call `model.eval()` for the "
    "posterior mean, or hold one draw in `with fixed_draw(model, index)`; `predict` averages over draws."
)


class DrawScope:
    """The training draws of one model: one per forward of the whole model, shared by all its layers.

    Only a seed is taken from torch's default generator, when a forward begins; the noise itself is stateless. So
    `torch.manual_seed` and a Trainer's saved random state reproduce it, ranks differ, and recomputation under
    activation checkpointing finds its draw again: by the generator's state, which checkpointing restores and which no
    two forwards of one thread share. Each thread's forwards have draws of their own.
    """

    is_shared_by_views = True

    def __init__(self) -> None:
        self.traced: TracedDraw | None = None
        self._depth = 0  # of traced forwards
        self._local = threading.local()
        self._threads: weakref.WeakSet[Forwards] = weakref.WeakSet()
        self._lock = threading.Lock()
        self.said: set[str] = set()
        self.drawn: set[int] | None = None  # the ids of the scales that are drawn, while somebody asks

    def __getstate__(self) -> dict[str, Any]:
        return {}  # a copy of a model starts without draws in flight

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]

    @property
    def running(self) -> Draw | None:
        """The draw of this thread's running forward."""
        forwards = self._own
        forwards.close_interrupted()
        return forwards.running

    @running.setter
    def running(self, draw: Draw | None) -> None:
        self._own.running = draw

    @property
    def _own(self) -> Forwards:
        try:
            return self._local.forwards  # type: ignore[no-any-return]
        except AttributeError:
            forwards = self._local.forwards = Forwards()
            with self._lock:
                self._threads.add(forwards)
            return forwards

    def enter(self, training: bool, frame: FrameType | None = None) -> bool:
        """A forward of the model begins; nested ones belong to the outermost. Whether it takes a new draw.

        ``frame``: ends when the forward does, in whatever way; None where the caller calls `exit` in any case.
        """
        if torch.compiler.is_compiling():
            self._depth += 1
            self.traced = self.traced or TracedDraw()
            return False
        forwards = self._own
        forwards.close_interrupted()
        forwards.frames.append(frame)
        if training and (len(forwards.frames) == 1 or forwards.running is None):
            forwards.running = self._new_draw()
            return True
        return False

    def exit(self, frame: FrameType | None = None) -> None:
        """The forward that began with this ``frame`` ends."""
        if torch.compiler.is_compiling():
            self._depth = max(self._depth - 1, 0)
            self.traced = self.traced if self._depth else None
            return
        forwards = self._own
        if frame is None or frame in forwards.frames[-1:]:
            del forwards.frames[-1:]
        forwards.close_interrupted()  # torch calls its hooks after an Exception from outside of that frame
        if not forwards.frames:
            forwards.running = None

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """All forwards inside are one."""
        forwards = self._own
        forwards.close_interrupted()
        count, running = len(forwards.frames), forwards.running
        self.enter(training=True)
        try:
            yield
        finally:
            del forwards.frames[count:]
            forwards.running = running

    @property
    def is_running(self) -> bool:
        """Whether a forward runs, or a part of one is recomputed in backward."""
        if torch.compiler.is_compiling():
            return self.traced is not None
        return self.running is not None or torch._C._current_graph_task_id() != -1

    def begin_part(self) -> Draw | None:
        """A part runs forward, perhaps on its own: it has one draw. Returns what `end_part` restores."""
        if torch.compiler.is_compiling():
            outer, self.traced = self.traced, self.traced or TracedDraw()
            return outer
        before, self.running = self.running, self.training_draw()
        return before

    def end_part(self, outer: Draw | None) -> None:
        """The part's forward ends."""
        if torch.compiler.is_compiling():
            self.traced = outer if isinstance(outer, TracedDraw) else None
        else:
            self.running = outer

    def training_draw(self) -> Draw:
        """The draw of the running forward; of the recomputed one during backward; else one for this call alone."""
        if torch.compiler.is_compiling():
            return self.traced or TracedDraw()
        running = self.running
        if running is None and torch._C._current_graph_task_id() != -1:
            return self._recomputed()
        state = _random_state()
        draw = self._new_draw() if running is None else running
        self._own.remember(state, draw, running is None)
        return draw

    def sampling_key(self) -> Draw:
        """The draw whose noise a sampled KL uses: that of the latest forward, so that its parts share one."""
        return self.running or self._own.latest or Draw(0, keep=False)

    def is_recorded(self) -> bool:
        """Whether some thread's training forward had the present random state."""
        state = _random_state()
        return any(state in forwards.seen for forwards in self._all())

    def _recomputed(self) -> Draw:
        """On a GPU, autograd recomputes in a thread of its own: then the draw is that of whichever forward fits."""
        own: Forwards | None = getattr(self._local, "forwards", None)
        everyone = self._all()
        if own is not None and len(everyone) > 1:  # who move the random state under each other's feet
            draw = own.of_backward()
            if draw is not None:
                return draw
        return self._recorded([own] if own is not None and _random_state() in own.seen else everyone)

    def _recorded(self, candidates: list[Forwards]) -> Draw:
        state = _random_state()
        knowing = [one for one in candidates if state in one.seen]
        if not knowing:
            draw = self._only_forward()
        else:
            draw, is_own = knowing[0].seen[state]
            if any(one.seen[state][0] is not draw for one in knowing):
                raise RuntimeError(_UNTOLD)
            if is_own:
                _fresh_seed()  # the original call took a seed here: later dropout must find the same random state
        for one in knowing or self._all():
            one.unfinished = 0
        return draw

    def _only_forward(self) -> Draw:
        """The draw of the one forward that has not gone backward yet, or that there was."""
        known = [one for one in self._all() if one.unfinished] or [one for one in self._all() if one.latest]
        if len(known) != 1 or known[0].latest is None or known[0].unfinished > 1:
            raise RuntimeError(_UNTOLD)
        return known[0].latest

    def _all(self) -> list[Forwards]:
        with self._lock:
            return list(self._threads)

    def _new_draw(self) -> Draw:
        draw, forwards = Draw(fresh_key(), keep=False), self._own
        forwards.latest = draw
        if torch.is_grad_enabled():
            forwards.unfinished += 1
            forwards.pending = draw
        return draw


_UNTOLD = (
    "A Bayesian layer is recomputed in backward and its draw cannot be told: keep `preserve_rng_state=True` in "
    "activation checkpointing, or run one forward per backward."
)


@contextlib.contextmanager
def posterior_mean(model: nn.Module) -> Iterator[None]:
    """Every Bayesian layer of ``model`` uses its posterior mean, in `train()` as in `eval()`.

    Nests with :func:`fixed_draw` (the innermost decides) and restores what was held, after an exception too. This
    thread sees it, and threads and asyncio tasks that are started inside; others, a pool's that ran before, do not.
    """
    with hold(model, MEAN):
        yield


@contextlib.contextmanager
def fixed_draw(model: nn.Module, index: int, seed: int = 0) -> Iterator[None]:
    """``model`` is one network: posterior draw ``index`` of the sequence ``seed``, in `train()` as in `eval()`.

    The same pair gives the same weights for every batch and process and after a reload. Seen by this thread and by what
    is started inside, as :func:`posterior_mean` is.

    Raises:
        TypeError: ``index`` or ``seed`` is no whole number.
        ValueError: ``index`` or ``seed`` is negative.
    """
    check_draw(index, seed)
    with hold(model, Draw(int(seed), int(index))):
        yield


@contextlib.contextmanager
def hold(model: nn.Module, draw: Draw | str, layers: Iterable[BayesianModule] | None = None) -> Iterator[None]:
    """The Bayesian ``layers`` of ``model``, or all, hold ``draw`` (or ``MEAN``) for this caller; nests."""
    modules = bayesian_modules(model)
    if not modules and draw is not MEAN:
        raise ValueError(
            f"`model` ({type(model).__name__}) has no Bayesian layer to draw; call `to_bayesian(model)` first."
        )
    check_names(model)
    refuse_merges(model)  # of adapters that came after the conversion
    if draw is not MEAN:
        _tell_of_late_adapters(next(iter(modules.values())).scope, model)
    with holding(modules.values() if layers is None else layers, draw):
        yield


@contextlib.contextmanager
def training_draw(model: nn.Module) -> Iterator[None]:
    """All forwards inside use one training draw, whichever way the layers are reached (wrappers may bypass hooks)."""
    scopes = list({id(module.scope): module.scope for module in bayesian_modules(model).values()}.values())
    with contextlib.ExitStack() as stack:
        for scope in scopes:
            stack.enter_context(scope.whole())
        yield


def one_draw_per_forward(model: nn.Module) -> nn.Module:
    """Let a hand-built model draw each distinct Parameter once per forward; `to_bayesian` does it by itself.

    Without it each layer is a model of its own: one that is called twice in a forward draws twice. And where a module
    has a ``generate``, one draw serves a whole call of it in `train()`. Returns the same object.
    """
    from .generation import hold_while_generating

    modules = bayesian_modules(model)
    _name_tensors(modules)
    scope = DrawScope()
    for module in modules.values():
        module.scope = scope
    release(model)
    model.register_forward_pre_hook(_Begin(scope))
    model.register_forward_hook(_End(scope), always_call=True)
    hold_while_generating(model)
    note_adapters(model)
    refuse_merges(model)
    return model


def release(model: nn.Module) -> None:
    """Undo :func:`one_draw_per_forward` on ``model`` itself."""
    from .generation import release_generating

    release_generating(model)
    allow_merges(model)
    for hooks, kind in ((model._forward_pre_hooks, _Begin), (model._forward_hooks, _End)):
        for key in [key for key, hook in hooks.items() if isinstance(hook, kind)]:
            del hooks[key]
            model._forward_hooks_always_called.pop(key, None)


def say_once(scope: DrawScope, message: str, model: nn.Module) -> None:
    """Once per model."""
    if message not in scope.said:
        scope.said.add(message)
        logger.warning(message, type(model).__name__)


def _tell_of_late_adapters(scope: DrawScope, model: nn.Module) -> None:
    for name in late_adapters(model):
        say_once(scope, LATE.format(name.replace("%", "%%")), model)


def check_module(model: object) -> None:
    """Raises: TypeError: ``model`` is no module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a torch.nn.Module, got {type(model).__name__}.")


def bayesian_modules(model: nn.Module) -> dict[str, BayesianModule]:
    """Bayesian layers by their first name in ``model``."""
    from .base import BayesianModule

    check_module(model)
    return {name: module for name, module in model.named_modules() if isinstance(module, BayesianModule)}


class _Begin:
    is_left_out_of_views = True

    def __init__(self, scope: DrawScope) -> None:
        self.scope = scope

    def __call__(self, module: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling():
            self.scope.enter(module.training)
            return
        is_drawn = module.training and _takes_training_draw(module)
        takes = self.scope.enter(is_drawn, sys._getframe(1))
        if takes and not torch.is_grad_enabled():
            say_once(self.scope, FORWARD, module)
        if is_drawn:
            _tell_of_late_adapters(self.scope, module)


class _End:
    is_left_out_of_views = True

    def __init__(self, scope: DrawScope) -> None:
        self.scope = scope

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self.scope.exit(None if torch.compiler.is_compiling() else sys._getframe(1))


def _takes_training_draw(model: nn.Module) -> bool:
    """Whether some layer holds neither a draw nor the mean; if none does, no seed is taken from the generator.

    It is asked when a forward begins: inside a checkpointed region the seed would be taken again in backward.
    """
    return any(m.draw is None for m in bayesian_modules(model).values())


def check_names(model: nn.Module) -> None:
    """Before a draw: each tensor's noise has a name of its own in ``model``.

    Raises:
        ValueError: two tensors have the same.
    """
    modules = bayesian_modules(model)
    _name_tensors(modules)
    _check_distinct(modules)


def _name_tensors(modules: dict[str, BayesianModule]) -> None:
    """Hand-built layers get unique noise keys: their names in the model, the first owner's for tied tensors."""
    names: dict[int, str] = {}
    for name, module in modules.items():
        for parameter, spec in module.specs.items():
            tensor = module.get_parameter(parameter)
            if spec.named:
                names.setdefault(id(tensor), spec.name)
            else:
                first = names.setdefault(id(tensor), f"{name}.{parameter}" if name else parameter)
                module.specs[parameter] = renamed(spec, first)


def _check_distinct(modules: dict[str, BayesianModule]) -> None:
    """Parts that were converted one by one name their tensors alike: they would share their noise."""
    owners: dict[str, int] = {}
    for module in modules.values():
        for parameter, spec in module.specs.items():
            tensor = id(module.get_parameter(parameter))
            if owners.setdefault(spec.name, tensor) != tensor:
                raise ValueError(
                    f"`model` has two tensors named {spec.name!r} for their noise, in parts that were converted one by "
                    "one: their draws would be equal. Convert the whole model in one call of `to_bayesian`."
                )


def _random_state() -> int:
    return hash(torch.get_rng_state().numpy().tobytes())


def fresh_key() -> int:
    """The seed of a training draw, from torch's default generator: ranks differ."""
    return noise_key(_fresh_seed(), _rank(), "training")


def _fresh_seed() -> int:
    note_draw()
    return int(torch.randint(2**62, ()).item())


def _rank() -> int:
    distributed = torch.distributed
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0
