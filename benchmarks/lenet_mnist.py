"""A pretrained LeNet5 becomes Bayesian: where it starts, and what training the ELBO adds: MNIST, several seeds.

    python -m benchmarks.lenet_mnist --data_dir MNIST --seeds 0,1,2

``--data_dir`` holds MNIST's `t10k` files (IDX, gzip): the first 8,000 images train, the other 2,000 test. Of the 8,000,
1,000 (by the seed) are held out: they choose the epoch of every training, delta, the KL weight and the temperature. The
test images choose nothing.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bayeformers import VariationalPosterior, calibrate_delta, kl_divergence, metrics, to_bayesian
from bayeformers.posteriors import PointPosterior
from benchmarks.embedded_task import markdown

TRAIN, HELD_OUT = 8000, 1000
BATCH = 64
PRETRAINING_EPOCHS, EPOCHS = 15, 4
PRETRAINING_RATE, MEAN_RATE, RHO_RATE = 1e-3, 3e-4, 1e-2
KL_WEIGHTS = (1.0, 0.1)
MEAN, STD = 0.1307, 0.3081  # of the training images' pixels, as usual for MNIST
DRAWS, CHOOSING_DRAWS = 16, 8
ESTIMATOR = "flipout"

Scores = dict[str, float]
Part = tuple[Tensor, Tensor]


class LeNet5(nn.Module):
    """Two convolutions, three linear layers, 61,706 weights. (B, 1, 28, 28) -> (B, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList([nn.Conv2d(1, 6, 5, padding=2), nn.Conv2d(6, 16, 5)])
        self.pool = nn.MaxPool2d(2)
        self.hidden = nn.ModuleList([nn.Linear(400, 120), nn.Linear(120, 84)])
        self.head = nn.Linear(84, 10)
        self.activation: nn.Module = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        for convolution in self.convolutions:
            x = self.pool(self.activation(convolution(x)))
        x = x.flatten(1)
        for layer in self.hidden:
            x = self.activation(layer(x))
        return self.head(x)


# ---------------------------------------------------------------------------------------------------------------- data


def read_idx(path: Path) -> np.ndarray:
    """An IDX file of unsigned bytes: two zero bytes, type 8, number of axes; their sizes, big-endian; the values."""
    data = gzip.decompress(path.read_bytes())
    if data[:3] != b"\x00\x00\x08":
        raise ValueError(f"`path` must be an IDX file of unsigned bytes, got {path} that starts with {data[:4]!r}.")
    sizes = np.frombuffer(data, ">u4", count=data[3], offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(sizes)


@dataclass(frozen=True)
class Data:
    """Standardised images, (N, 1, 28, 28), with their digits."""

    train: Part
    held_out: Part
    test: Part

    @classmethod
    def load(cls, folder: Path, seed: int) -> Data:
        pixels = torch.from_numpy(read_idx(folder / "t10k-images-idx3-ubyte.gz").copy()).float() / 255
        images = ((pixels - MEAN) / STD)[:, None]
        digits = torch.from_numpy(read_idx(folder / "t10k-labels-idx1-ubyte.gz").astype(np.int64))
        order = torch.from_numpy(np.random.default_rng(seed).permutation(TRAIN))
        held, rest = order[:HELD_OUT], order[HELD_OUT:]
        return cls((images[rest], digits[rest]), (images[held], digits[held]), (images[TRAIN:], digits[TRAIN:]))


# ------------------------------------------------------------------------------------------------------------ training


def epochs(model: nn.Module, data: Data, count: int, kl_weight: float | None, rate: float) -> Iterator[int]:
    """Adam on the ELBO per example, or on the NLL alone; after each epoch its number, from 1."""
    images, digits = data.train
    rhos = [p for name, p in model.named_parameters() if name.endswith("_rho")]
    means = [p for name, p in model.named_parameters() if not name.endswith("_rho") and p.requires_grad]
    groups = [{"params": means, "lr": rate}, {"params": rhos, "lr": RHO_RATE}]
    optimizer = torch.optim.Adam([group for group in groups if group["params"]])
    for epoch in range(1, count + 1):
        model.train()
        for rows in torch.randperm(len(digits)).split(BATCH):
            loss = F.cross_entropy(model(images[rows]), digits[rows])
            if kl_weight is not None:
                loss = loss + kl_weight * kl_divergence(model) / len(digits)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.eval()
        yield epoch


def train(
    model: nn.Module,
    data: Data,
    count: int,
    criterion: Callable[[nn.Module], float],
    kl_weight: float | None = None,
    rate: float = MEAN_RATE,
) -> tuple[float, int]:
    """Leaves the model at the epoch of the smallest criterion; returns that value and epoch."""
    best, chosen, state = float("inf"), 0, {}
    for epoch in epochs(model, data, count, kl_weight, rate):
        value = criterion(model)
        if value < best:
            best, chosen, state = value, epoch, copy.deepcopy(model.state_dict())
    model.load_state_dict(state)
    return best, chosen


def pretrained(data: Data, seed: int) -> tuple[LeNet5, int]:
    """Ordinary training; the epoch of the best held-out accuracy."""

    def error(model: nn.Module) -> float:
        return -scores(log_probs(model, data.held_out), data.held_out)["accuracy"]

    torch.manual_seed(seed)
    model = LeNet5()
    _, epoch = train(model, data, PRETRAINING_EPOCHS, error, rate=PRETRAINING_RATE)
    return model, epoch


def elbo(
    model: LeNet5, data: Data, delta: float, freeze: bool, seed: int, kl_weights: Sequence[float] = KL_WEIGHTS
) -> tuple[nn.Module, dict[str, float]]:
    """The ELBO from the trained network, under the KL weight and at the epoch of the smallest held-out NLL."""
    found = []
    for kl_weight in kl_weights:
        torch.manual_seed(seed)
        copied = to_bayesian(copy.deepcopy(model), delta, freeze, estimator=ESTIMATOR)
        nll, epoch = train(copied, data, EPOCHS, lambda m: held_out_nll(m, data), kl_weight)
        found.append((nll, kl_weight, epoch, copied))
    nll, kl_weight, epoch, best = min(found, key=lambda one: one[0])
    return best, {"kl_weight": kl_weight, "epoch": epoch, "held_out_nll": nll}


# ------------------------------------------------------------------------------------------------------------- scoring


@torch.no_grad()
def log_probs(model: nn.Module, part: Part, draws: int = DRAWS) -> np.ndarray:
    """Of the network, or the average over held draws of a converted one. Shape: (N, 10)."""
    bayesian = any(name.endswith("_rho") for name, _ in model.named_parameters())
    posterior: Any = VariationalPosterior(model) if bayesian else PointPosterior(model)
    return np.asarray(posterior.predict(part[0], num_samples=draws).mean_log_probs.double())


@torch.no_grad()
def mean_log_probs(model: nn.Module, part: Part) -> np.ndarray:
    """Of the network at the posterior mean."""
    return np.asarray(model.eval()(part[0]).double().log_softmax(-1))


def held_out_nll(model: nn.Module, data: Data) -> float:
    return scores(log_probs(model, data.held_out, CHOOSING_DRAWS), data.held_out)["NLL"]


def scores(found: np.ndarray, part: Part) -> Scores:
    labels = part[1].numpy()
    return {
        "accuracy": 100 * float((found.argmax(-1) == labels).mean()),
        "NLL": float(-found[np.arange(len(labels)), labels].mean()),
        "ECE": float(metrics.expected_calibration_error(np.exp(found), labels)),
    }


# ---------------------------------------------------------------------------------------------------------------- rows


def run(folder: Path, seed: int) -> dict[str, Any]:
    """Every row's scores on the test images, and what the held-out ones chose."""
    data = Data.load(folder, seed)
    rows: dict[str, Scores] = {}
    model, epoch = pretrained(data, seed)
    chosen: dict[str, Any] = {"pretraining_epoch": epoch}
    test = log_probs(model, data.test)
    rows["pretrained"] = scores(test, data.test)
    temperature = metrics.fit_temperature(log_probs(model, data.held_out), data.held_out[1].numpy())
    tempered = torch.from_numpy(test / temperature).log_softmax(-1).numpy()
    rows["pretrained + temperature"] = scores(tempered, data.test)
    torch.manual_seed(seed)
    longer = copy.deepcopy(model)
    _, chosen["trained_on_epoch"] = train(longer, data, EPOCHS, lambda m: held_out_nll(m, data))
    rows["trained on without noise"] = scores(log_probs(longer, data.test), data.test)

    delta = calibrate_delta(model, *data.held_out, num_samples=CHOOSING_DRAWS, progress=False)
    chosen |= {"temperature": temperature, "delta": delta}
    start = to_bayesian(copy.deepcopy(model), delta)
    rows["converted, mean network"] = scores(mean_log_probs(start, data.test), data.test)
    rows["converted, 16 draws"] = scores(log_probs(start, data.test), data.test)
    for name, freeze in (("scales trained", True), ("means and scales trained", False)):
        trained, chosen[name] = elbo(model, data, delta, freeze, seed)
        rows[name] = scores(log_probs(trained, data.test), data.test)

    swapped = copy.deepcopy(model)
    swapped.activation = nn.Softplus()
    rows["softplus for ReLU, same weights"] = scores(log_probs(swapped, data.test), data.test)
    same = [chosen["scales trained"]["kl_weight"]]
    trained, chosen["softplus, scales trained"] = elbo(swapped, data, delta, True, seed, same)
    rows["softplus for ReLU, scales trained"] = scores(log_probs(trained, data.test), data.test)
    return {"seed": seed, "rows": rows, "chosen": chosen}


def table(runs: list[dict[str, Any]]) -> str:
    """Means over seeds with the sample standard deviation of the accuracy."""
    lines = []
    for row in runs[0]["rows"]:
        of = {name: [one["rows"][row][name] for one in runs] for name in ("accuracy", "NLL", "ECE")}
        spread = f" ± {statistics.stdev(of['accuracy']):.2f}" if len(runs) > 1 else ""
        mean = {name: statistics.fmean(values) for name, values in of.items()}
        lines.append([row, f"{mean['accuracy']:.2f}{spread}", f"{mean['NLL']:.4f}", f"{mean['ECE']:.4f}"])
    return markdown(["", "accuracy, %", "NLL", "ECE"], lines)


def main() -> None:
    """Run the seeds one after another and print their table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True, help="folder of MNIST's t10k files")
    parser.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--json", type=Path, help="also write every number to this file")
    args = parser.parse_args()
    runs = []
    for seed in args.seeds:
        runs.append(run(args.data_dir, seed))
        print(f"seed {seed}: {runs[-1]['chosen']}", flush=True)
        if args.json is not None:
            args.json.write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")
    print(f"\n{table(runs)}")


if __name__ == "__main__":
    main()
