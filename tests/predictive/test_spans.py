"""Scores of spans against a loop over all of them."""

import math

import pytest
import torch
from torch import Tensor

from bayeformers.predictive import Predictive, span_scores


def brute_force(start: Tensor, end: Tensor, max_length: int, mask: Tensor) -> dict[tuple[int, int], float]:
    """p(start) p(end) of every allowed span, divided by their sum."""
    p, q = start.double().softmax(-1), end.double().softmax(-1)
    found = {
        (i, j): float(p[i] * q[j])
        for i in range(len(p))
        for j in range(len(q))
        if i <= j < i + max_length and mask[i] and mask[j]
    }
    total = sum(found.values())
    return {span: value / total for span, value in found.items()}


@pytest.mark.parametrize("length", [1, 2, 7])
@pytest.mark.parametrize("max_length", [1, 3, 7, 30])
def test_softmax_of_the_scores_is_the_product_restricted_to_spans(length: int, max_length: int) -> None:
    start, end = torch.randn(2, 4, 3, length, dtype=torch.float64) * 3  # draws, examples
    mask = torch.rand(3, length) < 0.7
    mask[:, length // 2] = True
    scores = span_scores(start, end, max_length, mask)
    width = min(max_length, length)
    assert scores.shape == (4, 3, length, width)
    probs = scores.flatten(-2).softmax(-1).unflatten(-1, (length, width))
    for draw in range(4):
        for row in range(3):
            expected = brute_force(start[draw, row], end[draw, row], max_length, mask[row])
            for i in range(length):
                for more in range(width):
                    value = float(probs[draw, row, i, more])
                    assert value == pytest.approx(expected.get((i, i + more), 0.0), rel=1e-12, abs=0)


def test_logits_and_log_probabilities_give_the_same_distribution() -> None:
    logits = torch.randn(2, 5, 9, dtype=torch.float64)
    by_logits, by_log_probs = (
        span_scores(*sides, 4).flatten(1).softmax(1) for sides in (logits, logits.log_softmax(-1))
    )
    torch.testing.assert_close(by_logits, by_log_probs)


def test_float32_is_exact_to_its_rounding_for_large_logits() -> None:
    start, end = torch.randn(2, 400) * 30 + 500
    single = span_scores(start, end, 30).flatten().log_softmax(0)
    double = span_scores(start.double(), end.double(), 30).flatten().log_softmax(0)
    assert single.exp().sum() == pytest.approx(1.0, abs=1e-4)
    finite = double.isfinite()
    assert torch.equal(single.isfinite(), finite)
    # scores of size 1000 are rounded to 2^-14 each, and so is the normaliser
    torch.testing.assert_close(single[finite], double[finite].float(), atol=5e-4, rtol=1e-6)


def test_gradient_is_finite() -> None:
    start, end = (torch.randn(6, requires_grad=True) for _ in range(2))
    span_scores(start, end, 3, torch.tensor([True] * 5 + [False])).flatten().log_softmax(0)[4].backward()
    for side in (start, end):
        assert side.grad is not None and bool(side.grad.isfinite().all()) and side.grad[-1] == 0


def test_draws_that_agree_on_the_ends_may_disagree_on_the_span() -> None:
    """Two draws, sure of span 0..0 and of span 3..3: averaged ends would also give the span 0..3 a quarter."""
    sure = torch.full((2, 4), -math.inf)
    sure[0, 0] = sure[1, 3] = 0.0
    log_probs = span_scores(sure, sure, 4).flatten(1).log_softmax(1)
    predictive = Predictive(problem_type="single_label_classification", log_probs=log_probs[:, None])
    assert predictive.probs[0].nonzero().flatten().tolist() == [0, 12]
    assert float(predictive.mutual_information) == pytest.approx(math.log(2))


@pytest.mark.parametrize(
    ("start", "end", "length", "message"),
    [
        (torch.zeros(3), torch.zeros(4), 2, r"`start` and `end` .* got \(3,\) and \(4,\)"),
        (torch.zeros(0), torch.zeros(0), 2, r"T >= 1"),
        (torch.zeros(3), torch.zeros(3), 0, r"`max_length` .* got 0"),
        (torch.zeros(3), torch.zeros(3), True, r"`max_length` .* got True"),
    ],
)
def test_bad_input(start: Tensor, end: Tensor, length: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        span_scores(start, end, length)
