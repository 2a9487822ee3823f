"""Wrong kinds of arguments to public functions: an error of ours that names the argument, never one from within."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import bayeformers as bf
from bayeformers import laplace, metrics, models
from bayeformers.distributions import prior_from_dict
from bayeformers.laplace import LaplacePosterior, fit

X, Y = torch.randn(6, 4), torch.arange(6) % 3
P, ZEROS = np.full((4, 2), 0.5), np.zeros(4)


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def fitted() -> LaplacePosterior:
    return fit(net(), [(X, Y)], progress=False)


def fit_with(**options: Any) -> LaplacePosterior:
    return fit(net(), [(X, Y)], progress=False, **options)


def in_inference_mode() -> nn.Module:
    with torch.inference_mode():
        return bf.to_bayesian(net())


def made_in_inference_mode() -> nn.Module:
    with torch.inference_mode():
        made = net()
    return bf.to_bayesian(made)


CALLS: list[tuple[Callable[[], Any], str]] = [
    (lambda: metrics.risk_at_coverage(ZEROS, ZEROS, "a"), "`coverage`"),  # type: ignore[arg-type]
    (lambda: metrics.coverage_at_risk(ZEROS, ZEROS, None), "`risk`"),  # type: ignore[arg-type]
    (lambda: metrics.risk_at_coverage(ZEROS, ZEROS, True), "`coverage`"),
    (lambda: metrics.refusal_table(ZEROS, ZEROS, "a"), "`target_accuracies`"),
    (lambda: metrics.refusal_table(ZEROS, ZEROS, None), "`target_accuracies`"),  # type: ignore[arg-type]
    (lambda: metrics.covariance_uncertainty(np.zeros((2, 1, 2)), ZEROS), "`normalization`"),  # type: ignore[call-overload]
    (lambda: metrics.bootstrap_ci("accuracy", P, ZEROS), "`metric`"),  # type: ignore[arg-type]
    (lambda: bf.from_pretrained(None), "`directory`"),  # type: ignore[arg-type]
    (lambda: bf.from_pretrained(float("nan")), "`directory`"),  # type: ignore[arg-type]
    (lambda: fitted().save(None), "`directory`"),  # type: ignore[arg-type]
    (lambda: LaplacePosterior.load(None, net()), "`directory`"),  # type: ignore[arg-type]
    (lambda: fit_with(prior_mean="mean"), "`prior_mean`"),
    (lambda: fit_with(logits="logits"), "`logits`"),
    (lambda: fit_with(device="no device"), "`device`"),
    (lambda: fit_with(checkpoint=3.0), "`checkpoint`"),
    (lambda: laplace.inf_posterior(None, 2), "`posterior`"),  # type: ignore[arg-type]
    (lambda: laplace.example_gradients("x", X, Y), "`posterior`"),  # type: ignore[arg-type]
    (lambda: laplace.inner_products(None, None, None), "`posterior`"),  # type: ignore[arg-type]
    (lambda: laplace.influence(fitted(), None, None), "`example_gradients`"),  # type: ignore[arg-type]
    (lambda: models.MLPForImageClassification(None), "`config`"),  # type: ignore[arg-type]
    (lambda: prior_from_dict(None), "`prior`"),  # type: ignore[arg-type]
    (lambda: bf.BayesianConfig.from_dict(None), "`data`"),  # type: ignore[arg-type]
    (lambda: bf.PosteriorPrior(None), "`fresh`"),  # type: ignore[arg-type]
    (in_inference_mode, "`model` cannot be converted under"),
    (made_in_inference_mode, "`model` cannot be converted under"),
]


@pytest.mark.parametrize(("call", "name"), CALLS)
def test_the_argument_is_named(call: Callable[[], Any], name: str) -> None:
    with pytest.raises((TypeError, ValueError), match=name):
        call()


def test_numpy_numbers(tmp_path: Path) -> None:
    """As Python's: the same draws, the same files."""
    model = bf.to_bayesian(net(), delta=np.float32(0.5), prior=bf.NormalPrior(std=np.float64(0.1)))
    assert type(bf.bayesian_config(model).delta) is float
    with torch.no_grad(), bf.fixed_draw(model, np.int64(3), seed=np.int32(1)):
        found = model(X)
    with torch.no_grad(), bf.fixed_draw(model, 3, seed=1):
        assert torch.equal(found, model(X))
    bf.predict(model, X, num_samples=np.int64(2), seed=np.int64(0))
    bf.prune(model, np.float32(0.5))
    posterior = fit_with(seed=np.int64(1), fisher="mc", num_mc_samples=np.int32(2), prior_precision=np.float32(2))
    posterior.save(tmp_path)
    LaplacePosterior.load(tmp_path, posterior.model)
    bf.calibrate_delta(net(), X, Y, num_samples=np.int64(1), tolerance=np.float32(0.1), progress=False)
    with pytest.raises(TypeError, match="`index` must be a whole number"), bf.fixed_draw(model, np.float32(1)):  # type: ignore[arg-type]
        pass
