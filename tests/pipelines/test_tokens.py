"""Entities and masked words: scores by hand, and uncertainties made of the tokens that made the score."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bayeformers import fixed_draw, laplace, pipeline, predict, to_bayesian
from bayeformers.guarantees import AbstentionPolicy
from tests.pipelines.tiny import SPECIAL, TEXTS, bert, policy, tokenizer

LABELS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
TEXT = "john smith sat in berlin"  # [CLS] john smi ##th sat in ber ##lin [SEP]
WORDS = [[1], [2, 3], [4], [5], [6, 7]]
PARTS = ("total", "aleatoric", "epistemic")


def tagger() -> Any:
    return to_bayesian(bert("TokenClassification", LABELS), delta=0.5)


def drawn(model: Any, inputs: dict[str, Tensor], count: int = 4) -> Tensor:
    """Probabilities (S, T, C) of one text in float64."""
    found = []
    for index in range(count):
        with torch.no_grad(), fixed_draw(model, index):
            found.append(model(**inputs).logits[0].double().softmax(-1))
    return torch.stack(found)


def by_hand(draws: Tensor) -> np.ndarray[Any, Any]:
    """(T, 3)."""
    mean = draws.mean(0)
    total = -(mean * mean.log()).sum(-1)
    aleatoric = -(draws * draws.log()).sum(-1).mean(0)
    return torch.stack([total, aleatoric, total - aleatoric], -1).numpy()


def words_of(strategy: str, mean: np.ndarray[Any, Any], doubt: np.ndarray[Any, Any]) -> list[tuple[str, Any, int, int]]:
    """(label, uncertainty, first token, last token) of each word."""
    found = []
    for tokens in [[t] for word in WORDS for t in word] if strategy == "simple" else WORDS:
        if strategy == "average":
            label, own = mean[tokens].mean(0).argmax(), doubt[tokens].mean(0)
        else:
            token = max(tokens, key=lambda t: mean[t].max()) if strategy == "max" else tokens[0]
            label, own = mean[token].argmax(), doubt[token]
        found.append((LABELS[label], own, tokens[0], tokens[-1]))
    return found


def grouped(words: list[tuple[str, Any, int, int]]) -> list[tuple[str, Any, int, int]]:
    """Adjacent words of one kind are an entity, unless the next begins one."""
    groups: list[list[tuple[str, Any, int, int]]] = []
    for word in words:
        kind, last = word[0].split("-")[-1], groups[-1][-1][0].split("-")[-1] if groups else None
        if kind == last and not word[0].startswith("B-"):
            groups[-1].append(word)
        else:
            groups.append([word])
    return [
        (group[0][0].split("-")[-1], np.mean([word[1] for word in group], axis=0), group[0][2], group[-1][3])
        for group in groups
    ]


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("strategy", ["simple", "first", "max", "average"])
def test_entities(strategy: str, batch_size: int) -> None:
    model, given = tagger(), tokenizer()
    pipe = pipeline(
        "token-classification", model=model, tokenizer=given, num_samples=4, device="cpu", ignore_labels=[],
        aggregation_strategy=strategy,
    )  # fmt: skip
    encoded = given(TEXT, return_tensors="pt", return_offsets_mapping=True)
    offsets = encoded.pop("offset_mapping")[0].tolist()
    draws = drawn(model, dict(encoded))
    expected = grouped(words_of(strategy, draws.mean(0).numpy(), by_hand(draws)))
    found = pipe([*TEXTS[:2], TEXT], batch_size=batch_size)[-1]
    assert [entity["entity_group"] for entity in found] == [label for label, *_ in expected]
    for entity, (_, uncertainty, first, last) in zip(found, expected, strict=True):
        assert (entity["start"], entity["end"]) == (offsets[first][0], offsets[last][1])
        assert [entity["uncertainty"][part] for part in PARTS] == pytest.approx(list(uncertainty), abs=1e-6)


def test_tokens_and_a_policy() -> None:
    """Of every token without a strategy; an entity is refused if any of its tokens is."""

    class Refuses(AbstentionPolicy):
        """The second token of each text."""

        def abstain(self, predictive: Any, groups: Any = None) -> Tensor:
            refused = torch.zeros(predictive.probs.shape[:-1], dtype=torch.bool)
            refused[:, 2] = True
            return refused

    model, given = tagger(), tokenizer()
    options: dict[str, Any] = {"tokenizer": given, "num_samples": 4, "device": "cpu", "ignore_labels": []}
    pipe = pipeline("ner", model=model, abstention=policy(Refuses), **options)
    draws = drawn(model, dict(given(TEXT, return_tensors="pt")))
    doubt, mean = by_hand(draws), draws.mean(0)
    for batch_size in (1, 2):
        found = pipe([TEXT, TEXTS[0]], batch_size=batch_size)[0]
        assert [token["index"] for token in found] == [1, 2, 3, 4, 5, 6, 7]
        for token in found:
            index = token["index"]
            assert token["score"] == pytest.approx(float(mean[index].max()), abs=1e-6)
            assert [token["uncertainty"][part] for part in PARTS] == pytest.approx(list(doubt[index]), abs=1e-6)
            assert token["abstain"] == (index == 2)
    words = pipe(TEXT, aggregation_strategy="first")
    refused = {entity["word"]: entity["abstain"] for entity in words}
    assert all(state == ("smith" in word) for word, state in refused.items())
    assert True in refused.values() and False in refused.values()


def test_a_text_of_several_windows() -> None:
    """Each window's entities have that window's uncertainties."""
    model, given = tagger(), tokenizer(max_length=8)
    text = " ".join(["john smith in berlin ran on the mat"] * 2)
    pipe = pipeline(
        "ner", model=model, tokenizer=given, num_samples=4, device="cpu", ignore_labels=[],
        aggregation_strategy="simple", stride=2,
    )  # fmt: skip
    alone, together = pipe(text), pipe([text, TEXTS[1]], batch_size=4)[0]
    assert len(alone) > 3 and [entity["word"] for entity in alone] == [entity["word"] for entity in together]
    for one, other in zip(alone, together, strict=True):
        assert one["uncertainty"] == pytest.approx(other["uncertainty"], abs=1e-6)


def test_a_linearised_tagger() -> None:
    """The default of a Laplace posterior, per token."""
    model, given = bert("TokenClassification", LABELS), tokenizer()
    inputs = dict(given(TEXT, return_tensors="pt"))
    labels = torch.tensor([[-100, 1, 1, 2, 0, 0, 3, 4, -100]])
    posterior = laplace.fit(model, [{**inputs, "labels": labels}], subset="last_layer", progress=False)
    predictive = predict(posterior, inputs)
    assert predictive.logit_mean is not None
    for found in pipeline("ner", posterior=posterior, tokenizer=given, device="cpu", ignore_labels=[])(TEXT):
        index = found["index"]
        assert found["score"] == pytest.approx(float(predictive.probs[0, index].max()), abs=1e-6)
        assert found["uncertainty"]["epistemic"] == pytest.approx(
            float(predictive.mutual_information[0, index]), abs=1e-6
        )


@pytest.mark.parametrize("batch_size", [1, 2])
def test_masked_words(batch_size: int) -> None:
    """One mask, two masks, and targets: over the whole vocabulary, of each draw and then averaged."""
    model, given = to_bayesian(bert("MaskedLM"), delta=0.5), tokenizer()
    pipe = pipeline("fill-mask", model=model, tokenizer=given, num_samples=4, device="cpu", top_k=3)
    texts = ["the [MASK] sat on a mat .", "the [MASK] sat [MASK] a mat", "john [MASK]"]
    found = pipe(texts, batch_size=batch_size)
    for text, results in zip(texts, found, strict=True):
        ids = given(text, return_tensors="pt")
        draws = drawn(model, dict(ids))
        doubt = by_hand(draws)
        masks = (ids["input_ids"][0] == SPECIAL.index("[MASK]")).nonzero().flatten().tolist()
        for mask, words in zip(masks, [results] if len(masks) == 1 else results, strict=True):
            assert [word["token"] for word in words] == draws.mean(0)[mask].topk(3).indices.tolist()
            for word in words:
                assert word["score"] == pytest.approx(float(draws.mean(0)[mask, word["token"]]), abs=1e-6)
                assert [word["uncertainty"][part] for part in PARTS] == pytest.approx(list(doubt[mask]), abs=2e-6)
    (word,) = pipe("john [MASK]", targets=["ran"])
    assert word["token_str"] == "ran" and word["uncertainty"] == found[2][0]["uncertainty"]


def test_a_laplace_posterior_fills_masks_by_draws() -> None:
    """Its default, linearised, is for no vocabulary."""
    model, given = bert("MaskedLM"), tokenizer()
    inputs = dict(given(TEXT, return_tensors="pt"))
    batches = [{**inputs, "labels": inputs["input_ids"]}]
    posterior = laplace.fit(model, batches, target_modules=["intermediate.dense"], progress=False)
    predictive = predict(posterior, dict(given("john [MASK]", return_tensors="pt")), method="sample", num_samples=4)
    pipe = pipeline("fill-mask", posterior=posterior, tokenizer=given, device="cpu", num_samples=4)
    for word in pipe("john [MASK]"):
        assert word["score"] == pytest.approx(float(predictive.probs[0, 2, word["token"]]), abs=1e-6)
