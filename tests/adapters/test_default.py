"""What `to_bayesian` does with an adapter where nothing is said: A is random, the means learn, the scale is held."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import bayeformers
from bayeformers import MopedPrior, RelativePrior, bayesian_config
from bayeformers.adapters import lora_pairs
from bayeformers.nn import variational_tensors
from tests.adapters.lora import bert, inputs, labels

ITEMS = 5_000


def fresh() -> Any:
    model = bert()
    with torch.no_grad():
        for pair in lora_pairs(model):
            pair.up.weight.zero_()
    return model


def trained(model: Any, steps: int = 40) -> tuple[Any, float]:
    """The model after some steps of the ELBO of `ITEMS` rows, and the NLL of its mean."""
    torch.manual_seed(0)
    optimizer = torch.optim.Adam([p for name, p in model.named_parameters() if "lora_" in name], lr=2e-2)
    is_random = bayeformers.is_bayesian(model)
    for _ in range(steps):
        model.train()
        loss = model(**inputs(), labels=labels()).loss
        loss = loss + bayeformers.kl_divergence(model) / ITEMS if is_random else loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return model, float(model.eval()(**inputs(), labels=labels()).loss)


def test_the_matrices_a_have_a_prior_of_the_scale() -> None:
    model = bayeformers.to_bayesian(fresh())
    assert {tensor.name for tensor in variational_tensors(model)} == {
        f"{pair.down_name}.weight" for pair in lora_pairs(model)
    }
    config = bayesian_config(model)
    assert (config.prior, config.scale, config.freeze, config.delta) == (RelativePrior(), "multiplicative", False, 0.2)
    assert float(bayeformers.kl_divergence(model)) == pytest.approx(0, abs=1e-4)
    for tensor in variational_tensors(model):
        size = torch.maximum(tensor.loc.abs(), 0.1 * tensor.loc.abs().mean()).detach()
        torch.testing.assert_close(tensor.scale().detach(), 0.2 * size, rtol=1e-5, atol=0)
        assert tensor.loc.requires_grad


def test_it_learns_as_the_plain_adapter_and_its_draws_differ() -> None:
    """`MopedPrior` over both matrices, B at 0 with a scale of 1e-3, keeps 5,000 rows from moving B."""
    _, start = trained(fresh(), steps=0)
    plain = bert()
    plain.load_state_dict(fresh().state_dict())
    for module in plain.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    _, own = trained(plain)
    model, found = trained(bayeformers.to_bayesian(fresh()))
    held = bayeformers.to_bayesian(
        fresh(), 0.05, prior=MopedPrior(), scale="additive", target_modules=["lora_A", "lora_B"]
    )
    for tensor in variational_tensors(held):
        if "lora_B" in tensor.name:
            tensor.module.set_scale("weight", torch.full_like(tensor.loc, 1e-3))
            tensor.module.store_prior("weight", tensor.loc, torch.full_like(tensor.loc, 1e-3))
    _, stuck = trained(held)
    assert own < 0.7 * start
    assert found < own + 0.25 * (start - own)
    assert stuck > found + 0.25 * (start - own)
    predictive = bayeformers.predict(model, inputs(), num_samples=8)
    assert bool((predictive.mutual_information > 1e-6).all())
    for tensor in variational_tensors(model):
        ratio = tensor.scale() / torch.maximum(tensor.loc.abs(), tensor.floor)  # type: ignore[call-overload]
        assert 0.05 < float(ratio.detach().mean()) < 0.4


def test_what_is_said_counts() -> None:
    model = bayeformers.to_bayesian(fresh(), 0.1, prior=MopedPrior(), scale="additive", target_modules=["lora_B"])
    config = bayesian_config(model)
    assert (config.prior, config.scale, config.delta) == (MopedPrior(), "additive", 0.1)
    assert all("lora_B" in tensor.name for tensor in variational_tensors(model))
