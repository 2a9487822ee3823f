"""TFB: the noise of the whole weight, the search against a grid, the linearised predictive, files."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from torch import Tensor

import bayeformers
from bayeformers.adapters import AdapterPosterior, fit_tfb, lora_pairs, tfb_posterior
from bayeformers.posteriors import PointPosterior
from tests.adapters.lora import bert, inputs, labels, llama


def nll(posterior: Any, target: Tensor, **options: Any) -> float:
    log_probs = posterior.predict(inputs(), **options).mean_log_probs
    return float(-log_probs.gather(-1, target[:, None]).double().mean())


def test_noise_of_the_weight_is_isotropic_where_b_reaches() -> None:
    """Cov(vec(s B E)) = s^2 sigma^2 U U^T (x) I, exactly, from the marginal pieces that the posterior states."""
    model = bert()
    posterior = tfb_posterior(model, 0.07)
    for pair, block in zip(lora_pairs(model), posterior.blocks(), strict=True):
        b, width = pair.up.weight.detach(), pair.down.weight.shape[1]
        root = torch.kron(block.left[0], torch.eye(width, dtype=b.dtype)) * block.variance[0].sqrt().flatten()
        root = pair.scaling * torch.kron(b, torch.eye(width, dtype=b.dtype)) @ root
        projector = b @ torch.linalg.pinv(b)
        expected = (pair.scaling * 0.07) ** 2 * torch.kron(projector, torch.eye(width, dtype=b.dtype))
        torch.testing.assert_close(root @ root.mT, expected, rtol=0, atol=1e-12)


def test_draws_have_that_covariance_and_leave_b() -> None:
    """n = 400 draws; a variance's standard error is v sqrt(2 / n); five of them at most over 24 elements."""
    model = bert()
    posterior, pair = tfb_posterior(model, 0.1), lora_pairs(model)[1]
    a, b = pair.down.weight, pair.up.weight.detach().clone()
    mean, drawn = a.detach().clone(), []
    for index in range(400):
        with posterior.draw(index, seed=5):
            drawn.append(a.detach() - mean)
            assert torch.equal(pair.up.weight, b)
    assert torch.equal(a, mean)
    found = torch.stack(drawn).square().mean(0)
    expected = posterior.variances()[a]
    gram = torch.linalg.inv(b.mT @ b)  # V diag(1 / d^2) V^T
    torch.testing.assert_close(expected, 0.01 * gram.diagonal()[:, None].expand_as(expected))
    assert bool(((found - expected).abs() <= 5 * expected * (2 / 400) ** 0.5).all())


def test_another_basis_of_the_same_adapter_has_the_same_noise() -> None:
    """B R and R^-1 A are the same change of the weight; so are the posteriors of it."""
    model, turned = bert(), bert()
    generator = torch.Generator().manual_seed(0)
    for pair in lora_pairs(turned):
        mix = torch.randn(2, 2, dtype=torch.float64, generator=generator) + 2 * torch.eye(2, dtype=torch.float64)
        with torch.no_grad():
            pair.down.weight.copy_(torch.linalg.solve(mix, pair.down.weight))
            pair.up.weight.copy_(pair.up.weight @ mix)
    found = []
    for each in (model, turned):
        posterior = tfb_posterior(each, 0.1)
        found.append(posterior.predict(inputs(), method="glm"))
    torch.testing.assert_close(found[0].logit_mean, found[1].logit_mean)
    torch.testing.assert_close(found[0].logit_covariance, found[1].logit_covariance, rtol=1e-6, atol=1e-9)


def test_linearised_covariance_is_that_of_dense_jacobians() -> None:
    model = bert()
    posterior = tfb_posterior(model, 0.3)
    predictive = posterior.predict(inputs(), method="glm")
    expected = torch.zeros(4, 3, 3, dtype=torch.float64)
    for pair, block in zip(lora_pairs(model), posterior.blocks(), strict=True):
        weight = pair.down.weight
        root = block.left[0] @ torch.diag(block.variance[0, :, 0].sqrt())
        covariance = torch.kron(root @ root.mT, torch.eye(weight.shape[1], dtype=torch.float64))

        def logits(value: Tensor, name: str = f"{pair.down_name}.weight") -> Tensor:
            return torch.func.functional_call(model, {name: value}, kwargs=inputs()).logits  # type: ignore[no-any-return]

        jacobian = torch.autograd.functional.jacobian(logits, weight.detach()).flatten(2)
        expected += jacobian @ covariance @ jacobian.mT
    assert predictive.logit_covariance is not None
    torch.testing.assert_close(predictive.logit_covariance, expected, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("has_labels", [True, False])
def test_search_finds_the_last_point_of_a_grid_within_the_tolerance(has_labels: bool) -> None:
    """On a grid of steps of 5 % the cost crosses the limit once; bisection stops at most 3 % below the crossing."""
    model = bert()
    own = PointPosterior(model).predict(inputs()).mean_log_probs.argmax(-1)
    target = own  # labels that the model gives itself: noise can only cost
    given: dict[str, Any] = {"labels": target} if has_labels else {}
    posterior = fit_tfb(model, inputs(), tolerance=0.02, bounds=(1e-3, 10.0), num_samples=4, progress=False, **given)
    limit = nll(PointPosterior(model), target) * 1.02
    grid = posterior.scale_found * 1.05 ** np.arange(-12.0, 13.0)
    costs = np.array([nll(tfb_posterior(model, sigma), target, num_samples=4) for sigma in grid])
    crossings = np.flatnonzero((costs[:-1] <= limit) & (costs[1:] > limit))
    assert len(crossings) == 1
    assert grid[crossings[0]] / 1.031 <= posterior.scale_found <= grid[crossings[0] + 1]
    assert costs[:5].max() < costs[-5:].min()
    assert nll(posterior, target, num_samples=4) <= limit


def test_search_by_accuracy() -> None:
    """No decision may change: the error of the found sigma is 0, that of the largest is not."""
    model = bert()
    posterior = fit_tfb(
        model, inputs(), criterion="accuracy", tolerance=0.01, bounds=(1e-3, 100.0), num_samples=4, progress=False
    )
    own = PointPosterior(model).predict(inputs()).mean_log_probs.argmax(-1)
    kept = posterior.predict(inputs(), num_samples=4).mean_log_probs.argmax(-1)
    far = tfb_posterior(model, 100.0).predict(inputs(), num_samples=4).mean_log_probs.argmax(-1)
    assert torch.equal(kept, own)
    assert not torch.equal(far, own)


def test_a_language_model_needs_no_labels(caplog: pytest.LogCaptureFixture) -> None:
    model = llama()
    with caplog.at_level(logging.WARNING):
        posterior = fit_tfb(model, inputs(), bounds=(1e-4, 2e-4), num_samples=2, progress=False)
    assert posterior.scale_found == pytest.approx(2e-4)
    assert "the largest sigma of `bounds`" in caplog.text
    assert posterior.predict(inputs(), num_samples=2).mutual_information.shape == (4, 6)


def test_reload_is_bit_for_bit(tmp_path: Path) -> None:
    model: Any = bert()
    posterior = fit_tfb(model, inputs(), bounds=(1e-3, 10.0), num_samples=2, progress=False)
    posterior.save(tmp_path)
    found = AdapterPosterior.load(tmp_path, bert())
    assert (found.method, found.scale_found) == ("tfb", posterior.scale_found)
    expected = posterior.predict(inputs(), num_samples=3, seed=7).log_probs
    assert torch.equal(found.predict(inputs(), num_samples=3, seed=7).log_probs, expected)
    other = bert(seed=1)
    with pytest.raises(ValueError, match="fitted to other weights"):
        AdapterPosterior.load(tmp_path, other)
    with torch.no_grad():
        lora_pairs(model)[0].down.weight.add_(1)
    with pytest.raises(ValueError, match="moved"):
        posterior.save(tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_models_that_are_refused() -> None:
    with pytest.raises(ValueError, match="B of zeros"):
        tfb_posterior(bert(trained=False), 0.1)
    with pytest.raises(ValueError, match="Bayesian already"):
        fit_tfb(bayeformers.adapters.to_blob(bert()), inputs())
    with pytest.raises(ValueError, match="no active LoRA"):
        fit_tfb(torch.nn.Linear(2, 2), torch.ones(1, 2))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"tolerance": 0.0}, "`tolerance`"),
        ({"criterion": "f1"}, "`criterion`"),
        ({"bounds": (1.0, 0.1)}, "`bounds`"),
        ({"num_samples": 0}, "`num_samples`"),
        ({"labels": torch.full((4,), -100)}, "none that counts"),
    ],
)
def test_bad_arguments(options: dict[str, Any], told: str) -> None:
    with pytest.raises((ValueError, TypeError), match=told):
        fit_tfb(bert(), inputs(), progress=False, **options)


@pytest.mark.parametrize("sigma", [0.0, -1.0, float("nan"), "0.1"])
def test_bad_sigma(sigma: Any) -> None:
    with pytest.raises(ValueError, match="`sigma`"):
        tfb_posterior(bert(), sigma)


def test_labels_that_are_given_count() -> None:
    assert labels().shape == (4,)
    model = bert()
    posterior = fit_tfb(model, inputs(), labels(), tolerance=0.02, bounds=(1e-3, 10.0), num_samples=4, progress=False)
    before = nll(PointPosterior(model), labels())
    assert nll(posterior, labels(), num_samples=4) <= before * 1.02


def test_experts_in_one_matrix_are_refused() -> None:
    """W_e + s B_e A_e with A of shape (r E, d_in): the SVD of all B together is that of no weight."""
    peft = pytest.importorskip("peft")
    config = hf.MixtralConfig(
        vocab_size=40, hidden_size=12, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=16, num_local_experts=3, num_experts_per_tok=2,
    )  # fmt: skip
    lora = {"r": 2, "target_modules": [], "init_lora_weights": False}
    options = peft.LoraConfig(target_parameters=["mlp.experts.gate_up_proj"], **lora)
    with pytest.raises(ValueError, match="several experts"):
        tfb_posterior(peft.get_peft_model(hf.MixtralForCausalLM(config), options), 0.1)
