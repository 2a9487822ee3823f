"""`network_of`: a plain model of the mean or of a draw, by `torch.export` and ONNX too."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bayeformers
from bayeformers import LaplacePosterior, fixed_draw, is_bayesian, network_of, posterior_mean, to_bayesian
from bayeformers.posteriors import DropoutPosterior, PointPosterior
from tests.nn.test_compiling import NAMES, _tiny

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


def _converted(name: str) -> tuple[nn.Module, dict[str, Any]]:
    model, inputs = _tiny(name)
    labels = inputs.pop("labels")
    inputs |= {"decoder_input_ids": labels} if name == "t5" else {}
    inputs |= {"use_cache": False} if name in ("gpt2", "llama", "t5") else {}
    return to_bayesian(model, delta=0.3).eval(), inputs


@torch.no_grad()
def _expected(model: nn.Module, inputs: dict[str, Any], index: int | None) -> torch.Tensor:
    with posterior_mean(model) if index is None else fixed_draw(model, index, seed=3):
        logits: torch.Tensor = model(**inputs).logits
    return logits


@pytest.mark.parametrize("index", [None, 1])
@pytest.mark.parametrize("name", NAMES)
def test_exports(name: str, index: int | None) -> None:
    """The plain network is bit for bit the model's, and so, within float32's rounding, is the exported program."""
    model, inputs = _converted(name)
    expected = _expected(model, inputs, index)
    network = network_of(model, index, seed=3)
    assert type(network) is type(model) and not network.training and is_bayesian(model) and not is_bayesian(network)
    assert not any("rho" in key or "prior" in key for key in network.state_dict())
    assert not hasattr(network.config, "bayesian") and not network._forward_pre_hooks
    with torch.no_grad():
        assert torch.equal(network(**inputs).logits, expected)
        program = torch.export.export(network, (), inputs)
        torch.testing.assert_close(program.module()(**inputs).logits, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("index", [None, 1])
@pytest.mark.parametrize("name", ["bert", "vit"])
def test_onnx(name: str, index: int | None, tmp_path: Path) -> None:
    """The runtime's logits, for another number of inputs than was exported, are the model's within 1e-5."""
    for library in ("onnx", "onnxscript"):
        pytest.importorskip(library)
    runtime = pytest.importorskip("onnxruntime")
    model, inputs = _converted(name)
    path = str(tmp_path / "network.onnx")
    shapes = {key: {0: "batch"} for key in inputs}
    torch.onnx.export(
        network_of(model, index, seed=3), (), path, kwargs=inputs, dynamo=True, output_names=["logits"],
        dynamic_shapes=shapes, verbose=False,
    )  # fmt: skip
    given = {key: torch.cat([value, value.flip(0)]) for key, value in inputs.items()}
    found = runtime.InferenceSession(path).run(["logits"], {key: value.numpy() for key, value in given.items()})[0]
    torch.testing.assert_close(torch.from_numpy(found), _expected(model, given, index), rtol=1e-5, atol=1e-5)


def test_has_weights_of_its_own() -> None:
    """Neither sees what becomes of the other; ties stay ties; flags of the trained model come back."""
    model = bayeformers.to_bayesian(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)), delta=0.3)
    before = copy.deepcopy(model.state_dict())
    mean, drawn = network_of(model), network_of(model, 0)
    for network in (mean, drawn):
        assert all(parameter.requires_grad for parameter in network.parameters())
        network(X).sum().backward()
        torch.optim.SGD(network.parameters(), lr=1.0).step()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())

    tied = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 6))
    tied[1].weight = tied[0].weight
    network = network_of(to_bayesian(tied), 0)
    assert network[1].weight is network[0].weight


def test_of_a_laplace_posterior() -> None:
    """Its draws are written into the model: the network has them, and the model its own weights again."""
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).eval()
    batch = {"input": X, "labels": torch.arange(5) % 3}
    posterior = bayeformers.laplace.fit(model, [batch], prior_precision=2.0, progress=False)
    assert isinstance(posterior, LaplacePosterior)
    trained = model(X)
    with torch.no_grad(), posterior.draw(2):
        expected = model(X)
    assert torch.equal(network_of(posterior, 2)(X), expected) and not torch.equal(expected, trained)
    assert torch.equal(network_of(posterior)(X), trained) and torch.equal(model(X), trained)


def test_of_a_compiled_model() -> None:
    model = to_bayesian(nn.Linear(4, 3)).eval()
    assert torch.equal(network_of(torch.compile(model, backend="eager"))(X), model(X))


def test_refuses() -> None:
    """What is more than one set of weights, or less."""
    plain = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5))
    with pytest.raises(ValueError, match="point estimate"):
        network_of(PointPosterior(plain))
    with pytest.raises(ValueError, match="plain copy"):
        network_of(PointPosterior(plain), 0)
    with pytest.raises(ValueError, match="plain copy"):
        network_of(DropoutPosterior(plain), 0)
    model = to_bayesian(nn.Linear(4, 3))
    with pytest.raises(ValueError, match="index"):
        network_of(model, -1)
    with pytest.raises(TypeError, match="index"):
        network_of(model, 0.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        network_of("model")  # type: ignore[arg-type]
    factors = to_bayesian(nn.Linear(4, 3), parametrization="rank1")
    with pytest.raises(ValueError, match="random factors"):
        network_of(factors, 0)
