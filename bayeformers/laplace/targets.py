"""Which layers a Laplace posterior covers, and why it leaves the others deterministic."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from ..linearized import LayerRule, rule_of, supported_layers
from ..linearized.blocks import to_matrix
from ..patterns import Patterns, matching, subtrees
from ..storage import digest

Subset = Literal["all", "last_layer"]


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
        return tuple(to_matrix(self.modules[0], dict(self.parameters)).shape)

    @property
    def squared_norm(self) -> float:
        """|theta|^2 of the parameters, summed in float64."""
        return sum(float(parameter.detach().double().square().sum()) for parameter in self.parameters.values())

    @property
    def digest(self) -> str:
        """A hash of the parameters' values, in their own precision."""
        return " ".join(digest(parameter) for parameter in self.parameters.values())


def choose_targets(
    model: nn.Module, target: Patterns | None = None, exclude: Patterns | None = None
) -> tuple[list[Target], dict[str, str]]:
    """Targets in the model's order, and the reason of every other layer that has parameters.

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
    owners = _owners(model)
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
    """The targets of layers by name, in the model's order, with those of their parameters that are trained.

    Raises:
        ValueError: the model lacks such a layer, or it has no rule or no trained parameters.
    """
    modules, owners, wanted = dict(model.named_modules()), _owners(model), set(names)
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
    """|theta* - mu0|^2 of each target: mu0 are ``prior_mean``'s weights by name, 0 where it has none of that shape.

    Raises:
        ValueError: ``prior_mean`` has none of the targets' weights.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    centres = dict(prior_mean.named_parameters())
    found, known = {}, 0
    for target in targets:
        total = 0.0
        for parameter in target.parameters.values():
            centre, value = centres.get(names[parameter]), parameter.detach().double()
            if centre is not None and centre.shape == value.shape:
                value, known = value - centre.detach().to(value), known + 1
            total += float(value.square().sum())
        found[target.name] = total
    if known == 0:
        raise ValueError("`prior_mean` has none of the covered layers' weights: give the model before fine-tuning.")
    return found


def targets_named(model: nn.Module, layers: Mapping[str, Mapping[str, Any]]) -> list[Target]:
    """The targets of a saved posterior, checked against the model's layers and weights.

    Args:
        model: the model.
        layers: by name, the ``parameters`` covered and the ``squared_norm`` of their trained values.

    Raises:
        ValueError: the model lacks a layer, or its weights are not those that the posterior was fitted to.
    """
    modules, owners, found = dict(model.named_modules()), _owners(model), []
    for name, recorded in layers.items():
        module = modules.get(name)
        rule = None if module is None else rule_of(module)
        parameters = {key: getattr(module, key, None) for key in recorded["parameters"]}
        if module is None or rule is None or any(value is None for value in parameters.values()):
            raise ValueError(
                f"The posterior covers {name!r} ({recorded['parameters']}), which the model does not have."
            )
        given = {key: value for key, value in parameters.items() if value is not None}
        target = Target(name, tuple(owners[id(next(iter(given.values())))]), given, rule)
        if not math.isclose(target.squared_norm, recorded["squared_norm"], rel_tol=1e-3, abs_tol=1e-12):
            raise ValueError(
                f"The posterior was fitted to other weights: those of {name!r} have squared norm "
                f"{target.squared_norm:.6g}, the posterior's {recorded['squared_norm']:.6g}."
            )
        found.append(target)
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


def _owners(model: nn.Module) -> dict[int, list[nn.Module]]:
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
