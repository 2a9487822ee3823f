"""Ensembles: members trained one after the other, and members that are each anchored to a draw from the prior."""

import json
import logging
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from .. import storage
from ..checks import check_choice, check_count, check_number, is_whole
from ..conversion.convert import is_bayesian
from ..posteriors.moments import trained
from ..processes import gathered
from ..sampling.generators import normal_of
from .schedules import lent_model, load_beside, save_beside

__all__ = ["AnchorCallback", "perturbed_targets", "train_ensemble"]

logger = logging.getLogger(__name__)

FILE = "anchors.safetensors"
_DONE = "ensemble_member.json"


def train_ensemble(
    make_trainer: Callable[[int, str], Trainer],
    seeds: Iterable[int],
    directory: str | Path,
    *,
    share: tuple[int, int] = (0, 1),
) -> list[Path]:
    """Train members one after the other, each with its own seed, and save each in a folder of its own.

    A member that is finished is not trained again, and one that was interrupted goes on from its last checkpoint: call
    it again with the same arguments. Then ``EnsemblePosterior(model, folders)``. Under a launcher all processes train
    each member together. To train one member per process, start plain processes with different ``share``.

    Args:
        make_trainer: from a seed and a folder to a Trainer, with a new model, ``seed=seed`` and ``output_dir=folder``.
            torch's generators have the seed when it is called, so that a fresh head differs between members.
        seeds: distinct whole numbers >= 0.
        directory: in which the members' folders are made.
        share: (k, n): train every n-th member from the k-th on; the others' folders are returned if they are finished.

    Returns:
        The folders of the finished members, in the order of the seeds.

    Raises:
        TypeError: ``make_trainer`` returned no Trainer.
        ValueError: seeds that are no distinct whole numbers; a ``share`` that is none; a Trainer of another seed, or
            with another folder.
    """
    chosen, root = list(seeds), storage.folder(directory)
    if not chosen or len(set(chosen)) < len(chosen) or not all(is_whole(seed) and seed >= 0 for seed in chosen):
        raise ValueError(f"`seeds` must be distinct whole numbers >= 0, got {chosen!r}.")
    rank, number = share
    check_count("share", number, 1)
    check_count("share", rank, 0)
    if rank >= number:
        raise ValueError(f"`share` must be (k, n) with k < n, got {share!r}.")
    folders = [root / f"member-{seed}" for seed in chosen]
    for seed, folder in list(zip(chosen, folders, strict=True))[rank::number]:
        if not (folder / _DONE).is_file():
            _train_member(make_trainer, seed, folder)
    return [folder for folder in folders if (folder / _DONE).is_file()]


def _train_member(make_trainer: Callable[[int, str], Trainer], seed: int, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    set_seed(seed)
    trainer = make_trainer(seed, str(folder))
    if not isinstance(trainer, Trainer):
        raise TypeError(f"`make_trainer` must return a Trainer, got {type(trainer).__name__}.")
    given = str(trainer.args.output_dir)
    if Path(given).resolve() != folder.resolve() or trainer.args.seed != seed:
        raise ValueError(
            f"`make_trainer` must return a Trainer with output_dir={str(folder)!r} and seed={seed}, got {given!r} and "
            f"{trainer.args.seed}: members would share checkpoints, or be the same network."
        )
    last = get_last_checkpoint(str(folder))
    if last is not None:
        logger.warning("Member %d goes on from %s.", seed, last)
    trainer.train(resume_from_checkpoint=last)
    trainer.save_model(str(folder))
    if trainer.is_world_process_zero():
        (folder / _DONE).write_text(json.dumps({"seed": seed}) + "\n")
    gathered(None)  # no process looks for the file before it is there


class AnchorCallback(TrainerCallback):
    r"""Adds (prior_precision / N) (w - w_a) to the gradients: a prior around the member's anchor (Pearce et al. 2020).

    w_a is a draw from the prior N(w_0, 1 / prior_precision), so that members differ where the data do not decide. The
    loss of a Trainer being a mean, N brings the prior to its scale. It is added after clipping, whose bound then holds
    for the data's part, and at any accumulation and number of processes once.

    For a linear model with Gaussian noise the members' mean is the exact posterior's. Their covariance is exact if each
    member also sees its own `perturbed_targets`; with anchors alone it is S P S, of the posterior's S and the prior
    precision P, which is smaller.

    Args:
        prior_precision: of the Gaussian prior on every weight that trains, > 0.
        num_data: N, how many items the mean loss stands for.
        seed: of the anchor: another for every member.
        prior_mean: w_0: "zero", or "start", the weights at the beginning of the training, such as the pretrained ones.
        resume_from: the checkpoint that the training goes on from, where it lies outside of ``args.output_dir``.

    Raises:
        ValueError: an argument is out of range. At the beginning of a training: weight decay, which is a second prior;
            fp16, whose gradients are scaled; a converted model.
    """

    def __init__(
        self,
        prior_precision: float,
        num_data: int,
        seed: int,
        *,
        prior_mean: Literal["zero", "start"] = "start",
        resume_from: str | None = None,
    ) -> None:
        check_number("prior_precision", prior_precision, 0, strict=True)
        check_count("num_data", num_data, 1)
        check_count("seed", seed, 0)
        check_choice("prior_mean", prior_mean, ("zero", "start"))
        self.prior_precision, self.num_data, self.seed = prior_precision, num_data, seed
        self.prior_mean, self.resume_from = prior_mean, resume_from
        self.anchors: dict[str, Tensor] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Draw the anchor, or take it up from a checkpoint."""
        if args.weight_decay:
            raise ValueError(f"`weight_decay` is {args.weight_decay!r}: the anchor is the prior already. Set it to 0.")
        if args.fp16:
            raise ValueError("`fp16` scales gradients, and the anchor's part would be on another scale: use `bf16`.")
        model = lent_model(kwargs)
        if is_bayesian(model):
            raise ValueError("`AnchorCallback` is for a model with one set of weights, and this one is converted.")
        parameters = trained(model)
        if state.global_step > 0:
            tensors, _ = load_beside(FILE, args, state, self.resume_from)
            self.anchors = {name: value.to(parameters[name]) for name, value in tensors.items()}
            return
        std = 1 / math.sqrt(self.prior_precision)
        self.anchors = {}
        for name, parameter in parameters.items():
            centre = parameter.detach() if self.prior_mean == "start" else torch.zeros_like(parameter)
            noise = normal_of(f"{self.seed}/anchor/{name}", parameter.shape)
            self.anchors[name] = centre + std * noise.to(parameter)

    @torch.no_grad()
    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add the prior's part of the gradient."""
        for name, parameter in trained(lent_model(kwargs)).items():
            if parameter.grad is not None:
                distance = parameter.detach() - self.anchors[name]
                parameter.grad.add_(distance, alpha=self.prior_precision / self.num_data)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The anchor goes into the checkpoint, for the start is not there any more."""
        save_beside(FILE, self.anchors, {}, args, state)


def perturbed_targets(targets: Tensor, noise_std: float, seed: int) -> Tensor:
    """Return a regression's targets with noise of the likelihood's own standard deviation added, for one member.

    Args:
        targets: of the training data, in their order, of any shape.
        noise_std: s of the Gaussian likelihood, > 0.
        seed: the member's.

    Raises:
        ValueError: a number is out of range, or the targets are no floating-point numbers.

    >>> perturbed_targets(torch.zeros(2), 0.1, seed=0).shape
    torch.Size([2])
    """
    check_number("noise_std", noise_std, 0, strict=True)
    check_count("seed", seed, 0)
    if not isinstance(targets, Tensor) or not targets.is_floating_point():
        kind = targets.dtype if isinstance(targets, Tensor) else type(targets).__name__
        raise ValueError(f"`targets` must be a tensor of floating-point numbers, got {kind}.")
    return targets + noise_std * normal_of(f"{seed}/targets", targets.shape).to(targets)
