"""`noise_std="head"`: a regression that predicts its own noise, from the loss to the reloaded model."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, Normal

import bayeformers
from bayeformers import VariationalPosterior, calibrate_delta, fixed_draw, kl_divergence
from bayeformers.linearized.links import linearized_predictive
from bayeformers.predictive import Predictive
from bayeformers.training import BayesianTrainer, item_nll
from bayeformers.training.columns import predict_batch, score_predictive
from tests.training import steps, tiny


def plain(targets: int = 1) -> nn.Module:
    return tiny.plain("regression", num_labels=2 * targets, problem_type="regression")


def head(targets: int = 1, **kwargs: Any) -> nn.Module:
    return tiny.bayesian("regression", num_labels=2 * targets, problem_type="regression", **kwargs)


def data(targets: int = 1, num_examples: int = 20) -> tiny.Rows:
    rows = tiny.dataset("regression", num_examples)
    if targets > 1:
        first = rows.columns["labels"]
        rows.columns["labels"] = torch.stack([first, -first, first.square()][:targets], 1)
    return rows


def trainer(folder: Path, model: nn.Module | None = None, targets: int = 1, **kwargs: Any) -> BayesianTrainer:
    model = head(targets) if model is None else model
    given = {"train_dataset": data(targets), "eval_dataset": data(targets, 9), "noise_std": "head", **kwargs}
    return tiny.trainer(folder, model, "regression", **given)


def normals(output: Tensor) -> Normal:
    mean, log_variance = output.double().chunk(2, -1)
    return Normal(mean, (log_variance / 2).exp())


def draws(model: nn.Module, inputs: dict[str, Tensor], count: int) -> list[Tensor]:
    model.eval()
    outputs = []
    for index in range(count):
        with torch.no_grad(), fixed_draw(model, index):
            outputs.append(model(**inputs).logits)
    return outputs


def split(rows: tiny.Rows) -> tuple[dict[str, Tensor], Tensor]:
    inputs = dict(rows.columns)
    return inputs, inputs.pop("labels")


@pytest.mark.parametrize("targets", [1, 3])
def test_item_nll_is_the_normal_s(targets: int) -> None:
    output = torch.randn(5, 2 * targets, generator=torch.Generator().manual_seed(0))
    labels = torch.randn(5, targets, generator=torch.Generator().manual_seed(1))
    expected = -normals(output).log_prob(labels.double()).sum(1)
    found = item_nll({"logits": output}, {"labels": labels if targets > 1 else labels[:, 0]}, "regression", "head")
    torch.testing.assert_close(found.values.double(), expected)
    assert found.mask.all()


@pytest.mark.parametrize("targets", [1, 2])
def test_gradient_of_the_elbo(targets: int, tmp_path: Path) -> None:
    """The model's own loss, which would not fit the shapes, is never asked for."""
    gradients = steps.Gradients()
    made = trainer(
        tmp_path, targets=targets, max_steps=1, per_device_train_batch_size=20, max_grad_norm=0.0, callbacks=[gradients]
    )  # fmt: skip
    with fixed_draw(made.model, 3):
        made.train()
    model, (inputs, labels) = head(targets).train(), split(data(targets))
    with fixed_draw(model, 3):
        nll = -normals(model(**inputs).logits).log_prob(labels.double().reshape(20, -1)).sum()
    (nll / 20 + kl_divergence(model) / 20).backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients.steps[0]["grads"][name], parameter.grad, rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize("targets", [1, 2])
def test_evaluation_mixes_the_draws_densities(targets: int, tmp_path: Path) -> None:
    model, rows = head(targets), data(targets, 9)
    made = trainer(tmp_path, model, targets, eval_dataset=rows)
    metrics, output = made.evaluate(), made.predict(rows)
    inputs, labels = split(rows)
    labels = labels.double().reshape(9, -1)
    found = [normals(z) for z in draws(model, inputs, 3)]
    log_prob = torch.stack([n.log_prob(labels).sum(1) for n in found]).logsumexp(0) - math.log(3)
    means, variances = torch.stack([n.mean for n in found]), torch.stack([n.variance for n in found])
    assert metrics["eval_nll"] == metrics["eval_loss"] == pytest.approx(-float(log_prob.mean()), rel=1e-5)
    assert metrics["eval_rmse"] == pytest.approx(float((labels - means.mean(0)).square().mean().sqrt()), rel=1e-5)
    expected = {"aleatoric_variance": variances.mean(0), "epistemic_variance": means.var(0, correction=0)}
    for name, value in expected.items():
        assert metrics[f"eval_{name}"] == pytest.approx(float(value.mean()), rel=1e-4)
        torch.testing.assert_close(
            torch.as_tensor(output.uncertainty[name]).double().reshape(9, -1), value, rtol=1e-4, atol=1e-6
        )
    torch.testing.assert_close(torch.as_tensor(output.predictions).double(), means.mean(0), rtol=1e-5, atol=1e-6)


def test_predict_after_training_and_reload(tmp_path: Path) -> None:
    made = trainer(tmp_path, save_strategy="steps", save_steps=1)
    made.train()
    made.save_model()
    assert made.model.config.bayesian["noise_std"] == "head"
    loaded, (inputs, labels) = bayeformers.from_pretrained(tmp_path), split(data(1, 9))
    assert loaded.config.bayesian["noise_std"] == "head"
    for model in (made.model, loaded):
        predictive = bayeformers.predict(model, inputs, num_samples=4)
        found = [normals(z) for z in draws(model, inputs, 4)]
        density = torch.stack([n.log_prob(labels.double()[:, None])[:, 0] for n in found]).logsumexp(0) - math.log(4)
        torch.testing.assert_close(predictive.log_prob(labels).double(), density, rtol=1e-4, atol=1e-5)
        variance = torch.stack([n.variance[:, 0] for n in found]).mean(0)
        torch.testing.assert_close(predictive.aleatoric_variance.double(), variance, rtol=1e-5, atol=1e-6)
        assert predictive.noise_std == "head" and predictive.mean.shape == (9,)
    # what the model records decides where the arguments name no noise, in evaluation and in training
    again = trainer(tmp_path / "again", loaded, noise_std="residual")
    assert again.evaluate()["eval_nll"] == pytest.approx(made.evaluate()["eval_nll"], rel=1e-6)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert again.model.config.bayesian["noise_std"] == "head"


def test_an_unconverted_model_trains_on_its_gaussian_likelihood(tmp_path: Path) -> None:
    gradients = steps.Gradients()
    model = plain(2)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    arguments = {"max_steps": 1, "per_device_train_batch_size": 20, "max_grad_norm": 0.0, "callbacks": [gradients]}
    made = trainer(tmp_path, model, 2, **arguments)
    made.train()
    reference, (inputs, labels) = plain(2).eval(), split(data(2))
    (-normals(reference(**inputs).logits).log_prob(labels.double()).sum() / 20).backward()
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(gradients.steps[0]["grads"][name], parameter.grad, rtol=2e-4, atol=2e-6)
    inputs, labels = split(data(2, 9))
    with torch.no_grad():
        nll = -normals(made.model.eval()(**inputs).logits).log_prob(labels.double()).sum(1).mean()
    assert made.evaluate()["eval_nll"] == pytest.approx(float(nll), rel=1e-5)


def test_linearised_takes_the_means_covariance_and_the_noise_at_the_mean(tmp_path: Path) -> None:
    model, (inputs, labels) = head(2), split(data(2, 9))
    posterior = VariationalPosterior(model)
    mean, covariance = posterior.linearize(inputs)
    assert mean.shape == (9, 4) and covariance.shape == (9, 4, 4)
    predictive = posterior.predict(inputs, method="glm", noise_std="head")
    noise = mean[:, 2:].exp()
    torch.testing.assert_close(predictive.mean, mean[:, :2])
    torch.testing.assert_close(predictive.aleatoric_variance, noise)
    marginal = covariance.diagonal(dim1=1, dim2=2)[:, :2]
    torch.testing.assert_close(predictive.epistemic_variance, marginal)
    expected = Normal(mean[:, :2], (marginal + noise).sqrt()).log_prob(labels)
    torch.testing.assert_close(predictive.log_prob(labels), expected)
    metrics = trainer(tmp_path, model, 2, eval_dataset=data(2, 9), eval_method="glm").evaluate()
    joint = MultivariateNormal(mean[:, :2], covariance[:, :2, :2] + noise.diag_embed()).log_prob(labels)
    assert metrics["eval_nll"] == pytest.approx(-float(joint.mean()), rel=1e-4)
    assert metrics["eval_aleatoric_variance"] == pytest.approx(float(noise.mean()), rel=1e-5)


def test_calibrate_delta(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    made.train()
    inputs, labels = split(data(1, 9))
    for method in ("sample", "glm"):
        delta = calibrate_delta(made.model, inputs, labels, method=method, num_samples=2, progress=False)
        assert delta > 0


def test_score_of_a_sampled_predictive_is_that_of_its_outputs() -> None:
    outputs = [torch.randn(6, 4, generator=torch.Generator().manual_seed(s)) for s in range(3)]
    inputs = {"labels": torch.randn(6, 2, generator=torch.Generator().manual_seed(9))}
    mean, log_variance = torch.stack(outputs).chunk(2, -1)
    predictive = Predictive(
        problem_type="regression", values=mean, noise_std="head", noise_variance=log_variance.exp()
    )  # fmt: skip
    first = predict_batch(outputs, inputs, "regression", "head")
    second = score_predictive(predictive, inputs, "regression")
    for name in ("nll", "squared_error"):
        torch.testing.assert_close(first.scores[name], second.scores[name])
    torch.testing.assert_close(first.uncertainty["aleatoric_variance"], predictive.aleatoric_variance)


# -- bad input -------------------------------------------------------------------------------------------------------


def test_the_head_must_be_a_regression(tmp_path: Path) -> None:
    made = tiny.trainer(tmp_path, noise_std="head")
    for call in (made.train, made.evaluate):
        with pytest.raises(
            ValueError, match='`noise_std`="head" is for regressions, got a single_label_classification'
        ):
            call()


def test_odd_number_of_outputs(tmp_path: Path) -> None:
    made = tiny.trainer(tmp_path, kind="regression", noise_std="head")
    for call in (made.train, made.evaluate):
        with pytest.raises(ValueError, match="`output` of a variance head must have 2 L columns"):
            call()


def test_labels_of_another_number(tmp_path: Path) -> None:
    made = trainer(tmp_path, head(2), 1)
    for call in (made.train, made.evaluate):
        with pytest.raises(ValueError, match="`labels` must have 8 numbers"):
            call()


def test_no_laplace_posterior(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='`noise_std`="head" has no Laplace posterior'):
        trainer(tmp_path, plain()).fit_laplace()


@pytest.mark.parametrize("noise", ["heads", -1.0, math.nan, True])
def test_no_such_noise(noise: Any) -> None:
    model, (inputs, _) = head(), split(data(1, 4))
    with pytest.raises(ValueError, match='`noise_std` must be finite and > 0, or "head"'):
        bayeformers.predict(model, inputs, noise_std=noise)


@pytest.mark.parametrize(
    "fields",
    [
        {"noise_std": "head"},
        {"noise_variance": torch.ones(3, 5)},
        {"noise_std": "head", "noise_variance": torch.ones(3, 4)},
        {"noise_std": "head", "noise_variance": torch.ones(1, 5)},
    ],
)
def test_predictive_wants_variance_and_head_together(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="`noise_variance`"):
        Predictive(problem_type="regression", values=torch.zeros(3, 5), **fields)


def test_linearised_head_of_odd_outputs() -> None:
    with pytest.raises(ValueError, match="must have 2 L columns"):
        linearized_predictive(torch.zeros(2, 3), torch.eye(3).expand(2, 3, 3), "regression", noise_std="head")
