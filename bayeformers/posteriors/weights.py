"""`WeightsPosterior`: posteriors that know the values of each draw's weights, such as members or Gaussian samples."""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from ..checks import check_draw
from ..linearized import recording_view
from ..processes.dtensors import write
from ..sampling.views import View, alone
from .base import BasePosterior

__all__ = ["WeightsPosterior"]

Values = Iterable[tuple[nn.Parameter, Tensor]]
"""Parameters with their values, one at a time, so that a draw need not be in memory whole."""


class WeightsPosterior(BasePosterior):
    """A subclass says which Parameters are random, their mean, and the values of one draw.

    A draw is copied into the model's Parameters in place, and what stood there comes back bit by bit, from the host's
    memory; in a private view the Parameters have room of their own, and the model stays as it is.

    Args:
        model: whose Parameters are drawn; it is not copied.
    """

    draws_in_views = True

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"`model` must be a torch.nn.Module, got {type(model).__name__}.")
        self.model = model

    @abstractmethod
    def weights(self, index: int, seed: int) -> Values:
        """The values of draw ``index`` >= 0 of the sequence ``seed``, each of its Parameter's shape."""

    def mean_weights(self) -> Values:
        """The values of the mean; none where that is the model as it is."""
        return ()

    def mean(self) -> AbstractContextManager[None]:
        """The model at the posterior mean, until exit."""
        return self._holding(self.mean_weights())

    @contextlib.contextmanager
    def draw(self, index: int, seed: int = 0) -> Iterator[None]:
        """The model at draw ``index`` of the sequence ``seed``, until exit; its weights come back bit by bit."""
        check_draw(index, seed, self.num_draws)
        with self._holding(self.weights(index, seed)):
            yield

    @contextlib.contextmanager
    def _holding(self, values: Values) -> Iterator[None]:
        kept: dict[nn.Parameter, Tensor] = {}
        with alone(self.model):
            try:
                with torch.no_grad():
                    for parameter, value in values:
                        if parameter not in kept:  # on the host: the device needs room for one model only
                            kept[parameter] = parameter.detach().to("cpu", copy=True)
                        write(parameter, value)
                torch.clear_autocast_cache()  # which keeps low-precision copies of what it has seen
                yield
            finally:
                with torch.no_grad():
                    for parameter, value in kept.items():
                        write(parameter, value)
                torch.clear_autocast_cache()

    @contextlib.contextmanager
    def recording_view(self, tensors: Iterable[nn.Parameter] = ()) -> Iterator[View]:
        """The model itself at its mean in ``eval()``: a view to record on has no room for other weights.

        Args:
            tensors: Parameters whose gradients are wanted.

        Yields:
            The view.
        """
        with recording_view(self.model, tensors, training=False, is_private=False) as view, self.mean():
            yield view

    # -- on a view ---------------------------------------------------------------------------------------------------

    def own_parameters(self) -> Mapping[nn.Parameter, nn.Parameter]:
        """Room in a view for its drawn weights."""
        return {p: nn.Parameter(p.detach().clone(), requires_grad=False) for p in self.random_parameters()}

    @contextlib.contextmanager
    def draw_in(self, view: View, index: int, seed: int) -> Iterator[None]:
        """As `draw`, in a private view: the model's weights stay where they are.

        Args:
            view: a view with room for drawn weights, see `own_parameters`.
            index: the draw's place in the sequence, >= 0.
            seed: which sequence of draws.
        """
        check_draw(index, seed, self.num_draws)
        _fill(view, self.weights(index, seed))
        yield

    @contextlib.contextmanager
    def mean_in(self, view: View) -> Iterator[None]:
        """The mean, likewise."""
        _fill(view, self.mean_weights())
        yield


def _fill(view: View, values: Values) -> None:
    with torch.no_grad():
        for parameter, value in values:
            own = view.parameter(parameter)
            if own is parameter or own.data_ptr() == parameter.data_ptr() != 0:
                raise RuntimeError("This view has no room for drawn weights: they would be written into the model.")
            own.copy_(value)
