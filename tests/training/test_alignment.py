"""The calibration loss in training: its gradient, its thresholds, its log entries, and what is refused."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bayeformers import fixed_draw, kl_divergence
from bayeformers.losses import auavu_loss, avuc_loss, eac_loss, eau_loss, gaussian_nll
from bayeformers.training import BayesianTrainingArguments
from tests.training import steps, tiny

WEIGHT = 0.7
GIVEN = {"calibration_weight": WEIGHT, "calibration_warmup_ratio": 0.0}


def head(seed: int = 0) -> nn.Module:
    """A converted regression with a variance head of one target."""
    return tiny.bayesian("regression", num_labels=2, problem_type="regression", seed=seed)


def aligned(kind: str, logits: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Logits (..., C) and labels (...), written again from the definitions."""
    if kind == "causal":
        return logits[:, :-1], batch["labels"][:, 1:]
    if kind == "multi":
        return torch.stack([torch.zeros_like(logits), logits], -1), batch["labels"].long()
    return logits, batch["labels"]


def class_term(loss: str, kind: str, logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
    logits, labels = aligned(kind, logits, batch)
    return avuc_loss(logits, labels, 0.5) if loss == "avuc" else auavu_loss(logits, labels)


def regression_term(loss: str, output: Tensor, batch: dict[str, Tensor], tau: float, limit: float) -> Tensor:
    error, scale = (batch["labels"] - output[:, 0]).abs(), (output[:, 1] / 2).exp()
    if loss == "eau":
        return eau_loss(error / tau, scale / tau, 1.0, limit / tau)
    chance = torch.distributions.Normal(0.0, scale).cdf(torch.tensor(tau)) * 2 - 1
    limit_chance = 2 * torch.distributions.Normal(0.0, limit).cdf(torch.tensor(tau)) - 1
    return eac_loss(error / tau, chance, 1.0, limit_chance)


def check_gradients(records: list[dict[str, Any]], model: nn.Module, kind: str, term: Any) -> None:
    """Each step's gradient against mean NLL + KL / N + weight * (mean of the micro-batches' losses, by items)."""
    for record in records:
        model.load_state_dict(record["state"], strict=False)
        model.zero_grad()
        model.train()
        total, loss, count = torch.zeros(()), torch.zeros(()), 0
        for batch in record["fed"]:
            with fixed_draw(model, steps.DRAW):
                logits = model(**{name: batch[name] for name in ("input_ids", "attention_mask")}).logits
                nll, items = (
                    (gaussian_nll(logits, batch["labels"], "sum"), len(logits))
                    if kind == "head"
                    else steps.summed_nll(model, kind, batch)
                )
            total, loss, count = total + nll, loss + items * term(logits, batch), count + items
        num_items = steps.EXAMPLES if kind == "head" else steps.num_items(kind)
        ((total + WEIGHT * loss) / count + kl_divergence(model) / num_items).backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                torch.testing.assert_close(record["grads"][name], parameter.grad, rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize(
    ("kind", "loss", "batch", "accumulation"),
    [
        ("single", "avuc", 8, 1), ("single", "avuc", 4, 3), ("single", "auavu", 4, 3), ("token", "avuc", 8, 2),
        ("causal", "avuc", 8, 2), ("multi", "auavu", 8, 2),
    ],
)  # fmt: skip
def test_gradient_of_class_losses(kind: str, loss: str, batch: int, accumulation: int, tmp_path: Path) -> None:
    given = {**GIVEN, "calibration_loss": loss, **({"calibration_threshold": 0.5} if loss == "avuc" else {})}
    records = steps.recorded(tmp_path, kind, batch=batch, accumulation=accumulation, **given)
    check_gradients(records, tiny.bayesian(kind), kind, lambda logits, b: class_term(loss, kind, logits, b))


@pytest.mark.parametrize("loss", ["eau", "eac"])
def test_gradient_of_regression_losses(loss: str, tmp_path: Path) -> None:
    given = {**GIVEN, "calibration_loss": loss, "calibration_threshold": 1.1, "calibration_error_threshold": 0.8}
    records = steps.recorded(
        tmp_path, "regression", model=head(), batch=8, accumulation=2, noise_std="head", **given
    )  # fmt: skip
    check_gradients(records, head(), "head", lambda output, b: regression_term(loss, output, b, 0.8, 1.1))


def test_several_draws_use_the_averaged_predictive(tmp_path: Path) -> None:
    """Two held draws are one network, so the averaged predictive is its own and mutual information is 0."""
    given = {"calibration_threshold": 0.5, "calibration_loss": "avuc", "num_train_samples": 2, **GIVEN}
    records = steps.recorded(tmp_path, "single", batch=8, **given)
    check_gradients(records, tiny.bayesian(), "single", lambda logits, b: class_term("avuc", "single", logits, b))


def logged(trainer: Any, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


STILL = {"learning_rate": 0.0, "rho_learning_rate": 1e-12, "train_sampling_strategy": "sequential"}


def test_threshold_is_the_mean_of_two_means(tmp_path: Path) -> None:
    """With weights that stand still, against a loop over the items of the three warm-up steps."""
    trainer = tiny.trainer(
        tmp_path, calibration_loss="avuc", calibration_warmup_ratio=0.6, max_steps=5, **STILL
    )  # fmt: skip
    with fixed_draw(trainer.model, 3):
        trainer.train()
    data = {name: column[:12] for name, column in trainer.train_dataset.columns.items()}
    labels = data.pop("labels")
    model = tiny.bayesian().eval()
    with torch.no_grad(), fixed_draw(model, 3):
        probs = model(**data).logits.double().softmax(-1)
    spreads: dict[bool, list[float]] = {True: [], False: []}
    for p, label in zip(probs, labels, strict=True):
        spreads[int(p.argmax()) == int(label)].append(-sum(float(x) * math.log(float(x)) for x in p))
    expected = sum(sum(values) / len(values) for values in spreads.values()) / 2
    assert len(spreads[True]) and len(spreads[False])
    assert logged(trainer, "calibration_threshold")[-1] == pytest.approx(expected, rel=1e-4)
    losses = logged(trainer, "calibration_loss")
    assert losses[:3] == [0.0, 0.0, 0.0] and all(value > 0 for value in losses[3:])
    assert len(set(logged(trainer, "calibration_threshold")[2:])) == 1


@pytest.mark.parametrize("loss", ["eau", "eac"])
def test_regression_thresholds(loss: str, tmp_path: Path) -> None:
    trainer = tiny.trainer(
        tmp_path, head(), "regression", calibration_loss=loss, calibration_warmup_ratio=0.6, max_steps=5,
        noise_std="head", **STILL,
    )  # fmt: skip
    with fixed_draw(trainer.model, 3):
        trainer.train()
    data = {name: column[:12] for name, column in trainer.train_dataset.columns.items()}
    labels, model = data.pop("labels"), head().eval()
    with torch.no_grad(), fixed_draw(model, 3):
        output = model(**data).logits.double()
    errors, scales = (labels - output[:, 0]).abs().tolist(), (output[:, 1] / 2).exp().tolist()
    low: list[float] = []
    high: list[float] = []
    for i, (error, scale) in enumerate(zip(errors, scales, strict=True)):
        seen = errors[: 4 * (i // 4 + 1)]  # the mean error so far: up to this step's batch of 4
        (low if error <= sum(seen) / len(seen) else high).append(scale)
    assert logged(trainer, "calibration_error_threshold")[-1] == pytest.approx(sum(errors) / 12, rel=1e-4)
    expected = (sum(low) / len(low) + sum(high) / len(high)) / 2
    assert logged(trainer, "calibration_threshold")[-1] == pytest.approx(expected, rel=1e-4)
    assert logged(trainer, "calibration_loss")[-1] > 0


@pytest.mark.parametrize("loss", ["eau", "eac"])
def test_regression_losses_of_several_draws_need_no_head(loss: str, tmp_path: Path) -> None:
    trainer = tiny.trainer(
        tmp_path, kind="regression", calibration_loss=loss, num_train_samples=2, noise_std=0.5, max_steps=3
    )
    trainer.train()
    assert logged(trainer, "calibration_loss")[-1] > 0
    assert all(p.isfinite().all() for p in trainer.model.parameters())


def test_mutual_information_of_several_draws(tmp_path: Path) -> None:
    given = {"calibration_loss": "avuc", "calibration_uncertainty": "mutual_information", "num_train_samples": 2}
    trainer = tiny.trainer(tmp_path, max_steps=3, **given)
    trainer.train()
    assert logged(trainer, "calibration_loss")[-1] > 0


def test_the_logged_parts_add_up(tmp_path: Path) -> None:
    trainer = tiny.trainer(
        tmp_path, calibration_loss="avuc", calibration_weight=3.0, max_steps=4, logging_steps=2,
        gradient_accumulation_steps=2, calibration_warmup_ratio=0.25,
    )  # fmt: skip
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "nll" in entry]
    assert len(entries) == 2
    for entry in entries:
        parts = entry["nll"] + entry["kl"] / len(trainer.train_dataset) + 3.0 * entry["calibration_loss"]
        assert entry["loss"] == pytest.approx(parts, rel=1e-4)


def test_without_a_calibration_loss_nothing_is_logged(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path)
    trainer.train()
    assert not logged(trainer, "calibration_loss") and not logged(trainer, "calibration_threshold")


@pytest.mark.parametrize("kind", ["single", "head"])
@pytest.mark.parametrize("step", [2, 4])
def test_resume_is_bit_exact(step: int, kind: str, tmp_path: Path) -> None:
    """In the middle of the warm-up, and after it."""

    def trainer(folder: Path) -> Any:
        given = {"calibration_loss": "avuc"} if kind == "single" else {"calibration_loss": "eau", "noise_std": "head"}
        model, data = (None, "single") if kind == "single" else (head(), "regression")
        return tiny.trainer(
            folder, model, data, max_steps=6, calibration_warmup_ratio=0.5, save_strategy="steps", save_steps=2, **given
        )

    whole, again = trainer(tmp_path / "whole"), trainer(tmp_path / "again")
    whole.train()
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
    state = whole.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in again.model.state_dict().items())
    for key in ("calibration_threshold", "calibration_loss"):
        assert logged(whole, key) == logged(again, key) != []


def test_a_second_training_estimates_anew(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, calibration_loss="avuc", calibration_warmup_ratio=0.5, max_steps=4)
    trainer.train()
    first = logged(trainer, "calibration_loss")
    trainer.train()
    assert first[0] == logged(trainer, "calibration_loss")[0] == 0.0


def test_bfloat16(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, calibration_loss="auavu", bf16=True, max_steps=3)
    trainer.train()
    assert all(math.isfinite(value) for value in logged(trainer, "calibration_loss"))
    assert all(p.isfinite().all() for p in trainer.model.parameters())


# -- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"calibration_loss": "ece"}, "`calibration_loss` must be one of"),
        ({"calibration_weight": 0.0}, "`calibration_weight` must be a finite number > 0, got 0.0"),
        ({"calibration_weight": math.nan}, "`calibration_weight` must be a finite number > 0"),
        ({"calibration_warmup_ratio": -0.1}, "`calibration_warmup_ratio` must be a finite number >= 0"),
        ({"calibration_warmup_ratio": 1.0}, "`calibration_warmup_ratio` must be below 1"),
        (
            {"calibration_warmup_ratio": 0.0},
            "`calibration_warmup_ratio` must be > 0 .* or give `calibration_threshold`",
        ),
        ({"calibration_threshold": -1.0}, "`calibration_threshold` must be a finite number > 0, got -1.0"),
        ({"calibration_loss": None, "calibration_threshold": 0.5}, "`calibration_threshold` needs `calibration_loss`"),
        ({"calibration_loss": "auavu", "calibration_threshold": 0.5}, "`calibration_threshold` must be None with"),
        ({"calibration_error_threshold": 0.5}, "`calibration_error_threshold` is a regression's"),
        (
            {"calibration_loss": "eau", "calibration_threshold": 0.5, "num_train_samples": 2},
            "`calibration_threshold` and `calibration_error_threshold` go together",
        ),
        ({"calibration_loss": "eau"}, "set `num_train_samples` >= 2, got 1, or `noise_std`=\"head\", got 'residual'"),
        ({"calibration_loss": "eac", "noise_std": 0.5}, "needs an uncertainty that differs between inputs"),
        ({"calibration_uncertainty": "mutual_information"}, "is 0 for one draw: set `num_train_samples` >= 2"),
        ({"calibration_uncertainty": "variance"}, "`calibration_uncertainty` must be one of"),
    ],
)
def test_arguments_out_of_range(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BayesianTrainingArguments("out", report_to="none", **{"calibration_loss": "avuc", **arguments})


@pytest.mark.parametrize(
    ("kind", "loss", "message"),
    [
        ("regression", "avuc", "got a regression head: a regression takes"),
        ("regression", "auavu", "got a regression head"),
        ("single", "eau", "got a single_label_classification head: classes take"),
        ("token", "eac", "got a token_classification head"),
        ("question", "avuc", "got a question_answering head"),
    ],
)
def test_wrong_head(kind: str, loss: str, message: str, tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, kind=kind, calibration_loss=loss, num_train_samples=2, noise_std=1.0)
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert all(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())


def test_only_for_converted_models(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`calibration_loss`='avuc' .* the model is not Bayesian: call `to_bayesian"):
        tiny.trainer(tmp_path, tiny.plain(), calibration_loss="avuc").train()


def test_resume_past_the_warmup_needs_a_threshold(tmp_path: Path) -> None:
    tiny.trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=2).train()
    checkpoint = str(tmp_path / "checkpoint-2")
    with pytest.raises(ValueError, match="past the warm-up and holds no threshold.*give `calibration_threshold`"):
        tiny.trainer(tmp_path, max_steps=4, calibration_loss="avuc").train(resume_from_checkpoint=checkpoint)
