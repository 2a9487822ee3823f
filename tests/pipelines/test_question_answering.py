"""Answers: each draw's softmax over all spans of all windows, averaged, against a loop over the spans."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from bayeformers import fixed_draw, pipeline, to_bayesian
from tests.pipelines.tiny import TEXTS, bert, tokenizer

QUESTION, LONG = "the cat", " ".join(TEXTS * 2)


def reader() -> Any:
    return to_bayesian(bert("QuestionAnswering", ["start", "end"]), delta=0.5)


def pipe_of(model: Any, **options: Any) -> Any:
    return pipeline("question-answering", model=model, tokenizer=tokenizer(), num_samples=4, device="cpu", **options)


def scores(model: Any, windows: list[dict[str, Tensor]], offsets: list[Any], texts: list[list[int]], most: int) -> Any:
    """Per draw: (first character, last character) -> the best window's start + end logit, and the class token's."""
    found = []
    for index in range(4):
        spans: dict[tuple[int, int], float] = {}
        null = math.inf
        for window, places, tokens in zip(windows, offsets, texts, strict=True):
            with torch.no_grad(), fixed_draw(model, index):
                output = model(**window)
            start, end = output.start_logits[0].double(), output.end_logits[0].double()
            null = min(null, float(start[0] + end[0]))
            for i in tokens:
                for j in range(i, min(i + most, tokens[-1] + 1)):
                    key = (places[i][0], places[j][1])
                    spans[key] = max(spans.get(key, -math.inf), float(start[i] + end[j]))
        found.append((spans, null))
    return found


def by_hand(
    model: Any, context: str, most: int, with_null: bool, **windowed: Any
) -> tuple[dict[Any, float], float, float]:
    """Averaged probabilities of the spans, total and aleatoric uncertainty."""
    encoded = tokenizer()(
        QUESTION,
        context,
        truncation="only_second",
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        **windowed,
    )
    names = ("input_ids", "token_type_ids", "attention_mask")
    windows = [{name: torch.tensor([encoded[name][w]]) for name in names} for w in range(len(encoded["input_ids"]))]
    texts = [[t for t, part in enumerate(encoded.sequence_ids(w)) if part == 1] for w in range(len(windows))]
    mean: dict[Any, float] = {}
    aleatoric = 0.0
    for spans, null in scores(model, windows, encoded["offset_mapping"], texts, most):
        outcomes: dict[Any, float] = {**spans, **({None: null} if with_null else {})}
        normaliser = torch.tensor(list(outcomes.values()), dtype=torch.float64).logsumexp(0).item()
        for key, value in outcomes.items():
            p = math.exp(value - normaliser)
            mean[key] = mean.get(key, 0) + p / 4
            aleatoric -= p * math.log(p) / 4
    return mean, -sum(p * math.log(p) for p in mean.values()), aleatoric


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("with_null", [False, True])
@pytest.mark.parametrize(("context", "windowed"), [(TEXTS[2], {}), (LONG, {"max_length": 14, "stride": 4})])
def test_answers(context: str, windowed: dict[str, int], with_null: bool, batch_size: int) -> None:
    model = reader()
    mean, total, aleatoric = by_hand(model, context, 3, with_null, **({"max_length": 32} | windowed))
    lengths = {"max_seq_len": windowed["max_length"], "doc_stride": windowed["stride"]} if windowed else {}
    found = pipe_of(model)(
        [{"question": QUESTION, "context": context}, {"question": "john", "context": TEXTS[1]}],
        top_k=4, max_answer_len=3, handle_impossible_answer=with_null, batch_size=batch_size, **lengths,
    )[0]  # fmt: skip
    best = sorted(mean.values(), reverse=True)[:4]
    assert [answer["score"] for answer in found] == pytest.approx(best, abs=1e-6)
    for answer in found:
        key = None if answer["answer"] == "" else (answer["start"], answer["end"])
        assert answer["score"] == pytest.approx(mean[key], abs=1e-6)
        assert answer["answer"] == context[answer["start"] : answer["end"]]
        expected = {"total": total, "aleatoric": aleatoric, "epistemic": total - aleatoric}
        assert answer["uncertainty"] == pytest.approx(expected, abs=1e-5)
        assert answer["uncertainty"]["epistemic"] > 1e-4


def test_the_forms_of_a_question() -> None:
    pipe = pipe_of(reader())
    one = pipe({"question": QUESTION, "context": TEXTS[2]})
    assert set(one) == {"answer", "start", "end", "score", "uncertainty"}
    assert pipe(question=QUESTION, context=TEXTS[2]) == one
    assert pipe(question=[QUESTION, "john"], context=TEXTS[2])[0] == one
    assert list(pipe(each for each in [{"question": QUESTION, "context": TEXTS[2]}])) == [one]
    assert pipe.task == "question-answering"


def test_rows_of_a_dataset_are_asked_one_by_one() -> None:
    from datasets import Dataset

    rows = [{"question": "cat", "context": "bad dog"}, {"question": "dog", "context": "the cat ran"}]
    ask = pipeline("question-answering", bert("QuestionAnswering", labels=["a", "b"]), tokenizer=tokenizer())
    assert list(ask(Dataset.from_list(rows))) == [ask(row) for row in rows]


def test_a_slow_tokenizer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = tokenizer()
    monkeypatch.setattr(type(slow), "is_fast", False)
    with pytest.raises(ValueError, match="`tokenizer` .* must be a fast one"):
        pipeline("question-answering", bert("QuestionAnswering", labels=["a", "b"]), tokenizer=slow)
