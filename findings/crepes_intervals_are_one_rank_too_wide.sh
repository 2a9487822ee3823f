#!/usr/bin/env bash
# crepes 0.9.1: the prediction intervals of ConformalRegressor at n = 19 calibration residuals and confidence .9 take the
# largest residual, where split conformal prediction takes the ceil(20 * .9) = 18th smallest; at n = 9, where the largest
# of the nine suffices, they are endless. The rank is int((1 - confidence) * (n + 1)) - 1 in floating-point numbers, where
# (1 - .9) * 20 is 1.9999999999999996. ConformalClassifier keeps classes whose p-value equals 1 - confidence, so that at
# n = 9 every class is in every set.
# A good guess would have been the exact rank. The intervals hold (they are too wide), so no test of coverage fails.
# Seen: half widths 19 (not 18) and inf (not 9). (It imports scikit-learn, which it does not require: named below.)
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check crepes==0.9.1 numpy==2.4.6 pandas==3.1.1 scikit-learn==1.9.1
cd "$work"
"$work/venv/bin/python" -W ignore - <<'PY'
import crepes
import numpy as np

print("crepes", crepes.__version__, "numpy", np.__version__)
widths = {}
for n in (9, 19, 39):
    regressor = crepes.ConformalRegressor()
    regressor.fit(np.arange(1.0, n + 1))
    low, high = regressor.predict_int(np.zeros(1), confidence=0.9)[0]
    exact = int(np.ceil(np.round((n + 1) * 0.9, 9)))
    widths[n] = (float(high), exact)
    print("n", n, "half width", high, "exact rank", exact)
assert widths[9] == (np.inf, 9) and widths[19] == (19.0, 18), widths
PY
