"""Inputs and labels that a model takes, found by trying what its signature asks for."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

ROWS, LENGTH, TARGET_LENGTH = 2, 7, 4
Inputs = dict[str, Any]


class NoInputs(Exception):
    """No candidate ran; says why the last ones did not."""


def inputs_for(model: nn.Module) -> Inputs:
    """The first candidate that ``model`` runs on to at least one finite number.

    Raises:
        NoInputs: none does.
    """
    reasons = []
    for candidate in _candidates(model):
        try:
            torch.manual_seed(0)
            with torch.no_grad():
                found = tensors_of(model(**candidate))
            if any(t.numel() and torch.isfinite(t).any() for t in found):
                return candidate
            reasons.append(f"{'+'.join(candidate)}: no number comes out")
        except Exception as error:
            reasons.append(f"{'+'.join(candidate)}: {type(error).__name__}: {' '.join(str(error).split())[:90]}")
    raise NoInputs(" | ".join(dict.fromkeys(reasons)) or "no candidate")


def tensors_of(output: Any) -> list[Tensor]:
    """Every floating tensor in a model's output, in order."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, Mapping):
        output = output.values()
    if not isinstance(output, Iterable) or isinstance(output, str):
        return []
    return [t for item in output for t in tensors_of(item)]


# ------------------------------------------------------------------------------------------------------ candidates


def _candidates(model: nn.Module) -> Iterator[Inputs]:
    names = inspect.signature(model.forward).parameters
    main = str(getattr(model, "main_input_name", ""))
    parts = [part for part in (_PARTS if main == "input_ids" else reversed(_PARTS)) if part[0] in names]
    parts.sort(key=lambda part: part[0] != main)
    extras = _extras(model, names)
    alone = [[choice] for name, choices in parts for choice in choices(model)]
    pairs = [
        [first, second]
        for number, (_, choices) in enumerate(parts)
        for first in choices(model)
        for _, others in parts[number + 1 :]
        for second in others(model)
    ]
    for pieces in [*alone, *pairs[:24]]:
        whole = {key: value for piece in pieces for key, value in piece.items() if key in names}
        yield {**whole, **{key: value for key, value in extras.items() if key not in whole}}
    for pieces in alone:  # some tables name a model whose extras are optional and refused together
        yield {key: value for piece in pieces for key, value in piece.items() if key in names}


def _text(model: nn.Module) -> Iterator[Inputs]:
    ids = torch.randint(5, 38, (ROWS, LENGTH), generator=_generator())
    mask = torch.ones(ROWS, LENGTH, dtype=torch.long)
    if "MultipleChoice" in type(model).__name__:
        yield {"input_ids": ids[:, None].repeat(1, 3, 1), "attention_mask": mask[:, None].repeat(1, 3, 1)}
        return
    ids[:, -1] = 2  # some heads look for the end of the sequence
    padded, shorter = ids.clone(), mask.clone()
    padded[1, 4], padded[1, 5:], shorter[1, 5:] = 2, _pad(model), 0
    yield {"input_ids": padded, "attention_mask": shorter}
    yield {"input_ids": ids, "attention_mask": mask}


def _pixels(model: nn.Module) -> Iterator[Inputs]:
    sizes = [size for size in _values(model.config, "image_size", "pretrain_image_size") if size]
    channels = next(iter(_values(model.config, "num_channels", "in_channels")), 3)
    channels = channels if isinstance(channels, int) and channels < 5 else 3
    tried = []
    for size in [*sizes, 32, 64, 128]:
        height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
        if (height, width) not in tried and max(height, width) <= 128:
            tried.append((height, width))
    for height, width in tried:
        yield {"pixel_values": torch.randn(ROWS, channels, height, width, generator=_generator())}
    frames = next(iter(_values(model.config, "num_frames")), 2)
    height, width = tried[0]
    yield {"pixel_values": torch.randn(ROWS, frames, channels, height, width, generator=_generator())}
    yield {"pixel_values": torch.randn(ROWS, 2, channels, height, width, generator=_generator())}


def _videos(model: nn.Module) -> Iterator[Inputs]:
    for inputs in _pixels(model):
        if inputs["pixel_values"].dim() == 5:
            yield {"pixel_values_videos": inputs["pixel_values"]}


def _waves(model: nn.Module) -> Iterator[Inputs]:
    for shape in ((ROWS, 4000), (ROWS, 1, 1600), (ROWS, 800), (ROWS, 64, 16), (ROWS, 1024, 128)):
        yield {"input_values": torch.randn(shape, generator=_generator())}


def _features(model: nn.Module) -> Iterator[Inputs]:
    bands = [*_values(model.config, "num_mel_bins", "feature_size", "input_feat_per_channel", "input_dim"), 80]
    frames = [2 * size for size in _values(model.config, "max_source_positions")] + [64]
    for band in dict.fromkeys(bands):
        for frame in dict.fromkeys(frames):
            for shape in ((ROWS, frame, band), (ROWS, band, frame)):
                yield {
                    "input_features": torch.randn(shape, generator=_generator()),
                    "attention_mask": torch.ones(ROWS, frame, dtype=torch.long),
                }


def _series(model: nn.Module) -> Iterator[Inputs]:
    config = model.config
    length = getattr(config, "context_length", 16)
    past = length + max(getattr(config, "lags_sequence", None) or [0])
    future = getattr(config, "prediction_length", None) or 4
    features = getattr(config, "num_time_features", 0)
    rows = {
        "past_time_features": torch.randn(ROWS, past, features, generator=_generator()),
        "future_time_features": torch.randn(ROWS, future, features, generator=_generator()),
        "future_values": torch.randn(ROWS, future, generator=_generator()),
    }
    for shape in ((ROWS, past), (ROWS, length, getattr(config, "num_input_channels", 1))):
        values = torch.randn(shape, generator=_generator())
        observed = torch.ones(shape)
        yield {"past_values": values, "past_observed_mask": observed, **(rows if len(shape) == 2 else {})}
        yield {"past_values": values}
        yield {"past_values": values, "future_values": torch.randn(ROWS, future, *shape[2:], generator=_generator())}


_PARTS = (
    ("input_ids", _text),
    ("pixel_values", _pixels),
    ("input_values", _waves),
    ("input_features", _features),
    ("pixel_values_videos", _videos),
    ("past_values", _series),
)


def _extras(model: nn.Module, names: Mapping[str, Any]) -> Inputs:
    extras: Inputs = {}
    if "decoder_input_ids" in names:
        extras["decoder_input_ids"] = torch.randint(5, 38, (ROWS, TARGET_LENGTH), generator=_generator())
    if "bbox" in names:
        corners = torch.randint(0, 10, (ROWS, LENGTH, 2), generator=_generator())
        extras["bbox"] = torch.cat((corners, corners + 5), dim=-1)
    if "return_loss" in names:
        extras["return_loss"] = False
    if "use_cache" in names:
        extras["use_cache"] = False
    return extras


def _pad(model: nn.Module) -> int:
    found = next((value for value in _values(model.config, "pad_token_id") if isinstance(value, int)), 0)
    return found


def _values(config: Any, *names: str) -> list[Any]:
    """Values under these names in the configuration and, after it, in its parts."""
    own = [vars(config)[name] for name in names if vars(config).get(name) is not None]
    parts = [value for value in vars(config).values() if hasattr(value, "to_dict")]
    return own + [value for part in parts for value in _values(part, *names)]


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


# ---------------------------------------------------------------------------------------------------------- labels


def labels_for(model: nn.Module, inputs: Inputs) -> Inputs | None:
    """Labels of a head whose likelihood is known; None for any other."""
    name = type(model).__name__
    rows = len(next(iter(inputs.values())))
    if "QuestionAnswering" in name and "start_positions" in inspect.signature(model.forward).parameters:
        return {"start_positions": torch.tensor([1, 0][:rows]), "end_positions": torch.tensor([3, 2][:rows])}
    if "TokenClassification" in name and "input_ids" in inputs:
        return {"labels": inputs["input_ids"] % 3}
    if name == "VideoPrismForVideoClassification":  # logits (B, 1, C)
        return {"labels": torch.tensor([[0], [2]][:rows])}
    if any(part in name for part in ("SequenceClassification", "ImageClassification", "VideoClassification")):
        return {"labels": torch.tensor([0, 2][:rows])}
    if "MultipleChoice" in name:
        return {"labels": torch.tensor([0, 2][:rows])}
    if "NextSentence" in name:
        return {"labels": torch.tensor([0, 1][:rows])}
    if "decoder_input_ids" in inputs and (any(part in name for part in ("ConditionalGeneration", "LMHead", "MTModel"))):
        return {"labels": inputs["decoder_input_ids"]}
    if any(part in name for part in ("MaskedLM", "CausalLM", "LMHeadModel")) and "input_ids" in inputs:
        return {"labels": inputs["input_ids"]}
    return None
