"""rho has its own step size and clipping; weight decay leaves alone what the KL pulls."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from bayeformers.nn import variational_tensors
from tests.training import tiny


class Optimizers(TrainerCallback):
    """Keeps the optimizer."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.groups = [dict(group) for group in kwargs["optimizer"].param_groups]


@pytest.mark.protects("weight_decay_groups")
@pytest.mark.parametrize("freeze", [True, False])
def test_rho_has_its_own_learning_rate_and_no_decay(freeze: bool, tmp_path: Path) -> None:
    record, model = Optimizers(), tiny.bayesian(freeze=freeze)
    tiny.trainer(
        tmp_path, model, callbacks=[record], weight_decay=0.1, rho_learning_rate=0.05, lr_scheduler_type="constant"
    ).train()
    rhos = {id(tensor.rho) for tensor in variational_tensors(model)}
    means = {id(tensor.loc) for tensor in variational_tensors(model)}
    own = [group for group in record.groups if any(id(p) in rhos for p in group["params"])]
    assert len(own) == 1
    assert {id(p) for p in own[0]["params"]} == rhos
    assert (own[0]["lr"], own[0]["weight_decay"]) == (0.05, 0.0)
    rest = [group for group in record.groups if group is not own[0]]
    assert bool(rest) == (not freeze)
    for group in rest:
        assert group["lr"] == 1e-3
        assert group["weight_decay"] == 0 or not means & {id(p) for p in group["params"]}


def test_means_that_no_kl_pulls_are_still_decayed(tmp_path: Path) -> None:
    record = Optimizers()
    model = tiny.bayesian(exclude_modules=["classifier"])
    tiny.trainer(tmp_path, model, callbacks=[record], weight_decay=0.1).train()
    decayed = {id(p) for group in record.groups if group["weight_decay"] > 0 for p in group["params"]}
    assert decayed == {id(model.classifier.weight)}


def test_a_given_optimizer_is_kept(tmp_path: Path) -> None:
    model = tiny.bayesian()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    before = {name: p.clone() for name, p in model.named_parameters()}
    tiny.trainer(tmp_path, model, optimizers=(optimizer, None)).train()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


class Norms(TrainerCallback):
    """Gradient norms after clipping: of rho, and of the rest."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        named = [(n, p.grad) for n, p in kwargs["model"].named_parameters() if p.grad is not None]
        self.rho, self.rest = (
            torch.cat([g.flatten() for n, g in named if n.endswith("rho") == is_rho]).norm() for is_rho in (True, False)
        )


def test_rho_is_clipped_by_its_own_norm(tmp_path: Path) -> None:
    record = Norms()
    trainer = tiny.trainer(
        tmp_path, tiny.bayesian(delta=1.0), callbacks=[record], max_steps=1, max_grad_norm=1e-3, num_training_items=1
    )
    trainer.train()
    torch.testing.assert_close(record.rho, torch.tensor(1e-3), rtol=1e-2, atol=0)
    torch.testing.assert_close(record.rest, torch.tensor(1e-3), rtol=1e-2, atol=0)
    assert trainer.state.log_history[0]["grad_norm"] > 1e-2  # of all, before clipping


def test_frozen_means_do_not_move(tmp_path: Path) -> None:
    model = tiny.bayesian(freeze=True)
    before = {name: p.clone() for name, p in model.named_parameters()}
    tiny.trainer(tmp_path, model).train()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved
    assert all(name.endswith("rho") for name in moved)
