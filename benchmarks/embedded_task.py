"""The embedded acceptability task over several seeds: paired differences between the methods, with standard errors.

    python -m benchmarks.embedded_task --seeds 100-109 --output_dir outputs/embedded_task --processes 2

Each seed is a run of `python -m examples.bert_glue` with its defaults: other sentences, another initialisation, other
weight draws. A seed whose results.json exists is not run again. Flags after `--` go to the example.

The Bayesian model trains on from the deterministic one. What more epochs alone would have done shows a second run per
seed: the deterministic model, trained on without noise for as many epochs at the same learning rate.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

POINT, TEMPERATURE, POSTERIOR = "deterministic", "deterministic + temperature", "Bayesian"
LONGER, LONGER_TEMPERATURE = "trained on", "trained on + temperature"
LOWER_IS_BETTER = {"nll": True, "ece": True, "aurc": True, "accuracy": False}
TRUE_ENTROPY = -0.25 * math.log(0.25) - 0.75 * math.log(0.75)  # H(1/4) = 0.562 nat, of the noisy labels

Results = dict[str, Any]


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and its standard error, sample standard deviation / sqrt(number of seeds)."""

    mean: float
    error: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        return cls(statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values)))

    def __str__(self) -> str:
        return f"{self.mean:.4f} ± {self.error:.4f}"

    def verdict(self, lower_is_better: bool) -> str:
        """Of a difference: a win or a loss beyond two standard errors, else a tie."""
        gain = -self.mean if lower_is_better else self.mean
        return "tie" if abs(gain) <= 2 * self.error else "win" if gain > 0 else "loss"


def parse_seeds(text: str) -> list[int]:
    """Numbers and ranges with both ends.

    >>> parse_seeds("3,100-102")
    [3, 100, 101, 102]
    """
    ends = [part.split("-") for part in text.split(",")]
    try:
        seeds = [seed for end in ends for seed in range(int(end[0]), int(end[-1]) + 1)]
    except ValueError:
        seeds = []
    if len(set(seeds)) < 2:
        raise ValueError(f"`seeds` must name two seeds or more, such as 100-109 or 1,5,7, got {text!r}.")
    return seeds


def run_seed(seed: int, folder: Path, flags: Sequence[str], threads: int) -> Results:
    """The example's results for one seed, with those of the deterministic model trained on beside its methods."""
    results = run_example(seed, folder, flags, threads)
    training = results["arguments"]["training"]
    longer = {
        "model_name_or_path": folder / "deterministic",
        "num_train_epochs": training["bayesian_epochs"],
        "learning_rate": training["bayesian_learning_rate"],
        "bayesian_epochs": 0,
        "num_eval_samples": 1,
    }
    longer_flags = [*flags, *(str(part) for name, flag in longer.items() for part in (f"--{name}", flag))]
    methods = run_example(seed, folder / "trained_on", longer_flags, threads)["methods"]
    results["methods"] |= {LONGER: methods[POINT], LONGER_TEMPERATURE: methods[TEMPERATURE]}
    return results


def run_example(seed: int, folder: Path, flags: Sequence[str], threads: int) -> Results:
    """The results.json of one run, which is made unless it is there."""
    file = folder / "results.json"
    if not file.exists():
        command = [sys.executable, "-m", "examples.bert_glue", "--seed", str(seed), "--output_dir", str(folder)]
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "log.txt").open("w", encoding="utf-8") as log:
            environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
            subprocess.run([*command, *flags], stdout=log, stderr=log, env=environment, check=True)
        print(f"{folder}: done", file=sys.stderr, flush=True)
    results: Results = json.loads(file.read_text(encoding="utf-8"))
    return results


def value(results: Results, method: str, group: str, name: str) -> float:
    """One number of a run: a metric or an entropy of a group of inputs, or an AUROC (group "ood_auroc")."""
    report = results["methods"][method]
    return float((report[group] if group == "ood_auroc" else report["groups"][group])[name])


def score_rows(runs: Sequence[Results], group: str, references: Sequence[str]) -> list[list[str]]:
    """Per metric: each method's mean, the Bayesian model's paired difference from each reference, and its verdict."""
    rows = []
    for metric, lower in LOWER_IS_BETTER.items():
        of = {m: [value(run, m, group, metric) for run in runs] for m in (*references, POSTERIOR)}
        row = [metric, *(f"{statistics.fmean(values):.4f}" for values in of.values())]
        for reference in references:
            change = Estimate.of([a - b for a, b in zip(of[POSTERIOR], of[reference], strict=True)])
            row += [str(change), change.verdict(lower)]
        rows.append(row)
    return rows


def score_table(runs: Sequence[Results], group: str, references: Sequence[str], corner: str) -> str:
    """The rows of `score_rows` under their header."""
    differences = [text for reference in references for text in (f"minus {reference.split(' + ')[-1]}", "")]
    return markdown([corner, *references, POSTERIOR, *differences], score_rows(runs, group, references))


def uncertainty_rows(runs: Sequence[Results]) -> list[list[str]]:
    """What the task knows the answer to: aleatoric entropy, where the epistemic part belongs, unfamiliar inputs."""

    def estimate(method: str, group: str, name: str) -> Estimate:
        return Estimate.of([value(run, method, group, name) for run in runs])

    def compare(text: str, first: tuple[str, str, str], second: tuple[str, str, str]) -> list[str]:
        change = Estimate.of([value(run, *first) - value(run, *second) for run in runs])
        errors = f"{change.mean / change.error:+.1f} s.e., {change.verdict(False)}" if change.error else ""
        return [text, str(estimate(*first)), str(estimate(*second)), str(change), errors]

    aleatoric = estimate(POSTERIOR, "noisy", "aleatoric")
    off = f"{aleatoric.mean - TRUE_ENTROPY:+.4f}"
    within = "within 0.1 nat" if abs(aleatoric.mean - TRUE_ENTROPY) <= 0.1 else "not within 0.1 nat"
    mutual, probability = (POSTERIOR, "ood_auroc", "epistemic"), (POINT, "ood_auroc", "max_probability")
    return [
        ["aleatoric entropy on noisy inputs, against the truth", str(aleatoric), f"{TRUE_ENTROPY:.4f}", off, within],
        compare(
            "mutual information on shifted, against noisy inputs",
            (POSTERIOR, "shifted", "epistemic"),
            (POSTERIOR, "noisy", "epistemic"),
        ),
        compare("AUROC of telling shifted inputs: mutual information, against max-probability", mutual, probability),
    ]


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=parse_seeds, required=True, help="such as 100-109 or 1,5,7")
    parser.add_argument("--output_dir", type=Path, required=True, help="a folder per seed is made in it")
    parser.add_argument("--processes", type=int, default=1, help="seeds that run at the same time")
    parser.add_argument("flags", nargs="*", help="of the example, after --")
    args = parser.parse_args(argv)
    threads = max(1, (os.cpu_count() or 1) // args.processes)
    with ThreadPoolExecutor(args.processes) as pool:
        jobs = [pool.submit(run_seed, s, args.output_dir / f"seed{s}", args.flags, threads) for s in args.seeds]
        runs = [job.result() for job in jobs]
    print(f"{len(runs)} seeds; mean ± standard error of paired differences\n")
    for references in ((POINT, TEMPERATURE), (LONGER, LONGER_TEMPERATURE)):
        for group in ("in-domain", "clean", "noisy", "shifted"):
            print(score_table(runs, group, references, f"{group} inputs"), end="\n\n")
    print(markdown(["uncertainty", "first", "second", "difference", ""], uncertainty_rows(runs)), end="\n\n")
    seconds = Estimate.of([sum(run["seconds"].values()) for run in runs])
    print(f"seconds per run: {seconds.mean:.0f}")


if __name__ == "__main__":
    main()
