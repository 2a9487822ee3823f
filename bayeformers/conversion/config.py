"""What a reload needs to know of a conversion: validated, and JSON in `config.json` under "bayesian"."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from ..checks import check_choice
from ..distributions import MopedPrior, Prior, prior_from_dict
from ..distributions.diagonal_normal import ScaleName, check_scale
from ..distributions.initial_scale import check_delta
from ..distributions.prior import check_prior
from ..sampling.generators import NOISE_VERSION, check_noise_version

CONFIG_VERSION = 1
Parametrization = Literal["weights", "rank1", "rows"]
PARAMETRIZATIONS = ("weights", "rank1", "rows")


@dataclass(frozen=True, kw_only=True)
class BayesianConfig:
    """A conversion, as `config.json` keeps it.

    >>> BayesianConfig.from_dict(BayesianConfig(delta=0.1).to_dict()).delta
    0.1
    """

    delta: float = field(default=0.05, metadata={"help": "Initial scale relative to |weight|."})
    freeze: bool = field(default=True, metadata={"help": "Keep means and deterministic parameters fixed."})
    prior: Prior = field(default_factory=MopedPrior, metadata={"help": "Prior of every Bayesian weight."})
    estimator: str | dict[str, str] = field(
        default="reparameterization", metadata={"help": "How noise enters in training; by module pattern if a dict."}
    )
    scale: ScaleName = field(
        default="additive",
        metadata={"help": 'What rho sets: "additive" sigma itself, "multiplicative" sigma / |mean|.'},
    )
    parametrization: Parametrization = field(
        default="weights",
        metadata={"help": 'What is random: "weights", or of Linears "rank1" factors r s^T, or the scale of "rows".'},
    )
    modules: dict[str, str] = field(default_factory=dict, metadata={"help": "Converted modules and their kind."})
    parameters: dict[str, list[str]] = field(
        default_factory=dict, metadata={"help": "Of adapters' bare Parameters, by what holds them, the random ones."}
    )
    floors_of_zeros: dict[str, float] = field(
        default_factory=dict, metadata={"help": "Initial scale over delta of tensors that were all zeros: LoRA's B."}
    )
    modules_to_save: list[str] = field(default_factory=list, metadata={"help": "Deterministic but trainable."})
    norms: bool = field(default=False, metadata={"help": "Gains and biases of normalisations are Bayesian too."})
    dropout: dict[str, float] = field(default_factory=dict, metadata={"help": "Dropout rates switched off."})
    ties: dict[str, str] | None = field(
        default=None, metadata={"help": "Further names of shared Bayesian tensors and the first; None: not recorded."}
    )
    padding: dict[str, int] | None = field(
        default=None, metadata={"help": "Padding rows of converted lookup tables; None: not recorded."}
    )
    predicted_padding: list[str] = field(
        default_factory=list, metadata={"help": "Tied tensors whose padding row a head predicts: it has noise."}
    )
    num_training_items: int | None = field(default=None, metadata={"help": "N of the ELBO, set by training."})
    kl_weight: float = field(default=1.0, metadata={"help": "Weight of the KL, set by training."})
    noise_std: float | str | None = field(
        default=None, metadata={"help": 'Observation noise of a regression; "head": the model predicts it.'}
    )
    version: int = CONFIG_VERSION
    noise_version: int = NOISE_VERSION

    def __post_init__(self) -> None:
        object.__setattr__(self, "delta", check_delta(self.delta))  # a NumPy number is none of JSON's
        check_scale(self.scale)
        check_choice("parametrization", self.parametrization, PARAMETRIZATIONS)
        check_prior(self.prior)
        for name in ("freeze", "norms"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"`{name}` must be True or False, got {getattr(self, name)!r}.")

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {**_copies(values), "prior": self.prior.to_dict()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> BayesianConfig:
        """Return the configuration that :meth:`to_dict` gave; keys of newer versions are ignored.

        Raises:
            TypeError: ``data`` is no mapping.
            ValueError: made by a version whose draws this one cannot repeat, or values that are refused.
        """
        if not isinstance(data, Mapping):
            raise TypeError(f"`data` must be a mapping, as `to_dict` gives it, got {type(data).__name__}.")
        found = data.get("version", CONFIG_VERSION)
        if type(found) is not int or found > CONFIG_VERSION:
            raise ValueError(
                f"`bayesian.version` is {found!r}, this bayeformers reads up to {CONFIG_VERSION}: upgrade bayeformers."
            )
        check_noise_version(data.get("noise_version", 1), "bayesian.noise_version")
        known_keys = {f.name for f in fields(cls)}
        values = {"noise_version": 1} | {key: value for key, value in data.items() if key in known_keys}
        if isinstance(values.get("prior"), Mapping):
            values["prior"] = prior_from_dict(values["prior"])
        return cls(**values)


def _copies(values: Mapping[str, Any]) -> dict[str, Any]:
    """Copies of lists and dicts, so that a saved configuration is not changed behind its owner's back."""
    return {key: value.copy() if isinstance(value, (list, dict)) else value for key, value in values.items()}


def check_flags(**flags: object) -> None:
    """Raise TypeError unless every flag, by its argument's name, is True or False."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"`{name}` must be True or False, got {value!r}.")
