"""`dnn_to_bnn`, `get_kl_loss`, entropies and losses: the published snippets run, and agree with the new names."""

from __future__ import annotations

import argparse
import copy
import math
import pickle
import sys
import types
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

import bayeformers
from bayeformers import NormalPrior, fixed_draw, is_bayesian, posterior_mean, to_bayesian, to_deterministic
from bayeformers.compat.bayesian_torch.models.dnn_to_bnn import dnn_to_bnn, get_kl_loss
from bayeformers.compat.bayesian_torch.utils import uncertainty_calibration_loss as calibration
from bayeformers.compat.bayesian_torch.utils.avuc_loss import AUAvULoss, AvULoss
from bayeformers.compat.bayesian_torch.utils.util import get_rho, mutual_information, predictive_entropy
from bayeformers.losses import auavu_loss, avuc_loss, eac_loss, eau_loss
from bayeformers.nn import variational_tensors
from tests.compat.snippets import run
from tests.reference import moped_sigma, sigma

PARAMETERS: dict[str, Any] = {
    "prior_mu": 0.0,
    "prior_sigma": 1.0,
    "posterior_mu_init": 0.0,
    "posterior_rho_init": -3.0,
    "type": "Reparameterization",
    "moped_enable": False,
    "moped_delta": 0.5,
}
MOPED = PARAMETERS | {"moped_enable": True, "moped_delta": 0.2}


def convnet() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(0.25),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16, 3),
    )


def resnet18(pretrained: bool = False) -> nn.Sequential:
    """Stands in for torchvision's."""
    return convnet()


# The usage section of the package's README.
CONVERSION = """
    import torch
    import torchvision
    from bayesian_torch.models.dnn_to_bnn import dnn_to_bnn, get_kl_loss

    const_bnn_prior_parameters = {
            "prior_mu": 0.0,
            "prior_sigma": 1.0,
            "posterior_mu_init": 0.0,
            "posterior_rho_init": -3.0,
            "type": "Reparameterization",  # Flipout or Reparameterization
            "moped_enable": False,  # True to initialize mu/sigma from the pretrained dnn weights
            "moped_delta": 0.5,
    }

    model = torchvision.models.resnet18()
    dnn_to_bnn(model, const_bnn_prior_parameters)
"""
PRETRAINED = """
    const_bnn_prior_parameters = {
            "prior_mu": 0.0,
            "prior_sigma": 1.0,
            "posterior_mu_init": 0.0,
            "posterior_rho_init": -3.0,
            "type": "Reparameterization",  # Flipout or Reparameterization
            "moped_enable": True,  # True to initialize mu/sigma from the pretrained dnn weights
            "moped_delta": 0.5,
    }

    model = torchvision.models.resnet18(pretrained=True)
    dnn_to_bnn(model, const_bnn_prior_parameters)
"""
TRAINING = """
    criterion = torch.nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), args.learning_rate)

    output = model(x_train)
    kl = get_kl_loss(model)
    ce_loss = criterion(output, y_train)
    loss = ce_loss + kl / args.batch_size

    loss.backward()
    optimizer.step()
"""
TESTING = """
    model.eval()
    with torch.no_grad():
        output_mc = []
        for mc_run in range(args.num_monte_carlo):
            logits = model(x_test)
            probs = torch.nn.functional.softmax(logits, dim=-1)
            output_mc.append(probs)
        output = torch.stack(output_mc)
        pred_mean = output.mean(dim=0)
        y_pred = torch.argmax(pred_mean, axis=-1)
        test_acc = (y_pred.data.cpu().numpy() == y_test.data.cpu().numpy()).mean()
"""
UNCERTAINTY = """
    from utils.util import predictive_entropy, mutual_information

    predictive_uncertainty = predictive_entropy(output.data.cpu().numpy())
    model_uncertainty = mutual_information(output.data.cpu().numpy())
"""


@pytest.mark.parametrize("conversion", [(CONVERSION,), (CONVERSION, PRETRAINED)], ids=["fresh", "moped"])
def test_published_snippets_run(conversion: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    torchvision: Any = types.ModuleType("torchvision")
    torchvision.models = types.SimpleNamespace(resnet18=resnet18)
    monkeypatch.setitem(sys.modules, "torchvision", torchvision)
    names: dict[str, Any] = {
        "args": argparse.Namespace(learning_rate=1e-2, batch_size=8, num_monte_carlo=5),
        "x_train": torch.randn(8, 1, 6, 6),
        "y_train": torch.randint(3, (8,)),
        "x_test": torch.randn(10, 1, 6, 6),
        "y_test": torch.randint(3, (10,)),
    }
    for snippet in (*conversion, TRAINING, TESTING):
        run(snippet, "bayesian_torch", "bayeformers.compat.bayesian_torch", names)
    run(UNCERTAINTY, "utils", "bayeformers.compat.bayesian_torch.utils", names)
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in names["model"].parameters())
    assert names["output"].shape == (5, 10, 3) and 0 <= names["test_acc"] <= 1
    assert names["predictive_uncertainty"].shape == names["model_uncertainty"].shape == (10,)
    assert (names["model_uncertainty"] > 0).all()  # in `eval()` too every call is a draw


# ----------------------------------------------------------------------------------------------------------- dnn_to_bnn


@pytest.mark.parametrize("kind", ["Reparameterization", "Flipout"])
def test_moped_is_to_bayesian(kind: str) -> None:
    """Same means, scales, draws and KL as the new call."""
    old = convnet()
    new, plain = copy.deepcopy(old), copy.deepcopy(old).eval()
    dnn_to_bnn(old, MOPED | {"type": kind})
    to_bayesian(new, 0.2, freeze=False, prior=NormalPrior(1.0, "pretrained"), estimator=kind.lower(), keep_dropout=True)
    old.eval(), new.eval()
    x = torch.randn(5, 1, 6, 6)
    for index in range(2):
        with fixed_draw(old, index), fixed_draw(new, index):
            assert torch.equal(old(x), new(x))
    with posterior_mean(old):
        torch.testing.assert_close(old(x), plain(x))
    assert torch.equal(get_kl_loss(old), bayeformers.kl_divergence(new))
    assert all(p.requires_grad for p in old.parameters())


def test_moped_centres_the_prior() -> None:
    """The prior is N(w0, prior_sigma^2): at first KL = sum(log(s/sigma) + sigma^2/(2 s^2) - 1/2), without the means."""
    model = nn.Linear(6, 4).double()
    weights = [p.detach().clone() for p in model.parameters()]
    dnn_to_bnn(model, MOPED | {"prior_sigma": 0.7})
    ratios = torch.cat([(moped_sigma(w, 0.2) / 0.7).flatten() for w in weights])
    expected = (ratios.square() / 2 - ratios.log() - 0.5).sum()
    torch.testing.assert_close(get_kl_loss(model), expected, rtol=1e-6, atol=0)
    with torch.no_grad():
        model.weight.add_(1.0)
    torch.testing.assert_close(get_kl_loss(model), expected + 24 / (2 * 0.7**2), rtol=1e-6, atol=0)


def test_fresh_start() -> None:
    """Without MOPED: new weights whose spread fits the fan-in, plus mu_init; scale softplus(rho_init); given prior."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(400, 50), nn.Linear(50, 4))
    before = [p.detach().clone() for p in model.parameters()]
    dnn_to_bnn(model, PARAMETERS | {"posterior_mu_init": 3.0, "posterior_rho_init": -2.0, "prior_mu": 1.0})
    for tensor, old in zip(variational_tensors(model), before, strict=True):
        assert not torch.allclose(tensor.loc, old)
        assert (tensor.rho == -2.0).all()
        fan_in = 400 if tensor.name.startswith("0") else 50
        assert (tensor.loc - 3.0).abs().max() <= 1 / math.sqrt(fan_in) + 1e-6
        assert tensor.module.prior == NormalPrior(1.0, 1.0)


def test_conversion_of_a_single_layer_and_of_other_modules() -> None:
    """The root converts; LSTM and transposed convolutions convert; embeddings and GRUs stay, as formerly."""
    layer = nn.Linear(2, 2)
    dnn_to_bnn(layer, PARAMETERS)
    assert is_bayesian(layer)
    parts: dict[str, nn.Module] = {
        "embedding": nn.Embedding(5, 2), "gru": nn.GRU(2, 2), "lstm": nn.LSTM(2, 2, num_layers=2, bidirectional=True),
        "up": nn.ConvTranspose1d(2, 2, 3, 2, output_padding=1), "group": nn.ModuleDict({"1": nn.Conv3d(1, 1, 1)}),
    }  # fmt: skip
    model = nn.ModuleDict(parts)
    dnn_to_bnn(model, MOPED)
    assert {tensor.name.split(".")[0] for tensor in variational_tensors(model)} == {"lstm", "up", "group"}
    assert model["lstm"](torch.ones(3, 1, 2))[0].shape == (3, 1, 4)


@pytest.mark.parametrize("moped", [True, False])
def test_tied_weights_stay_tied(moped: bool) -> None:
    """A head that shares its weight with an embedding brings it along: one tensor, one draw, one KL."""
    table, head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
    head.weight = table.weight
    model = nn.Sequential(table, nn.Linear(4, 4), head)
    dnn_to_bnn(model, PARAMETERS | {"moped_enable": moped})
    assert model[0].weight is model[2].weight and model[0].weight_rho is model[2].weight_rho
    assert [tensor.name for tensor in variational_tensors(model)] == ["0.weight", "1.weight", "1.bias"]
    assert model(torch.tensor([[1, 2]])).shape == (1, 2, 7)


def test_draws_in_eval_end_with_the_conversion() -> None:
    """Reproducible by torch's seed; copied and pickled models draw too; the mean is there; nothing stays behind."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))
    dnn_to_bnn(model, MOPED)
    model.eval()
    x = torch.randn(4, 3)
    copies = [model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for each in copies:
        torch.manual_seed(7)
        first, second = each(x), each(x)
        torch.manual_seed(7)
        assert torch.equal(each(x), first) and not torch.equal(first, second)
        with posterior_mean(each):
            assert torch.equal(each(x), each(x))
        with fixed_draw(each, 3):
            assert torch.equal(each(x), each(x))
        assert all(tensor.module.draw is None for tensor in variational_tensors(each))
        assert not torch.equal(each.forward(x), each.forward(x))
        with posterior_mean(each):
            assert torch.equal(each.forward(x), each(x))
    with pytest.raises(RuntimeError):
        model(torch.randn(4, 5))
    assert all(tensor.module.draw is None for tensor in variational_tensors(model))
    to_deterministic(model)
    assert torch.equal(model(x), model(x))
    to_bayesian(model)
    assert torch.equal(model(x), model(x))  # the new way: `eval()` is the mean


# ------------------------------------------------------------------------------------------------------------------- KL


def by_hand(model: nn.Module, reduction: str) -> Tensor:
    """From torch's own KL between normals, in float64; prior N(0.1, 0.5^2)."""
    total = torch.zeros((), dtype=torch.float64)
    for name, loc in model.named_parameters():
        if not name.endswith("_rho"):
            scale = sigma(model.get_parameter(f"{name}_rho"))
            prior = Normal(torch.tensor(0.1, dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64))
            kl = kl_divergence(Normal(loc.detach().double(), scale), prior)
            total += kl.sum() if reduction == "sum" else kl.mean()
    return total


def test_kl_is_a_sum_or_as_formerly_a_mean_per_tensor() -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 2), nn.Linear(7, 5))
    dnn_to_bnn(model, PARAMETERS | {"prior_mu": 0.1, "prior_sigma": 0.5})
    torch.testing.assert_close(get_kl_loss(model).double(), by_hand(model, "sum"), rtol=1e-5, atol=0)
    torch.testing.assert_close(get_kl_loss(model, "sum"), get_kl_loss(model))
    mean = get_kl_loss(model, reduction="mean")
    torch.testing.assert_close(mean.double(), by_hand(model, "mean"), rtol=1e-5, atol=0)
    gradients = torch.autograd.grad(mean, list(model.parameters()))
    assert all(bool(g.abs().sum() > 0) for g in gradients)


def test_kl_grows_with_the_layer() -> None:
    """n x n layers without bias, the prior and initial scale of the README: the sum grows as n^2, the mean does not."""
    values = []
    for size in (10, 100):
        torch.manual_seed(0)
        layer = nn.Linear(size, size, bias=False)
        dnn_to_bnn(layer, PARAMETERS)
        values.append((get_kl_loss(layer).item(), get_kl_loss(layer, "mean").item()))
    (small, small_mean), (large, large_mean) = values
    assert small == pytest.approx(100 * small_mean, rel=1e-5) and large == pytest.approx(10_000 * large_mean, rel=1e-5)
    assert 0.95 < large_mean / small_mean < 1.05


# ------------------------------------------------------------------------------------------------------- uncertainties


def entropy_by_loop(p: np.ndarray) -> float:
    return -math.fsum(float(value) * math.log(value) for value in p if value > 0)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_entropies_by_loop(dtype: type) -> None:
    rng = np.random.default_rng(0)
    probs = rng.dirichlet(np.full(4, 0.5), size=(6, 5)).astype(dtype)
    probs[0, 0] = [1, 0, 0, 0]
    total = [entropy_by_loop(probs[:, i].mean(0)) for i in range(5)]
    expected = [math.fsum(entropy_by_loop(p) for p in probs[:, i]) / 6 for i in range(5)]
    tolerance = 1e-12 if dtype is np.float64 else 1e-6
    np.testing.assert_allclose(predictive_entropy(probs), total, rtol=0, atol=tolerance)
    np.testing.assert_allclose(mutual_information(probs), np.subtract(total, expected), rtol=0, atol=tolerance)
    np.testing.assert_allclose(predictive_entropy(probs[:, 1]), total[1], rtol=0, atol=tolerance)


def test_get_rho_keeps_zeros_small() -> None:
    weight = torch.tensor([1.0, -2.0, 0.0])
    torch.testing.assert_close(sigma(get_rho(weight, 0.1)), moped_sigma(weight, 0.1), rtol=1e-5, atol=0)


def test_avu_losses_are_the_new_ones() -> None:
    """beta * loss, the former `type` by name; the area comes with the second."""
    logits, labels = torch.randn(4, 9, 3, requires_grad=True), torch.randint(3, (9,))
    for kind, name in enumerate(("predictive_entropy", "mutual_information")):
        loss = AvULoss(beta=3)(logits, labels, 0.3, type=kind)
        assert torch.equal(loss, 3 * avuc_loss(logits, labels, 0.3, uncertainty=name))
        loss, area = AUAvULoss(beta=3)(logits, labels, kind)
        assert torch.equal(loss, 3 * auavu_loss(logits, labels, uncertainty=name))
        torch.testing.assert_close(area, (-loss / 3).exp())
    one = logits[0]
    assert torch.equal(AvULoss()(one, labels, 0.3), avuc_loss(one, labels, 0.3))
    assert torch.equal(calibration.AvULoss(2)(one, labels, 0.3), 2 * avuc_loss(one, labels, 0.3))
    AUAvULoss()(one, labels)[0].backward()
    assert logits.grad is not None


def test_avu_loss_by_loop() -> None:
    """The sum over examples written out, with 0.01 in both counts."""
    logits, labels = torch.randn(20, 3, dtype=torch.float64), torch.randint(3, (20,))
    aligned = misaligned = 0.01
    for p, label in zip(logits.softmax(-1).tolist(), labels.tolist(), strict=True):
        unc = -sum(v * math.log(v) for v in p)
        right, certain = p.index(max(p)) == label, unc <= 0.8
        weight = (max(p) if right else 1 - max(p)) * (1 - math.tanh(unc) if certain else math.tanh(unc))
        aligned, misaligned = (aligned + weight, misaligned) if right == certain else (aligned, misaligned + weight)
    expected = -math.log(aligned / (aligned + misaligned))
    assert float(AvULoss()(logits, labels, 0.8)) == pytest.approx(expected, rel=1e-9)


def test_error_aligned_losses_are_the_new_ones() -> None:
    error, other = torch.rand(7) * 2, torch.rand(7)
    assert torch.equal(calibration.EaULoss(2)(error, other, 0.5, 0.4), 2 * eau_loss(error, other, 0.5, 0.4))
    assert torch.equal(calibration.EaCLoss(2)(error, other, 0.5, 0.4), 2 * eac_loss(error, other, 0.5, 0.4))
