"""What each draw of a posterior says of each row: for predictions that join positions, such as spans and entities."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..laplace import LaplacePosterior
from ..laplace.linear_draws import linearized_draws
from ..posteriors import PointPosterior
from ..training import BayesianTrainer


def drawn_logits(
    trainer: BayesianTrainer, rows: Any, logits_of: Callable[[Any], Tensor] = lambda output: output.logits
) -> list[Tensor]:
    """Return the logits of every row under the draws of the trainer's posterior, or of its point estimate.

    Draw s is one network (of a Laplace posterior: its linearisation) for all rows, positions and processes. Of each row
    (S draws, T positions, ...), the positions of its batch: what lies beyond the row is padding.

    Args:
        trainer: whose model and arguments are used.
        rows: a dataset without labels, in whose order the results are.
        logits_of: from a model's output to logits (B, T, ...).
    """
    posterior, args = trainer.posterior or PointPosterior(trainer.model), trainer.args
    draws = {"num_samples": args.num_eval_samples, "seed": args.eval_seed}
    # not the Trainer's own loader, which sorts by length if training's does
    loader = DataLoader(rows, args.eval_batch_size, collate_fn=trainer.data_collator)
    loader = trainer.accelerator.prepare_data_loader(loader)
    results: list[Tensor] = []
    for batch in tqdm(loader, "predicting", disable=args.disable_tqdm or args.process_index > 0, leave=False):
        with torch.no_grad(), trainer.compute_loss_context_manager():
            if isinstance(posterior, LaplacePosterior):
                drawn = linearized_draws(posterior, dict(batch), **draws).transpose(0, 1).float()
            else:
                drawn = torch.stack([logits_of(output) for output in posterior.passes(batch, **draws)], dim=1).float()
        drawn = trainer.accelerator.pad_across_processes(drawn, dim=2)
        results += list(trainer.accelerator.gather_for_metrics(drawn).cpu())
    return results
