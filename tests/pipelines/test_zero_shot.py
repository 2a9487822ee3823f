"""Zero-shot labels: one draw of the network reads all hypotheses, and what is averaged is its softmax over labels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bayeformers import fixed_draw, laplace, pipeline, to_bayesian
from tests.pipelines.tiny import TEXTS, bert, policy, tokenizer

LABELS = ["cat", "dog", "mat"]
TEMPLATE = "the {} ran"
NLI = ["contradiction", "neutral", "entailment"]


def drawn(model: Any, text: str, labels: list[str], count: int) -> Tensor:
    """Logits (S, labels, C) in float64, of each pair by itself."""
    given, rows = tokenizer(), []
    for index in range(count):
        with torch.no_grad(), fixed_draw(model, index):
            pairs = [dict(given(text, TEMPLATE.format(label), return_tensors="pt")) for label in labels]
            rows.append(torch.cat([model(**pair).logits for pair in pairs]).double())
    return torch.stack(rows)


def entropy(probabilities: Tensor) -> Tensor:
    return -(probabilities * probabilities.log()).sum(-1)


def pipe_of(model: Any, **options: Any) -> Any:
    return pipeline(
        "zero-shot-classification", model=model, tokenizer=tokenizer(), device="cpu", num_samples=4,
        hypothesis_template=TEMPLATE, **options,
    )  # fmt: skip


@pytest.mark.parametrize(("batch_size", "names"), [(1, NLI), (4, ["entailment", "neutral", "contradiction"])])
def test_one_label(batch_size: int, names: list[str]) -> None:
    model = to_bayesian(bert(labels=names), delta=0.5)
    entailment = names.index("entailment")
    for text, found in zip(TEXTS, pipe_of(model)(TEXTS, LABELS, batch_size=batch_size), strict=True):
        draws = drawn(model, text, LABELS, 4)[..., entailment].softmax(-1)
        mean = draws.mean(0)
        assert found["labels"] == [LABELS[index] for index in mean.argsort(descending=True)]
        assert found["scores"] == pytest.approx(mean.sort(descending=True).values.tolist(), abs=1e-6)
        total, aleatoric = float(entropy(mean)), float(entropy(draws).mean())
        expected = {"total": total, "aleatoric": aleatoric, "epistemic": total - aleatoric}
        assert found["uncertainty"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("labels", [LABELS, ["cat"]])
def test_several_labels(labels: list[str]) -> None:
    """A single candidate is a question of yes or no as well."""
    model = to_bayesian(bert(labels=NLI), delta=0.5)
    found = pipe_of(model)(TEXTS[0], labels, multi_label=True)
    draws = drawn(model, TEXTS[0], labels, 4)[..., [0, 2]].softmax(-1)
    mean = draws.mean(0)
    total, aleatoric = entropy(mean), entropy(draws).mean(0)
    for place, label in enumerate(found["labels"]):
        at = labels.index(label)
        assert found["scores"][place] == pytest.approx(float(mean[at, 1]), abs=1e-6)
        assert found["uncertainty"]["total"][place] == pytest.approx(float(total[at]), abs=1e-6)
        assert found["uncertainty"]["epistemic"][place] == pytest.approx(float((total - aleatoric)[at]), abs=1e-6)
    assert sorted(found["labels"]) == sorted(labels)


def test_a_linearised_method_is_refused_and_not_the_default() -> None:
    model = bert(labels=NLI)
    inputs = dict(tokenizer()(TEXTS, return_tensors="pt", padding=True))
    posterior = laplace.fit(model, [{**inputs, "labels": torch.tensor([0, 1, 2, 0])}], progress=False)
    pipe = pipeline("zero-shot-classification", posterior=posterior, tokenizer=tokenizer(), device="cpu")
    assert pipe(TEXTS[0], LABELS)["uncertainty"]["epistemic"] > 0
    with pytest.raises(ValueError, match=r"`method` of zero-shot.*one draw must read"):
        pipe(TEXTS[0], LABELS, method="glm")


@pytest.mark.parametrize("threshold", [0.3, 0.9])
def test_a_policy_sees_the_prediction_over_labels(threshold: float) -> None:
    pipe = pipe_of(to_bayesian(bert(labels=NLI), delta=0.5), abstention=policy(threshold=threshold))
    found = pipe(TEXTS[0], LABELS)
    assert found["abstain"] == (found["scores"][0] < threshold) == (threshold == 0.9)
