"""Scores of rows against sums over all labels, in float64, and against each other."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from bayeformers.acquisition import bald, batchbald, entropy, epig, joint_mutual_information, margin


def draws(num_draws: int, num_rows: int, num_classes: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(num_draws, num_rows, num_classes, generator=generator, dtype=torch.float64)
    return logits.log_softmax(-1)


def enumerated(log_probs: Tensor) -> float:
    """I(y_1 .. y_n; w) = H[y_1 .. y_n] - mean_s H[y_1 .. y_n | w_s] by every configuration and draw, in NumPy."""
    probs = log_probs.exp().numpy()
    num_draws, num_rows, num_classes = probs.shape
    joint, given = 0.0, 0.0
    for labels in itertools.product(range(num_classes), repeat=num_rows):
        by_draw = [math.prod(probs[s, i, c] for i, c in enumerate(labels)) for s in range(num_draws)]
        mean = sum(by_draw) / num_draws
        joint -= mean * math.log(mean)
        given -= sum(p * math.log(p) for p in by_draw) / num_draws
    return joint - given


@pytest.mark.parametrize(("num_draws", "num_rows", "num_classes"), [(5, 1, 4), (4, 3, 2), (7, 4, 3), (3, 6, 2)])
def test_joint_information_is_that_of_all_configurations(num_draws: int, num_rows: int, num_classes: int) -> None:
    log_probs = draws(num_draws, num_rows, num_classes)
    found = joint_mutual_information(log_probs, num_configurations=num_classes**num_rows)
    assert found == pytest.approx(enumerated(log_probs), abs=1e-12)


def test_bald_entropy_and_margin_by_hand() -> None:
    log_probs = draws(6, 5, 3)
    probs = log_probs.exp().numpy()
    mean = probs.mean(0)
    total = -(mean * np.log(mean)).sum(-1)
    expected = -(probs * np.log(probs)).sum(-1).mean(0)
    np.testing.assert_allclose(bald(log_probs), total - expected, atol=1e-14)
    np.testing.assert_allclose(entropy(log_probs), total, atol=1e-14)
    ranked = np.sort(mean, axis=-1)
    np.testing.assert_allclose(margin(log_probs), ranked[:, -2] - ranked[:, -1], atol=1e-14)


def test_one_row_has_its_bald_score() -> None:
    log_probs = draws(6, 1, 3)
    assert joint_mutual_information(log_probs) == pytest.approx(float(bald(log_probs)), abs=1e-14)


def test_batchbald_is_the_greedy_search_over_enumerated_batches() -> None:
    log_probs = draws(5, 7, 3, seed=1)
    chosen, gains = batchbald(log_probs, 4, num_configurations=81)
    greedy: list[int] = []
    for _ in range(4):
        left = [row for row in range(7) if row not in greedy]
        greedy.append(max(left, key=lambda row: enumerated(log_probs[:, [*greedy, row]])))
    assert chosen == greedy
    assert float(gains.sum()) == pytest.approx(enumerated(log_probs[:, greedy]), abs=1e-12)
    assert (gains.diff() <= 1e-12).all(), "information of a set is submodular: gains fall"


def test_batchbald_looks_at_every_row_that_can_win() -> None:
    """The search in falling order of BALD stops early: with more rows than a chunk it finds what a full search does."""
    log_probs = draws(4, 600, 2, seed=2, scale=0.7)
    chosen, gains = batchbald(log_probs, 3, num_configurations=8)
    for step in range(1, 3):
        before = enumerated(log_probs[:, chosen[:step]])
        left = [row for row in range(0, 600, 7) if row not in chosen[:step]]
        best = max(enumerated(log_probs[:, [*chosen[:step], row]]) for row in left)
        assert best - before <= float(gains[step]) + 1e-12


def test_twins_add_nothing_to_a_batch() -> None:
    """Rows whose labels the weights decide: the second of two equal ones tells nothing, however good its BALD score."""
    sure, other = [[0.0, 1.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]], [[0.9, 0.1], [0.1, 0.9], [0.9, 0.1], [0.1, 0.9]]
    log_probs = torch.tensor([sure, sure, other], dtype=torch.float64).transpose(0, 1).log()
    assert bald(log_probs).argsort(descending=True)[:2].sort().values.tolist() == [0, 1]
    chosen, gains = batchbald(log_probs, 3)
    assert 2 in chosen[:2] and set(chosen) == {0, 1, 2}
    torch.testing.assert_close(gains[2], torch.tensor(0.0, dtype=torch.float64), atol=1e-12, rtol=0)


def test_sampled_configurations_have_no_bias() -> None:
    """The conditional entropy after six rows of three classes, 729 configurations, from 64 of them.

    Mean of 400 samples; its standard error is estimated from them, and 4 of these are exceeded once in 16,000 seeds.
    """
    log_probs = draws(8, 7, 3, seed=3, scale=1.0)
    gains = [joint_mutual_information(log_probs, num_configurations=64, seed=seed) for seed in range(400)]
    error = np.std(gains, ddof=1) / 20
    assert 0 < error < 0.01
    assert abs(np.mean(gains) - joint_mutual_information(log_probs, num_configurations=3**7)) < 4 * error


def test_epig_is_the_information_between_two_labels() -> None:
    rows, targets = draws(5, 3, 3), draws(5, 4, 2, seed=9)
    p, q = rows.exp().numpy(), targets.exp().numpy()
    expected = np.zeros(3)
    for i, t, c, d in itertools.product(range(3), range(4), range(3), range(2)):
        both = (p[:, i, c] * q[:, t, d]).mean()
        expected[i] += both * math.log(both / (p[:, i, c].mean() * q[:, t, d].mean())) / 4
    np.testing.assert_allclose(epig(rows, targets), expected, atol=1e-14)
    assert (epig(rows, targets) <= bald(rows) + 1e-12).all(), "labels tell no more of labels than of weights"


def test_certain_labels_have_finite_scores() -> None:
    log_probs = torch.tensor([[[1.0, 0.0], [0.5, 0.5]], [[0.0, 1.0], [0.5, 0.5]]]).log()
    for scores in (bald(log_probs), epig(log_probs, log_probs), batchbald(log_probs, 2)[1]):
        assert scores.isfinite().all() and scores.max() > 0.3
    assert float(bald(log_probs)[0]) == pytest.approx(math.log(2))
