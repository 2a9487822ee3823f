"""One pipeline asked by several threads gives the answers of one thread, bit for bit."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from bayeformers import pipeline, to_bayesian
from tests.pipelines.test_classification import fitted
from tests.pipelines.tiny import TEXTS, bert, tokenizer

ASKED = [*TEXTS, "the dog ran on a mat in berlin ."]


@pytest.fixture(autouse=True)
def _switch_often() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def make(name: str) -> Any:
    options: dict[str, Any] = {"tokenizer": tokenizer(), "device": "cpu", "num_samples": 3}
    if name == "linearised":
        return pipeline("text-classification", posterior=fitted(subset="last_layer"), **options)
    if name == "entities":
        model = to_bayesian(bert("TokenClassification"), delta=0.3)
        return pipeline("ner", model=model, aggregation_strategy="first", ignore_labels=[], **options)
    if name == "zero-shot":
        model = to_bayesian(bert(labels=["contradiction", "neutral", "entailment"]), delta=0.3)
        return pipeline("zero-shot-classification", model=model, candidate_labels=["cat", "dog"], **options)
    return pipeline("text-classification", model=to_bayesian(bert(), delta=0.3), **options)


@pytest.mark.parametrize("threads", [*(pytest.param(few, marks=pytest.mark.slow) for few in (1, 2)), 4])
@pytest.mark.parametrize("name", ["draws", "linearised", "entities", "zero-shot"])
def test_threads(name: str, threads: int) -> None:
    """Single texts, padded batches and truncated ones, at once: a fast tokenizer holds its truncation and padding."""
    pipe = make(name)
    cut: dict[str, Any] = {"truncation": True, "max_length": 4} if name in ("draws", "linearised") else {}
    jobs = [
        *[lambda text=text: pipe(text) for text in ASKED[:3]],
        lambda: pipe(ASKED, batch_size=2),
        lambda: pipe(ASKED[:2], batch_size=2, **cut),
    ]
    expected = [job() for job in jobs]
    found: list[list[Any]] = [[] for _ in range(threads)]
    errors: list[BaseException] = []

    def run(number: int) -> None:
        try:
            for index in range(len(jobs)):
                found[number].append(((index + number) % len(jobs), jobs[(index + number) % len(jobs)]()))
        except BaseException as error:
            errors.append(error)

    running = [threading.Thread(target=run, args=(number,)) for number in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    assert not errors
    for answers in found:
        assert len(answers) == len(jobs)
        for index, answer in answers:
            assert answer == expected[index]
