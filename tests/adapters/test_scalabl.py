"""ScalaBL: its draws and KL against their formulas, what trains, and a reload."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import bayeformers
from bayeformers.adapters import lora_pairs, to_scalabl
from bayeformers.nn import variational_tensors
from tests.adapters.lora import bert, inputs, labels


def test_kl_is_that_of_one_normal_per_rank() -> None:
    """KL = sum of log(p / s) + s^2 / (2 p^2) - 1/2: the means agree."""
    model = to_scalabl(bert(), delta=0.2, prior_std=0.5)
    tensors = list(variational_tensors(model))
    assert [tuple(tensor.loc.shape) for tensor in tensors] == [(2,)] * 4
    expected = sum(8 * [math.log(0.5 / 0.2) + 0.2**2 / (2 * 0.5**2) - 0.5])
    assert float(bayeformers.kl_divergence(model)) == pytest.approx(expected, rel=1e-6)


def test_a_draw_scales_the_ranks_of_the_change() -> None:
    model, plain = to_scalabl(bert(), delta=0.3), bert()
    with torch.no_grad():
        mean = model(**inputs()).logits
        torch.testing.assert_close(mean, plain(**inputs()).logits)
        with bayeformers.fixed_draw(model, 2, seed=1):
            drawn = model(**inputs()).logits
            scales = [pair.down.r.clone() for pair in lora_pairs(model)]
        for pair, scale in zip(lora_pairs(plain), scales, strict=True):
            pair.down.weight.mul_(scale[:, None])
        torch.testing.assert_close(drawn, plain(**inputs()).logits)
    assert float((torch.cat(scales) - 1).abs().max()) > 0.05


def test_it_learns_under_the_plain_elbo() -> None:
    model = bert(trained=False)
    to_scalabl(model)
    trains = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad and "lora_" in name}
    assert trains == {"weight", "r_rho"}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    model.train()
    losses = []
    for _ in range(30):
        nll = model(**inputs(), labels=labels()).loss
        loss = nll + bayeformers.kl_divergence(model) / 1_000
        losses.append(float(nll.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.85 * losses[0]
    assert all(bool((pair.down.get_parameter("r") == 1).all()) for pair in lora_pairs(model))
    assert bool((bayeformers.predict(model.eval(), inputs(), num_samples=4).mutual_information >= 0).all())


def test_linearised_predictive_is_that_of_the_scales() -> None:
    """Sigma = J diag(sigma^2) J^T with J of the logits in r, by finite differences of the converted model."""
    model = to_scalabl(bert(), delta=0.3)
    found = bayeformers.VariationalPosterior(model).predict(inputs(), method="glm")
    expected, step = torch.zeros(4, 3, 3, dtype=torch.float64), 1e-5
    for pair in lora_pairs(model):
        r = pair.down.get_parameter("r")
        for rank in range(2):
            logits = []
            for sign in (1, -1):
                with torch.no_grad():
                    r[rank] += sign * step
                    logits.append(model(**inputs()).logits)
                    r[rank] -= sign * step
            slope = (logits[0] - logits[1]) / (2 * step)
            expected += 0.3**2 * slope[:, :, None] * slope[:, None]
    assert found.logit_covariance is not None
    torch.testing.assert_close(found.logit_covariance, expected, rtol=1e-5, atol=1e-9)


def test_undone_it_is_the_plain_adapter() -> None:
    model = to_scalabl(bert())
    bayeformers.to_deterministic(model)
    before, after = bert().state_dict(), model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_state_survives_a_copy(tmp_path: Path) -> None:
    model, again = to_scalabl(bert(), delta=0.3), to_scalabl(bert(seed=1))
    again.load_state_dict(model.state_dict())
    draws = [bayeformers.predict(each, inputs(), num_samples=2).log_probs for each in (model, again)]
    assert torch.equal(*draws)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "told"), [({"delta": 0.0}, "`delta`"), ({"prior_std": 0.0}, "`prior_std`"), ({"delta": "a"}, "`delta`")]
)
def test_bad_numbers(options: dict[str, Any], told: str) -> None:
    model = bert()
    with pytest.raises((ValueError, TypeError), match=told):
        to_scalabl(model, **options)
    assert not bayeformers.is_bayesian(model)
