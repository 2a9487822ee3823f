"""Bad input: one clear error, before anything runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bayeformers import laplace, pipeline, to_bayesian
from bayeformers.guarantees import attach_policy
from bayeformers.posteriors import PointPosterior, TemperaturePosterior
from tests.pipelines.test_classification import batch
from tests.pipelines.tiny import TEXTS, bert, policy, tokenizer

ROWS = [{**batch(), "labels": torch.tensor([0, 1, 2, 0])}]


def made(task: str = "text-classification", **options: Any) -> Any:
    defaults = {"model": None if "posterior" in options else bert(), "tokenizer": tokenizer(), "device": "cpu"}
    return pipeline(task, **(defaults | options))


def calibrated() -> Any:
    return TemperaturePosterior(PointPosterior(bert("QuestionAnswering", ["a", "b"])), "scalar", weight=0.5)


MAKING: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "unknown task": (lambda: made("classify"), ValueError, r"`task` must be one of .*got 'classify'"),
    "task of no name": (lambda: made(None), ValueError, r"`task` must be one of .*got None"),  # type: ignore
    "a task without our pipeline": (lambda: made("object-detection"), ValueError, "`task` must be one of"),
    "nothing to ask": (lambda: pipeline("text-classification"), ValueError, "`model` must be a folder"),
    "a model of no kind": (lambda: made(model=3), TypeError, "must be a torch.nn.Module or a Posterior"),
    "a head of another task": (
        lambda: made("token-classification"), ValueError, "that task's head, got BertForSequenceClassification"
    ),
    "a body without a head": (lambda: made(model=bert().bert), ValueError, "that task's head, got BertModel"),
    "answers without their head": (lambda: made("question-answering"), ValueError, "must have that task's head"),
    "masks without their head": (lambda: made("fill-mask"), ValueError, "must have that task's head"),
    "a posterior of another model": (
        lambda: made(model=bert(), posterior=PointPosterior(bert())), ValueError, "`posterior` must be of the pipe"
    ),
    "a model as the posterior": (lambda: made(posterior=bert()), TypeError, "`posterior` must be a Posterior"),
    "a model's posterior that is another's": (
        lambda: made(model=with_posterior_of_another()), ValueError, "of another model"
    ),
    "no draws": (lambda: made(num_samples=0), ValueError, r"`num_samples`.*got 0"),
    "draws that are no number": (lambda: made(num_samples=2.5), (TypeError, ValueError), r"`num_samples`.*got 2\.5"),
    "a seed below zero": (lambda: made(seed=-1), ValueError, r"`seed`.*got -1"),
    "a method that is none": (lambda: made(method="laplace"), ValueError, r"`method` must be one of .*'laplace'"),
    "a policy that is none": (lambda: made(abstention=0.5), TypeError, "`abstention` must be an AbstentionPolicy"),
    "a policy of other draws": (
        lambda: made(model=converted(), abstention=fitted_to("VariationalPosterior"), num_samples=4), ValueError,
        "calibrated on averages of 16 draws, and these are of 4",
    ),
    "a policy of another method": (
        lambda: made(posterior=laplace_of(bert()), abstention=fitted_to("LaplacePosterior", method="glm"), method="nn"),
        ValueError, "calibrated on predictions by 'glm', and these are by 'nn'",
    ),
    "a policy of another posterior": (
        lambda: made(abstention=fitted_to("LaplacePosterior")), ValueError,
        "calibrated on predictions of a LaplacePosterior, and these are of a PointPosterior",
    ),
    "a policy with groups": (
        lambda: made(abstention=policy(groups={"a": 0.5}, group_by="author")), ValueError, "a threshold for each author"
    ),
    "a policy of a head's labels for other labels": (
        lambda: made("zero-shot-classification", abstention=fitted_to("PointPosterior")), ValueError,
        "scores are of the candidate labels",
    ),
    "calibrated answers": (
        lambda: made("question-answering", posterior=calibrated()), ValueError, "`posterior` of question-answering"
    ),
    "a function that is none": (lambda: made(function_to_apply="max"), ValueError, "`function_to_apply` must be one"),
}  # fmt: skip


def converted() -> Any:
    return to_bayesian(bert(), delta=0.3)


def laplace_of(model: Any) -> Any:
    return laplace.fit(model, ROWS, subset="last_layer", progress=False)


def fitted_to(posterior: str, **fields: Any) -> Any:
    return policy(**{"posterior": posterior, "num_samples": 16, "method": "sample", **fields})


def with_posterior_of_another() -> Any:
    model = bert()
    model.posterior = laplace_of(bert())
    return model


@pytest.mark.parametrize("name", MAKING)
def test_when_it_is_made(name: str) -> None:
    make, kind, message = MAKING[name]
    with pytest.raises(kind, match=message):
        make()


def answers(**options: Any) -> Any:
    return made("question-answering", model=bert("QuestionAnswering", ["a", "b"]), **options)


CALLS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no input": (lambda: made()([]), ValueError, "`inputs` of 'text-classification' must hold an input"),
    "no draws": (lambda: made()(TEXTS[0], num_samples=0), ValueError, r"`num_samples`.*got 0"),
    "a method that is none": (lambda: made()(TEXTS[0], method="mean"), ValueError, "`method` must be one of"),
    "linearised without a Gaussian": (lambda: made()(TEXTS[0], method="glm"), ValueError, "needs a Gaussian posterior"),
    "other draws than the policy's": (
        lambda: made(model=converted(), abstention=fitted_to("VariationalPosterior"))(TEXTS[0], num_samples=2),
        ValueError, "calibrated on averages of 16 draws, and these are of 2",
    ),
    "a score that the head has not": (
        lambda: made(abstention=policy(score="predictive_std"))(TEXTS[0]), ValueError, "`score` of a .* must be one of"
    ),
    "a function that the policy does not know": (
        lambda: made(abstention=policy())(TEXTS[0], function_to_apply="sigmoid"), ValueError,
        "makes other scores than the head's own 'softmax'",
    ),
    "linearised masks": (
        lambda: made("fill-mask", model=bert("MaskedLM"))("[MASK]", method="glm"), ValueError, "`method` of 'fill-mask'"
    ),
    "a question alone": (lambda: answers()(question="the cat"), ValueError, "`question` and `context` must be given"),
    "an empty context": (
        lambda: answers()(question="the cat", context=" "), ValueError, "`context` must be a text that is not empty"
    ),
    "a question twice": (
        lambda: answers()({"question": "a", "context": "b"}, question="a"), ValueError, "`inputs` hold the question"
    ),
    "contexts of fewer questions": (
        lambda: answers()(question=["a", "b"], context=["a"]), ValueError, "one for each of 2 questions, got 1"
    ),
    "no answer": (lambda: answers()(question="a", context="b", top_k=0), ValueError, r"`top_k`.*got 0"),
    "an argument of another task": (lambda: answers()(question="a", context="b", topk=1), TypeError, "topk"),
    "a text that is none": (lambda: answers()("the cat"), ValueError, "`question` must be a text"),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_when_it_is_called(name: str) -> None:
    call, kind, message = CALLS[name]
    with pytest.raises(kind, match=message):
        call()


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises((OSError, ValueError)):
        pipeline("text-classification", str(tmp_path))


def test_false_sets_no_policy() -> None:
    model = converted()
    attach_policy(model, policy(num_samples=4))
    set_by_the_model = made(model=model)
    assert set_by_the_model.num_samples == 4 and "abstain" in set_by_the_model(TEXTS[0])[0]
    assert "abstain" not in made(model=model, abstention=False, num_samples=2)(TEXTS[0])[0]


def test_a_policy_of_other_weights_is_refused_when_given_and_when_weights_move() -> None:
    model = converted()
    one = policy(weights="other")
    with pytest.raises(ValueError, match="fitted to other weights"):
        made(model=model, abstention=one)
    attach_policy(model, policy())
    pipe = made(model=model)
    assert "abstain" in pipe(TEXTS[0])[0]
    with torch.no_grad():
        model.classifier.weight.add_(1)
    with pytest.raises(ValueError, match="fitted to other weights"):
        pipe(TEXTS[0])
