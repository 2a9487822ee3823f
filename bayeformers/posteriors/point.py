"""No uncertainty about the weights: the trained model as a posterior with one draw."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from contextlib import AbstractContextManager
from os import PathLike

from torch import nn

from ..checks import check_draw
from ..sampling.views import View
from .base import BasePosterior


class PointPosterior(BasePosterior):
    """The model as it is: one draw, hence mutual information 0.

    >>> import torch
    >>> PointPosterior(nn.Linear(2, 3)).predict(torch.ones(1, 2)).mutual_information
    tensor([0.])
    """

    num_draws: int | None = 1
    draws_in_views = True

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def mean(self) -> AbstractContextManager[None]:
        """The model as it is."""
        return contextlib.nullcontext()

    def draw(self, index: int, seed: int = 0) -> AbstractContextManager[None]:
        """The model as it is; ``index`` 0 is the only one, and any other is a ValueError."""
        check_draw(index, seed, self.num_draws)
        return contextlib.nullcontext()

    def draw_in(self, view: View, index: int, seed: int) -> AbstractContextManager[None]:
        """Return a context with the model as it is.

        Args:
            view: the private view, which stays as it is.
            index: the draw's place in the sequence: all are the same.
            seed: which sequence of draws: all are the same.
        """
        return contextlib.nullcontext()

    def mean_in(self, view: View) -> AbstractContextManager[None]:
        """The model as it is."""
        return contextlib.nullcontext()

    def random_parameters(self) -> Iterable[nn.Parameter]:
        """None."""
        return ()

    def save(self, directory: str | PathLike[str]) -> None:
        """Not offered: the model's own ``save_pretrained`` saves all there is.

        Raises:
            ValueError: always.
        """
        raise ValueError("A point estimate has no posterior to save; use `model.save_pretrained(directory)`.")
