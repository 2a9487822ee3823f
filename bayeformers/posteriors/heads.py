"""What a prediction must know of its model's head, and of the inputs that the head has labels for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..checks import is_real
from ..forward import Inputs, check_inputs
from ..likelihoods import (
    HEAD,
    IGNORED,
    NoiseStd,
    ProblemType,
    get_likelihood,
    is_encoder_decoder_lm,
    resolve_problem_type,
    unwrapped,
)

_SPANS = ("start_positions", "end_positions")
_CACHES = ("past_key_values", "cache_params")


def without_labels(model: nn.Module, inputs: Inputs) -> Inputs:
    """``inputs`` less all labels, so that the model computes no loss; decoder inputs are made of them first."""
    check_inputs(inputs)
    if not isinstance(inputs, Mapping):
        return inputs
    cached = [name for name in _CACHES if inputs.get(name) is not None]
    if cached:
        raise ValueError(f"`inputs` must not hold {cached}: the cache of one network is no cache of another draw.")
    kept = {name: value for name, value in inputs.items() if "label" not in name and name not in _SPANS}
    labels = inputs.get("labels")
    given = {"decoder_input_ids", "decoder_inputs_embeds"} & set(kept)
    if labels is not None and not given and is_encoder_decoder_lm(model):
        kept["decoder_input_ids"] = _decoder_input_ids(unwrapped(model), labels)
    return kept


def _decoder_input_ids(model: Any, labels: Tensor) -> Tensor:
    """What the model's own forward makes of labels: shifted right behind the start token, -100 replaced by padding."""
    prepare = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if callable(prepare):
        return cast(Tensor, prepare(labels=labels))
    start = labels.new_full((labels.shape[0], 1), model.config.decoder_start_token_id)
    shifted = torch.cat([start, labels[:, :-1]], dim=1)
    return shifted.masked_fill(shifted == IGNORED, model.config.pad_token_id)


def known_problem_type(model: nn.Module) -> ProblemType:
    """The head's problem type; single-label classification for a model that transformers does not know."""
    problem = resolve_problem_type(model)
    return "single_label_classification" if problem == "unknown" else problem


def has_many_logits(model: nn.Module, problem_type: ProblemType) -> bool:
    """Whether the head has too many logits per prediction for a covariance of them: over a vocabulary or positions."""
    if not get_likelihood(problem_type).is_linearizable:
        return True
    output_embeddings = getattr(unwrapped(model), "get_output_embeddings", None)  # a masked language model's too
    return callable(output_embeddings) and output_embeddings() is not None


def recorded_noise_std(model: nn.Module) -> NoiseStd | None:
    """A regression's noise as its configuration records it, or None."""
    recorded = getattr(getattr(unwrapped(model), "config", None), "bayesian", None)
    noise = recorded.get("noise_std") if isinstance(recorded, Mapping) else None
    if noise == HEAD:
        return HEAD
    return float(noise) if is_real(noise) else None
