"""What `generate` is given: a posterior that can generate, and inputs of one form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers import GenerationMixin

from ..checks import check_count
from ..forward import check_filled, vocabulary_size
from ..posteriors import Posterior, VariationalPosterior
from ..posteriors.base import BasePosterior
from ..posteriors.heads import without_labels
from ..posteriors.predict import as_posterior
from ..posteriors.variational import DEFAULT_DRAW_CACHE_BYTES
from .networks import generator_of

OWN_FIELDS = (
    "return_dict_in_generate", "output_scores", "output_logits", "output_attentions", "output_hidden_states",
)  # fmt: skip
OTHER_MODELS = (
    "assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "custom_generate", "use_mtp",
)  # fmt: skip
CACHES = ("past_key_values", "cache_params", "encoder_outputs", "prefill_chunk_size")
INPUTS = ("inputs", "input_ids", "attention_mask", "inputs_embeds", "decoder_input_ids", "input_features")


def posterior_of(model_or_posterior: nn.Module | Posterior) -> Posterior:
    """Return the posterior whose networks generate, as of `predict`.

    Raises:
        TypeError: it is neither a model nor a posterior.
        ValueError: its model cannot generate, or it changes predictions rather than weights.
    """
    posterior = as_posterior(model_or_posterior)
    is_made_here = posterior not in (model_or_posterior, getattr(model_or_posterior, "posterior", None))
    if is_made_here and isinstance(posterior, VariationalPosterior):
        posterior.draw_cache_bytes = DEFAULT_DRAW_CACHE_BYTES  # one step after another asks for its draws
    if isinstance(posterior, BasePosterior) and posterior.wraps:
        raise ValueError(
            f"A {type(posterior).__name__} changes predictions, not weights, and cannot generate: give what it is made "
            "of (its `base` or one of its `components`)."
        )
    generator = generator_of(posterior.model)
    if generator is None or not generator.can_generate():
        raise ValueError(
            f"`model_or_posterior` must have a model that generates, got a {type(posterior.model).__name__} without a "
            "language-model head; `predict` is for other heads."
        )
    if type(generator).generate is not GenerationMixin.generate:
        raise ValueError(
            f"A {type(generator).__name__} has a `generate` of its own, which cannot be given several networks: hold "
            "one draw in `with posterior.draw(index)` and call it there."
        )
    return posterior


def check_options(options: Mapping[str, Any]) -> None:
    """Check the keyword arguments for transformers' ``generate``.

    Raises:
        ValueError: one that has no meaning for several networks, or is given elsewhere.
    """
    for names, reason in (
        (INPUTS, "give it in `inputs`"),
        (OWN_FIELDS, "the result has fields of its own: `sequences`, `total`, `sequence_scores`"),
        (OTHER_MODELS, "drafts of another model, or another decoding, are not of the draws"),
        (CACHES, "each draw needs a cache of its own, which is made here"),
    ):
        found = [name for name in names if options.get(name) is not None]
        if found:
            raise ValueError(f"`{found[0]}` cannot be given to `bayeformers.generate`: {reason}.")
    if options.get("cache_implementation") == "paged":
        raise ValueError("`cache_implementation` cannot be 'paged', which shares caches between requests.")
    if options.get("max_new_tokens") is not None:
        check_count("max_new_tokens", options["max_new_tokens"], 1)


def prepared(posterior: Posterior, inputs: Any, tokenizer: Any) -> dict[str, Any]:
    """Return inputs by name, on the model's device: those of a mapping, one tensor of ids, or texts.

    Args:
        posterior: who generates.
        inputs: as of `generate`.
        tokenizer: makes ids of texts.

    Raises:
        TypeError: they are of another kind.
        ValueError: they are empty, padded at the end, or texts without a tokenizer.
    """
    if isinstance(inputs, str) or (isinstance(inputs, list | tuple) and inputs and isinstance(inputs[0], str)):
        inputs = _tokenized([inputs] if isinstance(inputs, str) else list(inputs), tokenizer)
    named = {"input_ids": inputs} if isinstance(inputs, Tensor) else inputs
    if not isinstance(named, Mapping):
        raise TypeError(
            f"`inputs` must be a mapping of names to tensors, token ids (B, T) or texts, got {type(inputs).__name__}."
        )
    if not named:
        raise ValueError("`inputs` is empty: give `input_ids`, or what else the model's `generate` takes.")
    found = dict(without_labels(posterior.model, dict(named)))
    given = [name for name in CACHES if found.get(name) is not None]
    if given:
        raise ValueError(f"`inputs` must not hold {given}: those of one network are none of another draw.")
    check_filled(found)
    generator = generator_of(posterior.model)
    found = {name: v.to(generator.device) if isinstance(v, Tensor) else v for name, v in found.items()}
    _check_ids(found.get("input_ids"), generator)
    if not generator.config.is_encoder_decoder:
        _check_padding(found)
    return found


def ends_of(found: Any) -> list[int]:
    """Ids of the tokens that end a text, of none, one or several."""
    return [] if found is None else list(found) if isinstance(found, list | tuple) else [int(found)]


def masked(inputs: Mapping[str, Any], padding: int | None, ends: list[int]) -> dict[str, Any]:
    """Return inputs with the attention mask that transformers' ``generate`` makes of padded ids without one.

    Args:
        inputs: by name.
        padding: id of the token that pads.
        ends: ids of the tokens that end a text; where one of them pads too, transformers takes all tokens as text.
    """
    ids, found = inputs.get("input_ids"), dict(inputs)
    if padding is None or padding in ends or not isinstance(ids, Tensor) or found.get("attention_mask") is not None:
        return found
    is_text = ids.ne(padding)
    return found if bool(is_text.all()) else found | {"attention_mask": is_text.long()}


def check_decoding(tokenizer: Any, equivalent: Any, answers: int) -> None:
    """Check what decodes and compares the answers to an input.

    Args:
        tokenizer: decodes; None: nothing is decoded.
        equivalent: compares; None: nothing is compared.
        answers: how many there are.

    Raises:
        TypeError: one of them is of another kind.
        ValueError: there is nothing to compare.
    """
    if tokenizer is not None and not callable(getattr(tokenizer, "batch_decode", None)):
        raise TypeError(f"`tokenizer` must be one of transformers' tokenizers, got {type(tokenizer).__name__}.")
    if equivalent is None:
        return
    if not callable(equivalent):
        raise TypeError(f"`equivalent` must be a function of two texts, got {type(equivalent).__name__}.")
    if tokenizer is None:
        raise ValueError("`equivalent` compares texts, which need a `tokenizer`.")
    if answers < 2:
        raise ValueError("`equivalent` compares several answers to an input, got one: take `mixing='draws'`.")


def _tokenized(texts: list[str], tokenizer: Any) -> Mapping[str, Any]:
    if tokenizer is None:
        raise ValueError("`inputs` are texts, which need a `tokenizer`; or give token ids.")
    side, tokenizer.padding_side = tokenizer.padding_side, "left"
    try:
        found: Mapping[str, Any] = tokenizer(texts, return_tensors="pt", padding=len(texts) > 1)
    finally:
        tokenizer.padding_side = side
    return found


def _check_ids(ids: Any, generator: Any) -> None:
    if not isinstance(ids, Tensor):
        return
    if ids.ndim != 2:
        raise ValueError(f"`input_ids` must have the shape (B, T), got {tuple(ids.shape)}.")
    if ids.is_floating_point():
        raise TypeError(f"`input_ids` must hold whole numbers, the ids of tokens, got {ids.dtype}.")
    size = vocabulary_size(generator)
    if size is not None and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < size:
        raise ValueError(
            f"`input_ids` must lie in the vocabulary of {size}, got ids from {int(ids.min())} to {int(ids.max())}."
        )


def _check_padding(inputs: Mapping[str, Any]) -> None:
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        return
    if isinstance(ids, Tensor) and mask.shape != ids.shape:
        raise ValueError(
            f"`attention_mask` must have the shape of `input_ids` {tuple(ids.shape)}, got {tuple(mask.shape)}."
        )
    if bool((mask[:, -1] == 0).any()):
        raise ValueError(
            "`inputs` are padded at the end, where the answer begins: a decoder needs its padding on the left. Set "
            '`tokenizer.padding_side = "left"`.'
        )
