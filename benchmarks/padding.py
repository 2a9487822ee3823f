"""What reading examples by length saves: a Laplace fit and predictions on MRPC's sentence pairs, in file order and not.

    python -m benchmarks.padding --data_dir GLUE

Both runs are given the same dataset, whose examples are made one at a time and name no column. The fit of all Linear
layers is `fit_laplace`, beside the same pass over the batches of a plain loader, which are taken as they come; its
eigendecompositions, which do not grow with the data, are in both. Predictions are the linearised network's, beside a
Trainer whose evaluations keep the dataset's order. "real" is the share of the tokens that are no padding.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, SequentialSampler
from transformers import AutoTokenizer, DataCollatorWithPadding

from bayeformers import BayesianTrainer, BayesianTrainingArguments, laplace
from bayeformers.tasks.glue import GLUE_TASKS, read_split

from .harness import arguments, interleaved, median_ratio, minilm, report


class Pairs(Dataset[dict[str, Any]]):
    """Sentence pairs, tokenised when they are asked for."""

    def __init__(self, folder: Path, tokenizer: Any, count: int) -> None:
        task = GLUE_TASKS["mrpc"]
        split = read_split(task, folder / "MRPC", "train")
        self.rows = list(zip(*(split[name] for name in (*task.columns, "label")), strict=True))[:count]
        self.tokenizer = tokenizer

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        *texts, label = self.rows[index]
        return {**self.tokenizer(*texts, truncation=True, max_length=128), "labels": label}


class Counting:
    """A collator that counts tokens, real ones and all."""

    def __init__(self, tokenizer: Any) -> None:
        self.collate, self.real, self.all = DataCollatorWithPadding(tokenizer), 0, 0

    def __call__(self, examples: list[Any]) -> Any:
        batch = self.collate(examples)
        self.real += int(batch["attention_mask"].sum())
        self.all += batch["attention_mask"].numel()
        return batch


class InFileOrder(BayesianTrainer):
    """Evaluations that pay for the padding."""

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        return SequentialSampler(eval_dataset)


def main() -> None:
    """Print both tables."""
    parser = arguments(__doc__ or "", repeats=2)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--data_dir", type=Path, required=True, help="folder that holds MRPC")
    parser.add_argument("--fitted", type=int, default=3668, help="pairs of the fit")
    parser.add_argument("--predicted", type=int, default=408, help="pairs of the prediction")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(minilm().config.name_or_path)
    fitted, predicted = (Pairs(args.data_dir, tokenizer, count) for count in (args.fitted, args.predicted))
    collators = {order: Counting(tokenizer) for order in ("by length", "in file order")}
    options: dict[str, Any] = {"per_device_eval_batch_size": 32, "report_to": "none", "disable_tqdm": True}
    with tempfile.TemporaryDirectory() as folder:
        settings = BayesianTrainingArguments(folder, use_cpu=not torch.cuda.is_available(), **options)
        made = {"by length": BayesianTrainer, "in file order": InFileOrder}
        trainers = {
            order: made[order](minilm().eval(), settings, train_dataset=fitted, data_collator=collators[order])
            for order in made
        }
        loader = DataLoader(fitted, batch_size=32, collate_fn=collators["in file order"])
        model = trainers["in file order"].model
        fits: dict[str, Callable[[], object]] = {
            "in file order": lambda: laplace.fit(model, loader, curvature="kfac", progress=False),
            "by length": lambda: trainers["by length"].fit_laplace(curvature="kfac"),
        }
        _report("Fit of all Linear layers", fits, collators, args, warmup=0)
        trainers["by length"].fit_laplace(num_batches=1, num_data=args.fitted, curvature="kfac")
        trainers["in file order"].posterior = laplace.fit(
            model, loader, num_batches=1, num_data=args.fitted, curvature="kfac", progress=False
        )
        predictions: dict[str, Callable[[], object]] = {
            "in file order": lambda: trainers["in file order"].predict(predicted),
            "by length": lambda: trainers["by length"].predict(predicted),
        }
        _report("Linearised predictions", predictions, collators, args, warmup=1)


def _report(
    title: str,
    runs: dict[str, Callable[[], object]],
    collators: dict[str, Counting],
    args: argparse.Namespace,
    warmup: int,
) -> None:
    for collator in collators.values():
        collator.real = collator.all = 0
    times = interleaved(runs, args.repeats, warmup)
    base = times["in file order"]
    rows: list[dict[str, str | float]] = [
        {
            "order": name,
            "seconds": min(values),
            "ratio": median_ratio(values, base),
            "real": collators[name].real / collators[name].all,
        }
        for name, values in times.items()
    ]
    report(title, rows, args.json and args.json.with_suffix(f".{title.split()[0]}.json"))


if __name__ == "__main__":
    main()
