"""Run by `torchrun` in two processes: records optimizer steps and evaluations into files; the parent compares them."""

import gc
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bayeformers import fixed_draw
from bayeformers.nn.draws import training_draw
from tests.training import steps, tiny

TRAINED = ("single", "causal")
EVALUATED = ("single", "token", "question", "regression", "causal")


def evaluations(folder: Path) -> dict[str, Any]:
    """Metrics and uncertainties on 21 examples, in batches of 4: the last round is filled with duplicates."""
    results: dict[str, Any] = {}
    for kind in EVALUATED:
        data = tiny.dataset(kind, 21, seed=5)
        trainer = tiny.trainer(folder, tiny.bayesian(kind, delta=1.0), kind, eval_dataset=data)
        output = trainer.predict(data)
        results[kind] = {
            "metrics": trainer.evaluate(),
            "uncertainty": {name: torch.as_tensor(value) for name, value in output.uncertainty.items()},
        }
    return results


def by_length(folder: Path) -> list[Any]:
    """Predictions of 23 examples of different lengths, which are read longest first."""
    from tests.training import test_order

    found = []
    for settings in ({}, {"split_batches": True}):
        options = {"accelerator_config": settings} if settings else {}
        trainer = test_order.made(folder, train_sampling_strategy="group_by_length", **options)
        found.append(trainer.predict(test_order.rows()))
    return found


def live_logits() -> torch.Tensor:
    """A training forward, all processes having the same seed."""
    torch.manual_seed(0)
    model = tiny.bayesian(delta=1.0).train()
    batch = tiny.tokens(4)
    with torch.no_grad(), training_draw(model):
        logits: torch.Tensor = model(**batch).logits
    return logits


def unused_layer(folder: Path) -> float:
    """Training with a converted layer that no forward calls: an unused-parameter search would crash here."""
    model = tiny.plain()
    model.unused = torch.nn.Linear(2, 2)
    from bayeformers import to_bayesian

    trainer = tiny.trainer(folder, to_bayesian(model, freeze=False))
    return float(trainer.train().training_loss)


def resumed(folder: Path) -> float:
    """Largest difference between parameters of an uninterrupted run and of one resumed half way."""
    states = []
    for checkpoint in (None, str(folder / "resume" / "checkpoint-1")):
        trainer = tiny.trainer(folder / "resume", save_strategy="steps", save_steps=1)
        trainer.train(resume_from_checkpoint=checkpoint)
        states.append({name: value.clone() for name, value in trainer.model.state_dict().items()})
    return max(float((states[0][name] - states[1][name]).abs().max()) for name in states[0])


def logs(folder: Path) -> list[dict[str, Any]]:
    trainer = tiny.trainer(folder, gradient_accumulation_steps=2)
    trainer.train()
    return [entry for entry in trainer.state.log_history if "nll" in entry]


def calibrated(folder: Path) -> dict[str, Any]:
    """Three steps of warm-up and one after it, with weights that stand still under a held draw."""
    trainer = steps.Recorder(
        model=tiny.bayesian(),
        args=tiny.arguments(
            folder, calibration_loss="avuc", calibration_warmup_ratio=0.75, max_steps=4, learning_rate=0.0,
            rho_learning_rate=1e-12, gradient_accumulation_steps=2,
        ),
        train_dataset=tiny.dataset("single", 80),
    )  # fmt: skip
    with fixed_draw(trainer.model, steps.DRAW):
        trainer.train()
    return {"fed": trainer.fed, "logs": [entry for entry in trainer.state.log_history if "nll" in entry]}


def main(folder: Path) -> None:
    results = {
        "steps": {kind: steps.recorded(folder, kind, batch=4, accumulation=4) for kind in TRAINED},
        "checkpointed": steps.recorded(folder, "single", batch=4, accumulation=4, activation_checkpointing=True),
        "three draws": steps.recorded(folder, "single", batch=4, accumulation=4, num_train_samples=3),
        "noise": steps.live(folder, 40, per_device_train_batch_size=8, gradient_accumulation_steps=2),
        "resumed": resumed(folder),
        "evaluations": evaluations(folder),
        "by length": by_length(folder),
        "live": live_logits(),
        "calibrated": calibrated(folder),
        "unused": unused_layer(folder),
        "logs": logs(folder),
        "world_size": dist.get_world_size(),
    }
    torch.save(results, folder / f"rank{dist.get_rank()}.pt")


if __name__ == "__main__":
    gc.freeze()  # as the parent does: accelerate collects garbage at every training
    main(Path(sys.argv[1]))
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # a plain return may abort in the interpreter's teardown and take the other process along
