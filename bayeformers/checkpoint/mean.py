"""`export_mean`: a posterior's mean as an ordinary folder of transformers or PEFT."""

from __future__ import annotations

import contextlib
import copy
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..conversion.convert import is_bayesian, to_deterministic
from ..heads import HeadPosterior, RandomFeatureHead, to_plain_head
from ..heads.find import find_head
from ..posteriors import (
    BasePosterior,
    EnsemblePosterior,
    MixturePosterior,
    PointPosterior,
    Posterior,
    TemperaturePosterior,
    VariationalPosterior,
)
from ..posteriors.predict import as_posterior
from ..storage import folder

__all__ = ["export_mean"]

_CARRIED = ("posterior", "abstention_policy")
"""What a model carries that is about the posterior's predictions, and not about its mean's."""


def export_mean(model: nn.Module | Posterior, directory: str | os.PathLike[str]) -> Path:
    """Write the network at a posterior's mean as an ordinary folder.

    The folder is what `save_pretrained` writes of a model that was never converted: no scale, no ``bayesian`` entry in
    its configuration, no file of a posterior; dropout rates are those from before the conversion. transformers, or PEFT
    for an adapter, loads it with no missing and no unexpected tensor, and its logits are bit for bit those of the model
    in `posterior_mean`. The model itself stays as it is. Everything is written, or nothing.

    The mean of a Laplace, IVON, diagonal or dropout posterior is the trained network itself, that of SWAG the average
    of its snapshots, that of a VBLL head the head's mean as a plain layer.

    Args:
        model: a converted model, or one that carries a posterior, of transformers or a `peft.PeftModel`; or a posterior
            of such a model.
        directory: of the folder, which must be new or empty.

    Returns:
        The folder.

    Raises:
        TypeError: ``model`` is no model and no posterior, or ``directory`` is no path.
        ValueError: a point estimate; a posterior of several networks, whose average is none (ensembles, mixtures); one
            that is more than its weights (a temperature, an SNGP head, INT8); a model that saves no folder; or a folder
            that holds something.
    """
    path = folder(directory)
    posterior = as_posterior(model)
    check_mean(posterior)
    _check_saves(posterior.model)
    if path.exists() and not path.is_dir():
        raise ValueError(f"`directory` must be a folder, got the file {str(path)!r}.")
    if path.is_dir() and any(path.iterdir()):
        raise ValueError(
            f"`directory` {str(path)!r} must be new or empty: other files, such as a posterior's, would be read with "
            "the mean. Name another folder."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=path.parent, prefix=".partial-"))
    try:
        _write(posterior, partial / "mean")
        if path.is_dir():
            path.rmdir()
        (partial / "mean").replace(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return path


def check_mean(posterior: Posterior) -> None:
    """Raise ValueError where no plain network is the posterior's mean."""
    kind, model = type(posterior).__name__, posterior.model
    if isinstance(posterior, PointPosterior):
        raise ValueError(
            f"`model` ({type(model).__name__}) is a point estimate, whose mean is itself: call `save_pretrained`."
        )
    if isinstance(posterior, EnsemblePosterior):
        raise ValueError(
            f"An EnsemblePosterior of {posterior.num_draws} members (0 to {posterior.num_draws - 1}) has no mean "
            "network: the average of several trainings' weights is none of them. Save a member by itself: "
            "`with posterior.draw(0): posterior.model.save_pretrained(...)`."
        )
    if isinstance(posterior, MixturePosterior):
        parts = [type(part).__name__ for part in posterior.components]
        raise ValueError(f"A MixturePosterior of {parts} has no mean network: export one of its `components`.")
    if isinstance(posterior, TemperaturePosterior):
        raise ValueError(
            "A TemperaturePosterior calibrates averaged predictions, which no network's weights hold: export its "
            "`base`, whose logits are not calibrated."
        )
    has_weights = isinstance(posterior, (VariationalPosterior, HeadPosterior)) or (
        isinstance(posterior, BasePosterior) and posterior.file_name is not None
    )
    if not has_weights or isinstance(find_head(model), RandomFeatureHead):
        raise ValueError(f"A {kind} of this {type(model).__name__} has no mean that a plain model can hold.")


def _check_saves(model: nn.Module) -> None:
    """Raise ValueError unless it is a model of transformers or PEFT."""
    if not (isinstance(model, PreTrainedModel) or hasattr(model, "peft_config")):
        raise ValueError(
            f"`model` must be a model of transformers or a `peft.PeftModel`, which save folders, got a "
            f"{type(model).__name__}: save the `state_dict()` of `to_deterministic(model)`."
        )


def _write(posterior: Any, target: Path) -> None:
    """Save the mean; of a posterior of other weights than the model's while these stand in the model."""
    with mean_in_place(posterior):
        plain_copy(posterior.model).save_pretrained(str(target))


@contextlib.contextmanager
def mean_in_place(posterior: Any) -> Iterator[None]:
    """The mean as the model's Parameters, until exit: those of a Bayesian layer or head are it already."""
    is_there = is_bayesian(posterior.model) or isinstance(posterior, HeadPosterior)
    with torch.no_grad(), contextlib.nullcontext() if is_there else posterior.mean():
        yield


def plain_copy(model: nn.Module, drawn: Mapping[int, Tensor] | None = None) -> Any:
    """Return a model's modules anew, deterministic and without what the model carries, on the same storage.

    Args:
        model: which is copied.
        drawn: by the id of a Parameter the value that the copy has in its place.
    """
    shared: dict[int, Any] = {id_: nn.Parameter(value, requires_grad=False) for id_, value in (drawn or {}).items()}
    for module in model.modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and id(tensor) not in shared:
                shared[id(tensor)] = _alias(tensor) if name in module._parameters else tensor
        shared |= {id(vars(module)[name]): vars(module)[name] for name in _CARRIED if name in vars(module)}
    plain: Any = copy.deepcopy(model, shared)
    for module in plain.modules():
        for name in _CARRIED:
            module.__dict__.pop(name, None)
    if is_bayesian(plain):
        to_deterministic(plain)
    if find_head(plain) is not None:
        to_plain_head(plain)
    return plain


def _alias(parameter: Any) -> Any:
    """A Parameter of its own on the same storage, whose `requires_grad` may change; one of another class stays."""
    if type(parameter) is not nn.Parameter:
        return parameter
    return nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
