"""`DropoutPosterior`: a model's own dropout, left on while it predicts (Gal & Ghahramani 2016, arXiv 1506.02142)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from os import PathLike
from typing import Any, get_args

from torch import nn

from ..checks import check_choice, check_draw, check_number
from ..sampling.generators import NOISE_VERSION, check_noise_version
from ..sampling.views import View, itself
from ..storage import folder, read, saved_file, write
from .base import BasePosterior
from .dropout_sites import Dropping, Masks, Pass, check_model, check_running, dropout_rates, switch_on
from .files import register_posterior

__all__ = ["DropoutPosterior"]

FILE = "dropout.safetensors"
_KIND = "dropout"


@register_posterior
class DropoutPosterior(BasePosterior):
    """Monte-Carlo dropout: each draw keeps a random part of the units, as each training step did.

    It needs no training and no data beyond those of a model that was trained with dropout. What a draw keeps is a pure
    function of its seed, its index, and the place in the model: the same in every batch, thread, process and reload, on
    every device, and for every implementation of attention ("eager", "sdpa"). Batch norms, LayerDrop and stochastic
    depth stay as in ``eval()``.

    Args:
        model: a model with `torch.nn.Dropout` modules or functional dropout; it is not copied.
        rate: in place of every rate of the model above 0, or where all are 0 of those; None: the model's own rates.
        masks: "unit": a unit of a layer is dropped for all rows and positions at once, so that a draw is one network;
            attention weights, which are no units, stay. "element", as in training: every element of a row is dropped by
            itself, by a number that depends on what the row holds, and neither on its padding nor on the other rows.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: it has no dropout, or only such of rate 0 and ``rate`` is None; a rate outside of (0, 1), or other
            masks; dropout that cannot be held: inside `torch.nn.LSTM` or `GRU`, alpha dropout, LayerDrop, or of a
            compiled model.

    >>> import torch
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3))
    >>> predictive = DropoutPosterior(model).predict(torch.ones(2, 4), num_samples=8)
    >>> predictive.log_probs.shape, model.training
    (torch.Size([8, 2, 3]), True)
    """

    draws_in_views = True
    file_name = FILE
    follows_weights = True
    shares_prefix = False

    def __init__(self, model: nn.Module, rate: float | None = None, *, masks: Masks = "unit") -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"`model` must be a torch.nn.Module, got {type(model).__name__}.")
        if rate is not None:
            check_number("rate", rate, 0.0, strict=True)
            if rate >= 1:
                raise ValueError(f"`rate` must be below 1, at which nothing is left, got {rate!r}.")
        check_choice("masks", masks, get_args(Masks))
        check_model(model, rate)
        self.model, self.masks = model, masks
        self.rate = None if rate is None else float(rate)
        self._axes: dict[Any, Any] = {}

    def __repr__(self) -> str:
        return f"DropoutPosterior({type(self.model).__name__}, rate={self.rate}, masks={self.masks!r})"

    @contextlib.contextmanager
    def mean(self) -> Iterator[None]:
        """The model in ``eval()`` mode, without dropout, until exit."""
        with itself(self.model):
            yield

    @contextlib.contextmanager
    def draw(self, index: int, seed: int = 0) -> Iterator[None]:
        """The model with draw ``index`` of the sequence ``seed``, until exit; else in ``eval()`` mode.

        Generation inside is by one network with "unit", and of an own mask for every step with "element".
        """
        check_draw(index, seed)
        with itself(self.model):
            state = self._pass(index, seed)
            kept = switch_on(self.model, state)
            try:
                with Dropping(state):
                    yield
            finally:
                for module, own in reversed(kept):
                    vars(module).clear()
                    vars(module).update(own)

    @contextlib.contextmanager
    def draw_in(self, view: View, index: int, seed: int) -> Iterator[None]:
        """As `draw`, in a private view.

        Args:
            view: the view, whose dropout is switched on.
            index: the draw's place in the sequence, >= 0.
            seed: which sequence of draws.
        """
        if "dropout" not in view.kept:
            view.kept["dropout"] = self._pass(index, seed)
            switch_on(self.model, view.kept["dropout"], view.module)
        state: Pass = view.kept["dropout"]
        state.key = _key(index, seed)
        with Dropping(state):
            yield

    def mean_in(self, view: View) -> AbstractContextManager[None]:
        """The view as it is, in ``eval()`` mode."""
        return contextlib.nullcontext()

    def random_parameters(self) -> Iterable[nn.Parameter]:
        """None: a draw leaves the weights as they are, and nothing is shared between draws."""
        return ()

    def _pass(self, index: int, seed: int) -> Pass:
        check_running(self.model)
        rates = dropout_rates(self.model).values()
        return Pass(_key(index, seed), self.masks, self.rate, replaces_zero=not any(rates), axes=self._axes)

    # -- persistence -------------------------------------------------------------------------------------------------

    def save(self, directory: str | PathLike[str]) -> None:
        """Write ``dropout.safetensors``, a few numbers: the kind of masks, the rate, and the model's own rates."""
        meta = {
            "rate": self.rate,
            "masks": self.masks,
            "rates": dropout_rates(self.model),
            "noise_version": NOISE_VERSION,
        }
        write(folder(directory) / FILE, {}, meta, kind=_KIND)

    @classmethod
    def load(cls, directory: str | PathLike[str], model: nn.Module) -> DropoutPosterior:
        """Return what `save` wrote: the same draws.

        Args:
            directory: the folder, or the file in it.
            model: the model, with the dropout that it had.

        Raises:
            ValueError: the file is missing or damaged, or the model has dropout of other rates or elsewhere.
        """
        path = saved_file(directory, FILE)
        _, meta = read(path, kind=_KIND)
        check_noise_version(meta.get("noise_version"))
        found, expected = dropout_rates(model), meta.get("rates")
        if meta["rate"] is None and found != expected:
            raise ValueError(
                f"`model` has other dropout than {str(path)!r} was saved with: {_changed(found, expected)}."
            )
        return cls(model, meta["rate"], masks=meta["masks"])


def _key(index: int, seed: int) -> str:
    return f"{seed}/{index}"


def _changed(found: dict[str, float], expected: Any) -> str:
    expected = expected if isinstance(expected, dict) else {}
    names = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
    return ", ".join(f"{name} {found.get(name)} for {expected.get(name)}" for name in names[:3]) + f" ({len(names)})"
