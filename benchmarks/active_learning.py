"""Label efficiency: what each strategy of `acquire` is worth, over seeds, on digits and on TREC's questions.

    python -m benchmarks.active_learning --data_dir data --encoder MINILM --output_dir runs [--seeds 0-9]
    python -m benchmarks.active_learning --output_dir runs --page docs/results/active_learning.md

Each run is one strategy and seed of `examples.active_learning`; one whose file exists is not run again. Differences to
random labels are paired over seeds, with 95 % intervals of Student's t.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from pathlib import Path

from examples.active_learning import ActiveArguments, area, label_counts, learn, load_rows

from .embedded_task import parse_seeds

STRATEGIES = ("random", "entropy", "bald", "batchbald", "epig")
TASKS = {
    "embedded": {"num_components": 32, "pool_size": 1200},
    "trec": {"num_components": 64, "pool_size": 2000},
}


def main() -> None:
    """Run what is missing; then write the page, if it is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", help="folder that holds trec; without it nothing is run")
    parser.add_argument("--encoder", help="folder or name of all-MiniLM-L6-v2")
    parser.add_argument("--output_dir", type=Path, required=True, help="a file per task, strategy and seed")
    parser.add_argument("--seeds", default="0-9")
    args = parser.parse_args()
    logging.getLogger("bayeformers").setLevel(logging.ERROR)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for seed in parse_seeds(args.seeds):
        for task in TASKS:
            if args.data_dir is not None:
                run(task, seed, Path(args.data_dir) / "trec", args.encoder, args.output_dir)


def run(task: str, seed: int, trec: Path, encoder: str, folder: Path) -> None:
    """All strategies of a task and seed that have no file yet."""
    missing = [name for name in STRATEGIES if not path_of(folder, task, name, seed).exists()]
    if not missing:
        return
    options = {"data_dir": str(trec), "model_name_or_path": encoder} if task == "trec" else {}
    settings = ActiveArguments(task=task, **TASKS[task], **options)  # type: ignore[arg-type]
    rows = load_rows(settings, seed)
    for strategy in missing:
        start = time.process_time()
        accuracies, counts = learn(rows, strategy, seed, settings), label_counts(settings)
        result = {"num_labels": counts, "accuracy": accuracies, "seconds": round(time.process_time() - start, 2)}
        path = path_of(folder, task, strategy, seed)
        path.with_suffix(".part").write_text(json.dumps(result) + "\n", encoding="utf-8")
        path.with_suffix(".part").replace(path)
        print(f"{task} {seed} {strategy}: area {area(counts, accuracies):.4f}, {result['seconds']} s", flush=True)


def path_of(folder: Path, task: str, strategy: str, seed: int) -> Path:
    """Where a run's curve is."""
    return folder / f"{task}-{strategy}-{seed}.json"


if __name__ == "__main__":
    main()
