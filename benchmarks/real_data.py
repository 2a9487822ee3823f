"""Real GLUE tasks with a real encoder: what a posterior adds to a fine-tuned model, with bootstrap intervals.

    python -m benchmarks.real_data finetune --model DIR --data_dir GLUE --task cola --seed 0 --output_dir OUT
    python -m benchmarks.real_data evaluate --data_dir GLUE --task cola --seed 0 --output_dir OUT

`finetune` trains on nine tenths of the training file and keeps the last tenth (after a seeded shuffle) held out;
`evaluate` chooses on that tenth only and reports on the development file.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

from bayeformers import VariationalPosterior, calibrate_delta, metrics, to_bayesian
from bayeformers.posteriors import PointPosterior
from bayeformers.tasks.glue import GLUE_TASKS, read_split

FOLDERS = {"cola": "CoLA", "mrpc": "MRPC", "sst2": "SST-2"}
EPOCHS = {"cola": 4, "mrpc": 4, "sst2": 2}
LIMIT = {"sst2": 20_000}


def encode(split: Any, task: Any, tokenizer: Any) -> list[dict[str, Any]]:
    """Tokenised rows with labels."""
    texts = [list(split[column]) for column in task.columns]
    encoded = tokenizer(*texts, truncation=True, max_length=128)
    return [
        {"input_ids": encoded["input_ids"][i], "attention_mask": encoded["attention_mask"][i], "labels": label}
        | ({"token_type_ids": encoded["token_type_ids"][i]} if "token_type_ids" in encoded else {})
        for i, label in enumerate(split["label"])
    ]


def load_training(task_name: str, data_dir: str, tokenizer: Any, seed: int) -> tuple[list[Any], list[Any]]:
    """Nine tenths to fit, one tenth held out; the shuffle depends on the seed alone."""
    task = GLUE_TASKS[task_name]
    rows = encode(read_split(task, Path(data_dir) / FOLDERS[task_name], "train"), task, tokenizer)
    rows = rows[: LIMIT.get(task_name)]
    order = np.random.default_rng(seed).permutation(len(rows))
    held = len(rows) // 10
    return [rows[i] for i in order[held:]], [rows[i] for i in order[:held]]


def finetune(args: argparse.Namespace) -> None:
    """Ordinary fine-tuning, the checkpoint that everything else starts from."""
    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    train, _ = load_training(args.task, args.data_dir, tokenizer, args.seed)
    model = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=2)
    folder = Path(args.output_dir) / f"{args.task}-{args.seed}"
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=32,
        learning_rate=5e-5,
        num_train_epochs=EPOCHS[args.task],
        train_sampling_strategy="group_by_length",
        save_strategy="no",
        report_to=[],
        seed=args.seed,
        use_cpu=True,
    )
    trainer = Trainer(model, arguments, train_dataset=train, data_collator=DataCollatorWithPadding(tokenizer))
    print(trainer.train().metrics)
    trainer.save_model(str(folder))
    tokenizer.save_pretrained(str(folder))


def score_table(methods: dict[str, np.ndarray], labels: np.ndarray, task: Any) -> dict[str, dict[str, Any]]:
    """Each method's metrics with bootstrap intervals, and its paired differences from the first method."""
    reference = next(iter(methods))
    functions = {
        "nll": metrics.negative_log_likelihood,
        "ece": metrics.expected_calibration_error,
        "brier": metrics.brier_score,
        "aurc": lambda p, y: metrics.aurc(p.max(-1), p.argmax(-1) != y),
        "error_auroc": lambda p, y: metrics.error_auroc(p.max(-1), p.argmax(-1) != y),
        "accuracy": metrics.accuracy,
        **{f.__name__: (lambda p, y, f=f: f(p.argmax(-1), y)) for f in task.metrics if f.__name__ != "accuracy"},
    }
    table: dict[str, dict[str, Any]] = {}
    for name, probs in methods.items():
        table[name] = {}
        for key, function in functions.items():
            interval = metrics.bootstrap_ci(function, probs, labels, num_resamples=500)
            row = {"value": interval.estimate, "low": interval.low, "high": interval.high}
            if name != reference:
                change = metrics.paired_bootstrap(
                    function, (probs, labels), (methods[reference], labels), num_resamples=500
                )
                row |= {"difference": change.estimate, "difference_low": change.low, "difference_high": change.high}
            table[name][key] = row
    return table


def batches(rows: list[Any], tokenizer: Any, size: int = 32) -> tuple[list[dict[str, torch.Tensor]], np.ndarray]:
    """Padded batches of rows sorted by length, with labels inside, and the order of the rows in them."""
    order = np.argsort([len(row["input_ids"]) for row in rows], kind="stable")
    collate = DataCollatorWithPadding(tokenizer)
    return [dict(collate([rows[i] for i in order[j : j + size]])) for j in range(0, len(rows), size)], order


def probabilities(posterior: Any, rows: list[Any], tokenizer: Any, **options: Any) -> np.ndarray:
    """Averaged probabilities (N, C) in the order of ``rows``."""
    batched, order = batches(rows, tokenizer)
    probs = torch.cat([posterior.predict(batch, **options).mean_log_probs.double().exp() for batch in batched]).numpy()
    return probs[np.argsort(order)]


def evaluate(args: argparse.Namespace) -> None:
    """The recipe of the documentation: delta chosen on the held-out tenth (at most 1,000 rows), nothing else fitted."""
    folder = Path(args.output_dir) / f"{args.task}-{args.seed}"
    task = GLUE_TASKS[args.task]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    _, held = load_training(args.task, args.data_dir, tokenizer, args.seed)
    data = Path(args.data_dir) / FOLDERS[args.task]
    parts = {"in_domain": encode(read_split(task, data, "validation"), task, tokenizer)}
    if task.tsv.shifted:
        parts["out_of_domain"] = encode(read_split(task, data, "shifted"), task, tokenizer)
        parts["together"] = parts["in_domain"] + parts["out_of_domain"]
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    point = PointPosterior(model)
    held_log_probs = np.log(probabilities(point, held, tokenizer))
    temperature = metrics.fit_temperature(held_log_probs, np.array([row["labels"] for row in held]))
    mean = {name: probabilities(point, rows, tokenizer) for name, rows in parts.items()}
    methods = {name: {"map": probs, "temperature": tempered(probs, temperature)} for name, probs in mean.items()}
    options = {"method": args.method, "num_samples": args.num_samples}
    delta = calibrate_delta(model, batches(held[:1000], tokenizer, 32)[0], **options)
    posterior = VariationalPosterior(to_bayesian(model, delta))
    for name in ("in_domain", "out_of_domain"):
        if name in parts:
            methods[name]["bayesian"] = probabilities(posterior, parts[name], tokenizer, **options)
    if "together" in parts:
        both = [methods[name]["bayesian"] for name in ("in_domain", "out_of_domain")]
        methods["together"]["bayesian"] = np.concatenate(both)
    result = {
        "task": args.task, "seed": args.seed, "method": args.method, "temperature": temperature, "delta": delta,
        "parts": {
            name: score_table(found, np.array([row["labels"] for row in parts[name]]), task)
            for name, found in methods.items()
        },
    }  # fmt: skip
    (folder / f"results-{args.method}.json").write_text(json.dumps(result, indent=1))
    for name, table in result["parts"].items():
        print(f"{args.task} seed {args.seed} {name}: temperature {temperature:.2f}, delta {delta:.3f}")
        for method, row in table.items():
            print(f"  {method:12s}", "  ".join(f"{key} {value['value']:.4f}" for key, value in row.items()))


def tempered(probs: np.ndarray, temperature: float) -> np.ndarray:
    """softmax(log p / T)."""
    logits = np.log(probs) / temperature
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def main() -> None:
    """Parse the command line and run one step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["finetune", "evaluate"])
    parser.add_argument("--model", help="folder or hub name of a pretrained encoder")
    parser.add_argument("--data_dir", required=True, help="folder that holds CoLA, MRPC, SST-2")
    parser.add_argument("--task", choices=sorted(FOLDERS), required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--method", choices=["glm", "sample"], default="glm", help="of the Bayesian prediction")
    parser.add_argument("--num_samples", type=int, default=16, help="draws of --method sample")
    parser.add_argument("--output_dir", required=True)
    args = parser.parse_args()
    {"finetune": finetune, "evaluate": evaluate}[args.step](args)


if __name__ == "__main__":
    main()
