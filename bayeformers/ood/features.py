"""Features of an input: a layer's hidden states, pooled to one vector; one forward gives all layers and the logits."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..checks import check_choice, is_whole
from ..forward import Inputs, attended_positions, call, output_field
from ..likelihoods import unwrapped
from ..posteriors import BasePosterior, Posterior

Pooling = Literal["cls", "mean", "max", "last"]
POOLINGS: tuple[str, ...] = get_args(Pooling)


@dataclass(frozen=True)
class Place:
    """Where features are read.

    Attributes:
        layer: number of the hidden states, 0 the embeddings; or the dotted name of a module, whose output is read.
        pooling: "cls": the first position; "mean", "max": over the positions that the attention mask admits; "last":
            the last of these. An output (B, D) is taken as it is, one of (B, D, H, W) has H W positions.
    """

    layer: int | str
    pooling: Pooling

    def __str__(self) -> str:
        """In words."""
        return f"{self.pooling} of {'layer ' if is_whole(self.layer) else ''}{self.layer}"


@contextlib.contextmanager
def at_mean(posterior: Posterior) -> Iterator[nn.Module]:
    """The posterior's model at its mean, in ``eval()`` mode, until exit; the model itself comes back as it was."""
    if isinstance(posterior, BasePosterior):
        with posterior.recording_view() as view:
            yield view.model
        return
    modes = {module: module.training for module in posterior.model.modules()}
    try:
        with posterior.mean():
            yield posterior.model.eval()
    finally:
        for module, mode in modes.items():
            module.training = mode


@torch.no_grad()
def read_states(model: nn.Module, inputs: Inputs, layers: Iterable[int | str] | None) -> tuple[Any, dict[Any, Tensor]]:
    """One forward pass.

    Args:
        model: any module in ``eval()`` mode.
        inputs: what its forward takes, without labels.
        layers: numbers of hidden states, names of modules; None: all hidden states there are, if any.

    Returns:
        The model's output, and the layers' states by number or name.

    Raises:
        ValueError: the model has no such layer, or gives no hidden states.
    """
    wanted = set(layers or ())
    names = {layer: _submodule(model, layer) for layer in wanted if isinstance(layer, str)}
    outputs = dict[str, Tensor]()
    asks = has_hidden_states(model) if layers is None else len(names) < len(wanted)
    handles = [module.register_forward_hook(_Keep(name, outputs)) for name, module in names.items()]
    try:
        output = call(model, inputs, **({"output_hidden_states": True} if asks else {}))
    finally:
        for handle in handles:
            handle.remove()
    states = hidden_states(output) if asks else ()
    wanted = set(range(len(states))) if layers is None else wanted
    return output, {layer: _state(layer, states, outputs) for layer in wanted}


def read_features(model: nn.Module, inputs: Inputs, places: Iterable[Place]) -> tuple[Any, dict[Place, Tensor]]:
    """Read and pool in one forward pass.

    Args:
        model: any module in ``eval()`` mode.
        inputs: what its forward takes, without labels.
        places: where to read.

    Returns:
        The model's output, and the features (B, D) of every place, in the model's dtype.
    """
    places = list(places)
    output, states = read_states(model, inputs, {place.layer for place in places})
    return output, {place: pooled(states[place.layer], inputs, place.pooling) for place in places}


def hidden_states(output: Any) -> tuple[Tensor, ...]:
    """Return the hidden states in a model's output; of an encoder-decoder the encoder's.

    Raises:
        ValueError: it has none.
    """
    for name in ("hidden_states", "encoder_hidden_states"):
        states = output_field(output, name)
        if isinstance(states, (tuple, list)) and states and all(isinstance(state, Tensor) for state in states):
            return tuple(states)
    raise ValueError(
        "The model gives no hidden states, so `layer` must be the name of a module (see `model.named_modules()`), "
        "whose output is read."
    )


def has_hidden_states(model: nn.Module) -> bool:
    """Whether the model has transformers' configuration, whose `output_hidden_states` asks for them."""
    return hasattr(getattr(unwrapped(model), "config", None), "output_hidden_states")


def pooled(states: Tensor, inputs: Inputs, pooling: Pooling) -> Tensor:
    """Pool hidden states to one vector per example.

    Args:
        states: (B, T, D); (B, D) stays as it is; (B, D, H, W) has H W positions.
        inputs: what the forward took, for its attention mask.
        pooling: how; positions that the mask leaves out never count.

    Returns:
        (B, D).

    Raises:
        ValueError: the pooling is unknown, or the states have another number of axes.

    >>> states = torch.tensor([[[1.0], [3.0], [9.0]]])
    >>> [pooled(states, {"attention_mask": torch.tensor([[1, 1, 0]])}, how).item() for how in POOLINGS]
    [1.0, 2.0, 3.0, 3.0]
    """
    check_choice("pooling", pooling, POOLINGS)
    if states.dim() == 4:
        states = states.flatten(2).mT
    if states.dim() == 2:
        return states
    if states.dim() != 3:
        raise ValueError(f"A layer's output must be (B, D), (B, T, D) or (B, D, H, W), got {tuple(states.shape)}.")
    mask = attended_positions(inputs, states.shape[1])
    if mask is None:
        mask = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
    mask = mask.to(states.device)
    if pooling == "mean":  # a product of matrices: no second tensor of the states' size
        weights = mask.to(states.dtype) / mask.sum(1, keepdim=True).clamp_min(1)
        found = torch.bmm(weights[:, None], states).squeeze(1)
        if bool(found.isfinite().all()):
            return found
        return torch.bmm(weights[:, None], states.masked_fill(~mask[..., None], 0)).squeeze(1)  # 0 x NaN is NaN
    if pooling == "max":
        if not bool(mask.all()):
            states = states.masked_fill(~mask[..., None], torch.finfo(states.dtype).min)
        return states.amax(1)
    positions = torch.arange(states.shape[1], device=states.device)
    chosen = mask.to(positions).argmax(1) if pooling == "cls" else (mask.to(positions) * positions).argmax(1)
    return states[torch.arange(len(states), device=states.device), chosen]


def _submodule(model: nn.Module, name: str) -> nn.Module:
    modules: dict[str, nn.Module] = dict(model.named_modules())
    if name not in modules:
        raise ValueError(f"`layer`={name!r} is no module of the model; some are {[n for n in modules if n][:5]}.")
    return modules[name]


def _state(layer: int | str, states: tuple[Tensor, ...], outputs: dict[str, Tensor]) -> Tensor:
    if isinstance(layer, str):
        if layer not in outputs:
            raise ValueError(f"`layer`={layer!r} was not called in the forward pass, or gave no tensor.")
        return outputs[layer]
    if not -len(states) <= layer < len(states):
        raise ValueError(f"`layer` must be in {-len(states)}..{len(states) - 1} (0: the embeddings), got {layer}.")
    return states[layer]


class _Keep:
    """A hook that keeps a module's output, or the first tensor of it."""

    def __init__(self, name: str, kept: dict[str, Tensor]) -> None:
        self.name, self.kept = name, kept

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        found = output[0] if isinstance(output, (tuple, list)) and output else output
        found = output_field(found, "last_hidden_state") if not isinstance(found, Tensor) else found
        if isinstance(found, Tensor):
            self.kept[self.name] = found
