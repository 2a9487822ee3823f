"""Detection metrics, which scikit-learn computes, against counting of pairs and of thresholds, ties included."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bayeformers import metrics

cases = st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=2, max_size=30).filter(
    lambda pairs: 0 < sum(positive for _, positive in pairs) < len(pairs)
)


@settings(deadline=None)
@given(cases)
def test_ood_metrics_match_counting(pairs: list[tuple[int, bool]]) -> None:
    score, positive = np.array([s for s, _ in pairs]), np.array([p for _, p in pairs])
    wins = [(s > t) + 0.5 * (s == t) for s in score[positive] for t in score[~positive]]
    assert metrics.ood_auroc(score, positive) == pytest.approx(np.mean(wins), abs=1e-12)
    flagged = [score >= threshold for threshold in sorted(set(score.tolist()), reverse=True)]
    recall = [0.0, *(positive[rows].sum() / positive.sum() for rows in flagged)]
    steps = [
        (after - before) * positive[rows].mean()
        for before, after, rows in zip(recall[:-1], recall[1:], flagged, strict=True)
    ]
    assert metrics.ood_aupr(score, positive) == pytest.approx(sum(steps), abs=1e-12)
    rates = [
        (~positive)[rows].sum() / (~positive).sum()
        for rows, found in zip(flagged, recall[1:], strict=True)
        if found >= 0.95
    ]
    assert metrics.fpr_at_95_tpr(score, positive) == pytest.approx(min(rates), abs=1e-12)


@settings(deadline=None)
@given(cases)
def test_errors_are_found_by_low_confidence(pairs: list[tuple[int, bool]]) -> None:
    score, wrong = np.array([s for s, _ in pairs]), np.array([p for _, p in pairs])
    assert metrics.error_auroc(score, wrong) == metrics.ood_auroc(-score, wrong)
    assert metrics.error_aupr(score, wrong) == metrics.ood_aupr(-score, wrong)
    assert metrics.error_auroc(score, wrong) == pytest.approx(1 - metrics.error_auroc(-score, wrong))


def test_constant_score_is_chance() -> None:
    labels = np.array([0, 1, 1, 0, 0])
    assert metrics.ood_auroc(np.ones(5), labels) == 0.5
    assert metrics.ood_aupr(np.ones(5), labels) == pytest.approx(0.4)
    assert metrics.fpr_at_95_tpr(np.ones(5), labels) == 1.0


def test_fpr_counts_exactly_95_percent_as_enough() -> None:
    ood, clean = np.arange(20) + 0.5, np.array([1.0, 1.2, 0.2, 30.0])  # 19 of 20 lie above 1.2, at 1.5 or more
    score, is_ood = np.concatenate([ood, clean]), np.array([1] * 20 + [0] * 4)
    assert metrics.fpr_at_95_tpr(score, is_ood) == pytest.approx(1 / 4)


@pytest.mark.parametrize("constant", [0, 1])
def test_one_group_only_is_undefined(constant: int) -> None:
    with pytest.raises(metrics.UndefinedMetricError, match="at least one example of each"):
        metrics.error_auroc([0.1, 0.2], [constant, constant])
