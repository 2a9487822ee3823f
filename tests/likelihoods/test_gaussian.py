"""The variance head's likelihood against torch.distributions, and its range."""

import math
from typing import Any

import pytest
import torch
from torch.distributions import Normal

from bayeformers.losses import LOG_VARIANCE_RANGE, gaussian_nll, split_variance_head


@pytest.mark.parametrize("targets", [1, 2, 5])
def test_equals_torch_distributions(targets: int) -> None:
    generator = torch.Generator().manual_seed(targets)
    output = 2 * torch.randn(7, 2 * targets, dtype=torch.float64, generator=generator)
    target = torch.randn(7, targets, dtype=torch.float64, generator=generator)
    normal = Normal(output[:, :targets], (output[:, targets:] / 2).exp())
    expected = -normal.log_prob(target).sum(1)
    torch.testing.assert_close(gaussian_nll(output, target, "none"), expected)
    torch.testing.assert_close(gaussian_nll(output, target), expected.mean())
    torch.testing.assert_close(gaussian_nll(output, target, "sum"), expected.sum())
    if targets == 1:
        torch.testing.assert_close(gaussian_nll(output, target[:, 0]), expected.mean())


def test_gradcheck() -> None:
    output = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: gaussian_nll(z, torch.zeros(4, 3, dtype=torch.float64)), output)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("log_variance", [-6e4, -20.0, 0.0, 20.0, 6e4])
def test_finite_for_any_log_variance(log_variance: float, dtype: torch.dtype) -> None:
    output = torch.tensor([[3.0, log_variance], [-100.0, log_variance]], dtype=dtype, requires_grad=True)
    value = gaussian_nll(output, torch.tensor([3.0, 100.0]))
    value.backward()
    assert value.dtype == torch.float32 and value.isfinite() and output.grad.isfinite().all()


def test_clamped_to_the_documented_range() -> None:
    mean, log_variance = split_variance_head(torch.tensor([[1.0, 2.0, -99.0, 99.0]]))
    assert mean.tolist() == [[1.0, 2.0]]
    assert log_variance.tolist() == [list(LOG_VARIANCE_RANGE)]
    assert math.exp(LOG_VARIANCE_RANGE[1] / 2) == pytest.approx(2.2e4, rel=0.01)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"output": torch.zeros(4, 3)}, r"`output` of a variance head must have 2 L columns.*\(4, 3\)"),
        ({"output": torch.zeros(4, 0)}, "must have 2 L columns"),
        ({"output": torch.zeros(4, 2).long()}, "`output` must be a floating-point tensor"),
        ({"output": torch.zeros(2)}, r"`output` must have shape \(B, 2 L\)"),
        ({"target": torch.zeros(3)}, r"`target` must have shape \(4, 1\), got \(3,\)"),
        ({"target": [0.0]}, "`target` must be a tensor"),
        ({"target": torch.full((4,), torch.nan)}, "`target` must be finite"),
        ({"reduction": "average"}, "`reduction` must be one of"),
    ],
)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"output": torch.zeros(4, 2), "target": torch.zeros(4), **change}
    with pytest.raises((TypeError, ValueError), match=message):
        gaussian_nll(**arguments)
