"""Points on a line: generated with a known truth, or read from a CSV file."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

DATA, GAP, OUTSIDE = "data", "gap", "outside"
SUPPORT = ((-3.0, -0.6), (1.0, 3.0))
"""Where the generated training points lie; between the two intervals there are none."""
LIMITS = (-4.2, 4.2)
TEST_POINTS = 1000
"""Per region."""


def true_mean(x: Array) -> Array:
    """sin(2 x) + x / 4."""
    return np.sin(2 * x) + x / 4


def true_noise_std(x: Array) -> Array:
    """0.05 up to x = -3; from there it grows to 0.35 at 3, and on."""
    return np.maximum(0.2 + 0.05 * x, 0.05)


@dataclass(frozen=True)
class Points:
    """x (N,), y (N,) in the data's own units, and the region that each belongs to."""

    x: Array
    y: Array
    region: NDArray[np.str_]


@dataclass(frozen=True)
class CurveData:
    """Fitting sees `train`; the deterministic baseline's noise is fitted on `validation`; `test` is only reported.

    ``is_generated``: the truth is known, y ~ N(true_mean(x), true_noise_std(x)^2).
    """

    train: Points
    validation: Points
    test: Points
    is_generated: bool

    def scaled_x(self, x: Array) -> Array:
        """Some x in the network's units: standardised by the training points."""
        return (x - self.train.x.mean()) / self.train.x.std()

    def scaled_y(self, y: Array) -> Array:
        """Some y in the network's units: standardised by the training points."""
        return (y - self.train.y.mean()) / self.train.y.std()

    @property
    def question(self) -> str:
        """A picture's heading."""
        points = f"{len(self.train.x)} training points"
        if self.is_generated:
            return f"Which band is right? {points}, none in the middle, with noise that grows to the right"
        return f"What does each method say about {points}?"

    def truth(self, x: Array) -> tuple[Array, Array] | None:
        """The true mean and noise at some x, (N,) each."""
        return (true_mean(x), true_noise_std(x)) if self.is_generated else None

    @property
    def limits(self) -> tuple[float, float]:
        """What the picture shows: the generated test points, or the points and a fifth of the training range beyond."""
        x = np.concatenate([self.train.x, self.test.x])
        margin = 0.0 if self.is_generated else 0.2 * float(np.ptp(self.train.x))
        return float(x.min()) - margin, float(x.max()) + margin


def generate(seed: int, num_points: int = 160) -> CurveData:
    """Training and validation points on `SUPPORT`; test points there, in the gap, and beyond both ends."""
    rng = np.random.default_rng(seed)
    (a, b), (c, d) = SUPPORT
    regions = {DATA: SUPPORT, GAP: ((b, c),), OUTSIDE: ((LIMITS[0], a), (d, LIMITS[1]))}
    tests = [_drawn(rng, region, regions[region], TEST_POINTS) for region in regions]
    test = Points(*(np.concatenate([getattr(part, name) for part in tests]) for name in ("x", "y", "region")))
    train, validation = (_drawn(rng, DATA, SUPPORT, size) for size in (num_points, num_points // 2))
    return CurveData(train, validation, test, is_generated=True)


def _drawn(rng: np.random.Generator, region: str, intervals: tuple[tuple[float, float], ...], size: int) -> Points:
    lengths = np.array([high - low for low, high in intervals])
    which = rng.choice(len(intervals), size, p=lengths / lengths.sum())
    x = np.array([intervals[index][0] for index in which]) + lengths[which] * rng.random(size)
    y = true_mean(x) + true_noise_std(x) * rng.standard_normal(size)
    return Points(x, y, np.full(size, region))


def read_points(path: str, seed: int) -> CurveData:
    """A CSV file with columns x and y, shuffled: 60 % train, 20 % validation, 20 % test; the truth is unknown.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not of that form.
    """
    values = _read_csv(path)
    if len(values) < 20:
        raise ValueError(f"`data_file` {path} must hold at least 20 points, got {len(values)}.")
    if np.ptp(values[:, 0]) == 0 or np.ptp(values[:, 1]) == 0:
        raise ValueError(f"`data_file` {path}: all x, or all y, are equal: there is nothing to regress.")
    values = values[np.random.default_rng(seed).permutation(len(values))]
    parts = np.split(values, [6 * len(values) // 10, 8 * len(values) // 10])
    train, validation, test = (Points(part[:, 0], part[:, 1], np.full(len(part), DATA)) for part in parts)
    return CurveData(train, validation, test, is_generated=False)


def _read_csv(path: str) -> Array:
    if not Path(path).is_file():
        raise FileNotFoundError(f"`data_file` {path} does not exist.")
    with Path(path).open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, skipinitialspace=True)
        if not {"x", "y"} <= set(reader.fieldnames or ()):
            raise ValueError(f"`data_file` {path} must have a header with the columns x,y, got {reader.fieldnames}.")
        return np.array([_row(path, number, row) for number, row in enumerate(reader, start=2)])


def _row(path: str, number: int, row: dict[str, str]) -> tuple[float, float]:
    try:
        x, y = float(row["x"]), float(row["y"])
    except (TypeError, ValueError):
        x = y = math.nan
    if not (math.isfinite(x) and math.isfinite(y)):
        raise ValueError(f"`data_file` {path}, line {number}: x and y must be finite numbers, got {row}.")
    return x, y


def noise_of_neighbours(x: Array, y: Array) -> float:
    """Rice's estimate of the noise's standard deviation, before any model: sqrt(mean (y_i+1 - y_i)^2 / 2), x sorted.

    A smooth curve moves little between neighbours, so their difference is noise. Rice 1984 (Ann. Statist. 12(4)).

    >>> noise_of_neighbours(np.arange(4.0), np.array([0.0, 1.0, 0.0, 1.0]))
    0.7071
    """
    return float(np.sqrt(np.mean(np.diff(y[np.argsort(x)]) ** 2) / 2))
