"""`bayeformers.pipeline`: transformers' pipeline of a task, whose numbers are a posterior's."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any, Literal

from torch import nn
from transformers.pipelines import TASK_ALIASES
from transformers.pipelines import pipeline as plain_pipeline

from ..checkpoint.accounting import NotBayesian
from ..checkpoint.load import from_pretrained
from ..guarantees import AbstentionPolicy, policy_of
from ..posteriors import PointPosterior, Posterior, VariationalPosterior
from ..posteriors.predict import as_posterior
from ..posteriors.variational import is_bayesian
from .classification import (
    BayesianAudioClassificationPipeline,
    BayesianImageClassificationPipeline,
    BayesianTextClassificationPipeline,
)
from .generating import (
    BayesianAnyToAnyPipeline,
    BayesianImageTextToTextPipeline,
    BayesianText2TextGenerationPipeline,
    BayesianTextGenerationPipeline,
)
from .question_answering import BayesianQuestionAnsweringPipeline
from .tokens import BayesianFillMaskPipeline, BayesianTokenClassificationPipeline
from .zero_shot import BayesianZeroShotClassificationPipeline

__all__ = ["pipeline"]

logger = logging.getLogger(__name__)

_KINDS: dict[str, Any] = {
    "text-classification": BayesianTextClassificationPipeline,
    "token-classification": BayesianTokenClassificationPipeline,
    "zero-shot-classification": BayesianZeroShotClassificationPipeline,
    "fill-mask": BayesianFillMaskPipeline,
    "question-answering": BayesianQuestionAnsweringPipeline,
    "image-classification": BayesianImageClassificationPipeline,
    "audio-classification": BayesianAudioClassificationPipeline,
    "text-generation": BayesianTextGenerationPipeline,
    "text2text-generation": BayesianText2TextGenerationPipeline,
    "image-text-to-text": BayesianImageTextToTextPipeline,
    "image-to-text": BayesianImageTextToTextPipeline,
    "any-to-any": BayesianAnyToAnyPipeline,
}
"""Task -> the class of its pipeline."""

_PARTS = {
    "tokenizer": "_load_tokenizer",
    "feature_extractor": "_load_feature_extractor",
    "image_processor": "_load_image_processor",
    "processor": "_load_processor",
}
_COMPONENT_FILES = ("tokenizer_config.json", "tokenizer.json", "vocab.txt", "preprocessor_config.json")
_HUB = ("revision", "token", "trust_remote_code", "local_files_only")


def pipeline(
    task: str,
    model: str | os.PathLike[str] | nn.Module | Posterior | None = None,
    *,
    posterior: Posterior | None = None,
    num_samples: int | None = None,
    method: str | None = None,
    seed: int = 0,
    abstention: AbstentionPolicy | Literal[False] | None = None,
    **kwargs: Any,
) -> Any:
    """Return transformers' pipeline of a task, whose scores are a posterior's averages and say how sure they are.

    Each result has what transformers' has, and ``uncertainty``: ``total`` = ``aleatoric`` + ``epistemic``, in nats;
    and, where a policy is set, ``abstain``.

    Args:
        task: as transformers names it, or "question-answering", which transformers no longer has.
        model: a folder or a name on the hub, Bayesian or not; a model; or a posterior. A model that is not Bayesian is
            a point estimate, whose epistemic part is 0.
        posterior: what is asked in place of the model's own; its model is the pipeline's.
        num_samples: number S of draws; by default the policy's, else 16.
        method: of `BasePosterior.predict`; by default the policy's, else the posterior's own.
        seed: of the draws: the same seed gives the same answers, in every batch and thread.
        abstention: an `AbstentionPolicy`; None: the model's own, if it has one; False: none.
        kwargs: as of `transformers.pipeline`: ``tokenizer``, ``device``, ``batch_size``, ``dtype``, ``top_k``, ...

    Returns:
        An object of transformers' class of the task. Calls may have a ``num_samples``, ``method`` and ``seed`` of their
        own.

    Raises:
        TypeError: ``model`` or ``abstention`` is of no such kind.
        ValueError: an unknown task, a model without the task's head, a posterior of another model, or an argument that
            is out of range.
    """
    kind = _kind(task)
    if model is None and posterior is None:
        raise ValueError("`model` must be a folder, a name on the hub, a model or a posterior; or pass `posterior`.")
    folder = os.fspath(model) if isinstance(model, (str, os.PathLike)) else None
    found = _asked(model, posterior, kwargs)
    options = {name: value for name, value in kwargs.items() if value is not None or name not in _PARTS}
    if folder is not None and found is not None:
        options = {**_components(kind, folder, found.model), **options}
    build: Any = plain_pipeline  # annotated per task
    if found is None:  # a folder that is not Bayesian: as transformers loads it
        loaded = build(_name(kind, task), model=folder, **options).model
        found = PointPosterior(loaded)
        options = {**_components(kind, str(folder), loaded), **options}
    return build(
        _name(kind, task),
        model=found.model,
        pipeline_class=kind,
        posterior=found,
        num_samples=num_samples,
        method=method,
        seed=seed,
        abstention=_policy(found, abstention),
        **options,
    )


def _kind(task: str) -> Any:
    """The class of a task, which may go by another name of transformers'."""
    known = TASK_ALIASES.get(task, task) if isinstance(task, str) else task
    if not isinstance(known, str) or known not in _KINDS:
        raise ValueError(f"`task` must be one of {sorted(_KINDS)}, got {task!r}.")
    return _KINDS[known]


def _name(kind: Any, task: str) -> str:
    """As transformers knows it: a task of our own goes in under another's name."""
    return getattr(kind, "stands_for", None) or task


def _asked(model: Any, posterior: Any, kwargs: Mapping[str, Any]) -> Any:
    """What is asked; None: the folder is not Bayesian."""
    if posterior is not None:
        return _given(model, posterior)
    if isinstance(model, (str, os.PathLike)):
        return _loaded(os.fspath(model), kwargs)
    return _of_model(model)


def _given(model: Any, posterior: Any) -> Posterior:
    if isinstance(posterior, nn.Module) or not isinstance(posterior, Posterior):
        raise TypeError(f"`posterior` must be a Posterior, got {type(posterior).__name__}.")
    if model is not None and model is not posterior.model:
        raise ValueError(
            f"`posterior` must be of the pipeline's model, got one of another {type(posterior.model).__name__}: leave "
            "`model` out, and the posterior's own is taken."
        )
    return posterior


def _of_model(model: Any) -> Posterior:
    """A posterior made once keeps its draws from one batch to the next."""
    if isinstance(model, nn.Module) and not isinstance(getattr(model, "posterior", None), Posterior):
        return VariationalPosterior(model) if is_bayesian(model) else PointPosterior(model)
    return as_posterior(model)


def _loaded(folder: str, kwargs: Mapping[str, Any]) -> Posterior | None:
    """A saved model's posterior; None, and one line in the log, where the folder has none."""
    options = {name: kwargs[name] for name in _HUB if kwargs.get(name) is not None}
    if kwargs.get("device_map") is not None:
        options["device_map"] = kwargs["device_map"]
    if kwargs.get("dtype") is not None:
        options["dtype"] = kwargs["dtype"]
    try:
        return _of_model(from_pretrained(folder, **options, **(kwargs.get("model_kwargs") or {})))
    except NotBayesian:
        logger.warning("%r is not Bayesian: its pipeline is of a point estimate, with an epistemic part of 0.", folder)
        return None


def _components(kind: Any, folder: str, model: Any) -> dict[str, str]:
    """Where the tokenizer and processors of a kind are loaded from: the folder, of an adapter else its base's."""
    names = [name for name, flag in _PARTS.items() if getattr(kind, flag, None)]
    base = getattr(getattr(model, "active_peft_config", None), "base_model_name_or_path", None)
    is_bare = os.path.isdir(folder) and not any(os.path.isfile(os.path.join(folder, file)) for file in _COMPONENT_FILES)
    return dict.fromkeys(names, base if base and is_bare else folder)


def _policy(posterior: Posterior, abstention: Any) -> AbstentionPolicy | None:
    """The policy that is set: the one that is given, else the model's own; None of False."""
    if abstention is False:
        return None
    if abstention is None:
        return policy_of(posterior)
    if not isinstance(abstention, AbstentionPolicy):
        raise TypeError(f"`abstention` must be an AbstentionPolicy, None or False, got {type(abstention).__name__}.")
    return abstention
