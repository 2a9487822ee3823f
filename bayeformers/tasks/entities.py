"""From draws of a sentence's labels to entities, with probabilities that they are right, and the scores of both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import metrics
from .conll import Entity, find_entities

Array = NDArray[np.floating[Any]]
CALIBRATION_BINS = 10


@dataclass(frozen=True)
class PredictedEntity:
    """A predicted entity: which words, and the type."""

    entity: Entity
    is_right: bool  # whether the gold labels have it
    probability: float  # that span and type are right, see `span_probability`
    weakest: float  # the smallest of its words' probabilities, a bound above for any dependence between words
    epistemic: float  # mutual information of its words, summed, in nats
    entropy: float  # predictive entropy of its words, summed


@dataclass(frozen=True)
class TaggedSentence:
    """One method's prediction of one sentence of n words.

    ``probs`` (n, C) are averaged over the draws; ``entropy`` (n,) is predictive, ``epistemic`` (n,) the mutual
    information, 0 of a point estimate, in nats. ``labels`` are the most probable; they make the ``entities``.
    """

    probs: Array
    entropy: Array
    epistemic: Array
    labels: list[str]
    entities: list[PredictedEntity]


def tag_sentence(log_probs: Array, gold: Sequence[str], names: Sequence[str]) -> TaggedSentence:
    """Return the averaged draws, each word's most probable label, and the entities that these labels make, judged.

    Args:
        log_probs: of S draws, (S, n words, C labels).
        gold: the right labels of the words, in IOB2.
        names: the C labels.
    """
    log_probs = log_probs.astype(np.float64)
    drawn = np.exp(log_probs)
    drawn /= drawn.sum(-1, keepdims=True)
    probs = drawn.mean(0)
    with np.errstate(divide="ignore"):
        entropy = metrics.predictive_entropy(np.log(probs)[None])
    epistemic = metrics.mutual_information(log_probs) if len(log_probs) > 1 else np.zeros_like(entropy)
    labels, right = [names[index] for index in probs.argmax(-1)], set(find_entities(gold))
    entities = []
    for entity in find_entities(labels):
        words = slice(entity.start, entity.end)
        probability, weakest = span_probability(drawn, entity, names), weakest_word(probs, entity, names)
        sums = float(epistemic[words].sum()), float(entropy[words].sum())
        entities.append(PredictedEntity(entity, entity in right, probability, weakest, *sums))
    return TaggedSentence(probs, entropy, epistemic, labels, entities)


def _events(probs: Array, entity: Entity, names: Sequence[str]) -> Array:
    """Return probabilities (..., k) of what must hold for an entity of a consistent IOB2 sequence to be there.

    B at its first word, I at the others, and no I of its type behind it; ``probs`` (..., n, C).
    """
    begin, inside = names.index(f"B-{entity.type}"), names.index(f"I-{entity.type}")
    events = [probs[..., entity.start, begin]]
    events += [probs[..., position, inside] for position in range(entity.start + 1, entity.end)]
    if entity.end < probs.shape[-2]:
        events.append(1 - probs[..., entity.end, inside])
    return np.stack(events, axis=-1)


def span_probability(drawn: Array, entity: Entity, names: Sequence[str]) -> float:
    """Return the probability that span and type are right: mean over draws of the product over words.

    Given the weights the model's words are independent, so a draw's probability of a span is a product; averaged over
    draws, words depend on each other through the weights. What the labels of a sentence share beyond that the model
    cannot express: of names whose words are all of one random type the product says too little.

    Args:
        drawn: each draw's probabilities, (S draws, n words, C labels).
        entity: span and type.
        names: the C labels, in IOB2.
    """
    return float(_events(drawn, entity, names).prod(-1).mean())


def weakest_word(probs: Array, entity: Entity, names: Sequence[str]) -> float:
    """Return the least of the words' probabilities: no joint distribution of these words gives the span more.

    Args:
        probs: averaged over the draws, (n words, C labels).
        entity: span and type.
        names: the C labels, in IOB2.
    """
    return float(_events(probs, entity, names).min())


# --- Scores ----------------------------------------------------------------------------------------------------------
def entity_scores(gold: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return micro-averaged precision, recall and F1 of exact matches of span and type; a ratio without a count is 0.

    >>> entity_scores([["B-PER", "I-PER", "B-LOC"]], [["B-PER", "I-PER", "B-ORG"]])
    {'precision': 0.5, 'recall': 0.5, 'f1': 0.5}

    Raises:
        ValueError: Sentences of different lengths.
    """
    pairs = list(zip(gold, predicted, strict=True))
    if any(len(one) != len(other) for one, other in pairs):
        raise ValueError("`gold` and `predicted` must have sentences of the same lengths.")
    matches = [(set(find_entities(one)), set(find_entities(other))) for one, other in pairs]
    correct = sum(len(one & other) for one, other in matches)
    num_gold, num_found = (sum(len(pair[side]) for pair in matches) for side in (0, 1))
    counts = {"precision": num_found, "recall": num_gold, "f1": (num_gold + num_found) / 2}
    return {name: correct / count if count else 0.0 for name, count in counts.items()}


def entity_report(predictions: Sequence[TaggedSentence], gold: Sequence[Sequence[str]]) -> dict[str, float | None]:
    """F1 of the entities, the calibration of their probabilities, and how well uncertainties tell the wrong ones."""
    scores = entity_scores(gold, [one.labels for one in predictions])
    entities = [entity for one in predictions for entity in one.entities]
    if not entities:
        return dict(scores)
    right, probability, weakest, entropy, epistemic = (
        np.array([getattr(entity, name) for entity in entities], dtype=np.float64)
        for name in ("is_right", "probability", "weakest", "entropy", "epistemic")
    )
    return {
        **scores,
        "probability": float(probability.mean()),
        "ece": calibration_error(probability, right),
        "ece_weakest": calibration_error(weakest, right),
        "brier": float(np.mean((probability - right) ** 2)),
        "aurc": metrics.aurc(probability, 1 - right),
        "auroc_probability": _auroc(probability, right),
        "auroc_entropy": _auroc(-entropy, right),
        "auroc_epistemic": _auroc(-epistemic, right),
    }


def _auroc(confidence: Array, right: Array) -> float | None:
    """Of finding wrong entities; None where all are right, or all wrong, or all are equally sure."""
    if right.min() == right.max() or confidence.min() == confidence.max():
        return None
    return float(metrics.error_auroc(confidence, 1 - right))


def calibration_bins(probability: Array, right: Array, num_bins: int = CALIBRATION_BINS) -> Array:
    """Return bins of equal numbers of predicted entities: a row (mean probability, share right, count) for each.

    Args:
        probability: that each entity is right, (N,).
        right: 1 for an entity that is right, else 0, (N,).
        num_bins: number of bins; N of them where N is less.
    """
    order = np.argsort(probability, kind="stable")
    parts = np.array_split(order, min(num_bins, len(order)))
    return np.array([(probability[part].mean(), right[part].mean(), len(part)) for part in parts])


def calibration_error(probability: Array, right: Array, num_bins: int = CALIBRATION_BINS) -> float:
    """Return the mean |share right - mean probability| of the bins of `calibration_bins`, weighted by their counts.

    Of the probability of one event, which may lie below one half, unlike the confidence of a class.

    >>> calibration_error(np.array([0.2, 0.2, 0.9]), np.array([0.0, 1.0, 1.0]), num_bins=1)
    0.2333

    Args:
        probability: that each event happens, (N,).
        right: 1 for an event that happened, else 0, (N,).
        num_bins: number of bins; N of them where N is less.
    """
    bins = calibration_bins(probability, right, num_bins)
    return float(np.average(np.abs(bins[:, 1] - bins[:, 0]), weights=bins[:, 2]))
