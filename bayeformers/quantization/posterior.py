"""`QuantizedPosterior`: the draws of a float posterior, from INT8 means and scales."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_draw
from ..laplace.moved import holding
from ..likelihoods import NoiseStd, ProblemType
from ..posteriors.base import BasePosterior
from ..sampling.views import View, alone
from .drawn import Drawn
from .install import Weight
from .layers import QuantizedLayer
from .noise import Noise
from .report import Report
from .saving import save

DEFAULT_DRAW_CACHE_BYTES = 2 * 2**30


@dataclass(frozen=True, eq=False)
class _Moved:
    """One draw: INT8 weights by name, and how far the float tensors move."""

    drawn: Mapping[str, Drawn]
    others: Mapping[nn.Parameter, Tensor]

    @property
    def nbytes(self) -> int:
        return sum(one.nbytes for one in self.drawn.values()) + sum(value.nbytes for value in self.others.values())


class QuantizedPosterior(BasePosterior):
    """A posterior whose weights and scales are INT8, as `quantize` and `load` make it.

    Draw ``index`` of ``seed`` has the noise of the float posterior's draw, so that the two can be compared one by one.
    It predicts by sampling; linearised methods need the float weights.

    Attributes:
        model: a copy of the original with INT8 layers; inference only.
        noise: what the draws are made of.
        weights: the INT8 weights and the layers that use them.
        report: what became of each layer.
        draw_cache_bytes: memory in which draws are kept for the next batch, INT8 themselves.
    """

    draws_in_views = True

    def __init__(
        self,
        model: nn.Module,
        noise: Noise,
        weights: Sequence[Weight],
        report: Report,
        *,
        problem_type: ProblemType,
        noise_std: NoiseStd | None = None,
        draw_cache_bytes: int = DEFAULT_DRAW_CACHE_BYTES,
    ) -> None:
        self.model, self.noise, self.weights, self.report = model, noise, list(weights), report
        self.draw_cache_bytes = draw_cache_bytes
        self.num_draws = None if noise.names else 1
        self._problem_type, self._noise_std = problem_type, noise_std
        self._by_name = {weight.name: weight for weight in weights}
        self._cache: dict[tuple[int, int, str], _Moved] = {}

    def __repr__(self) -> str:
        count = sum(weight.codes.codes.numel() for weight in self.weights)
        return f"QuantizedPosterior({self.noise.kind}, {len(self.weights)} INT8 weights of {count:,} numbers)"

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_cache": {}}

    def mean(self) -> AbstractContextManager[None]:
        """The model as it is."""
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def draw(self, index: int, seed: int = 0) -> Iterator[None]:
        """The model at draw ``index`` of the sequence ``seed``, until exit.

        Raises:
            TypeError, ValueError: ``index`` is no whole number >= 0, or not 0 of a point estimate; ``seed`` is no whole
                number.
        """
        check_draw(index, seed, self.num_draws)
        key = index, seed, str(next(self.model.parameters()).device)
        moved = self._cache.get(key) or self._make(index, seed)
        with alone(self.model), self._held(moved.drawn), holding(moved.others):
            yield
        self._keep(key, moved)

    def own_parameters(self) -> Mapping[nn.Parameter, nn.Parameter]:
        """Room in a view for its drawn float weights."""
        names = [name for name in self.noise.names if name not in self._by_name]
        found = [self.model.get_parameter(name) for name in names]
        return {p: nn.Parameter(p.detach().clone(), requires_grad=False) for p in found}

    @contextlib.contextmanager
    def draw_in(self, view: View, index: int, seed: int) -> Iterator[None]:
        """Hold a draw in a private view of the model until exit, as `draw` does in the model itself.

        Args:
            view: of the model, with room for its drawn float weights.
            index: of the draw, from 0.
            seed: of the sequence of draws.
        """
        key = index, seed, str(next(self.model.parameters()).device)
        moved = self._cache.get(key) or self._make(index, seed)
        for name, one in moved.drawn.items():
            for layer in self._layers(self._by_name[name]):
                vars(view.module(layer))["drawn"] = one
        with torch.no_grad():
            for parameter, deviation in moved.others.items():
                view.parameter(parameter).copy_(parameter + deviation.to(parameter))
        yield
        self._keep(key, moved)

    def mean_in(self, view: View) -> AbstractContextManager[None]:
        """The model as it is."""
        return contextlib.nullcontext()

    def random_parameters(self) -> Iterator[nn.Parameter]:
        """Of an INT8 weight its steps, which stand for it."""
        for name in self.noise.names:
            weight = self._by_name.get(name)
            yield self.model.get_parameter(name) if weight is None else self._layers(weight)[0].weight_step

    def problem_type(self) -> ProblemType:
        """That of the float posterior."""
        return self._problem_type

    def recorded_noise_std(self) -> NoiseStd | None:
        """That of the float posterior."""
        return self._noise_std

    def variances(self) -> dict[nn.Parameter, Tensor]:
        """Not known of INT8 weights.

        Raises:
            ValueError: always.
        """
        raise ValueError("A linearised `method` needs float weights, got a QuantizedPosterior; use 'sample'.")

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write all that `bayeformers.quantization.load` needs: INT8 and float tensors, and the model's config.

        Raises:
            OSError: the folder cannot be written.
        """
        head = {"problem_type": self.problem_type(), "noise_std": self.recorded_noise_std()}
        save(directory, self.model, self.weights, self.noise, self.report, **head)

    def clear_cache(self) -> None:
        """Free the kept draws."""
        self._cache = {}

    def _layers(self, weight: Weight) -> list[QuantizedLayer]:
        return [self.model.get_submodule(name) for name in weight.owners]  # type: ignore[misc]

    def _make(self, index: int, seed: int) -> _Moved:
        """Of a Laplace layer weight and bias come of one product, so what is not made by row is made at once."""
        drawn: dict[str, Drawn] = {}
        others: dict[nn.Parameter, Tensor] = {}
        for name in self.noise.names:
            weight = self._by_name.get(name)
            if weight is None:
                others[self.model.get_parameter(name)] = self.noise.deviation(name, index, seed)
                continue
            deviation, rows = (
                functools.partial(self.noise.deviation, name, index, seed),
                self.noise.rows(name, index, seed),
            )
            layer, is_merged = self._layers(weight)[0], weight.arithmetic == "int8"
            drawn[name] = Drawn(layer.mean, deviation, layer.axis, is_merged=is_merged, deviation_rows=rows)
            if rows is None:
                drawn[name].codes()
        return _Moved(drawn, others)

    def _keep(self, key: tuple[int, int, str], moved: _Moved) -> None:
        """Every batch asks for the same draws, so the first ones stay while they fit."""
        self._cache[key] = moved
        if sum(kept.nbytes for kept in list(self._cache.values())) > self.draw_cache_bytes:
            self._cache.pop(key, None)

    @contextlib.contextmanager
    def _held(self, drawn: Mapping[str, Drawn]) -> Iterator[None]:
        layers = [(layer, one) for name, one in drawn.items() for layer in self._layers(self._by_name[name])]
        before = [layer.drawn for layer, _ in layers]
        try:
            for layer, one in layers:
                layer.drawn = one
            yield
        finally:
            for (layer, _), held in zip(layers, before, strict=True):
                layer.drawn = held
