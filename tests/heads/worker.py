"""Run by `torchrun` in two processes: reads models with heads, fits a covariance, trains; the parent compares."""

import gc
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import bayeformers
from bayeformers.heads import fit_covariance, head_of, to_sngp, to_vbll
from bayeformers.training import BayesianTrainer
from tests.training import tiny

KINDS = ("vbll", "sngp")
OPTIONS: dict[str, dict[str, Any]] = {
    "vbll": {"covariance": "low_rank", "rank": 2, "bound": "tight"},
    "sngp": {"num_features": 16, "covariance": "per_class"},
}
COUNT = 18


def made(kind: str, model: Any = None, **options: Any) -> Any:
    """The same at every call."""
    model = tiny.plain("single", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0) if model is None else model
    return (to_vbll if kind == "vbll" else to_sngp)(model, **OPTIONS[kind], **options)


def rows() -> dict[str, Tensor]:
    return tiny.tokens(3, seed=7)


def batches() -> list[dict[str, Tensor]]:
    columns = tiny.dataset("single", COUNT).columns
    return [{name: column[i : i + 5] for name, column in columns.items()} for i in range(0, COUNT, 5)]


def fitted(kind: str) -> Any:
    """With weights that are not 0, and a covariance."""
    model = made(kind).eval()
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        head_of(model).weight.copy_(torch.randn(head_of(model).weight.shape, generator=generator))
    if kind == "sngp":
        fit_covariance(model, batches())
    return model


def trainer(folder: Path, kind: str, batch: int = 4, **options: Any) -> BayesianTrainer:
    data = tiny.dataset("single", COUNT)
    return tiny.trainer(folder, made(kind), train_dataset=data, per_device_train_batch_size=batch, **options)


def main(folder: Path) -> None:
    found: dict[str, Any] = {}
    for kind in KINDS:
        found[kind] = bayeformers.predict(bayeformers.from_pretrained(folder / kind), rows())
        own = trainer(folder / "out", kind, batch=2, optim="sgd")  # which magnifies no rounding
        own.train()
        found[f"{kind} trained"] = own.model.state_dict()
    own = trainer(folder / "out", "sngp", per_device_eval_batch_size=5)
    own.fit_covariance()  # 18 rows of which each process reads its own
    found["precision"], found["count"] = head_of(own.model).precision, int(head_of(own.model).num_fitted)  # type: ignore[attr-defined]
    torch.save(found, folder / f"rank{os.environ['RANK']}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    gc.freeze()  # as the parent does: accelerate collects garbage at every training
    main(Path(sys.argv[1]))
