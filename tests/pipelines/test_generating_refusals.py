"""Pipelines that write: policies over texts, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from bayeformers import AbstentionPolicy, fit_abstention
from bayeformers.generation import SEQUENCE_SCORES
from tests.cases import case
from tests.pipelines.writers import TEXTS, drawn, t5, writer
from tests.training.trainers import llama

# -- refusal ---------------------------------------------------------------------------------------------------------


def by(score: str, threshold: float = 0.5, groups: dict[str | int, float] | None = None) -> AbstentionPolicy:
    """A policy that refuses texts whose score is below a threshold."""
    return AbstentionPolicy(
        score=score, threshold=threshold, max_risk=0.1, confidence=0.9, num_examples=100, coverage=0.5, feasible=True,
        model_risk=0.2, groups=groups, group_by=None if groups is None else "language",
    )  # fmt: skip


@pytest.mark.parametrize("score", SEQUENCE_SCORES)
def test_a_policy_refuses_by_the_named_score(score: str) -> None:
    """Recomputed from what each result says of itself; the threshold lies between the texts' scores."""
    pipe = writer(drawn(), mixing="draws")
    records = [record for one in pipe(TEXTS) for record in one]
    scores = {
        "sequence_probability": [math.exp(record["sequence_score"]) for record in records],
        "mean_mutual_information": [-record["uncertainty"]["epistemic"] for record in records],
        "agreement": [record["agreement"] for record in records],
    }[score]
    threshold = (max(scores) + min(scores)) / 2 if score != "agreement" else max(scores) + 0.1
    policy = by(score, threshold)
    refused = [record["abstain"] for one in writer(drawn(), mixing="draws", abstention=policy)(TEXTS) for record in one]
    assert refused == [value < threshold for value in scores] and any(refused)


def test_a_fitted_policy_from_results_to_refusals() -> None:
    """Calibrated on what the pipeline said of other texts, it refuses exactly what lies below its threshold."""
    pipe = writer(drawn(), max_new_tokens=1)
    texts = [f"w{i} w{j}" for i in range(10) for j in range(12)]
    answers = [one[0] for one in pipe(texts, batch_size=60)]
    scores = torch.tensor([math.exp(answer["sequence_score"]) for answer in answers], dtype=torch.float64)
    wrong = (scores < scores.quantile(0.5)).double()
    policy = fit_abstention(scores[:60], errors=wrong[:60], score="sequence_probability", max_risk=0.2)
    assert policy.feasible and scores.min() < policy.threshold <= scores.max()
    refusing = writer(drawn(), max_new_tokens=1, abstention=policy)
    refused = [one[0]["abstain"] for one in refusing(texts[60:], batch_size=60)]
    assert refused == (scores[60:] < policy.threshold).tolist() and set(refused) == {True, False}


# -- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("make", "error", "words"), [
    (lambda: writer(llama(), mixing="mean"), ValueError, "`mixing` must be one of"),
    (lambda: writer(llama())("w1", mixing="both"), ValueError, "`mixing` must be one of"),
    (lambda: writer(llama(), method="glm"), ValueError, "`method` of a pipeline that writes"),
    (lambda: writer(llama())("w1", method="probit"), ValueError, "`method` of a pipeline that writes"),
    (lambda: writer(llama(), token_uncertainty="yes"), TypeError, "`token_uncertainty` must be True or False"),
    (lambda: writer(llama(), assistant_model=llama()), ValueError, "`assistant_model` cannot be given"),
    (lambda: writer(llama())([]), ValueError, "at least one input"),
    (lambda: writer(llama())("w1", num_samples=0), ValueError, "`num_samples`"),
    (lambda: writer(llama())("w1", output_scores=True), ValueError, "`output_scores` cannot be given"),
    (lambda: writer(t5(), "text-generation"), ValueError, "must have that task's head"),
    (lambda: writer(llama(), "text2text-generation"), ValueError, "must have that task's head"),
    (lambda: writer(t5(), "text2text-generation")([["w1"]]), TypeError, "must be a text"),
    (lambda: writer(llama(), abstention=by("confidence")), ValueError, "must go by one of"),
    (lambda: writer(llama(), abstention=by("agreement", groups={"en": 0.1})), ValueError, "without groups"),
    (lambda: writer(llama(), abstention=by("agreement"))("w1"), ValueError,
     "cannot be 'agreement' of one answer"),
    (lambda: writer(llama(), "summarization"), ValueError, "`task` must be one of"),
])  # fmt: skip
def test_bad_input(make: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()


def test_a_model_with_a_generate_of_its_own_is_refused() -> None:
    with pytest.raises(ValueError, match="head|generate"):
        writer(case("whisper").build(), "text2text-generation")
