"""Ordinal regression, the worked case of a likelihood that is one class in one file: against brute force in float64."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from bayeformers import LaplacePosterior, fixed_draw, metrics, predict, to_bayesian
from bayeformers.laplace import fit
from bayeformers.likelihoods import Categorical, Likelihood, get_likelihood, register, registry, resolve_problem_type
from bayeformers.training import count_items, item_nll
from tests.likelihoods.test_loss_hessian import normal, ordinal
from tests.training import tiny

ORDINAL, CLASSES = "ordinal_regression", 4


def model(seed: int = 0) -> nn.Module:
    return tiny.plain("single", seed, num_labels=CLASSES, problem_type=ORDINAL)


def data(count: int = 20, seed: int = 0) -> tiny.Rows:
    rows = tiny.dataset("single", count, seed, num_labels=CLASSES)
    rows.columns["labels"][3] = -100
    return rows


# -------------------------------------------------------------------------------------------------------- the formula


@pytest.mark.parametrize("classes", [2, 3, 6])
def test_probabilities_are_differences_of_cumulative_ones(classes: int) -> None:
    logits = normal(50, classes, scale=3.0)
    log_probs = get_likelihood(ORDINAL).values(logits, {})
    torch.testing.assert_close(log_probs.exp(), ordinal(logits))
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(50, dtype=torch.float64))
    if classes == 2:
        torch.testing.assert_close(log_probs, logits.log_softmax(-1))


def test_proportional_odds() -> None:
    """McCullagh 1980: with constant gaps an input multiplies the odds of all cut points by one factor."""
    logits = normal(5, 1).expand(5, CLASSES) * torch.tensor([0.0, 1.0, 0.0, 0.0]) + torch.tensor([0.3, 0, 0.7, -1.2])
    at_least = ordinal(logits).flip(-1).cumsum(-1).flip(-1)[:, 1:]
    log_odds = at_least.logit()
    torch.testing.assert_close(log_odds[1:] - log_odds[:1], (log_odds[1:, :1] - log_odds[:1, :1]).expand(4, 3))


def test_no_probability_is_lost_in_float32() -> None:
    """Where the cumulative probabilities round to 1 or to each other: finite, as float64 has them."""
    logits = normal(200, 5, scale=30.0).float()
    likelihood = get_likelihood(ORDINAL)
    found, expected = likelihood.values(logits, {}), likelihood.values(logits.double(), {})
    assert bool(found.isfinite().all())
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    assert bool(likelihood.values(100 * logits, {}).isfinite().all())


def test_item_nll() -> None:
    logits, labels = normal(4, 3).requires_grad_(), torch.tensor([0, 1, -100, 2])
    values, mask = item_nll(logits, {"labels": labels}, ORDINAL)
    probs = ordinal(logits.detach())
    expected = [-math.log(probs[0, 0]), -math.log(probs[1, 1]), 0.0, -math.log(probs[3, 2])]
    torch.testing.assert_close(values, torch.tensor(expected, dtype=torch.float64))
    assert mask.tolist() == [True, True, False, True] and count_items({"labels": labels}, ORDINAL) == 3
    with pytest.raises(ValueError, match=r"`labels` must lie in \[0, 3\).*got 3"):
        item_nll(logits, {"labels": torch.tensor([0, 1, 2, 3])}, ORDINAL)


# ------------------------------------------------------------------------------------------------ training, evaluation


def brute(network: nn.Module, rows: tiny.Rows, draws: int) -> Tensor:
    """p(y | x, w_s) of each draw, (S, N, C); of a plain network for 0 draws that of its weights."""
    inputs = {name: value for name, value in rows.columns.items() if name != "labels"}
    found = []
    for index in range(max(draws, 1)):
        with torch.no_grad(), fixed_draw(network, index) if draws else contextlib.nullcontext():
            found.append(ordinal(network.eval()(**inputs).logits.double()))
    return torch.stack(found)


def test_training_and_evaluation(tmp_path: Path) -> None:
    network, rows = to_bayesian(model(), delta=0.5), data()
    trainer = tiny.trainer(tmp_path, network, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    assert network.config.bayesian["num_training_items"] == 19
    output = trainer.predict(rows)
    draws, kept, labels = brute(network, rows, 3), rows.columns["labels"] != -100, rows.columns["labels"]
    mean, labels = draws.mean(0)[kept], labels[kept]
    mean = mean / mean.sum(1, keepdim=True)
    expected = {
        "nll": -mean.gather(1, labels[:, None]).log().mean(),
        "ece": metrics.expected_calibration_error(mean.numpy(), labels.numpy()),
        "brier": metrics.brier_score(mean.numpy(), labels.numpy()),
        "predictive_entropy": torch.special.entr(mean).sum(1).mean(),
        "expected_entropy": torch.special.entr(draws[:, kept]).sum(-1).mean(),
    }
    for name, value in expected.items():
        assert output.metrics[f"test_{name}"] == pytest.approx(float(value), rel=1e-4, abs=1e-5), name
    torch.testing.assert_close(torch.tensor(output.predictions).double(), draws.mean(0).log(), rtol=1e-4, atol=1e-4)
    inputs = {name: value for name, value in rows.columns.items() if name != "labels"}
    found = predict(network, inputs, num_samples=3)
    torch.testing.assert_close(found.log_probs.double(), draws.log(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.log_prob(rows.columns["labels"])[3], torch.tensor(torch.nan), equal_nan=True)


def test_a_plain_model_trains_on_this_likelihood(tmp_path: Path) -> None:
    """transformers has no loss of this kind: the mean NLL of the items takes its place."""
    rows = data(24)
    trainer = tiny.trainer(
        tmp_path, model(), train_dataset=rows, eval_dataset=rows, max_steps=60, learning_rate=3e-2, logging_steps=60
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_nll"] < 0.7 * before["eval_nll"]
    probs = brute(trainer.model, rows, 0)[0]
    kept, labels = rows.columns["labels"] != -100, rows.columns["labels"]
    expected = -probs[kept].gather(1, labels[kept][:, None]).log().mean()
    assert after["eval_nll"] == pytest.approx(float(expected), rel=1e-5)


def test_calibration_loss_and_configuration(tmp_path: Path) -> None:
    network = to_bayesian(model(), delta=0.2)
    trainer = tiny.trainer(tmp_path, network, calibration_loss="avuc", calibration_threshold=0.5, train_dataset=data())
    assert math.isfinite(trainer.train().training_loss)
    network.save_pretrained(tmp_path / "saved")
    config = hf.AutoConfig.from_pretrained(tmp_path / "saved")
    assert resolve_problem_type(hf.BertForSequenceClassification(config)) == ORDINAL


# ---------------------------------------------------------------------------------------------------------- Laplace


def test_laplace_covariance_against_the_dense_fisher() -> None:
    """J (F + tau)^-1 J^T with F = sum_n sum_c p_c grad log p_c grad log p_c^T, by autograd over the parameters."""
    torch.manual_seed(0)
    net, x = nn.Linear(3, CLASSES).double(), normal(30, 3)
    labels = torch.arange(30) % CLASSES
    posterior = fit(
        net, [(x, labels)], likelihood="ordinal", curvature="full", fisher="exact", prior_precision=0.7, progress=False
    )
    assert posterior.problem_type() == ORDINAL
    parameters = torch.cat([net.weight.detach(), net.bias.detach()[:, None]], 1)

    def log_probs(theta: Tensor, at: Tensor) -> Tensor:
        return ordinal(at @ theta[:, :-1].T + theta[:, -1]).log()

    jacobian = torch.autograd.functional.jacobian(lambda theta: log_probs(theta, x), parameters).flatten(2)
    fisher = torch.einsum("nc,nci,ncj->ij", log_probs(parameters, x).exp(), jacobian, jacobian)
    covariance = torch.linalg.inv(fisher + 0.7 * torch.eye(len(fisher), dtype=torch.float64))
    outputs = torch.autograd.functional.jacobian(lambda t: x[:5] @ t[:, :-1].T + t[:, -1], parameters).flatten(2)
    expected = torch.einsum("nci,ij,ndj->ncd", outputs, covariance, outputs)
    found = posterior.predict(x[:5], seed=1)
    torch.testing.assert_close(found.logit_covariance, expected, rtol=1e-6, atol=1e-9)
    gaussian = torch.distributions.MultivariateNormal(found.logit_mean, expected)
    brute_force = ordinal(gaussian.sample((100_000,))).mean(0)
    torch.testing.assert_close(found.probs, brute_force, rtol=0, atol=6e-3)
    with pytest.raises(ValueError, match="`link` must be 'auto' or 'mc' for ordinal_regression, got 'probit'"):
        posterior.predict(x[:5], link="probit")
    nll = -log_probs(parameters, x).gather(1, labels[:, None]).sum()
    assert posterior.record.log_likelihood == pytest.approx(-float(nll))


@pytest.mark.parametrize("fisher", ["exact", "mc", "empirical"])
def test_kfac_by_the_trainer(tmp_path: Path, fisher: str) -> None:
    network, rows = model(), data()
    trainer = tiny.trainer(tmp_path, network, train_dataset=rows, eval_dataset=rows)
    posterior = trainer.fit_laplace(fisher=fisher, curvature="kfac", prior_precision=2.0)
    assert posterior.record.config.likelihood == "ordinal" and posterior.record.num_data == 19
    assert posterior.problem_type() == ORDINAL and math.isfinite(posterior.log_marginal_likelihood)
    inputs = {name: value for name, value in rows.columns.items() if name != "labels"}
    sampled, linear = (posterior.predict(inputs, method=method) for method in ("sample", "glm"))
    for found in (sampled, linear):
        torch.testing.assert_close(found.probs.sum(-1), torch.ones(20))
        assert bool((found.mutual_information > 0).all())
    assert trainer.evaluate()["eval_nll"] == pytest.approx(
        float(-posterior.predict(inputs, num_samples=3).log_prob(rows.columns["labels"]).nanmean()), rel=1e-4
    )
    posterior.save(tmp_path / "saved")
    again = LaplacePosterior.load(tmp_path / "saved", network)
    assert torch.equal(again.predict(inputs, method="glm").probs, linear.probs)


# ------------------------------------------------------------------------------------------------------ registration


class Tempered(Categorical):
    """A user's own: a softmax of half the logits."""

    problem_type = "tempered"
    family = "tempered"
    has_link = True

    def class_logits(self, logits: Tensor) -> Tensor:
        return logits / 2


def test_a_users_own_likelihood(monkeypatch: pytest.MonkeyPatch) -> None:
    for table in ("_BY_NAME", "_BY_FAMILY"):
        monkeypatch.setattr(registry, table, dict(getattr(registry, table)))
    register(Tempered())
    torch.manual_seed(0)
    net, x = nn.Linear(3, 2), torch.randn(8, 3)
    torch.testing.assert_close(predict(net, x, problem_type="tempered").probs, (net(x) / 2).softmax(-1).detach())
    options: dict[str, Any] = {"curvature": "full", "fisher": "exact", "progress": False}
    found = fit(net, [(x, torch.arange(8) % 2)], likelihood="tempered", prior_precision=4.0, **options)
    plain = fit(net, [(x, torch.arange(8) % 2)], likelihood="classification", prior_precision=4.0, **options)
    assert found.problem_type() == "tempered"
    torch.testing.assert_close(found.predict(x).logit_mean, plain.predict(x).logit_mean)
    assert bool((found.predict(x).logit_covariance.diagonal(dim1=1, dim2=2) > 0).all())
    with pytest.raises(ValueError, match="`likelihood` 'tempered' is registered already"):
        register(Tempered())
    with pytest.raises(TypeError, match="must be an instance of a Likelihood"):
        register(Tempered)  # type: ignore[arg-type]
    again = type("Tempered", (Tempered,), {"__qualname__": Tempered.__qualname__})
    register(again())  # a notebook's cell ran again
    assert type(get_likelihood("tempered")) is again and isinstance(get_likelihood("tempered"), Likelihood)


def test_an_incomplete_likelihood_is_refused() -> None:
    with pytest.raises(TypeError, match=r"Half must define \['problem_type', 'nll'\]"):
        register(type("Half", (Likelihood,), {})())


def test_one_class_has_no_order() -> None:
    config = hf.BertConfig(num_labels=1, problem_type="ordinal_regression")
    with pytest.raises(ValueError, match="must be at least 2, got 1. Ordered classes need"):
        get_likelihood("ordinal_regression").check_head(config)
