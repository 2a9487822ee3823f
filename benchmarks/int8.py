"""INT8 posteriors next to the float ones they were made of: errors, draws, files, time.

    python -m benchmarks.int8 cola --model FOLDER --data_dir GLUE
    python -m benchmarks.int8 mnist --data_dir MNIST
    python -m benchmarks.int8 layer

``cola``: a fine-tuned model (a folder of `benchmarks.real_data finetune`) on CoLA's dev sentences; ``mnist``: LeNet5 of
`benchmarks.lenet_mnist`; ``layer``: one Linear, also bayesian-torch's quantized layers where that is installed.

Columns: |p' - p| is the mean over examples and classes of the difference of the averaged probabilities, relative to the
mean probability 1 / C; "spread" the ratio of the root mean squares of the draws' standard deviations, with the 5 % and
95 % quantiles of the examples' own ratios; "file" the ratio of bytes on disk; "time" the median ratio of seconds for
predictions from the same draws, the draws made before.
"""

from __future__ import annotations

import argparse
import copy
import functools
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from bayeformers import VariationalPosterior, laplace, to_bayesian
from bayeformers.posteriors import PointPosterior
from bayeformers.quantization import QuantizedPosterior, quantize
from benchmarks.embedded_task import markdown
from benchmarks.harness import interleaved, median_ratio
from benchmarks.lenet_mnist import Data, LeNet5, epochs
from benchmarks.real_data.data import batches, by_length, labels, load_reported, load_training

Batches = Sequence[Any]
COLUMNS = [
    "posterior", "products", "|p' - p|", "spread", "examples", "accuracy, %", "INT8, %", "file", "time, 1 thread",
    "2 threads",
]  # fmt: skip


def posteriors(
    model: nn.Module, loader: Any, deltas: Sequence[float], kinds: Sequence[str]
) -> Iterator[tuple[str, Any]]:
    """Converted at each delta; the trained network; and Laplace posteriors: "last", "kfac", "kfac*100" for 100 tau."""
    for delta in deltas:
        yield f"converted, delta {delta:g}", VariationalPosterior(to_bayesian(copy.deepcopy(model), delta=delta))
    for kind in kinds:
        if kind == "point":
            yield "the network", PointPosterior(model)
        elif kind == "last":
            yield "Laplace, last layer", laplace.fit(model, loader, subset="last_layer", progress=False)
        else:
            curvature, _, factor = kind.partition("*")
            fitted = laplace.fit(model, loader, curvature=curvature, progress=False)
            tau = fitted.prior_precision * float(factor or 1)
            yield f"Laplace, {curvature}, all layers, tau {tau:.3g}", fitted.with_prior_precision(tau)


def size_of(posterior: Any) -> int:
    """Bytes on disk of all tensors that a reload needs."""
    model = posterior.model
    with tempfile.TemporaryDirectory() as folder:
        if not isinstance(posterior, VariationalPosterior | PointPosterior):
            posterior.save(folder)
        if isinstance(posterior, QuantizedPosterior):
            pass
        elif hasattr(model, "save_pretrained"):
            model.save_pretrained(folder)
        else:
            save_file(model.state_dict(), Path(folder) / "model.safetensors")
        return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))


def probabilities(posterior: Any, inputs: Batches, draws: int) -> Tensor:
    """(S, N, C)."""
    found = [posterior.predict(batch, num_samples=draws, method="sample", seed=1).log_probs.exp() for batch in inputs]
    return torch.cat(found, dim=1)


def compare(p: Tensor, q: Tensor, answers: Tensor) -> list[str]:
    """``p`` of the float posterior, ``q`` of the INT8 one, (S, N, C) each."""
    error = float((q.mean(0) - p.mean(0)).abs().mean() * p.shape[-1])
    accuracy = [f"{100 * float((one.mean(0).argmax(-1) == answers).float().mean()):.2f}" for one in (p, q)]
    if len(p) == 1:
        return [f"{error:.2%}", "-", "-", *accuracy]
    variances = [one.var(0).mean(-1) for one in (p, q)]
    ratios = (variances[1] / variances[0].clamp_min(1e-20)).sqrt()
    low, high = torch.quantile(ratios, torch.tensor([0.05, 0.95])).tolist()
    ratio = float((variances[1].mean() / variances[0].mean()).sqrt())
    return [f"{error:.2%}", f"{ratio:.3f}", f"{low:.3f} to {high:.3f}", *accuracy]


def slowness(float_one: Any, int8_one: Any, inputs: Batches, draws: int, repeats: int) -> list[str]:
    """Median ratio of seconds, at 1 thread (processor time) and at 2 (wall clock)."""
    found = []
    for threads, clock in ((1, time.process_time), (2, time.perf_counter)):
        torch.set_num_threads(threads)
        runs: Mapping[str, Callable[[], object]] = {
            "float": lambda: probabilities(float_one, inputs, draws),
            "int8": lambda: probabilities(int8_one, inputs, draws),
        }
        times = interleaved(runs, repeats, warmup=1, clock=clock)
        found.append(f"{median_ratio(times['int8'], times['float']):.2f}")
    torch.set_num_threads(1)
    return found


def rows(
    found: Iterator[tuple[str, Any]], calibration: Batches, inputs: Batches, answers: Tensor, args: argparse.Namespace
) -> list[list[str]]:
    """One row per posterior and arithmetic."""
    table = []
    for name, posterior in found:
        p, size = probabilities(posterior, inputs, args.num_samples), size_of(posterior)
        for arithmetic in args.arithmetic:
            small = quantize(posterior, calibration, arithmetic=arithmetic)
            numbers = compare(p, probabilities(small, inputs, args.num_samples), answers)
            multiply = sum(weight.arithmetic == "int8" for weight in small.weights)
            ratios = slowness(posterior, small, inputs[: args.timed], 4, args.repeats) if args.repeats else ["-", "-"]
            product = f"{arithmetic}: INT8 in {multiply} of {len(small.weights)}"
            table.append([name, product, *numbers, f"{size_of(small) / size:.3f}", *ratios])
            print(table[-1], flush=True)
    return table


def cola(args: argparse.Namespace) -> list[list[str]]:
    """Dev sentences by length, the first of the training file for calibration and the Laplace fits."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForSequenceClassification.from_pretrained(args.model).eval()
    train, _ = load_training("cola", args.data_dir, tokenizer, 0)
    dev = load_reported("cola", args.data_dir, tokenizer)["in_domain"]
    dev = [dev[i] for i in by_length(dev)][:: args.every]
    seen = list(batches(train[:256], tokenizer))
    inputs = [{k: v for k, v in batch.items() if k != "labels"} for batch in batches(dev, tokenizer)]
    calibration = [{k: v for k, v in batch.items() if k != "labels"} for batch in seen[:2]]
    found = posteriors(model, seen, args.deltas, args.kinds)
    return rows(found, calibration, inputs, torch.from_numpy(labels(dev)), args)


def mnist(args: argparse.Namespace) -> list[list[str]]:
    """2,000 test images; 256 held-out ones for calibration, 2,000 training ones for the Laplace fits."""
    data = Data.load(args.data_dir, 0)
    torch.manual_seed(0)
    model = LeNet5()
    for _ in epochs(model, data, 5, None, 1e-3):
        pass
    images, digits = data.train
    loader = DataLoader(TensorDataset(images[:2000], digits[:2000]), 250)
    found = posteriors(model, loader, args.deltas, args.kinds)
    return rows(
        found, [data.held_out[0][:256]], list(data.test[0][:: args.every].split(250)), data.test[1][:: args.every], args
    )


# --------------------------------------------------------------------------------------------------------- one layer


class One(nn.Module):
    """A Linear as a model."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def layer(args: argparse.Namespace) -> list[list[str]]:
    """Linear(384, 384) on 512 rows, sigma = 0.05 |w|: bias, mean and spread of its outputs over draws, and time."""
    torch.manual_seed(0)
    plain, x = nn.Linear(384, 384), torch.randn(512, 384)
    with torch.no_grad():
        plain.bias.fill_(5.0)
    model = to_bayesian(One(plain), delta=0.05).eval()
    weight, bias = model.layer.variational("weight"), model.layer.variational("bias")
    mean, variance = model(x).detach(), (x.square() @ weight.scale.square().T + bias.scale.square()).detach()
    float_one, int8_one = VariationalPosterior(model), quantize(model, x, arithmetic="int8")
    outputs: dict[str, Callable[[int], Tensor]] = {
        "bayeformers, float32": lambda k: _under(float_one, k, x),
        "bayeformers, INT8": lambda k: _under(int8_one, k, x),
        **_bayesian_torch(model.layer, x),
    }
    table = []
    for name, run in outputs.items():
        try:
            drawn = torch.stack([run(k) for k in range(args.num_samples)])
        except Exception as error:  # what the other library cannot do is a finding
            table.append([name, f"fails: {type(error).__name__}: {str(error)[:60]}", "", "", ""])
            continue
        error = float((drawn.mean(0) - mean).square().mean().sqrt() / (mean - 5).square().mean().sqrt())
        ratio = float((drawn.var(0).mean() / variance.mean()).sqrt())
        runs = {"float": lambda: outputs["bayeformers, float32"](0), "this": functools.partial(run, 0)}
        times = interleaved(runs, args.repeats or 5, clock=time.process_time)
        slow = median_ratio(times["this"], times["float"])
        table.append([name, f"{float(drawn.mean()):.2f}", f"{error:.3f}", f"{ratio:.3f}", f"{slow:.2f}"])
        print(table[-1], flush=True)
    return table


@torch.no_grad()
def _under(posterior: Any, index: int, x: Tensor) -> Tensor:
    with posterior.draw(index):
        found: Tensor = posterior.model(x)
        return found


def _bayesian_torch(source: nn.Module, x: Tensor) -> dict[str, Callable[[int], Tensor]]:
    """Its quantized layers with the same means and scales; a new draw per call."""
    try:
        from bayesian_torch.layers.flipout_layers.quantized_linear_flipout import QuantizedLinearFlipout
        from bayesian_torch.layers.variational_layers.quantize_linear_variational import (
            QuantizedLinearReparameterization,
        )
    except ImportError:
        return {}
    found: dict[str, Callable[[int], Tensor]] = {}
    for kind in (QuantizedLinearReparameterization, QuantizedLinearFlipout):
        for bias in (True, False):
            made = kind(384, 384)
            with torch.no_grad():
                for name in ("weight", "bias"):
                    getattr(made, f"mu_{name}").copy_(getattr(source, name))
                    getattr(made, f"rho_{name}").copy_(getattr(source, f"{name}_rho"))
            if not bias:
                made.mu_bias = made.rho_bias = None
            found[f"bayesian-torch, {kind.__name__}{'' if bias else ', no bias'}"] = _theirs(made, x)
    return found


def _theirs(made: Any, x: Tensor) -> Callable[[int], Tensor]:
    ready: list[Any] = []

    def run(index: int) -> Tensor:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            if not ready:
                made.quantize()
                ready.append(torch.quantize_per_tensor(x, float(x.abs().max()) * 2 / 255, 128, torch.quint8))
            found = made(ready[0])
        return found[0] if isinstance(found, tuple) else found

    return run


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["cola", "mnist", "layer"])
    parser.add_argument("--model", type=Path, help="a fine-tuned classifier with its tokenizer (cola)")
    parser.add_argument("--data_dir", type=Path, help="GLUE's folder (cola) or MNIST's t10k files (mnist)")
    parser.add_argument(
        "--deltas", type=lambda text: [float(one) for one in text.split(",") if one], default=[0.05, 0.2]
    )
    parser.add_argument(
        "--kinds", type=lambda text: [one for one in text.split(",") if one], default=["point", "last", "kfac"]
    )
    parser.add_argument("--arithmetic", type=lambda text: text.split(","), default=["auto", "float"])
    parser.add_argument("--num_samples", type=int, default=16, help="draws that are compared")
    parser.add_argument("--every", type=int, default=1, help="take every so many of the test examples")
    parser.add_argument("--timed", type=int, default=4, help="batches that are timed")
    parser.add_argument("--repeats", type=int, default=5, help="interleaved rounds of timing; 0: none")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.part == "layer":
        print(markdown(["layer", "mean output, 5.00", "error of the mean", "spread", "time"], layer(args)))
        return
    print(markdown(COLUMNS, {"cola": cola, "mnist": mnist}[args.part](args)))


if __name__ == "__main__":
    main()
