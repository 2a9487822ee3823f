"""`BayesianTrainer` with IVON: one draw per step, its posterior afterwards, saved, resumed, and in two processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bayeformers
from bayeformers.optim import IVON, SGHMC
from bayeformers.posteriors import IVONPosterior
from bayeformers.training import BayesianTrainer
from tests.training import ivon_worker, tiny

ROOT = Path(__file__).parents[2]
Made = tuple[BayesianTrainer, IVON]


def made(folder: Path, kind: str = "single", *, options: dict[str, Any] | None = None, **kwargs: Any) -> Made:
    model = tiny.plain(kind)
    optimizer = IVON(model.parameters(), **{"lr": 0.3, "hess_init": 0.5, "beta2": 0.9, **(options or {})})
    return tiny.trainer(folder, model, kind, optimizers=(optimizer, None), **kwargs), optimizer


def posterior_of(trainer: BayesianTrainer) -> IVONPosterior:
    posterior = trainer.posterior
    assert isinstance(posterior, IVONPosterior) and posterior.is_of_present_weights()
    return posterior


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


@pytest.mark.parametrize(("kind", "num_items"), [("single", 20), ("regression", 20), ("token", None)])
def test_training_ends_in_the_optimizers_posterior(kind: str, num_items: int | None, tmp_path: Path) -> None:
    trainer, optimizer = made(tmp_path, kind)
    trainer.train()
    model, posterior = trainer.model, posterior_of(trainer)
    if num_items is None:
        num_items = int((trainer.train_dataset.columns["labels"] != -100).sum())  # type: ignore[union-attr]
    assert optimizer.param_groups[0]["ess"] == num_items
    scales = {name: optimizer.scales()[parameter] for name, parameter in model.named_parameters()}
    assert_same(dict(posterior.scales), scales)
    assert all(optimizer.state[p]["step"] in (0, 2) for p in model.parameters())
    assert "eval_loss" in trainer.evaluate()


def test_a_step_is_taken_at_one_draw(tmp_path: Path) -> None:
    """By hand: the same batches, losses that are shares of the step's mean, one draw around both micro-batches."""
    options = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    data, found = tiny.dataset("single", 8), []
    for by_hand in (False, True):
        model = tiny.plain("single", **options)
        optimizer = IVON(model.parameters(), lr=0.3, ess=8, hess_init=0.5, beta2=0.9)
        if by_hand:
            model.train()
            for step in range(2):
                for group in optimizer.param_groups:
                    group["lr"] = 0.3 * (1 - step / 2)  # the Trainer's linear schedule
                with optimizer.sampled_params():
                    optimizer.zero_grad()
                    for rows in (slice(0, 4), slice(4, 8)):
                        batch = {name: column[rows] for name, column in data.columns.items()}
                        (model(**batch).loss / 2).backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
        else:
            trainer = tiny.trainer(
                tmp_path, model, train_dataset=data, optimizers=(optimizer, None), gradient_accumulation_steps=2,
                train_sampling_strategy="sequential",
            )  # fmt: skip
            trainer.train()
        found.append([*model.parameters(), *optimizer.scales().values()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_a_training_goes_on_bit_by_bit(tmp_path: Path) -> None:
    whole, _ = made(tmp_path / "whole", max_steps=4, save_strategy="steps", save_steps=2)
    whole.train()
    again, _ = made(tmp_path / "again", max_steps=4, options={"seed": 5})  # the checkpoint knows the noise's seed
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert_same(again.model.state_dict(), whole.model.state_dict())
    assert_same(dict(posterior_of(again).scales), dict(posterior_of(whole).scales))


def test_saved_beside_the_model_and_found_again(tmp_path: Path) -> None:
    trainer, _ = made(tmp_path)
    trainer.train()
    expected = trainer.predict(trainer.eval_dataset)
    trainer.save_model()
    assert (tmp_path / "ivon.safetensors").is_file()
    model = bayeformers.from_pretrained(tmp_path)
    assert isinstance(model.posterior, IVONPosterior)  # type: ignore[attr-defined]
    assert_same(dict(model.posterior.scales), dict(posterior_of(trainer).scales))  # type: ignore[attr-defined]
    found = tiny.trainer(tmp_path, model).predict(trainer.eval_dataset)
    assert (found.predictions == expected.predictions).all()
    assert (found.uncertainty["mutual_information"] == expected.uncertainty["mutual_information"]).all()


def test_evaluations_and_the_best_checkpoint_have_the_posterior_of_their_moment(tmp_path: Path) -> None:
    steps = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    trainer, _ = made(tmp_path, load_best_model_at_end=True, metric_for_best_model="eval_number", **steps)  # type: ignore[arg-type]
    numbers = iter([3.0, 1.0, 2.0, 0.0])
    trainer.compute_metrics = lambda _: {"number": next(numbers)}
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-1")
    saved = IVONPosterior.load(tmp_path / "checkpoint-1", trainer.model)
    assert_same(dict(posterior_of(trainer).scales), dict(saved.scales))
    logged = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(logged[0], rel=1e-6)


def test_an_interrupted_training_leaves_the_mean(tmp_path: Path) -> None:
    trainer, optimizer = made(tmp_path)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.compute_loss_func = _interrupt
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert_same(trainer.model.state_dict(), before)
    optimizer.state_dict()  # outside of a draw


def _interrupt(*args: Any, **kwargs: Any) -> Tensor:
    raise KeyboardInterrupt


def test_linearised_evaluation(tmp_path: Path) -> None:
    trainer, _ = made(tmp_path, eval_method="glm")
    trainer.train()
    assert trainer.evaluate()["eval_mutual_information"] > 0


def test_refusals(tmp_path: Path) -> None:
    model = tiny.bayesian()
    with pytest.raises(ValueError, match="to_deterministic"):
        tiny.trainer(tmp_path, model, optimizers=(IVON(model.parameters(), ess=20), None)).train()
    trainer, _ = made(tmp_path, options={"mc_samples": 2})
    with pytest.raises(ValueError, match="`mc_samples`"):
        trainer.train()
    trainer, _ = made(tmp_path)
    trainer.args.fp16 = True
    with pytest.raises(ValueError, match="`fp16`"):
        trainer.train()


# -- two processes -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("two_processes")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
               "-m", "tests.training.ivon_worker", str(folder)]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("way", ["plain", "accumulated"])
def test_two_processes_are_one(way: str, ranks: list[dict[str, Any]], tmp_path: Path) -> None:
    """The same bits on both; up to rounding, whose order differs, those of one process with the whole batches."""
    first, second = (rank[way] for rank in ranks)
    alone = ivon_worker.trained(tmp_path, 8)
    for part in ("weights", "scales"):
        assert_same(first[part], second[part])
        for name, value in first[part].items():
            torch.testing.assert_close(value, alone[part][name], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_gradients_that_were_not_averaged_are_refused(ranks: list[dict[str, Any]]) -> None:
    assert all("gradients of the processes differ" in rank["refused"]["no_sync"] for rank in ranks)


def test_a_regression_trains_on_the_noise_that_was_given(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The Gaussian NLL's gradient is the squared error's times 1 / (2 s^2): 2 at s = 1/2."""
    found = {}
    for noise_std in ("residual", "0.5"):
        model = tiny.plain("regression", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        optimizer = IVON(model.parameters(), lr=0.0, hess_init=0.5, weight_decay=0.0)
        taken: list[Tensor] = []
        bias = model.classifier.bias
        bias.register_hook(lambda grad, taken=taken: taken.append(grad.clone()))
        trainer = tiny.trainer(
            tmp_path, model, "regression", optimizers=(optimizer, None), noise_std=noise_std, max_steps=1
        )
        trainer.train()
        found[noise_std] = taken[0]
    torch.testing.assert_close(found["0.5"], 2 * found["residual"])
    assert "with a noise of 0.7071" in caplog.text


def test_a_chain_of_clipped_gradients_is_refused(tmp_path: Path) -> None:
    model = tiny.plain()
    chain = SGHMC(model.parameters(), lr=0.01, num_data=20, prior_precision=1.0)
    with pytest.raises(ValueError, match="with clipped gradients SGHMC samples from another"):
        tiny.trainer(tmp_path, model, optimizers=(chain, None)).train()
