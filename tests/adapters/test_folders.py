"""PEFT's folder of every posterior of this room: it reloads bit for bit, and PEFT's own file stays clean."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

import bayeformers
from bayeformers.adapters import AdapterPosterior, fit_core, fit_tfb, to_blob, to_scalabl
from tests.adapters.lora import bert, inputs, labels

Method = Callable[[Any], Any]


def default(model: Any) -> nn.Module:
    prior = bayeformers.RelativePrior()
    return bayeformers.to_bayesian(model, 0.3, prior=prior, scale="multiplicative")


def tfb(model: Any) -> AdapterPosterior:
    return fit_tfb(model, inputs(), bounds=(1e-3, 1e-1), num_samples=2, progress=False)


def core(model: Any) -> AdapterPosterior:
    return fit_core(model, [(inputs(), labels())], prior_precision=1.0, progress=False)


@pytest.mark.parametrize("method", [default, to_scalabl, to_blob, tfb, core])
def test_a_folder_has_the_posterior_and_a_clean_adapter(method: Method, tmp_path: Path) -> None:
    model: Any = bert()
    base: Any = bert()
    posterior = method(model)
    if isinstance(posterior, AdapterPosterior):
        model.posterior = posterior
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*invalid shape")
        model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        names = {name.rpartition(".")[2] for name in file.keys()}  # noqa: SIM118
        assert names == {"weight", "bias"}
    found: Any = bayeformers.from_pretrained(tmp_path, base_model=base.unload())
    again = getattr(found, "posterior", None) or found
    for method_name in ("sample", "glm"):
        options = {"num_samples": 3, "seed": 5, "method": method_name}
        expected = bayeformers.predict(posterior, inputs(), **options)  # type: ignore[arg-type]
        reloaded = bayeformers.predict(again, inputs(), **options)
        assert torch.equal(reloaded.mean_log_probs, expected.mean_log_probs)
    assert bool((expected.mutual_information > 0).all())
