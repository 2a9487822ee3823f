"""How a Laplace posterior is fitted: every option once, for `fit`, for `BayesianTrainer.fit_laplace` and in a shell."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal, TypedDict, get_args

import torch

from ..checks import check_choice, check_count, check_number, plain
from ..likelihoods.loss_hessian import Fisher
from ..likelihoods.registry import families
from ..linearized.links import Link
from ..patterns import Patterns
from .evidence import Precision

__all__ = ["CurvatureConfig", "LaplaceConfig", "LaplaceOptions"]

CurvatureKind = Literal["kfac", "ekfac", "diagonal", "dense"]
CurvatureChoice = Literal["auto", "kfac", "ekfac", "diagonal", "dense", "full"]
FisherChoice = Literal["auto", "exact", "mc", "empirical"]
WeightSharing = Literal["expand", "reduce"]
Subset = Literal["all", "last_layer"]
PriorChoice = Literal["perturbed", "leverage", "marglik", "marglik_per_layer", "holdout"]

if TYPE_CHECKING:
    PatternsField = Patterns
    PrecisionField = Precision | PriorChoice
    DeviceField = torch.device | str
    PathField = str | os.PathLike[str]
else:  # HfArgumentParser reads one type per option
    PatternsField, PrecisionField, DeviceField, PathField = list[str], str, str, str

_CHOICES: dict[str, tuple[str, ...]] = {
    "subset": get_args(Subset),
    "curvature": ("auto", *get_args(CurvatureKind)),
    "fisher": get_args(FisherChoice),
    "weight_sharing": get_args(WeightSharing),
    "link": get_args(Link),
}


@dataclass(frozen=True, kw_only=True)
class LaplaceConfig:
    """The options of `fit`, JSON through `to_dict`; beside `BayesianTrainingArguments` also those of a command line.

    >>> LaplaceConfig.from_dict(LaplaceConfig(curvature="ekfac", temperature=0.5).to_dict()).curvature
    'ekfac'
    """

    likelihood: str | None = field(
        default=None,
        metadata={"help": "classification, multilabel, regression or ordinal; by default that of the model's head."},
    )
    subset: Subset = field(
        default="all", metadata={"help": "all layers, or the last_layer: the layer that the model calls last."}
    )
    target_modules: PatternsField | None = field(
        default=None,
        metadata={"help": "PEFT's patterns of layers to cover instead, Embedding and normalisation layers included."},
    )
    exclude_modules: PatternsField | None = field(
        default=None, metadata={"help": "PEFT's patterns of layers to leave deterministic."}
    )
    curvature: CurvatureChoice = field(
        default="auto",
        metadata={
            "help": "kfac, ekfac (a second pass; more accurate), diagonal, dense (one block per layer, for small ones; "
            "full is its older name); auto: kfac, but the dense GGN of a last layer with at most 5,000 weights."
        },
    )
    fisher: FisherChoice = field(
        default="auto",
        metadata={
            "help": "exact (one backward pass per class but one, and per position), mc (one per label draw), "
            "empirical; auto: exact up to 16 backward passes per batch, else mc."
        },
    )
    weight_sharing: WeightSharing = field(
        default="expand", metadata={"help": "Of layers with several positions: expand or reduce."}
    )
    prior_precision: PrecisionField | None = field(
        default=None,
        metadata={
            "help": "tau, or a mapping from layer name; or how to find it: holdout (least NLL of the linearised "
            "predictive on held-out rows), perturbed (the same, cautiously, on training rows with words masked or "
            "values exchanged), leverage (the evidence's, but no smaller than keeps the leverages of training rows "
            "below 1), marglik (the evidence), one for all layers, or marglik_per_layer. By default holdout where "
            "there are such rows, else perturbed where rows can be, else leverage, of a head with too many logits "
            "for these marglik."
        },
    )
    temperature: float = field(
        default=1.0, metadata={"help": "T of the likelihood p(y | x)^(1/T): below 1 a narrower posterior."}
    )
    link: Link = field(default="auto", metadata={"help": "Link of the predictive that holdout judges."})
    num_batches: int | None = field(
        default=None,
        metadata={"help": "Only so many batches (of each process); the curvature is scaled up to num_data."},
    )
    num_data: int | None = field(
        default=None,
        metadata={
            "help": "N, the examples that the curvature stands for, ignored ones included; by default the dataset's "
            "length."
        },
    )
    num_mc_samples: int = field(default=1, metadata={"help": "Label draws per item of the mc Fisher."})
    device: DeviceField | None = field(
        default=None,
        metadata={
            "help": "Device of the sums and eigenvectors, where the model's own has no room; the posterior lives there "
            "until it is used."
        },
    )
    checkpoint: PathField | None = field(
        default=None,
        metadata={
            "help": "A file for the sums, written every checkpoint_steps batches and at the end. If it exists, the "
            "pass goes on where it stopped: the loader must give the same batches in the same order."
        },
    )
    checkpoint_steps: int = field(default=100, metadata={"help": "Batches between two writes of the checkpoint."})
    progress: bool | None = field(
        default=None, metadata={"help": "Show progress bars; by default yes, in a Trainer unless disable_tqdm is set."}
    )

    def __post_init__(self) -> None:
        if self.curvature == "full":
            object.__setattr__(self, "curvature", "dense")
        for name, allowed in _CHOICES.items():
            check_choice(name, getattr(self, name), allowed)
        if self.likelihood is not None:
            check_choice("likelihood", self.likelihood, families())
        for name in ("num_batches", "num_data", "num_mc_samples", "checkpoint_steps"):
            if getattr(self, name) is not None or name in ("num_mc_samples", "checkpoint_steps"):
                check_count(name, getattr(self, name), 1)
        check_number("temperature", self.temperature, 0.0, strict=True)
        object.__setattr__(self, "prior_precision", _precision(self.prior_precision))
        if self.checkpoint is not None and not isinstance(self.checkpoint, (str, os.PathLike)):
            raise TypeError(f"`checkpoint` must be a path of a file, got {self.checkpoint!r}.")
        try:
            torch.device(self.device or "cpu")
        except (RuntimeError, TypeError) as error:
            raise ValueError(
                f'`device` must be a torch device such as "cpu" or "cuda:0", got {self.device!r}.'
            ) from error

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        values = {f.name: plain(getattr(self, f.name)) for f in fields(self)}
        for name in ("target_modules", "exclude_modules"):
            patterns = values[name]
            values[name] = patterns if patterns is None or isinstance(patterns, str) else list(patterns)
        if isinstance(self.prior_precision, Mapping):
            values["prior_precision"] = {name: plain(tau) for name, tau in self.prior_precision.items()}
        device, checkpoint = self.device, self.checkpoint
        values["device"] = None if device is None else str(device)
        values["checkpoint"] = None if checkpoint is None else os.fspath(checkpoint)
        return values

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LaplaceConfig:
        """Read :meth:`to_dict`; keys of newer versions are ignored."""
        known = {f.name for f in fields(cls)}
        return cls(**{name: value for name, value in data.items() if name in known})


class LaplaceOptions(TypedDict, total=False):
    """`LaplaceConfig`'s fields as keywords: the same names, defaults and meaning."""

    likelihood: str | None
    subset: Subset
    target_modules: Patterns | None
    exclude_modules: Patterns | None
    curvature: CurvatureChoice
    fisher: FisherChoice
    weight_sharing: WeightSharing
    prior_precision: Precision | PriorChoice | None
    temperature: float
    link: Link
    num_batches: int | None
    num_data: int | None
    num_mc_samples: int
    device: torch.device | str | None
    checkpoint: str | os.PathLike[str] | None
    checkpoint_steps: int
    progress: bool | None


@dataclass(frozen=True, kw_only=True)
class CurvatureConfig:
    """How curvature is measured; sums of different configurations do not add.

    Attributes:
        curvature: form of each layer's block; "full", of earlier versions, is read as "dense".
        fisher: "exact": the generalised Gauss-Newton matrix; "mc": its Monte-Carlo estimate from labels that the model
            draws; "empirical": gradients of the given labels, which vanish on an over-fitted model.
        weight_sharing: "expand" or "reduce" (Eschenhagen et al. 2023); reduce makes G = 0 in attention's keys.
        likelihood: of the outputs.
        num_mc_samples: label draws per item of "mc".
        seed: of these draws.
    """

    curvature: CurvatureKind = "kfac"
    fisher: Fisher = "exact"
    weight_sharing: WeightSharing = "expand"
    likelihood: str = "classification"
    num_mc_samples: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.curvature == "full":  # type: ignore[comparison-overlap]
            object.__setattr__(self, "curvature", "dense")


def settled(config: LaplaceConfig | None, options: Mapping[str, Any]) -> LaplaceConfig:
    """Return ``config``, or the defaults, with ``options`` in place of its own fields.

    Raises:
        TypeError: ``config`` is none, or an option is no field of one.
    """
    if not isinstance(config, LaplaceConfig | None):
        raise TypeError(f"`config` must be a LaplaceConfig, got {type(config).__name__}.")
    known = [f.name for f in fields(LaplaceConfig)]
    unknown = [name for name in options if name not in known]
    if unknown:
        raise TypeError(f"`{unknown[0]}` is no option of a Laplace fit; there are {', '.join(known)}.")
    return replace(config or LaplaceConfig(), **options)


def check_precision_choice(value: Any) -> None:
    """Raise ValueError for a string that is no way to find a prior precision."""
    if isinstance(value, str):
        check_choice("prior_precision", value, get_args(PriorChoice))


def _precision(value: Any) -> Any:
    """A number from the command line comes as a string."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            check_precision_choice(value)
            return value
    for name, tau in value.items() if isinstance(value, Mapping) else [("", value)]:
        if tau is not None:
            check_number(f"prior_precision[{name!r}]" if name else "prior_precision", tau, 0.0, strict=True)
    return value
