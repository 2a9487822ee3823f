"""Bands of a regression: what they cover."""

import numpy as np

from bayeformers.reports.bands import Bands


def test_coverage_counts_the_band_of_both_uncertainties() -> None:
    found = Bands(np.zeros(3), np.full(3, 3.0), np.full(3, 4.0))  # total 5: the band is -+ 9.8
    np.testing.assert_array_equal(found.covers(np.array([9.7, -9.7, 9.9])), [1, 1, 0])
