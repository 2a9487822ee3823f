"""Evaluation by the linearised network: what `evaluate` reports against `posterior.predict` and metrics by hand."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bayeformers import metrics
from bayeformers.linearized.links import ignores_shift, linearized_predictive
from bayeformers.posteriors import PointPosterior, VariationalPosterior
from bayeformers.predictive import Predictive
from bayeformers.training.columns import predict_batch, score_predictive
from tests.training import tiny

ENTROPIES = ("predictive_entropy", "expected_entropy", "mutual_information")


def data_of(kind: str) -> tiny.Rows:
    return tiny.dataset(kind, 9, seed=5)


def predicted(model: nn.Module, data: tiny.Rows, **options: Any) -> Predictive:
    """The whole data in one batch, without a trainer; of centred logits wherever that gives the same probabilities."""
    inputs = {name: data.columns[name] for name in ("input_ids", "attention_mask")}
    posterior = VariationalPosterior(model)
    contrasts = ignores_shift(posterior.problem_type(), options.get("link", "auto"))
    return posterior.predict(inputs, **{"method": "glm", "contrasts": contrasts, **options})


def evaluated(folder: Path, model: nn.Module, kind: str, data: tiny.Rows, **options: Any) -> Any:
    """`Trainer.predict`, whose metrics are those of `evaluate`."""
    return tiny.trainer(folder, model, kind, **{"eval_method": "glm", **options}).predict(
        data, metric_key_prefix="eval"
    )


def assert_uncertainty(output: Any, predictive: Predictive) -> None:
    for name in ENTROPIES:
        np.testing.assert_allclose(output.uncertainty[name], getattr(predictive, name), rtol=1e-3, atol=1e-6)


# ---------------------------------------------------------------------------------------------- against metrics by hand


@pytest.mark.parametrize("num_labels", [2, 3])
def test_classification(num_labels: int, tmp_path: Path) -> None:
    """Two classes by the pairwise probit, three by draws of the logits."""
    model, data = tiny.bayesian(delta=1.0, num_labels=num_labels), tiny.dataset("single", 9, 5, num_labels=num_labels)
    output, predictive = evaluated(tmp_path, model, "single", data), predicted(model, data)
    assert (predictive.link_log_probs is None) == (num_labels == 3)
    probs, labels = predictive.probs.double().numpy(), data.columns["labels"].numpy()
    probs /= probs.sum(1, keepdims=True)
    expected = {
        "loss": metrics.negative_log_likelihood(probs, labels),
        "nll": metrics.negative_log_likelihood(probs, labels),
        "ece": metrics.expected_calibration_error(probs, labels),
        "brier": metrics.brier_score(probs, labels),
        **{name: float(getattr(predictive, name).mean()) for name in ENTROPIES},
    }
    for name, value in expected.items():
        assert output.metrics[f"eval_{name}"] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    np.testing.assert_allclose(output.predictions, predictive.mean_log_probs, atol=1e-5)
    assert_uncertainty(output, predictive)
    assert output.metrics["eval_mutual_information"] > 1e-3
    found = tiny.trainer(tmp_path, model, eval_dataset=data, eval_method="glm").evaluate()
    assert all(found[f"eval_{name}"] == output.metrics[f"eval_{name}"] for name in expected)
    sampled = tiny.trainer(tmp_path, model, eval_dataset=data).evaluate()
    assert abs(sampled["eval_nll"] - found["eval_nll"]) > 1e-3  # another prediction than sampling the network


@pytest.mark.parametrize("link", ["mc", "bridge", "probit_diagonal"])
def test_link(link: str, tmp_path: Path) -> None:
    model, data = tiny.bayesian(delta=1.0), data_of("single")
    output, predictive = evaluated(tmp_path, model, "single", data, eval_link=link), predicted(model, data, link=link)
    np.testing.assert_allclose(output.predictions, predictive.mean_log_probs, atol=1e-5)
    assert_uncertainty(output, predictive)


def test_multi_label(tmp_path: Path) -> None:
    model, data = tiny.bayesian("multi", delta=1.0), data_of("multi")
    output, predictive = evaluated(tmp_path, model, "multi", data), predicted(model, data)
    mean, labels = predictive.probs[..., 1].double(), data.columns["labels"].double()
    nll = torch.nn.functional.binary_cross_entropy(mean, labels, reduction="none").sum(1).mean()
    assert output.metrics["eval_nll"] == pytest.approx(nll.item(), rel=1e-4)
    np.testing.assert_allclose(output.predictions, torch.logit(mean), atol=1e-5)
    assert output.uncertainty["mutual_information"].shape == (9, 3)
    assert_uncertainty(output, predictive)


@pytest.mark.parametrize("num_labels", [1, 2])
def test_regression(num_labels: int, tmp_path: Path) -> None:
    """The density of an example's outputs is joint: N(y; m, S + noise^2 I)."""
    config = {"num_labels": num_labels, "problem_type": "regression"}
    model, data = tiny.bayesian("regression", delta=1.0, **config), data_of("regression")
    if num_labels == 2:
        data.columns["labels"] = torch.stack([data.columns["labels"], -data.columns["labels"]], dim=1)
    output = evaluated(tmp_path, model, "regression", data, noise_std=0.5)
    predictive = predicted(model, data, noise_std=0.5)
    labels = data.columns["labels"].reshape(9, num_labels)
    nll = 0.0
    for m, s, y in zip(predictive.logit_mean.double(), predictive.logit_covariance.double(), labels, strict=True):
        total, residual = s + 0.25 * torch.eye(num_labels), y - m
        nll += 0.5 * float(residual @ total.inverse() @ residual + (2 * torch.pi * total).logdet()) / 9
    assert output.metrics["eval_nll"] == output.metrics["eval_loss"] == pytest.approx(nll, rel=1e-4)
    rmse = (predictive.logit_mean - labels).square().mean().sqrt().item()
    assert output.metrics["eval_rmse"] == pytest.approx(rmse, rel=1e-4)
    np.testing.assert_allclose(output.predictions, predictive.logit_mean, rtol=1e-5, atol=1e-6)
    variance = predictive.logit_covariance.diagonal(dim1=1, dim2=2).reshape(predictive.mean.shape)
    np.testing.assert_allclose(output.uncertainty["epistemic_variance"], variance, rtol=1e-3)
    np.testing.assert_allclose(output.uncertainty["aleatoric_variance"], 0.25)


def test_token_classification(tmp_path: Path) -> None:
    """Labelled tokens are scored; the uncertainties of padding are left out, whatever it was batched with."""
    model, data = tiny.bayesian("token", delta=1.0), data_of("token")
    output, predictive = evaluated(tmp_path, model, "token", data), predicted(model, data)
    labels, attended = data.columns["labels"], data.columns["attention_mask"].bool()
    kept = labels != -100
    nll = -predictive.mean_log_probs[kept].gather(1, labels[kept][:, None]).mean()
    assert output.metrics["eval_nll"] == pytest.approx(nll.item(), rel=1e-4)
    for name in ENTROPIES:
        found = output.uncertainty[name]
        assert np.isnan(found[~attended.numpy()]).all()
        np.testing.assert_allclose(found[attended], getattr(predictive, name)[attended], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", ["single", "token", "regression"])
def test_batch_size_changes_nothing(kind: str, tmp_path: Path) -> None:
    model, data = tiny.bayesian(kind, delta=1.0), data_of(kind)
    options = {"noise_std": 0.5} if kind == "regression" else {}
    reference = evaluated(tmp_path, model, kind, data, **options)
    for batch_size in (1, 9):
        found = evaluated(tmp_path, model, kind, data, per_device_eval_batch_size=batch_size, **options)
        own = {name for name in found.metrics if not name.endswith(("runtime", "second", "time"))}
        assert {name: found.metrics[name] for name in own} == pytest.approx(
            {name: reference.metrics[name] for name in own}, rel=1e-4, abs=1e-6
        )
        np.testing.assert_allclose(found.predictions, reference.predictions, rtol=1e-4, atol=1e-5)


def test_unlabelled_inputs(tmp_path: Path) -> None:
    model, data = tiny.bayesian(delta=1.0), data_of("single")
    bare = tiny.Rows(**{name: value for name, value in data.columns.items() if name != "labels"})
    output = evaluated(tmp_path, model, "single", bare)
    assert "eval_nll" not in output.metrics and output.label_ids is None
    assert_uncertainty(output, predicted(model, data))


def test_seed_chooses_the_draws_of_logits(tmp_path: Path) -> None:
    model, data = tiny.bayesian(delta=1.0), data_of("single")
    output = evaluated(tmp_path, model, "single", data, eval_seed=4)
    np.testing.assert_allclose(output.predictions, predicted(model, data, seed=4).mean_log_probs, atol=1e-5)
    assert np.abs(output.predictions - predicted(model, data).mean_log_probs.numpy()).max() > 1e-5


@pytest.mark.parametrize("enabled", [True, False])
def test_evaluation_leaves_the_model_alone(enabled: bool, tmp_path: Path) -> None:
    """Gradients are taken whatever the caller has switched off, and none stays behind."""
    trainer = tiny.trainer(tmp_path, tiny.bayesian(delta=1.0), eval_method="glm")
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    with torch.set_grad_enabled(enabled):
        output = trainer.predict(data_of("single"))
        assert torch.is_grad_enabled() == enabled
    assert np.isfinite(output.predictions).all()
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


def test_mixed_precision_ends_before_the_jacobians(tmp_path: Path) -> None:
    """A run in bfloat16 has its autocast inside `forward`: the linearised network is the float32 one all the same."""
    model, data = tiny.bayesian(delta=1.0), data_of("single")
    expected = predicted(model, data)
    trainer = tiny.trainer(tmp_path, model, eval_method="glm", bf16=True)
    output = trainer.predict(data)
    np.testing.assert_allclose(output.predictions, expected.mean_log_probs, atol=1e-5)
    assert "forward" in vars(model)  # accelerate's is back
    with torch.no_grad():
        lower = model(data.columns["input_ids"]).logits - model._original_forward(data.columns["input_ids"]).logits
    assert lower.abs().max() > 1e-4


def test_evaluation_during_training(tmp_path: Path) -> None:
    options = {"max_steps": 3, "eval_steps": 1}
    results = []
    for strategy in ("no", "steps"):
        trainer = tiny.trainer(tmp_path, eval_strategy=strategy, eval_method="glm", **options)
        trainer.train()
        results.append(trainer.model.state_dict())
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    assert sum("eval_nll" in entry for entry in trainer.state.log_history) == 3


# --------------------------------------------------------------------------------------------------------- which method


class Gaussian(PointPosterior):
    """Logits of fixed variance around the model's own; it remembers how it was asked."""

    default_method = "glm"

    def predict(self, inputs: Any, *, method: str = "sample", **options: Any) -> Predictive:  # type: ignore[override]
        self.asked = {"method": method, **options}
        mean = super().predict(inputs, method="sample").mean_log_probs
        covariance = torch.eye(mean.shape[-1]).expand(*mean.shape, mean.shape[-1])
        return linearized_predictive(mean, covariance, options["problem_type"], link=options["link"])


@pytest.mark.parametrize(("given", "found"), [(None, "glm"), ("mc_glm", "mc_glm"), ("sample", None), ("nn", None)])
def test_method_in_force(given: str | None, found: str | None, tmp_path: Path) -> None:
    """The argument, else the posterior's own; sampling never asks for a linearised prediction."""
    trainer = tiny.trainer(tmp_path, tiny.plain(), eval_method=given, eval_seed=3)
    trainer.posterior = posterior = Gaussian(trainer.model)
    output = trainer.predict(data_of("single"))
    if found is None:
        assert not hasattr(posterior, "asked")
        assert np.abs(output.uncertainty["mutual_information"]).max() < 1e-6
    else:
        expected = {"method": found, "num_samples": 3, "seed": 3, "link": "auto", "noise_std": None, "contrasts": True}
        assert posterior.asked == {**expected, "problem_type": "single_label_classification"}
        assert output.uncertainty["mutual_information"].min() > 1e-3


def test_noise_that_the_posterior_records(tmp_path: Path) -> None:
    """A plain model with a posterior: its number serves every method, the argument wins."""

    class Noisy(PointPosterior):
        def recorded_noise_std(self) -> float:
            return 0.5

    trainer = tiny.trainer(tmp_path, tiny.plain("regression"), "regression")
    assert "eval_nll" not in trainer.evaluate()
    trainer.posterior = Noisy(trainer.model)
    recorded = trainer.evaluate()
    assert trainer.noise_std() == 0.5
    trainer.posterior, trainer.args.noise_std = None, 0.5
    assert trainer.evaluate()["eval_nll"] == recorded["eval_nll"]
    trainer.posterior, trainer.args.noise_std = Noisy(trainer.model), 0.3
    assert trainer.evaluate()["eval_nll"] != recorded["eval_nll"]


@pytest.mark.parametrize("kind", ["question", "causal", "seq2seq", "masked"])
def test_heads_with_too_many_logits(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The posterior's default gives way, and says so once; what the user asked for does not."""
    trainer = tiny.trainer(tmp_path, tiny.plain(kind), kind)
    trainer.posterior = posterior = Gaussian(trainer.model)
    with caplog.at_level(logging.WARNING):
        found = trainer.evaluate()
        trainer.evaluate()
    assert found["eval_nll"] > 0 and not hasattr(posterior, "asked")
    assert sum("sampling it instead" in record.message for record in caplog.records) == 1
    trainer.args.eval_method = "glm"
    with pytest.raises(ValueError, match="`eval_method`='glm' linearises the network, but .* too many logits"):
        trainer.evaluate()


def test_a_posterior_that_is_not_gaussian(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, tiny.plain(), eval_method="glm")
    trainer.posterior = PointPosterior(trainer.model)
    with pytest.raises(ValueError, match="needs a Gaussian posterior, got PointPosterior"):
        trainer.evaluate()


def test_a_point_estimate_is_the_same_by_every_method(tmp_path: Path) -> None:
    found, reference = (
        tiny.trainer(tmp_path, tiny.plain(), eval_method=method).evaluate()["eval_nll"] for method in ("glm", None)
    )
    assert found == reference


def test_a_link_that_does_not_fit_the_head(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`link`='probit' is for 2 classes, got 3"):
        tiny.trainer(tmp_path, eval_method="glm", eval_link="probit").evaluate()


# ---------------------------------------------------------------------------------------------------- score_predictive


def test_draws_are_scored_alike_one_by_one_and_together() -> None:
    outputs: list[Tensor] = list(torch.randn(4, 5, 3))
    inputs = {"labels": torch.tensor([0, 1, 2, 0, 1])}
    draws = torch.stack(outputs).log_softmax(-1)
    problem = "single_label_classification"
    one_by_one = predict_batch(outputs, inputs, problem)
    together = score_predictive(Predictive(problem_type=problem, log_probs=draws), inputs, problem)
    for found, expected in ((together.uncertainty, one_by_one.uncertainty), (together.scores, one_by_one.scores)):
        assert set(found) == set(expected)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)
    values = torch.randn(4, 5)
    found = score_predictive(
        Predictive(problem_type="regression", values=values), {"labels": values[0]}, "regression", 0.5
    )
    expected = predict_batch(values, {"labels": values[0]}, "regression", 0.5)
    assert torch.equal(found.scores["nll"], expected.scores["nll"])
    assert torch.equal(found.uncertainty["epistemic_variance"], expected.uncertainty["epistemic_variance"])


def test_a_regression_without_noise_or_labels() -> None:
    mean, covariance = torch.randn(5, 1), torch.ones(5, 1, 1)
    predictive = linearized_predictive(mean, covariance, "regression")
    unlabelled = score_predictive(predictive, {}, "regression")
    assert not unlabelled.scores and list(unlabelled.uncertainty) == ["epistemic_variance"]
    labelled = score_predictive(predictive, {"labels": torch.zeros(5)}, "regression")
    torch.testing.assert_close(labelled.loss, mean.square().mean())
    known = linearized_predictive(mean, covariance, "regression", noise_std=0.5)
    nll = score_predictive(known, {"labels": torch.zeros(5)}, "regression").scores["nll"]
    torch.testing.assert_close(nll, -known.log_prob(torch.zeros(5)))
