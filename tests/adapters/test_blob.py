"""BLoB: its KL against dense Gaussians over the whole weight, its initial scales, and that it trains."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributions import MultivariateNormal, kl_divergence

import bayeformers
from bayeformers.adapters import BlobReweighting, blob_kl_weights, lora_pairs, to_blob
from bayeformers.nn import variational_tensors
from tests.adapters.lora import bert, dense_normal, inputs, labels, llama


@pytest.mark.protects("kl_is_a_sum")
def test_kl_is_that_of_low_rank_gaussians_over_the_whole_weight() -> None:
    """vec(W) = vec(W0) + s (B (x) I) vec(A): both covariances are (d_out d_in) x (d_out d_in), of rank r d_in."""
    model = to_blob(bert(), epsilon=0.3, prior_std=0.2)
    scales = {id(tensor.loc): tensor.scale().double().detach() for tensor in variational_tensors(model)}
    expected = torch.zeros((), dtype=torch.float64)
    for pair in lora_pairs(model):
        b, a = pair.up.weight.detach(), pair.down.get_parameter("weight")
        map_ = pair.scaling * torch.kron(b, torch.eye(a.shape[1], dtype=b.dtype))  # of vec(A), row by row
        q = map_ @ torch.diag(scales[id(a)].square().flatten()) @ map_.mT
        prior = pair.scaling**2 * 0.2**2 * torch.kron(b @ b.mT, torch.eye(a.shape[1], dtype=b.dtype))
        basis, within = dense_normal(prior)
        assert basis.shape[1] == a.numel()  # B has full column rank
        mean = basis.mT @ (map_ @ a.detach().flatten())
        posterior = MultivariateNormal(mean, basis.mT @ q @ basis)
        expected += kl_divergence(posterior, MultivariateNormal(torch.zeros_like(mean), within))
    found = bayeformers.kl_divergence(model).double()
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=0)


def test_only_a_is_random_and_b_trains() -> None:
    model = to_blob(bert(trained=False))
    names = {tensor.name for tensor in variational_tensors(model)}
    assert len(names) == 4
    assert all("lora_A.default" in name for name in names)
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    kinds = ("lora_A.default.weight", "lora_A.default.weight_rho", "lora_B.default.weight")
    heads = ("classifier.modules_to_save.default.weight", "classifier.modules_to_save.default.bias")
    assert all(name.endswith((*kinds, *heads)) for name in trains)
    assert len(trains) == 4 * 3 + 2


def test_initial_scales_are_squares_of_a_uniform_number() -> None:
    """G^2 of G in [eps / sqrt(2), eps]; float32's rho keeps 1e-6 of it. The same seed gives the same."""
    first, again, other = (to_blob(bert(), epsilon=0.1, seed=seed) for seed in (3, 3, 4))
    own, same, differs = (
        torch.cat([t.scale().flatten() for t in variational_tensors(m)]) for m in (first, again, other)
    )
    own = own.detach()
    assert float(own.min()) >= 0.1**2 / 2 * (1 - 1e-5)
    assert float(own.max()) <= 0.1**2 * (1 + 1e-5)
    root = (own.double().sqrt() / 0.1 - 0.5**0.5) / (1 - 0.5**0.5)
    assert abs(float(root.mean()) - 0.5) < 5 * (1 / 12 / own.numel()) ** 0.5  # five standard errors of a uniform mean
    assert torch.equal(own, same)
    assert not torch.equal(own, differs)


def test_weights_of_the_kl_double_and_average_to_one() -> None:
    for count in (1, 2, 5, 60, 3000):
        weights = torch.tensor(blob_kl_weights(count), dtype=torch.float64)
        torch.testing.assert_close(weights.mean(), torch.ones((), dtype=torch.float64))
        kept = weights[-40:]
        torch.testing.assert_close(kept[1:], 2 * kept[:-1])


def test_trainer_reweights_and_puts_back(tmp_path: Any) -> None:
    model = to_blob(llama(trained=False).float(), epsilon=0.05)
    rows = [{"input_ids": list(range(1, 6)), "labels": list(range(1, 6))} for _ in range(6)]
    seen: list[float] = []

    class Watch(BlobReweighting):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            super().on_step_begin(args, state, control, **kwargs)
            seen.append(args.kl_weight)

    args = bayeformers.BayesianTrainingArguments(
        str(tmp_path), kl_weight=0.5, num_train_epochs=2, per_device_train_batch_size=2, report_to=[], use_cpu=True
    )
    trainer = bayeformers.BayesianTrainer(model=model, args=args, train_dataset=rows, callbacks=[Watch()])
    trainer.train()
    assert seen == [0.5 * weight for weight in blob_kl_weights(3)] * 2
    assert args.kl_weight == 0.5


@pytest.mark.parametrize(("accumulated", "expected"), [(1, 4), (3, 2)])
def test_an_epoch_is_that_of_the_data(accumulated: int, expected: int) -> None:
    """`max_steps` may end within an epoch, which is as long as ever."""
    args = SimpleNamespace(kl_weight=1.0, gradient_accumulation_steps=accumulated)
    state, callback = SimpleNamespace(num_train_epochs=3, max_steps=10), BlobReweighting()
    callback.on_train_begin(args, state, None, train_dataloader=[None] * 4)
    assert callback.weights == blob_kl_weights(expected)


def test_every_adapter_learns() -> None:
    """After a few steps the B matrices, 0 at first, have moved, and draws of A change the answers."""
    model = bert()
    with torch.no_grad():
        for pair in lora_pairs(model):
            pair.up.weight.zero_()
    to_blob(model, epsilon=0.3)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for _ in range(5):
        loss = model(**inputs(), labels=labels()).loss + 1e-3 * bayeformers.kl_divergence(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(bool(pair.up.weight.abs().amin() > 0) for pair in lora_pairs(model))
    predictive = bayeformers.predict(model.eval(), inputs(), num_samples=4)
    assert bool((predictive.mutual_information > 1e-9).all())


@pytest.mark.parametrize(
    ("options", "told"),
    [({"epsilon": 0.0}, "`epsilon`"), ({"prior_std": -1.0}, "`prior_std`"), ({"estimator": "flip"}, "`estimator`")],
)
def test_bad_numbers(options: dict[str, Any], told: str) -> None:
    model = bert()
    with pytest.raises((ValueError, TypeError), match=told):
        to_blob(model, **options)
    assert not any(name.endswith("_rho") for name, _ in model.named_parameters())


def test_models_without_a_live_adapter() -> None:
    with pytest.raises(ValueError, match="no active LoRA adapter"):
        to_blob(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="`model` must be a torch.nn.Module"):
        to_blob("model")  # type: ignore[arg-type]
    merged: Any = bert()
    merged.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        to_blob(merged)
    off: Any = bert()
    with off.disable_adapter(), pytest.raises(ValueError, match="switched off"):
        to_blob(off)
    with pytest.raises(ValueError, match="Bayesian already"):
        to_blob(to_blob(bert()))
