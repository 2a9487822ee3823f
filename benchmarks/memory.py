"""Peak memory of a training step or a Laplace fit, relative to fine-tuning: python -m benchmarks.memory

Each variant trains MiniLM (32 x 64 tokens, AdamW) for a few steps in a process of its own. `step` is the peak of the
resident memory less what the process held before the model was loaded (interpreter, libraries); `process` is all of it.
Linux only: the kernel's peak is reset after loading, whose own transient is no part of a step.
"""

import multiprocessing
import statistics
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from bayeformers import kl_divergence, laplace, to_bayesian
from benchmarks.harness import EMBEDDINGS, arguments, batch, median_ratio, minilm, report
from benchmarks.training_step import training_step

STEPS = 4
MIB = 1024


def resident(field: str) -> float:
    """`VmRSS` (now) or `VmHWM` (peak since the last reset) of this process, in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / MIB
    raise RuntimeError(f"/proc/self/status has no {field}")


def fine_tuning() -> Callable[[], None]:
    return training_step(minilm())


def linear_frozen() -> Callable[[], None]:
    return training_step(to_bayesian(minilm(), delta=0.05, exclude_modules=EMBEDDINGS), kl_divergence)


def all_frozen() -> Callable[[], None]:
    return training_step(to_bayesian(minilm(), delta=0.05), kl_divergence)


def all_trained() -> Callable[[], None]:
    return training_step(to_bayesian(minilm(), delta=0.05, freeze=False), kl_divergence)


def laplace_fit() -> Callable[[], object]:
    """Curvature of one batch, its eigendecomposition and the evidence: all of a fit; more batches need no more."""
    model, data = minilm().eval(), [batch()]
    return lambda: laplace.fit(model, data, progress=False)


VARIANTS = {
    "deterministic fine-tuning": fine_tuning,
    "Linear, means frozen": linear_frozen,
    "Linear + Embedding, means frozen": all_frozen,
    "Linear + Embedding, means trained": all_trained,
    "Laplace fit, all Linear layers": laplace_fit,
}


def measure(name: str, pipe: Connection) -> None:
    torch.ones(512, 512) @ torch.ones(512, 512)  # loads the maths library and starts its threads: no part of a step
    before = resident("VmRSS")
    step = VARIANTS[name]()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    for _ in range(STEPS):
        step()
    peak = resident("VmHWM")
    pipe.send((peak - before, peak))


def in_a_process(name: str) -> tuple[float, float]:
    """(MiB of the step, MiB of the process)."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=measure, args=(name, sender))
    process.start()
    sender.close()
    result: tuple[float, float] = receiver.recv()
    process.join()
    return result


def main() -> None:
    args = arguments(__doc__.splitlines()[0], repeats=3).parse_args()
    if not sys.platform.startswith("linux"):
        sys.exit("benchmarks.memory reads /proc, so it runs on Linux only")
    rounds = [{name: in_a_process(name) for name in VARIANTS} for _ in range(args.repeats)]
    (baseline, *_) = VARIANTS
    rows = []
    for name in VARIANTS:
        step, process = ([round_[name][i] for round_ in rounds] for i in (0, 1))
        base_step, base_process = ([round_[baseline][i] for round_ in rounds] for i in (0, 1))
        rows.append({
            "step": name,
            "step MiB": statistics.median(step),
            "step ratio": median_ratio(step, base_step),
            "process MiB": statistics.median(process),
            "process ratio": median_ratio(process, base_process),
        })
    report("Peak memory / deterministic fine-tuning", rows, args.json, repeats=args.repeats, steps=STEPS)


if __name__ == "__main__":
    main()
