"""From a posterior of this package to the arrays that are kept."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from bayeformers.predictive import Predictive

from .context import Context, Predictor
from .data import Batch


def of_posterior(context: Context, posterior: Any, **options: Any) -> Predictor:
    """Predictions of a posterior of this package, with the Gaussian of its logits where it has one."""

    def arrays(batch: Batch) -> dict[str, Tensor]:
        predictive: Predictive = posterior.predict(batch, **options)
        found = {"probs": predictive.mean_log_probs.double().exp()}
        if predictive.logit_mean is not None and predictive.logit_covariance is not None:
            found |= {"logit_mean": predictive.logit_mean, "logit_covariance": predictive.logit_covariance}
        return found

    return lambda part: context.predict(part, arrays)
