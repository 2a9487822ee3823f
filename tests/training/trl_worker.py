"""Run by `torchrun` in two processes: trl's trainers behind the mixin, whose gradients the parent computes by hand."""

import copy
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from bayeformers import fixed_draw
from tests.training import test_trl, trainers
from tests.training.steps import DRAW, Gradients


def recorded(trainer: Any) -> dict[str, Any]:
    """Every step's parameters, gradients and this process's batches, and an evaluation."""
    record = Gradients()
    trainer.add_callback(record)
    with fixed_draw(trainer.model, DRAW):
        trainer.train()
    strip = [{n.removeprefix("module."): t for n, t in part.items()} for step in record.steps for part in step.values()]
    steps = [{"state": state, "grads": grads} for state, grads in zip(strip[::2], strip[1::2], strict=True)]
    return {
        "steps": steps,
        "fed": trainer.fed,
        "metrics": trainer.evaluate(),
        "num_items": trainer._objective.record.num_items,
    }


def made(kind: str, folder: Path) -> Any:
    """SFT of a whole model, or DPO of an adapter; micro-batches of one row, two to a step."""
    kwargs = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "seed": 0}
    if kind == "sft":
        return test_trl.sft(folder, test_trl.bayesian(trainers.llama()), **kwargs)
    return test_trl.dpo(folder, test_trl.adapted(trainers.llama()), **kwargs)


def plain(kind: str) -> nn.Module:
    """The model of :func:`made`, without a trainer."""
    model = test_trl.bayesian(trainers.llama()) if kind == "sft" else test_trl.adapted(trainers.llama())
    return copy.deepcopy(model)


def main(folder: Path) -> None:
    found = {kind: recorded(made(kind, folder / kind)) for kind in ("sft", "dpo")}
    torch.save(found, folder / f"rank{os.environ['RANK']}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
