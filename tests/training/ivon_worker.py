"""Run by `torchrun` in two processes: trains with IVON, and writes what rank 0 and 1 have; the parent compares them."""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from bayeformers.optim import IVON
from tests.training import tiny


def trained(folder: Path, batch: int, accumulation: int = 1) -> dict[str, Any]:
    """Weights and scales after three steps."""
    model = tiny.plain("single", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    optimizer = IVON(model.parameters(), lr=0.3, hess_init=0.5, beta2=0.9)
    options = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation, "max_steps": 3}
    data = tiny.dataset("single", 48)
    trainer = tiny.trainer(folder, model, train_dataset=data, optimizers=(optimizer, None), **options)
    trainer.train()
    assert trainer.posterior is not None
    return {"weights": model.state_dict(), "scales": dict(trainer.posterior.scales)}  # type: ignore[attr-defined]


def own_draws_without_synchronisation() -> str:
    """Two draws of one step, the first under `no_sync`: what IVON says."""
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Linear(3, 1))
    optimizer = IVON(model.parameters(), ess=10)
    rows = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(dist.get_rank()))
    with optimizer.sampled_params(), model.no_sync():
        model(rows[0]).square().mean().backward()
    with optimizer.sampled_params():
        model(rows[1]).square().mean().backward()
    try:
        optimizer.step()
    except RuntimeError as error:
        return str(error)
    return "nothing"


def main() -> None:
    folder = Path(sys.argv[1])
    found = {"plain": trained(folder, 4), "accumulated": trained(folder, 2, 2)}
    found["refused"] = {"no_sync": own_draws_without_synchronisation()}
    torch.save(found, folder / f"rank{dist.get_rank()}.pt")


if __name__ == "__main__":
    main()
