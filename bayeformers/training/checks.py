"""What `BayesianTrainer` refuses before anything runs."""

import os
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from torch.utils.data import IterableDataset
from transformers.trainer_utils import has_length

from ..likelihoods import HEAD, ProblemType, get_likelihood, unwrapped
from .arguments import BayesianArguments, BayesianTrainingArguments

__all__ = [
    "check_arguments",
    "check_classes",
    "check_converted",
    "check_data_parallel",
    "check_dataset",
    "check_engine",
    "check_test_dataset",
    "check_uncalibrated",
    "check_variance_head",
]

_OWN_STEP = ("lomo", "adalomo")


def check_arguments(args: Any) -> None:
    """Raise TypeError unless ``args`` are `BayesianTrainingArguments`, or `BayesianArguments` with another's."""
    if not isinstance(args, BayesianArguments):
        raise TypeError(
            f"`args` must be a BayesianTrainingArguments, got {type(args).__name__}; "
            "it takes every argument of TrainingArguments. For another trainer's own arguments write a dataclass of "
            f"both, `@dataclass class MyConfig(BayesianArguments, {type(args).__name__})`."
        )


def check_data_parallel(args: BayesianTrainingArguments, model: nn.Module | None) -> None:
    """Raise ValueError where the Trainer would wrap the model in `nn.DataParallel`."""
    if args.n_gpu > 1 and getattr(model, "hf_device_map", None) is None:
        raise ValueError(
            f"{args.n_gpu} GPUs are visible without a launcher, for which the Trainer takes nn.DataParallel: its "
            "replicas would share no draw and no item count. Start one process per GPU with "
            f"`accelerate launch --num_processes {args.n_gpu} your_script.py`, or set CUDA_VISIBLE_DEVICES=0."
        )


def check_classes(model: nn.Module, problem_type: ProblemType) -> None:
    """Raise ValueError for a classifier with one class, whose loss is 0 whatever it has learned."""
    get_likelihood(problem_type).check_head(getattr(unwrapped(model), "config", None))


def check_converted(args: BayesianTrainingArguments) -> None:
    """Raise ValueError for an argument under which the ELBO of a converted model would be wrong."""
    if args.label_smoothing_factor != 0:
        raise ValueError(
            f"`label_smoothing_factor` must be 0 for a Bayesian model, got {args.label_smoothing_factor}: "
            "a smoothed loss is no log-likelihood, and the ELBO needs one."
        )
    optim = getattr(args, "optim", None)
    if optim in _OWN_STEP:
        raise ValueError(
            f"`optim`={getattr(optim, 'value', optim)!r} has one step size for all parameters, and ignores "
            '`rho_learning_rate`: use another, such as "adamw_torch" or "adafactor".'
        )
    parallel = getattr(args, "parallelism_config", None)
    for name in ("tp", "cp", "sp"):
        if (getattr(parallel, f"{name}_size", 1) or 1) > 1:
            raise ValueError(
                f"`parallelism_config` has {name}_size={getattr(parallel, f'{name}_size')}, which splits a batch or a "
                "layer among processes: the items of a Bayesian model's loss cannot be counted then. Use data "
                "parallelism alone: `accelerate launch --multi_gpu your_script.py`."
            )
    check_engine(args)
    kwargs = args.activation_checkpointing_kwargs
    reentrant = isinstance(kwargs, dict) and kwargs.get("use_reentrant", False)
    if args.activation_checkpointing and reentrant and args.world_size > 1 and not args.ddp_static_graph:
        raise ValueError(
            "`activation_checkpointing_kwargs` has use_reentrant=True, which DistributedDataParallel cannot combine "
            "with a KL outside the checkpointed modules: leave it out, or set `ddp_static_graph=True`."
        )


def check_engine(args: BayesianTrainingArguments) -> None:
    """Raise ValueError for an engine that shards Parameters in a way that the KL cannot read: all but FSDP2."""
    if getattr(args, "deepspeed", None) or _env("ACCELERATE_USE_DEEPSPEED"):
        raise ValueError(
            "`deepspeed` shards parameters, or their steps, in ways that are not supported for a Bayesian model. Use "
            "FSDP2, which shards as ZeRO-3 does: `accelerate launch --use_fsdp --fsdp_version 2 your_script.py`."
        )
    config = getattr(args, "fsdp_config", None) or {}
    if getattr(args, "fsdp", None):
        version = int(config.get("version", config.get("fsdp_version", 2)))
    elif _env("ACCELERATE_USE_FSDP"):
        version = int(os.environ.get("FSDP_VERSION", "1"))
    else:
        return
    if version < 2:
        raise ValueError(
            f"`fsdp` of version {version} shards parameters as flat tensors, which is not supported for a Bayesian "
            "model. Use FSDP2: `accelerate launch --use_fsdp --fsdp_version 2 your_script.py`, or "
            '`fsdp_config={"version": 2}`.'
        )


def check_dataset(dataset: Any, name: str) -> None:
    """Raise ValueError for a dataset of known length 0, named ``name``; TypeError for an iterator."""
    if isinstance(dataset, dict):
        for key, part in dataset.items():
            check_dataset(part, f"{name}[{key!r}]")
    elif isinstance(dataset, Iterator) and not isinstance(dataset, IterableDataset):
        raise TypeError(
            f"`{name}` must be a dataset, or a list of rows, got a {type(dataset).__name__}, which is read only once: "
            "take `list(...)` of it, or a `torch.utils.data.IterableDataset`."
        )
    elif not isinstance(dataset, str) and has_length(dataset) and len(dataset) == 0:
        raise ValueError(f"`{name}` is empty.")


def check_test_dataset(dataset: Any) -> None:
    """Raise TypeError for what `predict` cannot read, such as several datasets; ValueError for an empty one."""
    if dataset is None:
        raise TypeError("`test_dataset` must hold the rows to predict, got None.")
    if isinstance(dataset, Mapping) and len(dataset) > 0 and 0 not in dataset:
        raise TypeError(
            f"`test_dataset` must be one dataset, got a mapping with the names {[*dataset][:3]}: call `predict` for "
            "each of its values; `evaluate` takes several."
        )
    check_dataset(dataset, "test_dataset")


def check_uncalibrated(args: BayesianTrainingArguments) -> None:
    """Raise ValueError for a calibration loss of an unconverted model."""
    if args.calibration_loss is not None:
        raise ValueError(
            f"`calibration_loss`={args.calibration_loss!r} is a term beside the ELBO, and the model is not Bayesian: "
            "call `to_bayesian(model)` before making the trainer."
        )


def check_variance_head(noise_std: Any, problem_type: ProblemType) -> None:
    """Raise ValueError for `noise_std`="head" of a head that is no regression."""
    if noise_std == HEAD and not get_likelihood(problem_type).has_noise:
        raise ValueError(
            f'`noise_std`="head" is for regressions, got a {problem_type} head: set `config.problem_type` to '
            '"regression", with `num_labels` twice the number of targets (means, then log variances).'
        )


def _env(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("1", "true", "yes")
