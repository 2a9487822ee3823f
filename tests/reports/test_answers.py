"""What doubts about answers can tell, and which method is better, from answers made by hand."""

import numpy as np
import pytest

from bayeformers.metrics import error_auroc
from bayeformers.reports import AnswerComparison
from bayeformers.tasks import Answers, Question

SIZE = 40


def answers(entropy: np.ndarray, right: np.ndarray, *, epistemic: float = 0.0, no_answer: float = 0.0) -> Answers:
    same = np.full(SIZE, 1.0)
    return Answers(["t"] * SIZE, np.exp(-entropy), no_answer * same, entropy, entropy - epistemic, epistemic * same,
                   entropy + 0.1, right, right)  # fmt: skip


@pytest.fixture
def comparison() -> AnswerComparison:
    rng = np.random.default_rng(0)
    questions = [Question(str(i), "?", "t", ((0, "t"),) if i % 2 else (), "answerable") for i in range(SIZE)]
    found = AnswerComparison({"test": questions, "shifted": questions})
    right = np.arange(SIZE) % 4 > 0
    for name, noise in (("noisy", 3.0), ("exact", 0.01)):
        entropy = np.where(right, 0.5, 1.5) + noise * rng.random(SIZE)
        sets = {"test": answers(entropy, right * 1.0), "shifted": answers(entropy + 9, right * 1.0)}
        found.add(name, sets)
    return found


def test_doubts_tell_wrong_answers_and_shifted_questions(comparison: AnswerComparison) -> None:
    reports = comparison.reports()
    test = comparison.methods["noisy"]["test"]
    told = reports["noisy"]["detection"]["wrong answers, by span entropy"]
    assert told["auroc"] == pytest.approx(error_auroc(-test.total, 1 - test.exact_match))
    assert told["low"] <= told["auroc"] <= told["high"]
    assert reports["exact"]["detection"]["shifted questions, by span entropy"]["auroc"] == 1.0
    assert not any("unanswerable" in what or "mutual" in what for what in reports["exact"]["detection"])


def test_differences_are_the_last_methods_less_the_others(comparison: AnswerComparison) -> None:
    (pair, rows), *rest = comparison.differences().items()
    assert pair == "exact less noisy" and not rest
    nll = [comparison.methods[name]["test"].nll.mean() for name in ("exact", "noisy")]
    assert rows["nll"]["difference"] == pytest.approx(nll[0] - nll[1]) and rows["nll"]["high"] < 0
    assert rows["aurc"]["difference"] < 0 and rows["exact_match"]["difference"] == 0


def test_no_wrong_answer_leaves_nothing_to_tell() -> None:
    sets = {"test": [Question("q", "?", "t", ((0, "t"),), "answerable")] * SIZE}
    found = AnswerComparison(sets)
    found.add("right", {"test": answers(np.linspace(0.1, 1, SIZE), np.ones(SIZE))})
    assert found.reports()["right"]["detection"] == {} and "AUROC" not in found.tables(found.reports())
