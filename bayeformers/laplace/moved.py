"""Posteriors around the model's own weights: a draw moves them, and its end brings them back."""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_draw
from ..linearized.captured import OutputOf
from ..posteriors.base import BasePosterior
from ..sampling.views import View, alone
from .fingerprint import Fingerprint, is_of
from .targets import Target
from .weights import holding


class MovedPosterior(BasePosterior):
    """What such posteriors share; each says which layers it covers and how far a draw moves them.

    Attributes:
        noise_std: s of a regression.
        fingerprints: layer name -> the weights that the posterior was fitted to.
    """

    draws_in_views = True
    noise_std: float
    fingerprints: Mapping[str, Fingerprint]
    _outputs_of: OutputOf

    @property
    @abstractmethod
    def targets(self) -> list[Target]:
        """The covered layers, in the model's order."""

    def is_of_present_weights(self) -> bool:
        """Whether the model still has the weights that the posterior was fitted to."""
        return all(is_of(target, self.fingerprints[target.name]) for target in self.targets)

    @abstractmethod
    def _deviation(self, index: int, seed: int) -> Mapping[nn.Parameter, Tensor]:
        """How far draw ``index`` of ``seed`` moves every covered Parameter."""

    def mean(self) -> AbstractContextManager[None]:
        """The model as it was trained."""
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def draw(self, index: int, seed: int = 0) -> Iterator[None]:
        """The model at draw ``index`` of the sequence ``seed``, until exit; its weights come back bit by bit.

        Raises:
            TypeError, ValueError: ``index`` is no whole number >= 0, or ``seed`` no whole number.
        """
        check_draw(index, seed)
        with alone(self.model), holding(self._deviation(index, seed)):
            yield

    def own_parameters(self) -> Mapping[nn.Parameter, nn.Parameter]:
        """Room in a view for its drawn weights."""
        return {p: nn.Parameter(p.detach().clone(), requires_grad=False) for p in self.random_parameters()}

    @contextlib.contextmanager
    def draw_in(self, view: View, index: int, seed: int) -> Iterator[None]:
        """As `draw`, in a private view: the trained weights stay where they are."""
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
        """s."""
        return self.noise_std


def in_columns(outputs_of: Callable[[Any], Tensor]) -> OutputOf:
    """The accessor with a column for a regression's single output: (B,) -> (B, 1)."""

    def found(output: Any) -> Tensor:
        outputs = outputs_of(output)
        return outputs.unsqueeze(-1) if outputs.ndim == 1 else outputs

    return found
