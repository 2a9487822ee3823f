"""What all rows share: the batches and their order, the optimizer, a quadratic pull."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.real_data.data import batches, by_length

from .tasks import Inputs, Tasks

BATCH, STEPS = 16, 50
RATE, HEAD_RATE, RHO_RATE = 2e-4, 1e-3, 1e-2

Scales = Mapping[str, Tensor]
Penalty = Callable[[nn.Module], Tensor]


@functools.cache
def random_batches(tasks: Tasks, task: str) -> list[tuple[Inputs, Tensor]]:
    """STEPS batches of random rows, the same for every method of a seed; rows of similar length share one."""
    rows = tasks.train[task]
    order = np.random.default_rng(tasks.seed).permutation(len(rows))[: STEPS * BATCH]
    chosen = [rows[i] for i in order]
    made = list(batches([chosen[i] for i in by_length(chosen)], tasks.tokenizer, BATCH))
    mixed = np.random.default_rng(tasks.seed).permutation(len(made))
    return [(tasks.inputs(made[i]), made[i]["labels"]) for i in mixed]


def train(
    top: nn.Module, task: Iterable[tuple[Inputs, Tensor]], penalty: Penalty | None, rho_rate: float = RHO_RATE
) -> None:
    """AdamW without decay, learning rates falling to 0 in STEPS steps, on the mean NLL plus the penalty."""
    rates = {"_rho": rho_rate, "classifier": HEAD_RATE, "": RATE}
    groups: dict[str, list[Tensor]] = {key: [] for key in rates}
    for name, parameter in top.named_parameters():
        if parameter.requires_grad:
            groups[next(key for key in rates if key in name)].append(parameter)
    given: list[dict[str, Any]] = [{"params": group, "lr": rates[key]} for key, group in groups.items() if group]
    optimizer = torch.optim.AdamW(given, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, STEPS)
    top.train()
    for inputs, labels in task:
        loss = F.cross_entropy(top(inputs), labels)
        if penalty is not None:
            loss = loss + penalty(top)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    top.eval()


def pull(origin: Scales, scale: Scales | float, weight: float) -> Penalty:
    """weight * sum (w - w_A)^2 / (2 scale^2)."""

    def penalty(top: nn.Module) -> Tensor:
        named = dict(top.named_parameters())
        widths = {name: scale if isinstance(scale, float) else scale[name] for name in origin}
        return weight / 2 * torch.stack([((named[n] - w) / widths[n]).square().sum() for n, w in origin.items()]).sum()

    return penalty
