"""Bayesian weights that no layer class knows: whoever reads the tensor during a forward gets its value under the draw.

Fused experts and einsum projections are bare Parameters of some module; the table of a relative position is read by
the layer that owns it. There is no operation to take over, so the draw enters where the tensor is read: the module's
class becomes a subclass in which each such tensor is a property. `nn.Module` keeps the Parameter itself, the posterior
mean, in ``_parameters``, where optimizers, checkpoints and `named_parameters` find it.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..distributions import Prior
from ..distributions.diagonal_normal import ScaleName
from .base import BayesianModule
from .estimators import REPARAMETERIZATION
from .variational import TensorSpec

# torch's norms are a matter of their own; a kernel of nn.RNN takes the list `_flat_weights`, not the attributes
_UNREADABLE = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.RNNBase, torch.jit.ScriptModule)


class RandomParameters(BayesianModule):
    """Mixin over any module class, whose ``bayesian_parameters`` are drawn where they are read and nowhere else.

    A forward of the module by itself is drawn too, and a tensor has one value in it however often it is read.
    """

    is_read: ClassVar[bool] = True  # no call of the module tells what became of its weights

    def become_bayesian(self, *, prior: Prior, delta: float, estimator: str, scale: ScaleName = "additive") -> None:
        """As `BayesianModule.become_bayesian`, by reparameterization, which needs no knowledge of the operation.

        Args:
            prior: prior of every tensor of the module.
            delta: initial scale relative to |weight|.
            estimator: not used, for reparameterization is taken.
            scale: sigma = softplus(rho), or softplus(rho) * |weight|.
        """
        super().become_bayesian(prior=prior, delta=delta, estimator=REPARAMETERIZATION.name, scale=scale)
        self._values = _Values()

    def become_deterministic(self) -> None:
        """Undo it, as `BayesianModule.become_deterministic` does."""
        super().become_deterministic()
        del self._values

    def _spec_of(self, name: str) -> TensorSpec:
        """As `BayesianModule` has it; an attribute ``padding_idx`` means a row of the weight in an Embedding only."""
        is_table = isinstance(self, nn.Embedding) and name == "weight"
        return TensorSpec(name, by_row=is_table, padding_idx=getattr(self, "padding_idx", None) if is_table else None)

    def reset_parameters(self) -> None:
        """As the source class, where it has such a method, and the scales with it."""
        if hasattr(super(BayesianModule, self), "reset_parameters"):
            super().reset_parameters()
            return
        for name in self.specs:
            self.reset_rho(name)

    def _value(self, name: str) -> Tensor:
        """The tensor under the draw; made once for all readings in one forward of the module."""
        variational = self.variational(name)
        made = None if torch.compiler.is_compiling() else self._values.made
        if made is None:
            return variational.sample()
        key = name, id(variational.draw), torch.is_grad_enabled()
        if key not in made:
            made[key] = variational.sample()
        return made[key]


class _Values(threading.local):
    """What a module has drawn in the forward that a thread runs."""

    is_shared_by_views = True
    made: dict[tuple[str, int, bool], Tensor] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return _Values, ()


@functools.cache
def random_class(source: type[nn.Module], names: tuple[str, ...]) -> type[RandomParameters]:
    """Return the subclass of ``source`` in which the Parameters ``names`` are random.

    >>> class Scores(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.table = nn.Parameter(torch.ones(2, 3))
    ...     def forward(self, x): return torch.einsum("bi,ij->bj", x, self.table)
    >>> random_class(Scores, ("table",)).bayesian_parameters
    ('table',)
    """
    namespace: dict[str, Any] = {
        "torch_class": source,
        "bayesian_parameters": names,
        "forward": _with_one_draw(source.forward),
        "__module__": source.__module__,  # transformers looks its output recorders up by the class as text
        "__qualname__": source.__qualname__,
        "__doc__": source.__doc__,
        "__reduce_ex__": _reduce,
    }
    kind = type(source.__name__, (RandomParameters, source), namespace)
    assert issubclass(kind, RandomParameters)
    return kind


def of_source(kind: type[nn.Module], source: type[nn.Module]) -> type[nn.Module]:
    """``source``, with the random tensors that ``kind``, made for a subclass of it, has."""
    return random_class(source, kind.bayesian_parameters) if issubclass(kind, RandomParameters) else source  # type: ignore[arg-type]


def random_names(module: nn.Module, also: Iterable[str] = ()) -> tuple[str, ...]:
    """Names of the module's own matrices (2 or more axes, floating point), and of those in ``also``."""
    if isinstance(module, _UNREADABLE):
        return ()
    plain = {name: p for name, p in module._parameters.items() if p is not None and not nn.parameter.is_lazy(p)}
    return tuple(n for n, p in plain.items() if p.is_floating_point() and (p.dim() > 1 or n in set(also)))


def name_clash(module: nn.Module) -> str | None:
    """An attribute of the module's own that a Bayesian one keeps its state under; None: no such."""
    own = {*vars(module), *module._parameters, *module._buffers, *module._modules, *dir(type(module))}
    return min(own & _STATE, default=None)


def _with_one_draw(forward: Callable[..., Any]) -> Callable[..., Any]:
    """``forward`` during which the module's tensors have one draw: that of the model's forward if one is running."""

    @functools.wraps(forward)
    def own_forward(self: RandomParameters, *args: Any, **kwargs: Any) -> Any:
        takes = self.training and self.draw is None
        outer = self.scope.begin_part() if takes else None
        try:
            if torch.compiler.is_compiling():
                return forward(self, *args, **kwargs)
            values, self._values.made = self._values.made, {}
            try:
                return forward(self, *args, **kwargs)
            finally:
                self._values.made = values
        finally:
            if takes:
                self.scope.end_part(outer)

    return own_forward


def _reduce(self: RandomParameters, protocol: Any) -> tuple[Any, ...]:
    """Pickle by the source class: the class itself is made on demand and has no importable name."""
    kind = type(self)
    return _rebuild, (kind.torch_class, kind.bayesian_parameters), self.__getstate__()  # type: ignore[no-untyped-call]


def _rebuild(source: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    kind = random_class(source, names)  # type: ignore[arg-type]
    return kind.__new__(kind)


_STATE = {*dir(RandomParameters), *BayesianModule.__annotations__, "_values"} - {*dir(nn.Module), "reset_parameters"}
