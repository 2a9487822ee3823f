"""What callbacks share that steer a training: its learning rate, the model, and files of their own in a checkpoint."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .. import storage
from ..optim import SGHMC
from .checkpoints import unwrapped

__all__ = ["check_chain", "checkpoint_folder", "lent_model", "load_beside", "save_beside", "set_rate", "sghmc_in"]


def set_rate(rate: float, kwargs: Mapping[str, Any]) -> None:
    """Set the learning rate of the next step, and what the log will say of it.

    Args:
        rate: of every group of Parameters.
        kwargs: what a callback is handed: the optimizer and its schedule, which sets another rate after each step.
    """
    optimizer, scheduler = kwargs["optimizer"], kwargs.get("lr_scheduler")
    for group in optimizer.param_groups:
        group["lr"] = rate
    inner = getattr(scheduler, "scheduler", scheduler)  # accelerate wraps it
    if inner is not None and hasattr(inner, "_last_lr"):
        inner._last_lr = [rate] * len(optimizer.param_groups)


def lent_model(kwargs: Mapping[str, Any]) -> nn.Module:
    """The model that a callback is handed, out of what wraps it."""
    return unwrapped(kwargs["model"])


def sghmc_in(optimizer: Any) -> SGHMC | None:
    """An optimizer out of what accelerate wraps it in, if it is an `SGHMC`."""
    inner = getattr(optimizer, "optimizer", optimizer)
    return inner if isinstance(inner, SGHMC) else None


def check_chain(optimizer: Any, args: TrainingArguments) -> None:
    """Check that nothing changes the gradients of an `SGHMC`; another optimizer may have them changed.

    Raises:
        ValueError: they are clipped, or scaled.
    """
    if sghmc_in(optimizer) is None:
        return
    if args.max_grad_norm:
        raise ValueError(
            f"`max_grad_norm` is {args.max_grad_norm!r}: with clipped gradients SGHMC samples from another "
            "distribution. Set `max_grad_norm=0`, and lower `lr` if the loss grows."
        )
    if args.fp16:
        raise ValueError("`fp16` scales gradients and skips steps, which changes SGHMC's chain: use `bf16`.")


def checkpoint_folder(args: TrainingArguments, state: TrainerState) -> Path:
    """Where the Trainer has just saved a checkpoint, or saved that which it goes on from."""
    return Path(args.output_dir or ".") / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def save_beside(
    file: str, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], args: TrainingArguments, state: TrainerState
) -> None:
    """Write a callback's own file into the checkpoint of this step, by the main process.

    Args:
        file: its name.
        tensors: by name.
        meta: what else goes on, JSON-able.
        args: of the Trainer.
        state: of the training.
    """
    folder = checkpoint_folder(args, state)
    if state.is_world_process_zero and folder.is_dir():
        storage.write(folder / file, tensors, {**meta, "step": state.global_step}, kind=file)


def load_beside(
    file: str, args: TrainingArguments, state: TrainerState, folder: str | None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return what `save_beside` wrote into the checkpoint that a training goes on from.

    Args:
        file: its name.
        args: of the Trainer.
        state: of the training, at the checkpoint's step.
        folder: the checkpoint, where it does not lie in the Trainer's own folder.

    Returns:
        Tensors by name, and the rest.

    Raises:
        ValueError: the file is missing, damaged, or of another step.
    """
    places = [folder, args.resume_from_checkpoint, checkpoint_folder(args, state)]
    for place in places:
        if isinstance(place, str | Path) and (Path(place) / file).is_file():
            tensors, meta = storage.read(Path(place) / file, kind=file)
            if meta["step"] == state.global_step:
                return tensors, meta
    raise ValueError(
        f"The training goes on from step {state.global_step}, but {str(checkpoint_folder(args, state))!r} holds no "
        f"{file!r} of that step: what the callback had gathered is lost. Where the checkpoint lies elsewhere, pass it "
        "as `resume_from` to the callback; else train from before the callback's first step."
    )
