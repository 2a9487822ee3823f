"""From draws to words, entities and the numbers that judge both: pure functions of arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bayeformers import metrics
from bayeformers.reports import ClassPredictions, classification_report
from examples.conll.entities import Entity, entity_scores, find_entities
from examples.conll.fitting import Draws
from examples.conll.reader import Sentence

Array = NDArray[np.floating[Any]]
ALL = "in-domain"
"""The whole test set, beside its groups."""
CALIBRATION_BINS = 10


@dataclass(frozen=True)
class FoundEntity:
    """A predicted entity.

    Attributes:
        probability: that span and type are right, see `span_probability`.
        weakest: the smallest of its words' probabilities, a bound above for any dependence between words.
        epistemic: mutual information of its words, summed, in nats.
        entropy: predictive entropy of its words, summed.
    """

    entity: Entity
    is_right: bool
    probability: float
    weakest: float
    epistemic: float
    entropy: float


@dataclass(frozen=True)
class SentencePrediction:
    """What one method says about one sentence of n words: averaged probabilities (n, C), mutual information (n,)."""

    probs: Array
    epistemic: Array
    labels: list[str]
    entities: list[FoundEntity]

    @property
    def entropy(self) -> Array:
        """Predictive entropy of every word, (n,)."""
        return ClassPredictions(self.probs).total


def read_draws(draws: Draws, sentences: Sequence[Sentence], names: Sequence[str]) -> list[SentencePrediction]:
    """Average the draws, take each word's most probable label, and judge the entities that these labels make."""
    return [_sentence(log_probs, one, names) for log_probs, one in zip(draws, sentences, strict=True)]


def _sentence(log_probs: Array, gold: Sentence, names: Sequence[str]) -> SentencePrediction:
    log_probs = log_probs.astype(np.float64)
    drawn = np.exp(log_probs)
    drawn /= drawn.sum(-1, keepdims=True)
    probs, epistemic = drawn.mean(0), metrics.mutual_information(log_probs)
    entropy = ClassPredictions(probs).total
    labels = [names[index] for index in probs.argmax(-1)]
    right = set(find_entities(gold.labels))
    found = []
    for entity in find_entities(labels):
        words = slice(entity.start, entity.end)
        found.append(
            FoundEntity(
                entity,
                entity in right,
                span_probability(drawn, entity, names),
                weakest_word(probs, entity, names),
                float(epistemic[words].sum()),
                float(entropy[words].sum()),
            )
        )
    return SentencePrediction(probs, epistemic, labels, found)


def span_events(probs: Array, entity: Entity, names: Sequence[str]) -> Array:
    """Probabilities (..., k) of what must hold for an entity of a consistent IOB2 sequence to be there.

    B at its first word, I at the others, and no I of its type behind it; ``probs`` (..., n, C).
    """
    begin, inside = names.index(f"B-{entity.type}"), names.index(f"I-{entity.type}")
    parts = [probs[..., entity.start, begin]]
    parts += [probs[..., position, inside] for position in range(entity.start + 1, entity.end)]
    if entity.end < probs.shape[-2]:
        parts.append(1 - probs[..., entity.end, inside])
    return np.stack(parts, axis=-1)


def span_probability(drawn: Array, entity: Entity, names: Sequence[str]) -> float:
    """That span and type are right: mean over draws (S, n, C) of the product over words.

    Given the weights the model's words are independent, so a draw's probability of a span is a product; averaged over
    draws, words depend on each other through the weights. What the labels of a sentence share beyond that the model
    cannot express: of names whose words are all of one random type the product says too little.
    """
    return float(span_events(drawn, entity, names).prod(-1).mean())


def weakest_word(probs: Array, entity: Entity, names: Sequence[str]) -> float:
    """min over words of the averaged probabilities (n, C): no joint distribution of these words gives the span more."""
    return float(span_events(probs, entity, names).min())


def tempered(draws: Draws, temperature: float) -> Draws:
    """softmax(log p / T) of every draw."""
    scaled = [log_probs / temperature for log_probs in draws]
    return [one - np.log(np.exp(one - one.max(-1, keepdims=True)).sum(-1, keepdims=True)) - one.max(-1, keepdims=True)
            for one in scaled]  # fmt: skip


def fitted_temperature(draws: Draws, sentences: Sequence[Sentence], names: Sequence[str]) -> float:
    """The temperature of least NLL of a point estimate's words."""
    logits = np.concatenate([one[0] for one in draws]).astype(np.float64)
    return float(metrics.fit_temperature(logits, label_numbers(sentences, names)))


def label_numbers(sentences: Sequence[Sentence], names: Sequence[str]) -> NDArray[np.int64]:
    """The gold labels of all words of all sentences."""
    numbers = {name: index for index, name in enumerate(names)}
    return np.array([numbers[label] for one in sentences for label in one.labels])


# -- numbers ----------------------------------------------------------------------------------------------------------


def group_masks(sets: dict[str, list[Sentence]]) -> dict[str, tuple[str, list[int]]]:
    """Group -> (set, its sentences): the whole test set, its groups if there are several, the shifted set."""
    groups = sorted({one.group for one in sets["test"]})
    masks = {ALL: ("test", list(range(len(sets["test"]))))}
    if len(groups) > 1:
        masks |= {group: ("test", [i for i, one in enumerate(sets["test"]) if one.group == group]) for group in groups}
    if "shifted" in sets:
        masks["shifted"] = ("shifted", list(range(len(sets["shifted"]))))
    return masks


def group_report(
    predictions: Sequence[SentencePrediction], sentences: Sequence[Sentence], names: Sequence[str], *, is_point: bool
) -> dict[str, dict[str, float | None]]:
    """Scores of words and of entities."""
    return {
        "words": word_report(predictions, sentences, names, is_point=is_point),
        "entities": entity_report(predictions, sentences, is_point=is_point),
    }


def word_report(
    predictions: Sequence[SentencePrediction], sentences: Sequence[Sentence], names: Sequence[str], *, is_point: bool
) -> dict[str, float | None]:
    """`classification_report` of all words."""
    probs = np.concatenate([one.probs for one in predictions])
    epistemic = None if is_point else np.concatenate([one.epistemic for one in predictions])
    report = classification_report(ClassPredictions(probs, epistemic), label_numbers(sentences, names))
    report.pop("matthews")
    return report


def entity_report(
    predictions: Sequence[SentencePrediction], sentences: Sequence[Sentence], *, is_point: bool = False
) -> dict[str, float | None]:
    """F1 of the predicted entities, the calibration of their probabilities, and how well these find the wrong ones."""
    scores = entity_scores([one.labels for one in sentences], [one.labels for one in predictions])
    found = [entity for one in predictions for entity in one.entities]
    if not found:
        return dict(scores)
    right = np.array([entity.is_right for entity in found], dtype=np.float64)
    probability = np.array([entity.probability for entity in found])
    weakest = np.array([entity.weakest for entity in found])
    return {
        **scores,
        "probability": float(probability.mean()),
        "ece": calibration_error(probability, right),
        "ece_weakest": calibration_error(weakest, right),
        "brier": float(np.mean((probability - right) ** 2)),
        "aurc": metrics.aurc(probability, 1 - right),
        "auroc_probability": _auroc(probability, right),
        "auroc_entropy": _auroc(-np.array([entity.entropy for entity in found]), right),
        "auroc_epistemic": None if is_point else _auroc(-np.array([entity.epistemic for entity in found]), right),
    }


def _auroc(confidence: Array, right: Array) -> float | None:
    """Of finding wrong entities; None where all are right, or all wrong, or all are equally sure."""
    if right.min() == right.max() or confidence.min() == confidence.max():
        return None
    return float(metrics.error_auroc(confidence, 1 - right))


def calibration_bins(probability: Array, right: Array, num_bins: int = CALIBRATION_BINS) -> Array:
    """Bins of equal numbers of predicted entities: a row (mean probability, share right, count) for each."""
    order = np.argsort(probability, kind="stable")
    parts = np.array_split(order, min(num_bins, len(order)))
    return np.array([(probability[part].mean(), right[part].mean(), len(part)) for part in parts])


def calibration_error(probability: Array, right: Array, num_bins: int = CALIBRATION_BINS) -> float:
    """Mean |share right - mean probability| of these bins, weighted by their counts.

    Of the probability of one event, which may lie below one half, unlike the confidence of a class.

    >>> calibration_error(np.array([0.2, 0.2, 0.9]), np.array([0.0, 1.0, 1.0]), num_bins=1)
    0.2333
    """
    bins = calibration_bins(probability, right, num_bins)
    return float(np.average(np.abs(bins[:, 1] - bins[:, 0]), weights=bins[:, 2]))


def ambiguous_report(
    predictions: Sequence[SentencePrediction], sentences: Sequence[Sentence], person_share: float
) -> dict[str, float]:
    """The words whose label is drawn at random: what a method says there, next to the truth."""
    picked = [(one, list(gold.ambiguous)) for one, gold in zip(predictions, sentences, strict=True) if gold.ambiguous]
    entropy = np.concatenate([one.entropy[where] for one, where in picked])
    epistemic = np.concatenate([one.epistemic[where] for one, where in picked])
    probs = np.concatenate([one.probs[where].max(-1) for one, where in picked])
    return {
        "probability": float(probs.mean()),
        "true_probability": person_share,
        "entropy": float(entropy.mean()),
        "aleatoric": float((entropy - epistemic).mean()),
        "epistemic": float(epistemic.mean()),
        "true_aleatoric": -sum(p * float(np.log(p)) for p in (person_share, 1 - person_share)),
    }


def shift_report(
    test: Sequence[SentencePrediction], shifted: Sequence[SentencePrediction], *, is_point: bool
) -> dict[str, float]:
    """AUROC of telling shifted sentences by their most uncertain word."""
    is_shifted = np.repeat([0, 1], [len(test), len(shifted)])
    scores = {} if is_point else {"epistemic": [float(one.epistemic.max()) for one in (*test, *shifted)]}
    scores["entropy"] = [float(one.entropy.max()) for one in (*test, *shifted)]
    return {name: metrics.ood_auroc(np.array(values), is_shifted) for name, values in scores.items()}
