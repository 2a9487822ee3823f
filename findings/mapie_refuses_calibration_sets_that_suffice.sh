#!/usr/bin/env bash
# mapie 1.6.0, scikit-learn 1.9.1: SplitConformalClassifier and SplitConformalRegressor refuse 9 calibration rows at
# confidence .9 and 19 at .95, where the ceil((n + 1)(1 - alpha)) = n-th smallest score exists and covers: the check is
# 1 / alpha < n, and the least that suffices is n = 1 / alpha - 1.
# A good guess would have been sets that cover with exactly .9 and .95.
# Seen: ValueError with 9 and with 10 rows, none with 11.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check mapie==1.6.0 scikit-learn==1.9.1 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" -W ignore - <<'PY'
from importlib.metadata import version

import numpy as np
from mapie.regression import SplitConformalRegressor
from sklearn.dummy import DummyRegressor

print("mapie", version("mapie"), "scikit-learn", version("scikit-learn"))
found = {}
for n in (8, 9, 10, 11, 12):
    x, y = np.zeros((n, 1)), np.arange(float(n))
    conformal = SplitConformalRegressor(DummyRegressor(strategy="constant", constant=0.0).fit(x, y), confidence_level=0.9, prefit=True)
    try:
        conformal.conformalize(x, y)
        _, intervals = conformal.predict_interval(x[:1])
        found[n] = float(intervals[0, 1, 0])
    except ValueError as error:
        found[n] = str(error)
    print(n, found[n])
PY
