"""Posteriors around the model's own weights: a draw moves them, and its end brings them back."""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

from ..posteriors.base import BasePosterior, check_draw
from ..posteriors.linearized import OutputOf
from .fingerprint import Fingerprint, is_of
from .targets import Target
from .weights import holding


class MovedPosterior(BasePosterior):
    """What such posteriors share; each says which layers it covers and how far a draw moves them.

    Attributes:
        noise_std: s of a regression.
        fingerprints: layer name -> the weights that the posterior was fitted to.
    """

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
        with holding(self._deviation(index, seed)):
            yield

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
