"""Calibrated posteriors: the maps against brute force, what they leave as it is, and what they refuse."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor, nn

import bayeformers
from bayeformers import laplace
from bayeformers.metrics import fit_linear_map, fit_temperature
from bayeformers.posteriors import (
    DropoutPosterior,
    MixturePosterior,
    PointPosterior,
    TemperaturePosterior,
    VariationalPosterior,
)
from bayeformers.posteriors.temperature import stretched
from bayeformers.predictive import Predictive, mixture_of
from tests.cases import case


def rows(classes: int = 3, count: int = 60) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, classes, generator=generator, dtype=torch.float64)
    noisy = x + torch.randn(count, classes, generator=generator, dtype=torch.float64)
    return {"input": 3 * x, "labels": noisy.argmax(1)}


def texts(name: str = "bert") -> dict[str, Any]:
    return {**case(name).inputs(), **case(name).labels()}


# -------------------------------------------------------------------------------------------------- the maps by hand


@pytest.mark.parametrize("kind", ["vector", "dirichlet"])
def test_maps_minimise_the_written_objective(kind: Any) -> None:
    """Against a general optimiser on the objective as it is written down; no penalty, and a strong one."""
    batch = rows()
    x, y = batch["input"].log_softmax(-1).numpy(), batch["labels"].numpy()
    for penalty in (0.05, 3.0):
        found = fit_linear_map(x, y, kind, penalty)

        def objective(flat: np.ndarray, penalty: float = penalty) -> float:
            weight, bias = np.diag(flat[:3]), flat[-3:]
            if kind == "dirichlet":
                weight = flat[:9].reshape(3, 3)
            logits = x @ weight.T + bias
            nll = np.log(np.exp(logits).sum(1)) - logits[np.arange(len(y)), y]
            off = sum(weight[i, j] ** 2 for i in range(3) for j in range(3) if i != j)
            return float(nll.mean() + penalty * (off / 6 + (bias**2).sum() / 3))

        start = np.concatenate([np.eye(3).ravel() if kind == "dirichlet" else np.ones(3), np.zeros(3)])
        expected = minimize(objective, start, method="BFGS", options={"gtol": 1e-9}).fun
        own = found.weight.ravel() if kind == "dirichlet" else found.weight.diagonal()
        assert objective(np.concatenate([own, found.bias])) == pytest.approx(expected, abs=1e-9)
        assert kind == "dirichlet" or (found.weight == np.diag(found.weight.diagonal())).all()
    assert found.penalty == 3.0


def test_families_lie_within_each_other() -> None:
    """NLL on the fitted rows: Dirichlet <= vector <= temperature; a chosen penalty is one of the grid, and repeats."""
    batch = rows()
    x, y = batch["input"].log_softmax(-1).numpy(), batch["labels"].numpy()

    def nll(weight: Any, bias: Any = 0.0) -> float:
        logits = x @ weight.T + bias
        return float((np.log(np.exp(logits).sum(1)) - logits[np.arange(len(y)), y]).mean())

    found = [fit_linear_map(x, y, kind, 0) for kind in ("dirichlet", "vector")]  # type: ignore[arg-type]
    losses = [*(nll(one.weight, one.bias) for one in found), nll(np.eye(3) / fit_temperature(x, y)), nll(np.eye(3))]
    assert losses == sorted(losses)
    assert fit_linear_map(x, y, "vector").penalty in (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)


@pytest.mark.parametrize("kind", ["scalar", "vector", "dirichlet"])
def test_pooled_then_calibrated(kind: Any) -> None:
    torch.manual_seed(0)
    model, batch = nn.Sequential(nn.Dropout(0.3), nn.Identity()).eval(), rows()
    base = DropoutPosterior(model)
    options = {} if kind == "scalar" else {"penalty": 0.1}
    posterior = TemperaturePosterior.fit(base, [batch], kind, num_samples=8, **options)
    plain, found = (one.predict(batch, num_samples=8) for one in (base, posterior))
    pooled = plain.mean_log_probs.numpy()
    if kind == "scalar":
        temperature = fit_temperature(pooled, batch["labels"].numpy())
        assert posterior.temperature == pytest.approx(temperature)
        weight, bias = torch.eye(3) / temperature, torch.zeros(3)
        assert torch.equal(found.probs.argmax(-1), plain.probs.argmax(-1))
    else:
        fitted = fit_linear_map(pooled, batch["labels"].numpy(), kind, 0.1)
        weight, bias = torch.from_numpy(fitted.weight), torch.from_numpy(fitted.bias)
    mapped = (plain.mean_log_probs @ weight.double().T + bias).softmax(-1)
    torch.testing.assert_close(found.probs, mapped)
    each = (plain.log_probs @ weight.double().T + bias).log_softmax(-1)
    torch.testing.assert_close(found.log_probs, each)
    torch.testing.assert_close(found.expected_entropy, -(each.exp() * each).sum(-1).mean(0))
    scores = [-one.log_prob(batch["labels"]).mean() for one in (found, plain)]
    assert scores[0] < scores[1]
    assert torch.equal(next(iter(posterior.passes(batch))), next(iter(base.passes(batch))))


# ------------------------------------------------------------------------------------------------------ heads and bases


@pytest.mark.parametrize("name", ["bert-multi-label", "bert-tokens"])
def test_labels_and_tokens(name: str) -> None:
    """Every label, and every token that counts, is an item; the others' labels are never looked at."""
    model, batch = case(name).build(), texts(name)
    if name == "bert-tokens":
        batch["labels"] = batch["labels"].masked_fill(batch["attention_mask"] == 0, -100)
    posterior = TemperaturePosterior.fit(PointPosterior(model), [batch])
    log_probs = PointPosterior(model).predict(batch).mean_log_probs
    labels = batch["labels"].long()
    counts = labels != -100
    expected = fit_temperature(log_probs[counts].reshape(-1, log_probs.shape[-1]).numpy(), labels[counts].numpy())
    assert posterior.temperature == pytest.approx(expected)
    found = posterior.predict(batch)
    torch.testing.assert_close(found.mean_log_probs, (log_probs / expected).log_softmax(-1))
    if name == "bert-multi-label":
        with pytest.raises(ValueError, match="`kind` must be 'scalar' for a 'multi_label_classification' head"):
            TemperaturePosterior.fit(PointPosterior(model), [batch], "vector")


def regression() -> tuple[Any, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = nn.Linear(3, 1).double()
    x = torch.randn(30, 3, dtype=torch.float64)
    y = (model(x) + 2 * torch.randn(30, 1, dtype=torch.float64)).detach()
    fitted = laplace.fit(model, [(x, y)], likelihood="regression", prior_precision=1.0, noise_std=0.5)
    return fitted, {"input": x, "labels": y[:, 0]}


def test_regression_is_stretched() -> None:
    """Of one Gaussian T^2 is the mean of squared residuals in units of its variance; the mean stays."""
    base, batch = regression()
    posterior = TemperaturePosterior.fit(base, [batch])
    plain, found = base.predict(batch), posterior.predict(batch)
    total = plain.epistemic_variance + plain.aleatoric_variance
    expected = ((batch["labels"] - plain.mean).square() / total).mean().sqrt().item()
    assert posterior.temperature == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(found.mean, plain.mean)
    torch.testing.assert_close(found.epistemic_variance, expected**2 * plain.epistemic_variance, rtol=1e-4, atol=0)
    torch.testing.assert_close(found.aleatoric_variance, expected**2 * plain.aleatoric_variance, rtol=1e-4, atol=0)


def test_stretched_densities_integrate_to_one() -> None:
    """Of draws, of a head's own noise and of a mixture: p_T(y) = p(mean + (y - mean) / T) / T."""
    values, y = torch.randn(4, 1, dtype=torch.float64), torch.linspace(-30, 30, 4001, dtype=torch.float64)
    kinds: list[Predictive] = [
        Predictive(problem_type="regression", values=values, noise_std=0.7),
        Predictive(problem_type="regression", values=values, noise_std="head", noise_variance=values.square() + 0.2),
    ]
    for predictive in [*kinds, mixture_of(kinds, [0.3, 0.7])]:
        wide, mean = stretched(predictive, 1.8), predictive.mean
        for point in (-2.0, 0.3, 4.0):
            label = torch.tensor([point], dtype=torch.float64)
            expected = predictive.log_prob(mean + (label - mean) / 1.8) - math.log(1.8)
            torch.testing.assert_close(wide.log_prob(label), expected)
        density = torch.stack([wide.log_prob(v[None]).exp()[0] for v in y[::10]])
        assert torch.trapezoid(density, y[::10]).item() == pytest.approx(1, abs=1e-3)
        torch.testing.assert_close(wide.mean, mean)
        total = wide.epistemic_variance + wide.aleatoric_variance
        torch.testing.assert_close(total, 1.8**2 * (predictive.epistemic_variance + predictive.aleatoric_variance))


def bert_bases() -> dict[str, Any]:
    model, batch = case("bert").build(), texts()
    fitted = laplace.fit(model, [batch], target_modules="classifier", prior_precision=3.0)
    mixture = MixturePosterior([fitted, DropoutPosterior(model)], [1, 2])
    return {"point": PointPosterior(model), "laplace": fitted, "dropout": DropoutPosterior(model), "mixture": mixture}


@pytest.mark.parametrize("name", ["point", "laplace", "dropout", "mixture"])
@pytest.mark.parametrize("kind", ["scalar", "dirichlet"])
def test_saved_with_its_base(tmp_path: Path, name: str, kind: Any) -> None:
    base, batch = bert_bases()[name], texts()
    posterior = TemperaturePosterior.fit(base, [batch], kind, num_samples=4, penalty=0.1)
    posterior.model.posterior = posterior
    posterior.model.save_pretrained(tmp_path)
    loaded = bayeformers.from_pretrained(tmp_path).posterior
    assert isinstance(loaded, TemperaturePosterior) and type(loaded.base) is type(base)
    assert repr(loaded) == repr(posterior) and loaded.default_method == base.default_method
    found, expected = (one.predict(batch, num_samples=4) for one in (loaded, posterior))
    for value in ("mean_log_probs", "log_probs", "mutual_information"):
        assert torch.equal(getattr(found, value), getattr(expected, value))


@pytest.mark.parametrize("kind", ["scalar", "dirichlet"])
def test_a_converted_model_keeps_its_calibration(tmp_path: Path, kind: Any) -> None:
    """Its posterior lies in the checkpoint, the calibration beside it; saved without one, the old one goes."""
    model, batch = bayeformers.to_bayesian(case("bert").build(), delta=0.2), texts()
    model.posterior = TemperaturePosterior.fit(VariationalPosterior(model), [batch], kind, num_samples=4, penalty=0.1)
    model.save_pretrained(tmp_path)
    loaded = bayeformers.from_pretrained(tmp_path)
    assert isinstance(loaded.posterior.base, VariationalPosterior) and loaded.posterior.base.model is loaded
    found, expected = (bayeformers.predict(one, batch, num_samples=4) for one in (loaded, model))
    assert torch.equal(found.probs, expected.probs) and torch.equal(found.log_probs, expected.log_probs)
    plain = bayeformers.predict(VariationalPosterior(model), batch, num_samples=4)
    assert not torch.equal(found.probs, plain.probs)
    other = bayeformers.to_bayesian(case("bert").build(), delta=0.3)
    other.save_pretrained(tmp_path)
    assert getattr(bayeformers.from_pretrained(tmp_path), "posterior", None) is None


@pytest.mark.parametrize("base", [PointPosterior, DropoutPosterior])
def test_a_calibration_of_other_weights_is_not_saved(
    tmp_path: Path, base: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Of a posterior that follows whatever weights the model has, the calibration remembers its own."""
    model, batch = case("bert").build(), texts()
    model.posterior = TemperaturePosterior.fit(base(model), [batch], num_samples=2)
    assert model.posterior.is_of_present_weights()
    with torch.no_grad():
        model.classifier.weight.add_(0.1)
    assert not model.posterior.is_of_present_weights()
    model.save_pretrained(tmp_path)
    assert "weights have moved" in caplog.text and not (tmp_path / "temperature.safetensors").exists()


def test_a_mixture_of_calibrated_posteriors(tmp_path: Path) -> None:
    bases, batch = bert_bases(), texts()
    parts = [TemperaturePosterior.fit(bases["laplace"], [batch]), TemperaturePosterior(bases["point"], weight=0.5)]
    parts[1].model.load_state_dict(parts[0].model.state_dict())
    mixture = MixturePosterior(parts)
    mixture.save(tmp_path)
    loaded = MixturePosterior.load(tmp_path, mixture.model)
    assert torch.equal(loaded.predict(batch).probs, mixture.predict(batch).probs)
    torch.testing.assert_close(
        mixture.predict(batch).probs, (parts[0].predict(batch).probs + parts[1].predict(batch).probs) / 2
    )


# ---------------------------------------------------------------------------------------------------------- bad input

NOISELESS = {"input": torch.zeros(4, 1), "labels": torch.ones(4)}
POINT = PointPosterior(nn.Identity())


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"base": nn.Linear(1, 1)}, "`base` must be a posterior, got Linear"),
        ({"kind": "matrix"}, r"`kind` must be one of \('scalar', 'vector', 'dirichlet'\), got 'matrix'"),
        ({"weight": 0.0}, "`weight` of 'scalar' must be one number > 0"),
        ({"weight": -1.0}, "`weight` of 'scalar' must be one number > 0"),
        ({"weight": math.nan}, "`weight` must be finite"),
        ({"weight": torch.ones(2)}, "`weight` of 'scalar' must be one number"),
        ({"weight": 1.0, "bias": torch.ones(2)}, "without a `bias`"),
        ({"kind": "vector", "weight": torch.ones(2)}, r"`weight` of 'vector' must be \(C, C\)"),
        ({"kind": "vector", "weight": torch.ones(2, 2), "bias": torch.ones(2)}, "must be diagonal"),
        ({"kind": "dirichlet", "weight": torch.ones(2, 3)}, r"must be \(C, C\) with C >= 2, got \(2, 3\)"),
        ({"kind": "dirichlet", "weight": torch.ones(1, 1)}, "C >= 2"),
        ({"kind": "dirichlet", "weight": torch.eye(2)}, "`bias` of 'dirichlet' must be 2 finite numbers, got None"),
        ({"kind": "vector", "weight": torch.eye(2), "bias": torch.ones(3)}, "`bias` of 'vector' must be 2"),
        ({"kind": "vector", "weight": torch.eye(2), "bias": torch.tensor([0, math.inf])}, "finite"),
    ],
)
def test_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises((TypeError, ValueError), match=told):
        TemperaturePosterior(**{"base": POINT, **options})


@pytest.mark.parametrize(
    ("batches", "options", "told"),
    [
        ([], {}, "hold no label that counts"),
        ([{"input": torch.zeros(1, 2), "labels": torch.tensor([-100])}], {}, "hold no label that counts"),
        ([(torch.zeros(1, 2), torch.tensor([0]))], {}, "`batches` must be mappings with labels, got tuple"),
        ([{"input": torch.zeros(1, 2)}], {}, "`labels` must be a tensor"),
        ([{"input": torch.zeros(1, 2), "labels": torch.tensor([[0]])}], {}, r"`labels` must have shape \(1,\)"),
        ([{"input": torch.zeros(1, 2), "labels": torch.tensor([2])}], {}, "`labels` must lie in"),
        ([rows()], {"kind": "platt"}, "`kind` must be one of"),
        ([rows()], {"num_samples": 0}, "`num_samples` must be"),
        ([rows()], {"kind": "dirichlet", "penalty": -1}, "`penalty` must be a finite number >= 0"),
        ([rows(count=9)], {"kind": "vector"}, "`penalty` needs 10 rows"),
        ([rows()], {"method": "glm"}, "needs a Gaussian posterior"),
        ([rows()], {"problem_type": "causal_lm"}, "few classes per prediction"),
        ([rows()], {"problem_type": "regression"}, r"`labels` must have shape \(60, 3\), got \(60,\)"),
        ([NOISELESS], {"problem_type": "regression"}, "`noise_std` is not known"),
        ([rows()], {"problem_type": "regression", "kind": "vector"}, "`kind` must be 'scalar' for a 'regression' head"),
    ],
)
def test_fit_refused(batches: Any, options: dict[str, Any], told: str) -> None:
    with pytest.raises((TypeError, ValueError), match=told):
        TemperaturePosterior.fit(POINT, batches, **options)


def test_refused_when_used(tmp_path: Path) -> None:
    vector = TemperaturePosterior(POINT, "vector", weight=torch.eye(2), bias=torch.zeros(2))
    with pytest.raises(ValueError, match="`temperature` is of kind 'scalar', got 'vector'"):
        _ = vector.temperature
    with pytest.raises(ValueError, match="of 2 classes, got a head with 3"):
        vector.predict(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="`method` must be 'sample', for which it is calibrated, got 'glm'"):
        TemperaturePosterior(POINT).predict(torch.zeros(1, 3), method="glm")
    variational = TemperaturePosterior(VariationalPosterior(bayeformers.to_bayesian(nn.Linear(2, 2))))
    assert variational.predict(torch.ones(1, 2)).probs.shape == (1, 2)

    class OfMyOwn(PointPosterior):
        """Of no file."""

    with pytest.raises(ValueError, match="a OfMyOwn is not saved beside its model"):
        TemperaturePosterior(OfMyOwn(nn.Identity())).save(tmp_path)
    with pytest.raises(ValueError, match="no temperature file"):
        TemperaturePosterior.load(tmp_path, nn.Identity())
    with pytest.raises(ValueError, match="at least 2"):
        fit_linear_map(np.zeros((10, 1)), [0] * 10)
    assert not list(tmp_path.iterdir())
