"""The benchmark of prediction sets: its law by enumeration of splits, its counts by hand, and its page."""

from __future__ import annotations

import itertools
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from bayeformers.metrics.conformal import conformal_rank
from benchmarks.guarantees_sets import Setting, ks_of_discrete, main, measure


def rows(n: int, classes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    probs = rng.dirichlet(np.ones(classes), n)
    return probs, np.array([rng.choice(classes, p=p) for p in probs])


def test_the_law_is_that_of_all_splits() -> None:
    """Of a pool of 8 distinct scores, all 56 choices of 3 calibration rows: exactly the beta-binomial."""
    n, alpha = 3, 0.3
    k = conformal_rank(n, alpha)
    counts = [
        sum(score <= sorted(own)[k - 1] for score in range(8) if score not in own)
        for own in itertools.combinations(range(8), n)
    ]
    shares = np.bincount(counts, minlength=6) / len(counts)
    assert shares == pytest.approx(stats.betabinom(5, k, n + 1 - k).pmf(np.arange(6)))


def test_distance_tells_another_law() -> None:
    law = stats.betabinom(40, 9, 2)
    own, other = (each.rvs(400, random_state=np.random.default_rng(0)) for each in (law, stats.betabinom(40, 8, 3)))
    assert ks_of_discrete(own, law) > 0.05 > 0.01 > ks_of_discrete(other, law, draws=200)


@pytest.mark.parametrize("score", ["lac", "aps", "aps, u = 1", "raps"])
def test_measured_sets_are_the_librarys(score: str) -> None:
    """`measure` asserts it in its first split; of 60 the mean coverage lies within 4 of its standard errors."""
    probs, labels = rows(60)
    for by_class in (False, True):
        found = measure(Setting("trec", "map", score, 0.2, 30, by_class), probs, labels, 60)
        assert found.classes_below == 0
        if score != "aps, u = 1" and not by_class:  # equal scores, of the least likely class
            assert abs(found.coverage - found.expected) < 4 * found.expected_deviation / 60**0.5
    assert asdict(found)["num_classes"] == 3


def test_the_command_writes_numbers_and_a_page(tmp_path: Path) -> None:
    probs, labels = rows(120)
    folder = tmp_path / "trec-0" / "predictions"
    folder.mkdir(parents=True)
    np.savez(folder / "map.npz", **{"dev/probs": probs, "dev/labels": labels})
    own = ["--predictions", str(tmp_path), "--output", str(tmp_path / "out.json"), "--page", str(tmp_path / "page.md")]
    main([*own, "--tasks", "trec", "--splits", "5"])
    page = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert "| TREC | fine-tuned (MAP) |" in page and "| TREC | 19 | 0.9000 |" in page
