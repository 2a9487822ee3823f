"""The metrics of predictions under many weightings of the rows at once: a bootstrap's resamples are such weightings.

A resample of N rows with replacement is a vector of N counts. Every metric here is a function of counts, so all
resamples are evaluated by a few matrix products instead of a loop; to rounding they equal `bayeformers.metrics` on the
resample.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bayeformers.metrics.calibration import DEFAULT_BINS

METRICS = ("accuracy", "nll", "ece", "brier", "aurc", "error_auroc")
HIGHER_IS_BETTER = ("accuracy", "error_auroc")
TINY = np.finfo(np.float64).tiny


@dataclass(frozen=True)
class Judged:
    """Predictions of N rows against their labels; what the metrics read, each (N,)."""

    confidence: np.ndarray
    is_right: np.ndarray
    nll: np.ndarray
    brier: np.ndarray

    @classmethod
    def of(cls, probs: np.ndarray, labels: np.ndarray) -> Judged:
        """Shape: ``probs`` (N, C), ``labels`` (N,)."""
        rows = np.arange(len(labels))
        squares = np.square(probs).sum(1) - 2 * probs[rows, labels] + 1
        nll = -np.log(probs[rows, labels].clip(TINY))
        return cls(probs.max(1), (probs.argmax(1) == labels).astype(float), nll, squares)

    def values(self, counts: np.ndarray) -> np.ndarray:
        """The `METRICS` under each weighting, (6, R); ``counts`` (R, N). NaN where a metric has no value."""
        size = counts.sum(1)
        means = (counts @ np.stack([self.is_right, self.nll, self.brier], axis=1) / size[:, None]).T
        ranked = self._ranked(counts)
        return np.stack([means[0], means[1], self._ece(counts, size), means[2], *ranked])

    def _ece(self, counts: np.ndarray, size: np.ndarray) -> np.ndarray:
        """sum_b |right_b - confidence_b| / n, over bins of equal width, closed on the right."""
        bins = np.digitize(self.confidence, np.linspace(0.0, 1.0, DEFAULT_BINS + 1)[1:-1], right=True)
        gaps = np.zeros((len(self.confidence), DEFAULT_BINS))
        gaps[np.arange(len(bins)), bins] = self.is_right - self.confidence
        return np.asarray(np.abs(counts @ gaps).sum(1) / size)

    def _ranked(self, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """AURC and the AUROC of finding errors by low confidence; rows of one confidence are in random order.

        In a tie of m rows with e errors behind n rows with E, the expected risks sum to e + (E - e n / m) (H_{n+m} -
        H_n), H the harmonic numbers.
        """
        order = np.argsort(-self.confidence, kind="stable")
        starts = np.flatnonzero(np.diff(self.confidence[order], prepend=np.inf))
        sizes = np.add.reduceat(counts[:, order], starts, axis=1).astype(float)
        errors = np.add.reduceat(counts[:, order] * (1 - self.is_right[order]), starts, axis=1)
        before, wrong = np.cumsum(sizes, 1) - sizes, np.cumsum(errors, 1) - errors
        harmonic = np.concatenate([[0.0], np.cumsum(1 / np.arange(1, counts.sum(1).max() + 1))])
        steps = harmonic[(before + sizes).astype(int)] - harmonic[before.astype(int)]
        risks = errors + (wrong - errors * before / np.maximum(sizes, 1)) * steps
        aurc = risks.sum(1) / sizes.sum(1)
        rights, total = sizes - errors, errors.sum(1)
        pairs = total * rights.sum(1)
        below = ((total[:, None] - wrong - errors / 2) * rights).sum(1)  # errors of less confidence, ties half
        return aurc, np.divide(below, pairs, out=np.full(len(pairs), np.nan), where=pairs > 0)


def resamples(size: int, num_resamples: int, seed: int = 0) -> np.ndarray:
    """Counts of a bootstrap's resamples, (R, N); the first row is the data themselves, each once."""
    generator = np.random.default_rng(seed)
    counts = np.ones((num_resamples + 1, size))
    for row in counts[1:]:
        row[:] = np.bincount(generator.integers(size, size=size), minlength=size)
    return counts


def interval(draws: np.ndarray) -> dict[str, float]:
    """Value on the data, and the percentile interval of 95 % of the resamples; ``draws`` (R,), the first the data's."""
    low, high = np.nanquantile(draws[1:], [0.025, 0.975]) if len(draws) > 1 else (np.nan, np.nan)
    return {"value": float(draws[0]), "low": float(low), "high": float(high)}
