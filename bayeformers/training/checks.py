"""What `BayesianTrainer` refuses before anything runs, and what a resumed checkpoint must hold."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import nn
from transformers.trainer_utils import has_length

from ..conversion import conversion_record, is_bayesian
from ..nn.base import variational_tensors
from ..predictive import HEAD, ProblemType
from .arguments import BayesianTrainingArguments

__all__ = [
    "check_arguments",
    "check_checkpoint",
    "check_converted",
    "check_data_parallel",
    "check_dataset",
    "check_uncalibrated",
    "check_variance_head",
    "recorded_config",
]

_COMPARED = ("delta", "freeze", "prior", "estimator", "modules")
_RHO = "_rho"


def check_arguments(args: Any) -> None:
    """Errors: TypeError unless ``args`` are `BayesianTrainingArguments`; ValueError for `nn.DataParallel`."""
    if not isinstance(args, BayesianTrainingArguments):
        raise TypeError(
            f"`args` must be a BayesianTrainingArguments, got {type(args).__name__}; "
            "it takes every argument of TrainingArguments."
        )


def check_data_parallel(args: BayesianTrainingArguments, model: nn.Module | None) -> None:
    """Errors: ValueError where the Trainer would wrap the model in `nn.DataParallel`."""
    if args.n_gpu > 1 and getattr(model, "hf_device_map", None) is None:
        raise ValueError(
            f"{args.n_gpu} GPUs are visible without a launcher, for which the Trainer takes nn.DataParallel: its "
            "replicas would share no draw and no item count. Start one process per GPU with "
            f"`accelerate launch --num_processes {args.n_gpu} your_script.py`, or set CUDA_VISIBLE_DEVICES=0."
        )


def check_converted(args: BayesianTrainingArguments) -> None:
    """Errors: ValueError for an argument under which the ELBO of a converted model would be wrong."""
    if args.label_smoothing_factor != 0:
        raise ValueError(
            f"`label_smoothing_factor` must be 0 for a Bayesian model, got {args.label_smoothing_factor}: "
            "a smoothed loss is no log-likelihood, and the ELBO needs one."
        )
    engines = {
        "fsdp": bool(args.fsdp) or _env("ACCELERATE_USE_FSDP"),
        "deepspeed": bool(args.deepspeed) or _env("ACCELERATE_USE_DEEPSPEED"),
    }
    for name, used in engines.items():
        if used:
            raise ValueError(
                f"`{name}` shards parameters, which the KL must read whole outside the forward: it is not supported "
                "for a Bayesian model. Use DistributedDataParallel: `accelerate launch --multi_gpu your_script.py`."
            )
    kwargs = args.activation_checkpointing_kwargs
    reentrant = isinstance(kwargs, dict) and kwargs.get("use_reentrant", False)
    if args.activation_checkpointing and reentrant and args.world_size > 1 and not args.ddp_static_graph:
        raise ValueError(
            "`activation_checkpointing_kwargs` has use_reentrant=True, which DistributedDataParallel cannot combine "
            "with a KL outside the checkpointed modules: leave it out, or set `ddp_static_graph=True`."
        )


def check_dataset(dataset: Any, name: str) -> None:
    """Errors: ValueError for a dataset of known length 0, named ``name``."""
    if isinstance(dataset, dict):
        for key, part in dataset.items():
            check_dataset(part, f"{name}[{key!r}]")
    elif not isinstance(dataset, str) and has_length(dataset) and len(dataset) == 0:
        raise ValueError(f"`{name}` is empty.")


def check_uncalibrated(args: BayesianTrainingArguments) -> None:
    """Errors: ValueError for a calibration loss of an unconverted model."""
    if args.calibration_loss is not None:
        raise ValueError(
            f"`calibration_loss`={args.calibration_loss!r} is a term beside the ELBO, and the model is not Bayesian: "
            "call `to_bayesian(model)` before making the trainer."
        )


def check_variance_head(noise_std: Any, problem_type: ProblemType) -> None:
    """Errors: ValueError for `noise_std`="head" of a head that is no regression."""
    if noise_std == HEAD and problem_type != "regression":
        raise ValueError(
            f'`noise_std`="head" is for regressions, got a {problem_type} head: set `config.problem_type` to '
            '"regression", with `num_labels` twice the number of targets (means, then log variances).'
        )


def _env(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("1", "true", "yes")


def recorded_config(checkpoint: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The "bayesian" entry of a checkpoint's `config.json`; None if it has none."""
    path = Path(checkpoint) / "config.json"
    recorded: dict[str, Any] | None = json.loads(path.read_text()).get("bayesian") if path.is_file() else None
    return recorded


def _saved_names(checkpoint: Path) -> set[str] | None:
    """Tensor names in a checkpoint's safetensors files; None if it holds none."""
    names: set[str] = set()
    files = sorted(checkpoint.glob("*.safetensors"))
    for file in files:
        with safe_open(str(file), framework="pt") as tensors:
            names.update(tensors.keys())
    return names if files else None


def _rho_names(model: nn.Module) -> list[set[str]]:
    """For every distinct rho, all names under which a checkpoint may keep it (ties; PEFT drops the adapter's name)."""
    adapters: Iterable[str] = getattr(model, "peft_config", None) or ()
    names: dict[int, set[str]] = {id(tensor.rho): set() for tensor in variational_tensors(model)}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in names:
            names[id(parameter)] |= {name, *(name.replace(f".{adapter}.", ".") for adapter in adapters)}
    return list(names.values())


def check_checkpoint(model: nn.Module, checkpoint: str | os.PathLike[str]) -> None:
    """Errors: ValueError unless ``checkpoint`` holds exactly the scales that ``model`` has, converted the same way."""
    saved = _saved_names(Path(checkpoint))
    if saved is None:
        return  # torch's pickle format: the loader itself reports what is missing
    saved_rho = {name for name in saved if name.endswith(_RHO)}
    if not is_bayesian(model):
        if saved_rho:
            raise ValueError(
                f"`resume_from_checkpoint` {str(checkpoint)!r} holds the scales of {len(saved_rho)} Bayesian tensors, "
                "but the model is not converted: call `to_bayesian(model)` as in that training, then make the trainer."
            )
        return
    expected = _rho_names(model)
    missing = sorted(min(names) for names in expected if not names & saved_rho)
    extra = sorted(saved_rho - set().union(*expected))
    if missing or extra:
        raise ValueError(
            f"`resume_from_checkpoint` {str(checkpoint)!r} does not fit the model's conversion: it lacks {missing[:3]} "
            f"({len(missing)}) and has {extra[:3]} ({len(extra)}) besides. Convert the same layers as in that training."
        )
    _check_same_conversion(model, checkpoint)


def _check_same_conversion(model: nn.Module, checkpoint: str | os.PathLike[str]) -> None:
    recorded, record = recorded_config(checkpoint), conversion_record(model)
    if recorded is None or record is None:
        return
    present = record.config.to_dict()
    for key in _COMPARED:
        if recorded.get(key) != json.loads(json.dumps(present[key])):
            raise ValueError(
                f"`resume_from_checkpoint` {str(checkpoint)!r} was trained with {key}={recorded.get(key)!r}, the model "
                f"was converted with {key}={present[key]!r}: the prior would change in mid-training."
            )
