"""Posteriors that a folder, a Trainer or a model had before: none is taken for that of other weights."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import bayeformers
from bayeformers import to_bayesian
from bayeformers.posteriors import (
    BasePosterior,
    DropoutPosterior,
    PointPosterior,
    RunningMoments,
    SWAGPosterior,
    TemperaturePosterior,
)
from tests.training import tiny


def swag(model: Any, seed: int = 0) -> SWAGPosterior:
    generator, running = torch.Generator().manual_seed(seed), RunningMoments(rank=0)
    for _ in range(2):
        running.add({n: p + 0.1 * torch.randn(p.shape, generator=generator) for n, p in model.named_parameters()})
    return SWAGPosterior(model, running.moments())


KINDS: dict[str, Callable[[Any], BasePosterior]] = {
    "dropout": DropoutPosterior,
    "temperature": lambda model: TemperaturePosterior(PointPosterior(model), weight=2.0),
    "swag": swag,
}
"""Kinds whose file does not tell which weights it goes with."""


@pytest.mark.parametrize("name", KINDS)
def test_a_posterior_of_overwritten_weights_is_removed(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny.plain()
    model.posterior = KINDS[name](model)
    model.save_pretrained(tmp_path)
    del model.posterior
    model.save_pretrained(tmp_path)  # the same weights, to which it belongs
    assert (tmp_path / str(KINDS[name](model).file_name)).is_file()
    model.posterior = KINDS[name](model)
    model.save_pretrained(tmp_path)
    del model.posterior
    with torch.no_grad():
        model.classifier.weight.add_(1)
    with caplog.at_level(logging.WARNING):
        model.save_pretrained(tmp_path)
    assert "the posterior of weights that were overwritten" in caplog.text
    with pytest.raises(ValueError, match="holds no Bayesian model"):
        bayeformers.from_pretrained(tmp_path)


def test_a_posterior_that_was_saved_by_hand_stays(tmp_path: Path) -> None:
    model = tiny.plain()
    posterior = swag(model)
    posterior.save(tmp_path)
    model.save_pretrained(tmp_path)
    assert isinstance(bayeformers.from_pretrained(tmp_path).posterior, SWAGPosterior)


def test_a_trainers_posterior_replaces_that_which_the_model_brought(tmp_path: Path) -> None:
    model = tiny.plain()
    model.posterior = swag(model)
    model.save_pretrained(tmp_path / "a")
    loaded = bayeformers.from_pretrained(tmp_path / "a")
    trainer = tiny.trainer(tmp_path, loaded)
    trainer.posterior = TemperaturePosterior(loaded.posterior, weight=2.0)
    trainer.save_model(str(tmp_path / "b"))
    again = bayeformers.from_pretrained(tmp_path / "b").posterior
    assert isinstance(again, TemperaturePosterior) and isinstance(again.base, SWAGPosterior)
    assert loaded.posterior is trainer.posterior


def test_another_models_posterior_is_refused(tmp_path: Path) -> None:
    model, other = tiny.plain(), tiny.plain()
    trainer = tiny.trainer(tmp_path, model)
    with pytest.raises(ValueError, match=r"`posterior` is a SWAGPosterior of another model"):
        trainer.posterior = swag(other)
    model.posterior = swag(other)
    with pytest.raises(ValueError, match=r"`model.posterior` is a SWAGPosterior of another model"):
        bayeformers.predict(model, {"input_ids": torch.ones(1, 3, dtype=torch.long)})


def test_a_posterior_beside_converted_layers_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A calibration of the layers' own posterior is saved; another posterior of such a model is not."""
    model = to_bayesian(tiny.plain())
    model.posterior = TemperaturePosterior(PointPosterior(model), weight=2.0)
    with caplog.at_level(logging.WARNING):
        model.save_pretrained(tmp_path)
    assert "`model.posterior` (TemperaturePosterior) is not saved with the model" in caplog.text
    assert not (tmp_path / "temperature.safetensors").exists()
