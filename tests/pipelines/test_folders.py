"""A pipeline from a folder's name alone: the answers of the model that was saved, whatever posterior it has."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from bayeformers import laplace, pipeline, to_bayesian
from bayeformers.posteriors import EnsemblePosterior, PointPosterior, TemperaturePosterior
from tests.pipelines.test_classification import adapted, batch, fitted, members
from tests.pipelines.tiny import TEXTS, bert, tokenizer

ROWS = [{**batch(), "labels": torch.tensor([0, 1, 2, 0])}]


def with_posterior(posterior: Any) -> Any:
    posterior.model.posterior = posterior
    return posterior.model


SAVED: dict[str, Callable[[], Any]] = {
    "converted": lambda: to_bayesian(bert(), delta=0.3),
    "laplace": lambda: with_posterior(fitted(subset="last_layer")),
    "ensemble": lambda: with_posterior(members()),
    "temperature": lambda: with_posterior(TemperaturePosterior.fit(fitted(subset="last_layer"), ROWS)),
    "adapter": adapted,
}


@pytest.mark.parametrize("name", SAVED)
def test_a_folder_answers_as_the_model_did(name: str, tmp_path: Path) -> None:
    model = SAVED[name]()
    if name == "adapter":
        base = bert()
        base.save_pretrained(tmp_path / "base")
        model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "saved")
    tokenizer().save_pretrained(tmp_path / "saved")
    options: dict[str, Any] = {"num_samples": 3, "device": "cpu", "top_k": None}
    expected = pipeline("text-classification", model=model, tokenizer=tokenizer(), **options)(TEXTS, batch_size=2)
    found = pipeline("text-classification", str(tmp_path / "saved"), **options)
    for entries, wanted in zip(found(TEXTS, batch_size=2), expected, strict=True):
        for entry, other in zip(entries, wanted, strict=True):
            assert entry["label"] == other["label"]
            assert entry["score"] == pytest.approx(other["score"], abs=1e-6)
            assert entry["uncertainty"] == pytest.approx(other["uncertainty"], abs=1e-6)
            assert entry["uncertainty"]["epistemic"] > 0
    found.save_pretrained(tmp_path / "again")
    again = pipeline("text-classification", tmp_path / "again", **options)
    assert again(TEXTS[0]) == found(TEXTS[0])


def test_the_tokenizer_of_an_adapter_may_lie_with_its_base(tmp_path: Path) -> None:
    model = adapted()
    bert().save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "saved")
    assert (
        pipeline("text-classification", tmp_path / "saved", device="cpu")(TEXTS[0])[0]["uncertainty"]["epistemic"] > 0
    )


def test_a_posterior_beside_a_model_that_has_none_is_saved_with_the_pipeline(tmp_path: Path) -> None:
    posterior = fitted(subset="last_layer")
    pipe = pipeline("text-classification", posterior=posterior, tokenizer=tokenizer(), device="cpu")
    pipe.save_pretrained(tmp_path)
    (found,), (expected,) = pipeline("text-classification", tmp_path, device="cpu")(TEXTS[0]), pipe(TEXTS[0])
    assert found["uncertainty"] == pytest.approx(expected["uncertainty"], abs=1e-6)


def test_a_plain_folder_is_a_point_estimate_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bert().save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING, logger="bayeformers"):
        pipe = pipeline("text-classification", str(tmp_path), device="cpu")
    assert [record.message for record in caplog.records if "is not Bayesian" in record.message]
    plain = hf.pipeline("text-classification", str(tmp_path), device="cpu")
    assert isinstance(pipe.posterior, PointPosterior)
    for found, (expected,) in zip(pipe(TEXTS), [plain(text) for text in TEXTS], strict=True):
        assert found["score"] == pytest.approx(expected["score"], abs=1e-6) and found["label"] == expected["label"]
        assert found["uncertainty"]["epistemic"] == 0


def test_a_damaged_folder_is_no_point_estimate(tmp_path: Path) -> None:
    """Only a folder without a posterior is; one whose posterior is damaged is an error."""
    with_posterior(fitted(subset="last_layer")).save_pretrained(tmp_path / "a")
    tokenizer().save_pretrained(tmp_path / "a")
    other = bert()
    with torch.no_grad():
        other.classifier.weight.add_(1)
    other.save_pretrained(tmp_path / "b")
    shutil.copy(tmp_path / "b" / "model.safetensors", tmp_path / "a" / "model.safetensors")
    with pytest.raises(ValueError, match="fitted|weights"):
        pipeline("text-classification", str(tmp_path / "a"), device="cpu")


def test_dtype_and_model_arguments_reach_the_loader(tmp_path: Path) -> None:
    to_bayesian(bert(), delta=0.3).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    pipe = pipeline("text-classification", tmp_path, device="cpu", dtype=torch.bfloat16)
    assert pipe.model.dtype is torch.bfloat16 and pipe(TEXTS[0])[0]["uncertainty"]["epistemic"] > 0
    named = pipeline("text-classification", tmp_path, device="cpu", model_kwargs={"id2label": {0: "x", 1: "y", 2: "z"}})
    assert named(TEXTS[0])[0]["label"] in "xyz"


def test_a_model_with_a_posterior_is_asked_through_it() -> None:
    model = bert()
    model.posterior = laplace.fit(model, ROWS, subset="last_layer", progress=False)
    pipe = pipeline("text-classification", model=model, tokenizer=tokenizer(), device="cpu")
    assert pipe.posterior is model.posterior
    members_of = EnsemblePosterior(bert(), [bert(), bert()])
    assert (
        pipeline("text-classification", model=members_of, tokenizer=tokenizer(), device="cpu").model is members_of.model
    )
