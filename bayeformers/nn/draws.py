"""Which draw a layer takes: the mean, a held draw, or the training draw of the forward that is running.

State belongs to a model, never to the process. A held draw wins over `train()`/`eval()`.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import nn

from .noise import noise_key
from .variational import Draw, TracedDraw, renamed

if TYPE_CHECKING:
    from .base import BayesianModule

MEAN: Final = "mean"
_REMEMBERED = 4096


class DrawScope:
    """The training draws of one model: one per forward of the whole model, shared by all its layers.

    Only a seed is taken from torch's default generator, when a forward begins; the noise itself is stateless. So
    `torch.manual_seed` and a Trainer's saved random state reproduce it, ranks differ, and recomputation under
    activation checkpointing finds its draw again: by the generator's state, which checkpointing restores and which no
    two forwards share.
    """

    def __init__(self) -> None:
        self.running: Draw | None = None
        self.latest: Draw | None = None
        self.traced: TracedDraw | None = None
        self._depth = 0
        self._unfinished = 0
        self._seen: OrderedDict[int, tuple[Draw, bool]] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {}  # a copy of a model starts without draws in flight

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]

    def enter(self, training: bool) -> None:
        """A forward of the model begins; nested ones belong to the outermost."""
        self._depth += 1
        if self._depth == 1 or self.running is None:
            if torch.compiler.is_compiling():
                self.traced = TracedDraw()
            elif training:
                self.running = self._new_draw()

    def exit(self) -> None:
        """A forward of the model ends."""
        self._depth = max(self._depth - 1, 0)
        if self._depth == 0:
            self.running = self.traced = None

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
        if self.running is None and torch._C._current_graph_task_id() != -1:
            return self._recomputed()
        state = _random_state()
        own = self.running is None
        draw = self._new_draw() if self.running is None else self.running
        self._seen[state] = draw, own
        if len(self._seen) > _REMEMBERED:
            self._seen.popitem(last=False)
        return draw

    def sampling_key(self) -> Draw:
        """The draw whose noise a sampled KL uses: that of the latest forward, so that its parts share one."""
        return self.running or self.latest or Draw(0, keep=False)

    def _recomputed(self) -> Draw:
        draw, own = self._seen.get(_random_state(), (None, False))
        if own:
            _fresh_seed()  # the original call took a seed here: later dropout must find the same random state
        if draw is None:
            if self.latest is None or self._unfinished > 1:
                raise RuntimeError(
                    "A Bayesian layer is recomputed in backward and its draw cannot be told: keep "
                    "`preserve_rng_state=True` in activation checkpointing, or run one forward per backward."
                )
            draw = self.latest
        self._unfinished = 0
        return draw

    def _new_draw(self) -> Draw:
        self.latest = Draw(noise_key(_fresh_seed(), _rank(), "training"), keep=False)
        self._unfinished += torch.is_grad_enabled()
        return self.latest


@contextlib.contextmanager
def posterior_mean(model: nn.Module) -> Iterator[None]:
    """Every Bayesian layer of ``model`` uses its posterior mean, in `train()` as in `eval()`.

    Nests with :func:`fixed_draw` (the innermost decides) and restores what was held, after an exception too.
    """
    with hold(model, MEAN):
        yield


@contextlib.contextmanager
def fixed_draw(model: nn.Module, index: int, seed: int = 0) -> Iterator[None]:
    """``model`` is one network: posterior draw ``index`` of the sequence ``seed``, in `train()` as in `eval()`.

    The same pair gives the same weights for every batch and process and after a reload.

    Raises:
        TypeError: ``index`` or ``seed`` is no whole number.
        ValueError: ``index`` is negative.
    """
    for name, value in (("index", index), ("seed", seed)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"`{name}` must be a whole number, got {value!r}.")
    if index < 0:
        raise ValueError(f"`index` must be >= 0, got {index}: draws are numbered from 0.")
    with hold(model, Draw(seed, index)):
        yield


@contextlib.contextmanager
def hold(model: nn.Module, draw: Draw | str) -> Iterator[None]:
    """Every Bayesian layer of ``model`` holds ``draw`` (or ``MEAN``); nests, survives exceptions."""
    modules = bayesian_modules(model)
    if not modules and draw is not MEAN:
        raise ValueError(
            f"`model` ({type(model).__name__}) has no Bayesian layer to draw; call `to_bayesian(model)` first."
        )
    _name_tensors(modules)
    _check_distinct(modules)
    held = [module.draw for module in modules.values()]
    try:
        for module in modules.values():
            module.draw = draw
        yield
    finally:
        for module, before in zip(modules.values(), held, strict=True):
            module.draw = before


@contextlib.contextmanager
def training_draw(model: nn.Module) -> Iterator[None]:
    """All forwards inside use one training draw, whichever way the layers are reached (wrappers may bypass hooks)."""
    scopes = list({id(module.scope): module.scope for module in bayesian_modules(model).values()}.values())
    for scope in scopes:
        scope.enter(training=True)
    try:
        yield
    finally:
        for scope in scopes:
            scope.exit()


def one_draw_per_forward(model: nn.Module) -> nn.Module:
    """Let a hand-built model draw each distinct Parameter once per forward; `to_bayesian` does it by itself.

    Without it each layer is a model of its own: one that is called twice in a forward draws twice.
    Returns the same object.
    """
    modules = bayesian_modules(model)
    _name_tensors(modules)
    scope = DrawScope()
    for module in modules.values():
        module.scope = scope
    release(model)
    model.register_forward_pre_hook(_Begin(scope))
    model.register_forward_hook(_End(scope), always_call=True)
    return model


def release(model: nn.Module) -> None:
    """Undo :func:`one_draw_per_forward` on ``model`` itself."""
    for hooks, kind in ((model._forward_pre_hooks, _Begin), (model._forward_hooks, _End)):
        for key in [key for key, hook in hooks.items() if isinstance(hook, kind)]:
            del hooks[key]
            model._forward_hooks_always_called.pop(key, None)


def bayesian_modules(model: nn.Module) -> dict[str, BayesianModule]:
    """Bayesian layers by their first name in ``model``."""
    from .base import BayesianModule

    return {name: module for name, module in model.named_modules() if isinstance(module, BayesianModule)}


class _Begin:
    def __init__(self, scope: DrawScope) -> None:
        self.scope = scope

    def __call__(self, module: nn.Module, args: Any) -> None:
        self.scope.enter(module.training and _takes_training_draw(module))


class _End:
    def __init__(self, scope: DrawScope) -> None:
        self.scope = scope

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self.scope.exit()


def _takes_training_draw(model: nn.Module) -> bool:
    """Whether some layer holds neither a draw nor the mean; if none does, no seed is taken from the generator.

    It is asked when a forward begins: inside a checkpointed region the seed would be taken again in backward.
    """
    return torch.compiler.is_compiling() or any(m.draw is None for m in bayesian_modules(model).values())


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


def _fresh_seed() -> int:
    return int(torch.randint(2**62, ()).item())


def _rank() -> int:
    distributed = torch.distributed
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0
