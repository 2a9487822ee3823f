"""DoRA: draws have their own norms, or are refused; what is linearised holds the norm, and says so."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import nn

from bayeformers import VariationalPosterior, fixed_draw, laplace, posterior_mean, predict, to_bayesian
from bayeformers.adapters import fit_tfb, lora_pairs
from tests.adapters.lora import bert, inputs, labels


def converted() -> nn.Module:
    model: nn.Module = to_bayesian(bert(use_dora=True)).eval()
    return model


def laplace_of(model: nn.Module) -> Any:
    return laplace.fit(model, [({**inputs(), "labels": labels()})], prior_precision=1.0, progress=False)


HOLDS: dict[str, Callable[[nn.Module], AbstractContextManager[Any]]] = {
    "a draw of a converted model": lambda model: fixed_draw(model, 1),
    "its mean": posterior_mean,
    "a draw of its posterior": lambda model: VariationalPosterior(model).draw(1),
}


@pytest.mark.parametrize("held", HOLDS)
def test_cached_norms_are_refused(held: str) -> None:
    """peft 0.21 keeps the first draw's norm in every other one under `DoraCaching`: 23 % of a draw's spread here."""
    helpers, model = pytest.importorskip("peft.helpers"), converted()
    with helpers.DoraCaching(), pytest.raises(RuntimeError, match="DoraCaching"), HOLDS[held](model):
        pass
    with HOLDS[held](model):
        model(**inputs())


def test_cached_norms_are_refused_to_other_posteriors() -> None:
    helpers, model = pytest.importorskip("peft.helpers"), bert(use_dora=True)
    posterior = laplace_of(model)
    with helpers.DoraCaching():
        for method in ("sample", "glm"):
            with pytest.raises(RuntimeError, match="DoraCaching"):
                posterior.predict(inputs(), method=method, num_samples=2)
        plain = to_bayesian(bert())
        predict(plain, inputs(), num_samples=2)  # no DoRA: nothing is cached


def test_a_linearised_prediction_tells_that_it_holds_the_norm(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="bayeformers"):
        laplace_of(bert(use_dora=True)).predict(inputs())
    assert "DoRA" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="bayeformers"):
        laplace_of(bert()).predict(inputs())
        last = {"prior_precision": 1.0, "progress": False, "subset": "last_layer"}
        laplace.fit(bert(use_dora=True), [{**inputs(), "labels": labels()}], **last).predict(inputs())
    assert "DoRA" not in caplog.text


def test_matrices_that_are_left_out_are_named(caplog: pytest.LogCaptureFixture) -> None:
    """LoRA of an embedding beside those of linear layers: a posterior of the latter is not one of all."""
    model = bert()
    with caplog.at_level(logging.WARNING, logger="bayeformers"):
        count = len(lora_pairs(model))
    assert not caplog.text
    peft = pytest.importorskip("peft")
    base = model.unload()  # type: ignore[operator]
    names = ["query", "value", "word_embeddings"]
    mixed = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=names, init_lora_weights=False)).double()
    with caplog.at_level(logging.WARNING, logger="bayeformers"):
        posterior = fit_tfb(mixed, inputs(), labels(), progress=False, num_samples=2, bounds=(1e-3, 1e-2))
        assert len(lora_pairs(mixed)) == count
    assert "word_embeddings" in caplog.text and "deterministic" in caplog.text
    with posterior.draw(1), torch.no_grad():
        mixed(**inputs())
