"""Prediction sets: scores against loops, coverage by enumeration, by class and group, several labels, files."""

from __future__ import annotations

import itertools
import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bayeformers.guarantees import PredictionSets, SetScore, fit_prediction_sets
from bayeformers.guarantees.fit_sets import false_negative_threshold
from bayeformers.guarantees.nonconformity import class_scores
from bayeformers.guarantees.sets import SETS_FILE
from bayeformers.metrics.conformal import conformal_rank
from bayeformers.predictive import Predictive

TIED = torch.tensor([[0.4, 0.2, 0.2, 0.2], [0.25] * 4, [1.0, 0.0, 0.0, 0.0], [0.1, 0.2, 0.3, 0.4]], dtype=torch.float64)


def data(n: int = 12, classes: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(seed)
    probs = rng.dirichlet(np.ones(classes), n)
    return torch.from_numpy(probs), torch.from_numpy(np.array([rng.choice(classes, p=p) for p in probs]))


def several(n: int = 15, labels: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    probs = torch.from_numpy(np.random.default_rng(seed).random((n, labels)))
    truth = torch.from_numpy(np.random.default_rng(seed + 1).random((n, labels))) < probs
    truth[0] = False  # a row without labels
    return probs, truth.long()


# -------------------------------------------------------------------------------------------------------- scores


def by_loops(p: list[float], y: int, method: str, u: float, penalty: float, k_reg: int) -> float:
    if method == "lac":
        return math.inf if p[y] == 0 else -math.log(p[y])
    above, equal = sum(q for q in p if q > p[y]), sum(q for q in p if q == p[y])
    rank = 1 + sum(q > p[y] for q in p)
    return (above + u * equal) / sum(p) + (penalty * max(0, rank - k_reg) if method == "raps" else 0)


@pytest.mark.protects("ties_in_any_order")
@pytest.mark.parametrize("method", ["lac", "aps", "raps"])
def test_scores_are_their_formulas(method: str) -> None:
    probs = torch.cat([TIED, data()[0]])
    uniforms = torch.rand(len(probs), generator=torch.Generator().manual_seed(0)).double()
    for u in (uniforms, None):
        found = class_scores(probs.log(), method, u, 0.3, 1)
        for row, (p, scores) in enumerate(zip(probs.log().exp().tolist(), found.tolist(), strict=True)):
            share = 1.0 if u is None else float(u[row])
            expected = [by_loops(p, y, method, share, 0.3, 1) for y in range(4)]
            assert scores == pytest.approx(expected, abs=1e-12)


@pytest.mark.protects("ties_in_any_order")
def test_sets_do_not_depend_on_the_order_of_classes() -> None:
    for order in itertools.permutations(range(4)):
        permuted = class_scores(TIED[:, list(order)].log(), "aps")
        assert torch.equal(permuted, class_scores(TIED.log(), "aps")[:, list(order)])


@pytest.mark.protects("ties_in_any_order")
def test_all_classes_together_have_the_mass_one_whatever_the_rounding() -> None:
    """Without chance the least likely class has the score 1 exactly: rounding must not break these ties."""
    probs = data(200, 7)[0].float().double()
    assert (probs.sum(1) != 1).any()
    assert (class_scores(probs.log(), "aps").amax(1) == 1).all()


def test_the_randomised_score_of_a_true_p_is_uniform() -> None:
    """P(s <= t) = sum_y p_y P_u(above_y + u equal_y <= t) = t, for every p and t: nothing is wasted."""
    probs = torch.cat([TIED, data()[0]])
    least, most = (class_scores(probs.log(), "aps", torch.full((len(probs),), u).double()) for u in (0.0, 1.0))
    for t in (0.05, 0.3, 0.77, 1.0):
        share = torch.where(most > least, ((t - least) / (most - least).clamp_min(1e-300)).clamp(0, 1), least <= t)
        assert torch.allclose((probs * share).sum(1), torch.tensor(t).double(), atol=1e-12)


# ------------------------------------------------------------------------------------------------------- coverage


def left_out(probs: Tensor, labels: Tensor, **options: Any) -> list[Tensor]:
    """The set of each row, of thresholds from all others."""
    sets = []
    for i in range(len(labels)):
        rest = [j for j in range(len(labels)) if j != i]
        groups = options.get("groups")
        own = options if groups is None else {**options, "groups": [groups[j] for j in rest]}
        fitted = fit_prediction_sets(probs[rest], labels[rest], **own)
        sets.append(fitted.predict(probs[i : i + 1], groups=None if groups is None else [groups[i]])[0])
    return sets


@pytest.mark.parametrize("alpha", [0.1, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("method", ["lac", SetScore(method="aps", randomized=False)])
def test_coverage_is_exact_over_all_ways_to_leave_one_out(method: Any, alpha: float) -> None:
    """Of n + 1 rows with distinct scores exactly ceil((n + 1)(1 - alpha)) are covered by the others' threshold."""
    probs, labels = data(12)
    covered = [bool(own[y]) for own, y in zip(left_out(probs, labels, alpha=alpha, method=method), labels, strict=True)]
    assert sum(covered) == conformal_rank(11, alpha)
    assert 1 - alpha <= sum(covered) / 12 <= 1 - alpha + 1 / 12


@pytest.mark.protects("ties_in_any_order")
def test_ties_only_add_coverage() -> None:
    probs, labels = data(20)
    probs = torch.where(probs > 0.3, 0.4, 0.2)  # two values only
    probs = probs / probs.sum(1, keepdim=True)
    covered = sum(bool(own[y]) for own, y in zip(left_out(probs, labels, alpha=0.3), labels, strict=True))
    assert covered >= conformal_rank(19, 0.3)


@pytest.mark.parametrize("how", ["class", "group"])
def test_coverage_holds_within_each_class_or_group(how: str) -> None:
    probs, labels = data(40, 3)
    keys = labels.tolist() if how == "class" else [int(n) % 3 for n in torch.arange(40)]
    options = {"class_conditional": True} if how == "class" else {"groups": keys}
    sets = left_out(probs, labels, alpha=0.3, **options)
    for key in range(3):
        own = [i for i, each in enumerate(keys) if each == key]
        assert sum(bool(sets[i][labels[i]]) for i in own) == conformal_rank(len(own) - 1, 0.3)


def test_randomised_sets_cover_exactly_as_often_as_they_say() -> None:
    """alpha = 0.2 and n = 19 give 16/20. Each of 400 calibrations is tested on 20 rows: its coverage varies by at most
    sqrt(0.8 * 0.2 / 20 + Var Beta(16, 4)) = 0.125, the mean of all by 0.0063, and 4 times that are allowed.
    """
    probs, labels = data(400 * 39, 4)
    rates = []
    for r in range(400):
        rows, new = slice(39 * r, 39 * r + 19), slice(39 * r + 19, 39 * r + 39)
        sets = fit_prediction_sets(probs[rows], labels[rows], alpha=0.2, method="aps", seed=r)
        hits = sets.predict(probs[new], seed=r).gather(1, labels[new][:, None])
        rates.append(float(hits.double().mean()))
    assert np.mean(rates) == pytest.approx(0.8, abs=0.025)


def test_uniform_numbers_of_calibration_and_prediction_differ() -> None:
    score = SetScore(method="aps")
    log_probs = data()[0].log()
    first, second = (score.of_classes(log_probs, 0, stream) for stream in (0, 1))
    assert not torch.isclose(first, second).any(1).all()
    assert torch.equal(first, score.of_classes(log_probs, 0, 0))


def test_raps_chooses_on_rows_that_it_leaves_out() -> None:
    """k_reg by the rank of the truth, lambda by the mean size; neither row set is used twice."""
    probs, labels = data(300, 10)
    sets = fit_prediction_sets(probs, labels, method="raps")
    assert sets.score.penalty in (0.001, 0.01, 0.1, 0.2, 0.5) and 1 <= sets.score.k_reg <= 10
    assert 200 < sets.num_examples < 280
    tuned = np.random.default_rng([0, 2]).random(300) < 0.2
    assert sets.num_examples == int((~tuned).sum())
    ranks = np.sort([(p > p[y]).sum() + 1 for p, y in zip(probs[tuned].numpy(), labels[tuned].numpy(), strict=True)])
    assert sets.score.k_reg == ranks[conformal_rank(len(ranks), 0.1) - 1]
    given = fit_prediction_sets(probs, labels, method=SetScore(method="raps", penalty=0.2, k_reg=1))
    assert given.num_examples == 300
    assert (
        given.predict(probs).sum(1).double().var()
        < fit_prediction_sets(probs, labels, method="aps").predict(probs).sum(1).double().var()
    )


# ------------------------------------------------------------------------------------------------- several labels


@pytest.mark.parametrize("alpha", [0.2, 0.5])
def test_sets_of_labels_hold_all_that_are_true(alpha: float) -> None:
    probs, labels = several()
    sets = left_out(probs, labels, alpha=alpha)
    held = [bool(own[truth.bool()].all()) for own, truth in zip(sets, labels, strict=True)]
    assert sum(held) >= conformal_rank(14, alpha)
    if alpha == 0.2:  # distinct scores but for rows without labels, of which there is one
        assert sum(held) == conformal_rank(14, alpha)


def test_each_label_by_itself() -> None:
    probs, labels = several(40)
    sets = left_out(probs, labels, alpha=0.3, class_conditional=True)
    for label in range(4):
        own = labels[:, label].nonzero()[:, 0].tolist()
        assert sum(bool(sets[i][label]) for i in own) == conformal_rank(len(own) - 1, 0.3)


@pytest.mark.parametrize("alpha", [0.1, 0.2, 0.35, 0.6])
def test_the_share_of_labels_that_are_missed_is_bounded(alpha: float) -> None:
    """Conformal risk control holds for every bag of n + 1 rows, by the proof of its theorem 1."""
    for seed in range(5):
        probs, labels = several(seed=10 * seed)
        sets = left_out(probs, labels, alpha=alpha, promise="fnr")
        missed = [
            float((~own[truth.bool()]).double().mean()) if truth.any() else 0.0
            for own, truth in zip(sets, labels, strict=True)
        ]
        assert np.mean(missed) <= alpha + 1e-9
        assert np.mean(missed) >= alpha - 2 / 15 - 1e-9 or not any(missed)


@pytest.mark.protects("ties_in_any_order")
@pytest.mark.parametrize("decimals", [6, 1])
def test_risk_control_takes_the_smallest_threshold_that_keeps_the_bound(decimals: int) -> None:
    """Against a search through all thresholds, ties and rows without labels included."""
    for seed in range(10):
        probs, labels = several(12, 3, seed)
        scores, truth = probs.round(decimals=decimals), labels.bool()
        for alpha in (0.05, 0.1, 0.3, 0.8, 0.999):

            def risk(t: float, scores: Tensor = scores, truth: Tensor = truth) -> float:
                lost = ((scores > t) & truth).sum(1) / truth.sum(1).clamp_min(1)
                return float(lost.double().sum())

            allowed = [t for t in [-1.0, *scores.flatten().tolist()] if (risk(t) + 1) / 13 <= alpha + 1e-9]
            assert false_negative_threshold(scores, truth, alpha) == min(allowed, default=math.inf)


# --------------------------------------------------------------------------------------------------- the object


def test_too_few_rows_give_every_class_and_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    probs, labels = data(8)
    with caplog.at_level(logging.WARNING):
        sets = fit_prediction_sets(probs, labels, alpha=0.1)
    assert sets.predict(probs).all() and len(caplog.records) == 1 and "it takes 9" in caplog.text
    assert "too few to leave any class out" in sets.describe()
    assert sets.coverage_interval() == {"all": (1.0, 1.0)}


def test_empty_sets_are_allowed_or_hold_the_likeliest() -> None:
    probs, labels = data(60)
    probs, labels = probs.repeat(2, 1), probs.argmax(1).repeat(2)  # always right: a high threshold on p
    flat = torch.tensor([[0.3, 0.3, 0.2, 0.2], [0.28, 0.24, 0.24, 0.24]])
    sets = fit_prediction_sets(probs, labels, alpha=0.5)
    assert not sets.predict(flat).any()
    filled = fit_prediction_sets(probs, labels, alpha=0.5, allow_empty=False).predict(flat)
    assert filled.tolist() == [[True, True, False, False], [True, False, False, False]]


def test_an_unseen_group_gets_every_class_and_classes_without_rows_are_in() -> None:
    probs, labels = data(40)
    sets = fit_prediction_sets(probs, labels, alpha=0.4, groups=["a"] * 40)
    found = sets.predict(probs[:2], groups=["a", "b"])
    assert found[1].all() and not found[0].all()
    rare = fit_prediction_sets(probs, labels.clamp_max(2), alpha=0.4, class_conditional=True)
    assert rare.predict(probs)[:, 3].all() and "1 have too few rows" in rare.describe()


def test_ignored_rows_do_not_count() -> None:
    probs, labels = data(30)
    masked = labels.clone()
    masked[:10] = -100
    groups = [i % 2 for i in range(30)]
    for options in ({}, {"class_conditional": True}):
        assert fit_prediction_sets(probs, masked, **options) == fit_prediction_sets(probs[10:], labels[10:], **options)
    assert fit_prediction_sets(probs, masked, groups=groups) == fit_prediction_sets(
        probs[10:], labels[10:], groups=groups[10:]
    )


def test_predictives_and_probabilities_agree() -> None:
    probs, labels = data(50)
    predictive = Predictive(problem_type="single_label_classification", log_probs=probs.log()[None])
    sets = fit_prediction_sets(probs, labels)
    assert torch.equal(sets.predict(predictive), sets.predict(probs))
    assert torch.equal(sets.predict(probs.float().numpy()), sets.predict(probs))
    assert fit_prediction_sets(predictive, labels) == sets
    p, y = several(50)
    many = fit_prediction_sets(p, y)
    bernoulli = Predictive(problem_type="multi_label_classification", log_probs=torch.stack([1 - p, p], -1).log()[None])
    assert torch.equal(many.predict(bernoulli), many.predict(p))


@pytest.mark.parametrize(
    "make",
    [
        lambda: fit_prediction_sets(*data(50)),
        lambda: fit_prediction_sets(*data(9), alpha=0.05),
        lambda: fit_prediction_sets(*data(50), method="raps", class_conditional=True),
        lambda: fit_prediction_sets(*data(50), method="aps", groups=["x", "y"] * 25),
        lambda: fit_prediction_sets(*several(50), promise="fnr", allow_empty=False),
    ],
)
def test_files_keep_everything(make: Callable[[], PredictionSets], tmp_path: Path) -> None:
    sets = make()
    sets.save(tmp_path)
    assert PredictionSets.load(tmp_path) == sets == PredictionSets.load(tmp_path / SETS_FILE)
    json.loads((tmp_path / SETS_FILE).read_text(), parse_constant=pytest.fail)  # no Infinity, no NaN
    assert PredictionSets.from_dict({**sets.to_dict(), "of_a_newer_version": 1}) == sets
    assert sets.describe().count(".") >= 2 and sets.describe().endswith(".")


PROBS, LABELS = data(20)
MANY, PRESENT = several(20)
SETS = fit_prediction_sets(PROBS, LABELS)
TOKENS = Predictive(problem_type="token_classification", log_probs=torch.zeros(1, 2, 3, 4).log_softmax(-1))
VALUES = Predictive(problem_type="regression", values=torch.zeros(1, 2), noise_std=1.0)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: fit_prediction_sets(PROBS, LABELS, alpha=0.0), "`alpha` is the share"),
        (lambda: fit_prediction_sets(PROBS, LABELS, alpha="0.1"), "`alpha` is the share"),
        (lambda: fit_prediction_sets(PROBS, LABELS, method="naive"), "`method` must be one of"),
        (lambda: fit_prediction_sets(PROBS, LABELS, promise="all"), "`promise` must be one of"),
        (lambda: fit_prediction_sets(PROBS, LABELS, promise="fnr"), "for several labels per row"),
        (lambda: fit_prediction_sets(PROBS, LABELS, seed=-1), "`seed`"),
        (lambda: fit_prediction_sets(PROBS), "`dataset` is missing"),
        (lambda: fit_prediction_sets(PROBS.log(), LABELS), "log-probabilities through an exponential"),
        (lambda: fit_prediction_sets(PROBS / 2, LABELS), "must sum to 1"),
        (lambda: fit_prediction_sets(PROBS[0], LABELS), r"must have the shape \(B, C\)"),
        (lambda: fit_prediction_sets(PROBS * math.nan, LABELS), r"must lie in \[0, 1\]"),
        (lambda: fit_prediction_sets("probs", LABELS), "must be a Predictive or probabilities"),
        (lambda: fit_prediction_sets(PROBS, LABELS + 1), r"`labels` must be classes 0..3 or -100, got 4"),
        (lambda: fit_prediction_sets(PROBS, LABELS[:5]), "`labels` must be whole numbers"),
        (lambda: fit_prediction_sets(PROBS, LABELS.double()), "`labels` must be whole numbers"),
        (lambda: fit_prediction_sets(MANY, PRESENT * 2), "must be 0 or 1"),
        (lambda: fit_prediction_sets(MANY, PRESENT[:, :2]), "`labels` must have the shape"),
        (lambda: fit_prediction_sets(MANY, PRESENT, method="aps"), 'must be "lac"'),
        (lambda: fit_prediction_sets(MANY, PRESENT, promise="fnr", class_conditional=True), "all classes together"),
        (lambda: fit_prediction_sets(PROBS, LABELS, class_conditional=True, groups=[0] * 20), "exclude each other"),
        (lambda: fit_prediction_sets(PROBS, LABELS, groups=[0] * 3), "one group per row, 20"),
        (lambda: SetScore(method="lac", penalty=0.1), 'are of "raps"'),
        (lambda: SetScore(method="raps", penalty=-1.0), "`penalty`"),
        (lambda: SETS.predict(PROBS[:, :2] / PROBS[:, :2].sum(1, keepdim=True)), "with 4 classes"),
        (lambda: SETS.predict(PROBS, groups=[0] * 20), "`groups` are needed where"),
        (lambda: fit_prediction_sets(PROBS, LABELS, groups=[0] * 20).predict(PROBS), "`groups` are needed where"),
        (lambda: SETS.predict(TOKENS), "one decision per input"),
        (lambda: SETS.predict(VALUES), "see `fit_prediction_intervals`"),
        (lambda: PredictionSets.load("/nowhere"), "There is no prediction_sets.json"),
        (lambda: PredictionSets.from_dict({"alpha": 0.1}), "is damaged"),
        (lambda: PredictionSets.from_dict({**SETS.to_dict(), "alpha": 2}), "`alpha` is"),
    ],
)
def test_bad_input(call: Callable[[], Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        call()


def test_a_damaged_or_newer_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / SETS_FILE
    path.write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        PredictionSets.load(path)
    path.write_text(json.dumps({**SETS.to_dict(), "version": 2}))
    with pytest.raises(ValueError, match="of version 2"):
        PredictionSets.load(tmp_path)
