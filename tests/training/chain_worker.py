"""Run by `torchrun` in two processes: a chain, a SWAG training and an ensemble; the parent compares them with one."""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from bayeformers.optim import SGHMC
from bayeformers.posteriors import EnsemblePosterior
from bayeformers.training import CyclicalCallback, SWAGCallback, train_ensemble
from tests.training import tiny


def model() -> nn.Module:
    """Without dropout, whose masks differ between processes."""
    found = tiny.plain()
    for module in found.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return found


def descent(network: nn.Module) -> torch.optim.Optimizer:
    """AdamW would move a key's bias, whose gradient is rounding alone, by a whole step."""
    return torch.optim.SGD(network.parameters(), lr=0.3)


def weights(posterior: Any, number: int) -> list[dict[str, torch.Tensor]]:
    found = []
    for index in range(number):
        with posterior.draw(index, 0):
            found.append({name: p.detach().clone() for name, p in posterior.model.named_parameters()})
    return found


def results(folder: Path, batch: int) -> dict[str, Any]:
    """Of trainings with ``batch`` examples in each process."""
    options = {"per_device_train_batch_size": batch, "max_steps": 6, "max_grad_norm": 0, "seed": 1}
    network = model()
    chain = SGHMC(network.parameters(), lr=0.1, num_data=20, prior_precision=1.0, seed=3)
    cycles = CyclicalCallback(1, 0.1, samples_per_cycle=3, directory=folder / "snapshots")
    trainer = tiny.trainer(folder, network, callbacks=[cycles], optimizers=(chain, None), **options)
    trainer.train()
    trainer.posterior = cycles.posterior(network)
    found = {"chain": weights(trainer.posterior, 3), "metrics": trainer.evaluate()}
    swag = SWAGCallback(start=0, every=2, rank=2, lr=0.3)
    network = model()
    trainer = tiny.trainer(folder, network, callbacks=[swag], optimizers=(descent(network), None), **options)
    trainer.train()
    posterior = trainer.posterior = swag.posterior(trainer.model)
    trainer.save_model(str(folder / "swag"))
    found |= {"swag": weights(posterior, 3), "swag metrics": trainer.evaluate()}

    def make_trainer(seed: int, place: str) -> Any:
        network = model()
        return tiny.trainer(
            place, network, optimizers=(descent(network), None), **{**options, "seed": seed, "max_steps": 2}
        )

    members = train_ensemble(make_trainer, [1, 2], folder / "members")
    return found | {"members": weights(EnsemblePosterior(model(), members), 2)}


if __name__ == "__main__":
    place = Path(sys.argv[1])
    made = results(place, 2)
    torch.save(made, place / f"rank{dist.get_rank()}.pt")
    dist.destroy_process_group()
