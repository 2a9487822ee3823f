"""Which draw a layer takes: the mean, a held draw, or the training draw of the forward that is running.

State belongs to a model, never to the process; within a model to the caller that made it, for one model may be asked
by several threads. A held draw wins over `train()`/`eval()`.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..checks import check_draw
from ..sampling.dora import check_no_cached_norms
from .adapters import LATE, forget_adapters, late_adapters, let_thaw, name_heads, note_adapters
from .base import BayesianModule
from .base import bayesian_modules as bayesian_modules
from .base import check_module as check_module
from .compiling import handed_in
from .holds import holding
from .merging import stand_in_for_merges, stock_merges
from .noise import Draw
from .reading import MEAN
from .scope import DrawScope, fresh_key
from .shards import keep_nothing

logger = logging.getLogger(__name__)

FORWARD = (
    "A forward of %s in train() without gradients: every call draws a network of its own. Call `model.eval()` for the "
    "posterior mean, or hold one draw in `with fixed_draw(model, index)`; `predict` averages over draws."
)
GENERATE = (
    "%s generates in train(): one draw of the weights serves the whole call. Call `model.eval()` for the posterior "
    "mean, or choose the draw in `with fixed_draw(model, index)`; `bayeformers.generate` averages over draws."
)
_GENERATE = "generate"


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

    Args:
        model: with a Bayesian layer at least.
        index: of the draw: ValueError if it is negative, TypeError if it is no whole number.
        seed: of the sequence, in the same way.
    """
    check_draw(index, seed)
    with hold(model, Draw(int(seed), int(index))):
        yield


@contextlib.contextmanager
def hold(model: nn.Module, draw: Draw | str, layers: Iterable[BayesianModule] | None = None) -> Iterator[None]:
    """Let Bayesian layers hold a draw for this caller until exit; it nests.

    Args:
        model: with a Bayesian layer at least, unless the mean is held.
        draw: the draw to hold, or ``MEAN`` for the posterior mean.
        layers: those of the model's layers that hold it; None: all of them.

    Raises:
        ValueError: the model has no Bayesian layer to draw.
    """
    modules = bayesian_modules(model)
    if not modules and draw is not MEAN:
        raise ValueError(
            f"`model` ({type(model).__name__}) has no Bayesian layer to draw; call `to_bayesian(model)` first."
        )
    check_no_cached_norms(model)
    name_heads(model)
    check_names(model)
    stand_in_for_merges(model)  # of adapters that came after the conversion
    if draw is not MEAN:
        _tell_of_late_adapters(next(iter(modules.values())).scope, model)
    holders = list(modules.values() if layers is None else layers)
    if isinstance(draw, Draw):
        keep_nothing(draw, modules.values())
    with handed_in(holders, draw) if isinstance(draw, Draw) else contextlib.nullcontext(), holding(holders, draw):
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
    """Return ``model``, which draws each distinct Parameter once per forward from here on, as after `to_bayesian`.

    Without it each layer is a model of its own: one that is called twice in a forward draws twice. And where a module
    has a ``generate``, one draw serves a whole call of it in `train()`.
    """
    modules = bayesian_modules(model)
    _name_tensors(modules)
    scope = DrawScope()
    for module in modules.values():
        module.scope = scope
    release(model)
    model.register_forward_pre_hook(_Begin(scope))
    model.register_forward_hook(_End(scope), always_call=True)
    _hold_while_generating(model)
    note_adapters(model)
    stand_in_for_merges(model)
    return model


def release(model: nn.Module) -> None:
    """Undo :func:`one_draw_per_forward` on ``model`` itself."""
    stock_merges(model)
    forget_adapters(model)
    let_thaw(model)
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, OneDraw):
                del vars(module)[name]
                if value.own is not None:
                    vars(module)[name] = value.own
    for hooks, kind in ((model._forward_pre_hooks, _Begin), (model._forward_hooks, _End)):
        for key in [key for key, hook in hooks.items() if isinstance(hook, kind)]:
            del hooks[key]
            model._forward_hooks_always_called.pop(key, None)


def say_once(scope: DrawScope, message: str, model: nn.Module) -> None:
    """Log a warning, but once per model.

    Args:
        scope: the model's, which remembers what was said.
        message: the warning, with one ``%s`` for the name of the model's class.
        model: what the warning is about.
    """
    if message not in scope.said:
        scope.said.add(message)
        logger.warning(message, type(model).__name__)


def _tell_of_late_adapters(scope: DrawScope, model: nn.Module) -> None:
    for name in late_adapters(model):
        say_once(scope, LATE.format(name.replace("%", "%%")), model)


class _Hook:
    is_left_out_of_views = True

    def __init__(self, scope: DrawScope) -> None:
        self.scope = scope


class _Begin(_Hook):
    def __call__(self, module: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling():
            self.scope.enter(module.training)
            return
        # Without a layer that holds neither a draw nor the mean no seed is taken from the generator. It is asked here,
        # when the forward begins: inside a checkpointed region the seed would be taken again in backward.
        is_drawn = module.training and any(layer.draw is None for layer in bayesian_modules(module).values())
        takes = self.scope.enter(is_drawn, sys._getframe(1))
        if takes and not torch.is_grad_enabled():
            say_once(self.scope, FORWARD, module)
        if is_drawn:
            _tell_of_late_adapters(self.scope, module)


class _End(_Hook):
    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self.scope.exit(None if torch.compiler.is_compiling() else sys._getframe(1))


class OneDraw:
    """Stands in for a module's ``generate``; as itself where no layer would draw, that is in `eval()` or a held draw.

    Without it every token would be another network's, over the keys and values of the ones before.
    """

    def __init__(self, module: nn.Module, name: str, own: Callable[..., Any] | None) -> None:
        self._module, self._name, self.own = module, name, own

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """What it stands in for; `inspect.signature` reads it."""
        return self.own or getattr(type(self._module), self._name).__get__(self._module)

    @property
    def __name__(self) -> str:
        return self._name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Generate, under one draw if layers would draw."""
        layers = [] if torch.compiler.is_compiling() else drawing_layers(self._module)
        if not layers:
            return self.__wrapped__(*args, **kwargs)
        say_once(layers[0].scope, GENERATE, self._module)
        with hold(self._module, Draw(fresh_key()), layers):
            return self.__wrapped__(*args, **kwargs)


def drawing_layers(model: nn.Module) -> list[BayesianModule]:
    """Layers that would draw in a forward now: those in `train()` for which the caller holds nothing."""
    return [m for m in bayesian_modules(model).values() if m.training and m.draw is None and m.scope.running is None]


def _hold_while_generating(model: nn.Module) -> None:
    """Every module of ``model`` that generates does so under one draw."""
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule) or not callable(getattr(type(module), _GENERATE, None)):
            continue
        for name in dir(type(module)):
            if name.startswith(_GENERATE) and callable(getattr(type(module), name)):
                vars(module)[name] = OneDraw(module, name, vars(module).get(name))


def check_names(model: nn.Module) -> None:
    """Before a draw: each tensor's noise has a name of its own in ``model``.

    Raises:
        ValueError: two tensors have the same, in parts that were converted one by one.
    """
    modules = bayesian_modules(model)
    _name_tensors(modules)
    owners: dict[str, int] = {}
    for module in modules.values():
        for parameter, spec in module.specs.items():
            tensor = id(module.get_parameter(parameter))
            if owners.setdefault(spec.name, tensor) != tensor:
                raise ValueError(
                    f"`model` has two tensors named {spec.name!r} for their noise, in parts that were converted one by "
                    "one: their draws would be equal. Convert the whole model in one call of `to_bayesian`."
                )


def _name_tensors(modules: Mapping[str, BayesianModule]) -> None:
    """Hand-built layers get unique noise keys: their names in the model, the first owner's for tied tensors."""
    names: dict[int, str] = {}
    for name, module in modules.items():
        for parameter, spec in module.specs.items():
            tensor = module.get_parameter(parameter)
            if spec.named:
                names.setdefault(id(tensor), spec.name)
            else:
                first = names.setdefault(id(tensor), f"{name}.{parameter}" if name else parameter)
                module.specs[parameter] = replace(spec, name=first, named=True)
