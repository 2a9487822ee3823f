"""The objective of one training: the ELBO of its steps, the terms beside it, and what the next log says of them."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import TrainerState

from ..nn.kl import kl_divergence, log_variational_posterior
from .alignment import CalibrationTerm
from .arguments import BayesianTrainingArguments
from .elbo import Group, elbo_loss, kl_warmup
from .own_terms import ForwardPass
from .records import SILENT_LAYERS, TrainingRecord

__all__ = ["Objective"]


class Objective:
    """What a `BayesianTrainer` minimises, from the first batch of a `train()` to its last.

    Attributes:
        has_begun: whether the first batch has been seen.
        group: the micro-batches of the present optimizer step; None outside of `train()`.
        record: N, and the sums of the next log; None before the first batch, and for a model that is not Bayesian.
        calibration: the calibration loss, if there is one.
        has_own_terms: whether the model's own loss has terms besides the likelihood, which are trained along.
    """

    def __init__(self) -> None:
        self.has_begun, self.has_own_terms = False, False
        self.group: Group | None = None
        self.record: TrainingRecord | None = None
        self.calibration: CalibrationTerm | None = None

    def close(self) -> None:
        """Leave the model: the training is over, or begins anew."""
        if self.record is not None:
            self.record.close()

    def start_step(self, group: Group) -> None:
        """An optimizer step of these micro-batches begins."""
        self.group = group
        if self.record is not None:
            self.record.start_step()

    def own_terms(self, passes: list[ForwardPass], count: Callable[[], Tensor], group: Group) -> Tensor | float:
        """This micro-batch's share of the model's own terms, weighted by its items as the NLL is; 0 without any."""
        if not self.has_own_terms or not (num_items := count()):
            return 0.0  # the own loss of no item is a mean over nothing
        mean = sum(found.own_terms for found in passes) / len(passes)
        return elbo_loss(mean * num_items, group)[0]

    def loss(
        self,
        model: nn.Module,
        args: BayesianTrainingArguments,
        state: TrainerState,
        group: Group,
        nll_sum: Tensor,
        beside: tuple[Tensor | float, Tensor | float],
        say: Callable[[str], None],
    ) -> Tensor:
        """This micro-batch's share of its optimizer step's loss, a scalar with gradient; see `training.elbo`.

        Args:
            model: the Bayesian model.
            args: weights of the terms, and N where no `train()` has counted it.
            state: the step, for the KL's warm-up.
            group: the step's micro-batches.
            nll_sum: of the micro-batch's items.
            beside: shares of the calibration loss and of the model's own terms.
            say: tells the user of layers that the first forward did not reach.

        Returns:
            NLL + KL + calibration loss + own terms.

        Raises:
            ValueError: N is not known.
        """
        num_items = args.num_training_items if self.record is None else self.record.num_items
        if num_items is None:
            raise ValueError("`num_training_items` must be given to compute the ELBO outside `train()`.")
        calibration, own_terms = beside
        kl = kl_divergence(model).to(nll_sum.device)
        weight = args.kl_weight * kl_warmup(state.global_step, state.max_steps, args.kl_warmup_ratio)
        nll, kl_term = elbo_loss(nll_sum, group, weight * kl / num_items)
        if self.record is not None:
            with torch.no_grad():
                log_posterior = log_variational_posterior(model) if self.record.starts_step else 0.0
            self.record.add(nll, kl / group.num_batches, log_posterior, calibration, own_terms)
            if names := self.record.silent_layers():
                say(SILENT_LAYERS.format(len(names), ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")))
        return nll + kl_term + args.calibration_weight * calibration + own_terms

    def log(self, mean_over_ranks: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The ELBO's parts, as means since the last log, and the calibration loss's thresholds."""
        if self.record is None:
            return {}
        return self.record.drain(mean_over_ranks) | ({} if self.calibration is None else self.calibration.report())

    def save_calibration(self, folder: Path) -> None:
        """Write what the calibration loss has seen beside a checkpoint, for a training that goes on from it."""
        if self.calibration is not None:
            self.calibration.save(folder)
