"""`EmbeddingBag`: torch's reductions of the drawn rows, whatever the bags look like."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import bayeformers.nn as bnn
from bayeformers import fixed_draw, posterior_mean, to_bayesian, to_deterministic
from bayeformers.nn import training_draw
from tests.reference import key_of, row_noise, sigma, sigma_slope

ESTIMATORS = sorted(bnn.ESTIMATORS)
ROWS, WIDTH = 9, 4
IDS = torch.tensor([1, 4, 4, 2, 8, 8, 8, 0, 2, 2])
CASES: dict[str, dict[str, Any]] = {
    "2-D": {"input": IDS.reshape(2, 5)},
    "offsets": {"input": IDS, "offsets": torch.tensor([0, 3, 3, 7])},
    "last offset": {"input": IDS, "offsets": torch.tensor([0, 3, 3, 7, 10]), "include_last_offset": True},
    "int32": {"input": IDS.int(), "offsets": torch.tensor([0, 4], dtype=torch.int32)},
}


def converted(mode: str, padding_idx: int | None, case: str = "2-D", estimator: str = "reparameterization") -> Any:
    torch.manual_seed(0)
    last = CASES[case].get("include_last_offset", False)
    layer = nn.EmbeddingBag(
        ROWS, WIDTH, mode=mode, padding_idx=padding_idx, include_last_offset=last, dtype=torch.float64
    )
    with torch.no_grad():
        layer.weight.normal_()  # the padding row too: it has no part in any bag
    return to_bayesian(layer, 0.4, estimator=estimator, freeze=False).train()


def call_of(case: str) -> dict[str, Any]:
    return {key: value for key, value in CASES[case].items() if key != "include_last_offset"}


def drawn(layer: Any, index: int) -> tuple[Tensor, Tensor]:
    """The table of a draw and its noise, from the reference."""
    noise = row_noise(key_of(0, index, "weight"), range(ROWS), WIDTH)
    if layer.padding_idx is not None:
        noise[layer.padding_idx] = 0
    return layer.get_parameter("weight").detach() + sigma(layer.weight_rho) * noise, noise


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("padding_idx", [None, 2, 5])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("weighted", [False, True])
def test_torch_at_the_mean_and_of_a_draw(mode: str, padding_idx: int | None, case: str, weighted: bool) -> None:
    layer = converted(mode, padding_idx, case)
    rest = to_deterministic(copy.deepcopy(layer))
    call = call_of(case)
    if weighted:
        call["per_sample_weights"] = torch.randn(call["input"].shape, dtype=torch.float64)
    if weighted and mode != "sum":
        for estimator in ESTIMATORS:
            with pytest.raises((ValueError, NotImplementedError), match="per_sample_weights"):
                converted(mode, padding_idx, case, estimator)(**call)
        return
    for gradient in (True, False):
        with torch.set_grad_enabled(gradient):
            assert torch.equal(layer.eval()(**call), rest(**call))
            with posterior_mean(layer.train()):
                assert torch.equal(layer(**call), rest(**call))
            with fixed_draw(layer, 3):
                expected = functional_call(rest, {"weight": drawn(layer, 3)[0]}, kwargs=call)
                torch.testing.assert_close(layer(**call), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("padding_idx", [None, 2])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("weighted", [False, True])
def test_flipout_is_one_table_per_bag(mode: str, padding_idx: int | None, case: str, weighted: bool) -> None:
    """Bag b sees W + (r_b t_b^T) * sigma eps: torch's layer with this table, bag by bag; empty bags are 0."""
    layer = converted(mode, padding_idx, case, "flipout")
    rest = to_deterministic(copy.deepcopy(layer))
    call = call_of(case)
    if weighted and mode == "sum":
        call["per_sample_weights"] = torch.rand(call["input"].shape, dtype=torch.float64)
    with torch.no_grad(), training_draw(layer):
        output = layer(**call)
        weight = layer.variational("weight")
        by_row, by_column = (
            weight.draw.signs(weight.spec, axis, (len(output), size), output.device).double()
            for axis, size in enumerate((ROWS, WIDTH))
        )
        for bag in range(len(output)):
            table = weight.loc + torch.outer(by_row[bag], by_column[bag]) * weight.perturbation
            expected = functional_call(rest, {"weight": table}, kwargs=call)[bag]
            torch.testing.assert_close(output[bag], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_moments(estimator: str, mode: str) -> None:
    """Mean and covariance over 2,000 forwards, within 5 standard errors; an id twice in a bag counts twice squared."""
    draws = 2000
    layer = converted(mode, 2, "offsets", estimator)
    call = call_of("offsets")
    with torch.no_grad():
        outputs = torch.stack([layer(**call).flatten() for _ in range(draws)])
    counts = torch.zeros(4, ROWS, dtype=torch.float64)
    for bag, (start, stop) in enumerate([(0, 3), (3, 3), (3, 7), (7, 10)]):
        for row in IDS[start:stop].tolist():
            counts[bag, row] += row != 2
    if mode == "mean":
        counts = counts / counts.sum(1, keepdim=True).clamp_min(1)
    mean = (counts @ layer.weight.detach()).flatten()
    between = torch.einsum("br,cr,rd->bcd", counts, counts, sigma(layer.weight_rho).square())
    covariance = torch.einsum("bcd,de->bdce", between, torch.eye(WIDTH, dtype=torch.float64)).reshape(16, 16)
    if estimator != "reparameterization":
        covariance = covariance * torch.block_diag(*[torch.ones(WIDTH, WIDTH)] * 4)
    spread = covariance.diagonal().sqrt()
    assert ((outputs.mean(0) - mean).abs() <= 5 * spread / math.sqrt(draws) + 1e-9).all()
    error = (outputs.T.cov() - covariance).abs()
    assert (error <= 5 * math.sqrt(2 / draws) * torch.outer(spread, spread) + 1e-9).all()


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_gradients(mode: str) -> None:
    """Means, scales and sample weights against torch's layer; rows that are not looked up, and padding, have none."""
    layer = converted(mode, 2, "offsets")
    rest = to_deterministic(copy.deepcopy(layer))
    call = call_of("offsets")
    weights = torch.rand(10, dtype=torch.float64)
    extra = [{"per_sample_weights": weights.clone().requires_grad_()} if mode == "sum" else {} for _ in range(2)]
    with fixed_draw(layer, 1):
        layer(**call, **extra[0]).tanh().sum().backward()
    table, noise = drawn(layer, 1)
    table.requires_grad_()
    functional_call(rest, {"weight": table}, kwargs={**call, **extra[1]}).tanh().sum().backward()
    torch.testing.assert_close(layer.weight.grad, table.grad, rtol=1e-5, atol=1e-7)
    slope = table.grad * noise * sigma_slope(layer.weight_rho)  # type: ignore[operator]
    torch.testing.assert_close(layer.weight_rho.grad, slope.float(), rtol=1e-4, atol=1e-6)
    assert not layer.weight_rho.grad[[2, 3, 5, 6, 7]].any()
    if mode == "sum":
        ours, theirs = (pair["per_sample_weights"].grad for pair in extra)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("mode", ["sum", "max"])
def test_bfloat16_and_compile(estimator: str, mode: str) -> None:
    torch._dynamo.reset()
    layer = converted(mode, 2, "2-D", estimator).to(torch.bfloat16)
    assert layer(IDS.reshape(2, 5)).dtype == torch.bfloat16 and layer.weight_rho.dtype == torch.float32
    layer = converted(mode, 2, "2-D", estimator)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    first, second = compiled(IDS.reshape(2, 5)), compiled(IDS.reshape(2, 5))
    assert first.shape == (2, WIDTH) and not torch.equal(first, second)
    first.sum().backward()
    assert layer.weight_rho.grad.abs().sum() > 0


def test_built_by_hand_and_copied() -> None:
    torch.manual_seed(0)
    layer = bnn.EmbeddingBag(ROWS, WIDTH, padding_idx=-1)
    torch.manual_seed(0)
    plain = nn.EmbeddingBag(ROWS, WIDTH, padding_idx=-1)
    assert layer.padding_idx == ROWS - 1 and torch.equal(layer.weight, plain.weight)
    state = layer.state_dict()
    assert set(state) == {"weight", "weight_rho"}
    fresh = bnn.EmbeddingBag(ROWS, WIDTH, padding_idx=-1)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), fresh):
        twin.load_state_dict(state)
        with torch.no_grad(), fixed_draw(layer, 0), fixed_draw(twin, 0):
            assert torch.equal(layer(IDS.reshape(2, 5)), twin(IDS.reshape(2, 5)))


@pytest.mark.parametrize("options", [{"max_norm": 1.0}, {"sparse": True}, {"scale_grad_by_freq": True}])
def test_options_without_meaning_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        to_bayesian(nn.EmbeddingBag(4, 3, mode="sum", **options))


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="`mode`.*'median'"):
        bnn.EmbeddingBag(4, 3, mode="median")
    layer = converted("sum", None, "offsets", "flipout")
    for call in ({"input": IDS}, {"input": IDS.reshape(2, 5), "offsets": torch.tensor([0])}):
        with pytest.raises(ValueError, match="`input` must be"):
            layer(**call)
    with pytest.raises(ValueError, match="`offsets` must begin with 0.*got 2"):
        layer(IDS, torch.tensor([2, 3]))
    with pytest.raises(ValueError, match="`offsets` must end with 10.*got 8"):
        converted("sum", None, "last offset", "flipout")(IDS, torch.tensor([0, 3, 8]))
    with pytest.raises(IndexError):
        layer(torch.tensor([[ROWS]]))
    nested = torch.nested.nested_tensor([torch.tensor([1, 2]), torch.tensor([3])], layout=torch.jagged)
    with pytest.raises(TypeError, match="nested"):
        layer(nested)
