"""The command line of the formulas."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import benchmarks.device_memory as package

from .formulas import (
    ENGINES,
    FLOAT,
    HALF,
    SIZES,
    Decoder,
    Held,
    Lora,
    full_weights,
    held,
    laplace,
    laplace_fit,
    training,
)

GIB = 2**30
COLUMNS = ("parameters", "gradients", "optimizer", "gathered", "activations", "loss", "sum")


def main(argv: Sequence[str] | None = None) -> None:
    """Print the tables, or the formulas beside what two processes hold."""
    args = _parser().parse_args(argv)
    if args.measure:
        print("\n".join(beside_measured()))
        return
    decoders = SIZES if args.config is None else {args.config.parent.name or "model": _read(args.config)}
    lora = Lora(args.rank, args.targets.split(","))
    for name, decoder in decoders.items():
        rows = [*lora_rows(decoder, lora, args), *full_rows(decoder, args.devices)]
        title = f"{name}, {args.devices} devices, {args.batch} x {args.length} tokens each, GiB on one device"
        print(f"\n{title}\n")
        print("\n".join(table(["", *COLUMNS], rows)))
        print()
        print("\n".join(table(["Laplace of the head", "posterior", "fit"], laplace_rows(decoder))))


def lora_rows(decoder: Decoder, lora: Lora, args: argparse.Namespace) -> Iterator[list[str]]:
    """A LoRA posterior by engine, the last with checkpointed activations; the base bfloat16, of DeepSpeed float32."""
    plans = [(engine, False) for engine in ENGINES] + [("fsdp2", True)]
    for engine, checkpointing in plans:
        itemsize = FLOAT if engine.startswith("zero") else HALF  # DeepSpeed's bf16 would cast rho too
        size = {"batch": args.batch, "length": args.length, "checkpointing": checkpointing, "itemsize": itemsize}
        peak = training(decoder, lora, engine, args.devices, **size)
        name = f"LoRA r = {lora.rank}, {engine}{', checkpointing' if checkpointing else ''}"
        yield [name, *_held(peak.held), gib(peak.gathered), gib(peak.activations + peak.draws), gib(peak.loss),
               gib(peak.total)]  # fmt: skip


def full_rows(decoder: Decoder, devices: int) -> Iterator[list[str]]:
    """Every matrix Bayesian, without its activations."""
    for engine in ("ddp", "fsdp2"):
        for means, size in (("frozen", HALF), ("trained", FLOAT)):
            sums = held(full_weights(decoder, size, means == "trained"), engine, devices)
            yield [f"all weights, means {means}, {engine}", *_held(sums), "", "", "", gib(sums.total)]


def laplace_rows(decoder: Decoder) -> Iterator[list[str]]:
    """The head over the vocabulary, and one of two classes, beside the model itself."""
    vocabulary, inputs = decoder.vocabulary, decoder.hidden
    yield ["vocabulary, kfac", gib(laplace(vocabulary, inputs)), gib(laplace_fit(vocabulary, inputs))]
    yield ["vocabulary, diagonal", gib(laplace(vocabulary, inputs, "diagonal")), ""]
    yield ["2 classes, kfac", gib(laplace(2, inputs)), gib(laplace_fit(2, inputs))]


def beside_measured() -> list[str]:
    """What two processes hold of a tiny decoder, and the formulas' errors."""
    from . import measure

    with tempfile.TemporaryDirectory() as folder:
        ranks = measure.measured(Path(folder))
    rows = []
    for rank, found in enumerate(ranks):
        for engine, sums in found.items():
            formula = asdict(measure.expected(engine, len(ranks), rank))
            rows.append([
                f"{engine}, process {rank}",
                *(f"{sums[name]} ({formula[name] - sums[name]:+d})" for name in formula),
            ])
    lines = table(["bytes (formula less measured)", *formula], rows)
    errors = {size: measure.error_of_activations(itemsize=size) for size in (HALF, FLOAT)}
    lines += [f"activations, {8 * size}-bit base: formula {100 * error:+.2f} %" for size, error in errors.items()]
    return lines


def table(head: Sequence[str], rows: Iterator[list[str]] | list[list[str]]) -> list[str]:
    """In Markdown."""
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def gib(size: float) -> str:
    return f"{size / GIB:,.{2 if size < 10 * GIB else 1 if size < 100 * GIB else 0}f}"


def _held(sums: Held) -> list[str]:
    return [gib(sums.parameters), gib(sums.gradients), gib(sums.optimizer)]


def _read(config: Path) -> Decoder:
    return Decoder.from_config(json.loads(config.read_text(encoding="utf-8")))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=package.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="config.json of a decoder of Llama's kind; left out: 7B and 70B")
    parser.add_argument("--devices", type=int, default=8, help="number of devices")
    parser.add_argument("--batch", type=int, default=1, help="sequences of one device")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a sequence")
    parser.add_argument("--rank", type=int, default=16, help="of the LoRA adapter")
    parser.add_argument("--targets", default="q_proj,v_proj", help="its Linear layers")
    parser.add_argument("--measure", action="store_true", help="the formulas beside two processes' tensors")
    return parser


if __name__ == "__main__":
    main()
