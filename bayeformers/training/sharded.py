"""A Trainer of models that FSDP2 has sharded: by accelerate's plugin, or by `fully_shard` before it was made."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer
from transformers.trainer import SCHEDULER_NAME

from ..nn import kl_watch
from ..nn.draws import bayesian_modules
from ..processes.dtensors import reshard
from ..sharding import gathered, is_sharded, separate_scales

__all__ = ["ShardedTrainer"]

OPTIMIZER = "optimizer_0"
"""Folder of a checkpoint with the optimizer's state, in parts; accelerate's plugin calls it so too."""


class ShardedTrainer(Trainer):
    """What transformers' Trainer does for a model that it has loaded in parts itself, for one sharded by hand too."""

    model: Any
    lr_scheduler: Any

    @property
    def shards_by_hand(self) -> bool:
        """Whether `fully_shard` was applied to the model, and not by accelerate's plugin."""
        is_by_plugin = getattr(self, "is_fsdp_enabled", False)
        return not is_by_plugin and isinstance(self.model, nn.Module) and is_sharded(self.model)

    def settle_shards(self) -> None:
        """Before anything runs: accelerate must not wrap a sharded model again, and scales stay in float32."""
        if self.shards_by_hand:
            self.is_distributed_loading_by_transformers = True
        if is_sharded(self.model):
            separate_scales(self.model)

    @contextlib.contextmanager
    def _defer_fsdp_gradient_reduction(self) -> Iterator[None]:
        if getattr(getattr(self.model, "config", None), "distributed_config", None) is not None:
            with super()._defer_fsdp_gradient_reduction():
                yield
            return
        self.model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            self.model.set_requires_gradient_sync(True)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """As `Trainer.create_optimizer`, of the parts: an evaluation may have left whole Parameters, copies."""
        if isinstance(self.model, nn.Module):
            reshard(self.model)
        return super().create_optimizer(model)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As `Trainer.save_model`; of a sharded model the first process has the weights whole meanwhile.

        Args:
            output_dir: the folder; None: that of the arguments.
            _internal_call: whether it belongs to a checkpoint, which is not pushed.
        """
        if not is_sharded(self.model):
            super().save_model(output_dir, _internal_call)
            return
        folder = str(self.args.output_dir if output_dir is None else output_dir)
        with gathered(self.model) as writes:
            if writes:
                self._save(folder)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    # -- the optimizer's state, in parts ------------------------------------------------------------------------------

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.shards_by_hand:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        from torch.distributed.checkpoint.state_dict_saver import save

        save({"optimizer": self._optimizer_state()}, checkpoint_id=Path(output_dir) / OPTIMIZER)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not self.shards_by_hand:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict
        from torch.distributed.checkpoint.state_dict_loader import load

        folder = Path(checkpoint) / OPTIMIZER
        if not folder.is_dir():
            return
        state = {"optimizer": self._optimizer_state()}
        load(state, checkpoint_id=folder)
        set_optimizer_state_dict(self.model, self._plain_optimizer(), state["optimizer"])
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))

    def _optimizer_state(self) -> Any:
        from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

        reshard(self.model)
        for layer in bayesian_modules(self.model).values():
            kl_watch.note(layer)  # torch makes a state that is not there yet by a step of gradient 0
        return get_optimizer_state_dict(self.model, self._plain_optimizer())

    def _plain_optimizer(self) -> torch.optim.Optimizer:
        """Out of accelerate's wrapper."""
        optimizer: Any = self.optimizer
        inner: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
        return inner
