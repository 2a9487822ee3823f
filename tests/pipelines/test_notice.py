"""transformers' own pipelines over a Bayesian model: the posterior mean, in `train()` too, and a line that says so."""

from __future__ import annotations

import copy
import inspect
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn
from transformers.pipelines.base import Pipeline

from bayeformers import fixed_draw, from_pretrained, posterior_mean, to_bayesian
from bayeformers.laplace import fit
from bayeformers.pipelines import notice
from tests.training.trainers import WORDS, llama, tokenizer

TEXT = "w1 w2 w3 w4"


def bert(dropout: float = 0.3) -> Any:
    """A classifier with random weights and dropout, the same at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = hf.BertConfig(
            vocab_size=WORDS, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
            hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout, initializer_range=0.3,
        )  # fmt: skip
        return hf.BertForSequenceClassification(config).eval()


def classifier(model: Any) -> Any:
    return hf.pipeline("text-classification", model=model, tokenizer=tokenizer(), top_k=None, device="cpu")


def writer(model: Any) -> Any:
    return hf.pipeline(
        "text-generation", model=model, tokenizer=tokenizer(), max_new_tokens=5, do_sample=False, device="cpu"
    )


Building = Callable[[], Any]
KINDS: dict[str, tuple[Building, Callable[[Any], Any]]] = {"bert": (bert, classifier), "llama": (llama, writer)}


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
    """What the package has said since it was last asked."""

    def messages() -> list[str]:
        found = [record.getMessage() for record in caplog.records if record.name.startswith("bayeformers")]
        caplog.clear()
        return found

    with caplog.at_level(logging.WARNING):
        yield messages


@pytest.mark.parametrize("kind", KINDS)
def test_the_mean_in_eval_is_told_once_per_model(kind: str, said: Callable[[], list[str]]) -> None:
    build, pipeline = KINDS[kind]
    expected = pipeline(build())(TEXT)
    assert not said()
    model = to_bayesian(build(), delta=0.5).eval()
    pipe = pipeline(model)
    (message,) = said()
    assert all(word in message for word in ("posterior mean", type(model).__name__, "bayeformers.pipeline("))
    assert pipe(TEXT) == expected and pipeline(model)(TEXT) == expected
    assert not said()
    pipeline(copy.deepcopy(model))
    assert len(said()) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_the_mean_in_train_too(kind: str, said: Callable[[], list[str]]) -> None:
    """Five calls, one batch, one line; the model stays in `train()` and no random number is taken."""
    build, pipeline = KINDS[kind]
    expected = pipeline(build())(TEXT)
    model = to_bayesian(build(), delta=0.5, keep_dropout=True).train()
    pipe = pipeline(model)
    said()
    state = torch.get_rng_state()
    assert [pipe(TEXT) for _ in range(5)] == [expected] * 5
    (message,) = said()
    assert "train()" in message and "eval()" in message and "random" in message
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)
    assert pipe.model is model
    model.eval()
    assert pipe(TEXT) == expected and not said()


@pytest.mark.parametrize("kind", KINDS)
def test_a_held_draw_is_the_one(kind: str, said: Callable[[], list[str]]) -> None:
    build, pipeline = KINDS[kind]
    model = to_bayesian(build(), delta=0.5)
    pipe = pipeline(model.eval())
    said()
    with fixed_draw(model, 3):
        expected = pipe(TEXT)
        assert pipe(TEXT) == expected
        model.train()
        assert pipe(TEXT) == expected
    with posterior_mean(model):
        assert pipe(TEXT) == pipeline(build())(TEXT)
    assert not said()


def test_a_stream_of_a_dataset_is_the_mean_when_it_runs() -> None:
    """The mode counts when a batch runs, which is after the call has returned."""
    texts = [f"w{i} w{i + 1}" for i in range(5)]
    expected = list(classifier(bert())((text for text in texts), batch_size=2))
    model = to_bayesian(bert(), delta=0.5).eval()
    stream = classifier(model)((text for text in texts), batch_size=2)
    model.train()
    assert list(stream) == expected


def test_threads_over_a_model_in_train() -> None:
    model = to_bayesian(bert(), delta=0.5).train()
    pipe, expected, modes = classifier(model), classifier(bert())(TEXT), set[bool]()
    found: list[Any] = []

    def run() -> None:
        for _ in range(5):
            found.append(pipe(TEXT))
            modes.add(model.training)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 20 and modes == {True}


def test_a_model_without_a_view_is_used_itself_and_put_back() -> None:
    """A hook that holds on to the model allows no private view."""
    model = to_bayesian(bert(), delta=0.5).train()
    model.register_forward_hook(lambda module, args, output, held=model: None)
    model.dropout.eval()
    modes = [module.training for module in model.modules()]
    assert classifier(model)(TEXT) == classifier(bert())(TEXT)
    assert [module.training for module in model.modules()] == modes


def test_other_models_are_left_alone(said: Callable[[], list[str]]) -> None:
    """In `train()` their dropout is drawn, as transformers has it: the same numbers from the same seed."""
    model = bert().train()
    pipe = classifier(model)
    torch.manual_seed(3)
    found = pipe(TEXT)[0]  # not a list: its loader would take a random number
    torch.manual_seed(3)
    inputs = tokenizer()(TEXT, return_tensors="pt")
    with torch.no_grad():
        probabilities = model(**inputs).logits.softmax(-1)[0].tolist()
    assert sorted(score["score"] for score in found) == pytest.approx(sorted(probabilities), abs=1e-6)
    assert not said()


def test_wrapping_is_idempotent_and_keeps_signatures() -> None:
    own = Pipeline.__init__, Pipeline.forward
    notice.wrap_pipelines()
    assert (Pipeline.__init__, Pipeline.forward) == own
    assert list(inspect.signature(Pipeline.forward).parameters) == ["self", "model_inputs", "forward_params"]
    assert "tokenizer" in inspect.signature(Pipeline.__init__).parameters


def test_a_posterior_beside_the_model(tmp_path: Path, said: Callable[[], list[str]]) -> None:
    """Of a fit: told at a pipeline over the model, in `train()`, and over its folder as transformers reads it."""
    model = bert()
    expected = classifier(model)(TEXT)
    batch = {**tokenizer()([TEXT, "w3 w9"], return_tensors="pt", padding=True), "labels": torch.tensor([0, 1])}
    model.posterior = fit(model, [batch], target_modules=["classifier"], progress=False)
    said()
    pipe = classifier(model)
    (message,) = said()
    assert "without its `posterior`" in message and "bayeformers.pipeline(" in message
    model.train()
    assert [pipe(TEXT) for _ in range(3)] == [expected] * 3 and len(said()) == 1
    model.save_pretrained(tmp_path)
    model = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert classifier(model)(TEXT) == expected
    (message,) = said()
    assert str(tmp_path) in message and "from_pretrained" in message
    classifier(from_pretrained(tmp_path))
    (message,) = said()
    assert "without its `posterior`" in message


def test_a_folder_that_transformers_reads(tmp_path: Path, said: Callable[[], list[str]]) -> None:
    """Its pipeline shows the mean: one line names the folder and our loader."""
    model = to_bayesian(bert(), delta=0.5).eval()
    model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    said()
    pipe = hf.pipeline("text-classification", model=str(tmp_path), top_k=None, device="cpu")
    (message,) = said()
    assert all(word in message for word in (str(tmp_path), "bayeformers.pipeline(", "bayeformers.from_pretrained("))
    assert pipe(TEXT) == classifier(bert())(TEXT)
    assert not said()


def test_hand_built_layers_are_bayesian_too(said: Callable[[], list[str]]) -> None:
    """Without a record: a plain model with one Bayesian layer."""
    model = bert(0.0)
    model.classifier = to_bayesian(nn.Sequential(model.classifier), delta=0.5)[0]
    pipe = classifier(model.train())
    assert len(said()) == 1
    assert pipe(TEXT) == pipe(TEXT) and len(said()) == 1
