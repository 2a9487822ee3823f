"""Ensembles that are trained: resumed member by member, and anchored; the exact posterior of a linear model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState

from bayeformers.posteriors import EnsemblePosterior
from bayeformers.training import AnchorCallback, perturbed_targets, train_ensemble
from tests.training import tiny


class Interrupt(Exception):
    """In the middle of a training."""


class Stop(TrainerCallback):
    def __init__(self, after: int) -> None:
        self.after = after

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step >= self.after:
            raise Interrupt


def make_trainer(seed: int, folder: str, **options: Any) -> Trainer:
    model = tiny.plain()
    nn.init.normal_(model.classifier.weight)  # a fresh head, of torch's own generator
    data = {"train_dataset": tiny.dataset("single"), "eval_dataset": None}
    return tiny.trainer(folder, model, seed=seed, save_strategy="steps", save_steps=1, max_steps=2, **data, **options)


def weights(folders: list[Path]) -> list[dict[str, Tensor]]:
    posterior, found = EnsemblePosterior(tiny.plain(), folders), []
    for index in range(len(folders)):
        with posterior.draw(index):
            found.append({name: p.detach().clone() for name, p in posterior.model.named_parameters()})
    return found


def test_train_ensemble(tmp_path: Path) -> None:
    folders = train_ensemble(make_trainer, [3, 8], tmp_path / "whole")
    one, other = weights(folders)
    assert not torch.equal(one["classifier.weight"], other["classifier.weight"])

    def interrupted(seed: int, folder: str) -> Trainer:
        return make_trainer(seed, folder, callbacks=[Stop(1)] if seed == 8 else [])

    with pytest.raises(Interrupt):
        train_ensemble(interrupted, [3, 8], tmp_path / "parts")
    made: list[int] = []

    def again(seed: int, folder: str) -> Trainer:
        made.append(seed)
        return make_trainer(seed, folder)

    resumed = train_ensemble(again, [3, 8], tmp_path / "parts")
    assert made == [8]
    for expected, found in zip((one, other), weights(resumed), strict=True):
        assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_members_are_shared_out(tmp_path: Path) -> None:
    second = train_ensemble(make_trainer, [3, 8], tmp_path, share=(1, 2))
    assert [folder.name for folder in second] == ["member-8"]
    both = train_ensemble(make_trainer, [3, 8], tmp_path, share=(0, 2))
    assert [folder.name for folder in both] == ["member-3", "member-8"]


def test_wrong_ensembles(tmp_path: Path) -> None:
    for seeds in ([], [1, 1], [-1], [0.5], [True]):
        with pytest.raises(ValueError, match="`seeds` must be distinct"):
            train_ensemble(make_trainer, seeds, tmp_path)  # type: ignore[arg-type]
    for share in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match="`share`"):
            train_ensemble(make_trainer, [1], tmp_path, share=share)
    with pytest.raises(TypeError, match="must return a Trainer, got int"):
        train_ensemble(lambda seed, folder: 3, [1], tmp_path)  # type: ignore[arg-type, return-value]
    with pytest.raises(ValueError, match="members would share checkpoints"):
        train_ensemble(lambda seed, folder: make_trainer(seed, str(tmp_path)), [1], tmp_path)
    with pytest.raises(ValueError, match="seed=1, got"):
        train_ensemble(lambda seed, folder: make_trainer(0, folder), [1], tmp_path)


# -- anchors -----------------------------------------------------------------------------------------------------------

ROWS, WIDTH, NOISE, PRECISION = 12, 3, 0.4, 2.0


def regression() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, WIDTH, generator=generator, dtype=torch.float64)
    return x, x @ torch.tensor([1.0, -2.0, 0.5]).double() + 0.4 * torch.randn(ROWS, generator=generator).double()


def member(y: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """The anchored optimum of a linear model, where the gradient that the callback leaves is 0; and the anchor.

    The loss is the mean over rows of (y - x w)^2 / (2 s^2). Its gradient is linear in w, so that three gradients and
    the one at 0 say where it vanishes.
    """
    x, _ = regression()
    model = nn.Linear(WIDTH, 1, bias=False).double()
    callback = AnchorCallback(PRECISION, ROWS, seed, prior_mean="zero")
    begin = TrainerState()
    callback.on_train_begin(tiny.arguments("unused"), begin, TrainerControl(), model=model)

    def gradient(w: Tensor) -> Tensor:
        with torch.no_grad():
            model.weight.copy_(w)
        model.zero_grad()
        ((y - model(x).squeeze(-1)).square() / (2 * NOISE**2)).mean().backward()
        callback.on_pre_optimizer_step(tiny.arguments("unused"), begin, TrainerControl(), model=model)
        assert model.weight.grad is not None
        return model.weight.grad[0].clone()

    at_zero = gradient(torch.zeros(WIDTH).double())
    slope = torch.stack([gradient(row) - at_zero for row in torch.eye(WIDTH).double()], dim=1)
    return torch.linalg.solve(slope, -at_zero), callback.anchors["weight"][0]


def test_anchored_members_are_exact() -> None:
    """A member's optimum is linear in its anchor and its targets' noise, whose laws are known: no sampling error."""
    x, y = regression()
    exact = torch.linalg.inv(x.T @ x / NOISE**2 + PRECISION * torch.eye(WIDTH))
    mean = exact @ x.T @ y / NOISE**2
    # w(a, e) = w(0, 0) + M a + K e: from members of several seeds, with the targets as they are and moved one by one
    optima, anchors = zip(*(member(y, seed) for seed in range(WIDTH + 1)), strict=True)
    moved = torch.stack([optimum - optima[0] for optimum in optima[1:]], dim=1)
    of_anchor = moved @ torch.linalg.inv(torch.stack([anchor - anchors[0] for anchor in anchors[1:]], dim=1))
    of_noise = torch.stack([member(y + row, 0)[0] - optima[0] for row in torch.eye(ROWS).double()], dim=1)
    torch.testing.assert_close(optima[0] - of_anchor @ anchors[0], mean)  # the ensemble's mean: E a = 0, E e = 0
    by_anchors = of_anchor @ of_anchor.T / PRECISION
    torch.testing.assert_close(by_anchors + NOISE**2 * of_noise @ of_noise.T, exact)
    torch.testing.assert_close(by_anchors, exact @ exact * PRECISION)  # with anchors alone it is too small
    assert bool((by_anchors.diagonal() < exact.diagonal()).all())


def test_anchors_and_noise_have_the_priors_law() -> None:
    anchors = torch.stack([member(regression()[1], seed)[1] for seed in range(3)])
    assert len(anchors.unique()) == 9
    large = nn.Linear(100, 200)
    callback = AnchorCallback(4.0, 10, seed=1)
    callback.on_train_begin(tiny.arguments("unused"), TrainerState(), TrainerControl(), model=large)
    distance = (callback.anchors["weight"] - large.weight.detach()).reshape(-1)
    # 20,000 values of standard deviation 1/2: their mean square has relative standard error (2 / 20,000)^1/2 = 1 %
    assert distance.square().mean().item() == pytest.approx(0.25, rel=0.05)
    noise = perturbed_targets(torch.zeros(20_000), 0.5, seed=0)
    assert noise.square().mean().item() == pytest.approx(0.25, rel=0.05)
    assert torch.equal(noise, perturbed_targets(torch.zeros(20_000), 0.5, seed=0))
    assert not torch.equal(noise, perturbed_targets(torch.zeros(20_000), 0.5, seed=1))


def test_anchored_training_resumes(tmp_path: Path) -> None:
    found = []
    for resume in (None, str(tmp_path / "checkpoint-1")):
        callback = AnchorCallback(50.0, 20, seed=2)
        trainer = make_trainer(5, str(tmp_path), callbacks=[callback])
        trainer.train(resume_from_checkpoint=resume)
        found.append({name: p.detach().clone() for name, p in trainer.model.named_parameters()})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"prior_precision": 0}, "`prior_precision`"),
        ({"num_data": 0}, "`num_data`"),
        ({"seed": -1}, "`seed`"),
        ({"prior_mean": "pretrained"}, "`prior_mean`"),
    ],
)
def test_wrong_anchors(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AnchorCallback(**{"prior_precision": 1.0, "num_data": 10, "seed": 0, **wrong})


def test_wrong_anchored_trainings(tmp_path: Path) -> None:
    for options, message in (({"weight_decay": 0.1}, "`weight_decay` is 0.1"),):
        with pytest.raises(ValueError, match=message):
            make_trainer(0, str(tmp_path), callbacks=[AnchorCallback(1.0, 10, 0)], **options).train()
    with pytest.raises(ValueError, match="this one is converted"):
        tiny.trainer(tmp_path, callbacks=[AnchorCallback(1.0, 10, 0)]).train()
    with pytest.raises(ValueError, match="`noise_std`"):
        perturbed_targets(torch.zeros(2), 0.0, seed=0)
    with pytest.raises(ValueError, match="`targets` must be a tensor of floating-point numbers, got torch.int64"):
        perturbed_targets(torch.zeros(2, dtype=torch.long), 1.0, seed=0)
