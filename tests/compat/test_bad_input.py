"""Wrong input to compatibility names: one clear error that names the argument, before anything changes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from bayeformers import nn as bnn
from bayeformers.compat import bayeformers as older
from bayeformers.compat.bayesian_torch.layers import (
    Conv2dFlipout,
    LinearFlipout,
    LinearReparameterization,
    LSTMReparameterization,
)
from bayeformers.compat.bayesian_torch.models.dnn_to_bnn import dnn_to_bnn, get_kl_loss
from bayeformers.compat.bayesian_torch.utils.avuc_loss import AUAvULoss, AvULoss
from bayeformers.compat.bayesian_torch.utils.util import get_rho, mutual_information, predictive_entropy
from bayeformers.compat.bayetorch.convert import init_bayesian_with_frequentist
from bayeformers.compat.bayetorch.layers import BayesianConv2D, BayesianLinear
from bayeformers.compat.bayetorch.metrics import ELBO, Uncertainty

NAN, INF = float("nan"), float("inf")
PARAMETERS: dict[str, Any] = {
    "prior_mu": 0.0,
    "prior_sigma": 1.0,
    "posterior_mu_init": 0.0,
    "posterior_rho_init": -3.0,
    "type": "Reparameterization",
    "moped_enable": True,
    "moped_delta": 0.5,
}


def convert(*, drop: str | None = None, model: Any = None, **changes: Any) -> None:
    parameters = {key: value for key, value in (PARAMETERS | changes).items() if key != drop}
    dnn_to_bnn(nn.Linear(2, 2) if model is None else model, parameters)


def logits(*shape: int) -> torch.Tensor:
    return torch.zeros(shape)


def flipout(**options: Any) -> LinearFlipout:
    return LinearFlipout(2, 2, **options)


def older_to_bayesian(*arguments: Any, model: Any = None, **options: Any) -> Any:
    return older.to_bayesian(nn.Linear(2, 2) if model is None else model, *arguments, **options)


LABELS = torch.tensor([0, 1, 0])

CASES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    # dnn_to_bnn
    "missing key": (lambda: convert(drop="moped_delta"), ValueError, r"lacks \['moped_delta'\].*'prior_sigma'"),
    "unknown key": (lambda: convert(prior_std=1.0), ValueError, r"unknown keys \['prior_std'\]"),
    "no dict": (lambda: dnn_to_bnn(nn.Linear(2, 2), [1]), TypeError, "`bnn_prior_parameters` must be a dict, got list"),  # type: ignore[arg-type]
    "unknown type": (lambda: convert(type="flipout"), ValueError, r"`type` must be one of.*'Flipout'.*got 'flipout'"),
    "unhashable type": (lambda: convert(type=["Flipout"]), ValueError, "`type` must be one of"),
    "negative sigma": (lambda: convert(prior_sigma=-1.0), ValueError, "`prior_sigma` must be > 0, got -1.0"),
    "zero sigma": (lambda: convert(prior_sigma=0.0), ValueError, "`prior_sigma` must be > 0"),
    "NaN mu": (lambda: convert(prior_mu=NAN), ValueError, "`prior_mu` must be finite, got nan"),
    "string rho": (lambda: convert(posterior_rho_init="-3"), TypeError, "`posterior_rho_init` must be a number"),
    "moped_enable 1": (lambda: convert(moped_enable=1), TypeError, "`moped_enable` must be True or False, got 1"),
    "moped_delta 0": (lambda: convert(moped_delta=0.0), ValueError, "`moped_delta` must be > 0, got 0.0"),
    "no module": (lambda: dnn_to_bnn("resnet18", PARAMETERS), TypeError, "`m` must be a torch.nn.Module, got str"),  # type: ignore[arg-type]
    "nothing to convert": (lambda: convert(model=nn.ReLU()), ValueError, "no layer to convert; it needs one of Linear"),
    "twice": (lambda: convert(model=bnn.Linear(2, 2)), ValueError, "Bayesian already"),
    # get_kl_loss
    "unknown reduction": (lambda: get_kl_loss(bnn.Linear(2, 2), "none"), ValueError, "`reduction` must be 'sum'"),  # type: ignore[arg-type]
    "nothing Bayesian": (lambda: get_kl_loss(nn.Linear(2, 2)), ValueError, "no Bayesian layer"),
    # layers
    "variance 0": (lambda: flipout(prior_variance=0), ValueError, "`prior_variance` must be > 0, got 0"),
    "infinite mean": (lambda: Conv2dFlipout(1, 1, 1, prior_mean=INF), ValueError, "`prior_mean` must be finite"),
    "rho None": (lambda: flipout(posterior_rho_init=None), TypeError, "`posterior_rho_init` must be a number"),
    "mu list": (lambda: LSTMReparameterization(2, 2, posterior_mu_init=[0]), TypeError, "`posterior_mu_init` must be"),  # type: ignore[arg-type]
    "bias 1": (lambda: LinearReparameterization(2, 2, bias=1), TypeError, "`bias` must be True or False, got 1"),  # type: ignore[arg-type]
    "return_kl string": (lambda: flipout()(torch.ones(1, 2), return_kl="no"), TypeError, "`return_kl` must be"),
    "return_kl by position": (
        lambda: LSTMReparameterization(2, 2)(torch.ones(1, 3, 2), None, 0), TypeError, "`return_kl` must be True or"
    ),
    # uncertainties and losses
    "logits as probabilities": (lambda: predictive_entropy(np.array([[[2.0, -1.0]]])), ValueError, "`mc_preds`.*>= 0"),
    "unnormalised": (lambda: mutual_information(np.full((2, 2, 2), 0.3)), ValueError, "normalised"),
    "NaN probabilities": (lambda: predictive_entropy(np.full((2, 2, 2), NAN)), ValueError, "`mc_preds` must be prob"),
    "integers": (lambda: predictive_entropy(np.ones((2, 2, 2), int)), TypeError, "`mc_preds` must hold floating"),
    "one axis": (lambda: predictive_entropy(np.array([0.5, 0.5])), ValueError, r"`mc_preds` must have shape \(S"),
    "rho of a number": (lambda: get_rho(0.3, 0.1), TypeError, "`sigma` must be a tensor"),  # type: ignore[arg-type]
    "rho of delta 0": (lambda: get_rho(torch.ones(2), 0.0), ValueError, "`delta` must be > 0"),
    "beta 0": (lambda: AvULoss(beta=0), ValueError, "`beta` must be > 0"),
    "type 2": (lambda: AvULoss()(logits(3, 2), LABELS, 0.5, type=2), ValueError, "`type` must be 0"),
    "no draws": (lambda: AUAvULoss()(logits(3, 2), LABELS, type=1), ValueError, r"`type=1`.*\(S, N, C\), got \(3, 2\)"),
    "threshold NaN": (lambda: AvULoss()(logits(3, 2), LABELS, NAN), ValueError, "`threshold` must be finite"),
    # BayeTorch
    "ELBO of 0": (lambda: ELBO(0), ValueError, "`n_samples` must be a whole number >= 1, got 0"),
    "kld_weight": (lambda: ELBO(9)(logits(3, 2), LABELS, logits(), -1.0), ValueError, "`kld_weight` must be >= 0"),
    "ELBO of logits": (lambda: ELBO(9)(logits(3, 2) + 2, LABELS, logits()), ValueError, "`predictions` must be log-"),
    "Uncertainty of 0": (lambda: Uncertainty(0), ValueError, "`samples` must be a whole number >= 1"),
    "batched 1": (lambda: Uncertainty(2, batched=1), TypeError, "`batched` must be True or False"),  # type: ignore[arg-type]
    "X list": (lambda: Uncertainty(2)(BayesianLinear(2, 2), [1.0]), TypeError, "`X` must be a tensor"),  # type: ignore[arg-type]
    "X a batch": (
        lambda: Uncertainty(2)(BayesianLinear(2, 3), torch.ones(5, 2)), ValueError, r"logits \(B, C\).*batched=True"
    ),
    "deterministic": (lambda: Uncertainty(2)(nn.Linear(2, 3), torch.ones(2)), ValueError, "no Bayesian layer"),
    "other shapes": (
        lambda: init_bayesian_with_frequentist(BayesianLinear(2, 3), nn.Linear(3, 3)), ValueError,
        r"`frequentist` has 'weight' of shape \(3, 3\) where `bayesian` has 'weight' of shape \(3, 2\)",
    ),
    "other number": (
        lambda: init_bayesian_with_frequentist(BayesianLinear(2, 3), nn.Linear(2, 3, bias=False)), ValueError,
        "must have the 2 Parameters.*got 1",
    ),
    "init nothing": (
        lambda: init_bayesian_with_frequentist(nn.Linear(2, 2), nn.Linear(2, 2)), ValueError, "`bayesian`.*no Bayesian"
    ),
    "freeze None": (
        lambda: init_bayesian_with_frequentist(BayesianConv2D(1, 1, 1), nn.Conv2d(1, 1, 1), None), TypeError,  # type: ignore[arg-type]
        "`freeze` must be True or False",
    ),
    "init a string": (
        lambda: init_bayesian_with_frequentist(BayesianLinear(2, 2), "x"), TypeError, "`frequentist` must be a torch"  # type: ignore[arg-type]
    ),
    # BayeFormers
    "freeze without delta": (lambda: older_to_bayesian(freeze=True), ValueError, "`freeze=True` needs"),
    "initialization and delta": (
        lambda: older_to_bayesian(lambda mean, rho: None, delta=0.1), ValueError,
        "`initialization` has no part",
    ),
    "initialization 3": (lambda: older_to_bayesian(3), TypeError, "`initialization` must be a function"),
    "delta by position": (lambda: older_to_bayesian(0.05), TypeError, "`initialization` must be a"),
    "delta 0": (lambda: older_to_bayesian(delta=0.0), ValueError, "`delta` must be finite and > 0"),
    "model None": (lambda: older.to_bayesian(None), TypeError, "`model` must be a torch.nn.Module, got NoneType"),  # type: ignore[arg-type]
    "no Linear": (lambda: older_to_bayesian(model=nn.Conv2d(1, 1, 1)), ValueError, "no layer of class `nn.Linear`"),
    "prior": (lambda: older_to_bayesian(prior="normal", delta=0.1), TypeError, "`prior` must be a Prior"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_error_names_the_argument(name: str) -> None:
    call, kind, message = CASES[name]
    with pytest.raises(kind, match=message):
        call()


@pytest.mark.parametrize("changes", [{"type": "x"}, {"prior_sigma": 0.0}, {"moped_delta": NAN}, {"other": 1}])
def test_failed_conversion_changes_nothing(changes: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5), nn.Conv2d(1, 1, 1))
    before, kinds = copy.deepcopy(model.state_dict()), [type(module) for module in model]
    with pytest.raises(ValueError, match="`"):
        dnn_to_bnn(model, PARAMETERS | changes)
    assert [type(module) for module in model] == kinds
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model._forward_pre_hooks


def test_failed_initialisation_changes_nothing() -> None:
    twin = nn.Sequential(BayesianLinear(2, 3), BayesianLinear(3, 3))
    before = copy.deepcopy(twin.state_dict())
    with pytest.raises(ValueError, match="`frequentist`"):
        init_bayesian_with_frequentist(twin, nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4)))
    assert all(torch.equal(value, before[name]) for name, value in twin.state_dict().items())
    assert all(parameter.requires_grad for parameter in twin.parameters())
