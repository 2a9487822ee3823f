"""What a reload needs to know of a conversion: validated, and JSON in `config.json` under "bayesian"."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from .distributions import MopedPrior, Prior, prior_from_dict

CONFIG_VERSION = 1
NOISE_VERSION = 1  # of nn/noise.py: raise it with any change there that changes the draws of old checkpoints

EstimatorName = Literal["reparameterization"]


def check_delta(delta: float) -> float:
    """``delta`` as a float.

    Raises:
        TypeError: not a number.
        ValueError: not finite or not > 0.
    """
    if isinstance(delta, bool) or not isinstance(delta, (int, float)):
        raise TypeError(f"`delta` must be a number > 0, got {delta!r}.")
    if not (math.isfinite(delta) and delta > 0):
        raise ValueError(
            f"`delta` must be finite and > 0, got {delta!r}. It sets the initial posterior, scale = delta * |weight|; "
            "try 0.05, or name the layer in `exclude_modules` to keep it deterministic."
        )
    return float(delta)


@dataclass(frozen=True, kw_only=True)
class BayesianConfig:
    """A conversion, as `config.json` keeps it.

    >>> BayesianConfig.from_dict(BayesianConfig(delta=0.1).to_dict()).delta
    0.1
    """

    delta: float = field(default=0.05, metadata={"help": "Initial scale relative to |weight|."})
    freeze: bool = field(default=True, metadata={"help": "Keep means and deterministic parameters fixed."})
    prior: Prior = field(default_factory=MopedPrior, metadata={"help": "Prior of every Bayesian weight."})
    estimator: EstimatorName = field(default="reparameterization", metadata={"help": "How noise enters in training."})
    modules: dict[str, str] = field(default_factory=dict, metadata={"help": "Converted modules and their kind."})
    modules_to_save: list[str] = field(default_factory=list, metadata={"help": "Deterministic but trainable."})
    dropout: dict[str, float] = field(default_factory=dict, metadata={"help": "Dropout rates switched off."})
    num_training_items: int | None = field(default=None, metadata={"help": "N of the ELBO, set by training."})
    kl_weight: float = field(default=1.0, metadata={"help": "Weight of the KL, set by training."})
    noise_std: float | None = field(default=None, metadata={"help": "Observation noise of a regression."})
    version: int = CONFIG_VERSION
    noise_version: int = NOISE_VERSION

    def __post_init__(self) -> None:
        check_delta(self.delta)
        if not isinstance(self.prior, Prior):
            raise TypeError(f"`prior` must be a Prior such as MopedPrior(), got {self.prior!r}.")

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {**_copies(values), "prior": self.prior.to_dict()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> BayesianConfig:
        """Read :meth:`to_dict`; keys of newer versions are ignored.

        Raises:
            ValueError: made by a version whose draws this one cannot repeat, or values that are refused.
        """
        for key, known in (("version", CONFIG_VERSION), ("noise_version", NOISE_VERSION)):
            found = data.get(key, known)
            if type(found) is not int or found > known:
                raise ValueError(
                    f"`bayesian.{key}` is {found!r}, this bayeformers reads up to {known}: upgrade bayeformers."
                )
        known_keys = {f.name for f in fields(cls)}
        values = {key: value for key, value in data.items() if key in known_keys}
        if isinstance(values.get("prior"), Mapping):
            values["prior"] = prior_from_dict(values["prior"])
        return cls(**values)


def _copies(values: Mapping[str, Any]) -> dict[str, Any]:
    """Copies of lists and dicts, so that a saved configuration is not changed behind its owner's back."""
    return {key: value.copy() if isinstance(value, (list, dict)) else value for key, value in values.items()}
