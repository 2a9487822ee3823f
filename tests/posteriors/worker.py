"""Run by `torchrun` in two processes, or called in one: evaluates posteriors that are set on a trainer."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from bayeformers import BayesianTrainer, BayesianTrainingArguments, laplace
from bayeformers.posteriors import DropoutPosterior, MixturePosterior, TemperaturePosterior
from tests.cases import case

LENGTHS = (7, 3, 5, 4, 6, 3, 7)


def dataset() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {"input_ids": torch.randint(4, 60, (length,), generator=generator), "labels": index % 3}
        for index, length in enumerate(LENGTHS)
    ]


def collate(found: list[dict[str, Any]]) -> dict[str, Any]:
    ids = torch.nn.utils.rnn.pad_sequence([row["input_ids"] for row in found], batch_first=True)
    lengths = torch.tensor([len(row["input_ids"]) for row in found])
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([row["labels"] for row in found])}


def posteriors() -> dict[str, Any]:
    model, batch = case("bert").build(), collate(dataset())
    share = slice(*_process())  # what is summed over the processes
    fitted = laplace.fit(model, [collate(dataset()[share])], target_modules="classifier", prior_precision=3.0)
    dropout = DropoutPosterior(model, 0.2, masks="element")
    mixture = MixturePosterior([fitted, DropoutPosterior(case("bert").build(), 0.2, masks="unit")], [1, 2])
    return {
        "element": dropout,
        "unit": DropoutPosterior(model, 0.2, masks="unit"),
        "temperature": TemperaturePosterior.fit(dropout, [batch], num_samples=4),
        "mixture": mixture,
        "calibrated mixture": TemperaturePosterior(mixture, weight=0.7),
    }


def _process() -> tuple[int, None, int]:
    is_several = torch.distributed.is_initialized()
    return (torch.distributed.get_rank(), None, torch.distributed.get_world_size()) if is_several else (0, None, 1)


def evaluated(folder: Path) -> dict[str, Any]:
    """Metrics, predictions and uncertainties by name of the posterior."""
    args = BayesianTrainingArguments(
        str(folder), per_device_eval_batch_size=2, num_eval_samples=4, use_cpu=True, report_to=[], disable_tqdm=True
    )
    found = {}
    for name, posterior in posteriors().items():
        trainer = BayesianTrainer(posterior.model, args, eval_dataset=dataset(), data_collator=collate)
        trainer.posterior = posterior
        output = trainer.predict(dataset())
        found[name] = (output.metrics, output.predictions, output.uncertainty)
    return found


if __name__ == "__main__":
    out = Path(sys.argv[1])
    results = evaluated(out)
    torch.save(results, out / f"rank{torch.distributed.get_rank()}.pt")
