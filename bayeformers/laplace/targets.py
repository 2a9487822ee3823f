"""Which layers a Laplace posterior covers, by which weights, and why it leaves the others deterministic."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..linearized import LayerRule, rule_of, supported_layers
from ..linearized.blocks import to_matrix
from ..patterns import Patterns, matching, subtrees
from ..processes.dtensors import whole
from ..storage import digest

_NARROWER = (torch.float32, torch.bfloat16, torch.float16)
Fingerprint = Mapping[str, Mapping[str, str]]
"""Name of a parameter -> dtype -> digest of its values in it; its own dtype is the first."""


@dataclass(frozen=True, eq=False)
class Target:
    """The parameters of one layer, or of several that share them; a `GaussianBlock` without a posterior yet.

    Attributes:
        name: of the (first) layer.
        modules: the layers that use the parameters.
        parameters: "weight" and/or "bias".
        rule: of the layers' class.
        left, right: the basis in which squares are summed, for "ekfac"; None: the identity.
    """

    name: str
    modules: tuple[nn.Module, ...]
    parameters: Mapping[str, nn.Parameter]
    rule: LayerRule
    left: Tensor | None = None
    right: Tensor | None = None
    is_flat: bool = False

    @property
    def num_weights(self) -> int:
        """Number of parameters."""
        return sum(parameter.numel() for parameter in self.parameters.values())

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """(K, d_out, d_in')."""
        like = {name: torch.empty(p.shape, device="meta") for name, p in self.parameters.items()}
        return tuple(to_matrix(self.modules[0], like).shape)

    @property
    def squared_norm(self) -> float:
        """|theta|^2 of the parameters, summed in float64."""
        return sum(float(whole(parameter).detach().double().square().sum()) for parameter in self.parameters.values())

    @property
    def digest(self) -> str:
        """A hash of the parameters' values, in their own precision."""
        return " ".join(digest(whole(parameter)) for parameter in self.parameters.values())

    @property
    def fingerprint(self) -> Fingerprint:
        """Hashes of the parameters' values as they are now, in their own precision and in narrower ones.

        A model that is loaded in fewer bits has other values, which rounding determines: with hashes of the rounded
        weights every precision is recognised, and no other weights pass.
        """
        return {name: _digests(whole(parameter).detach()) for name, parameter in self.parameters.items()}

    def has_weights(self, recorded: Fingerprint) -> bool:
        """Whether the parameters are those recorded, or those rounded to fewer bits or copied into more."""
        return recorded.keys() == self.parameters.keys() and all(
            _matches(whole(parameter).detach(), recorded[name]) for name, parameter in self.parameters.items()
        )


def choose_targets(
    model: nn.Module, target: Patterns | None = None, exclude: Patterns | None = None
) -> tuple[list[Target], dict[str, str]]:
    """Return targets in the model's order, and the reason of every other layer that has parameters.

    Args:
        model: any module.
        target: PEFT's patterns, for layers of every class that has a rule; None: all layers whose rule is on by
            default (Linear, Conv1D, convolutions; not Embedding, LayerNorm, RMSNorm).
        exclude: patterns of layers or containers to leave out.

    Raises:
        ValueError: a pattern that matches nothing, nothing left to cover, or a tied weight of which only one owner is
            targeted.
    """
    names = [name for name, _ in model.named_modules()]
    targeted = set(names) if target is None or target == "all" else matching(names, target, "target_modules")
    by_default = target is None or target == "all"
    excluded = set() if exclude is None else subtrees(names, matching(names, exclude, "exclude_modules"))
    owners = owners_of(model)
    kept = {id(module) for name, module in model.named_modules() if name in excluded}
    found: list[Target] = []
    skipped: dict[str, str] = {}
    done: set[int] = set()
    for name, module in model.named_modules():
        if not any(parameter is not None for parameter in module._parameters.values()):
            continue
        reason = _reason(name, module, targeted, excluded, by_default) or _shared(module, owners, kept)
        if reason:
            skipped[name] = reason
        elif id(module) not in done:
            modules = _together(module, owners)
            done |= set(map(id, modules))
            rule = rule_of(module)
            assert rule is not None  # else there was a reason
            found.append(Target(name, modules, _trained(module), rule))
    if not found:
        reasons = "; ".join(sorted(set(skipped.values()))[:5]) or "no layer with weights"
        raise ValueError(
            f"`target_modules`={target!r} leaves no layer for the posterior ({reasons}). "
            f"Supported: {supported_layers()}."
        )
    _check_ties(model, found, skipped)
    return found, skipped


def targets_of(model: nn.Module, names: Iterable[str]) -> list[Target]:
    """Return the targets of layers by name, in the model's order, with those of their parameters that are trained.

    Raises:
        ValueError: the model lacks such a layer, or it has no rule or no trained parameters.
    """
    modules, owners, wanted = dict(model.named_modules()), owners_of(model), set(names)
    if wanted - set(modules):
        missing = sorted(wanted - set(modules))
        raise ValueError(f"The curvature is of layers that the model does not have: {missing[:5]}.")
    found = []
    for name, module in modules.items():
        if name not in wanted:
            continue
        rule = rule_of(module)
        if rule is None or not _trained(module):
            raise ValueError(f"The curvature is of {name!r}, which is frozen in the model or has no rule.")
        found.append(Target(name, _together(module, owners), _trained(module), rule))
    return found


def squared_distances(targets: Sequence[Target], model: nn.Module, prior_mean: nn.Module) -> dict[str, float]:
    """Return |theta* - mu0|^2 of each target, by its name.

    Args:
        targets: the layers that the posterior covers.
        model: the trained model, with the weights theta*.
        prior_mean: the model whose weights, found by name, are mu0; 0 where it has none of a name and shape.

    Raises:
        ValueError: ``prior_mean`` has none of the targets' weights.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    centres = dict(prior_mean.named_parameters())
    found, known = {}, 0
    for target in targets:
        total = 0.0
        for parameter in target.parameters.values():
            centre, value = centres.get(names[parameter]), whole(parameter).detach().double()
            if centre is not None and centre.shape == value.shape:
                value, known = value - whole(centre).detach().to(value), known + 1
            total += float(value.square().sum())
        found[target.name] = total
    if known == 0:
        raise ValueError("`prior_mean` has none of the covered layers' weights: give the model before fine-tuning.")
    return found


def _reason(name: str, module: nn.Module, targeted: set[str], excluded: set[str], by_default: bool) -> str | None:
    if name in excluded:
        return "in exclude_modules"
    if name not in targeted:
        return "not in target_modules"
    rule = rule_of(module)
    if rule is None:
        return f"no rule for {type(module).__name__}"
    if by_default and not rule.by_default:
        return f"{type(module).__name__} is off by default: name it in target_modules"
    if set(module._parameters) - {"weight", "bias"}:
        return f"it has parameters besides weight and bias: {sorted(module._parameters)}"
    if not _trained(module):
        return "frozen (requires_grad is False)"
    return None


def _trained(module: nn.Module) -> dict[str, nn.Parameter]:
    """What was not frozen by the user: a frozen parameter was not trained, so it has no posterior."""
    given = {name: module._parameters.get(name) for name in ("weight", "bias")}
    return {name: parameter for name, parameter in given.items() if parameter is not None and parameter.requires_grad}


def owners_of(model: nn.Module) -> dict[int, list[nn.Module]]:
    """Return the modules that use each Parameter, by its id."""
    owners: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(module)
    return owners


def _check_ties(model: nn.Module, found: Iterable[Target], skipped: Mapping[str, str]) -> None:
    """A tied weight is one random tensor: the reason of another layer that uses it would be untrue."""
    owner = {id(module): target.name for target in found for module in target.modules}
    for name, reason in skipped.items():
        other = owner.get(id(model.get_submodule(name)))
        if other is not None:
            raise ValueError(
                f"{name!r} shares its weight with {other!r} but stays deterministic ({reason}): a tied weight is "
                "random in all its uses or in none. Name both in `target_modules`, or one in `exclude_modules`."
            )


def _together(module: nn.Module, owners: dict[int, list[nn.Module]]) -> tuple[nn.Module, ...]:
    return tuple(owners[id(next(iter(_trained(module).values())))])


def _shared(module: nn.Module, owners: dict[int, list[nn.Module]], kept: set[int]) -> str | None:
    """A tied weight is one random tensor: it has a posterior only where all its uses are of one form."""
    groups = [owners[id(parameter)] for parameter in _trained(module).values()]
    same_kind = all(type(rule_of(other)) is type(rule_of(module)) for group in groups for other in group)
    if any(id(other) in kept for group in groups for other in group):
        return "tied to a layer in exclude_modules"
    if any(len(group) > 1 for group in groups) and not (same_kind and all(g == groups[0] for g in groups)):
        others = {type(other).__name__ for group in groups for other in group if other is not module}
        return f"tied to a layer that uses the weight in another way ({', '.join(sorted(others))})"
    return None


def _digests(values: Tensor) -> dict[str, str]:
    own = values.dtype
    if values.is_meta:
        return {}
    dtypes = [own, *(dtype for dtype in _NARROWER if dtype != own and dtype.itemsize <= own.itemsize)]
    return {str(dtype).removeprefix("torch."): digest(values.to(dtype)) for dtype in dtypes}


def _matches(values: Tensor, recorded: Mapping[str, str]) -> bool:
    if values.is_meta:
        return True
    known = recorded.get(str(values.dtype).removeprefix("torch."))
    if known is not None:
        return digest(values) == known
    name = next(iter(recorded))  # of fewer bits than these values have: nothing may be lost
    narrow = values.to(getattr(torch, name))
    return torch.equal(narrow.to(values.dtype), values) and digest(narrow) == recorded[name]
