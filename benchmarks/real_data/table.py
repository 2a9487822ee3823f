"""The table over seeds: each metric averaged over seeds, with bootstrap intervals and paired differences.

An interval is over the reported rows, resampled jointly in all seeds, as they share these rows; the spread between
seeds is not in it, the record holds the values of each. An ECE is larger on resamples than on the data (their gaps
have the noise of two samplings), which its percentile intervals show.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bayeformers import metrics

from .context import is_saved, load_arrays, load_record

REFERENCES = ("map", "temperature")
COMPARED = ("nll", "ece", "brier", "error_auroc", "aurc")
"""Metrics whose paired differences are printed; the JSON holds all."""

Metric = Callable[[np.ndarray, np.ndarray], float]


def report(
    output_dir: Path,
    tasks: Sequence[str],
    seeds: Sequence[int],
    methods: Sequence[str],
    *,
    held_out: bool = False,
    num_resamples: int = 1000,
    name: str = "table",
) -> None:
    """Write ``name``.md and ``name``.json to ``output_dir``, and print the first.

    ``held_out``: the held-out rows alone, on which to compare what is yet to be chosen.
    """
    result = {}
    for task in tasks:
        found = _present(output_dir, task, seeds)
        result[task] = _task_table(output_dir, task, found, methods, held_out, num_resamples)
    text = "\n\n".join(_markdown(task, table) for task, table in result.items()) + "\n"
    (output_dir / f"{name}.md").write_text(text, encoding="utf-8")
    (output_dir / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(text)


def metrics_of(task_name: str) -> dict[str, Metric]:
    """Name -> function of probabilities (N, C) and labels (N,)."""
    return {
        "nll": metrics.negative_log_likelihood,
        "ece": metrics.expected_calibration_error,
        "brier": metrics.brier_score,
        "accuracy": metrics.accuracy,
        **{"cola": {"mcc": _matthews}, "mrpc": {"f1": _f1}}.get(task_name, {}),
        "error_auroc": lambda p, y: metrics.error_auroc(p.max(-1), p.argmax(-1) != y),
        "aurc": lambda p, y: metrics.aurc(p.max(-1), p.argmax(-1) != y),
    }


def _matthews(probs: np.ndarray, labels: np.ndarray) -> float:
    """Matthews' correlation of two classes is that of two 0/1 variables; hundreds of times faster than sklearn's."""
    x, y = probs.argmax(-1) - probs.argmax(-1).mean(), labels - labels.mean()
    norm = math.sqrt((x @ x) * (y @ y))
    return float(x @ y) / norm if norm > 0 else 0.0


def _f1(probs: np.ndarray, labels: np.ndarray) -> float:
    """2 TP / (2 TP + FP + FN) of class 1."""
    found = probs.argmax(-1)
    return float(2 * (found @ labels) / (found.sum() + labels.sum()))


def _values_of(functions: Mapping[str, Metric], probs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Shape: (N, S, C), (N, S) -> (metrics, S); NaN where a metric has no value."""
    values = np.full((len(functions), probs.shape[1]), np.nan)
    for row, function in zip(values, functions.values(), strict=True):
        for s in range(probs.shape[1]):
            with contextlib.suppress(metrics.UndefinedMetricError):
                row[s] = function(probs[:, s], labels[:, s])
    return values


def _present(output_dir: Path, task: str, seeds: Sequence[int]) -> list[int]:
    """The seeds whose checkpoint has predictions of the references."""
    return [s for s in seeds if all(is_saved(output_dir / f"{task}-{s}", name) for name in REFERENCES)]


def _task_table(
    output_dir: Path, task: str, seeds: Sequence[int], methods: Sequence[str], held_out: bool, num_resamples: int
) -> dict[str, Any]:
    """What was chosen and measured: methods that are there for all seeds, parts, metrics."""
    folders = [output_dir / f"{task}-{seed}" for seed in seeds]
    names = [name for name in methods if folders and all(is_saved(folder, name) for folder in folders)]
    parts: dict[str, dict[str, np.ndarray]] = {}
    for name in names:
        for part, (probs, labels) in _stacked(folders, name, held_out).items():
            parts.setdefault(part, {"labels": labels})[name] = probs
    return {
        "seeds": list(seeds),
        "runs": {name: [load_record(folder, name) for folder in folders] for name in names},
        "parts": {part: _part_table(task, found, num_resamples) for part, found in parts.items()},
    }


def _stacked(folders: Sequence[Path], name: str, held_out: bool) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """A method's probabilities (N, S, C) and labels (N, S) of every part, joined where two are reported.

    Seeds hold out different rows, as many of them; those at the same place are resampled together.
    """
    seeds = [load_arrays(folder, name) for folder in folders]
    parts = [part for part in seeds[0] if (part == "held_out") == held_out]
    found = {
        part: tuple(np.stack([seed[part][key] for seed in seeds], axis=1) for key in ("probs", "labels"))
        for part in parts
    }
    if len(parts) > 1:
        probs, labels = zip(*found.values(), strict=True)
        found["together"] = np.concatenate(probs), np.concatenate(labels)
    return found


def _part_table(task: str, found: Mapping[str, np.ndarray], num_resamples: int) -> dict[str, Any]:
    """Values with intervals; the same resamples serve all methods, so that their differences are paired."""
    labels, functions = found["labels"], metrics_of(task)
    methods = {name: probs for name, probs in found.items() if name != "labels"}
    observed = {name: _values_of(functions, probs, labels) for name, probs in methods.items()}
    resampled: dict[str, list[np.ndarray]] = {name: [] for name in methods}
    generator = np.random.default_rng(0)
    for _ in range(num_resamples):
        index = generator.integers(len(labels), size=len(labels))
        for name, probs in methods.items():
            resampled[name].append(_values_of(functions, probs[index], labels[index]).mean(-1))
    means = {name: values.mean(-1) for name, values in observed.items()}
    draws = {name: np.stack(values) for name, values in resampled.items()}
    rows: dict[str, Any] = {name: {} for name in methods}
    for name, (i, key) in itertools.product(methods, enumerate(functions)):
        row = _interval(means[name][i], draws[name][:, i]) | {"seeds": observed[name][i].tolist()}
        for reference in REFERENCES:
            if name not in REFERENCES[: REFERENCES.index(reference) + 1]:
                change = means[name][i] - means[reference][i], draws[name][:, i] - draws[reference][:, i]
                row[f"minus_{reference}"] = _interval(*change)
        rows[name][key] = row
    return {"rows": len(labels), "methods": rows}


def _interval(value: float, draws: np.ndarray) -> dict[str, Any]:
    """With the percentile interval that holds 95 % of the draws."""
    low, high = np.nanquantile(draws, [0.025, 0.975])
    return {"value": float(value), "low": float(low), "high": float(high)}


def _markdown(task: str, table: Mapping[str, Any]) -> str:
    if not table["runs"]:
        return f"## {task}\n\nNo seed has predictions of {', '.join(REFERENCES)}."
    blocks = [f"## {task}: seeds {', '.join(map(str, table['seeds']))}", _runs(table["runs"])]
    for part, found in table["parts"].items():
        blocks.append(f"### {task}, {part}: {found['rows']} rows")
        blocks.append(_values(found["methods"]))
        blocks += [_differences(found["methods"], reference) for reference in REFERENCES]
    return "\n\n".join(blocks)


def _runs(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    lines = []
    for name, records in runs.items():
        chosen = {
            key: ", ".join(_short(record["chosen"].get(key)) for record in records) for key in records[0]["chosen"]
        }
        seconds = [statistics.fmean(record[f"{step}_seconds"] for record in records) for step in ("fit", "predict")]
        text = "; ".join(f"{key} {value}" for key, value in chosen.items())
        lines.append([name, *(f"{value:.1f}" for value in seconds), text])
    return _grid(["method", "fit, CPU s", "predict, CPU s", "chosen"], lines)


def _values(methods: Mapping[str, Any]) -> str:
    keys = list(next(iter(methods.values())))
    lines = [
        [name, *(f"{row[key]['value']:.4f} [{row[key]['low']:.3f}, {row[key]['high']:.3f}]" for key in keys)]
        for name, row in methods.items()
    ]
    return _grid(["method", *keys], lines)


def _differences(methods: Mapping[str, Any], reference: str) -> str:
    """Differences whose interval leaves out 0 in bold."""
    lines = []
    for name, row in methods.items():
        found = [row[key].get(f"minus_{reference}") for key in COMPARED]
        if all(found):
            lines.append([name, *(_difference(one) for one in found)])
    return _grid([f"minus {reference}", *COMPARED], lines)


def _difference(one: Mapping[str, float]) -> str:
    text = f"{one['value']:+.4f} [{one['low']:+.4f}, {one['high']:+.4f}]"
    return text if one["low"] <= 0 <= one["high"] else f"**{text}**"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _grid(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *lines])
