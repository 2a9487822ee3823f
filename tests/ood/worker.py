"""Run by `torchrun` in two processes: densities fitted to shares of the data, and what both refuse."""

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler

from bayeformers.ood import fit_density
from tests.training import tiny

METHODS = ("auto", "marginal_mahalanobis", "mahalanobis", "relative_mahalanobis", "gaussian", "knn")
ROWS, HELD_OUT = 61, 20  # an odd number: the sampler repeats a row


def loader(num_rows: int, seed: int, *, shares: bool) -> DataLoader[Any]:
    data = tiny.dataset("single", num_rows, seed=seed)
    sampler = DistributedSampler(data, shuffle=True, seed=4) if shares else None
    return DataLoader(data, batch_size=7, sampler=sampler)


def scores(*, shares: bool) -> dict[str, tuple[int, Tensor, Tensor]]:
    """By method: the rows counted, scores of fixed inputs, and the calibration scores in rising order."""
    model, found = tiny.plain().double(), {}
    for method in METHODS:
        density = fit_density(
            model, loader(ROWS, 0, shares=shares), method=method, num_references=100, num_neighbours=3,
            validation=loader(HELD_OUT, 1, shares=shares), progress=False,
        )  # fmt: skip
        new = density.score(model, tiny.tokens(9, seed=2))
        found[method] = density.num_rows, new, density.calibration.sort().values
    return found


def refusal() -> str:
    """In both processes, or one would wait for ever for the other."""
    try:
        fit_density(nn.Linear(2, 2), [torch.ones(1, 2)] * dist.get_rank(), layer="", progress=False)
    except ValueError as error:
        return str(error)
    return ""


def main(folder: Path) -> None:
    torch.save({"scores": scores(shares=True), "refusal": refusal()}, folder / f"rank{dist.get_rank()}.pt")


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main(Path(sys.argv[1]))
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # a plain return may abort in the interpreter's teardown and take the other process along
