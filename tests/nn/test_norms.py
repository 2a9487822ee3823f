"""Normalisations on request: `LayerNorm`, `RMSNorm`, and the RMSNorm classes that models bring along."""

from __future__ import annotations

import copy
import importlib
import json
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

import bayeformers
import bayeformers.nn as bnn
from bayeformers import (
    NormalPrior,
    VariationalPosterior,
    bayesian_config,
    fixed_draw,
    kl_divergence,
    posterior_mean,
    summary,
    to_bayesian,
    to_deterministic,
)
from bayeformers.nn import training_draw, variational_tensors
from bayeformers.nn.norms import Normalization
from tests.cases import case
from tests.reference import moped_sigma, noise_of, sigma, sigma_slope

ESTIMATORS = sorted(bnn.ESTIMATORS)
FOREIGN = {
    "llama": "LlamaRMSNorm",
    "t5": "T5LayerNorm",
    "gemma": "GemmaRMSNorm",
    "gemma2": "Gemma2RMSNorm",
    "gemma3": "Gemma3RMSNorm",
    "qwen3": "Qwen3RMSNorm",
    "olmo2": "Olmo2RMSNorm",
    "deepseek_v3": "DeepseekV3RMSNorm",
}
MADE: dict[str, Any] = {
    "LayerNorm": lambda: nn.LayerNorm(6),
    "LayerNorm without bias": lambda: nn.LayerNorm(6, bias=False),
    "LayerNorm on a plane": lambda: nn.LayerNorm((3, 6)),
    "LayerNorm on a volume": lambda: nn.LayerNorm((2, 3, 6)),
    "RMSNorm": lambda: nn.RMSNorm(6),
    "RMSNorm on a plane": lambda: nn.RMSNorm((3, 6), eps=1e-3),
    **{name: lambda model=model: foreign(model) for model, name in FOREIGN.items()},
}


def foreign(model: str) -> nn.Module:
    module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    made: nn.Module = getattr(module, FOREIGN[model])(6)
    return made


def plain(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    layer: nn.Module = MADE[name]().to(dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.4)
    return layer


def converted(name: str, **options: Any) -> Any:
    return to_bayesian(plain(name), 0.3, norms=True, **options).train()


def is_foreign(name: str) -> bool:
    return name in FOREIGN.values()


def tolerance(name: str) -> dict[str, float]:
    """Models' own classes compute in float32."""
    return {"rtol": 1e-5, "atol": 1e-5} if is_foreign(name) else {"rtol": 1e-6, "atol": 1e-7}


def inputs() -> Tensor:
    return torch.randn(3, 2, 3, 6, dtype=torch.float64)


def drawn(layer: Any, index: int) -> dict[str, Tensor]:
    noise = noise_of(to_deterministic(copy.deepcopy(layer)), {"": "norm"}, index)
    return {n: layer.get_parameter(n) + sigma(layer.get_parameter(f"{n}_rho")) * eps for n, eps in noise.items()}


@pytest.mark.parametrize("name", MADE)
def test_the_class_itself_at_the_mean_and_of_a_draw(name: str) -> None:
    """Every Parameter is random; the class's own forward with the drawn gain, Gemma's 1 + gain included."""
    layer, rest, x = converted(name), plain(name), inputs()
    assert isinstance(layer, type(rest)) and isinstance(layer, Normalization)
    assert set(layer.state_dict()) == {n + end for n in rest.state_dict() for end in ("", "_rho")}
    torch.testing.assert_close(sigma(layer.weight_rho), moped_sigma(layer.weight, 0.3), rtol=1e-5, atol=1e-8)
    with torch.no_grad():
        assert torch.equal(layer.eval()(x), rest(x))
        with posterior_mean(layer.train()):
            assert torch.equal(layer(x), rest(x))
        with fixed_draw(layer, 2):
            torch.testing.assert_close(layer(x), functional_call(rest, drawn(layer, 2), (x,)), **tolerance(name))
        assert not torch.equal(layer(x), layer(x))
    with pytest.raises(ValueError, match="nothing to convert"):
        to_bayesian(plain(name))
    restored = to_deterministic(layer)
    assert type(restored) is type(rest) and torch.equal(restored(x), rest(x))


@pytest.mark.parametrize("name", MADE)
def test_flipout_is_one_gain_per_example(name: str) -> None:
    """Example n sees gain + r_n t_n sigma eps and bias + t_n sigma_b eps_b, signs on the first axis of the gain."""
    layer, rest, x = converted(name, estimator="flipout"), plain(name), inputs()
    with torch.no_grad(), training_draw(layer):
        output = layer(x)
        tensors = {key: layer.variational(key) for key in layer.specs}
        gain = tensors["weight"]
        r, t = (gain.draw.signs(gain.spec, axis, (3, len(gain.loc)), x.device).double() for axis in (1, 0))
        for n in range(3):
            flips = {"weight": r[n] * t[n], "bias": t[n]}
            own = {
                key: value.loc + flips[key].reshape(-1, *[1] * (value.loc.dim() - 1)) * value.perturbation
                for key, value in tensors.items()
            }
            expected = functional_call(rest, own, (x[n : n + 1],))
            torch.testing.assert_close(output[n : n + 1], expected, **tolerance(name))


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("name", ["LayerNorm", "GemmaRMSNorm"])
def test_moments(name: str, estimator: str) -> None:
    """Mean and covariance over 2,000 forwards, within 5 standard errors (sqrt(2 / S) relative for variances).

    Reparameterization: one gain for all; flipout: within an example; local reparameterization: no covariance at all.
    """
    draws = 2000
    layer, x = converted(name, estimator=estimator), torch.randn(2, 2, 6, dtype=torch.float64)
    with torch.no_grad():
        outputs = torch.stack([layer(x).flatten() for _ in range(draws)]).double()
        mean = plain(name)(x).double().flatten()
    if name == "LayerNorm":
        xhat = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        variance_b = sigma(layer.bias_rho).square()
    else:
        xhat, variance_b = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt(), torch.zeros(6)
    rows = xhat.reshape(4, 6)
    between = torch.einsum("ni,mi,i->nmi", rows, rows, sigma(layer.weight_rho).square()) + variance_b
    covariance = torch.einsum("nmi,ij->nimj", between, torch.eye(6, dtype=torch.float64)).reshape(24, 24)
    if estimator == "flipout":
        covariance = covariance * torch.block_diag(*[torch.ones(12, 12)] * 2)
    elif estimator == "local_reparameterization":
        covariance = covariance.diagonal().diag()
    spread = covariance.diagonal().sqrt()
    assert ((outputs.mean(0) - mean).abs() < 5 * spread / math.sqrt(draws) + 1e-6).all()
    error = (outputs.T.cov() - covariance).abs()
    assert (error < 5 * math.sqrt(2 / draws) * torch.outer(spread, spread) + 1e-6).all()


@pytest.mark.parametrize("name", ["LayerNorm", "LayerNorm on a plane", "RMSNorm", "LlamaRMSNorm", "GemmaRMSNorm"])
def test_gradients_of_nll_and_kl(name: str) -> None:
    layer = converted(name, freeze=False, prior=NormalPrior(0.5, 0.1))
    rest, x = plain(name), inputs()
    with fixed_draw(layer, 1):
        (layer(x).tanh().sum() + 0.1 * kl_divergence(layer)).backward()
    noise = noise_of(rest, {"": "norm"}, 1)
    means = {n: layer.get_parameter(n).detach().clone().requires_grad_() for n in noise}
    scales = {n: sigma(layer.get_parameter(f"{n}_rho")).requires_grad_() for n in noise}
    output = functional_call(rest, {n: means[n] + scales[n] * noise[n] for n in noise}, (x,))
    prior = torch.distributions.Normal(torch.tensor(0.1).double(), torch.tensor(0.5).double())
    divergence = sum(
        torch.distributions.kl_divergence(torch.distributions.Normal(means[n], scales[n]), prior).sum() for n in noise
    )
    (output.tanh().sum() + 0.1 * divergence).backward()
    for key in noise:
        torch.testing.assert_close(layer.get_parameter(key).grad, means[key].grad, rtol=1e-4, atol=1e-5)
        rho = layer.get_parameter(f"{key}_rho")
        slope = scales[key].grad * sigma_slope(rho)  # type: ignore[operator]
        torch.testing.assert_close(rho.grad, slope.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm", "GemmaRMSNorm"])
def test_bfloat16_compile_and_copies(name: str, estimator: str) -> None:
    torch._dynamo.reset()
    half = to_bayesian(plain(name, torch.bfloat16), 0.3, norms=True, estimator=estimator).train()
    assert half(inputs().bfloat16()).dtype == torch.bfloat16 and half.weight_rho.dtype == torch.float32
    layer, x = converted(name, estimator=estimator), inputs()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert not torch.equal(compiled(x), compiled(x))
    compiled(x).square().sum().backward()
    assert layer.weight_rho.grad.abs().sum() > 0
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        with torch.no_grad(), fixed_draw(layer, 0), fixed_draw(twin, 0):
            assert torch.equal(layer(x), twin(x))


def test_only_on_request() -> None:
    """`norms=False`, the default, leaves them deterministic and says how to convert them."""
    net = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.RMSNorm(6), foreign("llama"))
    net.append(nn.LayerNorm(6, elementwise_affine=False))
    reason = "a normalisation: `norms=True` converts it"
    assert summary(to_bayesian(copy.deepcopy(net))).skipped == {"1": reason, "2": reason, "3": reason}
    model = to_bayesian(copy.deepcopy(net), norms=True)
    assert summary(model).skipped == {} and bayesian_config(model).norms
    assert len(list(variational_tensors(model))) == 6
    with pytest.raises(ValueError, match="norms=True"):
        to_bayesian(copy.deepcopy(net), target_modules=["1"])
    with pytest.raises(TypeError, match="`norms` must be True or False"):
        to_bayesian(net, norms="yes")  # type: ignore[arg-type]


def test_built_by_hand() -> None:
    """Torch's arguments; without a gain there is nothing to draw."""
    assert set(bnn.LayerNorm((2, 3)).state_dict()) == {"weight", "bias", "weight_rho", "bias_rho"}
    x = torch.randn(4, 6)
    for layer in (bnn.LayerNorm(6, elementwise_affine=False), bnn.RMSNorm(6, elementwise_affine=False)):
        assert torch.equal(layer.train()(x), layer.eval()(x)) and not layer.state_dict()
    norm = bnn.RMSNorm(6, delta=0.5)
    assert not torch.equal(norm.train()(x), norm(x))
    with torch.no_grad():
        norm.weight_rho.zero_()
    norm.reset_parameters()
    torch.testing.assert_close(sigma(norm.weight_rho), torch.full((6,), 0.5).double(), rtol=1e-5, atol=0)


class Impostor(nn.Module):
    """Of the right name, and not affine in its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight.exp()


class GatedRMSNorm(nn.Module):
    """Of the right name, with two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return self.weight * x * gate


def test_impostors_are_refused() -> None:
    Impostor.__name__ = "ImpostorRMSNorm"
    for impostor in (Impostor(), GatedRMSNorm()):
        model = to_bayesian(nn.Sequential(nn.Linear(6, 6), impostor), norms=True)
        assert summary(model).skipped == {"1": "its output is not affine in its weight"}


@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_models_and_their_reload(name: str, tmp_path: Path) -> None:
    """Every normalisation of a model converts, and comes back from its checkpoint, in bfloat16 too."""
    this = case(name)
    model = to_bayesian(this.build(), 0.2, norms=True)
    kinds = {type(m).__name__ for m in model.modules() if isinstance(m, Normalization)}
    assert kinds and not [reason for reason in summary(model).skipped.values() if "norm" in reason.lower()]
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["bayesian"]
    assert saved["norms"] is True and kinds <= set(saved["modules"].values())
    loaded = bayeformers.from_pretrained(tmp_path)
    assert bayesian_config(loaded) == bayesian_config(model)
    with torch.no_grad(), fixed_draw(model, 3), fixed_draw(loaded, 3):
        ours, theirs = (m.eval()(**this.inputs())[0] for m in (model, loaded))
    assert torch.equal(ours, theirs)
    half = bayeformers.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for tensor in variational_tensors(half):
        assert tensor.rho.dtype == torch.float32 and torch.equal(tensor.rho, model.get_parameter(f"{tensor.name}_rho"))


@pytest.mark.parametrize("name", [name for name in MADE if " on a " not in name])
def test_linearised_predictive(name: str) -> None:
    """J diag(sigma^2) J^T of a network that ends in Bayesian norms, with J by autograd, in float64."""

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.head = nn.Linear(4, 6), plain(name), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(self.first(x)).tanh())

    torch.manual_seed(1)
    model: Any = to_bayesian(Network().double(), 0.3, norms=True, exclude_modules=["first", "head"]).eval()
    x = torch.randn(5, 4, dtype=torch.float64)
    mean, covariance = VariationalPosterior(model).linearize(x)
    names = [tensor.name for tensor in variational_tensors(model)]
    assert all(key.startswith("norm.") for key in names)
    means = {key: model.get_parameter(key).detach() for key in names}
    found = jacrev(lambda w: functional_call(model, w, (x,)))(means)
    variances = [sigma(model.get_parameter(f"{key}_rho")).square() for key in names]
    parts = [torch.einsum("bcp,bdp,p->bcd", found[k], found[k], v) for k, v in zip(names, variances, strict=True)]
    torch.testing.assert_close(covariance, sum(parts), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(mean, model(x), **tolerance(name))
