"""A policy that goes with its model: attached, found again, and only while the weights are those it was fitted to."""

from __future__ import annotations

import hashlib
import logging
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..posteriors import PointPosterior
from ..storage import bare_name, digest
from .policy import POLICY_FILE, AbstentionPolicy

__all__ = [
    "attach_policy",
    "mismatch",
    "of_weights",
    "policy_of",
    "settings_of",
    "take_up_policy",
    "weights_digest",
    "write_policy",
]

logger = logging.getLogger(__name__)

_OWN = "abstention_policy"
_REPLACED = ".original_module."  # of PEFT's `modules_to_save`: it is not called, and not saved
_SETTINGS = ("prior_precision", "temperature", "weight", "bias", "rate")
_SAMPLED = 1024  # values of each tensor, that tell a change which its version does not
_CHECKED: weakref.WeakKeyDictionary[nn.Module, tuple[Any, str]] = weakref.WeakKeyDictionary()


def attach_policy(model: nn.Module, policy: AbstentionPolicy | None) -> None:
    """Let a model carry a policy: `save_pretrained` writes it, pipelines and `BayesianTrainer.predict` use it.

    A policy of scores that were given as numbers is from now on one of the model's present weights.

    Args:
        model: the model, or a PEFT model.
        policy: of this model; None takes one away.

    Raises:
        TypeError: no module, or no policy.
        ValueError: the policy was fitted to other weights.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a torch.nn.Module, got {type(model).__name__}.")
    if policy is not None and not isinstance(policy, AbstentionPolicy):
        raise TypeError(f"`policy` must be an AbstentionPolicy or None, got {type(policy).__name__}.")
    if policy is None:
        vars(model).pop(_OWN, None)
        return
    if policy.weights is not None and policy.weights != weights_digest(model):
        raise ValueError(
            f"`policy` was fitted to other weights than this {type(model).__name__} has: fit it again, or attach it "
            "to the model that it was fitted to."
        )
    vars(model)[_OWN] = of_weights(policy, model)


def of_weights(policy: AbstentionPolicy, model: nn.Module) -> AbstentionPolicy:
    """Return a policy that knows its weights: where it does not say, they are the model's present ones."""
    return policy if policy.weights is not None else replace(policy, weights=weights_digest(model))


def policy_of(model_or_posterior: Any) -> AbstentionPolicy | None:
    """Return the policy that a model carries, or a posterior's model; None where there is none.

    A policy of weights that have moved since, or of another kind of posterior, is none: a warning says so.
    """
    model = (
        model_or_posterior if isinstance(model_or_posterior, nn.Module) else getattr(model_or_posterior, "model", None)
    )
    if not isinstance(model, nn.Module):
        return None
    policy = next((vars(part)[_OWN] for part in (model, *_inner(model)) if _OWN in vars(part)), None)
    if not isinstance(policy, AbstentionPolicy):
        return None
    if policy.weights in (None, weights_digest(model)):
        other = None if model is model_or_posterior else mismatch(policy, model_or_posterior, policy.method)
        if other is not None:
            logger.warning("The model's abstention policy is not applied: %s.", other)
        return policy if other is None else None
    if vars(model).get("_told_of_policy") != policy.weights:
        vars(model)["_told_of_policy"] = policy.weights
        logger.warning(
            "The model's weights have moved since its abstention policy was fitted: it is not applied. Fit it again."
        )
    return None


def mismatch(
    policy: AbstentionPolicy, posterior: Any, method: str | None = None, num_samples: int | None = None
) -> str | None:
    """Say why a policy does not hold of predictions that are made in another way than it was calibrated on.

    Args:
        policy: of scores of a posterior, or of numbers, about which nothing is known.
        posterior: that predicts now; None: a point estimate.
        method: how; None: its default.
        num_samples: of how many draws.

    Returns:
        None where the predictions are made as then.
    """
    if policy.posterior is None:
        return None
    kind = PointPosterior.__name__ if posterior is None else type(posterior).__name__
    if kind != policy.posterior:
        return f"it was calibrated on predictions of a {policy.posterior}, and these are of a {kind}"
    settings = settings_of(posterior)
    if None not in (policy.settings, settings) and settings != policy.settings:
        return f"it was calibrated on predictions of a {kind} with {policy.settings}, and this one has {settings}"
    method = method or getattr(posterior, "default_method", policy.method)
    if method != policy.method and kind != PointPosterior.__name__:
        return f"it was calibrated on predictions by {policy.method!r}, and these are by {method!r}"
    most = getattr(posterior, "num_draws", None)
    own, then = (n if most is None or n is None else min(n, most) for n in (num_samples, policy.num_samples))
    if method != "glm" and kind != PointPosterior.__name__ and None not in (own, then) and own != then:
        return f"it was calibrated on averages of {then} draws, and these are of {own}"
    return None


def settings_of(posterior: Any) -> str | None:
    """Return the numbers beside its weights by which a posterior predicts, in words; None where it has none.

    >>> settings_of(PointPosterior(nn.Identity())) is None
    True
    """
    own = getattr(posterior, "__dict__", {})
    found = [f"{name} {_shown(own[name])}" for name in _SETTINGS if isinstance(own.get(name), float | Tensor | Mapping)]
    below = settings_of(posterior.base) if getattr(posterior, "wraps", False) else None
    return ", ".join([*found, *([] if below is None else [below])]) or None


def _shown(value: Any) -> str:
    """A number, or several in few characters; in six digits, which every way of writing them keeps."""
    if isinstance(value, Mapping):
        value = torch.tensor([float(value[name]) for name in sorted(value)])
    numbers = torch.as_tensor(value, dtype=torch.float64).flatten().tolist()
    shown = " ".join(f"{number:.6g}" for number in numbers)
    return shown if len(numbers) == 1 else f"{len(numbers)} numbers {hashlib.sha256(shown.encode()).hexdigest()[:8]}"


def write_policy(model: nn.Module, folder: Path) -> None:
    """Write the policy that a model carries into its folder; one that lies there of other weights is removed."""
    policy, path = policy_of(model), folder / POLICY_FILE
    if policy is not None:
        policy.save(folder)
    elif path.is_file() and _is_of_other_weights(path, model):
        path.unlink()
        logger.warning("Removed %r: the abstention policy of other weights than those that are saved.", str(path))
    elif path.is_file() and AbstentionPolicy.load(path).weights is None:
        logger.warning(
            "%r does not say of which weights it is, and stays beside those that are saved: remove it if of others.",
            str(path),
        )


def take_up_policy(model: nn.Module, path: str | Path | None) -> None:
    """Attach the policy that lies beside a model's weights; one of other weights, or of another dtype, only warns."""
    if path is None:
        return
    policy = AbstentionPolicy.load(path)
    if policy.weights is not None and policy.weights != weights_digest(model):
        logger.warning(
            "The abstention policy %r was fitted to other weights than were loaded (or to these in another dtype): it "
            "is not attached. Fit it again.",
            str(path),
        )
        return
    vars(model)[_OWN] = of_weights(policy, model)


def _is_of_other_weights(path: Path, model: nn.Module) -> bool:
    try:
        known = AbstentionPolicy.load(path).weights
    except ValueError:
        return True
    return known is not None and known != weights_digest(model)


def weights_digest(model: nn.Module) -> str:
    """Return one hash of everything in the model's state, whatever wraps it; kept until a tensor changes."""
    state = model.state_dict(keep_vars=True)
    tensors = {bare_name(n): v for n, v in state.items() if isinstance(v, Tensor) and _REPLACED not in n}
    versions = tuple((name, value.data_ptr(), _version(value)) for name, value in tensors.items())
    present = (versions, _sampled(tensors.values()))
    known = _CHECKED.get(model)
    if known is not None and known[0] == present:
        return known[1]
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(f"{name} {digest(tensors[name])}\n".encode())
    _CHECKED[model] = (present, found.hexdigest()[:32])
    return _CHECKED[model][1]


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version  # which counts none of its changes


def _sampled(tensors: Iterable[Tensor]) -> bytes:
    """Sums of some values of each tensor: what is written through ``tensor.data`` has no version that would tell."""
    sums: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        values = tensor.detach().reshape(-1)
        few = values[:: max(1, len(values) // _SAMPLED)].sum(dtype=torch.float64)
        sums.setdefault(tensor.device, []).append(few)
    return b"".join(torch.stack(own).cpu().numpy().tobytes() for own in sums.values())


def _inner(model: nn.Module) -> list[nn.Module]:
    """The modules that data-parallel and compiled wrappers hold."""
    inner = next((getattr(model, name) for name in ("module", "_orig_mod") if name in model._modules), None)
    return [] if inner is None else [inner, *_inner(inner)]
