#!/usr/bin/env bash
# mapie 1.6.0, scikit-learn 1.9.1: SplitConformalRegressor refuses 9 calibration rows at confidence .9 and 19 at .95, where
# the ceil((n + 1)(1 - alpha)) = n-th smallest residual exists and covers with exactly .9 and .95: it asks for n >= 1 / alpha,
# and the least that suffices is n = 1 / alpha - 1.
# A good guess would have been an interval as wide as the largest residual.
# Seen: ValueError with 9 rows at .9 and with 19 at .95; with 10 and 20 the largest residual.
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
for n, confidence in ((9, 0.9), (10, 0.9), (19, 0.95), (20, 0.95)):
    x, y = np.zeros((n, 1)), np.arange(1.0, n + 1)
    zero = DummyRegressor(strategy="constant", constant=0.0).fit(x, y)
    conformal = SplitConformalRegressor(zero, confidence_level=confidence, prefit=True)
    try:
        conformal.conformalize(x, y)
        _, intervals = conformal.predict_interval(x[:1])
        found[n] = float(intervals[0, 1, 0])
    except ValueError as error:
        found[n] = f"ValueError: {' '.join(str(error).split())}"
    print(n, confidence, found[n])
assert found[10] == 10.0 and found[20] == 20.0, found
assert all(str(found[n]).startswith("ValueError") and "too low" in found[n] for n in (9, 19)), found
PY
