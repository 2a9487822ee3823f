"""`MixturePosterior`: several posteriors at once, such as one Laplace posterior per member of an ensemble."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checks import check_count, check_draw, is_finite
from ..forward import Inputs
from ..likelihoods import NoiseStd, ProblemType
from ..linearized.methods import SAMPLING
from ..predictive.mixture import MixturePredictive, mixture_of
from ..storage import check_whole, difference, file_digests, folder, read, saved_file, write
from .base import BasePosterior
from .files import load_beside, register_posterior
from .point import PointPosterior

__all__ = ["MixturePosterior"]

FILE = "mixture.safetensors"
_KIND = "mixture"
_MODEL_FILES = "model*.safetensors"


@register_posterior
class MixturePosterior(BasePosterior):
    """The mixture sum_k w_k q_k of posteriors q_k, which may be around different models or around one.

    A prediction is the mixture of the components' own, each by its own method: p = sum_k w_k p_k, where p_k is, for
    example, the linearised prediction of a Laplace posterior. A mixture of Laplace posteriors around the members of an
    ensemble (Eschenhagen et al. 2021, arXiv 2111.03577) sees the spread within a mode and between the modes.

    Args:
        components: K >= 1 posteriors, of models for one task.
        weights: K numbers > 0, which need not sum to 1; None: all the same.

    Raises:
        TypeError: ``components`` is no sequence of posteriors.
        ValueError: there is none, the weights are not K finite numbers > 0, or the heads are of different kinds.

    >>> model = nn.Linear(2, 3)
    >>> mixture = MixturePosterior([PointPosterior(model), PointPosterior(nn.Linear(2, 3))], weights=[3, 1])
    >>> mixture.num_draws, mixture.weights, mixture.predict(torch.ones(1, 2)).probs.shape
    (2, (0.75, 0.25), torch.Size([1, 3]))
    """

    file_name = FILE
    wraps = True
    predicts_itself = True

    def __init__(self, components: Sequence[BasePosterior], weights: Sequence[float] | None = None) -> None:
        self.components = _checked(components)
        self.weights = _normalised(weights, len(self.components))
        self.model = self.components[0].model
        linear = [c.default_method for c in self.components if c.default_method not in SAMPLING]
        self.default_method = linear[0] if linear else "sample"

    def __repr__(self) -> str:
        parts = ", ".join(f"{w:.3g} {type(c).__name__}" for w, c in zip(self.weights, self.components, strict=True))
        return f"MixturePosterior({parts})"

    # -- a posterior -------------------------------------------------------------------------------------------------

    @property
    def num_draws(self) -> int | None:  # type: ignore[override]
        """All that the components have; None: unlimited."""
        counts = [component.num_draws for component in self.components]
        return None if None in counts else sum(count for count in counts if count is not None)

    def mean(self) -> AbstractContextManager[None]:
        """Not offered: the average of several networks' weights is none of them.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("A mixture has no mean network: take one of `components`, or predict.")

    def draw(self, index: int, seed: int = 0) -> AbstractContextManager[None]:
        """The draw that `place` names, in that component's own model; the components take turns."""
        component, inner = self.place(index)
        check_draw(index, seed)
        return component.draw(inner, seed)

    def place(self, index: int) -> tuple[BasePosterior, int]:
        """The component of draw ``index``, and which of its own draws it is; one without more is passed over."""
        check_draw(index, 0, self.num_draws)
        turn = 0
        while True:
            left = [c for c in self.components if c.num_draws is None or c.num_draws > turn]
            if index < len(left):
                return left[index], turn
            index, turn = index - len(left), turn + 1

    def random_parameters(self) -> Iterable[nn.Parameter]:
        """Those of all components."""
        found = {id(p): p for component in self.components for p in component.random_parameters()}
        return list(found.values())

    def is_of_present_weights(self) -> bool:
        """Whether every component's model has the weights that it goes with."""
        return all(component.is_of_present_weights() for component in self.components)

    def problem_type(self) -> ProblemType:
        """That of the components."""
        return self.components[0].problem_type()

    def recorded_noise_std(self) -> NoiseStd | None:
        """None: every component knows its own."""
        return None

    def passes(self, inputs: Inputs, *, num_samples: int = 16, seed: int = 0) -> Iterator[Any]:
        """Return the outputs under as many draws of each component, in turns: their plain average is the mixture.

        Args:
            inputs: what the models' ``forward`` takes.
            num_samples: how many draws in all; rounded down to a multiple of K, and at least K.
            seed: of the draws.

        Raises:
            ValueError: the weights are not equal, so that no plain average of draws is the mixture.
        """
        check_count("num_samples", num_samples, 1)
        if len(set(self.weights)) > 1:
            raise ValueError(f"`passes` of a mixture needs equal `weights`, got {self.weights}; use `predict`.")
        counts = [component.num_draws for component in self.components if component.num_draws is not None]
        each = max(1, min([num_samples // len(self.components), *counts]))
        runs = [component.passes(inputs, num_samples=each, seed=seed) for component in self.components]
        return (output for outputs in zip(*runs, strict=True) for output in outputs)

    def predict(
        self, inputs: Inputs, *, num_samples: int = 16, method: str | None = None, seed: int = 0, **options: Any
    ) -> MixturePredictive:
        """Return the mixture of the components' predictions.

        Args:
            inputs: what every model's ``forward`` takes; labels are ignored.
            num_samples: how many draws in all, shared out evenly; every component makes at least one.
            method: of all components; None: each by its own default, such as "glm" of a Laplace posterior.
            seed: draw j of a component is its draw j of this seed.
            **options: as of `BasePosterior.predict`, handed to every component.
        """
        check_count("num_samples", num_samples, 1)
        count = len(self.components)
        parts = [
            component.predict(
                inputs,
                num_samples=max(1, num_samples // count + (place < num_samples % count)),
                method=method,
                seed=seed,
                **options,
            )
            for place, component in enumerate(self.components)
        ]
        return mixture_of(parts, self.weights)

    # -- persistence -------------------------------------------------------------------------------------------------

    def save(self, directory: str | PathLike[str]) -> None:
        """Write ``mixture.safetensors``, beside the first component's model, and a folder ``component_k`` of each.

        A component around another model has that model's weights in its folder too.

        Raises:
            ValueError: a component of a kind that cannot be saved, or around a model of another class than the first's.
        """
        for component in self.components:
            self._check_savable(component)
        place = folder(directory)
        records = [self._save_component(c, place / _name(number)) for number, c in enumerate(self.components)]
        weights = torch.tensor(self.weights, dtype=torch.float64)
        write(place / FILE, {"weights": weights}, {"components": records}, kind=_KIND)

    def _check_savable(self, component: BasePosterior) -> None:
        if component.file_name is None and type(component) is not PointPosterior:
            raise ValueError(f"`components`: a {type(component).__name__} is not saved beside its model.")
        other, kind = component.model, type(self.model)
        if other is not self.model and (type(other) is not kind or not hasattr(other, "save_pretrained")):
            raise ValueError(
                "`components`: their models are saved along where all are of one transformers class, got "
                f"{kind.__name__} and {type(other).__name__}."
            )

    def _save_component(self, component: BasePosterior, place: Path) -> dict[str, Any]:
        digests = None
        shutil.rmtree(place, ignore_errors=True)  # of an earlier mixture
        place.mkdir(parents=True)
        if component.model is not self.model:
            component.model.save_pretrained(place)  # type: ignore[operator]
            digests = file_digests(sorted(place.glob(_MODEL_FILES)))
        if component.file_name is not None:
            component.save(place)
        return {"file": component.file_name, "digests": digests}

    @classmethod
    def load(cls, directory: str | PathLike[str], model: nn.Module) -> MixturePosterior:
        """Return what `save` wrote.

        Args:
            directory: the folder, or the file in it.
            model: the first component's model, with the weights that it had; other models are read from their folders.

        Raises:
            ValueError: a file is missing, damaged or changed.
        """
        path = saved_file(directory, FILE)
        tensors, meta = read(path, kind=_KIND)
        check_whole(tensors, ["weights"], f"{str(path)!r}")
        components = [
            _load_component(path.parent / _name(number), record, model)
            for number, record in enumerate(meta["components"])
        ]
        found = cls(components)
        found.weights = tuple(tensors["weights"].tolist())  # bit by bit
        return found


def _name(number: int) -> str:
    return f"component_{number}"


def _load_component(place: Path, record: dict[str, Any], model: Any) -> BasePosterior:
    if record["digests"] is not None:
        told = difference(file_digests(sorted(place.glob(_MODEL_FILES))), record["digests"])
        if told is not None:
            raise ValueError(f"{str(place)!r} is not what was saved: of the tensors that were written it {told}.")
        device = next(model.parameters()).device
        model = type(model).from_pretrained(place).to(device).eval()
    return load_beside(place, record["file"], model)


def _checked(components: Any) -> tuple[BasePosterior, ...]:
    if isinstance(components, (str, bytes)) or not isinstance(components, Sequence):
        raise TypeError(f"`components` must be a list of posteriors, got {type(components).__name__}.")
    if not components:
        raise ValueError("`components` must hold at least one posterior, got none.")
    for component in components:
        if not isinstance(component, BasePosterior):
            raise TypeError(f"`components` must be posteriors, got {type(component).__name__}.")
    kinds = {component.problem_type() for component in components}
    if len(kinds) > 1:
        raise ValueError(f"`components` must be of models with one kind of head, got {sorted(kinds)}.")
    return tuple(components)


def _normalised(weights: Any, count: int) -> tuple[float, ...]:
    """To the sum 1."""
    given = [1.0] * count if weights is None else weights
    if isinstance(given, (str, bytes)) or not isinstance(given, Sequence) or len(given) != count:
        raise ValueError(f"`weights` must be {count} numbers, one for each of the `components`, got {weights!r}.")
    for weight in given:
        if not is_finite(weight) or weight <= 0:
            raise ValueError(f"`weights` must be finite numbers > 0, got {weight!r}.")
    return tuple(float(weight) / math.fsum(given) for weight in given)
