"""`fit_density`: one pass over the training data, from a model to the densities of its features."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..checks import check_choice, check_count
from ..laplace.data import Batch, Loader
from ..likelihoods import IGNORED, logits_of
from ..posteriors import Posterior
from ..posteriors.heads import known_problem_type
from ..posteriors.predict import as_posterior
from ..processes import gathered, process_index, summed
from .densities import DENSITIES, DensityMethod, check_gaussian_size, from_moments, unit
from .density import FeatureDensity, Part, raw_scores, weight_digests
from .features import Place, Pooling, at_mean, read_features, read_states
from .moments import Moments
from .places import Layer, check_layer, check_pooling, chosen_places

_KEPT_SHARE = 10
_MOST_KEPT = 1000
_WITH_CLASSES = ("mahalanobis", "relative_mahalanobis", "gaussian")


def fit_density(
    model_or_posterior: nn.Module | Posterior,
    dataloader: Iterable[Any],
    *,
    method: DensityMethod | Literal["auto"] = "auto",
    layer: Layer = "auto",
    pooling: Pooling | Literal["auto"] = "auto",
    validation: Iterable[Any] | None = None,
    num_neighbours: int = 10,
    num_references: int = 2048,
    seed: int = 0,
    progress: bool = True,
) -> FeatureDensity:
    """Fit densities of a model's features to its training data, in one pass; afterwards one forward scores an input.

    The score is the sum over places of the standardised logarithms of the distances. "auto" takes the marginal
    Mahalanobis distance, without classes, at every layer above the embeddings and with every pooling that the model
    has: no layer or pooling needs to be chosen, and no unfamiliar text is needed for it. Under a launcher every process
    passes its share; the sums are reduced over all.

    Args:
        model_or_posterior: features are those at the posterior's mean, in ``eval()`` mode.
        dataloader: the training data, as `laplace.fit` takes it; labels are needed for classes only.
        method: see `densities`; "auto": "marginal_mahalanobis".
        layer: number of the hidden states, 0 the embeddings, -1 the last; a module's name; a list of these; or "auto".
        pooling: see `Place`; "auto": all that the model has.
        validation: rows that the network was not trained on, which standardise the parts and give the thresholds; by
            default a tenth of the training rows, at most 1,000, is left out of the densities for it.
        num_neighbours: k of "knn".
        num_references: M, the training rows that "knn" keeps, drawn by ``seed``.
        seed: of these choices.
        progress: whether to show a bar.

    Returns:
        The density.

    Raises:
        TypeError: the layer is no number or name.
        ValueError: an option is unknown, the data are empty, or have no labels that the method needs.

    >>> import torch
    >>> net, x = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)), torch.randn(200, 3)
    >>> density = fit_density(net, [x], layer="0", progress=False)
    >>> density.score(net, x[:4]).shape, bool(density.score(net, x[:1] + 50) > density.threshold(0.1))
    (torch.Size([4]), True)
    """
    check_choice("method", method, ("auto", *DENSITIES))
    check_layer(layer)
    check_pooling(pooling)
    for name, value in (("num_neighbours", num_neighbours), ("num_references", num_references)):
        check_count(name, value, 1)
    check_count("seed", seed, 0)
    if num_neighbours > num_references:
        raise ValueError(f"`num_neighbours` must be at most `num_references`={num_references}, got {num_neighbours!r}.")
    posterior = as_posterior(model_or_posterior)
    known: DensityMethod = "marginal_mahalanobis" if method == "auto" else method
    loader = Loader(posterior.model, dataloader, None, None, progress)
    held_out = None if validation is None else Loader(posterior.model, validation, None, None, progress)
    pass_ = _Pass.begin(posterior, loader, known, layer, pooling, seed)
    pass_.run(loader, num_references, keeps=held_out is None)
    parts = pass_.parts(num_neighbours)
    raw = pass_.kept_scores(parts) if held_out is None else _scores(posterior, held_out, parts)
    return _assembled(posterior.model, parts, raw, pass_.num_rows)


@dataclass(eq=False)
class _Pass:
    """What one pass over the data sums, by place."""

    posterior: Posterior
    method: DensityMethod
    places: list[Place]
    num_classes: int
    moments: dict[Place, Moments]
    generator: torch.Generator
    references: dict[Place, tuple[Tensor, Tensor]] = field(default_factory=dict)
    kept: dict[Place, list[Tensor]] = field(default_factory=dict)
    num_kept: int = 0
    num_rows: int = 0

    @classmethod
    def begin(
        cls, posterior: Posterior, loader: Loader, method: DensityMethod, layer: Layer, pooling: Any, seed: int
    ) -> _Pass:
        """Look at the first batch.

        Args:
            posterior: whose model's features are read.
            loader: of the training data.
            method: of the density.
            layer: as `fit_density` takes it.
            pooling: likewise.
            seed: of the rows that are kept; every process has a stream of its own.

        Returns:
            The sums, still empty.
        """
        batch = loader.first()
        names = None if layer == "auto" else (layer if isinstance(layer, (list, tuple)) else [layer])
        with at_mean(posterior) as model:
            output, states = read_states(model, batch.inputs, names)
            places = chosen_places(model, list(states.values()), layer, pooling)
            features = read_features(model, batch.inputs, places)[1]
        num_classes = _num_classes(posterior.model, output, batch, method)
        if method == "gaussian":
            check_gaussian_size(num_classes, max(value.shape[1] for value in features.values()))
        origins = gathered({place: value.double().mean(0).cpu() for place, value in features.items()})[0]
        moments = {
            place: Moments(num_classes, per_class=method == "gaussian", origin=origins[place]) for place in places
        }
        generator = torch.Generator().manual_seed(seed * 100_003 + process_index())
        return cls(posterior, method, places, num_classes, moments, generator)

    def run(self, loader: Loader, num_references: int, *, keeps: bool) -> None:
        """Pass over the data.

        Args:
            loader: of the training data.
            num_references: how many rows "knn" keeps.
            keeps: whether a tenth of the rows is left out of the density, to calibrate it.
        """
        for batch in loader.batches("Densities"):
            labels = self._labels(batch)
            with at_mean(self.posterior) as model:
                features = read_features(model, batch.inputs, self.places)[1]
            held = torch.rand(len(batch), generator=self.generator) < (1 / _KEPT_SHARE if keeps else 0)
            held &= self.num_kept + held.cumsum(0) <= _MOST_KEPT
            self.num_kept += int(held.sum())
            counts = ~held & (labels.cpu() != IGNORED)
            keys = torch.rand(len(batch), generator=self.generator, dtype=torch.float64)
            for place, values in features.items():
                self.kept.setdefault(place, []).append(values[held.to(values.device)].cpu())
                own, numbers = values[counts.to(values.device)], labels[counts.to(labels.device)]
                if self.method == "knn":
                    self.references[place] = _smallest(
                        [*([self.references[place]] if place in self.references else []), (keys[counts], own.cpu())],
                        num_references,
                    )
                elif len(own):
                    self.moments[place].add(own, numbers)
            self.num_rows += int(counts.sum())
        self._reduce(num_references)

    def parts(self, num_neighbours: int) -> tuple[Part, ...]:
        """The densities of all places, of equal weight."""
        return tuple(
            Part(method=self.method, place=place, tensors=self._tensors(place, num_neighbours)) for place in self.places
        )

    def kept_scores(self, parts: tuple[Part, ...]) -> Tensor:
        """Raw scores of the rows that were left out, of all processes, (parts, n)."""
        rows = [part.raw(torch.cat(self.kept[part.place])).cpu() for part in parts if part.place is not None]
        return torch.cat(gathered(torch.stack(rows)), dim=1)

    def _tensors(self, place: Place, num_neighbours: int) -> dict[str, Tensor]:
        if self.method != "knn":
            try:
                found = from_moments(self.method, self.moments[place])
            except ValueError as error:
                raise ValueError(f"The features at {place}: {error}") from error
            return {name: value.contiguous() for name, value in found.items()}
        references = self.references[place][1]
        if len(references) < num_neighbours:
            raise ValueError(f"`num_neighbours` must be at most the {len(references)} rows, got {num_neighbours}.")
        return {"references": unit(references.double()), "neighbours": torch.tensor(num_neighbours)}

    def _labels(self, batch: Batch) -> Tensor:
        if self.num_classes == 1:
            return torch.zeros(len(batch), dtype=torch.long)
        if batch.labels is None or batch.labels.dim() != 1:
            raise ValueError(f"`method`={self.method!r} needs a label for every row; a batch of `dataloader` has none.")
        labels = batch.labels.long()
        if bool(((labels != IGNORED) & ((labels < 0) | (labels >= self.num_classes))).any()):
            raise ValueError(f"`labels` must be classes 0..{self.num_classes - 1} or {IGNORED}.")
        return labels

    def _reduce(self, num_references: int) -> None:
        self.num_rows = int(summed(torch.tensor(self.num_rows)))
        if self.method != "knn":
            for place in self.places:
                self.moments[place].all_reduce()
            return
        for place in self.places:
            self.references[place] = _smallest(gathered(self.references[place]), num_references)


def _smallest(samples: list[tuple[Tensor, Tensor]], count: int) -> tuple[Tensor, Tensor]:
    """Of random keys and their rows those with the smallest keys: a uniform sample, however it was streamed."""
    keys, rows = (torch.cat(parts) for parts in zip(*samples, strict=True))
    order = keys.argsort(stable=True)[:count]
    return keys[order], rows[order]


def _num_classes(model: nn.Module, output: Any, batch: Batch, method: str) -> int:
    """1 where the density has no classes."""
    problem = known_problem_type(model)
    is_classified = problem == "single_label_classification" and batch.labels is not None
    if method not in _WITH_CLASSES or (method == "mahalanobis" and not is_classified):
        return 1
    if not is_classified:
        raise ValueError(
            f"`method`={method!r} needs classes: a single-label classifier and labels in `dataloader`, got a "
            f"{problem!r} head{'' if batch.labels is not None else ' and no labels'}; take 'marginal_mahalanobis'."
        )
    return int(logits_of(output).shape[-1])


def _scores(posterior: Posterior, loader: Loader, parts: tuple[Part, ...]) -> Tensor:
    """Raw scores of the loader's rows, of all processes, (parts, n)."""
    rows = [raw_scores(posterior, batch.inputs, parts).cpu() for batch in loader.batches("Calibration")]
    return torch.cat(gathered(torch.cat(rows, dim=1) if rows else torch.empty(len(parts), 0)), dim=1)


def _assembled(model: nn.Module, parts: tuple[Part, ...], raw: Tensor, num_rows: int) -> FeatureDensity:
    """Standardise the parts, and their sum."""
    if raw.shape[1] < 2:
        raise ValueError(
            f"{raw.shape[1]} rows are left to standardise the scores by, of {num_rows}: give `validation` rows."
        )
    parts = tuple(part.calibrated(row) for part, row in zip(parts, raw, strict=True))
    density = FeatureDensity(parts=parts, calibration=raw[0], digests=weight_digests(model), num_rows=num_rows)
    total = density.score_raw(raw)
    spread = float(total.std(correction=0))
    parts = tuple(replace(part, weight=1.0 / spread) for part in parts)
    density = replace(density, parts=parts)
    return replace(density, calibration=density.score_raw(raw))
