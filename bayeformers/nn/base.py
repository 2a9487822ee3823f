"""The mixin of every Bayesian layer: parameters, precision, and which draw is active."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from transformers.initialization import normal_ as guarded_normal_

from ..distributions import InitialScale, NormalPrior, Prior, rho_from_scale, unit_of
from ..distributions.diagonal_normal import ScaleName, check_scale
from ..distributions.initial_scale import check_delta
from ..distributions.prior import check_prior
from ..processes.dtensors import own_part, part_of, whole
from ..sampling.walk import named_modules
from . import compiling, kl_watch
from .estimators import REPARAMETERIZATION, Estimator, get_estimator
from .holds import Hold, active
from .reading import MEAN, read, replaced, unfit, write
from .scope import DrawScope
from .variational import Draw, TensorSpec, Variational, scale_of

DEFAULT_DELTA = 0.05
DEFAULT_PRIOR = NormalPrior(std=1.0, centre=0.0)  # a hand-built layer has no trained weight to centre at
RECORD = "bayesian_conversion"  # the attribute in which a converted model keeps the record of its conversion

_CENTRE, _PRIOR_SCALE, _FLOOR = "_prior_centre", "_prior_scale", "_scale_floor"
WIDE_BUFFERS = (_PRIOR_SCALE, _FLOOR)  # endings of buffers that stay float32, as rho does; a checkpoint must have them


class BayesianModule(nn.Module):
    """Mixin over a torch layer: each of `names_of` is the mean of a Gaussian; ``<name>_rho`` its scale.

    The layer's own Parameters stay in place as the means, so ties and hooks keep working; rho stays float32 through
    every cast. An instance becomes Bayesian by :meth:`become_bayesian`. Reading one of ``bayesian_parameters`` gives
    its value under the held draw, or under the training draw while the model runs forward in `train()` or a part of it
    is recomputed in backward, one for the whole batch whatever the estimator; otherwise the mean.

    Args:
        args, kwargs: those of the torch layer.
        prior: prior of every tensor of the layer.
        delta: initial scale relative to |weight|; a relative prior reads it.
        estimator: how the noise enters in training.

    Attributes:
        specs: per parameter, what its noise depends on.
        scope: training draws, shared by the layers of one model.
        floors_of_zeros: by parameter, the initial scale over delta of one that is all zeros, as LoRA's B is at first.
    """

    inert_in_views: ClassVar[frozenset[str]] = frozenset({"prior", "delta", "estimator", "specs", "scope", "_holds"})
    torch_class: ClassVar[type[nn.Module]]
    bayesian_parameters: ClassVar[tuple[str, ...]] = ("weight", "bias")
    by_row: ClassVar[bool] = False

    prior: Prior
    delta: float
    estimator: Estimator
    _holds: tuple[Hold, ...] = ()
    floors_of_zeros: ClassVar[Mapping[str, float]] = {}
    hand_in = compiling.hand_in
    specs: dict[str, TensorSpec]
    scope: DrawScope

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "torch_class" not in vars(cls):  # a mixin: what it is mixed into may have such an attribute of another kind
            return
        for name in cls.bayesian_parameters:
            if name not in vars(cls):
                setattr(cls, name, property(functools.partial(read, name=name), functools.partial(write, name=name)))

    def __init__(
        self,
        *args: Any,
        prior: Prior = DEFAULT_PRIOR,
        delta: float = DEFAULT_DELTA,
        estimator: str = "reparameterization",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)  # of the torch layer, which every layer's class has behind this one
        self.become_bayesian(prior=prior, delta=delta, estimator=estimator)

    def become_bayesian(self, *, prior: Prior, delta: float, estimator: str, scale: ScaleName = "additive") -> None:
        """Add rho (scale = delta |weight|, see `initial_scale`) and the state of a Bayesian layer.

        A prior centred at the trained weight copies it only where the mean requires a gradient. A multiplicative scale
        keeps its floor in a buffer. A wrong argument raises TypeError or ValueError before anything changes.

        Args:
            prior: prior of every tensor of the layer.
            delta: initial scale relative to |weight|.
            estimator: how the noise enters in training.
            scale: sigma = softplus(rho), or softplus(rho) * |weight|.
        """
        check_scale(scale)
        check_prior(prior)
        self.prior, self.delta, self.estimator = prior, check_delta(delta), get_estimator(estimator)
        self.draw, self.scope = None, DrawScope()
        self.specs = {n: self._spec_of(n) for n in self.names_of(self) if getattr(self, n, None) is not None}
        for name in self.specs:
            rho = torch.empty_like(self.get_parameter(name), dtype=torch.float32)
            self.register_parameter(f"{name}_rho", nn.Parameter(rho))
            if scale == "multiplicative":
                self.register_buffer(f"{name}{_FLOOR}", self.initial_scale(name, self.get_parameter(name)).floor)
            self.reset_rho(name)
            if self.get_parameter(name).requires_grad:
                self.store_centre(name)
        kl_watch.watch(self)

    def become_deterministic(self) -> None:
        """Remove all that :meth:`become_bayesian` added; the means stay as they are."""
        for name in self.specs:
            delattr(self, f"{name}_rho")
            for ending in (_CENTRE, _PRIOR_SCALE, _FLOOR):
                self._buffers.pop(f"{name}{ending}", None)
        for attribute in ("prior", "delta", "estimator", "_holds", "specs", "scope", "floors_of_zeros"):
            vars(self).pop(attribute, None)
        kl_watch.unwatch(self)

    @classmethod
    def names_of(cls, module: nn.Module) -> tuple[str, ...]:
        """Return the parameters of torch's layer, or its twin, that may be random; the first is in every instance."""
        return cls.bayesian_parameters

    @classmethod
    def refusal(cls, module: nn.Module) -> str | None:
        """Why this instance of the torch layer cannot become Bayesian; None if it can."""
        names = cls.names_of(module)
        for name in names:
            value = getattr(module, name, None)
            if value is not None and value is not module._parameters.get(name):
                return f"its {name} is computed from other parameters (weight norm, pruning)"
        weight = module._parameters.get(names[0])
        if weight is None or not weight.is_floating_point():
            return f"its {names[0]} is not a floating-point tensor"
        return None

    def _spec_of(self, name: str) -> TensorSpec:
        """What the noise of the tensor ``name`` depends on, before its ties are known."""
        return TensorSpec(name, by_row=self.by_row, padding_idx=getattr(self, "padding_idx", None))

    @property
    def draw(self) -> Draw | str | None:
        """What the running code holds: None, the mean, or a draw. Set on a layer, it is held for everyone."""
        if not (holds := self._holds):
            return None
        if torch.compiler.is_compiling():  # which caller runs it cannot be traced
            return holds[-1].draw  # type: ignore[no-any-return]
        return active(holds, self.scope.is_recorded)

    @draw.setter
    def draw(self, draw: Draw | str | None) -> None:
        self.__dict__["_holds"] = () if draw is None else (Hold(draw, is_for_all=True),)

    @property
    def is_random(self) -> bool:
        """Whether the next forward uses noise: a held draw or the held mean decides, else `train()`/`eval()`."""
        draw = self.draw
        return self.training if draw is None else draw is not MEAN

    @property
    def active_estimator(self) -> Estimator:
        """A held draw is one network, which only reparameterization gives; otherwise the layer's own estimator."""
        return self.estimator if self.draw is None else REPARAMETERIZATION

    def variational(self, name: str) -> Variational:
        """Return the tensor ``name`` with its active draw.

        Raises:
            RuntimeError: since the conversion the layer was resized, or something else computes the tensor.
        """
        loc, rho, spec = self._parameters.get(name), getattr(self, f"{name}_rho"), self.specs[name]
        if loc is None:
            raise RuntimeError(replaced(spec.name))
        if loc.shape != rho.shape or rho.itemsize < 4 or type(loc).__name__ == "DTensor":
            raise RuntimeError(unfit(spec.name, loc, rho))
        if self.scope.drawn is not None:
            self.scope.drawn.add(spec.name)
        held = self.draw
        draw = compiling.as_seen(self, name, held) if isinstance(held, Draw) else self.scope.training_draw()
        return Variational(loc, rho, spec, draw, self.scale_floor(name))

    def _value(self, name: str) -> Tensor:
        """The tensor under the draw; a copy, so that who edits it in place leaves the draw alone."""
        return self.variational(name).sample().clone()

    def get_parameter(self, target: str) -> nn.Parameter:
        """The Parameter, which is the mean, under a draw too."""
        own = self._parameters.get(target)
        return super().get_parameter(target) if own is None else own

    def maybe(self, name: str) -> Variational | None:
        """:meth:`variational`, or None where the layer has no such tensor."""
        return self.variational(name) if name in self.specs else None

    def store_centre(self, name: str) -> None:
        """Keep the present mean as the prior's centre, in a buffer that is saved; nothing if the prior needs none."""
        if self.prior.needs_centre and f"{name}{_CENTRE}" not in self._buffers:
            self.register_buffer(f"{name}{_CENTRE}", self.get_parameter(name).detach().clone())

    def store_prior(self, name: str, centre: Tensor, scale: Tensor) -> None:
        """Give a tensor a prior of its own, N(centre, scale^2), in buffers that are saved, whatever the layer's is.

        Args:
            name: of the Parameter in this layer, such as "weight".
            centre: the prior's mean, of the Parameter's shape.
            scale: the prior's standard deviation, of the same shape.
        """
        loc = self.get_parameter(name)
        self.register_buffer(f"{name}{_CENTRE}", centre.detach().to(loc.device, loc.dtype, copy=True))
        self.register_buffer(f"{name}{_PRIOR_SCALE}", scale.detach().to(loc.device, copy=True))

    def drop_centre(self, name: str) -> None:
        """Forget the stored centre, and scale: another owner of the tensor keeps it."""
        self._buffers.pop(f"{name}{_CENTRE}", None)
        self._buffers.pop(f"{name}{_PRIOR_SCALE}", None)

    def prior_scale(self, name: str) -> Tensor | None:
        """Scales of a prior that :meth:`store_prior` gave; None where the layer's prior holds."""
        return self._buffers.get(f"{name}{_PRIOR_SCALE}")

    def prior_centre(self, name: str) -> Tensor:
        """Return the trained weight: the stored copy, or the mean itself while it is frozen.

        Raises:
            RuntimeError: the mean trains and no copy was stored.
        """
        if (stored := self._buffers.get(f"{name}{_CENTRE}")) is not None:
            return stored
        loc = self.get_parameter(name)
        if loc.requires_grad and self.prior.needs_centre:
            raise RuntimeError(
                f"The mean {self.specs[name].name!r} requires a gradient but the centre of its prior was not stored. "
                "Call `bayeformers.unfreeze(model)` instead of setting `requires_grad`: it stores the centre."
            )
        return loc

    def reset_parameters(self) -> None:
        """As the torch layer, and the scales with it."""
        super().reset_parameters()  # type: ignore[misc]
        for name in getattr(self, "specs", ()):
            self.reset_rho(name)

    def reset_rho(self, name: str) -> None:
        """Set the scale of ``name`` to its initial value, `initial_scale` of the present mean."""
        # transformers, loading, initialises modules that lack anything: a scale that it has read stays
        rho, is_loading = self.get_parameter(f"{name}_rho"), nn.init.normal_ is guarded_normal_
        if rho.is_meta or (is_loading and getattr(rho, "_is_hf_initialized", False)):  # no values, or those of the file
            return
        loc, floor = self.get_parameter(name), self.scale_floor(name)
        initial = self.initial_scale(name, loc)
        if floor is not None:
            floor.copy_(initial.floor)
        self.set_scale(name, initial(own_part(loc)))

    def set_scale(self, name: str, scale: Tensor) -> None:
        """Write the rho that gives these standard deviations, of the shape of ``name``."""
        loc, floor = self.get_parameter(name), self.scale_floor(name)
        with torch.no_grad():
            scale = part_of(scale, loc) if scale.shape == loc.shape else scale
            relative = scale if floor is None else scale / unit_of(own_part(loc.detach()), floor)
            own_part(self.get_parameter(f"{name}_rho").detach()).copy_(rho_from_scale(relative))

    def scale_floor(self, name: str) -> Tensor | None:
        """Floor of a multiplicative scale, sigma = softplus(rho) max(|mu|, floor); None if the scale is additive."""
        return self._buffers.get(f"{name}{_FLOOR}")

    def copy_scale(self, name: str, owner: BayesianModule, other: str) -> None:
        """Share rho with another owner of the same tensor; its floor, a scalar, is copied.

        Args:
            name: of the tied Parameter in this layer.
            owner: the layer whose rho becomes this one's too.
            other: the Parameter's name in ``owner``.
        """
        setattr(self, f"{name}_rho", owner.get_parameter(f"{other}_rho"))
        if (own := self.scale_floor(name)) is not None and (floor := owner.scale_floor(other)) is not None:
            own.copy_(floor)

    def initial_scale(self, name: str, centre: Tensor) -> InitialScale:
        """The rule that gives the initial scale of ``name`` from its trained value ``centre``."""
        row, floor = self.specs[name].padding_idx, self.floors_of_zeros.get(name)
        return InitialScale.from_weight(whole(centre), self.delta, row, floor)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        kl_watch.watch(self)  # a copy, or what a pickle brings

    def extra_repr(self) -> str:
        """The torch layer's, then prior and estimator."""
        options = [f"prior={self.prior!r}, estimator={self.estimator.name!r}"] if hasattr(self, "specs") else []
        return ", ".join(filter(None, [super().extra_repr(), *options]))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        rhos = {id(getattr(self, f"{name}_rho")) for name in getattr(self, "specs", ())}
        rhos |= {id(buffer) for key, buffer in self._buffers.items() if key.endswith(WIDE_BUFFERS)}
        grads = {id(p.grad) for p in self._parameters.values() if p is not None and id(p) in rhos}

        def keep_float32(tensor: Tensor) -> Tensor:
            """Devices change, the dtype of rho does not: small steps of rho are lost in 16 bits."""
            moved = fn(tensor)
            if (id(tensor) in rhos or id(tensor) in grads) and moved.dtype != tensor.dtype:
                return tensor.to(moved.device)
            return moved

        super()._apply(keep_float32, recurse)  # type: ignore[no-untyped-call]
        return self


@dataclass(frozen=True)
class NamedVariational:
    """One distinct Bayesian tensor of a model.

    Attributes:
        name: its first name in the model, the key of its noise.
        module: the layer that owns it first.
        parameter_name: its name there.
        siblings: names of all tensors that the layer owns first.
    """

    name: str
    module: BayesianModule
    parameter_name: str
    siblings: tuple[str, ...]

    @property
    def loc(self) -> nn.Parameter:
        """The posterior means, the layer's own Parameter."""
        return self.module.get_parameter(self.parameter_name)

    @property
    def rho(self) -> nn.Parameter:
        """The scales before softplus: sigma = max(softplus(rho), 1e-8)."""
        return self.module.get_parameter(f"{self.parameter_name}_rho")

    @property
    def spec(self) -> TensorSpec:
        """What its noise depends on."""
        return self.module.specs[self.parameter_name]

    def scale(self) -> Tensor:
        """Standard deviations, in float32 or the wider dtype of the means."""
        return scale_of(self.loc, self.rho, self.floor)

    @property
    def floor(self) -> Tensor | None:
        """Of a multiplicative scale."""
        return self.module.scale_floor(self.parameter_name)

    @property
    def layer(self) -> Iterator[NamedVariational]:
        """The tensors that its layer owns first, itself among them."""
        specs = self.module.specs
        return (replace(self, name=specs[name].name, parameter_name=name) for name in self.siblings)

    def random_rows(self) -> list[slice]:
        """Slices of the first axis that are random: all but the padding row."""
        if (row := self.spec.padding_idx) is None:
            return [slice(None)]
        return [rows for rows in (slice(0, row), slice(row + 1, self.loc.shape[0])) if rows.start < rows.stop]


def check_module(model: object) -> None:
    """Raise TypeError unless ``model`` is a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a torch.nn.Module, got {type(model).__name__}.")


def bayesian_modules(model: nn.Module) -> dict[str, BayesianModule]:
    """Bayesian layers by their first name in ``model``."""
    check_module(model)
    return {name: module for name, module in named_modules(model) if isinstance(module, BayesianModule)}


def is_bayesian(model: nn.Module) -> bool:
    """Whether ``model`` has a Bayesian layer, converted by `to_bayesian` or built by hand."""
    check_module(model)
    return any(isinstance(module, BayesianModule) for _, module in named_modules(model))


def record_of(model: nn.Module) -> Any:
    """The record of a model's conversion, found through wrappers; None for a network that was built by hand."""
    return next((getattr(module, RECORD) for module in model.modules() if hasattr(module, RECORD)), None)


def variational_tensors(model: nn.Module) -> Iterator[NamedVariational]:
    """Every distinct Bayesian Parameter of ``model`` once, tied tensors under their first owner."""
    seen: set[int] = set()
    for name, module in bayesian_modules(model).items():
        own = tuple(parameter for parameter in module.specs if id(module.get_parameter(parameter)) not in seen)
        for parameter in own:
            seen.add(id(module.get_parameter(parameter)))
            spec, unnamed = module.specs[parameter], f"{name}.{parameter}" if name else parameter
            yield NamedVariational(spec.name if spec.named else unnamed, module, parameter, own)
