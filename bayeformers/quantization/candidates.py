"""The layers that can hold INT8, those that stay float and why, and the report of both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from torch import nn

from ..patterns import Patterns
from .calibrate import Measured
from .install import Weight, kinds, parameter_names
from .layers import QuantizedLayer
from .noise import Noise
from .report import LayerReport, Report


@dataclass
class Candidates:
    """Of one model.

    Attributes:
        kinds: by layer, its INT8 class.
        weights: by layer, the name of its weight.
        skipped: by module, why it stays float.
    """

    kinds: dict[str, type[QuantizedLayer]]
    weights: dict[str, str]
    skipped: dict[str, str]

    @classmethod
    def of(cls, model: nn.Module, exclude_modules: Patterns | None = None) -> Self:
        """Return of a model, less the layers and containers that ``exclude_modules`` names.

        Raises:
            ValueError: there is none.
        """
        found, skipped = kinds(model, exclude_modules)
        if not found:
            raise ValueError(f"`posterior`'s model ({type(model).__name__}) has no layer for INT8: {skipped}.")
        names = parameter_names(model)
        weights = {layer: names[model.get_submodule(layer).get_parameter("weight")] for layer in found}
        return cls(found, weights, skipped)

    @property
    def axes(self) -> dict[str, int]:
        """Of the channels, by weight; each once."""
        return {name: self.kinds[layer].axis for layer, name in self.weights.items()}

    def users(self, weight: str) -> tuple[str, ...]:
        """The layers of a weight."""
        return tuple(layer for layer, name in self.weights.items() if name == weight)

    def drop(self, measured: Mapping[str, Measured], max_error: float) -> bool:
        """Leave out the layers whose outputs at the mean would be off, with all that share their weight; if any."""
        wrong = {}
        for layer, name in self.weights.items():
            error = measured[layer].relative_error
            if error is not None and not error <= max_error:
                wrong[name] = f"its outputs would be {error:.1%} off at the mean"
        for layer in [layer for layer, name in self.weights.items() if name in wrong]:
            self.skipped[layer] = wrong[self.weights.pop(layer)]
            del self.kinds[layer]
        return bool(wrong)


def report_of(
    model: nn.Module,
    weights: Sequence[Weight],
    noise: Noise,
    measured: Mapping[str, Measured],
    skipped: Mapping[str, str],
) -> Report:
    """Return one row per layer with Parameters; a tied weight counts in its first layer.

    Args:
        model: as it is before INT8 weights are put in.
        weights: the INT8 weights, each with the layers that use it.
        noise: of the posterior, which tells the bytes of its draws.
        measured: by layer, what the calibration inputs showed.
        skipped: by module, why it stays float.
    """
    held = {user: weight for weight in weights for user in weight.owners}
    names, counted = parameter_names(model), set[str]()
    rows = []
    for layer, module in model.named_modules():
        if layer not in held and layer not in skipped:
            continue
        keys = module._parameters if layer in skipped else ("weight",)
        new = {
            names[p]: p for p in (module._parameters[key] for key in keys) if p is not None and names[p] not in counted
        }
        counted |= set(new)
        weight, one = held.get(layer), measured.get(layer, Measured())
        before, after = (sum(size) for size in zip((0, 0), *(noise.sizes(name) for name in new), strict=True))
        before += sum(p.nbytes for p in new.values())
        after += sum(p.nbytes if weight is None else weight.codes.nbytes for p in new.values())
        reason = skipped.get(layer, "" if one.is_called else "not called on the calibration inputs")
        how = ("float", "float") if weight is None else ("int8", weight.arithmetic)
        kind = type(module).__name__
        rows.append(LayerReport(layer, kind, *how, before, after, one.relative_error, one.relative_noise, reason))
    return Report(rows)
