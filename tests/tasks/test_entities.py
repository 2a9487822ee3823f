"""Probabilities of entities, and the scores of entities, by enumeration and by hand."""

import itertools
import random

import numpy as np
import pytest

from bayeformers.tasks.conll import Entity, find_entities
from bayeformers.tasks.entities import (
    PredictedEntity,
    TaggedSentence,
    calibration_bins,
    calibration_error,
    entity_report,
    entity_scores,
    span_probability,
    tag_sentence,
    weakest_word,
)

from .test_conll import conlleval

NAMES = ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]


def random_draws(num_draws: int, num_words: int) -> np.ndarray:
    logits = 2 * np.random.default_rng(0).normal(size=(num_draws, num_words, len(NAMES)))
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


# --- Entities from draws ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("entity", [Entity(0, 1, "PER"), Entity(1, 3, "LOC"), Entity(2, 4, "PER"), Entity(0, 4, "LOC")])
def test_span_probability_is_a_sum_over_all_label_sequences(entity: Entity) -> None:
    """Of those that have the entity, with a B at its first word: by enumeration, draw by draw."""
    drawn, expected = np.exp(random_draws(3, 4)), 0.0
    for numbers in itertools.product(range(len(NAMES)), repeat=4):
        labels = [NAMES[number] for number in numbers]
        if entity in find_entities(labels) and labels[entity.start][0] == "B":
            expected += drawn[:, range(4), numbers].prod(1).mean()
    assert span_probability(drawn, entity, NAMES) == pytest.approx(expected)
    weakest = weakest_word(drawn.mean(0), entity, NAMES)
    assert weakest >= expected


def test_weakest_word_is_reached_by_words_that_vary_together() -> None:
    """Two draws that are sure of opposite types: the span is as probable as each of its words."""
    sure = np.full((2, 2, len(NAMES)), 1e-12)
    sure[0, 0, 3] = sure[0, 1, 4] = sure[1, 0, 1] = sure[1, 1, 2] = 1.0
    entity = Entity(0, 2, "PER")
    assert span_probability(sure, entity, NAMES) == pytest.approx(0.5)
    assert weakest_word(sure.mean(0), entity, NAMES) == pytest.approx(0.5)
    alone = sure.mean(0, keepdims=True)  # without the draws: independent words
    assert span_probability(alone, entity, NAMES) == pytest.approx(0.25)


def test_predictions_average_probabilities_and_divide_entropy() -> None:
    log_probs = random_draws(5, 6)
    found = tag_sentence(log_probs, ("B-PER", "I-PER", "O", "O", "B-LOC", "O"), NAMES)
    probs = np.exp(log_probs).mean(0)
    np.testing.assert_allclose(found.probs, probs)
    assert found.labels == [NAMES[index] for index in probs.argmax(-1)]
    entropy = -(probs * np.log(probs)).sum(-1)
    expected = -(np.exp(log_probs) * log_probs).sum(-1).mean(0)
    np.testing.assert_allclose(found.entropy, entropy)
    np.testing.assert_allclose(found.epistemic, entropy - expected)
    assert [item.entity for item in found.entities] == find_entities(found.labels)
    for item in found.entities:
        words = slice(item.entity.start, item.entity.end)
        assert item.entropy == pytest.approx(entropy[words].sum())
        assert item.is_right == (item.entity in {Entity(0, 2, "PER"), Entity(4, 5, "LOC")})


# --- Scores ----------------------------------------------------------------------------------------------------------
def test_calibration_error_by_hand() -> None:
    probability, right = np.array([0.9, 0.1, 0.3, 0.7]), np.array([1.0, 0.0, 1.0, 0.0])
    np.testing.assert_allclose(calibration_bins(probability, right, 2), [[0.2, 0.5, 2], [0.8, 0.5, 2]])
    assert calibration_error(probability, right, 2) == pytest.approx(0.3)


def test_calibrated_probabilities_have_a_small_error() -> None:
    rng, size = np.random.default_rng(0), 20_000
    probability = rng.random(size)
    right = (rng.random(size) < probability).astype(float)
    # in each of ten bins the error has a standard deviation of at most 0.5 / sqrt(2000); a mean of |normal|
    assert calibration_error(probability, right) < 2 * 0.5 / np.sqrt(size / 10)
    assert calibration_error(probability**2, right) > 0.1


def prediction(labels: list[str], probability: float, is_right: bool) -> TaggedSentence:
    found = [PredictedEntity(entity, is_right, probability, probability, 0.1, 0.2) for entity in find_entities(labels)]
    nothing = np.zeros(len(labels))
    return TaggedSentence(np.full((len(labels), 5), 0.2), nothing, nothing, labels, found)


def test_entity_report_by_hand() -> None:
    gold = [["B-PER"], ["B-PER"], ["O"]]
    found = [prediction(["B-PER"], 0.8, True), prediction(["B-LOC"], 0.6, False), prediction(["O"], 0.0, False)]
    report = entity_report(found, gold)
    assert (report["precision"], report["recall"], report["f1"]) == (0.5, 0.5, 0.5)
    assert report["brier"] == pytest.approx((0.2**2 + 0.6**2) / 2)
    assert report["ece"] == pytest.approx((0.2 + 0.6) / 2)
    assert report["auroc_probability"] == 1.0 and report["auroc_epistemic"] is None  # all are equally sure
    assert report["aurc"] == pytest.approx((0 + 0.5) / 2)
    assert set(entity_report([found[2]], [gold[2]])) == {"precision", "recall", "f1"}


@pytest.mark.parametrize(
    ("gold", "predicted", "scores"),
    [
        ("B-PER I-PER O", "B-PER I-PER O", (1, 1, 1)),
        ("B-PER I-PER O", "B-PER O O", (0, 0, 0)),  # part of a span is no match
        ("B-PER I-PER O", "B-LOC I-LOC O", (0, 0, 0)),  # nor is the span of another type
        ("B-PER I-PER O", "I-PER I-PER O", (1, 1, 1)),  # an I begins a span where nothing goes on
        ("B-PER B-PER O", "B-PER I-PER O", (0, 0, 0)),  # two entities taken for one
        ("B-PER O B-LOC", "B-PER O O", (1, 1 / 2, 2 / 3)),
        ("B-PER O O", "B-PER O B-LOC", (1 / 2, 1, 2 / 3)),
        ("O O O", "O O O", (0, 0, 0)),  # nothing to find, nothing found: as conlleval prints it
        ("O O O", "B-PER O O", (0, 0, 0)),
        ("B-PER I-LOC O", "B-PER I-LOC O", (1, 1, 1)),  # a change of type ends a span
    ],
)
def test_entity_scores(gold: str, predicted: str, scores: tuple[float, float, float]) -> None:
    found = entity_scores([gold.split()], [predicted.split()])
    assert tuple(found.values()) == pytest.approx(scores)


def test_entity_scores_count_over_all_sentences() -> None:
    """Micro: 2 right of 3 found and 4 sought, though the sentences' own ratios differ."""
    gold = ["B-PER O B-LOC", "B-ORG I-ORG O B-PER"]
    predicted = ["B-PER O B-ORG", "B-ORG I-ORG O O"]
    found = entity_scores([one.split() for one in gold], [one.split() for one in predicted])
    assert found == pytest.approx({"precision": 2 / 3, "recall": 1 / 2, "f1": 4 / 7})
    with pytest.raises(ValueError, match="same lengths"):
        entity_scores([["O"]], [["O", "O"]])


def test_entity_scores_of_random_sequences_are_those_of_conlleval() -> None:
    rng, alphabet = random.Random(0), ("O", "O", "B-PER", "I-PER", "B-LOC", "I-LOC")
    draw = [[tuple(rng.choices(alphabet, k=8)) for _ in range(200)] for _ in range(2)]
    gold, predicted = [[conlleval(one) for one in side] for side in draw]
    correct = sum(len(a & b) for a, b in zip(gold, predicted, strict=True))
    found = entity_scores(*draw)
    assert found["precision"] == correct / sum(map(len, predicted))
    assert found["recall"] == correct / sum(map(len, gold))
    harmonic = 2 / (1 / found["precision"] + 1 / found["recall"])
    assert found["f1"] == pytest.approx(harmonic)
