"""Monte-Carlo evaluation: metrics against brute force over draws, and everything the stock evaluation loop offers."""

import contextlib
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import EvalPrediction
from transformers.trainer_utils import PredictionOutput

from bayeformers import fixed_draw, metrics, posterior_mean
from bayeformers.posteriors import PointPosterior, VariationalPosterior
from bayeformers.training import BayesianPredictionOutput
from bayeformers.training.columns import predict_batch
from bayeformers.training.evaluator import Evaluation
from tests.training import tiny

DRAWS = 3
ENTROPIES = ("predictive_entropy", "expected_entropy", "mutual_information")


def draws(model: nn.Module, data: tiny.Rows, field: str = "logits", seed: int = 0) -> Tensor:
    """Logits (S, N, ...) of the first draws, each by its own held forward of the whole data."""
    names = ("input_ids", "attention_mask")
    inputs = {name: data.columns[name] for name in names}
    model.eval()
    outputs = []
    for index in range(DRAWS):
        with torch.no_grad(), fixed_draw(model, index, seed):
            outputs.append(model(**inputs)[field])
    return torch.stack(outputs).double()


@pytest.fixture
def data() -> tiny.Rows:
    return tiny.dataset("single", 9, seed=5)


def test_classification_metrics_are_those_of_the_averaged_probabilities(tmp_path: Path, data: tiny.Rows) -> None:
    model = tiny.bayesian(delta=1.0)
    found = tiny.trainer(tmp_path, model, eval_dataset=data).evaluate()
    log_probs = draws(model, data).log_softmax(-1).numpy()
    probs, labels = np.exp(log_probs).mean(0), data.columns["labels"].numpy()
    expected = {
        "loss": metrics.negative_log_likelihood(probs, labels),
        "nll": metrics.negative_log_likelihood(probs, labels),
        "ece": metrics.expected_calibration_error(probs, labels),
        "brier": metrics.brier_score(probs, labels),
        "predictive_entropy": metrics.predictive_entropy(log_probs).mean(),
        "expected_entropy": metrics.expected_entropy(log_probs).mean(),
        "mutual_information": metrics.mutual_information(log_probs).mean(),
    }
    for name, value in expected.items():
        assert found[f"eval_{name}"] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    assert found["eval_mutual_information"] > 1e-3  # the draws do differ


def test_predictions_are_log_mean_probabilities(tmp_path: Path, data: tiny.Rows) -> None:
    model = tiny.bayesian(delta=1.0)
    output = tiny.trainer(tmp_path, model).predict(data)
    log_probs = draws(model, data).log_softmax(-1)
    np.testing.assert_allclose(output.predictions, log_probs.exp().mean(0).log(), atol=1e-5)
    np.testing.assert_allclose(
        output.uncertainty["mutual_information"], metrics.mutual_information(log_probs.numpy()), atol=1e-5
    )


def test_predict_returns_a_prediction_output_with_uncertainty(tmp_path: Path, data: tiny.Rows) -> None:
    output = tiny.trainer(tmp_path).predict(data)
    assert isinstance(output, PredictionOutput)
    assert isinstance(output, BayesianPredictionOutput)
    predictions, label_ids, found = output
    assert predictions.shape == (9, 3)
    assert label_ids.tolist() == data.columns["labels"].tolist()
    assert {"test_loss", "test_nll", "test_ece"} <= set(found)
    assert {name: value.shape for name, value in output.uncertainty.items()} == dict.fromkeys(ENTROPIES, (9,))


def test_unlabelled_predict(tmp_path: Path, data: tiny.Rows) -> None:
    bare = tiny.Rows(**{name: value for name, value in data.columns.items() if name != "labels"})
    trainer = tiny.trainer(tmp_path)
    output = trainer.predict(bare)
    labelled = trainer.predict(data)
    assert output.label_ids is None
    assert "test_nll" not in output.metrics
    assert "test_mutual_information" in output.metrics
    np.testing.assert_array_equal(output.predictions, labelled.predictions)


@pytest.mark.parametrize("batch_size", [1, 2, 9])
def test_batch_size_changes_nothing(batch_size: int, tmp_path: Path, data: tiny.Rows) -> None:
    model = tiny.bayesian(delta=1.0)
    reference = tiny.trainer(tmp_path, model, eval_dataset=data).evaluate()
    found = tiny.trainer(tmp_path, model, eval_dataset=data, per_device_eval_batch_size=batch_size).evaluate()
    for name in ("loss", "ece", "brier", "mutual_information", "aurc"):
        assert found[f"eval_{name}"] == pytest.approx(reference[f"eval_{name}"], rel=1e-5, abs=1e-6)


def test_seed_chooses_the_draws(tmp_path: Path, data: tiny.Rows) -> None:
    model = tiny.bayesian(delta=1.0)
    output = tiny.trainer(tmp_path, model, eval_seed=4).predict(data)
    expected = draws(model, data, seed=4).log_softmax(-1).exp().mean(0).log()
    np.testing.assert_allclose(output.predictions, expected, atol=1e-5)


def test_users_compute_metrics_sees_log_mean_probabilities_and_nothing_else(tmp_path: Path, data: tiny.Rows) -> None:
    seen: list[EvalPrediction] = []

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        seen.append(prediction)
        return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean()), "ece": -1.0}

    found = tiny.trainer(tmp_path, eval_dataset=data, compute_metrics=compute_metrics).evaluate()
    (prediction,) = seen
    assert prediction.predictions.shape == (9, 3)
    np.testing.assert_allclose(np.exp(prediction.predictions).sum(1), 1, rtol=1e-5)
    assert 0 <= found["eval_accuracy"] <= 1
    assert found["eval_ece"] == -1  # the user's own name wins


def test_evaluation_in_training_uses_fewer_draws(tmp_path: Path, data: tiny.Rows) -> None:
    model = tiny.bayesian(delta=1.0)
    trainer = tiny.trainer(
        tmp_path, model, eval_dataset=data, num_eval_samples_during_training=1, eval_strategy="steps", eval_steps=1,
        learning_rate=0.0, rho_learning_rate=1e-12,
    )  # fmt: skip
    trainer.train()
    during = [entry for entry in trainer.state.log_history if "eval_mutual_information" in entry]
    assert all(abs(entry["eval_mutual_information"]) < 1e-6 for entry in during)  # one draw agrees with itself
    assert trainer.evaluate()["eval_mutual_information"] > 1e-3


def test_evaluation_leaves_random_state_parameters_and_mode_alone(tmp_path: Path, data: tiny.Rows) -> None:
    trainer = tiny.trainer(tmp_path, eval_dataset=data)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    trainer.evaluate()
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())


def test_evaluating_does_not_change_the_training_run(tmp_path: Path) -> None:
    results = []
    for strategy in ("no", "steps"):
        trainer = tiny.trainer(tmp_path, max_steps=3, eval_strategy=strategy, eval_steps=1)
        trainer.train()
        results.append(trainer.model.state_dict())
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_dictionary_of_datasets(tmp_path: Path, data: tiny.Rows) -> None:
    other = tiny.dataset("single", 7, seed=8)
    trainer = tiny.trainer(tmp_path, eval_dataset={"clean": data, "shifted": other})
    found = trainer.evaluate()
    alone = trainer.evaluate(other)
    assert found["eval_shifted_nll"] == alone["eval_nll"] == alone["eval_loss"]
    assert "eval_clean_mutual_information" in found


def test_preprocess_logits_for_metrics(tmp_path: Path, data: tiny.Rows) -> None:
    shapes: list[tuple[int, ...]] = []

    def argmax(logits: Tensor, labels: Tensor) -> Tensor:
        assert logits.shape[-1] == 3
        return logits.argmax(-1)

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        shapes.append(prediction.predictions.shape)
        return {"accuracy": float((prediction.predictions == prediction.label_ids).mean())}

    trainer = tiny.trainer(
        tmp_path, eval_dataset=data, preprocess_logits_for_metrics=argmax, compute_metrics=compute_metrics
    )
    assert "eval_nll" in trainer.evaluate()
    assert shapes == [(9,)]


def test_batch_eval_metrics(tmp_path: Path, data: tiny.Rows) -> None:
    right: list[Tensor] = []

    def compute_metrics(prediction: Any, compute_result: bool) -> dict[str, float]:
        right.append(prediction.predictions.argmax(-1) == prediction.label_ids)
        return {"accuracy": float(torch.cat(right).float().mean())} if compute_result else {}

    model = tiny.bayesian(delta=1.0)
    found = tiny.trainer(
        tmp_path, model, eval_dataset=data, batch_eval_metrics=True, compute_metrics=compute_metrics
    ).evaluate()
    assert len(right) == 3
    assert found["eval_nll"] == pytest.approx(tiny.trainer(tmp_path, model, eval_dataset=data).evaluate()["eval_nll"])
    assert "eval_accuracy" in found


def test_include_for_metrics(tmp_path: Path, data: tiny.Rows) -> None:
    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        assert prediction.inputs.shape == (9, tiny.LENGTH)
        return {"mean_loss": float(np.mean(prediction.losses))}

    tiny.trainer(
        tmp_path, eval_dataset=data, include_for_metrics=["inputs", "loss"], compute_metrics=compute_metrics
    ).evaluate()


def test_accumulated_evaluation_and_loss_only(tmp_path: Path, data: tiny.Rows) -> None:
    model = tiny.bayesian(delta=1.0)
    plain = tiny.trainer(tmp_path, model, eval_dataset=data).evaluate()
    for kwargs in ({"eval_accumulation_steps": 1}, {"prediction_loss_only": True}):
        assert tiny.trainer(tmp_path, model, eval_dataset=data, **kwargs).evaluate()["eval_ece"] == plain["eval_ece"]


# -- every head ------------------------------------------------------------------------------------------------------


def test_regression(tmp_path: Path) -> None:
    data, model = tiny.dataset("regression", 9, seed=5), tiny.bayesian("regression", delta=1.0)
    trainer = tiny.trainer(tmp_path, model, "regression", eval_dataset=data, noise_std=0.5)
    found, output = trainer.evaluate(), trainer.predict(data)
    means, labels = draws(model, data).squeeze(-1), data.columns["labels"]
    density = torch.distributions.Normal(means, 0.5).log_prob(labels).exp().mean(0)
    assert found["eval_loss"] == found["eval_nll"] == pytest.approx(-density.log().mean().item(), rel=1e-4)
    assert found["eval_rmse"] == pytest.approx((means.mean(0) - labels).square().mean().sqrt().item(), rel=1e-4)
    assert output.predictions.shape == (9, 1)
    np.testing.assert_allclose(output.uncertainty["epistemic_variance"], means.var(0, correction=0), rtol=1e-3)
    np.testing.assert_allclose(output.uncertainty["aleatoric_variance"], 0.25)


@pytest.mark.parametrize("freeze", [True, False])
def test_residual_noise_is_estimated_and_stored(freeze: bool, tmp_path: Path) -> None:
    model = tiny.bayesian("regression", freeze=freeze)
    trainer = tiny.trainer(tmp_path, model, "regression", learning_rate=1e-2)
    data = trainer.train_dataset.columns

    def residual() -> float:
        model.eval()
        with torch.no_grad(), posterior_mean(model):
            means = model(data["input_ids"], data["attention_mask"]).logits.squeeze(-1)
        return (means - data["labels"]).square().mean().sqrt().item()

    start = residual()
    trainer.train()
    end = residual()
    assert (start == end) == freeze
    assert model.config.bayesian["noise_std"] == pytest.approx(end, rel=1e-5)
    assert trainer.predict(trainer.eval_dataset).uncertainty["aleatoric_variance"][0] == pytest.approx(end**2, rel=1e-5)


def test_point_estimate_of_a_regression_is_judged_by_its_squared_error(tmp_path: Path) -> None:
    found = tiny.trainer(tmp_path, tiny.plain("regression"), "regression").evaluate()
    assert found["eval_loss"] == pytest.approx(found["eval_rmse"] ** 2)
    assert "eval_nll" not in found


def test_multi_label(tmp_path: Path) -> None:
    data, model = tiny.dataset("multi", 9, seed=5), tiny.bayesian("multi", delta=1.0)
    output = tiny.trainer(tmp_path, model, "multi").predict(data)
    probs = draws(model, data).sigmoid()
    mean, labels = probs.mean(0), data.columns["labels"].double()
    nll = torch.nn.functional.binary_cross_entropy(mean, labels, reduction="none").sum(1).mean()
    assert output.metrics["test_nll"] == pytest.approx(nll.item(), rel=1e-4)
    np.testing.assert_allclose(output.predictions, mean.logit(), atol=1e-5)
    binary = torch.stack([1 - mean, mean], -1).flatten(0, 1).numpy()
    flat = labels.flatten().long().numpy()
    assert output.metrics["test_brier"] == pytest.approx(metrics.brier_score(binary, flat), rel=1e-4)
    assert output.metrics["test_ece"] == pytest.approx(metrics.expected_calibration_error(binary, flat), abs=1e-5)
    assert output.uncertainty["mutual_information"].shape == (9, 3)


@pytest.mark.parametrize("kind", ["token", "masked", "causal", "llama", "seq2seq"])
def test_token_level_metrics_count_labelled_tokens_only(kind: str, tmp_path: Path) -> None:
    name = "causal" if kind == "llama" else kind
    data, model = tiny.dataset(name, 9, seed=5), tiny.bayesian(kind, delta=1.0)
    output = tiny.trainer(tmp_path, model, name).predict(data)
    log_probs, labels = torch.as_tensor(output.predictions).double(), data.columns["labels"]
    attended = data.columns["attention_mask"].bool()
    if kind in ("causal", "llama"):
        log_probs, labels = log_probs[:, :-1], labels[:, 1:]
    kept = labels != -100
    expected = -log_probs[kept].gather(1, labels[kept][:, None]).mean()
    assert output.metrics["test_nll"] == pytest.approx(expected.item(), rel=1e-4)
    assert output.predictions.shape[:2] == (9, tiny.LENGTH)
    uncertainty = output.uncertainty["mutual_information"]
    assert uncertainty.shape == (9, tiny.LENGTH)
    if kind != "seq2seq":  # whose decoder has no mask
        assert np.isnan(uncertainty[~attended.numpy()]).all()
        assert not np.isnan(uncertainty[attended.numpy()]).any()


def test_question_answering(tmp_path: Path) -> None:
    data, model = tiny.dataset("question", 9, seed=5), tiny.bayesian("question", delta=1.0)
    output = tiny.trainer(tmp_path, model, "question", per_device_eval_batch_size=2).predict(data)
    mask, nll = data.columns["attention_mask"].bool(), 0.0
    for side, predicted in zip(("start", "end"), output.predictions, strict=True):
        logits = draws(model, data, f"{side}_logits").masked_fill(~mask, -torch.inf)
        mean = logits.softmax(-1).mean(0)
        np.testing.assert_allclose(np.exp(predicted), mean, atol=1e-5)
        nll -= mean.gather(1, data.columns[f"{side}_positions"][:, None]).log().mean().item()
    assert output.metrics["test_nll"] == pytest.approx(nll, rel=1e-4)
    assert len(output.label_ids) == 2
    assert output.uncertainty["mutual_information"].shape == (9,)


def test_padding_to_the_longest_of_the_batch_changes_nothing(tmp_path: Path) -> None:
    """Question answering's softmax runs over positions: padding must not take part in it."""
    logits = {"start_logits": torch.randn(2, 4), "end_logits": torch.randn(2, 4)}
    longer = {name: torch.cat([value, torch.randn(2, 3)], 1) for name, value in logits.items()}
    mask = torch.ones(2, 4).long()
    short = predict_batch([logits], {"attention_mask": mask}, "question_answering")
    padded = predict_batch(
        [longer], {"attention_mask": torch.cat([mask, torch.zeros(2, 3).long()], 1)}, "question_answering"
    )
    for name in ENTROPIES:
        torch.testing.assert_close(short.uncertainty[name], padded.uncertainty[name])


# -- whose posterior -------------------------------------------------------------------------------------------------


def test_posterior_of_a_converted_model(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, draw_cache_bytes=123)
    assert isinstance(trainer.posterior, VariationalPosterior)
    assert trainer.posterior.draw_cache_bytes == 123
    with pytest.raises(ValueError, match="`posterior` cannot be set: the model is Bayesian"):
        trainer.posterior = PointPosterior(trainer.model)


def test_a_given_posterior_is_evaluated(tmp_path: Path, data: tiny.Rows) -> None:
    trainer = tiny.trainer(tmp_path, tiny.plain(), eval_dataset=data)
    point = trainer.evaluate()
    model = trainer.model

    class Shifted(PointPosterior):
        def draw(self, index: int, seed: int = 0) -> Any:
            from contextlib import contextmanager

            @contextmanager
            def shifted():
                kept = model.classifier.weight.detach().clone()
                with torch.no_grad():
                    model.classifier.weight.add_(1.0)
                try:
                    yield
                finally:
                    with torch.no_grad():
                        model.classifier.weight.copy_(kept)

            return shifted()

        def random_parameters(self) -> Any:
            return [model.classifier.weight]

    trainer.posterior = Shifted(model)
    assert trainer.evaluate()["eval_nll"] != point["eval_nll"]
    trainer.posterior = None
    assert trainer.evaluate()["eval_nll"] == point["eval_nll"]


def test_plain_evaluation_is_the_stock_one(tmp_path: Path, data: tiny.Rows) -> None:
    model = tiny.plain()
    output = tiny.trainer(tmp_path, model).predict(data)
    model.eval()
    with torch.no_grad():
        logits = model(data.columns["input_ids"], data.columns["attention_mask"]).logits
    np.testing.assert_allclose(output.predictions, logits.log_softmax(-1), atol=1e-5)
    assert np.abs(output.uncertainty["mutual_information"]).max() < 1e-6


def test_unknown_head_is_evaluated_by_its_own_loss(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 4)

        def forward(self, features: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
            output = self.head(features)
            return {"loss": (output - features).square().mean(), "reconstruction": output}

    from bayeformers import to_bayesian

    data = tiny.Rows(features=torch.randn(8, 4), labels=torch.randn(8, 4))
    trainer = tiny.trainer(tmp_path, to_bayesian(Odd()), train_dataset=data, eval_dataset=data)
    with caplog.at_level(logging.WARNING):
        trainer.train()
        found = trainer.evaluate()
    assert found["eval_loss"] > 0
    assert "eval_nll" not in found
    assert any("likelihood of Odd is unknown" in record.message for record in caplog.records)


def test_an_evaluation_needs_no_loop(tmp_path: Path, data: tiny.Rows) -> None:
    """Batches of other sizes, kept one by one, have the metrics of the trainer's loop."""
    model = tiny.bayesian(delta=1.0)
    trainer = tiny.trainer(tmp_path, model, eval_dataset=data)
    evaluation = Evaluation(
        model,
        trainer.args,
        VariationalPosterior(model),
        num_samples=DRAWS,
        has_own_loss=False,
        noise_std=lambda: None,
        autocast=contextlib.nullcontext,
        say=pytest.fail,
    )
    for rows in (slice(0, 5), slice(5, 9)):
        batch = evaluation.predict({name: column[rows] for name, column in data.columns.items()})
        evaluation.keep(batch, lambda column: column.numpy())
    expected = trainer.evaluate()
    for name, value in evaluation.metrics().items():
        assert value == pytest.approx(expected[f"eval_{name}"], rel=1e-5), name
