"""What a search leaves behind: lines and tables on the screen, rows for results.json, and a figure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from bayeformers.reports import format_table
from examples.search.space import Space
from examples.search.study import is_default

Row = dict[str, Any]
COLUMNS = ("delta", "prior", "prior_std", "prior_relative_scale", "learning_rate", "rho_learning_rate", "kl_weight")


def trial_row(trial: FrozenTrial, space: Space) -> Row:
    """A trial as it stands in results.json; a pruned one's NLL is the least that it reported."""
    reported = trial.intermediate_values
    pruned = trial.state == TrialState.PRUNED
    seconds = trial.duration.total_seconds() if trial.duration else None
    return {
        "number": trial.number,
        "state": trial.state.name.lower(),
        "is_default": is_default(trial),
        "validation_nll": min(reported.values()) if pruned and reported else trial.value,
        "steps": max(reported, default=0),
        "seconds": seconds,
        "setting": space.suggest(trial),
    }


def trial_line(trial: FrozenTrial, space: Space, study: Study) -> str:
    """One finished trial in a line, beside the best so far."""
    row = trial_row(trial, space)
    best = min(
        (other.value for other in study.get_trials(states=[TrialState.COMPLETE]) if other.value is not None),
        default=math.inf,
    )
    shown = "  ".join(f"{name} {_text(value)}" for name, value in row["setting"].items())
    state = "pruned at" if row["state"] == "pruned" else "validation NLL"
    return f"Trial {row['number']}: {state} {row['validation_nll']:.4f} (best {best:.4f})  {shown}"


def format_trials(rows: Sequence[Row]) -> str:
    """All trials, best first, those without an end last."""
    columns = [name for name in COLUMNS if any(name in row["setting"] for row in rows)]
    header = ["trial", "validation NLL", "steps", *columns]
    ordered = sorted(rows, key=lambda row: (row["state"] != "complete", row["validation_nll"]))
    lines = [[_label(row), f"{row['validation_nll']:.4f}", str(row["steps"])] for row in ordered]
    for line, row in zip(lines, ordered, strict=True):
        line += [_text(row["setting"][name]) if name in row["setting"] else "-" for name in columns]
    widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in [header, *lines]]
    return "\n".join([text[0], "-" * len(text[0]), *text[1:]])


def _label(row: Row) -> str:
    notes = {"pruned": "pruned"}.get(row["state"], "defaults" if row["is_default"] else "")
    return f"{row['number']} {notes}".strip()


def _text(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def format_confirmation(confirmed: Mapping[str, Any], promised: float, conclusion: str) -> str:
    """Means over the seeds, and what the search promised beside what the test data say."""
    methods = confirmed["methods"]
    rows = {name: _means(reports) for name, reports in methods.items()}
    difference = confirmed["difference"]["nll"]
    table = format_table(rows, corner=f"test data, mean of {len(confirmed['seeds'])} fresh seeds", digits=4)
    return (
        f"{table}\n\nNLL, best found - defaults: {promised:+.4f} on the validation data of the search, "
        f"{difference['mean']:+.4f} ± {difference['standard_error']:.4f} on test data: {conclusion}."
    )


def _means(reports: Sequence[Mapping[str, float | None]]) -> dict[str, float | None]:
    means: dict[str, float | None] = {}
    for name in ("nll", "ece", "brier", "accuracy", "rmse", "validation_nll"):
        values = [value for report in reports if (value := report.get(name)) is not None]
        if len(values) == len(reports):
            means[name] = sum(values) / len(values)
    return means
