"""`fit_density`: one pass over the training data, from a model to the densities of its features."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..checks import check_choice, check_count
from ..forward import Inputs, batch_size, mapped, rows
from ..laplace.data import Batch, Loader
from ..likelihoods import IGNORED, logits_of
from ..posteriors import Posterior
from ..posteriors.heads import known_problem_type
from ..posteriors.predict import as_posterior
from ..processes import gathered, process_index, summed
from ..storage import weight_digests
from .choice import standardized, weighted
from .densities import DENSITIES, DensityMethod, check_gaussian_size, from_moments, unit
from .density import FeatureDensity, Part, raw_scores
from .features import Place, Pooling, at_mean, read_features, read_states
from .made_up import KINDS, can_be_made_up, made_up
from .moments import Moments
from .places import Layer, check_layer, check_pooling, chosen_places, listed

logger = logging.getLogger(__name__)

_KEPT_SHARE = 10
_MOST_KEPT = 1000
_MOST_MADE_UP = 500
_WITH_CLASSES = ("mahalanobis", "relative_mahalanobis", "gaussian")


def fit_density(
    model_or_posterior: nn.Module | Posterior,
    dataloader: Iterable[Any],
    *,
    method: DensityMethod | Literal["auto"] = "auto",
    layer: Layer = "auto",
    pooling: Pooling | Literal["auto"] = "auto",
    validation: Iterable[Any] | None = None,
    outliers: Iterable[Any] | None = None,
    num_neighbours: int = 10,
    num_references: int = 2048,
    seed: int = 0,
    progress: bool = True,
) -> FeatureDensity:
    """Fit densities of a model's features to its training data, in one pass; afterwards one forward scores an input.

    The score is a weighted sum of standardised parts, one per layer and pooling. "auto" takes three families of parts:
    the marginal Mahalanobis distance, which needs no classes, the relative one, and the energy of the logits, the last
    two of classifiers with labels in ``dataloader``; all layers above the embeddings and all poolings that the model
    has; and the families' weights by how well they tell the calibration rows from unfamiliar inputs that are made up of
    them (tokens shuffled, replaced, two rows mixed: see `made_up`); of inputs that are no token ids, the first family
    alone. So nothing needs to be chosen, and no unfamiliar
    text is needed for it. Under a launcher every process passes its share; the sums are reduced over all.

    Args:
        model_or_posterior: features are those at the posterior's mean, in ``eval()`` mode.
        dataloader: the training data, as `laplace.fit` takes it; labels are needed for classes only.
        method: see `densities`; or "auto".
        layer: number of the hidden states, 0 the embeddings, -1 the last; a module's name; a list of these; or "auto".
        pooling: see `Place`; "auto": all that the model has.
        validation: rows that the network was not trained on, which standardise the parts and give the thresholds; by
            default a tenth of the training rows, at most 1,000, is left out of the densities for it.
        outliers: unfamiliar inputs, in place of those that are made up; never those that are to be scored. Of "auto".
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
    if outliers is not None and method != "auto":
        raise ValueError(f'`outliers` choose the weights of `method`="auto", so leave out one of them, got {method!r}.')
    posterior = as_posterior(model_or_posterior)
    loader = Loader(posterior.model, dataloader, None, None, progress)
    held_out = None if validation is None else Loader(posterior.model, validation, None, None, progress)
    shifted = None if outliers is None else Loader(posterior.model, outliers, None, None, progress)
    fitting = _Pass.begin(posterior, loader, method, layer, pooling, seed)
    fitting.run(loader, num_references, keeps=held_out is None)
    parts = fitting.parts(num_neighbours)
    familiar = fitting.kept if held_out is None else [batch.inputs for batch in held_out.batches("Calibration")]
    raw = _scores(posterior, familiar, parts)
    parts = tuple(standardized(parts, raw))
    unfamiliar = dict[str, Tensor]()
    if len({part.method for part in parts}) > 1:
        batches = _unfamiliar(familiar, shifted, seed)
        unfamiliar = {kind: _scores(posterior, inputs, parts) for kind, inputs in batches.items()}
    elif outliers is not None:
        logger.warning("`outliers` have no say: rows of no or one class leave a single family, and nothing to weigh.")
    density = FeatureDensity(
        parts=parts, calibration=raw[0], digests=weight_digests(posterior.model), num_rows=fitting.num_rows
    )
    kept = weighted(parts, raw, unfamiliar)
    is_kept = [any(part.is_like(each) for each in kept) for part in parts]
    density = replace(density, parts=kept)
    return replace(density, calibration=density.score_raw(raw[is_kept]))


@dataclass(eq=False)
class _Pass:
    """What one pass over the data sums, by place."""

    posterior: Posterior
    methods: tuple[str, ...]
    places: list[Place]
    num_classes: int
    moments: dict[Place, Moments]
    generator: torch.Generator
    dtype: torch.dtype
    references: dict[Place, tuple[Tensor, Tensor]] = field(default_factory=dict)
    kept: list[Inputs] = field(default_factory=list)
    num_kept: int = 0
    num_rows: int = 0

    @classmethod
    def begin(cls, posterior: Posterior, loader: Loader, method: str, layer: Layer, pooling: Any, seed: int) -> _Pass:
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
        names = None if layer == "auto" else listed(layer)
        with at_mean(posterior) as model:
            output, states = read_states(model, batch.inputs, names)
            places = chosen_places(model, list(states.values()), layer, pooling)
            features = read_features(model, batch.inputs, places)[1]
        methods, num_classes = _methods(posterior.model, output, batch, method)
        if method == "gaussian":
            check_gaussian_size(num_classes, max(value.shape[1] for value in features.values()))
        origins = gathered({place: value.double().mean(0).cpu() for place, value in features.items()})[0]
        moments = {
            place: Moments(num_classes, per_class=method == "gaussian", origin=origins[place]) for place in places
        }
        generator = torch.Generator().manual_seed(seed * 100_003 + process_index())
        dtype = torch.promote_types(features[places[0]].dtype, torch.float32)
        return cls(posterior, methods, places, num_classes, moments, generator, dtype)

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
            if bool(held.any()):
                self.num_kept += int(held.sum())
                self.kept.append(mapped(rows(batch.inputs, held, len(batch)), Tensor.cpu))
            counts = ~held & (labels.cpu() != IGNORED)
            self.num_rows += int(counts.sum())
            keys = torch.rand(len(batch), generator=self.generator, dtype=torch.float64)[counts]
            for place, values in features.items():
                own, numbers = values[counts.to(values.device)], labels[counts.to(labels.device)]
                if self.methods == ("knn",):
                    former = [self.references[place]] if place in self.references else []
                    self.references[place] = _smallest([*former, (keys, own.cpu())], num_references)
                elif len(own):
                    self.moments[place].add(own, numbers)
        self._reduce(num_references)

    def parts(self, num_neighbours: int) -> tuple[Part, ...]:
        """The densities of all places, family by family; they share their tensors."""
        if (
            len(self.methods) > 1 and int((self.moments[self.places[0]].counts > 0).sum()) == 1
        ):  # none to be relative to
            self.methods = tuple(method for method in self.methods if method != "relative_mahalanobis")
        tensors = {place: self._tensors(place, num_neighbours) for place in self.places}
        found = [
            Part(method=method, place=place, tensors=tensors[place][method])
            for method in self.methods
            if method in DENSITIES
            for place in self.places
        ]
        return (*found, *(Part(method=method, tensors={}) for method in self.methods if method not in DENSITIES))

    def _tensors(self, place: Place, num_neighbours: int) -> dict[str, dict[str, Tensor]]:
        if self.methods == ("knn",):
            references = self.references[place][1]
            if len(references) < num_neighbours:
                raise ValueError(f"`num_neighbours` must be at most the {len(references)} rows, got {num_neighbours}.")
            return {"knn": {"references": unit(references.to(self.dtype)), "neighbours": torch.tensor(num_neighbours)}}
        try:
            found = from_moments(self.methods, self.moments[place])
        except ValueError as error:
            raise ValueError(f"The features at {place}: {error}") from error
        same: dict[int, Tensor] = {}  # tensors that two methods share stay one
        return {
            method: {name: same.setdefault(id(value), value.to(self.dtype).contiguous()) for name, value in own.items()}
            for method, own in found.items()
        }

    def _labels(self, batch: Batch) -> Tensor:
        if self.num_classes == 1:
            return torch.zeros(len(batch), dtype=torch.long)
        if batch.labels is None or batch.labels.dim() != 1:
            raise ValueError(
                f"`method`={self.methods[0]!r} needs a label for every row; a batch of `dataloader` has none."
            )
        labels = batch.labels.long()
        if bool(((labels != IGNORED) & ((labels < 0) | (labels >= self.num_classes))).any()):
            raise ValueError(f"`labels` must be classes 0..{self.num_classes - 1} or {IGNORED}.")
        return labels

    def _reduce(self, num_references: int) -> None:
        self.num_rows = int(summed(torch.tensor(self.num_rows)))
        for place in self.places:
            if self.methods == ("knn",):
                self.references[place] = _smallest(gathered(self.references[place]), num_references)
            else:
                self.moments[place].all_reduce()


def _smallest(samples: list[tuple[Tensor, Tensor]], count: int) -> tuple[Tensor, Tensor]:
    """Of random keys and their rows those with the smallest keys: a uniform sample, however it was streamed."""
    keys, values = (torch.cat(parts) for parts in zip(*samples, strict=True))
    order = keys.argsort(stable=True)[:count]
    return keys[order], values[order]


def _methods(model: nn.Module, output: Any, batch: Batch, method: str) -> tuple[tuple[str, ...], int]:
    """The families of parts, and the number of classes; 1 where the density has none."""
    problem = known_problem_type(model)
    is_classified = problem == "single_label_classification" and batch.labels is not None and batch.labels.dim() == 1
    if method == "auto":
        if not is_classified:
            return ("marginal_mahalanobis",), 1
        return ("marginal_mahalanobis", "relative_mahalanobis", "energy"), int(logits_of(output).shape[-1])
    if method not in _WITH_CLASSES or (method == "mahalanobis" and not is_classified):
        return (method,), 1
    if not is_classified:
        raise ValueError(
            f"`method`={method!r} needs classes: a single-label classifier and labels in `dataloader`, got a "
            f"{problem!r} head{'' if batch.labels is not None else ' and no labels'}; take 'marginal_mahalanobis'."
        )
    return (method,), int(logits_of(output).shape[-1])


def _scores(posterior: Posterior, batches: Iterable[Inputs], parts: tuple[Part, ...]) -> Tensor:
    """Raw scores of all rows, of all processes, (parts, n), in float64."""
    device = next((parameter.device for parameter in posterior.model.parameters()), torch.device("cpu"))
    found = [raw_scores(posterior, mapped(inputs, lambda t: t.to(device)), parts).cpu().double() for inputs in batches]
    own = torch.cat(found, dim=1) if found else torch.empty(len(parts), 0, dtype=torch.float64)
    return torch.cat(gathered(own), dim=1)


def _unfamiliar(familiar: list[Inputs], given: Loader | None, seed: int) -> dict[str, list[Inputs]]:
    """Batches by kind: those given, or made up of some familiar rows; none of inputs that are no token ids."""
    if given is not None:
        outliers = [batch.inputs for batch in given.batches("Outliers")]
        if not any(gathered(len(outliers))):
            raise ValueError("`outliers` is empty: it must give at least one batch.")
        return {"given": outliers}
    if not familiar or not all(map(can_be_made_up, familiar)):
        return {}
    sizes = torch.tensor([batch_size(inputs) for inputs in familiar]).cumsum(0)
    some = familiar[: int((sizes < _MOST_MADE_UP).sum()) + 1]
    return {kind: made_up(some, kind, seed) for kind in KINDS}
