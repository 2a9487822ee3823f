"""The older BayeFormers' call pattern: a wrapped copy, log densities as methods, a loop over draws."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Normal
from transformers import BertConfig, BertForSequenceClassification

import bayeformers
from bayeformers import NormalPrior, fixed_draw, is_bayesian, posterior_mean, predict
from bayeformers.compat.bayeformers import Model, to_bayesian
from bayeformers.nn import variational_tensors
from tests.compat.snippets import run
from tests.reference import sigma


class MLP(nn.Module):
    """Log-probabilities, as its examples' networks have them."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3), nn.LogSoftmax(dim=1))

    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = self.mlp(input)
        return output


# The usage section of its README, from the conversion on; there `samples` is both a number and what the loop runs over,
# and the loss is written `F.nll`, which torch calls `F.nll_loss`.
README = """
    from bayeformers import to_bayesian

    bayesian_model = to_bayesian(model, delta=0.05, freeze=True)

    predictions = torch.zeros(samples, batch_size, *output_dim)
    log_prior = torch.zeros(samples, batch_size)
    log_variational_posterior = torch.zeros(samples, batch_size)

    for s in range(samples):
        predictions[s] = bayesian_model(inputs)
        log_prior[s] = bayesian_model.log_prior()
        log_variational_posterior[s] = bayesian_model.log_variational_posterior()

    predictions = predictions.mean(0)
    log_prior = log_prior.mean(0)
    log_variational_posterior = log_variational_posterior.mean(0)

    nll = F.nll_loss(predictions, labels, reduction="sum")
    loss = (log_variational_posterior - log_prior) / n_batches + nll
"""


def test_published_snippet_runs() -> None:
    """Its loss is KL / n_batches + NLL for each element of the batch axis, and reaches every scale."""
    names: dict[str, Any] = {
        "torch": torch, "F": F, "model": MLP(), "samples": 4, "batch_size": 5, "output_dim": (3,), "n_batches": 10,
        "inputs": torch.randn(5, 6), "labels": torch.randint(3, (5,)),
    }  # fmt: skip
    run(README, "bayeformers", "bayeformers.compat.bayeformers", names)
    model, nll = names["bayesian_model"], names["nll"]
    torch.testing.assert_close(
        names["loss"], (bayeformers.kl_divergence(model) / 10 + nll).expand(5), rtol=1e-4, atol=1e-3
    )
    names["loss"].sum().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.abs().sum() > 0)}
    assert trained == {f"model.mlp.{i}.{name}_rho" for i in (0, 2) for name in ("weight", "bias")}


def test_training_in_the_pattern_of_its_examples() -> None:
    """Means of log densities over draws, a summed NLL, Adam: the loss falls, the means train."""
    x, y = torch.randn(64, 6), torch.randint(3, (64,))
    x[:, 0] += 3.0 * (y == 1)
    x[:, 1] += 3.0 * (y == 2)
    model = to_bayesian(MLP(), delta=0.05)
    optim, samples, n_batches, losses = torch.optim.Adam(model.parameters(), lr=1e-2), 3, 100, []
    for _ in range(30):
        prediction = torch.zeros(samples, 64, 3)
        log_prior, log_variational_posterior = torch.zeros(samples), torch.zeros(samples)
        optim.zero_grad()
        for s in range(samples):
            prediction[s] = model(x)
            log_prior[s] = model.log_prior()
            log_variational_posterior[s] = model.log_variational_posterior()
        nll = F.nll_loss(prediction.mean(0), y, reduction="sum")
        loss = (log_variational_posterior.mean() - log_prior.mean()) / n_batches + nll
        loss.backward()
        optim.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_agrees_with_the_new_call() -> None:
    """Same draws, densities and prior as `to_bayesian` with NormalPrior(softplus(1)); the given model is untouched."""
    plain = MLP()
    kept = copy.deepcopy(plain.state_dict())
    old = to_bayesian(plain, delta=0.1, freeze=True)
    new = bayeformers.to_bayesian(copy.deepcopy(plain), 0.1, True, prior=NormalPrior(std=math.log1p(math.e)))
    x = torch.randn(4, 6)
    with fixed_draw(old, 1), fixed_draw(new, 1):
        assert torch.equal(old(x), new(x))
    assert torch.equal(old.log_prior(), bayeformers.log_prior(new))
    assert torch.equal(old.log_variational_posterior(), bayeformers.log_variational_posterior(new))
    assert not is_bayesian(plain) and all(torch.equal(v, kept[k]) for k, v in plain.state_dict().items())


def test_log_densities_by_hand() -> None:
    """E_q[log q] and E_q[log p] of N(w0, softplus(1)^2), by torch's entropy and second moments in float64."""
    model = to_bayesian(nn.Linear(5, 4).double(), delta=0.3)
    log_q = log_p = 0.0
    std = torch.tensor(math.log1p(math.e), dtype=torch.float64)
    for tensor in variational_tensors(model):
        scale = sigma(tensor.rho)
        log_q -= float(Normal(tensor.loc.detach(), scale).entropy().sum())
        log_p += float(
            (
                Normal(torch.zeros_like(scale), std).log_prob(torch.zeros_like(scale)) - scale.square() / (2 * std**2)
            ).sum()
        )
    assert model.log_variational_posterior().item() == pytest.approx(log_q, rel=1e-6)
    assert model.log_prior().item() == pytest.approx(log_p, rel=1e-6)


def test_draws_in_every_mode() -> None:
    model, x = to_bayesian(MLP(), delta=0.3), torch.randn(4, 6)
    for mode in (True, False):
        model.train(mode)
        assert not torch.equal(model(x), model(x))
        with posterior_mean(model):
            assert torch.equal(model(x), model(x))


def test_fresh_start() -> None:
    """Without `delta`: means U(-0.2, 0.2), rho U(-5, -4), the mixture prior; or as `initialization` fills them."""
    model = to_bayesian(nn.ModuleDict({"fc": nn.Linear(40, 30), "table": nn.Embedding(3, 2)}))
    tensors = list(variational_tensors(model))
    assert [tensor.name for tensor in tensors] == ["fc.weight", "fc.bias"]
    for tensor in tensors:
        assert tensor.loc.abs().max() <= 0.2 and tensor.rho.min() >= -5 and tensor.rho.max() <= -4
        assert tensor.loc.requires_grad and type(tensor.module.prior).__name__ == "ScaleMixturePrior"
    assert abs(float(tensors[0].loc.detach().std()) - 0.4 / math.sqrt(12)) < 0.01  # 1,200 draws: standard error 0.002

    def ones(mean: nn.Parameter, rho: nn.Parameter) -> None:
        mean.fill_(1.0)
        rho.fill_(-3.0)

    model = to_bayesian(nn.Linear(2, 2), initialization=ones, prior=NormalPrior(1.0, 0.0))
    assert (model.weight == 1).all() and (model.weight_rho == -3).all()
    model(torch.ones(1, 2))
    assert torch.isfinite(model.log_prior())


def test_wrapper_keeps_the_api_of_a_transformer(tmp_path: Path) -> None:
    """`.config`, `.save_pretrained`, `bmodel.model`; `predict` sees through; copies; a reload by the new name."""
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=2
    )
    bmodel = to_bayesian(BertForSequenceClassification(config), delta=0.1, freeze=True).eval()
    assert bmodel.config is bmodel.model.config and bmodel.num_labels == 2
    inputs = {"input_ids": torch.randint(1, 50, (3, 5))}
    assert not torch.equal(bmodel(**inputs).logits, bmodel(**inputs).logits)
    log_probs = predict(bmodel, inputs, num_samples=3).log_probs
    torch.testing.assert_close(predict(copy.deepcopy(bmodel), inputs, num_samples=3).log_probs, log_probs)
    bmodel.save_pretrained(tmp_path)
    loaded = bayeformers.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(predict(loaded, inputs, num_samples=3).log_probs, log_probs)
    assert bayeformers.bayesian_config(bmodel).delta == 0.1 and bayeformers.summary(bmodel)
    assert all(p.requires_grad for p in bayeformers.unfreeze(bmodel).parameters())
    with pytest.raises(AttributeError, match="nonsense"):
        bmodel.nonsense  # noqa: B018
    with pytest.raises(AttributeError):
        Model.__new__(Model).anything  # noqa: B018
    assert not is_bayesian(bayeformers.to_deterministic(bmodel))
    assert torch.equal(bmodel(**inputs).logits, bmodel(**inputs).logits)
