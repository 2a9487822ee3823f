"""What a conversion does to the modules of a model in place: their class, what tied tensors share, fused kernels."""

from __future__ import annotations

import types
from collections.abc import Iterable, Mapping
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


def padding_rows(model: nn.Module, names: Iterable[str]) -> dict[str, int]:
    """The row of padding of each lookup table that has one, of the modules ``names``."""
    tables = {name: model.get_submodule(name) for name in names}
    return {name: m.padding_idx for name, m in tables.items() if isinstance(m, _TABLES) and m.padding_idx is not None}


def set_padding_rows(model: nn.Module, names: Iterable[str], rows: Mapping[str, int]) -> None:
    """Give the tables the recorded rows: they were built anew from a configuration whose padding id may be another."""
    for name in names:
        module = model.get_submodule(name)
        if isinstance(module, _TABLES):
            module.padding_idx = rows.get(name)


_TABLES = (nn.Embedding, nn.EmbeddingBag)
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
