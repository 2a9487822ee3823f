"""The Trainer's objective and optimizer: each property against the formula that broke it elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from bayeformers.nn import variational_tensors
from tests.training import tiny


@pytest.mark.protects("weight_decay_groups")
def test_weight_decay_groups(tmp_path: Path) -> None:
    """Decay falls on deterministic matrices; never on a scale, a mean that the KL pulls, a bias or a normalisation."""
    model = tiny.bayesian(exclude_modules=["classifier"])
    trainer = tiny.trainer(tmp_path, model, weight_decay=0.1)
    trainer.create_optimizer()
    groups = [(group["weight_decay"], {id(p) for p in group["params"]}) for group in trainer.optimizer.param_groups]
    pulled = {id(tensor.loc) for tensor in variational_tensors(model)}
    scales = {id(tensor.rho) for tensor in variational_tensors(model)}
    norms = {id(p) for m in model.modules() if isinstance(m, nn.LayerNorm) for p in m.parameters()}

    def check(groups: list[tuple[float, set[int]]]) -> None:
        decayed = set().union(*(members for decay, members in groups if decay > 0))
        assert decayed == {id(model.classifier.weight)}
        assert not decayed & (pulled | scales | norms)

    check(groups)
    with pytest.raises(AssertionError):
        check([(0.1 if decay == 0 else 0.0, members) for decay, members in groups])


@pytest.mark.protects("kl_not_multiplied_by_samples")
def test_kl_not_multiplied_by_samples(tmp_path: Path) -> None:
    """loss = mean NLL over the draws + KL / N, whatever the number of draws."""

    def check(times_kl: float, entry: dict[str, float]) -> None:
        assert entry["loss"] == pytest.approx(entry["nll"] + times_kl * entry["kl"] / 20, rel=1e-5)

    for samples in (1, 3):
        model = tiny.bayesian(delta=0.3)
        for tensor in variational_tensors(model):
            tensor.rho.data.sub_(1.0)  # away from the prior, where the KL is 0
        trainer = tiny.trainer(tmp_path, model, num_train_samples=samples, max_steps=1)
        trainer.train()
        entry = trainer.state.log_history[0]
        check(1.0, entry)
    with pytest.raises(AssertionError):
        check(3.0, entry)
