"""Which words of a text make a posterior's draws disagree: the epistemic part with and without each word."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_count
from ..posteriors import PointPosterior, Posterior
from ..posteriors.predict import as_posterior
from ..predictive import Predictive

__all__ = ["word_attributions"]

Text = str | tuple[str, ...]
_WORD = re.compile(r"\S+\s*")
BETWEEN = " | "
"""Between two texts of one input."""


def word_attributions(
    model_or_posterior: nn.Module | Posterior,
    texts: Sequence[Text],
    tokenizer: Any,
    *,
    num_samples: int = 16,
    batch_size: int = 32,
    max_length: int | None = None,
    seed: int = 0,
) -> list[list[tuple[str, float]]]:
    r"""Score each word by how much it adds to the epistemic part: U(text) - U(text without the word).

    U is the mutual information in nats, or a regression's epistemic variance. The networks are the same with and
    without the word, as the seed is; n words cost n + 1 predictions (occlusion: Zeiler & Fergus 2014, section 4).

    Args:
        model_or_posterior: as `predict` takes it, with one prediction per text.
        texts: each a text, or a tuple of texts that are one input.
        tokenizer: of transformers.
        num_samples: draws of a prediction, where the posterior has draws.
        batch_size: texts of a forward pass.
        max_length: tokens after which texts are cut; by default as the tokenizer does.
        seed: of the draws.

    Returns:
        For each text its words, with the white space behind them, and their scores; an input of several texts has the
        pair (" | ", 0.0) between them. A text's only word has what the text has.

    Raises:
        TypeError: ``texts`` is one text, or holds something else than texts and tuples of texts.
        ValueError: inputs of one text beside inputs of several; a point estimate, which has no epistemic part, or a
            head that predicts per token.
    """
    if isinstance(texts, str):
        raise TypeError("`texts` must be a list of texts, got one text: put it in a list.")
    for name, value in (("num_samples", num_samples), ("batch_size", batch_size)):
        check_count(name, value, 1)
    _check_texts(texts)
    posterior = _with_draws(as_posterior(model_or_posterior))
    inputs: list[tuple[str, ...]] = []
    spans: list[tuple[tuple[str, ...], int, int]] = []
    for text in texts:
        parts = text if isinstance(text, tuple) else (text,)
        variants = _without_each(parts)
        spans.append((parts, len(inputs), len(variants)))
        inputs += [parts, *variants]
    device = next((tensor.device for tensor in posterior.model.parameters()), torch.device("cpu"))
    how: dict[str, Any] = {"truncation": True, "padding": True, "return_tensors": "pt", "max_length": max_length}
    found = [
        _epistemic(posterior.predict(batch, num_samples=num_samples, seed=seed))
        for batch in _batches(tokenizer, inputs, batch_size, device, how)
    ]
    values = torch.cat(found).tolist() if found else []
    return [_scored(parts, values[first : first + 1 + count]) for parts, first, count in spans]


def _check_texts(texts: Sequence[Text]) -> None:
    """Raise TypeError for what is no text, ValueError where inputs have several numbers of texts."""
    for text in texts:
        if not all(isinstance(part, str) for part in (text if isinstance(text, tuple) else (text,))):
            raise TypeError(f"`texts` must hold texts or tuples of texts, got {text!r}.")
    counts = {len(text) if isinstance(text, tuple) else 1 for text in texts}
    if len(counts) > 1 or 0 in counts:
        raise ValueError(f"`texts` must be of one or of several texts each, all alike, got {sorted(counts)} texts.")


def _with_draws(posterior: Posterior) -> Posterior:
    if isinstance(posterior, PointPosterior):
        raise ValueError(
            f"`model_or_posterior` is a point estimate ({type(posterior.model).__name__}), whose epistemic part is 0 "
            "for every text: give a posterior or a converted model."
        )
    return posterior


def _without_each(parts: tuple[str, ...]) -> list[tuple[str, ...]]:
    """The input without its first word, without its second, ...; none of an input of one word, which is all of it."""
    if sum(len(_WORD.findall(part)) for part in parts) < 2:
        return []
    variants = []
    for index, part in enumerate(parts):
        for word in _WORD.finditer(part):
            shorter = (part[: word.start()] + part[word.end() :]).strip()
            variants.append((*parts[:index], shorter, *parts[index + 1 :]))
    return variants


def _batches(
    tokenizer: Any, inputs: Sequence[tuple[str, ...]], size: int, device: torch.device, how: dict[str, Any]
) -> Iterator[dict[str, Tensor]]:
    for start in range(0, len(inputs), size):
        columns = [list(column) for column in zip(*inputs[start : start + size], strict=True)]
        yield {name: tensor.to(device) for name, tensor in tokenizer(*columns, **how).items()}


def _epistemic(predictive: Predictive) -> Tensor:
    value = predictive.mutual_information if predictive.values is None else predictive.epistemic_variance
    if value.dim() != 1:
        raise ValueError(
            f"`model_or_posterior` must predict once per text, got an epistemic part of shape {tuple(value.shape)}."
        )
    return value.double().cpu()


def _scored(parts: tuple[str, ...], values: Sequence[float]) -> list[tuple[str, float]]:
    whole, *without = values
    rest = iter([whole - value for value in without] or [whole])
    scored: list[tuple[str, float]] = []
    for index, part in enumerate(parts):
        if index:
            scored.append((BETWEEN, 0.0))
        words = _WORD.findall(part)
        scored += [(word, next(rest)) for word in words]
    return scored
