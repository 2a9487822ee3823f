"""Where `fit_density` reads features: what "auto" stands for, from the shapes of a model's hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor, nn

from ..checks import check_choice, is_whole
from ..likelihoods import unwrapped
from .features import POOLINGS, Place, Pooling

Layer = int | str | Sequence[int | str]
"""A layer's number, a module's name, several of these, or "auto"."""

MAX_LAYERS = 8
_MOST_NUMBERS = 2**27
"""Of all places' second moments together: 1 GiB in float64."""


def check_layer(layer: Any) -> None:
    """Raise TypeError for anything but a number, a name, or a list of these, and ValueError for an empty list."""
    if isinstance(layer, (list, tuple)) and not layer:
        raise ValueError(f"`layer` must name at least one layer, got {layer!r}.")
    for each in layer if isinstance(layer, (list, tuple)) else [layer]:
        if not isinstance(each, str) and not is_whole(each):
            raise TypeError(f'`layer` must be "auto", a number, a module\'s name or a list of these, got {layer!r}.')


def check_pooling(pooling: Any) -> None:
    """Raise ValueError for an unknown pooling."""
    check_choice("pooling", pooling, ("auto", *POOLINGS))


def listed(layer: Layer) -> list[int | str]:
    """One layer, or several, as a list."""
    return [layer] if isinstance(layer, (int, str)) else list(layer)


def chosen_places(
    model: nn.Module, states: Sequence[Tensor], layer: Layer, pooling: Pooling | Literal["auto"]
) -> list[Place]:
    """Return the places of `fit_density`.

    With "auto" these are all layers above the embeddings, at most 8 of them at equal distances with the last among
    them, and of each the first position, the mean and the largest value of every feature; of a causal model the last
    position in place of the first, which sees nothing but itself; of an encoder-decoder and of feature maps, neither.

    Args:
        model: its attention layers say whether it is causal.
        states: the hidden states of a batch; empty for a model without them.
        layer: as `fit_density` takes it.
        pooling: as `fit_density` takes it.

    Raises:
        ValueError: there are no hidden states, so a module must be named.
    """
    if isinstance(layer, str) and layer == "auto":
        if len(states) < 2:
            raise ValueError(
                '`layer`="auto" needs a model that gives hidden states; name a module whose output is read, such as '
                f"{[name for name, _ in model.named_modules() if name][-3:]}."
            )
        layers: list[int | str] = list(_spread(len(states) - 1, states[-1].shape))
    else:
        layers = listed(layer)
    poolings = _poolings(model, states) if pooling == "auto" else (pooling,)
    return list(dict.fromkeys(Place(each, how) for each in layers for how in poolings))


def _spread(last: int, shape: Sequence[int]) -> list[int]:
    """Layers 1 .. last, or some of them."""
    size = shape[1] if len(shape) == 4 else shape[-1]
    count = max(1, min(last, MAX_LAYERS, _MOST_NUMBERS // (3 * size**2)))
    return sorted({round(last * (i + 1) / count) for i in range(count)})


def _poolings(model: nn.Module, states: Sequence[Tensor]) -> tuple[Pooling, ...]:
    dimensions = states[-1].dim() if states else 3
    if dimensions == 2:
        return ("mean",)
    is_pair = bool(getattr(getattr(unwrapped(model), "config", None), "is_encoder_decoder", False))
    if dimensions == 4 or is_pair:
        return ("mean", "max")
    is_causal = any(getattr(module, "is_causal", False) is True for module in model.modules())
    return ("last" if is_causal else "cls", "mean", "max")
