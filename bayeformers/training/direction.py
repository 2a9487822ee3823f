"""Whether a larger or a smaller value of `metric_for_best_model` is better, where the metric is one of ours."""

from collections.abc import Iterable

__all__ = ["CONTRADICTED", "LOWER_IS_BETTER", "is_lower_better"]

LOWER_IS_BETTER = frozenset({
    "nll",
    "ece",
    "brier",
    "aurc",
    "rmse",
    "predictive_entropy",
    "expected_entropy",
    "mutual_information",
    "epistemic_variance",
    "aleatoric_variance",
})
"""What an evaluation adds: all of them. transformers takes larger for better unless a name ends in "loss"."""

CONTRADICTED = (
    "`greater_is_better` is True, but a smaller `metric_for_best_model`={!r} is better: the worst model would be kept "
    "as the best. Leave `greater_is_better` out, or set it to False."
)


def is_lower_better(metric: str | None, datasets: Iterable[str] = ()) -> bool:
    """Whether ``metric`` is one of ours, named as transformers takes it: "nll", "eval_nll" or "eval_<dataset>_nll".

    ``datasets``: names of the evaluation datasets where there are several.

    >>> is_lower_better("nll"), is_lower_better("eval_dev_nll", ["dev"]), is_lower_better("eval_accuracy")
    (True, True, False)
    """
    if metric is None:
        return False
    name, prefixes = metric.removeprefix("eval_"), ("", *(f"{dataset}_" for dataset in datasets))
    return any(name.removeprefix(prefix) in LOWER_IS_BETTER for prefix in prefixes)
