"""Run by `torchrun` in two processes: fits Laplace posteriors in all the ways that data can be split between them."""

import gc
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from bayeformers import LaplacePosterior, laplace
from bayeformers.training import BayesianTrainer
from tests.training import tiny

KINDS = ("single", "regression", "token")
EXAMPLES = 21
"""Odd, and no multiple of any batch size: every sampler has to repeat some."""
Described = dict[str, Any]


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        data = tiny.dataset("single", EXAMPLES)
        return (data[index] for index in range(EXAMPLES))


class Expert(nn.Module):
    """A layer that only examples with a positive first feature reach."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.expert, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        chosen = x[:, 0] > 0
        if not bool(chosen.any()):
            return self.head(x)
        routed = torch.zeros_like(x).masked_scatter(chosen[:, None], self.expert(x[chosen]))
        return self.head(torch.where(chosen[:, None], routed, x))


def describe(posterior: LaplacePosterior) -> Described:
    """All that must not depend on how many processes there are."""
    return {
        "eigenvalues": {name: eigen.eigenvalues for name, eigen in posterior.layers.items()},
        "variances": [value.clone() for value in posterior.variances().values()],
        "prior_precision": posterior.prior_precision,
        "noise_std": posterior.noise_std,
        "log_likelihood": posterior.record.log_likelihood,
        "num_data": posterior.record.num_data,
    }


def trainer_of(folder: Path, kind: str, **options: Any) -> BayesianTrainer:
    data = {"train_dataset": tiny.dataset(kind, EXAMPLES), "eval_dataset": tiny.dataset(kind, 9, seed=5)}
    return tiny.trainer(folder, tiny.plain(kind).double(), kind, **{**data, **options})


def experts(batches: list[Tensor]) -> LaplacePosterior:
    """The second batch alone calls the expert."""
    return laplace.fit(Expert().double(), batches, likelihood="classification", prior_precision=1.0, progress=False)


def expert_batches() -> list[Tensor]:
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64).abs()
    return [torch.cat([-x[:4, :1], x[:4, 1:]], 1), x[4:]]


def fits(folder: Path) -> dict[str, Described]:
    """Through the trainer; one process gives the reference."""
    cases: dict[str, Callable[[], LaplacePosterior]] = {
        **{kind: lambda kind=kind: trainer_of(folder, kind).fit_laplace() for kind in KINDS},
        "ekfac": lambda: trainer_of(folder, "single").fit_laplace(curvature="ekfac"),
        "holdout": lambda: trainer_of(folder, "single").fit_laplace(prior_precision="holdout"),
        "evidence": lambda: trainer_of(folder, "single").fit_laplace(prior_precision="marglik"),
        "leverage": lambda: trainer_of(folder, "single").fit_laplace(prior_precision="leverage"),
        "stream": lambda: trainer_of(folder, "single", train_dataset=Stream()).fit_laplace(),
    }
    return {name: describe(case()) for name, case in cases.items()}


def plain_loaders() -> dict[str, Described]:
    """Without a trainer: torch's sampler and accelerate's, both of which repeat examples."""
    data, model = tiny.dataset("single", EXAMPLES), tiny.plain().double()
    sampler = DistributedSampler(data, shuffle=True, seed=4)
    loaders: dict[str, Any] = {
        "torch": DataLoader(data, batch_size=4, sampler=sampler),
        "accelerate": Accelerator(cpu=True).prepare(DataLoader(data, batch_size=4)),
        "accelerate, shuffled": Accelerator(cpu=True).prepare(DataLoader(data, batch_size=3, shuffle=True)),
    }
    return {name: describe(laplace.fit(model, loader, progress=False)) for name, loader in loaders.items()}


def resumed(folder: Path) -> list[Described]:
    """From the sums that each process wrote, without another pass."""
    file = folder / "sums.safetensors"
    return [describe(trainer_of(folder, "single").fit_laplace(checkpoint=file)) for _ in range(2)]


def refusals(folder: Path) -> list[str]:
    """In all processes, or one would wait for ever for the other."""
    cases: tuple[Callable[[], Any], ...] = (
        lambda: trainer_of(folder, "single", train_dataset=tiny.dataset("single", 1)).fit_laplace(),
        lambda: laplace.fit(nn.Linear(2, 2), [torch.ones(1, 2)] * dist.get_rank(), progress=False),
    )
    found = []
    for case in cases:
        try:
            case()
        except ValueError as error:
            found.append(str(error))
    return found


def evaluated(folder: Path) -> dict[str, float]:
    trainer = trainer_of(folder, "single")
    trainer.fit_laplace()
    return trainer.evaluate()


def main(folder: Path) -> None:
    results = {
        "fits": fits(folder),
        "loaders": plain_loaders(),
        "experts": describe(experts([expert_batches()[dist.get_rank()]])),
        "resumed": resumed(folder),
        "refusals": refusals(folder),
        "evaluated": evaluated(folder),
        "files": sorted(path.name for path in folder.glob("sums*")),
    }
    torch.save(results, folder / f"rank{dist.get_rank()}.pt")


if __name__ == "__main__":
    gc.freeze()  # as the parent does: accelerate collects garbage at every training
    main(Path(sys.argv[1]))
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # a plain return may abort in the interpreter's teardown and take the other process along
