"""What a conversion does to the modules of a model in place: their class, what tied tensors share, fused kernels."""

from __future__ import annotations

import types
from typing import Any

from torch import nn

from .nn import draws
from .nn.base import BayesianModule
from .nn.variational import TensorSpec


def swap_class(module: nn.Module, kind: type[nn.Module]) -> None:
    """Change the class; accelerate's hooks keep, and leave, the old `forward` on the instance, bound: bind it anew."""
    own = type(module).forward
    module.__class__ = kind
    for name in ("forward", "_old_forward"):
        bound = module.__dict__.get(name)
        if isinstance(bound, types.MethodType) and bound.__func__ is own:
            module.__dict__[name] = types.MethodType(kind.forward, module)


def tie(owners: list[tuple[nn.Module, str]], name: str) -> None:
    """Tied means share rho, noise key and padding row; the prior's centre stays with the first owner."""
    bayesian = [(m, p) for m, p in owners if isinstance(m, BayesianModule) and p in m.specs]
    specs = [module.specs[parameter] for module, parameter in bayesian]
    padding = [spec.padding_idx for spec in specs if spec.padding_idx is not None]
    spec = TensorSpec(name, by_row=any(s.by_row for s in specs), padding_idx=next(iter(padding), None), named=True)
    for number, (module, parameter) in enumerate(bayesian):
        module.specs[parameter] = spec
        if number == 0:
            if specs[0].padding_idx != spec.padding_idx:
                module.reset_rho(parameter)  # the padding row, which another owner told of, has no part in the floor
        else:
            module.copy_scale(parameter, *bayesian[0])
            module.drop_centre(parameter)


def tie_saved_names(model: nn.Module) -> list[str]:
    """Tell transformers of the tied rho, so that a checkpoint holds it once and a reload ties it again; their names."""
    ties: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    added = {f"{t}_rho": f"{s}_rho" for t, s in ties.items() if {f"{t}_rho", f"{s}_rho"} <= names}
    ties.update(added)
    return list(added)


_FUSED = ((nn.TransformerEncoderLayer, "activation_relu_or_gelu"), (nn.TransformerEncoder, "use_nested_tensor"))


def switch_fused_off(model: nn.Module) -> list[tuple[nn.Module, str, Any]]:
    """In `eval()` torch's own encoder hands its weights to one kernel that knows no draw: make it call its layers."""
    switched: list[tuple[nn.Module, str, Any]] = []
    for module in model.modules():
        for kind, attribute in _FUSED:
            if isinstance(module, kind) and getattr(module, attribute, None) and draws.bayesian_modules(module):
                switched.append((module, attribute, getattr(module, attribute)))
                setattr(module, attribute, type(getattr(module, attribute))(0))
    return switched
