"""Label efficiency: what each strategy of `acquire` is worth, over seeds, on digits and on TREC's questions.

    python -m benchmarks.active_learning --data_dir data --encoder MINILM --output_dir runs [--seeds 0-9]
    python -m benchmarks.active_learning --output_dir runs --page docs/results/active_learning.md   # tables anew

``--query_size 2 --strategies random bald`` asks for two labels a round; what its page says has marks of its own.

Each run is one strategy and seed of `examples.active_learning`; one whose file exists is not run again. Differences to
random labels are paired over seeds, with 95 % intervals of Student's t.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from examples.active_learning import ActiveArguments, area, label_counts, learn, load_rows

from .embedded_task import parse_seeds

MARKS = ("<!-- {} a round -->", "<!-- end of {} a round -->")
"""What stands between these in the page is written anew, by labels a round."""
Curves = dict[str, dict[int, list[float]]]
"""By strategy and seed: test accuracies after every round."""

STRATEGIES = ("random", "entropy", "bald", "batchbald", "epig")
TASKS = {
    "embedded": {"num_components": 32, "pool_size": 1200},
    "trec": {"num_components": 64, "pool_size": 2000, "num_labels": 170},
}


def main() -> None:
    """Run what is missing; then print the tables, and write them to the page, if it is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", help="folder that holds trec; without it nothing is run")
    parser.add_argument("--encoder", help="folder or name of all-MiniLM-L6-v2")
    parser.add_argument("--output_dir", type=Path, required=True, help="a file per task, strategy and seed")
    parser.add_argument("--seeds", default="0-9")
    parser.add_argument("--tasks", nargs="+", choices=sorted(TASKS), default=sorted(TASKS))
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=list(STRATEGIES))
    parser.add_argument("--query_size", type=int, default=10, help="labels a round")
    parser.add_argument("--page", type=Path, help="whose tables are written anew")
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    seeds = parse_seeds(args.seeds)
    for seed in seeds if args.data_dir is not None else []:
        for task in args.tasks:
            run(task, seed, args)
    text = "\n\n".join(table(task, *read(args.output_dir, task, seeds, args.query_size)) for task in args.tasks)
    print(text)
    if args.page is not None:
        first, last = (mark.format(args.query_size) for mark in MARKS)
        before, _, rest = args.page.read_text(encoding="utf-8").partition(first)
        after = rest.partition(last)[2]
        args.page.write_text(f"{before}{first}\n\n{text}\n\n{last}{after}", encoding="utf-8")


def run(task: str, seed: int, args: argparse.Namespace) -> None:
    """The strategies of a task and seed that have no file yet."""
    paths = {name: path_of(args.output_dir, task, name, seed, args.query_size) for name in args.strategies}
    missing = [name for name, path in paths.items() if not path.exists()]
    if not missing:
        return
    options = {"data_dir": f"{args.data_dir}/trec", "model_name_or_path": args.encoder} if task == "trec" else {}
    settings = ActiveArguments(task=task, query_size=args.query_size, **TASKS[task], **options)  # type: ignore[arg-type]
    rows = load_rows(settings, seed)
    for strategy in missing:
        start = time.process_time()
        accuracies, counts = learn(rows, strategy, seed, settings), label_counts(settings)
        result = {"num_labels": counts, "accuracy": accuracies, "seconds": round(time.process_time() - start, 2)}
        path = paths[strategy]
        path.with_suffix(".part").write_text(json.dumps(result) + "\n", encoding="utf-8")
        path.with_suffix(".part").replace(path)
        print(f"{task} {seed} {strategy}: area {area(counts, accuracies):.4f}, {result['seconds']} s", flush=True)


def path_of(folder: Path, task: str, strategy: str, seed: int, query_size: int = 10) -> Path:
    """Where a run's curve is."""
    return folder / f"{task}{'' if query_size == 10 else f'-by-{query_size}'}-{strategy}-{seed}.json"


# ------------------------------------------------------------------------------------------------------------- tables


def read(folder: Path, task: str, seeds: list[int], query_size: int = 10) -> tuple[list[int], Curves]:
    """Numbers of labels, and the curves that there are."""
    counts: list[int] = []
    found: Curves = {name: {} for name in STRATEGIES}
    for name in STRATEGIES:
        for seed in seeds:
            path = path_of(folder, task, name, seed, query_size)
            if path.exists():
                result = json.loads(path.read_text(encoding="utf-8"))
                counts, found[name][seed] = result["num_labels"], result["accuracy"]
    return counts, {name: own for name, own in found.items() if own}


def table(task: str, counts: list[int], curves: Curves) -> str:
    """Accuracy on the way, area under the curve, the end, and labels per label of random's, with 95 % intervals."""
    shown = counts[2 :: max(1, (len(counts) - 2) // 3)]
    others = [name for name in ("random", "entropy") if name in curves]
    header = ["strategy", "seeds", *(f"{n} labels" for n in shown), "area", *(f"less {name}'s" for name in others)]
    header += [f"at {counts[-1]} less random's", "labels"]
    lines = [f"| {' | '.join(header)} |", f"|{' --- |' * len(header)}"]
    ends = {name: {seed: curve[-1] for seed, curve in own.items()} for name, own in curves.items()}
    areas = {name: {seed: area(counts, curve) for seed, curve in own.items()} for name, own in curves.items()}
    for name, own in curves.items():
        means = np.mean(list(own.values()), axis=0)
        cells = [str(len(own)), *(f"{means[counts.index(n)]:.3f}" for n in shown)]
        cells += [f"{np.mean(list(areas[name].values())):.4f}"]
        cells += ["" if name == other else difference(areas[name], areas[other]) for other in others]
        cells += ["" if name == "random" else difference(ends[name], ends["random"])]
        cells += ["1" if name == "random" else share_of_labels(counts, own, curves["random"])]
        lines.append(f"| {' | '.join([name, *cells])} |")
    return "\n".join([f"**{task}**", "", *lines])


def difference(first: Mapping[int, float], second: Mapping[int, float]) -> str:
    """Paired over the seeds that both have."""
    return paired(np.array([first[seed] - second[seed] for seed in first if seed in second]))


def paired(differences: np.ndarray) -> str:
    """Mean and 95 % interval of Student's t; of one seed no interval."""
    if len(differences) < 2:
        return f"{differences.mean():+.4f}"
    half = stats.t.ppf(0.975, len(differences) - 1) * differences.std(ddof=1) / np.sqrt(len(differences))
    mean = differences.mean()
    return f"{mean:+.4f} [{mean - half:+.4f}, {mean + half:+.4f}]"


def share_of_labels(
    counts: list[int], curves: Mapping[int, Any], randoms: Mapping[int, Any], num_resamples: int = 1000
) -> str:
    """Labels for the largest accuracy of random's mean curve, over random's; with a bootstrap interval over seeds."""
    draw, seeds = np.random.default_rng(0), [seed for seed in curves if seed in randoms]
    own, other = (np.array([which[seed] for seed in seeds]) for which in (curves, randoms))

    def share(rows: np.ndarray) -> float:
        target = other[rows].mean(0)
        return labels_for(counts, own[rows].mean(0), target.max()) / labels_for(counts, target, target.max())

    resampled = [share(draw.integers(len(seeds), size=len(seeds))) for _ in range(num_resamples)]
    values = [share(np.arange(len(seeds))), *np.quantile(resampled, [0.025, 0.975], method="nearest")]
    told = [f"{value:.2f}" if np.isfinite(value) else "never" for value in values]
    return f"{told[0]} [{told[1]}, {told[2]}]"


def labels_for(counts: list[int], accuracies: np.ndarray, target: float) -> float:
    """The first number of labels at which a curve, linear between rounds, has an accuracy; inf: it has not."""
    reached = np.flatnonzero(accuracies >= target - 1e-12)
    if not len(reached):
        return float("inf")
    i = int(reached[0])
    if i == 0:
        return float(counts[0])
    part = (target - accuracies[i - 1]) / (accuracies[i] - accuracies[i - 1])
    return float(counts[i - 1] + part * (counts[i] - counts[i - 1]))


if __name__ == "__main__":
    logging.getLogger("bayeformers").setLevel(logging.ERROR)  # a fit says its prior in every round
    main()
