"""The posterior of a converted model: its own layers, held at a draw."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_draw
from ..nn import BayesianModule, posterior_mean, variational_tensors
from ..nn.base import is_bayesian as is_bayesian
from ..nn.draws import check_names, hold
from ..nn.reading import MEAN
from ..nn.variational import Draw
from ..processes.dtensors import own_part
from ..sampling.views import View, modules_of
from .base import BasePosterior

DEFAULT_DRAW_CACHE_BYTES = 2 * 2**30


class VariationalPosterior(BasePosterior):
    """Mean-field Gaussian posterior of a model that :func:`~bayeformers.to_bayesian` converted.

    Draw ``index`` of ``seed`` is the same network as under :func:`~bayeformers.fixed_draw`. The weights of the first
    draws stay in memory while they fit ``draw_cache_bytes``, so that the next batch finds them made; they are dropped
    when any mean or scale changes, or another seed is asked for.

    Args:
        model: the converted model; it is not copied.
        draw_cache_bytes: memory for weights of draws, >= 0.

    Raises:
        ValueError: ``model`` has no Bayesian layer, or ``draw_cache_bytes`` is negative.

    >>> import bayeformers, torch
    >>> model = bayeformers.to_bayesian(nn.Linear(4, 3))
    >>> predictive = VariationalPosterior(model).predict(torch.ones(2, 4), num_samples=8)
    >>> predictive.log_probs.shape, predictive.mutual_information.shape
    (torch.Size([8, 2, 3]), torch.Size([2]))
    """

    draws_in_views = True

    def __init__(self, model: nn.Module, draw_cache_bytes: int = DEFAULT_DRAW_CACHE_BYTES) -> None:
        if not isinstance(draw_cache_bytes, int) or draw_cache_bytes < 0:
            raise ValueError(f"`draw_cache_bytes` must be >= 0, got {draw_cache_bytes!r}.")
        self.model = model
        self.draw_cache_bytes = draw_cache_bytes
        self._cache: dict[int, Draw] = {}
        self._bytes: dict[int, int] = {}
        self._seed = 0
        self._stamp: list[tuple[Any, ...]] = []
        self._lock = threading.Lock()
        if not is_bayesian(model):
            raise ValueError(f"`model` ({type(model).__name__}) has no Bayesian layer: call `to_bayesian` first.")

    def mean(self) -> AbstractContextManager[None]:
        """The model at its posterior mean, until exit."""
        return posterior_mean(self.model)

    @contextlib.contextmanager
    def draw(self, index: int, seed: int = 0) -> Iterator[None]:
        """The model at draw ``index`` of the sequence ``seed``, until exit; as :func:`~bayeformers.fixed_draw`."""
        check_draw(index, seed)
        with self._kept(index, seed, self._layers()) as held, hold(self.model, held):
            yield

    @contextlib.contextmanager
    def draw_in(self, view: View, index: int, seed: int) -> Iterator[None]:
        """As `draw`, in a private view.

        Args:
            view: the view whose layers are held at the draw.
            index: the draw's place in the sequence, >= 0.
            seed: which sequence of draws.
        """
        if "sources" not in view.kept:
            view.kept["sources"] = self._layers()
        with self._kept(index, seed, view.kept["sources"]) as held:
            self._hold_in(view, held)
            yield

    def mean_in(self, view: View) -> AbstractContextManager[None]:
        """The posterior mean in a private view."""
        self._hold_in(view, MEAN)
        return contextlib.nullcontext()

    def _hold_in(self, view: View, held: Draw | str) -> None:
        if "layers" not in view.kept:
            check_names(self.model)
            view.kept["layers"] = [layer for layer in modules_of(view.model) if isinstance(layer, BayesianModule)]
        for layer in view.kept["layers"]:
            layer.draw = held

    def random_parameters(self) -> Iterator[nn.Parameter]:
        """The distinct means; their values change between draws wherever they are used."""
        return (tensor.loc for tensor in variational_tensors(self.model))

    def variances(self) -> dict[nn.Parameter, Tensor]:
        """sigma^2 of every distinct mean; 0 in a padding row."""
        found = {}
        for tensor in variational_tensors(self.model):
            with torch.no_grad():
                variance = tensor.scale().square()
            if tensor.spec.padding_idx is not None:
                variance[tensor.spec.padding_idx] = 0
            found[tensor.loc] = variance
        return found

    def save(self, directory: str | PathLike[str]) -> None:
        """The model's own checkpoint: it holds means, scales and the configuration of the posterior.

        Raises:
            ValueError: a plain module, which has no ``save_pretrained``; save its ``state_dict``.
        """
        save_pretrained = getattr(self.model, "save_pretrained", None)
        if not callable(save_pretrained):
            raise ValueError(f"`model` is a plain {type(self.model).__name__}: save its `state_dict()` instead.")
        save_pretrained(directory)

    def clear_cache(self) -> None:
        """Free the weights of the draws, for example before training goes on."""
        with self._lock:
            self._cache, self._bytes, self._stamp = {}, {}, []

    def __getstate__(self) -> dict[str, Any]:
        """Without the kept draws."""
        return {**vars(self), "_cache": {}, "_bytes": {}, "_stamp": [], "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=threading.Lock())

    @contextlib.contextmanager
    def _kept(self, index: int, seed: int, layers: list[BayesianModule]) -> Iterator[Draw]:
        """The draw, and afterwards its weights for the next batch if they fit: each asks for the same first ones."""
        with self._lock:
            self._refresh(seed, layers)
            cache = self._cache
            draw = cache.get(index) or Draw(seed, index)
        yield draw
        with self._lock:
            if cache is not self._cache:  # dropped meanwhile: the weights have changed, or another seed is asked for
                return
            cache[index], self._bytes[index] = draw, draw.nbytes
            if sum(self._bytes.values()) > self.draw_cache_bytes:
                del cache[index], self._bytes[index]

    def _layers(self) -> list[BayesianModule]:
        return [module for module in modules_of(self.model) if isinstance(module, BayesianModule)]

    def _refresh(self, seed: int, layers: list[BayesianModule]) -> None:
        """Drop draws of other parameters or of another seed.

        The stamp keeps every storage alive, so that a new tensor cannot be mistaken for the one it replaced.
        """
        stamp = [_stamp(p) for layer in layers for p in layer._parameters.values() if p is not None]
        same = len(stamp) == len(self._stamp) and all(a[:-1] == b[:-1] for a, b in zip(stamp, self._stamp, strict=True))
        if seed != self._seed or not same:
            self._cache, self._bytes, self._seed, self._stamp = {}, {}, seed, stamp


def _stamp(tensor: Tensor) -> tuple[Any, ...]:
    tensor = own_part(tensor)
    storage = tensor.untyped_storage()
    return id(tensor), tensor._version, storage.data_ptr(), tensor.storage_offset(), tensor.dtype, (tensor, storage)
