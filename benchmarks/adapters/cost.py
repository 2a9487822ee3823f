"""What a Bayesian LoRA step costs, relative to a plain LoRA step: python -m benchmarks.adapters.cost [--decoder FOLDER]

Forward, loss (a Bayesian step's with its KL), backward and AdamW, in processor seconds; one interleaved run. Memory is
the peak of a process of its own, as in `benchmarks.memory`. MiniLM, or with --decoder a language model with a sequence
head; r = 8 on queries and values, no dropout.
"""

from __future__ import annotations

import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from bayeformers import kl_divergence, to_bayesian
from bayeformers.adapters import to_blob, to_scalabl
from benchmarks.harness import arguments, batch, interleaved, median_ratio, minilm, report
from benchmarks.memory import resident
from benchmarks.training_step import optimizer, without_dropout

from .context import TARGETS

NUM_TRAINING_ITEMS = 8551
STEPS = 4
PLAIN = "plain LoRA"

Step = Callable[[], None]


def adapted(decoder: str | None) -> Any:
    """The base with a LoRA adapter whose B is not 0, as after some training."""
    base = minilm() if decoder is None else _decoder(decoder)
    targets = TARGETS["encoder" if decoder is None else "decoder"]
    config = LoraConfig(r=8, target_modules=targets, task_type=TaskType.SEQ_CLS, init_lora_weights=False)
    return without_dropout(get_peft_model(base, config))


def _decoder(folder: str) -> nn.Module:
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2, dtype=torch.float32)
    model.config.pad_token_id = model.config.eos_token_id
    return model


def plain(decoder: str | None, rows: int) -> Step:
    return step(adapted(decoder), rows)


def converted(decoder: str | None, rows: int, convert: Callable[[Any], nn.Module] = to_bayesian) -> Step:
    return step(convert(adapted(decoder)), rows, kl_divergence)


def step(model: nn.Module, rows: int, kl: Callable[[nn.Module], Tensor] | None = None) -> Step:
    """A function that takes a step on the same batch each time it is called."""
    model.train()
    adamw = optimizer(model)
    inputs = {name: value[:rows] for name, value in batch().items()}

    def take() -> None:
        loss = model(**inputs).loss
        if kl is not None:
            loss = loss + kl(model) / NUM_TRAINING_ITEMS
        loss.backward()
        adamw.step()
        adamw.zero_grad()

    return take


VARIANTS: dict[str, Callable[[str | None, int], Step]] = {
    PLAIN: plain,
    "to_bayesian, no argument": converted,
    "BLoB": partial(converted, convert=to_blob),
    "ScalaBL": partial(converted, convert=to_scalabl),
}
"""By name; the first is what the others are compared with."""


def measure(name: str, decoder: str | None, rows: int, pipe: Connection) -> None:
    """Send the peak memory of a few steps, in MiB: less what the process held before the model, and all of it."""
    torch.ones(512, 512) @ torch.ones(512, 512)
    before = resident("VmRSS")
    take = VARIANTS[name](decoder, rows)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    for _ in range(STEPS):
        take()
    peak = resident("VmHWM")
    pipe.send((peak - before, peak))


def in_a_process(name: str, decoder: str | None, rows: int) -> tuple[float, float]:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=measure, args=(name, decoder, rows, sender))
    process.start()
    sender.close()
    found: tuple[float, float] = receiver.recv()
    process.join()
    return found


def main() -> None:
    parser = arguments(__doc__.splitlines()[0], repeats=15)
    parser.add_argument("--decoder", help="folder of a language model; MiniLM if not given")
    parser.add_argument("--rows", type=int, default=8, help="rows of 64 tokens in a batch, at most 32")
    parser.add_argument("--variants", type=int, default=len(VARIANTS), help="only so many, the plain step first")
    parser.add_argument("--memory_repeats", type=int, default=3, help="processes per variant; 0: no memory")
    args = parser.parse_args()
    steps = {name: make(args.decoder, args.rows) for name, make in list(VARIANTS.items())[: args.variants]}
    times = interleaved(steps, args.repeats, clock=time.process_time)
    del steps
    count = args.memory_repeats if sys.platform.startswith("linux") else 0
    rounds = [{name: in_a_process(name, args.decoder, args.rows) for name in times} for _ in range(count)]
    lines = [{"step": name, **_times(times, name), **_memory(rounds, name)} for name in times]
    report("LoRA step / plain LoRA step", lines, args.json, repeats=args.repeats, rows_per_batch=args.rows)


def _times(times: Mapping[str, list[float]], name: str) -> dict[str, float]:
    return {
        "median CPU seconds": statistics.median(times[name]),
        "ratio": median_ratio(times[name], times[PLAIN]),
    }


def _memory(rounds: list[dict[str, tuple[float, float]]], name: str) -> dict[str, float]:
    if not rounds:
        return {}
    own, plain_step = ([of[key][0] for of in rounds] for key in (name, PLAIN))
    process, plain_process = ([of[key][1] for of in rounds] for key in (name, PLAIN))
    return {
        "step MiB": statistics.median(own),
        "step memory ratio": median_ratio(own, plain_step),
        "process MiB": statistics.median(process),
        "process memory ratio": median_ratio(process, plain_process),
    }


if __name__ == "__main__":
    main()
