"""A training step under torch.compile, relative to the eager one: python -m benchmarks.compiled

BERT of MiniLM's width with two layers and random weights, 32 x 64 tokens, AdamW: forward, loss, backward, optimizer
step, by Inductor, without dropout. A Bayesian step's loss is the ELBO; its KL is computed outside of the graph, or
inside of it. Processor time of warm graphs; "random": noise by torch's own generator instead of Inductor's.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from bayeformers import kl_divergence, to_bayesian
from benchmarks.harness import BATCH_SIZE, EMBEDDINGS, LENGTH, arguments, interleaved, median_ratio, report
from benchmarks.training_step import NUM_TRAINING_ITEMS, optimizer

Step = Callable[[], None]


def network(width: int) -> nn.Module:
    """A classifier whose loss looks nothing up at its first call, which would be a graph of its own."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=8000, hidden_size=width, num_hidden_layers=2, num_attention_heads=max(width // 32, 1),
        intermediate_size=4 * width, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        problem_type="single_label_classification",
    )  # fmt: skip
    return BertForSequenceClassification(config).train()


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 8000, (BATCH_SIZE, LENGTH), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0] % 2}


def step(model: nn.Module, kl: str = "", **compiling: object) -> Step:
    """One step on the same batch; ``kl``: "inside" or "outside" of what is compiled; ``compiling``: None is eager."""
    adamw, inputs = optimizer(model), batch()
    run = model
    loss: Callable[[], Tensor] = lambda: run(**inputs).loss  # noqa: E731
    if kl == "inside":
        loss = torch.compile(lambda: model(**inputs).loss + kl_divergence(model) / NUM_TRAINING_ITEMS, **compiling)
    elif compiling:
        run = torch.compile(model, **compiling)
    outside = kl == "outside"

    def run_once() -> None:
        value = loss() + kl_divergence(model) / NUM_TRAINING_ITEMS if outside else loss()
        value.backward()
        adamw.step()
        adamw.zero_grad()

    return run_once


def variants(width: int, backend: str) -> dict[str, Step]:
    def bayesian() -> nn.Module:
        return to_bayesian(network(width), delta=0.05, freeze=False, exclude_modules=EMBEDDINGS).train()

    whole = {"backend": backend, "fullgraph": True}
    steps = {
        "plain, eager": step(network(width)),
        "plain, compiled": step(network(width), **whole),
        "Bayesian, eager": step(bayesian(), "outside"),
        "Bayesian, compiled": step(bayesian(), "outside", **whole),
        "Bayesian, compiled with its KL": step(bayesian(), "inside", **whole),
    }
    if backend == "inductor":
        random = {**whole, "options": {"fallback_random": True}}
        steps["Bayesian, compiled, random"] = step(bayesian(), "outside", **random)
    return steps


def main() -> None:
    parser: argparse.ArgumentParser = arguments(__doc__.splitlines()[0], repeats=10)
    parser.add_argument("--width", type=int, default=384, help="hidden size of the network")
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    args = parser.parse_args()
    times = interleaved(variants(args.width, args.backend), args.repeats, clock=time.process_time)
    rows = [
        {
            "step": name,
            "median seconds": statistics.median(values),
            "to eager": median_ratio(values, times[f"{name.split(',')[0]}, eager"]),
            "to plain eager": median_ratio(values, times["plain, eager"]),
        }
        for name, values in times.items()
    ]
    report("Compiled training step / eager, processor time", rows, args.json, repeats=args.repeats, width=args.width)


if __name__ == "__main__":
    main()
