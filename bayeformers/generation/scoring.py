"""What all networks of a posterior say of given texts: token by token, and of the whole."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_count, check_draw
from ..forward import logits_of
from ..posteriors import Posterior
from .networks import generator_of, rows_of
from .recording import entropy
from .resolve import ends_of, masked, posterior_of

MAX_ELEMENTS = 2**26  # log-probabilities of one draw that are in memory at once


@dataclass(frozen=True)
class TokenScores:
    """Of each generated token, in nats; 0 behind the end of a text.

    Attributes:
        total: entropy of the networks' mean distribution, (*, T).
        aleatoric: mean entropy of their distributions, (*, T).
        log_probs: log-probability of the token by each network, (S, *, T).
        own: log-probability of the token by what generated it, (*, T).
    """

    total: Tensor
    aleatoric: Tensor
    log_probs: Tensor
    own: Tensor

    @property
    def epistemic(self) -> Tensor:
        """Mutual information between token and network, total - aleatoric >= 0, (*, T)."""
        return (self.total - self.aleatoric).clamp_min(0)

    def of_sequences(self, mask: Tensor) -> SequenceScores:
        """Scores of whole texts, whose tokens ``mask`` (*, T) tells."""
        lengths = mask.sum(-1).clamp_min(1)
        log_prob = (self.own * mask).sum(-1)
        by_network = (self.log_probs * mask).sum(-1)
        return SequenceScores(
            log_prob=log_prob,
            per_token=log_prob / lengths,
            mutual_information=(self.epistemic * mask).sum(-1) / lengths,
            mixture_log_prob=(by_network.double().logsumexp(0) - math.log(len(by_network))).to(log_prob.dtype),
        )


@dataclass(frozen=True)
class SequenceScores:
    """Of whole texts, (*), in nats.

    Attributes:
        log_prob: sum over tokens of the log-probability by what generated them: the text's own network ("draws"), or
            the mean of all at each token ("average").
        per_token: the same, divided by the number of tokens.
        mutual_information: mean over tokens of the epistemic part.
        mixture_log_prob: log 1/S sum_s prod_t p_s(y_t): the probability of the text under one network drawn for all of
            it.
    """

    log_prob: Tensor
    per_token: Tensor
    mutual_information: Tensor
    mixture_log_prob: Tensor


def score_sequences(
    model_or_posterior: nn.Module | Posterior,
    sequences: Tensor,
    inputs: Mapping[str, Any],
    *,
    prompt_length: int,
    num_samples: int = 8,
    seed: int = 0,
) -> TokenScores:
    """What each of S networks says of the generated tokens of texts, by teacher forcing: one pass per draw and text.

    Args:
        model_or_posterior: as of `bayeformers.predict`.
        sequences: token ids with the prompt, (R, T); of an encoder-decoder those of the decoder.
        inputs: what was generated from, of B rows; R is a multiple of B, and sequences of one input stand together.
        prompt_length: how many tokens stand before the first generated one.
        num_samples: number S of draws.
        seed: of the draws.

    Returns:
        Scores of T - prompt_length tokens; ``own`` is the log-probability under the mean of all networks.

    Raises:
        ValueError: an argument is not one of these, or ``inputs`` has embeddings in place of token ids.
    """
    posterior = posterior_of(model_or_posterior)
    check_count("num_samples", num_samples, 1)
    check_draw(0, seed)
    _check_sequences(sequences, prompt_length, rows_of(inputs))
    new = sequences[:, prompt_length:]
    if not new.shape[1]:
        empty = new.new_zeros(new.shape, dtype=torch.float32)
        return TokenScores(empty, empty, empty[None], empty)
    defaults = generator_of(posterior.model).generation_config
    inputs = masked(inputs, defaults.pad_token_id, ends_of(defaults.eos_token_id))
    arguments = _forced(posterior.model, sequences, inputs, prompt_length)
    vocabulary = int(generator_of(posterior.model).get_output_embeddings().weight.shape[0])
    size = max(1, MAX_ELEMENTS // (new.shape[1] * vocabulary))
    parts = []
    for start in range(0, len(sequences), size):
        rows = slice(start, start + size)
        batch = {name: v[rows] if isinstance(v, Tensor) else v for name, v in arguments.items()}
        parts.append(_scored(posterior, batch, new[rows], num_samples, seed))
    return joined(parts)


def _check_sequences(sequences: Tensor, prompt_length: int, size: int) -> None:
    check_count("prompt_length", prompt_length, 1)
    if sequences.ndim != 2 or not len(sequences) or len(sequences) % size:
        raise ValueError(
            f"`sequences` must have the shape (R, T), R a multiple of {size} inputs, got {tuple(sequences.shape)}."
        )
    if prompt_length > sequences.shape[1]:
        raise ValueError(f"`prompt_length` must be at most {sequences.shape[1]}, the tokens, got {prompt_length}.")


def joined(parts: list[TokenScores]) -> TokenScores:
    """Scores of several batches as one, along the rows."""
    return TokenScores(
        total=torch.cat([part.total for part in parts]),
        aleatoric=torch.cat([part.aleatoric for part in parts]),
        log_probs=torch.cat([part.log_probs for part in parts], dim=1),
        own=torch.cat([part.own for part in parts]),
    )


def _scored(posterior: Any, batch: Mapping[str, Any], new: Tensor, num_samples: int, seed: int) -> TokenScores:
    mean: Tensor | None = None
    entropies, chosen = [], []
    for output in posterior.passes(batch, num_samples=num_samples, seed=seed):
        log_probs = logits_of(output)[:, -new.shape[1] :].log_softmax(-1)
        entropies.append(entropy(log_probs))
        chosen.append(log_probs.gather(-1, new[..., None])[..., 0])
        mean = log_probs if mean is None else torch.logaddexp(mean, log_probs)
    assert mean is not None
    mean = mean - math.log(len(chosen))
    own = mean.gather(-1, new[..., None])[..., 0]
    return TokenScores(entropy(mean), torch.stack(entropies).mean(0), torch.stack(chosen), own)


def _forced(model: nn.Module, sequences: Tensor, inputs: Mapping[str, Any], prompt_length: int) -> dict[str, Any]:
    """Arguments of R rows whose last logits predict the generated tokens."""
    generator, times = generator_of(model), len(sequences) // rows_of(inputs)
    accepted = inspect.signature(generator.forward).parameters
    arguments = {
        name: value.repeat_interleave(times, 0) if isinstance(value, Tensor) and value.ndim else value
        for name, value in inputs.items()
    }
    if generator.config.is_encoder_decoder:
        arguments["decoder_input_ids"] = sequences[:, :-1]
        return arguments
    if inputs.get("input_ids") is None:
        raise ValueError("`inputs` must hold `input_ids` to be scored: embeddings tell no tokens.")
    mask = arguments.get("attention_mask")
    arguments["input_ids"] = sequences[:, :-1]
    new = sequences.shape[1] - 1 - inputs["input_ids"].shape[1]
    for name, step in (("token_type_ids", 0), ("position_ids", 1)):  # as transformers goes on with them
        if isinstance(own := arguments.get(name), Tensor):
            more = own[..., -1:] + step * torch.arange(1, new + 1, device=own.device)
            arguments[name] = torch.cat([own, more.expand(*own.shape[:-1], new)], dim=-1)
    if mask is not None:
        ones = mask.new_ones(len(mask), sequences.shape[1] - 1 - mask.shape[1])
        arguments["attention_mask"] = torch.cat([mask, ones], dim=1)
        if (
            "position_ids" in accepted and inputs.get("position_ids") is None and not arguments["attention_mask"].all()
        ):  # padding on the left
            arguments["position_ids"] = (arguments["attention_mask"].cumsum(-1) - 1).clamp_min(0)
    if "logits_to_keep" in accepted:
        arguments["logits_to_keep"] = sequences.shape[1] - prompt_length
    return arguments
