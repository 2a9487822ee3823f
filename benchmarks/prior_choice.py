"""Ways to choose the prior precision tau on one checkpoint: NLL, ECE and AURC on its reported rows, against MAP.

    python -m benchmarks.prior_choice --data_dir data --output_dir runs --task cola --seed 0 [--num_batches 60]

The checkpoint is a folder that `python -m benchmarks.real_data finetune` wrote. One KFAC fit and one pass over the
reported rows serve every rule: the logits' covariance is kept at each tau of the grid, and a tau between two of its
points takes the nearest in the logarithm. Differences to MAP are paired, with 95 % bootstrap intervals over rows.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayeformers import laplace, metrics
from bayeformers.laplace.data import Loader
from bayeformers.laplace.leverage import leverages, safe_precision, training_rows
from bayeformers.laplace.perturbed import MAX_ROWS, cautious_precision, perturbed_rows
from bayeformers.laplace.tuning import GRID, QUANTILES, holdout_nll, holdout_precision, row_nll
from bayeformers.linearized.captured import bare_tensors, covariance, linearize
from bayeformers.linearized.links import linearized_predictive

from .real_data.context import Context
from .real_data.data import PLACES

Probs = np.ndarray
"""(N, C)."""


def main() -> None:
    """Parse the command line; print the table and write it to the checkpoint's folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True, help="folder that holds glue, trec and clinc")
    parser.add_argument("--output_dir", type=Path, required=True, help="holds a folder per task and seed")
    parser.add_argument("--task", choices=sorted(PLACES), required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num_batches", type=int, help="random training batches of the fit; by default all")
    parser.add_argument("--max_rows", type=int, default=1000, help="held-out and reported rows, chosen at random")
    args = parser.parse_args()
    context = Context(args.task, args.seed, args.data_dir, args.output_dir)
    result = compare(context, args.num_batches, args.max_rows)
    print("\n".join(lines(result)))
    (context.folder / "prior_choice.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def compare(context: Context, num_batches: int | None, max_rows: int) -> dict[str, Any]:
    """Fit once, choose tau by every rule, and score each choice on the reported rows."""
    draw = np.random.default_rng(0)
    rows = [context.train[i] for i in draw.permutation(len(context.train))]
    chosen = rows if num_batches is None else rows[: 32 * num_batches]
    batches, start = context.batches(chosen), time.process_time()
    options: dict[str, Any] = {"num_data": len(context.train), "num_batches": len(batches), "progress": False}
    posterior = laplace.fit(context.model(), batches, prior_precision="marglik", **options)
    fitted = time.process_time()
    measured = training_rows(Loader(posterior.model, batches, None, None, False))
    found = leverages(posterior, measured, GRID)
    ruled = time.process_time()
    masked = on_masked(posterior, context, batches)
    done = time.process_time()
    held_out = Loader(posterior.model, context.batches(context.held_out[:max_rows]), None, None, False)
    taus = {
        "evidence": float(posterior.prior_precision),  # type: ignore[arg-type]
        "held-out labels": holdout_precision(holdout_nll(posterior, held_out.batches("held out"))),
        "leverage, 95 %": safe_precision(np.quantile(found, 0.95, axis=1)[:, None], GRID),
        "leverage, 99 %": safe_precision(np.quantile(found, 0.99, axis=1)[:, None], GRID),
        "leverage, largest": safe_precision(found, GRID),
        "masked rows, least NLL": GRID[int(masked.mean(axis=1).argmin())],
        "masked rows, one standard error": cautious_precision(masked, GRID),
    }
    taus["perturbed: the default"] = max(taus["masked rows, one standard error"], taus["evidence"], bound(found))
    reported = [row for part, rows in context.parts.items() if part != "held_out" for row in rows]
    reported = [reported[i] for i in draw.permutation(len(reported))[:max_rows]]
    probs, labels, scale = on_grid(posterior, context, reported)
    nll = {tau: metrics.negative_log_likelihood(each, labels) for tau, each in probs.items()}
    taus["best of the grid"] = min(nll, key=nll.__getitem__)
    cells = {"MAP": probs[np.inf], "temperature": scaled(context, posterior.model, probs[np.inf], max_rows)}
    cells |= {name: probs[min(GRID, key=lambda t: abs(np.log(t / tau)))] for name, tau in taus.items()}
    return {
        "task": context.task,
        "seed": context.seed,
        "fit_rows": len(chosen),
        "reported_rows": len(labels),
        "seconds": {"fit": fitted - start, "leverages": ruled - fitted, "masked": done - ruled},
        "accuracy": float((probs[np.inf].argmax(1) == labels).mean()),
        "logit_scale": scale,
        "rules": {name: score(each, cells["MAP"], labels) | {"tau": taus.get(name)} for name, each in cells.items()},
    }


def on_masked(posterior: Any, context: Context, batches: list[Any]) -> np.ndarray:
    """NLL of masked training rows at each tau of the grid, (n, rows)."""
    tokenizer = context.tokenizer
    mask = laplace.TokenMask(mask_token_id=tokenizer.mask_token_id, kept=tuple(tokenizer.all_special_ids))
    rows = training_rows(Loader(posterior.model, batches, None, None, False), num_rows=MAX_ROWS)
    return np.concatenate([row_nll(posterior, row, GRID).numpy() for row in perturbed_rows(rows, mask)], axis=1)


def bound(found: np.ndarray) -> float:
    """The least tau that the leverages of masked rows' rule allow."""
    return safe_precision(np.quantile(found, QUANTILES[True], axis=1)[:, None], GRID)


def on_grid(posterior: Any, context: Context, rows: list[Any]) -> tuple[dict[float, Probs], np.ndarray, float]:
    """Probabilities by tau, infinity for MAP; labels; the mean absolute logit."""
    blocks, outputs, matrices, labels = posterior.blocks_at(list(GRID)), [], [], []
    with posterior.recording_view(bare_tensors(blocks)) as view:
        for batch in Loader(posterior.model, context.batches(rows), None, None, False).batches("reported"):
            mean, stacked = linearize(
                view, batch.inputs, blocks, covariance, posterior.outputs_of, contrasts=True, of_softmax=True
            )
            outputs.append(mean)
            matrices.append(stacked)
            labels.append(batch.labels)
    mean, stacked = torch.cat(outputs), torch.cat(matrices, dim=1)
    found = {np.inf: mean.double().softmax(-1).numpy()}
    for tau, matrix in zip(GRID, stacked, strict=True):
        found[tau] = predicted(mean, matrix)
    return found, torch.cat([one for one in labels if one is not None]).numpy(), float(mean.abs().mean())


def predicted(mean: Tensor, matrix: Tensor) -> Probs:
    """Mean probabilities of the link."""
    predictive = linearized_predictive(mean, matrix, "single_label_classification")
    return np.asarray(predictive.mean_log_probs.double().exp().numpy())


def scaled(context: Context, model: Any, probs: Probs, max_rows: int) -> Probs:
    """MAP's probabilities at the temperature of least held-out NLL."""
    rows = context.held_out[:max_rows]
    with torch.no_grad():
        found = [(model(**batch).logits, batch["labels"]) for batch in context.batches(rows)]
    logits, labels = (torch.cat([one[i] for one in found]).double() for i in range(2))
    temperature = metrics.fit_temperature(logits.log_softmax(-1).numpy(), labels.long().numpy())
    raised = probs ** (1 / temperature)
    return np.asarray(raised / raised.sum(1, keepdims=True))


def score(probs: Probs, reference: Probs, labels: np.ndarray, num_resamples: int = 1000) -> dict[str, Any]:
    """NLL, ECE and AURC, and the paired difference of each to the reference with its interval."""
    functions = {
        "nll": metrics.negative_log_likelihood,
        "ece": metrics.expected_calibration_error,
        "aurc": lambda p, y: metrics.aurc(p.max(1), p.argmax(1) != y),
    }
    draw, found = np.random.default_rng(0), {}
    index = draw.integers(len(labels), size=(num_resamples, len(labels)))
    for name, function in functions.items():
        changes = [function(probs[i], labels[i]) - function(reference[i], labels[i]) for i in index]
        low, high = np.quantile(changes, [0.025, 0.975])
        found[name] = float(function(probs, labels))
        found[f"{name}_minus_map"] = [found[name] - float(function(reference, labels)), float(low), float(high)]
    return found


def lines(result: Mapping[str, Any]) -> list[str]:
    """A Markdown table."""
    found = [
        f"{result['task']}-{result['seed']}: {result['reported_rows']} rows, accuracy {result['accuracy']:.3f}",
        "| rule | tau | NLL | minus MAP | ECE | AURC |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in result["rules"].items():
        tau = "" if row["tau"] is None else f"{row['tau']:.3g}"
        change, low, high = row["nll_minus_map"]
        difference = f"{change:+.4f} [{low:+.4f}, {high:+.4f}]"
        found.append(f"| {name} | {tau} | {row['nll']:.4f} | {difference} | {row['ece']:.3f} | {row['aurc']:.4f} |")
    return found


if __name__ == "__main__":
    main()
