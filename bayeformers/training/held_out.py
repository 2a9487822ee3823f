"""Which held-out rows choose a Laplace posterior's prior precision, and the line that says how it was chosen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.trainer_utils import has_length

from ..laplace import LaplacePosterior
from ..laplace.config import PriorChoice
from ..laplace.evidence import Precision
from ..laplace.tuning import checked_validation
from ..posteriors.heads import has_many_logits, known_problem_type
from .checks import check_dataset

__all__ = ["COLLATED", "HeldOut", "choose_rows", "said_choice"]

COLLATED = ("label", "label_ids")
"""Columns that transformers' collators make "labels" of."""


_RULES = {
    "leverage": "the least that the evidence and the leverages of {:,} training rows allow",
    "perturbed": "the largest that is as good as the best, within one standard error, on {:,} training rows with 15 % "
    "of their words masked or values exchanged",
}


@dataclass(frozen=True)
class HeldOut:
    """How tau is to be found.

    Attributes:
        prior_precision: a number, or the method; None: the best one of those that need no held-out rows.
        data: the held-out dataset of "holdout", else None.
        name: what the user calls that dataset; without one, why there is none.
    """

    prior_precision: Precision | PriorChoice | None
    data: Any = None
    name: str = ""


def choose_rows(
    model: nn.Module,
    prior_precision: Precision | PriorChoice | None,
    validation: Any,
    evaluation: Any,
    *,
    training: Any,
    label_names: Iterable[str],
) -> HeldOut:
    """Return ``validation``, else ``evaluation``, for "holdout" or where nothing is said; neither if none can.

    Args:
        model: the trained model, whose head must have labels to be scored by.
        prior_precision: what the caller asks for.
        validation: held-out data that the caller gives.
        evaluation: the trainer's.
        training: the data that the posterior is fitted to.
        label_names: columns that labels may be in.

    Raises:
        ValueError: "holdout" is asked for, or ``validation`` is given without another wish, and they cannot serve.
    """
    if prior_precision is not None and prior_precision != "holdout":
        return HeldOut(prior_precision)
    data, name = (evaluation, "eval_dataset") if validation is None else (validation, "validation_dataset")
    if prior_precision is None and validation is None:
        reason = _why_not(model, data, training, set(label_names))
        return HeldOut(None, None, reason) if reason else HeldOut("holdout", data, name)
    if data is None:
        raise ValueError('`prior_precision`="holdout" needs `validation_dataset`, or a trainer with `eval_dataset`.')
    if isinstance(data, dict):
        raise ValueError(f"`validation_dataset` must be one dataset, got a dict: pass one of its {list(data)}.")
    check_dataset(data, "validation_dataset")
    checked_validation(model, data)
    return HeldOut("holdout", data, name)


def _why_not(model: nn.Module, data: Any, training: Any, label_names: set[str]) -> str:
    """Why the `eval_dataset` cannot choose tau unasked; empty if it can."""
    if has_many_logits(model, known_problem_type(model)):
        return "this head has too many logits for held-out rows or leverages to judge"
    if data is None or isinstance(data, str):
        return "there is no `eval_dataset`"
    if isinstance(data, dict):
        return f"`eval_dataset` holds several sets, {', '.join(map(str, data))}: pass one as `validation_dataset`"
    if data is training:
        return "`eval_dataset` is the training data"
    if has_length(data) and len(data) == 0:
        return "`eval_dataset` is empty"
    if not _has_labels(data, label_names):
        return "`eval_dataset` has no labels"
    return ""


def _has_labels(data: Any, label_names: set[str]) -> bool:
    """By the first row; a row that is no mapping is a (inputs, labels) pair or unknown, and taken to have them."""
    names = getattr(data, "column_names", None)
    if names is None:
        try:
            first = data[0] if hasattr(data, "__getitem__") else next(iter(data), None)
        except (IndexError, KeyError):
            return False
        if not isinstance(first, Mapping):
            return first is not None
        names = list(first)
    return bool(label_names & set(names))


def said_choice(
    posterior: LaplacePosterior, held_out: HeldOut, num_training: int | None, num_seen: int | None = None
) -> str:
    """Return a line: tau, how it was chosen, on which rows; and what speaks against believing the posterior.

    Args:
        posterior: the fit.
        held_out: how its prior precision was found.
        num_training: rows of the fit; None where that is not known.
        num_seen: rows that the curvature was measured on, where it is scaled up to all of them.
    """
    tau = posterior.prior_precision
    shown = f"{tau:.4g}" if isinstance(tau, float) else f"{min(tau.values()):.4g} to {max(tau.values()):.4g} by layer"
    rows = "the training data" if num_training is None else f"{num_training:,} training rows"
    if num_training is not None and num_seen is not None and num_seen < num_training:
        rows = f"{num_seen:,} of {rows}"
    if held_out.data is not None:
        count = f"the {len(held_out.data):,} rows of " if has_length(held_out.data) else ""
        how = f"of least held-out NLL on {count}`{held_out.name}`"
    elif posterior.choice.method == "given":
        how = "as given"
    elif posterior.choice.method in ("leverage", "perturbed"):
        how = f"{_RULES[posterior.choice.method].format(posterior.choice.num_rows)}, "
        how += f"no held-out ones ({held_out.name})" if held_out.name else "as asked for"
    else:
        each = ", layer by layer," if posterior.choice.method == "marglik_per_layer" else ""
        how = f"of largest evidence{each} on {rows}, no held-out ones"
        how += f" ({held_out.name})" if held_out.name else ""
    caveats = "".join(f" Beware: {caveat}." for caveat in posterior.caveats)
    return f"Laplace posterior: curvature of {rows}, prior precision tau = {shown}, {how}.{caveats}"
