"""Do prediction sets hold the truth as often as they say? Real predictions, split again and again.

    python -m benchmarks.guarantees_sets --predictions FOLDER --page docs/results/prediction_sets.md

FOLDER has one folder per checkpoint (`cola-0`, ...) with `predictions/{method}.npz` in it, as `benchmarks.leaderboard`
writes them: arrays `{part}/probs` (N, C) and `{part}/labels` (N,). The reported part of each task, which nothing was
fitted to, is split at random into n calibration rows and the rest, 1,000 times. Of a pool of N rows with distinct
scores the number of covered ones among the N - n others then has, exactly, the beta-binomial law with (N - n, k,
n + 1 - k), k = ceil((n + 1)(1 - alpha)): that is what the coverages are held against.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats

from bayeformers.guarantees import SetScore, conformal_quantile, fit_prediction_sets
from bayeformers.guarantees.nonconformity import class_scores
from bayeformers.metrics.conformal import conformal_rank

PARTS = {"cola": "in_domain", "mrpc": "dev", "sst2": "dev", "trec": "dev", "clinc": "test"}
NAMES = {"cola": "CoLA", "mrpc": "MRPC", "sst2": "SST-2", "trec": "TREC", "clinc": "CLINC150"}
METHODS = {
    "map": "fine-tuned (MAP)",
    "unit_dropout_temperature": "dropout of units + temperature",
    "holdout": "Laplace",
}
SCORES: Mapping[str, Any] = {
    "lac": "lac",
    "aps": "aps",
    "aps, u = 1": SetScore(method="aps", randomized=False),
    "raps": SetScore(method="raps", penalty=0.1, k_reg=1),
}
TINY = (10, 19, 20, 50)


@dataclass(frozen=True)
class Setting:
    """One line of a table."""

    task: str
    method: str
    score: str
    alpha: float
    num_rows: int
    by_class: bool = False


@dataclass(frozen=True)
class Outcome:
    """Over the splits: mean and deviation of the coverage, and of the law; sizes of the sets."""

    setting: Setting
    pool: int
    coverage: float
    expected: float
    deviation: float
    expected_deviation: float
    ks_p: float
    size: float
    empty: float
    worst_class: float
    worst_class_marginal: float
    num_classes: int
    classes_below: int


def load(folder: Path, task: str, method: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Probabilities and labels of the reported part; None where the method was not run."""
    path = folder / f"{task}-0" / "predictions" / f"{method}.npz"
    if not path.is_file():
        return None
    with np.load(path) as arrays:
        return arrays[f"{PARTS[task]}/probs"], arrays[f"{PARTS[task]}/labels"]


def settings(folder: Path, tasks: Sequence[str]) -> Iterator[Setting]:
    """What is measured: every score and method at half the rows, tiny calibration sets, and class by class."""
    for task in tasks:
        for method in METHODS:
            found = load(folder, task, method)
            if found is None:
                continue
            half = len(found[1]) // 2
            for score in SCORES:
                yield Setting(task, method, score, 0.1, half)
            yield Setting(task, method, "lac", 0.05, half)
            yield Setting(task, method, "lac", 0.1, half, by_class=True)
            if method == "map":
                for n in TINY:
                    yield Setting(task, method, "lac", 0.1, n)
                    yield Setting(task, method, "aps", 0.1, n)


def measure(setting: Setting, probs: np.ndarray, labels: np.ndarray, splits: int) -> Outcome:
    """Split, calibrate and count; the same splits for every setting of a pool.

    Scores are computed once; that sets are made of them as the library does is asserted in the first split.
    """
    score = SCORES[setting.score] if isinstance(SCORES[setting.score], SetScore) else SetScore(method=setting.score)
    least, most = (_scores(probs, score, u) for u in (0.0, 1.0))
    counts, sizes, empty, by_class, alike = [], [], [], [], []
    for split in range(splits):
        rng = np.random.default_rng([split, 77])
        order = rng.permutation(len(labels))
        rows, rest = order[: setting.num_rows], order[setting.num_rows :]
        share = rng.random((len(labels), 1)) if score.is_random else 1.0
        scores = least + share * (most - least)
        chosen, limits = _chosen(scores, labels, rows, rest, setting)
        if split == 0 and not score.is_random:
            _check(chosen, probs, labels, rows, rest, setting, score)
        hits = chosen[np.arange(len(rest)), labels[rest]]
        counts.append(int(hits.sum()))
        sizes.append(chosen.sum(1).mean())
        empty.append((~chosen.any(1)).mean())
        if setting.by_class:
            shares = _shares(hits, labels[rest], probs.shape[1])
            by_class.append([(share - law, share) for share, law in zip(shares, limits, strict=True)])
            plain = _chosen(scores, labels, rows, rest, replace(setting, by_class=False))[0]
            alike.append(_shares(plain[np.arange(len(rest)), labels[rest]], labels[rest], probs.shape[1]))
    return _outcome(setting, len(labels), np.array(counts), [np.mean(sizes), np.mean(empty)], by_class, alike)


def _scores(probs: np.ndarray, score: SetScore, u: float) -> np.ndarray:
    uniforms = torch.full((len(probs),), u, dtype=torch.float64)
    log_probs = torch.from_numpy(probs).log()
    return class_scores(log_probs, score.method, uniforms, score.penalty or 0.0, score.k_reg or 0).numpy()


def _chosen(
    scores: np.ndarray, labels: np.ndarray, rows: np.ndarray, rest: np.ndarray, setting: Setting
) -> tuple[np.ndarray, list[float]]:
    """The sets of the rest; and by class the expected coverage k / (n_c + 1), 1 where the threshold is infinite."""
    own = scores[rows, labels[rows]]
    if not setting.by_class:
        return scores[rest] <= conformal_quantile(torch.from_numpy(own), setting.alpha), []
    parts = [torch.from_numpy(own[labels[rows] == number]) for number in range(scores.shape[1])]
    thresholds = np.array([conformal_quantile(part, setting.alpha) for part in parts])
    return scores[rest] <= thresholds, [conformal_rank(len(part), setting.alpha) / (len(part) + 1) for part in parts]


def _check(
    chosen: np.ndarray,
    probs: np.ndarray,
    labels: np.ndarray,
    rows: np.ndarray,
    rest: np.ndarray,
    setting: Setting,
    score: SetScore,
) -> None:
    sets = fit_prediction_sets(
        probs[rows], labels[rows], alpha=setting.alpha, method=score, class_conditional=setting.by_class
    )
    assert (sets.predict(probs[rest]).numpy() == chosen).all()


def _shares(hits: np.ndarray, labels: np.ndarray, num_classes: int) -> list[float]:
    """The share of hits within each class; NaN of a class without rows."""
    counts = np.bincount(labels, minlength=num_classes)
    with np.errstate(invalid="ignore"):
        return list(np.bincount(labels, hits, num_classes) / counts)


def _outcome(
    setting: Setting, pool: int, counts: np.ndarray, sizes: list[Any], by_class: list[Any], alike: list[Any]
) -> Outcome:
    m, k = pool - setting.num_rows, conformal_rank(setting.num_rows, setting.alpha)
    law = stats.betabinom(m, k, setting.num_rows + 1 - k) if k <= setting.num_rows else stats.binom(m, 1.0)
    excess = np.array(by_class)[..., 0] if setting.by_class else np.zeros((1, 1))
    worst = float(np.nanmin(np.nanmean(np.array(by_class)[..., 1], axis=0))) if setting.by_class else float("nan")
    # a class is below if the mean excess over the splits is so by more than 3 of its standard errors
    errors = np.nanstd(excess, axis=0) / np.sqrt(np.maximum((~np.isnan(excess)).sum(0), 1))
    return Outcome(
        setting=setting,
        pool=pool,
        coverage=float(counts.mean() / m),
        expected=float(law.mean() / m),
        deviation=float(counts.std() / m),
        expected_deviation=float(law.std() / m),
        ks_p=ks_of_discrete(counts, law),
        size=float(sizes[0]),
        empty=float(sizes[1]),
        worst_class=worst,
        worst_class_marginal=float(np.nanmin(np.nanmean(np.array(alike), axis=0))) if alike else float("nan"),
        num_classes=excess.shape[1],
        classes_below=int((np.nanmean(excess, axis=0) < -3 * errors).sum()) if setting.by_class else 0,
    )


def ks_of_discrete(counts: np.ndarray, law: Any, draws: int = 300) -> float:
    """The p-value of the Kolmogorov-Smirnov distance, by simulation, as the law is of whole numbers."""
    grid = np.arange(int(law.support()[1]) + 1)
    cdf = law.cdf(grid)

    def distance(values: np.ndarray) -> float:
        return float(np.abs(np.searchsorted(np.sort(values), grid, side="right") / len(values) - cdf).max())

    own = distance(counts)
    drawn = [distance(law.rvs(len(counts), random_state=np.random.default_rng(i))) for i in range(draws)]
    return float((1 + sum(d >= own for d in drawn)) / (draws + 1))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, keep the numbers as JSON, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--predictions", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("prediction_sets.json"))
    parser.add_argument("--page", type=Path)
    parser.add_argument("--tasks", nargs="+", default=list(PARTS))
    parser.add_argument("--splits", type=int, default=1000)
    options = parser.parse_args(arguments)
    known = json.loads(options.output.read_text()) if options.output.is_file() else []
    done = {json.dumps(each["setting"], sort_keys=True): each for each in known}
    for setting in settings(options.predictions, options.tasks):
        key = json.dumps(asdict(setting), sort_keys=True)
        if key not in done:
            found = load(options.predictions, setting.task, setting.method)
            assert found is not None
            done[key] = asdict(measure(setting, *found, options.splits))
            print(done[key], flush=True)
            options.output.write_text(json.dumps(list(done.values()), indent=1))
    if options.page:
        from benchmarks.guarantees_sets_page import page

        options.page.write_text(page(list(done.values()), options.splits), encoding="utf-8")


if __name__ == "__main__":
    logging.getLogger("bayeformers").setLevel(logging.ERROR)  # classes with too few rows are counted, not told
    main()
