"""What transformers' own pipelines do with a Bayesian model: they show its posterior mean, and say so once.

transformers has no place for these words, so importing bayeformers wraps two methods of its `Pipeline`. A model without
Bayesian layers, a posterior or the record of one is left alone.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from weakref import WeakSet

from torch import nn
from transformers.pipelines.base import Pipeline

from ..nn.base import is_bayesian
from ..nn.draws import drawing_layers
from ..posteriors import Posterior
from ..posteriors.files import saved_kinds
from ..sampling.views import viewed
from .base import BayesianPipelineMixin

logger = logging.getLogger(__name__)

MEAN = (
    "This %s shows the posterior mean of a Bayesian %s, one network without uncertainties. "
    "`bayeformers.pipeline(task, model=model, tokenizer=...)` averages over the posterior and says how sure it is."
)
BESIDE = (
    "This %s shows a %s without its `posterior`, one network without uncertainties. "
    "`bayeformers.pipeline(task, model=model, tokenizer=...)` predicts with the posterior and says how sure it is."
)
RECORDED = (
    "This %s runs a %s that transformers read without its posterior, which %s holds: it is one network, the posterior "
    "mean. `bayeformers.pipeline(task, model=folder)` predicts with the posterior, and "
    "`bayeformers.from_pretrained(folder)` reads it with the model."
)
TRAINING = (
    "This %s was given a %s in train(), where each call would be that of a random network: it runs it as in eval(), "
    "and the model stays in train()."
)
_WRAPPED = "shows_the_posterior_mean"
_told: dict[str, WeakSet[nn.Module]] = {}


def has_posterior(model: Any) -> bool:
    """Whether a model has Bayesian layers, or a posterior as its attribute."""
    return isinstance(model, nn.Module) and (is_bayesian(model) or isinstance(_posterior(model), Posterior))


def _posterior(model: nn.Module) -> Any:
    return getattr(model, "posterior", None)


def _tell(pipeline: Pipeline, message: str, *more: str) -> None:
    """Log a warning, but once per model."""
    model = pipeline.model
    known = _told.setdefault(message, WeakSet())
    if model not in known:
        known.add(model)
        logger.warning(message, type(pipeline).__name__, type(model).__name__, *more)


def _tell_what_is_shown(pipeline: Pipeline) -> None:
    model = pipeline.model
    if not isinstance(model, nn.Module):
        return
    if has_posterior(model):
        _tell(pipeline, BESIDE if isinstance(_posterior(model), Posterior) else MEAN)
    elif (place := _unread(model)) is not None:
        _tell(pipeline, RECORDED, place)


def _unread(model: nn.Module) -> str | None:
    """Where the posterior is that transformers' loader left behind; None: there is none that could be known of."""
    folder, config = getattr(model, "name_or_path", None), getattr(model, "config", None)
    if any(getattr(config, name, None) is not None for name in ("bayesian", "bayesian_head")):
        return repr(folder) if folder else "the folder that it came from"
    if not isinstance(folder, str) or not folder:
        return None
    found = next((name for name in saved_kinds() if (Path(folder) / name).is_file()), None)
    return None if found is None else f"{found!r} in {folder!r}"


@contextlib.contextmanager
def _of_the_mean(pipeline: Pipeline) -> Iterator[Pipeline]:
    """The pipeline, or where its model would be a random network one around the model in `eval()`, until exit."""
    model = pipeline.model
    is_random = isinstance(model, nn.Module) and (
        bool(drawing_layers(model)) or (model.training and isinstance(_posterior(model), Posterior))
    )
    if not is_random:
        yield pipeline
        return
    _tell(pipeline, TRAINING)
    with viewed(model, training=False) as view:  # other threads see the model in train(), as it is
        own: Any = copy.copy(pipeline)
        own.model = view.model
        yield own


def _telling(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def __init__(self: Pipeline, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if not isinstance(self, BayesianPipelineMixin):
            _tell_what_is_shown(self)

    return __init__


def _in_eval(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def forward(self: Pipeline, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self, BayesianPipelineMixin):
            return original(self, *args, **kwargs)
        with _of_the_mean(self) as pipeline:
            return original(pipeline, *args, **kwargs)

    setattr(forward, _WRAPPED, True)
    return forward


def wrap_pipelines() -> None:
    """Let transformers' `Pipeline` say what it shows of a Bayesian model; nothing where that is done."""
    if not hasattr(Pipeline.forward, _WRAPPED):
        Pipeline.__init__ = _telling(Pipeline.__init__)
        Pipeline.forward = _in_eval(Pipeline.forward)


wrap_pipelines()
