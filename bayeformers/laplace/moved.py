"""Posteriors around the model's own weights: a draw moves them, and its end brings them back."""

from __future__ import annotations

import contextlib
import warnings
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_draw
from ..linearized.blocks import from_matrix, to_matrix
from ..linearized.captured import OutputOf
from ..posteriors.base import BasePosterior
from ..processes.dtensors import split_like, write
from ..sampling.views import View, alone
from .targets import Fingerprint, Target


class MovedPosterior(BasePosterior):
    """What such posteriors share; each says which layers it covers and how far a draw moves them.

    Attributes:
        noise_std: s of a regression.
        likelihood_precision: 1 / (T s^2), T the temperature: what multiplies the curvature.
        fingerprints: layer name -> the weights that the posterior was fitted to.
    """

    draws_in_views = True
    noise_std: float
    likelihood_precision: float
    fingerprints: Mapping[str, Fingerprint]
    _outputs_of: OutputOf

    @property
    def scale(self) -> float:
        """Deprecated name of `likelihood_precision`."""
        told = "`posterior.scale`, which is no standard deviation, is now `posterior.likelihood_precision`."
        warnings.warn(told, DeprecationWarning, stacklevel=2)
        return self.likelihood_precision

    @property
    @abstractmethod
    def targets(self) -> list[Target]:
        """The covered layers, in the model's order."""

    def is_of_present_weights(self) -> bool:
        """Whether the model still has the weights that the posterior was fitted to."""
        return all(target.has_weights(self.fingerprints[target.name]) for target in self.targets)

    @abstractmethod
    def _deviation(self, index: int, seed: int) -> Mapping[nn.Parameter, Tensor]:
        """How far draw ``index`` of ``seed`` moves every covered Parameter."""

    def mean(self) -> AbstractContextManager[None]:
        """The model as it was trained."""
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def draw(self, index: int, seed: int = 0) -> Iterator[None]:
        """The model at draw ``index`` >= 0 of the sequence ``seed``, until exit; its weights come back bit by bit."""
        check_draw(index, seed)
        with alone(self.model), holding(self._deviation(index, seed)):
            yield

    def own_parameters(self) -> Mapping[nn.Parameter, nn.Parameter]:
        """Room in a view for its drawn weights."""
        return {p: nn.Parameter(p.detach().clone(), requires_grad=False) for p in self.random_parameters()}

    @contextlib.contextmanager
    def draw_in(self, view: View, index: int, seed: int) -> Iterator[None]:
        """As `draw`, in a private view: the trained weights stay where they are.

        Args:
            view: a view with room for drawn weights, see `own_parameters`.
            index: the draw's place in the sequence, >= 0.
            seed: which sequence of draws.
        """
        with torch.no_grad():
            for parameter, moved in self._deviation(index, seed).items():
                view.parameter(parameter).copy_(parameter + moved.to(parameter))
        yield

    def mean_in(self, view: View) -> AbstractContextManager[None]:
        """The model as it was trained."""
        return contextlib.nullcontext()

    def random_parameters(self) -> Iterable[nn.Parameter]:
        """The covered Parameters."""
        return [parameter for target in self.targets for parameter in target.parameters.values()]

    def outputs_of(self, output: Any) -> Tensor:
        """The logits in what the model returns, by the accessor that the fit was given."""
        return in_columns(self._outputs_of)(output)

    def recorded_noise_std(self) -> float:
        """The noise s of a regression."""
        return self.noise_std


def in_columns(outputs_of: OutputOf) -> OutputOf:
    """Return the accessor with a column for a regression's single output: (B,) -> (B, 1)."""
    return partial(_in_columns, outputs_of)


def _in_columns(outputs_of: OutputOf, output: Any) -> Tensor:
    outputs = outputs_of(output)
    return outputs.unsqueeze(-1) if outputs.ndim == 1 else outputs


def by_parameter(target: Target, matrix: Tensor) -> dict[nn.Parameter, Tensor]:
    """Return a layer's matrix, cut into its Parameters' shapes; the padding row of a table is not random.

    Shape: ``matrix`` (K, d_out, d_in'), or (1, 1, p) of a dense block.
    """
    module = target.modules[0]
    if matrix.shape[1:-1] == (1,) and matrix.shape[-1] == target.num_weights:
        matrix = matrix.reshape(target.matrix_shape)
    found = from_matrix(module, matrix, target.parameters)
    padding = getattr(module, "padding_idx", None)
    if padding is not None:
        found["weight"] = found["weight"].clone()
        found["weight"][padding] = 0
    return {target.parameters[name]: value for name, value in found.items()}


def as_matrix(target: Target, tensors: Mapping[nn.Parameter, Tensor], *, is_flat: bool = False) -> Tensor:
    """Return a layer's tensors as one matrix, the inverse of `by_parameter`: (K, d_out, d_in').

    Args:
        target: the layer.
        tensors: a tensor of each of its Parameters' shape, by Parameter.
        is_flat: whether to give (1, 1, p), as a dense block has it.
    """
    given = {name: tensors[parameter] for name, parameter in target.parameters.items()}
    matrix = to_matrix(target.modules[0], given)
    return matrix.reshape(1, 1, -1) if is_flat else matrix


@contextlib.contextmanager
def holding(deviation: Mapping[nn.Parameter, Tensor]) -> Iterator[None]:
    """The model with ``deviation`` added to its weights, until exit; they come back bit by bit."""
    kept = {parameter: parameter.detach().clone() for parameter in deviation}
    try:
        _copy({
            parameter: kept[parameter] + split_like(moved.to(parameter), parameter)
            for parameter, moved in deviation.items()
        })
        yield
    finally:
        _copy(kept)


def _copy(values: Mapping[nn.Parameter, Tensor]) -> None:
    """In place, so that version counters tell; autocast keeps low-precision copies of what it has seen."""
    with torch.no_grad():
        for parameter, value in values.items():
            write(parameter, value)
    torch.clear_autocast_cache()
