"""The command line: run what is missing, print the tables."""

from __future__ import annotations

import argparse
import functools
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import benchmarks.continual as package
from benchmarks.embedded_task import markdown

from .first import first_posterior, rank_correlations
from .second import METHODS, second_task
from .tasks import Tasks

KL_WEIGHTS = (1e-3, 1e-2, 1e-1, 1.0)
COLUMNS = {
    "B dev accuracy": 3,
    "B dev NLL": 3,
    "A in_domain MCC": 3,
    "A in_domain accuracy": 3,
    "A in_domain NLL": 3,
    "moved rms": 5,
    "moved / sigma": 3,
}
"""What is shown of a run, with its digits. A is CoLA, B is MRPC."""

_tasks, _posterior = functools.cache(Tasks), functools.cache(first_posterior)


def run(args: argparse.Namespace, seed: int, method: str, kl_weight: float) -> dict[str, Any]:
    """One row of one seed, or the file that an earlier call left."""
    file = args.output_dir / f"{seed}-{method}-{kl_weight:g}.json"
    if not file.exists():
        tasks = _tasks(args.checkpoints, args.data_dir, seed)
        source = method if method == "curvature" else "elbo"
        model, moved = second_task(tasks, _posterior(tasks, source), method, kl_weight)
        result = {"seed": seed, "method": method, "kl_weight": kl_weight, **tasks.scores(model), **moved}
        file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(f"{file.name}: done", flush=True)
    return dict(json.loads(file.read_text(encoding="utf-8")))


def before(args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """CoLA's checkpoint, before MRPC, whose labels its head knows nothing of."""
    file = args.output_dir / f"{seed}-before.json"
    if not file.exists():
        tasks = _tasks(args.checkpoints, args.data_dir, seed)
        scores = {name: value for name, value in tasks.scores(tasks.top()).items() if name.startswith("A")}
        scores |= rank_correlations(tasks, _posterior(tasks, "elbo"))
        result = {"seed": seed, "method": "before", "temperature": tasks.temperature, **scores}
        file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return dict(json.loads(file.read_text(encoding="utf-8")))


def criterion(result: Mapping[str, Any]) -> float:
    return float(result["A held_out NLL"] + result["B held_out NLL"])


def line(name: str, results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Means over the runs; a dash for what the checkpoint itself has not."""
    means = {c: [one[c] for one in results if c in one] for c in COLUMNS}
    return [name, *(f"{statistics.fmean(values):.{COLUMNS[c]}f}" if values else "-" for c, values in means.items())]


def _list(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    return lambda text: [kind(part) for part in text.split(",")]


def main() -> None:
    """Run what is missing, then print the table of the chosen weights and the first seed's of all weights."""
    parser = argparse.ArgumentParser(description=package.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", type=Path, required=True, help="holds cola-SEED of every seed")
    parser.add_argument("--data_dir", type=Path, required=True, help="folder that holds CoLA and MRPC")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--seeds", type=_list(int), default=[0, 1, 2])
    parser.add_argument("--methods", type=_list(str), default=list(METHODS))
    parser.add_argument("--kl_weights", type=_list(float), default=KL_WEIGHTS)
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    chosen, every = [line("before MRPC", [before(args, seed) for seed in args.seeds])], []
    for method in args.methods:
        weights = (0.0,) if method == "plain" else args.kl_weights
        found = [run(args, args.seeds[0], method, weight) for weight in weights]
        every += [line(f"{method}, {one['kl_weight']:g}", [one]) for one in found]
        best = min(found, key=criterion)
        others = [run(args, seed, method, best["kl_weight"]) for seed in args.seeds[1:]]
        chosen.append(line(f"{method}, {best['kl_weight']:g}", [best, *others]))
    print("\n".join([markdown(["", *COLUMNS], chosen), "", markdown(["", *COLUMNS], every)]))


if __name__ == "__main__":
    main()
