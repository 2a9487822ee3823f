"""What an estimator's noise and its training step cost: python -m benchmarks.estimators {variance,step}

``variance``: of the ELBO's gradient on one batch of CoLA's sentences, relative to reparameterization, as the trace of
its covariance: half the mean squared distance of two gradients of the same batch, |g - g'|^2 / 2. The KL is a closed
form and adds no noise. rho's part is all that a model with frozen means trains.

``step``: seconds of a training step (forward, ELBO with its KL, backward, AdamW) on MiniLM, 32 x 64 tokens, relative to
fine-tuning all parameters deterministically, dropout included; and bayesian-torch's layers where it is installed.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from bayeformers import kl_divergence, to_bayesian
from bayeformers.nn import variational_tensors
from bayeformers.nn.estimators import ESTIMATORS
from benchmarks.harness import EMBEDDINGS, arguments, interleaved, median_ratio, minilm, report
from benchmarks.real_data.data import BATCH_SIZE, Batch, batches, load_training
from benchmarks.training_step import bayesian_torch_linear, training_step, without_dropout

BASELINE, NO_DROPOUT = "deterministic", "deterministic, no dropout"
PARTS = ("rho", "mean")
LAYERS = {"Linear": EMBEDDINGS, "Linear + Embedding": None}
RESAMPLES = 2000

Traces = dict[str, list[float]]
"""By part, one independent estimate of the covariance's trace per pair of gradients."""


# ------------------------------------------------------------------------------------------------------------- variance


def gradients(model: nn.Module, inputs: Batch, count: int) -> Iterator[dict[str, Tensor]]:
    """Gradients of the batch's mean NLL under fresh noise: of all rho and of all means, each as one vector."""
    tensors = list(variational_tensors(model.train()))
    leaves = [tensor.rho for tensor in tensors] + [tensor.loc for tensor in tensors]
    for _ in range(count):
        found = torch.autograd.grad(model(**inputs).loss, leaves, allow_unused=True, materialize_grads=True)
        halves = found[: len(tensors)], found[len(tensors) :]
        yield {part: torch.cat([g.flatten() for g in half]) for part, half in zip(PARTS, halves, strict=True)}


def traces(model: nn.Module, inputs: Batch, pairs: int) -> Traces:
    """|g - g'|^2 / 2 of each pair."""
    found: Traces = {part: [] for part in PARTS}
    drawn = gradients(model, inputs, 2 * pairs)
    for first, second in zip(drawn, drawn, strict=True):
        for part in PARTS:
            found[part].append(float((first[part] - second[part]).square().sum(dtype=torch.float64)) / 2)
    return found


def ratio_interval(values: list[float], baseline: list[float]) -> tuple[float, float, float]:
    """Ratio of the means with its 95 % percentile bootstrap over pairs."""
    rng = np.random.default_rng(0)
    above, below = (rng.choice(part, (RESAMPLES, len(part))).mean(1) for part in (values, baseline))
    low, high = np.quantile(above / below, [0.025, 0.975])
    return float(np.mean(values) / np.mean(baseline)), float(low), float(high)


def one_batch(folder: Path, data_dir: Path) -> Batch:
    """The first sentences of CoLA's shuffled training file."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows, _ = load_training("cola", data_dir, tokenizer, seed=0)
    return next(batches(rows[:BATCH_SIZE], tokenizer))


def traces_of_estimators(folder: Path, inputs: Batch, layers: str, delta: float, pairs: int) -> dict[str, Traces]:
    """Of each estimator, on the same model and batch."""
    found = {}
    for estimator in ESTIMATORS:
        torch.manual_seed(0)  # the fresh head of a model without one
        model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
        to_bayesian(model, delta, freeze=False, estimator=estimator, exclude_modules=LAYERS[layers])
        found[estimator] = traces(model, inputs, pairs)
    return found


def variance(args: argparse.Namespace) -> None:
    inputs, rows = one_batch(args.model, args.data_dir), []
    for layers in args.layers:
        for delta in args.delta:
            found = traces_of_estimators(args.model, inputs, layers, delta, args.pairs)
            for part in PARTS:
                for estimator, values in found.items():
                    ratio, low, high = ratio_interval(values[part], found["reparameterization"][part])
                    rows.append({
                        "layers": layers, "delta": delta, "gradient": part, "estimator": estimator,
                        "trace": f"{np.mean(values[part]):.3e}", "ratio": ratio, "95 % from": low, "to": high,
                    })  # fmt: skip
                    print(*rows[-1].values(), file=sys.stderr, flush=True)  # a run may be long
    report("Variance of the gradient / reparameterization's", rows, args.json, pairs=args.pairs)


# ----------------------------------------------------------------------------------------------------------------- step


def bayesian_step(estimator: str, freeze: bool, excluded: list[str] | None) -> Callable[[], None]:
    model = to_bayesian(minilm(), freeze=freeze, estimator=estimator, exclude_modules=excluded)
    return training_step(model, kl_divergence)


def steps(only: str) -> dict[str, Callable[[], None]]:
    """The steps that are compared, each of a model of its own: the deterministic ones, and others by name."""
    makers: dict[str, Callable[[], Callable[[], None]]] = {
        f"{layers}, {estimator}, means {'frozen' if freeze else 'trained'}": partial(
            bayesian_step, estimator, freeze, excluded
        )
        for layers, excluded in LAYERS.items()
        for estimator in ESTIMATORS
        for freeze in (True, False)
    }
    if find_spec("bayesian_torch") is not None:
        for kind in ("Reparameterization", "Flipout"):
            makers[f"bayesian-torch, Linear, {kind}, means trained"] = partial(bayesian_torch_linear, kind)
    deterministic = {BASELINE: training_step(minilm()), NO_DROPOUT: training_step(without_dropout(minilm()))}
    return deterministic | {name: make() for name, make in makers.items() if only in name}


def step(args: argparse.Namespace) -> None:
    clock = time.perf_counter if args.clock == "wall" else time.process_time
    times = interleaved(steps(args.only), args.repeats, warmup=1, clock=clock)
    rows = [
        {
            "step": name,
            "median seconds": statistics.median(values),
            "ratio": median_ratio(values, times[BASELINE]),
            "to no dropout": median_ratio(values, times[NO_DROPOUT]),
        }
        for name, values in times.items()
    ]
    report("Training step / deterministic training step", rows, args.json, repeats=args.repeats, clock=args.clock)


def parser() -> argparse.ArgumentParser:
    parent = arguments(__doc__.splitlines()[0], repeats=20)
    commands = parent.add_subparsers(dest="command", required=True)
    noise = commands.add_parser("variance", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    noise.add_argument("--model", type=Path, required=True, help="folder of a pretrained or fine-tuned encoder")
    noise.add_argument("--data_dir", type=Path, required=True, help="GLUE's folder, with CoLA in it")
    noise.add_argument(
        "--delta", type=float, nargs="+", default=[0.05, 0.2], help="initial scales relative to |weight|"
    )
    noise.add_argument("--layers", nargs="+", default=list(LAYERS), choices=list(LAYERS), help="what is Bayesian")
    noise.add_argument("--pairs", type=int, default=32, help="pairs of gradients of each estimator")
    noise.set_defaults(run=variance)
    speed = commands.add_parser("step", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    speed.add_argument(
        "--clock", choices=["wall", "cpu"], default="wall", help="cpu: the processor's, on a busy machine"
    )
    speed.add_argument("--only", default="", help="only the steps whose name contains this")
    speed.set_defaults(run=step)
    return parent


def main() -> None:
    args = parser().parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
