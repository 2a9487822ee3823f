"""`FeatureDensity`: what a pass over the training data leaves, by which one forward pass scores inputs."""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_number, is_finite
from ..forward import Inputs, batch_size, check_filled
from ..posteriors import Posterior
from ..posteriors.heads import without_labels
from ..posteriors.predict import as_posterior
from ..storage import check_whole, folder, read, weight_digests, write
from .densities import DENSITIES, distance
from .features import Place, at_mean, read_features
from .predictions import PREDICTIONS, point_prediction, prediction_score
from .thresholds import threshold

FILE = "density.safetensors"

_Versions = tuple[Any, ...]
"""A model, and the place and the number of in-place changes of all that is in its state."""

_POSITIVE = ("marginal_mahalanobis", "mahalanobis", "knn")  # whose logarithm is taken: distances are skewed


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """One score: w (max(g(d), low) - loc) / scale, with g the logarithm of a distance, else the identity.

    Attributes:
        method: of `densities`, or of `predictions`.
        place: where its features are read; None of a prediction's score.
        tensors: of a density.
        loc: mean of g(d) over calibration rows.
        scale: its standard deviation there, > 0.
        low: the least g(d) of a calibration row: nothing is more familiar than what is. Energies and relative distances
            fall without end as features grow, which is no sign of familiarity.
        weight: w.
    """

    method: str
    place: Place | None = None
    tensors: Mapping[str, Tensor]
    loc: float = 0.0
    scale: float = 1.0
    low: float = -math.inf
    weight: float = 1.0

    def is_like(self, other: Part) -> bool:
        """Whether it is the same score, whatever its weight."""
        return (self.method, self.place) == (other.method, other.place)

    def raw(self, features: Tensor, known: dict[int, Tensor] | None = None) -> Tensor:
        """g(d) of features (B, D), (B,); ``known``: distances that parts of the same place share."""
        found = distance(self.method, features, self.tensors, known)
        return found.clamp_min(torch.finfo(found.dtype).tiny).log() if self.method in _POSITIVE else found

    def standardized(self, raw: Tensor) -> Tensor:
        """The part's share of the score, (B,)."""
        return self.weight * (raw.clamp_min(self.low) - self.loc) / self.scale

    def calibrated(self, raw: Tensor) -> Part:
        """Take mean and deviation of ``raw`` (n,) of calibration rows.

        Returns:
            The part with them.

        Raises:
            ValueError: all rows have one score.
        """
        loc, scale = float(raw.mean()), float(raw.std(correction=0))
        if not is_finite(loc) or not is_finite(scale) or scale <= 0:
            raise ValueError(
                f"The score {self.method!r} of {self.place or 'the prediction'} is {loc:g} for all {len(raw)} "
                "calibration rows, or not finite: it tells nothing."
            )
        return replace(self, loc=loc, scale=scale, low=float(raw.min()))


@dataclass(frozen=True, kw_only=True, eq=False)
class FeatureDensity:
    """How familiar inputs are to a model, by the densities of its features: one forward pass, higher for less familiar.

    Made by :func:`~bayeformers.ood.fit_density`. The score is a sum of standardised parts; a single part too is in
    standard deviations from the mean of the calibration rows.

    Attributes:
        parts: the scores that are summed.
        calibration: scores of rows that the densities were not fitted to, (n,).
        digests: of the model's weights, by name.
        num_rows: N, the training rows that were summed, of all processes.
    """

    parts: tuple[Part, ...]
    calibration: Tensor
    digests: Mapping[str, str]
    num_rows: int
    _known: list[_Versions] = field(default_factory=list, init=False, repr=False)  # weights that were compared last

    def __str__(self) -> str:
        """Its parts in words."""
        return " + ".join(f"{part.method} ({part.place or 'prediction'})" for part in self.parts)

    def score(self, model_or_posterior: nn.Module | Posterior, inputs: Inputs) -> Tensor:
        """Score inputs by one forward pass at the posterior's mean.

        Args:
            model_or_posterior: the one that the density was fitted to.
            inputs: what its forward takes; labels are ignored.

        Returns:
            (B,), higher for the less familiar; infinity where features are not finite, which no threshold lets pass.

        Raises:
            ValueError: the batch is empty, or the model has other weights than those that the density was fitted to.
        """
        posterior = as_posterior(model_or_posterior)
        self.check_weights(posterior.model)
        inputs = without_labels(posterior.model, inputs)
        check_filled(inputs)
        scores = self.score_raw(raw_scores(posterior, inputs, self.parts))
        return scores.masked_fill(scores.isnan(), math.inf)

    def check_weights(self, model: nn.Module) -> None:
        """Raise ValueError unless the weights are those of the fit; hashed only if they may have changed since."""
        versions = _versions(model)
        if versions not in self._known:
            check_same_weights(model, self.digests)
            self._known[:] = [versions]

    def score_raw(self, raw: Tensor) -> Tensor:
        """Add the parts' raw scores, (parts, B), up: (B,)."""
        return torch.stack([part.standardized(row) for part, row in zip(self.parts, raw, strict=True)]).sum(0)

    def threshold(self, false_alarm_rate: float = 0.05) -> float:
        """Return the score above which an input is flagged: `bayeformers.ood.threshold` of the calibration rows.

        Rows of the training data that were left out of the density are familiar to the network too: give `fit_density`
        ``validation`` rows for a rate that holds.

        Args:
            false_alarm_rate: the share of familiar inputs that are flagged, at most.
        """
        return threshold(self.calibration, false_alarm_rate)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write ``density.safetensors``, beside the model's own files."""
        tensors = {f"{i}/{name}": value for i, part in enumerate(self.parts) for name, value in part.tensors.items()}
        parts = [
            {
                "method": part.method,
                "layer": None if part.place is None else part.place.layer,
                "pooling": None if part.place is None else part.place.pooling,
                "tensors": sorted(part.tensors),
                **{name: getattr(part, name).hex() for name in _NUMBERS},
            }
            for part in self.parts
        ]
        meta = {"parts": parts, "digests": dict(self.digests), "num_rows": self.num_rows}
        write(folder(directory) / FILE, tensors | {"calibration": self.calibration}, meta, kind="density")

    @classmethod
    def load(cls, directory: str | os.PathLike[str], model: nn.Module) -> FeatureDensity:
        """Read what `save` wrote, bit for bit, onto the model's device.

        Args:
            directory: the folder.
            model: the model that it was fitted to.

        Returns:
            The density.

        Raises:
            TypeError: ``model`` is no module, or ``directory`` no path.
            ValueError: there is no such file, it is damaged, or was fitted to other weights.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"`model` must be a torch.nn.Module, got {type(model).__name__}.")
        path = folder(directory) / FILE
        tensors, meta = read(path, kind="density")
        check_same_weights(model, meta["digests"])
        check_whole(tensors, {"calibration"} | _expected(meta["parts"]), f"{str(path)!r}")
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        parts = tuple(_part(i, row, tensors, device, str(path)) for i, row in enumerate(meta["parts"]))
        return cls(
            parts=parts, calibration=tensors["calibration"], digests=meta["digests"], num_rows=int(meta["num_rows"])
        )


_NUMBERS = ("loc", "scale", "low", "weight")


def _versions(model: nn.Module) -> _Versions:
    state = model.state_dict(keep_vars=True).values()
    return (weakref.ref(model), *((value.data_ptr(), value._version) for value in state if isinstance(value, Tensor)))


def check_same_weights(model: nn.Module, expected: Mapping[str, str]) -> None:
    """Raise ValueError unless the model's state is the one whose digests are given."""
    found = weight_digests(model)
    other = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
    if other:
        raise ValueError(
            f"The density was fitted to other weights: {other[:3]} ({len(other)}) in the model are not those. Load the "
            "model that it was fitted to, in the same dtype, or fit again."
        )


def raw_scores(posterior: Posterior, inputs: Inputs, parts: tuple[Part, ...]) -> Tensor:
    """One forward pass: the raw scores of every part, (parts, B)."""
    with at_mean(posterior) as model:
        output, features = read_features(model, inputs, {part.place for part in parts if part.place is not None})
    known: dict[Place, dict[int, Tensor]] = {place: {} for place in features}
    rows = []
    for part in parts:
        if part.place is not None:
            rows.append(part.raw(features[part.place], known[part.place]))
        else:
            rows.append(prediction_score(part.method, point_prediction(posterior, output, inputs)))
    found = torch.stack([row.to(rows[0]) for row in rows])
    size = batch_size(inputs)
    if found.shape[1] != size:
        raise ValueError(f"The model gives {found.shape[1]} scores for {size} examples: features need one each.")
    return found


def _expected(parts: list[dict[str, Any]]) -> set[str]:
    return {f"{i}/{name}" for i, part in enumerate(parts) for name in part["tensors"]}


def _part(i: int, row: Mapping[str, Any], tensors: Mapping[str, Tensor], device: torch.device, path: str) -> Part:
    if row["method"] not in (*DENSITIES, *PREDICTIONS):
        raise ValueError(f"{path!r} has a score {row['method']!r} that this bayeformers does not know.")
    numbers = {name: float.fromhex(row[name]) for name in _NUMBERS}
    check_number("scale", numbers["scale"], 0.0, strict=True)
    place = None if row["pooling"] is None else Place(row["layer"], row["pooling"])
    own = {name: tensors[f"{i}/{name}"].to(device) for name in row["tensors"]}
    return Part(method=row["method"], place=place, tensors=own, **numbers)
