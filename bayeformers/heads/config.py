"""What a reload needs to know of a replaced head: validated, and JSON in `config.json` under "bayesian_head"."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal, get_args

from ..checks import check_choice, check_count, check_number, is_whole, plain

__all__ = ["Bound", "Covariance", "HeadConfig", "SNGPConfig", "Shared", "VBLLConfig", "head_config"]

HEAD_VERSION = 1
"""Of the record: raise it with any change that changes what a saved head predicts."""

Covariance = Literal["diagonal", "low_rank", "dense"]
Bound = Literal["jensen", "tight"]
Shared = Literal["shared", "per_class"]


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """What the heads of all kinds have in common."""

    kind: ClassVar[str] = ""
    is_shared_by_views: ClassVar[bool] = True

    noise_std: float | None = field(
        default=None, metadata={"help": "Noise of a regression (of VBLL's logits too), fixed; None: it is learned."}
    )
    noise_dof: float = field(
        default=1.0, metadata={"help": "Degrees of freedom of the scaled inverse chi-squared prior of a learned noise."}
    )
    noise_prior_variance: float = field(default=0.01, metadata={"help": "The variance that this prior is around."})

    def __post_init__(self) -> None:
        for name in self.numbers():
            object.__setattr__(self, name, plain(getattr(self, name)))  # a NumPy number is none of JSON's
        if self.noise_std is not None:
            check_number("noise_std", self.noise_std, 0.0)
        check_number("noise_dof", self.noise_dof, 0.0, strict=True)
        check_number("noise_prior_variance", self.noise_prior_variance, 0.0, strict=True)

    @classmethod
    def numbers(cls) -> tuple[str, ...]:
        """Names of the fields."""
        return tuple(declared.name for declared in fields(cls))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values.

        Returns:
            The version, the kind and every field.

        >>> SNGPConfig(num_features=64).to_dict()["num_features"]
        64
        """
        values = {name: getattr(self, name) for name in self.numbers()}
        lists = {name: list(value) for name, value in values.items() if isinstance(value, tuple)}
        return {"version": HEAD_VERSION, "kind": self.kind, **values, **lists}


@dataclass(frozen=True, kw_only=True)
class VBLLConfig(HeadConfig):
    """A variational Bayesian last layer, see `to_vbll`.

    >>> VBLLConfig(covariance="dense").bound
    'jensen'
    """

    kind: ClassVar[str] = "vbll"

    covariance: Covariance = field(default="diagonal", metadata={"help": "Of the weights of one output."})
    rank: int = field(default=8, metadata={"help": 'Of the low-rank part of covariance="low_rank".'})
    prior_std: float | None = field(
        default=None, metadata={"help": "Prior standard deviation of a weight; None: 1 / sqrt(in_features)."}
    )
    bias_prior_std: float = field(default=1.0, metadata={"help": "Prior standard deviation of a bias."})
    initial_std: float = field(default=0.1, metadata={"help": "Initial posterior scale relative to the prior's."})
    bound: Bound = field(
        default="jensen", metadata={"help": '"jensen": the paper\'s; "tight": the larger of two Jensen bounds.'}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("covariance", self.covariance, get_args(Covariance))
        check_choice("bound", self.bound, get_args(Bound))
        check_count("rank", self.rank, 1)
        if self.prior_std is not None:
            check_number("prior_std", self.prior_std, 0.0, strict=True)
        check_number("bias_prior_std", self.bias_prior_std, 0.0, strict=True)
        check_number("initial_std", self.initial_std, 0.0, strict=True)


@dataclass(frozen=True, kw_only=True)
class SNGPConfig(HeadConfig):
    """A spectral-normalised Gaussian process, see `to_sngp`.

    >>> SNGPConfig().spectral_bound
    0.95
    """

    kind: ClassVar[str] = "sngp"

    num_features: int = field(default=1024, metadata={"help": "Random Fourier features D of the kernel."})
    length_scale: float | None = field(
        default=None, metadata={"help": "Of the RBF kernel; None: sqrt(in_features), or 1 without `normalize`."}
    )
    kernel_variance: float = field(default=1.0, metadata={"help": "Prior variance of a logit, k(h, h)."})
    normalize: bool = field(default=True, metadata={"help": "Layer-normalise what the head reads, without gain."})
    covariance: Shared = field(
        default="shared",
        metadata={"help": '"per_class": by p_k (1 - p_k); "shared": one, by the largest of these of each input.'},
    )
    spectral_bound: float | None = field(
        default=0.95, metadata={"help": "Largest spectral norm of the normalised layers; None: none is normalised."}
    )
    spectral_layers: tuple[str, ...] = field(default=(), metadata={"help": "Full names of the normalised layers."})
    seed: int = field(default=0, metadata={"help": "Of the random features."})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("num_features", self.num_features, 1)
        if self.length_scale is not None:
            check_number("length_scale", self.length_scale, 0.0, strict=True)
        check_number("kernel_variance", self.kernel_variance, 0.0, strict=True)
        if not isinstance(self.normalize, bool):
            raise TypeError(f"`normalize` must be True or False, got {self.normalize!r}.")
        check_choice("covariance", self.covariance, get_args(Shared))
        if self.spectral_bound is not None:
            check_number("spectral_bound", self.spectral_bound, 0.0, strict=True)
        check_count("seed", self.seed, 0)
        names = self.spectral_layers
        if isinstance(names, str) or not isinstance(names, Sequence) or not all(isinstance(n, str) for n in names):
            raise TypeError(f"`spectral_layers` must be a list of module names, got {names!r}.")
        object.__setattr__(self, "spectral_layers", tuple(names))


_KINDS: dict[str, type[HeadConfig]] = {config.kind: config for config in (VBLLConfig, SNGPConfig)}


def head_config(data: Any) -> HeadConfig:
    """Return the configuration that `to_dict` gave; keys of newer versions are ignored.

    Raises:
        TypeError: ``data`` is no mapping.
        ValueError: of a newer version or an unknown kind, or values that are refused.

    >>> head_config({"version": 1, "kind": "vbll", "rank": 3}).rank
    3
    """
    if not isinstance(data, Mapping):
        raise TypeError(f"`bayesian_head` must be a mapping, got {type(data).__name__}.")
    version, kind = data.get("version"), data.get("kind")
    if not is_whole(version) or not 1 <= version <= HEAD_VERSION:
        raise ValueError(
            f"`bayesian_head` has version {version!r}, this bayeformers reads up to {HEAD_VERSION}: upgrade it."
        )
    if kind not in _KINDS:
        raise ValueError(f"`bayesian_head` must be of a kind in {tuple(_KINDS)}, got {kind!r}.")
    known = _KINDS[kind].numbers()
    return _KINDS[kind](**{name: value for name, value in data.items() if name in known})
