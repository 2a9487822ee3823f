"""A posterior's predictions of labelled rows, or numbers in their place, as prediction sets and intervals take them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..checks import check_count
from ..posteriors import Posterior
from ..posteriors.predict import as_posterior
from ..predictive import Predictive
from .rows import check_order, predicted_rows
from .saving import weights_digest

__all__ = ["Calibration", "Collator", "calibration_rows"]

Collator = Callable[[list[Any]], Any]


@dataclass(frozen=True, eq=False)
class Calibration:
    """What a fit rests on.

    Attributes:
        parts: predictions with their labels, batch by batch.
        groups: of each row, None without.
        how: "num_samples" and "weights" (a digest of the model's), or nothing where numbers were given.
    """

    parts: list[tuple[Any, Any]]
    groups: Sequence[Any] | None
    how: dict[str, Any]


def calibration_rows(
    source: Any,
    dataset: Any,
    groups: str | Sequence[Any] | None = None,
    *,
    num_samples: int = 16,
    batch_size: int = 32,
    data_collator: Collator | None = None,
    seed: int = 0,
) -> Calibration:
    """Predict a dataset, or take predictions that were made already.

    Args:
        source: a posterior or model; or the predictions of all rows.
        dataset: the labelled rows, as `rows.predicted_rows` takes them; with predictions the labels.
        groups: one per row, or a column's name.
        num_samples: how many draws, the same ones for every batch.
        batch_size: rows per batch.
        data_collator: makes a batch of rows; None: transformers' default.
        seed: of the draws.

    Returns:
        The rows in their order.

    Raises:
        TypeError: the dataset is none.
        ValueError: it is missing or empty, shuffles the rows of ``groups``, or has no labels, or no such column.
    """
    check_count("batch_size", batch_size, 1)
    if dataset is None:
        raise ValueError("`dataset` is missing: labelled rows, or with numbers in place of a posterior their labels.")
    # a Predictive first: the protocol's check reads its properties, some of which a head may not have
    if isinstance(source, Predictive) or not isinstance(source, (nn.Module, Posterior)):
        if isinstance(groups, str):
            raise ValueError(f"`groups`={groups!r} needs a posterior and a dataset: give one group per row.")
        return Calibration([(source, dataset)], groups, {})
    check_order(dataset, groups=groups)
    posterior = as_posterior(source)
    column = groups if isinstance(groups, str) else None
    parts: list[tuple[Any, Any]] = []
    entries: list[Any] = []
    for inputs, labels, values in predicted_rows(posterior.model, dataset, batch_size, data_collator, column):
        own = labels.get("labels") if isinstance(labels, Mapping) else labels
        if not isinstance(own, Tensor):
            raise ValueError(f'`dataset` needs a column "labels" (or "label"), got {sorted(map(str, inputs))}.')
        parts.append((posterior.predict(inputs, num_samples=num_samples, seed=seed), own))
        entries += values
    how = {"num_samples": num_samples, "weights": weights_digest(posterior.model)}
    return Calibration(parts, groups if column is None else entries, how)
