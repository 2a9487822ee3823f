"""Bayesian tensors of which this process holds a part: what the KL needs of them, every element counted once."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..distributions import InitialScale
from ..processes.dtensors import first_row, groups_of, is_managed, is_split, own_part, part_of, summed_over, whole
from . import kl_watch
from .base import BayesianModule, NamedVariational
from .noise import Draw
from .variational import TensorSpec

Take = Callable[[Tensor, Tensor], Tensor]
"""From a tensor that a layer keeps, and the mean that it belongs to, to what is meant of it."""


def noise_of_part(draw: Draw, spec: TensorSpec, tensor: Tensor) -> Tensor:
    """Return N(0, 1) of this process's part of a tensor: what the whole has there, on however many processes.

    Args:
        draw: which noise.
        spec: of the whole tensor.
        tensor: the whole, split.

    Shape: that of the part, float32.
    """
    if spec.by_row and all(placement.is_shard(0) for placement in tensor.placements):  # type: ignore[attr-defined]
        part = own_part(tensor)
        start = first_row(tensor)
        return draw.noise(spec, tensor, torch.arange(start, start + len(part), device=part.device))
    return part_of(draw.noise(spec, tensor), tensor)


def keep_nothing(draw: Draw, layers: Iterable[BayesianModule]) -> None:
    """In a sharded model a held draw is made again in every forward: its whole weights would fill each device.

    Nor could it be told whether a kept value still stands, for FSDP fills whole Parameters without counting it.
    """
    if draw.kept is not None and any(is_managed(layer) for layer in layers):
        draw.kept, draw._noise = None, weakref.WeakValueDictionary()


class OwnLayer:
    """Stands in for a Bayesian layer while the KL asks for its prior: this process's parts of its tensors.

    Attributes:
        layer: the layer itself.
        prior, scope, specs: its own.
    """

    def __init__(self, layer: BayesianModule, loc: Tensor, initial: InitialScale, take: Take) -> None:
        self.layer, self.prior, self.scope, self.specs = layer, layer.prior, layer.scope, layer.specs
        self._loc, self._initial, self._take = loc, initial, take

    def prior_centre(self, name: str) -> Tensor:
        """The part of the trained weight, which is that of the mean itself while it is frozen."""
        mean, centre = self.layer.get_parameter(name), self.layer.prior_centre(name)
        return self._loc if centre is mean else self._take(centre, mean)

    def prior_scale(self, name: str) -> Tensor | None:
        """The part of a prior's scales that `store_prior` gave."""
        scale = self.layer.prior_scale(name)
        return None if scale is None else self._take(scale, self.layer.get_parameter(name))

    def initial_scale(self, name: str, centre: Tensor) -> InitialScale:
        """The rule of the whole tensor."""
        return self._initial

    def scale_floor(self, name: str) -> Tensor | None:
        """A number of the whole tensor."""
        return self.layer.scale_floor(name)


@dataclass(frozen=True)
class OwnPart(NamedVariational):
    """This process's part of one distinct Bayesian tensor; otherwise as `NamedVariational`.

    Attributes:
        source: the whole.
        own_loc, own_rho: the parts, with their gradients.
        own_spec: with the padding row's place in the part.
        groups: of processes, over which sums of parts are summed.
    """

    source: NamedVariational
    own_loc: Tensor
    own_rho: Tensor
    own_spec: TensorSpec
    groups: tuple[Any, ...]

    @property
    def loc(self) -> Any:
        """This process's means."""
        return self.own_loc

    @property
    def rho(self) -> Any:
        """This process's scales before softplus."""
        return self.own_rho

    @property
    def spec(self) -> TensorSpec:
        """What the noise depends on, with the padding row's place in the part."""
        return self.own_spec

    @property
    def layer(self) -> Iterator[NamedVariational]:
        """What there is, alike, of the tensors that its layer owns first."""
        return map(gathered, self.source.layer) if not self.groups else iter(own_parts(self.source.layer))


def own_parts(tensors: Iterable[NamedVariational]) -> list[NamedVariational]:
    """The tensors, and of split ones this process's part; all processes have to ask."""
    given = list(tensors)
    split = [tensor for tensor in given if is_split(tensor.rho) or is_split(tensor.loc)]
    if not split:
        return given
    initial = _initial_scales(split)
    return [_own_part(tensor, initial[tensor]) if tensor in initial else tensor for tensor in given]


def total(tensors: Sequence[NamedVariational], values: Sequence[Tensor]) -> Tensor:
    """Return the sum of one value per tensor: those of parts are summed over the processes, in one message.

    Args:
        tensors: as `own_parts` gives them.
        values: scalars.
    """
    by_groups: dict[tuple[Any, ...], list[Tensor]] = {}
    for tensor, value in zip(tensors, values, strict=True):
        groups = tensor.groups if isinstance(tensor, OwnPart) else ()
        by_groups.setdefault(groups, []).append(value.to(values[0].device))
    sums = [summed_over(torch.stack(parts).sum(), groups) for groups, parts in by_groups.items()]
    return sums[0] if len(sums) == 1 else torch.stack(sums).sum()


def summed_moment(tensors: Sequence[NamedVariational], value: Tensor, count: int) -> tuple[Tensor, int]:
    """Return a sum over the weights of tensors of one layer, and their number, over all processes.

    Args:
        tensors: as `own_parts` gives them, split alike or whole.
        value: this process's sum, a scalar.
        count: the number of its weights.
    """
    first = tensors[0]
    if not isinstance(first, OwnPart):
        return value, count
    both = summed_over(torch.stack([value, torch.full_like(value, count)]), first.groups)
    return both[0], int(both[1])


def sampled_noise(tensor: NamedVariational) -> Tensor:
    """Noise of a KL that is estimated by one draw, that of the latest training forward: shape of ``tensor.loc``."""
    draw = tensor.module.scope.sampling_key()
    if isinstance(tensor, OwnPart):
        return noise_of_part(draw, tensor.source.spec, tensor.source.loc)
    return draw.noise(tensor.spec, tensor.loc)


def gathered(tensor: NamedVariational) -> NamedVariational:
    """A tensor as if one process had it, without gradient; all have to ask. It needs the room of one whole tensor."""
    if not is_split(tensor.loc):
        return tensor
    module, name = tensor.module, tensor.parameter_name
    loc, rho = whole(tensor.loc), whole(tensor.rho)
    initial = module.initial_scale(name, module.prior_centre(name))
    layer: Any = OwnLayer(module, loc, initial, lambda value, mean: whole(value))
    return OwnPart(tensor.name, layer, name, tensor.siblings, tensor, loc, rho, tensor.spec, ())


def _own_part(tensor: NamedVariational, initial: InitialScale) -> OwnPart:
    kl_watch.note(tensor.module)
    loc, rho = own_part(tensor.loc), own_part(tensor.rho)
    layer: Any = OwnLayer(tensor.module, loc, initial, part_of)
    spec = replace(tensor.spec, padding_idx=_own_row(tensor.spec.padding_idx, tensor.loc))
    groups = groups_of(tensor.loc)
    return OwnPart(tensor.name, layer, tensor.parameter_name, tensor.siblings, tensor, loc, rho, spec, groups)


def _own_row(row: int | None, tensor: Tensor) -> int | None:
    """A row's place in this process's part; None: it is another's."""
    if row is None or not any(placement.is_shard(0) for placement in tensor.placements):  # type: ignore[attr-defined]
        return row
    place = row - first_row(tensor)
    return place if 0 <= place < len(own_part(tensor)) else None


@torch.no_grad()
def _initial_scales(tensors: Sequence[NamedVariational]) -> dict[NamedVariational, InitialScale]:
    """The rule that gave each tensor's initial scale, by the mean size of all its trained weights."""
    norms: dict[tuple[Any, ...], list[tuple[NamedVariational, Tensor]]] = {}
    for tensor in tensors:
        trained = part_of(tensor.module.prior_centre(tensor.parameter_name), tensor.loc)
        row = _own_row(tensor.spec.padding_idx, tensor.loc)
        wider = torch.promote_types(trained.dtype, torch.float32)
        norm = torch.linalg.vector_norm(trained, ord=1, dtype=wider)
        if row is not None:
            norm = norm - torch.linalg.vector_norm(trained[row], ord=1, dtype=wider)
        norms.setdefault(groups_of(tensor.loc), []).append((tensor, norm))
    found = {}
    for groups, pairs in norms.items():
        sums = summed_over(torch.stack([norm.double() for _, norm in pairs]), groups)
        for (tensor, norm), value in zip(pairs, sums, strict=True):
            found[tensor] = _rule(tensor, value.to(norm.dtype))
    return found


def _rule(tensor: NamedVariational, norm: Tensor) -> InitialScale:
    """As of a tensor of as many weights that all have the mean size; see `InitialScale.from_weight`."""
    module, count = tensor.module, tensor.loc.numel()
    if tensor.spec.padding_idx is not None:
        count -= count // tensor.loc.shape[0]
    size = (norm / max(count, 1)).reshape(1)
    return InitialScale.from_weight(size, module.delta, None, module.floors_of_zeros.get(tensor.parameter_name))
