"""Peak memory of predictions from members and SWAG draws, relative to one model: python -m benchmarks.posteriors_memory

Each variant predicts a batch of MiniLM (32 x 64 tokens) in a process of its own, from files. On a GPU the peak is of
the device's allocated memory; on a CPU, where host and device are one, of the process's resident memory less what it
held before the model was loaded. The baseline is the same prediction of the model alone. Linux only.
"""

import copy
import multiprocessing
import statistics
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from bayeformers.posteriors import EnsemblePosterior, PointPosterior, RunningMoments, SWAGPosterior
from benchmarks.harness import arguments, batch, median_ratio, minilm, report
from benchmarks.memory import resident

MEMBERS, DRAWS, RANK = 3, 3, 2
MIB = 2**20


def point(model: Any, folder: Path) -> PointPosterior:
    return PointPosterior(model)


def ensemble(model: Any, folder: Path) -> EnsemblePosterior:
    return EnsemblePosterior(model, sorted(folder.glob("member-*.safetensors")))


def swag(model: Any, folder: Path, draw_cache_bytes: int = 0) -> SWAGPosterior:
    posterior = SWAGPosterior.load(folder, model)
    posterior.draw_cache_bytes = draw_cache_bytes
    return posterior


VARIANTS: dict[str, Callable[[Any, Path], Any]] = {
    "one model": point,
    f"ensemble of {MEMBERS} files": ensemble,
    f"SWAG of rank {RANK}": swag,
    f"SWAG of rank {RANK}, draws kept": partial(swag, draw_cache_bytes=2**31),
}


def prepare(folder: Path) -> None:
    """Members and moments of small random moves around MiniLM; the first member is the model itself."""
    model, running = minilm(), RunningMoments(RANK)
    torch.manual_seed(0)
    parameters = dict(model.named_parameters())
    for number in range(MEMBERS + 1):
        moved = {n: p.detach() + 0.01 * torch.randn_like(p) if number else p.detach() for n, p in parameters.items()}
        running.add(moved)
        if number < MEMBERS:
            save_file(moved, folder / f"member-{number}.safetensors")
    posterior = SWAGPosterior(model, running.moments())
    posterior.save(folder)
    with posterior.mean():
        save_file(dict(model.named_parameters()), folder / "mean.safetensors")


def measure(name: str, folder: Path, pipe: Connection) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.ones(512, 512) @ torch.ones(512, 512)  # loads the maths library and starts its threads
    inputs = {key: value.to(device) for key, value in batch().items() if key != "labels"}
    before = resident("VmRSS")
    model = copy.deepcopy(minilm()).to(device).eval()  # in memory whole, and no map of a file
    if "SWAG" in name:  # at the mean, as after a training that ends there
        model.load_state_dict(load_file(folder / "mean.safetensors"), strict=False)
    posterior = VARIANTS[name](model, folder)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    for _ in range(2):
        posterior.predict(inputs, num_samples=DRAWS)
    peak = torch.cuda.max_memory_allocated() / MIB if device == "cuda" else resident("VmHWM") - before
    pipe.send(peak)


def in_a_process(name: str, folder: Path) -> float:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=measure, args=(name, folder, sender))
    process.start()
    sender.close()
    peak: float = receiver.recv()
    process.join()
    return peak


def main() -> None:
    args = arguments(__doc__.splitlines()[0], repeats=3).parse_args()
    if not sys.platform.startswith("linux"):
        sys.exit("benchmarks.posteriors_memory reads /proc, so it runs on Linux only")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        rounds = [{variant: in_a_process(variant, folder) for variant in VARIANTS} for _ in range(args.repeats)]
    (baseline, *_) = VARIANTS
    base = [round_[baseline] for round_ in rounds]
    rows = []
    for variant in VARIANTS:
        found = [round_[variant] for round_ in rounds]
        rows.append({"posterior": variant, "MiB": statistics.median(found), "ratio": median_ratio(found, base)})
    report("Peak memory / one model", rows, args.json, repeats=args.repeats, draws=DRAWS)


if __name__ == "__main__":
    main()
