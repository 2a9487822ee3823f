"""The part of the Trainer that takes up a checkpoint again: to go on from it, or as the best model."""

import logging
from pathlib import Path

from torch import nn

from ..conversion.record import update_config
from . import adapter_checkpoints, checkpoints, checks
from .evaluation import MonteCarloTrainer

__all__ = ["Resuming"]

logger = logging.getLogger(__name__)


class Resuming(MonteCarloTrainer):
    """A trainer that verifies every tensor of what it takes up.

    Attributes:
        _resumed: the checkpoint that the training goes on from.
    """

    _resumed: Path | None = None

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        target = checkpoints.unwrapped(self.model if model is None else model)
        if adapter_checkpoints.is_peft(target):
            adapter_checkpoints.check_adapter(target, resume_from_checkpoint)
        if checkpoints.weight_files(resume_from_checkpoint) and not self._is_sharded():
            checkpoints.restore(target, resume_from_checkpoint)
        else:
            if not adapter_checkpoints.is_complete(target, resume_from_checkpoint):
                super()._load_from_checkpoint(resume_from_checkpoint, model)
            if adapter_checkpoints.is_peft(target):
                adapter_checkpoints.restore_adapter(target, resume_from_checkpoint)
        self._resumed = Path(resume_from_checkpoint)
        recorded = checks.recorded_config(resume_from_checkpoint)
        if recorded is not None and recorded.get("noise_std") is not None:
            update_config(self.model, noise_std=recorded["noise_std"])  # that of the training that goes on

    def _load_best_model(self) -> None:
        folder, target = str(self.state.best_model_checkpoint), checkpoints.unwrapped(self.model)
        if self._is_sharded():
            super()._load_best_model()
        elif adapter_checkpoints.is_peft(target) and adapter_checkpoints.adapter_files(folder):
            adapter_checkpoints.check_adapter(target, folder, "The best checkpoint")
            if not adapter_checkpoints.is_complete(target, folder):
                super()._load_best_model()
            adapter_checkpoints.restore_adapter(target, folder, "The best checkpoint")
        elif checkpoints.weight_files(folder):
            logger.info("Loading the best model from %s (score: %s).", folder, self.state.best_metric)
            checkpoints.restore(target, folder, "The best checkpoint")
        else:
            raise ValueError(f"The best checkpoint {folder!r} holds no weights for `load_best_model_at_end` to load.")

    def _is_sharded(self) -> bool:
        return bool(self.is_fsdp_enabled or self.is_deepspeed_enabled)
