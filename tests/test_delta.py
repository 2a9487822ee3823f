"""The search for delta: against brute force over a grid of deltas, and that the model is left as it was."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bayeformers import bayesian_config, calibrate_delta, to_bayesian
from bayeformers.delta import own_labels
from bayeformers.nn import BayesianModule, variational_tensors
from bayeformers.posteriors import PointPosterior, VariationalPosterior
from tests.cases import case
from tests.reference import moped_sigma, noise_of

NAMES = {"0": "Linear", "2": "Linear"}
SAMPLES = 8
PRECISION = 0.03  # of log delta, the search's own
STEP = 0.02  # of the brute-force grid


def network(outputs: int = 3) -> nn.Sequential:
    """Large weights: a net that is too sure, so that the best delta lies inside the bounds."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, outputs))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(3)
        net[2].weight.mul_(2)
    return net


def data(rows: int = 60) -> tuple[Tensor, Tensor]:
    """Inputs and labels: the net's decisions, three in ten of them replaced."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, 4, generator=generator)
    decisions = network()(x).argmax(-1)
    other = torch.randint(3, (rows,), generator=generator)
    return x, torch.where(torch.rand(rows, generator=generator) < 0.3, other, decisions)


def brute_force(net: nn.Module, x: Tensor, delta: float, log_likelihood: Callable[[Tensor], Tensor]) -> float:
    """-mean_n log mean_s p(y_n | x_n, w + sigma eps_s), from the plain network in float64."""
    net = copy.deepcopy(net).double()
    draws = []
    for index in range(SAMPLES):
        noise = noise_of(net, NAMES, index)
        weights = {
            name: p.detach() + moped_sigma(p, delta) * noise[name].double() for name, p in net.named_parameters()
        }
        draws.append(log_likelihood(torch.func.functional_call(net, weights, (x.double(),))))
    return float(-(torch.stack(draws).logsumexp(0) - math.log(SAMPLES)).mean())


def classes(labels: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda logits: -F.cross_entropy(logits, labels, reduction="none")


def normal(labels: Tensor, noise_std: float) -> Callable[[Tensor], Tensor]:
    return lambda values: torch.distributions.Normal(values[:, 0], noise_std).log_prob(labels.double())


def grid(low: float, high: float) -> list[float]:
    count = math.ceil(math.log(high / low) / STEP)
    return [low * (high / low) ** (i / count) for i in range(count + 1)]


def search(model: nn.Module, inputs: Any, labels: Any = None, **options: Any) -> float:
    return calibrate_delta(model, inputs, labels, **{"num_samples": SAMPLES, "progress": False, **options})


# ---------------------------------------------------------------------------------------------------------- the values


@pytest.mark.parametrize("bounds", [(0.05, 1.0), (0.1, 2.0)])
def test_with_labels_it_is_the_minimum_of_a_dense_grid(bounds: tuple[float, float]) -> None:
    """The minimiser of a smooth function of log delta, found to `PRECISION`; the grid finds it to `STEP`."""
    x, y = data()
    values = {delta: brute_force(network(), x, delta, classes(y)) for delta in grid(*bounds)}
    best = min(values, key=values.__getitem__)
    assert bounds[0] < best < bounds[1]  # else the search has nothing to do
    found = search(network(), x, y, bounds=bounds)
    assert abs(math.log(found / best)) <= PRECISION + STEP
    assert brute_force(network(), x, found, classes(y)) <= values[best] + 1e-4 * abs(values[best])


def test_regression_with_noise_std() -> None:
    x, _ = data()
    net = network(outputs=1)
    with torch.no_grad():
        y = net(x)[:, 0] + 0.8 * torch.randn(len(x), generator=torch.Generator().manual_seed(2))
    options = {"problem_type": "regression"}
    net.config = type("Config", (), options)()  # how a model that transformers does not know says what it is
    values = {d: brute_force(net, x, d, normal(y, 0.3)) for d in grid(0.01, 1.0)}
    found = search(net, x, y, noise_std=0.3)
    best = min(values, key=values.__getitem__)
    assert 0.01 < best < 1
    assert abs(math.log(found / best)) <= PRECISION + STEP


@pytest.mark.parametrize("tolerance", [0.02, 0.1, 0.5])
def test_without_labels_it_is_the_largest_within_the_tolerance(tolerance: float) -> None:
    """At delta the NLL of the net's own decisions is allowed; one step of the search above it is not."""
    x, _ = data()
    own = classes(network()(x).argmax(-1))
    with torch.no_grad():
        limit = (1 + tolerance) * float(-own(network().double()(x.double())).mean())
    found = search(network(), x, tolerance=tolerance)
    assert 0.011 < found < 0.99
    # the package's logits are float32: a relative 1e-6 of the NLL at most
    assert brute_force(network(), x, found, own) <= limit * (1 + 1e-6)
    assert brute_force(network(), x, found * math.exp(PRECISION), own) > limit * (1 - 1e-6)


def test_of_the_linearised_network() -> None:
    """The delta of the least NLL of `predict(method="glm")`, over a grid of conversions."""
    x, y = data()
    values = {}
    for delta in grid(0.1, 5.0)[::2]:
        predictive = VariationalPosterior(to_bayesian(network(), delta)).predict(x, method="glm")
        values[delta] = -float(predictive.log_prob(y).double().mean())
    best = min(values, key=values.__getitem__)
    assert 0.1 < best < 5
    assert abs(math.log(search(network(), x, y, method="glm") / best)) <= PRECISION + 2 * STEP


@pytest.mark.parametrize("kind", ["classes", "multilabel", "regression"])
def test_without_labels_the_linearised_network_has_no_leverage_above_one(kind: str) -> None:
    """At delta the largest trace of H J Sigma J^T over the inputs is 1; H by autograd."""
    x, _ = data()
    net, options, inputs = network(), {}, x
    if kind == "regression":
        options = {"noise_std": 0.5}
    problem = {"classes": "single_label_classification", "multilabel": "multi_label_classification"}.get(kind, kind)
    net.config = SimpleNamespace(problem_type=problem, num_labels=3)
    delta = calibrate_delta(net, inputs, method="glm", bounds=(1e-4, 1e3), progress=False, **options)
    bayesian = to_bayesian(copy.deepcopy(net), delta)
    mean, covariance = VariationalPosterior(bayesian).linearize(x, problem_type=problem)
    losses = {
        "classes": lambda f: torch.nn.functional.cross_entropy(f, torch.tensor(0)),
        "multilabel": lambda f: torch.nn.functional.binary_cross_entropy_with_logits(f, torch.zeros_like(f)),
        "regression": lambda f: f.square().sum() / 2 / 0.5**2,
    }
    weight = {"multilabel": 3.0}.get(kind, 1.0)  # torch's mean over labels
    largest = 0.0
    for f, block in zip(mean.double(), covariance.double(), strict=True):
        hessian = weight * torch.autograd.functional.hessian(losses[kind], f)
        largest = max(largest, float((hessian @ block).trace()))
    assert largest == pytest.approx(1, rel=1e-4)  # logits in float32


def test_leverages_that_are_one_outside_the_bounds(caplog: pytest.LogCaptureFixture) -> None:
    x, _ = data()
    for bounds, expected in (((1e-9, 1e-8), 1e-8), ((1e3, 1e4), 1e3)):
        caplog.clear()
        assert search(network(), x, method="glm", bounds=bounds) == expected
        assert "outside `bounds`" in caplog.text
    net = network()
    net.config = SimpleNamespace(problem_type="regression", num_labels=3)
    with pytest.raises(ValueError, match="`labels` are needed, or a `noise_std` that is a number"):
        search(net, x, method="glm")


def test_the_decisions_are_those_of_the_mean() -> None:
    """Also of a converted model with large scales, whose draws decide otherwise."""
    x, _ = data()
    noisy = to_bayesian(network(), delta=2.0)
    assert search(noisy, x) == search(network(), x)


def test_without_labels_the_bounds_hold() -> None:
    x, _ = data()
    # of a seed whose few draws raise the NLL at every delta: with others small noise happens to lower it
    assert search(network(), x, tolerance=1e-9, seed=4) == pytest.approx(0.01)
    assert search(network(), x, tolerance=1e9) == pytest.approx(1.0)


def testown_labels_of_tokens() -> None:
    """A causal model's decision at t is about token t + 1; padding has none."""
    this = case("gpt2-lm")
    model, inputs = this.build(), this.inputs()
    decided, mask = model(**inputs).logits.argmax(-1), inputs["attention_mask"]
    predictive = PointPosterior(model).predict(inputs)
    labels = own_labels(predictive)
    assert labels.tolist() == [
        [int(decided[n, t - 1]) if t > 0 and mask[n, t] else -100 for t in range(mask.shape[1])]
        for n in range(len(mask))
    ]
    scores = predictive.log_prob(labels)
    assert int((~scores.isnan()).sum()) == int(mask[:, 1:].sum())
    best = predictive.mean_log_probs.max(-1).values
    assert all(scores[n, t] == best[n, t] for n, t in (~scores.isnan()).nonzero())


# ------------------------------------------------------------------------------------------------------- forms of input


def test_batches_are_one_batch_cut_up() -> None:
    """Also of unequal sizes; from an iterator; with the labels inside."""
    x, y = data()
    cut = [7, 40, 13]
    expected = search(network(), x, y)
    assert search(network(), list(x.split(cut)), list(y.split(cut))) == pytest.approx(expected, rel=1e-4)
    assert search(network(), iter(x.split(cut)), iter(y.split(cut))) == pytest.approx(expected, rel=1e-4)


def test_labels_inside_the_batches() -> None:
    this = case("bert")
    inputs, labels = this.inputs(), this.labels()["labels"]
    expected = search(this.build(), inputs, labels)
    assert search(this.build(), {**inputs, "labels": labels}) == expected
    other = (labels + 1) % 3
    assert search(this.build(), {**inputs, "labels": other}, labels) == expected  # the argument wins


def test_the_same_seed_gives_the_same_delta() -> None:
    x, y = data()
    assert search(network(), x, y) == search(network(), x, y) != search(network(), x, y, seed=1)


# ---------------------------------------------------------------------------------------------------- the model after


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All that could change."""
    return {
        "values": {name: value.clone() for name, value in model.state_dict().items()},
        "identity": {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)},
        "flags": {name: (p.requires_grad, p.grad is None) for name, p in model.named_parameters()},
        "classes": {name: type(m) for name, m in model.named_modules()},
        "training": {name: m.training for name, m in model.named_modules()},
        "dropout": {name: m.p for name, m in model.named_modules() if isinstance(m, nn.Dropout)},
        "keys": {name: set(vars(m)) for name, m in model.named_modules()},
        "hooks": {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()},
        "draws": {name: m.draw for name, m in model.named_modules() if isinstance(m, BayesianModule)},
        "config": model.config.to_dict(),
    }


def assert_unchanged(model: nn.Module, before: dict[str, Any]) -> None:
    after = snapshot(model)
    assert after["values"].keys() == before["values"].keys()
    assert all(torch.equal(value, after["values"][name]) for name, value in before["values"].items())
    for key in before.keys() - {"values"}:
        assert after[key] == before[key], key


def plain_bert() -> nn.Module:
    model = case("bert").build()
    model.bert.encoder.layer[0].train()  # flags of its own, of both kinds
    model.classifier.bias.requires_grad_(False)
    return model


def converted_bert() -> nn.Module:
    model = to_bayesian(plain_bert(), delta=0.07, freeze=False)
    with torch.no_grad():
        for tensor in variational_tensors(model):
            tensor.rho.add_(0.3 * torch.randn_like(tensor.rho))
    return model


MODELS = pytest.mark.parametrize("make", [plain_bert, converted_bert])


@MODELS
@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("method", ["sample", "glm"])
def test_the_model_is_left_as_it_was(make: Callable[[], nn.Module], labelled: bool, method: str) -> None:
    model, this = make(), case("bert")
    before, state = snapshot(model), torch.get_rng_state()
    search(model, this.inputs(), this.labels()["labels"] if labelled else None, num_samples=2, method=method)
    assert_unchanged(model, before)
    assert torch.equal(torch.get_rng_state(), state)
    if make is converted_bert:
        assert bayesian_config(model).delta == 0.07


@MODELS
@pytest.mark.parametrize("call", [1, 5])
def test_a_failing_forward_leaves_it_too(make: Callable[[], nn.Module], call: int) -> None:
    """In the pass at the mean, and in the middle of the search."""
    model, this = make(), case("bert")
    before, calls = snapshot(model), []

    def fail(*_: Any) -> None:
        calls.append(1)
        if len(calls) == call:
            raise RuntimeError("out of memory")

    handle = model.classifier.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        search(model, this.inputs(), this.labels()["labels"])
    handle.remove()
    assert len(calls) == call
    assert_unchanged(model, before)


def test_only_the_layers_that_are_asked_for_have_noise() -> None:
    """Conversion arguments reach `to_bayesian`: with the last layer alone another delta is best."""
    x, y = data()
    assert search(network(), x, y, target_modules=["2"]) != search(network(), x, y)


# ---------------------------------------------------------------------------------------------------------- bad inputs

X, Y = torch.zeros(5, 4), torch.zeros(5, dtype=torch.long)
BAD: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
    ((torch.randn(8, 4), torch.full((8,), -100)), {"method": "glm"}, "none that counts"),
    ((torch.randn(8, 4), torch.full((8,), -100)), {}, "none that counts"),
    ((X, Y), {"bounds": (0.0, 1.0)}, r"`bounds` must be two finite numbers, 0 < low < high, got \(0.0, 1.0\)"),
    ((X, Y), {"bounds": (0.5, 0.1)}, r"`bounds` must .* got \(0.5, 0.1\)"),
    ((X, Y), {"bounds": (0.1, math.inf)}, r"`bounds` must .* got \(0.1, inf\)"),
    ((X, Y), {"bounds": 0.5}, r"`bounds` must be two numbers \(low, high\), got 0.5"),
    ((X, Y), {"bounds": (0.1, 0.2, 0.3)}, "`bounds` must be two numbers"),
    ((X, Y), {"method": "laplace"}, "`method` must be one of .*sample.*, got 'laplace'"),
    ((X,), {"tolerance": 0.0}, "`tolerance` must be a finite number > 0, got 0.0"),
    ((X,), {"tolerance": math.nan}, "`tolerance` must be a finite number > 0, got nan"),
    (([],), {}, "`inputs` holds no batch"),
    (([X, X], Y), {}, "`labels` must be given for each batch of `inputs`: 2, got 1"),
    (([X, X], [Y]), {}, "`labels` must be given for each batch of `inputs`: 2, got 1"),
    (([{"input": X, "labels": Y}, {"input": X}],), {}, "`inputs` holds labels in 1 of 2 batches: give all or none"),
    ((X, Y[:3]), {}, r"`labels` must have shape \(5,\), got \(3,\)"),
    ((X, Y + 3), {}, r"`labels` must lie in \[0, 3\) or be -100 .*got 3"),
    ((X, Y), {"num_samples": 0}, "`num_samples` must be a whole number >= 1, got 0"),
    ((X, Y), {"seed": 0.5}, "`seed` must be a whole number, got 0.5"),
    ((X, Y), {"target_modules": ["nothing"]}, r"`target_modules` names \['nothing'\], which match no module"),
    ((X, Y), {"estimator": "flipot"}, "`estimator` must be"),
    ((3, Y), {}, "`inputs` must be"),
]


@pytest.mark.parametrize(("arguments", "options", "message"), BAD, ids=lambda value: str(value)[:40])
def test_bad_inputs(arguments: tuple[Any, ...], options: dict[str, Any], message: str) -> None:
    net = network()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises((ValueError, TypeError), match=message):
        search(net, *arguments, **options)
    assert not any(isinstance(m, BayesianModule) for m in net.modules())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_a_regression_needs_labels_and_noise() -> None:
    this = case("bert-regression")
    with pytest.raises(ValueError, match="`labels` are needed: a regression has no labels of its own"):
        search(this.build(), this.inputs())
    with pytest.raises(ValueError, match="`noise_std` is not known"):
        search(this.build(), this.inputs(), this.labels()["labels"])


def test_conversion_arguments_of_a_converted_model() -> None:
    x, y = data()
    with pytest.raises(TypeError, match=r"`model` is converted already: \['target_modules'\]"):
        search(to_bayesian(network()), x, y, target_modules=["2"])


def test_the_end_of_the_range_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    """All labels wrong: any noise helps; separated and right with a wide margin: none does."""
    net = nn.Linear(2, 2)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[-9.0, 0.0], [9.0, 0.0]]))
        net.bias.zero_()
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0]] * 4)
    right = (x[:, 0] > 0).long()
    for labels, end, expected in ((1 - right, "largest", 10.0), (right, "smallest", 0.01)):
        caplog.clear()
        found = calibrate_delta(net, x, labels, method="glm", progress=False)
        assert found == pytest.approx(expected) and f"at the {end} end of `bounds`" in caplog.text
