"""What a conversion changes in place: classes, ties, padding, fused kernels, dropout."""

from __future__ import annotations

import functools
import inspect
import re
import types
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, cast

from torch import nn

from ..nn import draws
from ..nn.base import BayesianModule
from ..nn.variational import TensorSpec
from .ties import full_name


def swap_class(module: nn.Module, kind: type[nn.Module]) -> None:
    """Change the class; accelerate's hooks keep, and leave, the old `forward` on the instance, bound: bind it anew."""
    own = type(module).forward
    module.__class__ = kind
    for name in ("forward", "_old_forward"):
        bound = module.__dict__.get(name)
        if isinstance(bound, types.MethodType) and bound.__func__ is own:
            module.__dict__[name] = types.MethodType(kind.forward, module)


def tie(owners: list[tuple[nn.Module, str]], name: str, noise_version: int, *, predicts_padding: bool = False) -> None:
    """Let tied means share rho, noise key and padding row; the prior's centre stays with the first owner.

    Args:
        owners: every layer that uses the tensor, and the Parameter's name there; often it is one.
        name: the tensor's first name in the model, which is the key of its noise.
        noise_version: of its draws, see `bayeformers.sampling.generators`.
        predicts_padding: whether the padding row stands for a token that a head predicts, so that it is a row as any
            other; only its lookups give no gradient, as in torch.
    """
    bayesian = [(m, p) for m, p in owners if isinstance(m, BayesianModule) and p in m.specs]
    specs = [module.specs[parameter] for module, parameter in bayesian]
    row = next((spec.padding_idx for spec in specs if spec.padding_idx is not None), None)
    by_row = any(spec.by_row for spec in specs)
    rows = {"untrained_idx": row} if predicts_padding else {"padding_idx": row}
    spec = TensorSpec(name, by_row=by_row, named=True, noise_version=noise_version, **rows)
    for number, (module, parameter) in enumerate(bayesian):
        module.specs[parameter] = spec
        if number == 0:
            if specs[0].padding_idx != spec.padding_idx:
                module.reset_rho(parameter)  # whether the padding row has a part in the floor, another owner told
        else:
            module.copy_scale(parameter, *bayesian[0])
            module.drop_centre(parameter)


def predicted_padding(model: nn.Module, owners: Iterable[Sequence[tuple[str, str]]]) -> list[str]:
    """Return tied tensors whose padding row is the row of a token that is predicted, by their first owner.

    With `pad_token_id` = `eos_token_id`, as decoders without a padding token are trained, the row of a table that is
    also the head's is the end of text: the head multiplies by it and trains it.
    """
    found = []
    for shared in owners:
        rows = padding_rows(model, [name for name, key in shared if key == "weight"])
        heads = [name for name, _ in shared if not isinstance(model.get_submodule(name), _TABLES)]
        if rows and heads and set(rows.values()) & _special_tokens(model, heads):
            found.append(full_name(shared[0]))
    return found


def _special_tokens(model: nn.Module, names: Iterable[str]) -> set[int]:
    """Ids of the ends and beginnings of texts, by the configurations of the models that hold the modules ``names``."""
    ids: set[int] = set()
    for above, module in model.named_modules():
        config = getattr(module, "config", None)
        if config is not None and any(not above or name.startswith(f"{above}.") for name in names):
            for kind in ("eos_token_id", "bos_token_id"):
                value = getattr(config, kind, None)
                ids.update(value if isinstance(value, list) else [] if value is None else [value])
    return ids


def padding_rows(model: nn.Module, names: Iterable[str]) -> dict[str, int]:
    """The row of padding of each lookup table that has one, of the modules ``names``."""
    tables = {name: model.get_submodule(name) for name in names}
    return {name: m.padding_idx for name, m in tables.items() if isinstance(m, _TABLES) and m.padding_idx is not None}


def set_padding_rows(model: nn.Module, names: Iterable[str], rows: Mapping[str, int]) -> None:
    """Give the tables the recorded rows: they were built anew from a configuration whose padding id may be another.

    Args:
        model: whose tables are set, in place.
        names: of the modules to look at, of which those that are no tables stay as they are.
        rows: by the table's name, its padding row; a table without an entry has none.
    """
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


def refuse_resize(*args: Any, **kwargs: Any) -> None:
    """Stands in for `resize_token_embeddings` on a converted model."""
    raise RuntimeError(
        "`resize_token_embeddings` on a Bayesian model would leave the new rows without a scale: call "
        "`to_deterministic(model)`, resize, then `to_bayesian` again."
    )


_DROPOUT_ATTRIBUTE = re.compile(r"(^|_)(dropout|layerdrop|drop_prob|drop_path|drop)($|_)")


def dropout_rates(model: nn.Module) -> dict[str, float]:
    """Every dropout rate > 0: `nn.Dropout` modules by name, rates that a forward reads by ``module.attribute``."""
    rates: dict[str, float] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            if module.p > 0:
                rates[name] = float(module.p)
            continue
        for attribute, value in vars(module).items():
            is_rate = isinstance(value, float) and 0 < value <= 1 and _DROPOUT_ATTRIBUTE.search(attribute)
            if is_rate and not _is_factor(cast(Hashable, type(module)), attribute):
                rates[f"{name}.{attribute}".lstrip(".")] = value
    layerdrop = getattr(getattr(model, "config", None), "layerdrop", None)
    if isinstance(layerdrop, float) and layerdrop > 0:  # Wav2Vec2 and its kin read it from the config in forward
        rates["config.layerdrop"] = layerdrop
    return rates


@functools.cache
def _is_factor(kind: Hashable, attribute: str) -> bool:
    """Whether the forward multiplies by 1 - rate in `eval()` (PPLCNet, NLLB-MoE): part of the mean, left alone."""
    try:
        source = inspect.getsource(cast(type, kind))
    except (OSError, TypeError):
        return False
    return re.search(rf"\*=?\s*\(?\s*1(\.0)?\s*-\s*self\.{attribute}\b", source) is not None


def set_dropout(model: nn.Module, key: str, rate: float) -> None:
    """Set one dropout rate of a model; a part that was replaced since is left alone.

    Args:
        model: whose rate is set, in place.
        key: what `dropout_rates` has called it.
        rate: the new probability of dropping an element, in [0, 1].
    """
    if key == "config.layerdrop":
        model.config.layerdrop = rate  # type: ignore[union-attr]
        return
    modules = dict(model.named_modules())
    if isinstance(modules.get(key), nn.modules.dropout._DropoutNd):
        modules[key].p = rate
        return
    parent, _, attribute = key.rpartition(".")
    if parent in modules and hasattr(modules[parent], attribute):
        setattr(modules[parent], attribute, rate)
