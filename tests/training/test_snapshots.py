"""SWAG's and the cycles' callbacks: what they take, what a resumed training goes on with, and the chain's sameness."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from bayeformers.optim import SGHMC
from bayeformers.posteriors import EnsemblePosterior, SWAGPosterior
from bayeformers.posteriors.streamed import whole
from bayeformers.training import CyclicalCallback, SWAGCallback
from tests.training import tiny

STEPS = 8


class Recorder(TrainerCallback):
    """The weights after every step, and the rate of each."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []
        self.rates: list[float] = []

    def on_pre_optimizer_step(self, *args: Any, optimizer: Any, **kwargs: Any) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])

    def on_step_end(self, *args: Any, model: nn.Module, **kwargs: Any) -> None:
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.weights.append({name: p.detach().clone() for name, p in trained.items()})


def run(
    folder: Path, callback: TrainerCallback, *, resume: Any = None, model: nn.Module | None = None, **options: Any
) -> tuple[Trainer, Recorder]:
    model = tiny.plain() if model is None else model
    recorder = Recorder()
    options = {"max_steps": STEPS, "seed": 1, "max_grad_norm": 0, **options}
    trainer = tiny.trainer(folder, model, callbacks=[callback, recorder], **options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, recorder


def chain(model: nn.Module, **options: Any) -> tuple[torch.optim.Optimizer, None]:
    made = {"lr": 0.1, "num_data": 20, "momentum": 0.5, "prior_precision": 1.0, "prior_mean": "start", "seed": 3}
    return SGHMC(model.parameters(), **{**made, **options}), None


def draws(posterior: Any, number: int = 2) -> list[dict[str, Tensor]]:
    found = []
    for index in range(number):
        with posterior.draw(index):
            found.append({name: p.detach().clone() for name, p in posterior.model.named_parameters()})
    return found


def same(one: list[dict[str, Tensor]], other: list[dict[str, Tensor]]) -> bool:
    return all(torch.equal(a[name], b[name]) for a, b in zip(one, other, strict=True) for name in a)


# -- SWAG --------------------------------------------------------------------------------------------------------------


def test_swag_takes_every_second_step(tmp_path: Path) -> None:
    model = tiny.plain()
    model.bert.embeddings.requires_grad_(False)
    callback = SWAGCallback(start=0.25, every=2, rank=2, lr=5e-4)
    trainer, recorder = run(tmp_path, callback, model=model)
    assert recorder.rates == [1e-3, 1e-3 * 7 / 8, *[5e-4] * 6]
    logged = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert logged[2:] == [5e-4] * 6
    taken = [recorder.weights[step] for step in (3, 5, 7)]
    moments = callback.running.moments()
    assert moments.num_snapshots == 3 and moments.num_columns == 2
    assert not any("embeddings" in name for name in moments.names)
    for name in taken[0]:
        stacked = torch.stack([each[name].double() for each in taken])
        found = whole(moments.tensors, [f"{part}/{name}" for part in ("mean", "variance", "deviations/1")])
        expected = stacked.mean(0), stacked.var(0, correction=0), stacked[2] - stacked.mean(0)
        for value, exact in zip(found.values(), expected, strict=True):
            torch.testing.assert_close(value.double(), exact, rtol=1e-3, atol=1e-7)
    trainer.posterior = callback.posterior(trainer.model)
    assert type(trainer.posterior) is SWAGPosterior and trainer.evaluate()["eval_mutual_information"] > 0


def test_swag_resumes(tmp_path: Path) -> None:
    """From checkpoints before the first snapshot and after it, of this folder and of another."""
    made = {"start": 2, "every": 1, "rank": 3}
    whole_run = SWAGCallback(**made)
    trainer, _ = run(tmp_path / "whole", whole_run, save_strategy="steps", save_steps=1)
    expected = draws(whole_run.posterior(trainer.model))
    for step in (1, 5):
        checkpoint = str(tmp_path / "whole" / f"checkpoint-{step}")
        callback = SWAGCallback(**made, resume_from=checkpoint)
        resumed, _ = run(tmp_path / "other", callback, resume=checkpoint)
        assert same(draws(callback.posterior(resumed.model)), expected)
    with pytest.raises(ValueError, match=r"goes on from step 5, but .* holds no 'swag_moments\.safetensors'"):
        run(tmp_path / "other", SWAGCallback(**made), resume=checkpoint)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"start": -1}, "`start` must be a step"),
        ({"start": 1.0}, "`start` must be a step"),
        ({"start": True}, "`start` must be a step"),
        ({"every": 0}, "`every`"),
        ({"rank": 1}, "`rank`"),
        ({"lr": 0.0}, "`lr`"),
    ],
)
def test_wrong_swag_arguments(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SWAGCallback(**wrong)


def test_wrong_swag_trainings(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no snapshot within the 8 steps"):
        run(tmp_path, SWAGCallback(start=7, every=2))
    with pytest.raises(ValueError, match="this one is converted"):
        run(tmp_path, SWAGCallback(start=0, every=2), model=tiny.bayesian())
    callback = SWAGCallback(start=4, every=4)
    trainer, _ = run(tmp_path, callback)
    with pytest.raises(ValueError, match="has taken 1 snapshots"):
        callback.posterior(trainer.model)


# -- cycles ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_folder", [False, True])
def test_cycles(tmp_path: Path, in_folder: bool) -> None:
    """Rates, temperatures and snapshots of two cycles of four steps, of which the last two sample."""
    model = tiny.plain()
    optimizers = chain(model)
    temperatures = []
    directory = tmp_path / "snapshots" if in_folder else None
    callback = CyclicalCallback(2, 0.2, samples_per_cycle=2, temperature=0.5, directory=directory)
    recorder = Recorder()
    recorder.on_optimizer_step = lambda *a, **k: temperatures.append(optimizers[0].param_groups[0]["temperature"])  # type: ignore[method-assign]
    trainer = tiny.trainer(
        tmp_path, model, callbacks=[callback, recorder], optimizers=optimizers, max_steps=STEPS, max_grad_norm=0
    )
    trainer.train()
    rates = [0.1 * (math.cos(math.pi * step / 4) + 1) for step in range(4)] * 2
    assert recorder.rates == pytest.approx(rates)
    logged = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert logged == pytest.approx(rates)
    assert temperatures == [0.0, 0.0, 0.5, 0.5] * 2
    posterior = callback.posterior(trainer.model)
    assert type(posterior) is EnsemblePosterior and posterior.num_draws == 4
    expected = [recorder.weights[step] for step in (2, 3, 6, 7)]
    assert same(draws(posterior, 4), expected)
    trainer.posterior = posterior
    trainer.save_model(str(tmp_path / "saved"))
    again = EnsemblePosterior.load(tmp_path / "saved", model)
    assert same(draws(again, 4), expected)


def test_cycles_resume(tmp_path: Path) -> None:
    """Bit by bit, in memory and in a folder, from within an exploration and a sampling part."""
    for directory, at in ((None, (2, 7)), (tmp_path / "snapshots", (5,))):
        made = {"num_cycles": 2, "lr": 0.2, "samples_per_cycle": 2, "directory": directory}
        model = tiny.plain()
        callback, folder = CyclicalCallback(**made), tmp_path / f"run-{directory is None}"
        options = {"save_strategy": "steps", "save_steps": 1}
        trainer, _ = run(folder, callback, model=model, optimizers=chain(model), **options)
        expected = draws(callback.posterior(trainer.model), 4)
        for step in at:
            model = tiny.plain()
            callback = CyclicalCallback(**made)
            resume = str(folder / f"checkpoint-{step}")
            resumed, _ = run(folder, callback, model=model, optimizers=chain(model), resume=resume, **options)
            assert callback.steps == [3, 4, 7, 8]
            assert same(draws(callback.posterior(resumed.model), 4), expected)


def test_accumulation_gives_the_same_chain(tmp_path: Path) -> None:
    found = []
    for batch, accumulation in ((4, 1), (1, 4)):
        model = tiny.plain()
        model.config.hidden_dropout_prob = 0.0
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        torch.manual_seed(batch)  # the global generators have no say
        _, recorder = run(
            tmp_path, CyclicalCallback(1, 0.1, exploration=0.0), model=model, optimizers=chain(model),
            per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation,
        )  # fmt: skip
        found.append(recorder.weights[-1])
    for other in found[1:]:
        for name, value in found[0].items():
            torch.testing.assert_close(other[name], value, rtol=0, atol=2e-5)


def test_other_optimizers_make_snapshot_ensembles(tmp_path: Path) -> None:
    callback = CyclicalCallback(4, 1e-3)
    trainer, recorder = run(tmp_path, callback, max_grad_norm=1.0)
    assert same(draws(callback.posterior(trainer.model), 4), recorder.weights[1::2])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_cycles": 0}, "`num_cycles`"),
        ({"lr": -1}, "`lr`"),
        ({"samples_per_cycle": 0}, "`samples_per_cycle`"),
        ({"exploration": 1}, "`exploration` must be a share below 1"),
        ({"exploration": -0.1}, "`exploration`"),
        ({"temperature": 0}, "`temperature`"),
    ],
)
def test_wrong_cycles(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CyclicalCallback(**{"num_cycles": 2, "lr": 0.1, **wrong})


def test_wrong_cyclical_trainings(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="`directory` must be the path"):
        CyclicalCallback(2, 0.1, directory=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="taken no snapshot"):
        CyclicalCallback(2, 0.1).posterior(tiny.plain())
    with pytest.raises(ValueError, match="this one is converted"):
        run(tmp_path, CyclicalCallback(2, 0.1), model=tiny.bayesian())
    with pytest.raises(ValueError, match="`samples_per_cycle`=3: a cycle of 4 steps has 2 to sample from"):
        run(tmp_path, CyclicalCallback(2, 0.1, samples_per_cycle=3))
    with pytest.raises(ValueError, match="`samples_per_cycle`=1: a cycle of 0 steps"):
        run(tmp_path, CyclicalCallback(20, 0.1))
    model = tiny.plain()
    with pytest.raises(ValueError, match="`max_grad_norm` is 1.0"):
        run(tmp_path, CyclicalCallback(2, 0.1), model=model, optimizers=chain(model), max_grad_norm=1.0)
