"""The Markdown page of a board."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .methods import REFERENCES
from .ranks import Ranking, rank
from .scores import METRICS
from .tables import Cell

TITLES = {
    "accuracy": "accuracy", "nll": "NLL", "ece": "ECE", "brier": "Brier", "aurc": "AURC", "error_auroc": "error AUROC",
}  # fmt: skip
KIND_TITLES = {
    "best": "early-stopped checkpoints",
    "overfit": "over-fitted checkpoints (three times the epochs)",
    "lora": "LoRA adapters",
}
COMPARED = ("nll", "ece", "brier", "aurc")
RANKED = ("nll", "aurc")
DASH = "–"

INTRODUCTION = """# Leaderboard

Every method on the same fine-tuned checkpoints of MiniLM, each choosing on training or held-out rows alone. A row's
value is the mean over its seeds; brackets hold 95 % bootstrap intervals over the rows of the development (or test)
file, paired in the tables of differences. Costs are processor seconds of one core as ratios to the fine-tuned model's;
what a row takes from others (a curvature, predictions, members) is part of its cost. Peak memory is the process's.

```bash
python -m benchmarks.leaderboard --model MINILM --data_dir DATA --output_dir OUT --page PAGE.md --html PAGE.html
```

Rows that are done are not run again; `--methods`, `--tasks`, `--seeds` and `--kinds` take some of them. A method is a
function of `benchmarks/leaderboard/methods.py`.
"""


def page(cells: Sequence[Cell], introduction: str = INTRODUCTION) -> str:
    """The whole page, below its introduction."""
    blocks = [introduction.rstrip()]
    for kind in dict.fromkeys(cell["kind"] for cell in cells):
        own = [cell for cell in cells if cell["kind"] == kind]
        blocks += [f"## Summary: {KIND_TITLES.get(kind, kind)}", _summary(own), *_rankings(own)]
    for cell in cells:
        seeds = sorted({seed for method in cell["methods"].values() for seed in method["seeds"]})
        shown = f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"
        blocks += [
            f"## {cell['task']}, {KIND_TITLES.get(cell['kind'], cell['kind'])}",
            f"{cell['rows']} rows, {shown}.",
        ]
        blocks += [_values(cell), *(_differences(cell, reference) for reference in REFERENCES), _chosen(cell)]
    return "\n\n".join(block for block in blocks if block) + "\n"


def rankings(cells: Sequence[Cell], metric: str) -> Ranking | None:
    """Of the methods that every cell has, by a metric of which less is better; cells are of different tasks."""
    common = [name for name in cells[0]["methods"] if all(name in cell["methods"] for cell in cells)] if cells else []
    values = {name: [cell["methods"][name]["values"][metric]["value"] for cell in cells] for name in common}
    return rank(values, [cell["task"] for cell in cells])


def _rankings(cells: Sequence[Cell]) -> Iterable[str]:
    for metric in RANKED:
        found = rankings(cells, metric)
        if found is not None:
            yield _ranking(found, TITLES[metric])


def _ranking(found: Ranking, title: str) -> str:
    ranks = ", ".join(f"{name} {mean:.1f}" for name, mean in found.ranks.items())
    few = f"fewer than the {found.least_tasks} at which any two of {len(found.ranks)} methods could differ by it"
    if found.is_informative:
        groups = "; ".join(", ".join(group) for group in found.groups)
        verdict = f"Not told apart: {groups}." if groups else "All are told apart."
    else:
        verdict = f"{len(found.tasks)} tasks are {few}: the ranks are a description, not a test."
    return (
        f"Mean ranks by {title} over {', '.join(found.tasks)}: {ranks}. Friedman's p = {found.p_value:.3g}, Nemenyi's "
        f"critical difference {found.difference:.2f} (5 %). {verdict}"
    )


def _summary(cells: Sequence[Cell]) -> str:
    """On how many tasks each method's interval lies below and above a reference's, and what it costs."""
    names = list(dict.fromkeys(name for cell in cells for name in cell["methods"]))
    pairs = [("nll", "map"), ("nll", "temperature"), ("aurc", "map"), ("aurc", "mc_dropout")]
    header = ["method", "tasks", *(f"{TITLES[metric]} against {reference}" for metric, reference in pairs)]
    header += ["AURC against map, mean", "train ÷ MAP", "predict ÷ MAP", "peak MiB"]
    lines = []
    for name in names:
        methods = [cell["methods"][name] for cell in cells if name in cell["methods"]]
        record = [_record([method["minus"].get(ref, {}).get(metric) for method in methods]) for metric, ref in pairs]
        changes = [method["minus"]["map"]["aurc"]["relative"] for method in methods if "map" in method["minus"]]
        change = f"{100 * _mean(changes):+.1f} %" if changes else DASH
        costs = {key: _mean([method["cost"][key] for method in methods]) for key in ("train", "predict", "peak_mib")}
        ratios = [f"{costs['train']:.2f}", f"{costs['predict']:.1f}", f"{costs['peak_mib']:.0f}"]
        lines.append([methods[0]["title"], str(len(methods)), *record, change, *ratios])
    return f"{grid(header, lines)}\n\nBetter/worse: on so many tasks beyond the paired interval."


def _record(differences: Sequence[Mapping[str, float] | None]) -> str:
    known = [one for one in differences if one is not None]
    if not known:
        return DASH
    return f"{sum(one['high'] < 0 for one in known)}/{sum(one['low'] > 0 for one in known)}"


def _values(cell: Cell) -> str:
    header = ["method", *(TITLES[metric] for metric in METRICS), "train ÷ MAP", "predict ÷ MAP", "peak MiB"]
    most = max(len(method["seeds"]) for method in cell["methods"].values())
    lines = []
    for method in cell["methods"].values():
        of = "" if len(method["seeds"]) == most else f" ({len(method['seeds'])} of {most} seeds)"
        values = [_with_interval(method["values"][metric]) for metric in METRICS]
        costs = method["cost"]
        ratios = [f"{costs['train']:.2f}", f"{costs['predict']:.1f}", f"{costs['peak_mib']:.0f}"]
        lines.append([method["title"] + of, *values, *ratios])
    return grid(header, lines)


def _differences(cell: Cell, reference: str) -> str:
    """Differences whose interval leaves out 0 in bold; AURC with its change in percent."""
    lines = []
    for method in cell["methods"].values():
        if reference in method["minus"]:
            minus = method["minus"][reference]
            percent = f"{100 * minus['aurc']['relative']:+.1f} %"
            lines.append([method["title"], *(_difference(minus[metric]) for metric in COMPARED), percent])
    header = [f"minus {reference}", *(TITLES[metric] for metric in COMPARED), "AURC, relative"]
    return grid(header, lines) if lines else ""


def _chosen(cell: Cell) -> str:
    """What each method chose, seed by seed."""
    found = []
    for name, method in cell["methods"].items():
        shown = {}
        for key in method["chosen"][0]:
            values = [chosen.get(key) for chosen in method["chosen"]]
            if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
                shown[key] = ", ".join(f"{value:.3g}" for value in values)
        shown = {key: text for key, text in shown.items() if not key.endswith("seconds")}
        if shown:
            found.append(f"{name}: {'; '.join(f'{key} {text}' for key, text in shown.items())}")
    return f"Chosen, by seed: {'. '.join(found)}." if found else ""


def _with_interval(one: Mapping[str, float]) -> str:
    return f"{one['value']:.4f} [{one['low']:.3f}, {one['high']:.3f}]"


def _difference(one: Mapping[str, float]) -> str:
    text = f"{one['value']:+.4f} [{one['low']:+.4f}, {one['high']:+.4f}]"
    return text if not (one["high"] < 0 or one["low"] > 0) else f"**{text}**"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def grid(header: Sequence[str], lines: Sequence[Sequence[Any]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *lines])
