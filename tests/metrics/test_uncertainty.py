"""The entropies against loops over draws, and their inequalities on arbitrary draws."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from bayeformers import metrics

FAMILY = [
    metrics.predictive_entropy,
    metrics.expected_entropy,
    metrics.mutual_information,
    metrics.expected_pairwise_kl,
    metrics.variation_ratio,
]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def entropy(p: np.ndarray) -> float:
    return -sum(x * math.log(x) for x in p if x > 0)


@pytest.fixture
def draws() -> np.ndarray:
    """Log-probabilities of 5 draws, 7 examples, 4 classes."""
    return log_softmax(2 * np.random.default_rng(0).normal(size=(5, 7, 4)))


log_probs = arrays(
    np.float64,
    array_shapes(min_dims=3, max_dims=3, max_side=5).filter(lambda s: s[2] >= 2),
    elements=st.floats(-50, 50),
).map(log_softmax)


def test_entropies_match_loops(draws: np.ndarray) -> None:
    p = np.exp(draws)
    for n in range(draws.shape[1]):
        total = entropy(p[:, n].mean(0))
        aleatoric = np.mean([entropy(p[s, n]) for s in range(len(p))])
        assert metrics.predictive_entropy(draws)[n] == pytest.approx(total, abs=1e-12)
        assert metrics.expected_entropy(draws)[n] == pytest.approx(aleatoric, abs=1e-12)
        assert metrics.mutual_information(draws)[n] == pytest.approx(total - aleatoric, abs=1e-12)


def test_mutual_information_is_the_mean_kl_to_the_average(draws: np.ndarray) -> None:
    p = np.exp(draws)
    mean = p.mean(0)
    kl = (p * (np.log(p) - np.log(mean))).sum(-1).mean(0)
    np.testing.assert_allclose(metrics.mutual_information(draws), kl, atol=1e-12)


def test_expected_pairwise_kl_is_the_mean_over_all_pairs(draws: np.ndarray) -> None:
    p = np.exp(draws)
    pairs = [(p[s] * (draws[s] - draws[t])).sum(-1) for s in range(len(p)) for t in range(len(p))]
    np.testing.assert_allclose(metrics.expected_pairwise_kl(draws), np.mean(pairs, axis=0), atol=1e-12)


def test_variation_ratio_counts_dissenting_draws(draws: np.ndarray) -> None:
    p = np.exp(draws)
    for n, value in enumerate(metrics.variation_ratio(draws)):
        decision = p[:, n].mean(0).argmax()
        assert value == pytest.approx(np.mean([p[s, n].argmax() != decision for s in range(len(p))]))


def test_the_order_of_draws_decides_no_tie() -> None:
    """Two draws that are sure of either class, among others that are not: their means are equal but for rounding."""
    sure, even = np.array([-28.5, -4.19442259e-13]), np.log([0.5, 0.5])
    draws = np.stack([sure, even, even, sure[::-1]])[:, None]
    assert metrics.variation_ratio(draws) == metrics.variation_ratio(draws[::-1]) == 0.25


@settings(deadline=None)
@given(log_probs)
def test_inequalities_hold_for_any_draws(draws: np.ndarray) -> None:
    total, aleatoric, epistemic = (f(draws) for f in FAMILY[:3])
    num_draws, _, num_classes = draws.shape
    rounding = 1e-9
    assert (total <= math.log(num_classes) + rounding).all()
    assert (aleatoric >= 0).all() and (epistemic >= 0).all()
    assert (epistemic <= min(math.log(num_draws), math.log(num_classes)) + rounding).all()
    np.testing.assert_allclose(total, aleatoric + epistemic, atol=rounding)
    assert (metrics.expected_pairwise_kl(draws) >= epistemic - rounding).all()
    ratio = metrics.variation_ratio(draws)
    assert ((ratio >= 0) & (ratio <= 1)).all()
    for function in FAMILY:
        np.testing.assert_allclose(function(draws[::-1]), function(draws), atol=rounding)


@settings(deadline=None)
@given(log_probs, st.integers(1, 8))
def test_agreeing_draws_have_no_epistemic_uncertainty(draws: np.ndarray, num_draws: int) -> None:
    same = np.repeat(draws[:1], num_draws, axis=0)
    for function in (metrics.mutual_information, metrics.expected_pairwise_kl, metrics.variation_ratio):
        np.testing.assert_allclose(function(same), 0, atol=1e-9)


def test_disagreeing_draws_have_some() -> None:
    # logits +-h around even odds: MI = h^2/2 * Fisher information p(1 - p) = h^2/8, up to O(h^4)
    draws = log_softmax(np.array([[[0.05, 0.0]], [[-0.05, 0.0]]]))
    assert metrics.mutual_information(draws)[0] == pytest.approx(0.05**2 / 8, rel=0.01)
    assert metrics.expected_pairwise_kl(draws)[0] > 0


def test_extremes() -> None:
    certain = np.log(np.array([[[1.0, 1e-300]]] * 3))
    np.testing.assert_allclose(metrics.predictive_entropy(certain), 0, atol=1e-12)
    with np.errstate(divide="ignore"):
        opposed = np.log(np.array([[[1.0, 0.0]], [[0.0, 1.0]]]))
    np.testing.assert_allclose(metrics.mutual_information(opposed), math.log(2))
    np.testing.assert_array_equal(metrics.expected_entropy(opposed), 0)
    np.testing.assert_array_equal(metrics.expected_pairwise_kl(opposed), np.inf)
    np.testing.assert_array_equal(metrics.expected_pairwise_kl(opposed[:1]), 0)
    uniform = np.full((4, 2, 1000), -math.log(1000))
    np.testing.assert_allclose(metrics.predictive_entropy(uniform), math.log(1000))


@pytest.mark.parametrize("function", FAMILY)
def test_tokens_are_examples(function, draws: np.ndarray) -> None:
    tokens = np.stack([draws, draws[:, ::-1]], axis=1)  # (S, B, T, C)
    np.testing.assert_array_equal(function(tokens), np.stack([function(draws), function(draws)[::-1]]))


@pytest.mark.parametrize("function", FAMILY[:4])  # an argmax may change under rounding: the variation ratio is below
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_torch_keeps_dtype_and_agrees_with_numpy(function, dtype: torch.dtype, draws: np.ndarray) -> None:
    tensor = torch.tensor(draws).to(dtype)
    result = function(tensor)
    assert isinstance(result, torch.Tensor) and result.dtype == dtype and result.device == tensor.device
    # rounding log p by eps * |log p| moves p, and the sums over classes, by a few eps
    tolerance = 20 * torch.finfo(dtype).eps
    np.testing.assert_allclose(result.double().numpy(), function(draws), atol=tolerance)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("function", FAMILY)
def test_torch_keeps_its_device(function, draws: np.ndarray) -> None:
    tensor = torch.tensor(draws, device="cuda")
    assert function(tensor).device == tensor.device
    assert metrics.covariance_uncertainty(tensor).epistemic.device == tensor.device


def test_any_draw_may_dissent() -> None:
    draws = np.log([[[0.54, 0.01, 0.45]], [[0.01, 0.54, 0.45]]])  # the average prefers the third class, no draw does
    np.testing.assert_array_equal(metrics.variation_ratio(draws), 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_variation_ratio_keeps_dtype(dtype: torch.dtype) -> None:
    tensor = torch.tensor([[[0.75, 0.25]], [[0.875, 0.125]], [[0.25, 0.75]], [[0.625, 0.375]]]).log().to(dtype)
    torch.testing.assert_close(metrics.variation_ratio(tensor), torch.tensor([0.25], dtype=dtype))


@pytest.mark.parametrize("function", FAMILY[:4])
def test_gradients(function, draws: np.ndarray) -> None:
    logits = torch.tensor(draws, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: function(z.log_softmax(-1)), logits)


@pytest.mark.parametrize("function", FAMILY[:3])
def test_gradient_is_finite_at_zero_probability(function) -> None:
    logits = torch.tensor([[[200.0, 0.0, -torch.inf]], [[0.0, 1.0, -torch.inf]]], requires_grad=True)
    function(logits.log_softmax(-1)).sum().backward()
    assert logits.grad is not None and torch.isfinite(logits.grad[..., :2]).all()


@pytest.mark.parametrize("normalization", ["softmax", "softplus"])
def test_covariance_form_matches_loops_and_sums_to_the_total(normalization: str) -> None:
    logits = 2 * np.random.default_rng(1).normal(size=(6, 3, 4))
    parts = metrics.covariance_uncertainty(logits, normalization)
    weights = np.exp(logits) if normalization == "softmax" else np.log1p(np.exp(logits))
    p = weights / weights.sum(-1, keepdims=True)
    for n in range(3):
        mean = p[:, n].mean(0)
        epistemic = np.mean([np.outer(q - mean, q - mean) for q in p[:, n]], axis=0)
        aleatoric = np.mean([np.diag(q) - np.outer(q, q) for q in p[:, n]], axis=0)
        np.testing.assert_allclose(parts.epistemic[n], epistemic, atol=1e-12)
        np.testing.assert_allclose(parts.aleatoric[n], aleatoric, atol=1e-12)
        np.testing.assert_allclose(
            parts.epistemic[n] + parts.aleatoric[n], np.diag(mean) - np.outer(mean, mean), atol=1e-12
        )


def test_covariance_form_survives_large_logits_and_keeps_torch() -> None:
    logits = torch.tensor([[[1e4, -1e4, 0.0]], [[-1e4, 1e4, 0.0]]])
    for normalization in ("softmax", "softplus"):
        parts = metrics.covariance_uncertainty(logits, normalization)  # type: ignore[arg-type]
        assert parts.epistemic.dtype == torch.float32 and torch.isfinite(parts.epistemic).all()


def test_bernoulli_entropies_are_per_label() -> None:
    logits = torch.tensor([[[0.3, -2.0, 800.0]], [[1.0, 2.0, 800.0]]], dtype=torch.float64, requires_grad=True)
    pairs = metrics.bernoulli_log_probs(logits)
    assert pairs.shape == (2, 1, 3, 2)
    p = torch.sigmoid(logits).mean(0)[0, :2].detach()
    expected = torch.distributions.Bernoulli(probs=p).entropy()
    torch.testing.assert_close(metrics.predictive_entropy(pairs)[0, :2].detach(), expected)
    assert metrics.predictive_entropy(pairs)[0, 2] == 0
    metrics.mutual_information(pairs).sum().backward()
    assert logits.grad is not None and torch.isfinite(logits.grad).all()
