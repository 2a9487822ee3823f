"""What each draw of a posterior says of each row: for predictions that join positions, such as spans and entities."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..laplace import LaplacePosterior
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
                drawn = linearized_draws(posterior, batch, **draws).transpose(0, 1).float()
            else:
                drawn = torch.stack([logits_of(output) for output in posterior.passes(batch, **draws)], dim=1).float()
        drawn = trainer.accelerator.pad_across_processes(drawn, dim=2)
        results += list(trainer.accelerator.gather_for_metrics(drawn).cpu())
    return results


def linearized_draws(
    posterior: LaplacePosterior, inputs: Mapping[str, Tensor], *, num_samples: int, seed: int = 0
) -> Tensor:
    """Return the logits of the linearised network at draws 0 .. S - 1 of the weights: (S, B, C), or (S, B, T, C).

    f(x; theta*) + J(x) (theta_s - theta*): one function for all inputs and tokens, to be drawn as a line or to give the
    probability of a whole span, where `LaplacePosterior.predict(method="glm")` has one Gaussian per input or token. A
    draw costs two to three forward passes. `posterior.draw(s, seed)` puts the same weights into the network itself.

    Args:
        posterior: around the trained network.
        inputs: of its forward.
        num_samples: S.
        seed: of the draws.
    """
    model = posterior.model
    drawn_ids = {id(parameter) for parameter in posterior.random_parameters()}
    random = {name: parameter for name, parameter in model.named_parameters() if id(parameter) in drawn_ids}
    mean = {name: parameter.detach().clone() for name, parameter in random.items()}

    def logits(weights: dict[str, Tensor]) -> Any:
        return torch.func.functional_call(model, weights, kwargs=dict(inputs)).logits

    was_training = model.training
    model.eval()
    try:
        found = []
        for index in range(num_samples):
            with posterior.draw(index, seed):
                tangent = {name: parameter.detach() - mean[name] for name, parameter in random.items()}
            with sdpa_kernel(SDPBackend.MATH):  # the fused attention kernels have no forward-mode derivative
                value_and_change: Any = torch.func.jvp(logits, (mean,), (tangent,))
            found.append(sum(value_and_change).detach())
        return torch.stack(found)
    finally:
        model.train(was_training)
