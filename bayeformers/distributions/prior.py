"""What a prior is: the choice that a user names (`...Prior`, JSON), and the density that it becomes for one tensor.

A new prior is one subclass of :class:`Prior`; without a `register_kl` for its density the KL falls back to one draw.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from ..checks import is_finite, plain
from .initial_scale import InitialScale

_PRIORS: dict[str, type[Prior]] = {}


class PriorDistribution(Protocol):
    """The prior density of one tensor's weights.

    One whose registered KL is a sum over the weights, each by itself, says so by ``separable = True``: the KL of a
    large tensor is then made block by block.
    """

    def log_prob(self, value: Tensor) -> Tensor:
        """Elementwise log density in nats, shape of ``value``."""


class Prior(ABC):
    """A choice of prior; :meth:`for_tensor` gives its density for one tensor.

    Subclasses are frozen dataclasses with JSON values and a ``type`` name of their own.

    Attributes:
        follows_mean: whether the density is centred at the posterior's mean, wherever that moves: its KL has no
            gradient there.
    """

    type: ClassVar[str]
    follows_mean: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _PRIORS[cls.type] = cls

    @property
    def needs_centre(self) -> bool:
        """Whether the density depends on the trained weight w0, which must be kept once the mean trains.

        As it stands, where the prior has a ``centre`` that is "pretrained".
        """
        return getattr(self, "centre", None) == "pretrained"

    @abstractmethod
    def for_tensor(self, centre: Tensor, initial: InitialScale) -> PriorDistribution:
        """The density for a tensor, or a part of it, whose trained value is ``centre``.

        Args:
            centre: the trained weight (any tensor of its shape, if the prior does not need it).
            initial: the rule that gave the tensor's initial scale.
        """

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form; :func:`prior_from_dict` reads it back."""
        return {"type": self.type, **{name: plain(value) for name, value in asdict(self).items()}}  # type: ignore[call-overload]


def prior_from_dict(data: Mapping[str, Any]) -> Prior:
    """Return the prior that :meth:`Prior.to_dict` described.

    Raises:
        TypeError: ``data`` is no mapping.
        ValueError: unknown ``type``, or values that the prior refuses.

    >>> prior_from_dict({"type": "normal", "std": 0.5, "centre": 0.0})
    NormalPrior(std=0.5, centre=0.0)
    """
    if not isinstance(data, Mapping):
        raise TypeError(f"`prior` must be a mapping with a `type`, got {data!r}.")
    values = dict(data)
    name = values.pop("type", None)
    if name not in _PRIORS:
        raise ValueError(f"`prior` has unknown type {name!r}; allowed: {sorted(_PRIORS)}.")
    known = _PRIORS[name].__dataclass_fields__  # type: ignore[attr-defined]
    return _PRIORS[name](**{key: value for key, value in values.items() if key in known})


def centre_tensor(centre: float | str, pretrained: Tensor) -> Tensor:
    """The trained weight itself for "pretrained", else the number as a scalar tensor."""
    return pretrained if isinstance(centre, str) else scalar_like(pretrained, centre)


def scalar_like(tensor: Tensor, value: float) -> Tensor:
    """A scalar of at least float32 on the tensor's device."""
    return torch.full((), value, dtype=torch.promote_types(tensor.dtype, torch.float32), device=tensor.device)


def is_number(value: object) -> bool:
    """Whether a finite int or float, which a bool is not."""
    return is_finite(value)


def check_prior(prior: object) -> None:
    """Raise TypeError unless ``prior`` is a :class:`Prior`."""
    if not isinstance(prior, Prior):
        raise TypeError(f"`prior` must be a Prior such as MopedPrior(), got {prior!r}.")


def check_positive(name: str, value: float, meaning: str = "a standard deviation") -> None:
    """Raise ValueError unless ``value`` is a finite number > 0.

    Args:
        name: the argument's name, for the message.
        value: what the caller gave for it.
        meaning: what the number is, in words that end the message.

    Raises:
        ValueError: it is no finite number, or not above 0.
    """
    if not (is_number(value) and value > 0):
        raise ValueError(f"`{name}` must be a finite number > 0, got {value!r}; it is {meaning}.")


def check_centre(centre: float | str) -> None:
    """Raise ValueError unless ``centre`` is "pretrained" or a finite number."""
    if centre != "pretrained" and not is_number(centre):
        raise ValueError(f"`centre` must be 'pretrained' (the trained weight) or a finite number, got {centre!r}.")
