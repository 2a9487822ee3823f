"""`model_card`: a card of the hub for a model with a posterior, and how it goes together with one that is there."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from torch import nn
from transformers.modelcard import TASK_MAPPING

from ..checks import check_count, is_real
from ..guarantees import policy_of
from ..metrics import BootstrapInterval
from ..nn.base import check_module
from ..posteriors import PointPosterior, Posterior
from ..posteriors.predict import as_posterior
from .results import Metrics, evaluation_results
from .section import BEGIN, END, CardDetails, Describes, shown_number, uncertainty_section

__all__ = ["is_untouched", "merge_card", "model_card", "sealed", "task_of"]

UNCERTAINTIES = (
    "predictive_entropy",
    "expected_entropy",
    "mutual_information",
    "epistemic_variance",
    "aleatoric_variance",
)
TAGS = ("bayeformers", "bayesian", "uncertainty")
_SECTION = re.compile(rf"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
_ROW = re.compile(r"^\| (.+?) \| (.+?) \|", re.MULTILINE)
_SEAL = re.compile(rf"({re.escape(BEGIN)})( [0-9a-f]{{16}})?")
_DRAFT_HEADING = "\n## Model description\n"
_WRITTEN_BY_PEFT = ("- PEFT ", "### Framework versions")


def model_card(
    model: nn.Module,
    posterior: Posterior | None = None,
    metrics: Metrics | None = None,
    *,
    policy: Describes | None = None,
    details: CardDetails | None = None,
) -> ModelCard:
    """Return the card of a model with a posterior: metadata of the hub, and a section about its uncertainty.

    The section says the method and the numbers that it depends on (scale or prior precision and how it was chosen, N,
    prior, draws), what was measured, when the model refuses, how it is loaded, and what the uncertainty means. The
    metrics stand in the metadata's `model-index` too, their intervals among each metric's ``args``, but for means of
    uncertainties, which are no results.

    Args:
        model: of transformers, or a `peft.PeftModel`.
        posterior: what predicts; None: the model's own, as of `bayeformers.predict`.
        metrics: by name, a number, or a `BootstrapInterval`: see `evaluation_intervals`.
        policy: the abstention policy; None: the model's own, if it carries one of these weights.
        details: what else the card says.

    Returns:
        The card; ``card.save(path)`` writes it.

    Raises:
        TypeError: an argument is of a wrong kind.
        ValueError: details that no card can hold.
    """
    check_module(model)
    posterior = as_posterior(model) if posterior is None else posterior
    if not isinstance(posterior, Posterior):
        raise TypeError(f"`posterior` must be a posterior or None, got {type(posterior).__name__}.")
    metrics, details = _checked_metrics(metrics), CardDetails() if details is None else details
    _check_details(details)
    policy = policy_of(model) if policy is None else policy
    if policy is not None and not callable(getattr(policy, "describe", None)):
        raise TypeError(f"`policy` must be an AbstentionPolicy, got {type(policy).__name__}.")
    task = task_of(model) if details.task is None else details.task
    name = details.name or details.repo.rstrip("/").rpartition("/")[2].strip(".") or type(model).__name__
    library = "peft" if hasattr(model, "peft_config") else "transformers"
    is_point, results = isinstance(posterior, PointPosterior), _results(metrics, task, details)
    tags = list(dict.fromkeys([*details.tags, *(() if is_point else TAGS)]))
    data = ModelCardData(
        language=list(details.language) or None,
        license=details.license,
        library_name=library,
        base_model=details.base_model,
        datasets=list(details.dataset_id) or None,
        metrics=list(dict.fromkeys(result.metric_type for result in results)) or None,
        pipeline_tag=task,
        tags=tags or None,
        model_name=name,
        eval_results=results or None,
    )
    section = uncertainty_section(posterior, metrics, policy, details, task)
    return sealed(ModelCard(f"---\n{data.to_yaml()}\n---\n\n# {name}\n\n{section}\n"))


def task_of(model: nn.Module) -> str | None:
    """The hub's task of a model's class, of an adapter the base's; None: none of it."""
    own: Any = model
    base = own.get_base_model() if hasattr(own, "peft_config") and hasattr(own, "get_base_model") else own
    names = {kind.__name__ for kind in type(base).__mro__}
    tables: Any = TASK_MAPPING
    for task, table in tables.items():
        if names & {name for value in table.values() for name in ([value] if isinstance(value, str) else value)}:
            return str(task)
    return None


def _checked_metrics(metrics: Any) -> Metrics:
    metrics = {} if metrics is None else metrics
    if not isinstance(metrics, Mapping):
        raise TypeError(f"`metrics` must be a mapping of names to numbers or intervals, got {type(metrics).__name__}.")
    for name, value in metrics.items():
        if not isinstance(name, str) or not (isinstance(value, BootstrapInterval) or is_real(value)):
            raise TypeError(f"`metrics` must hold numbers or BootstrapIntervals by name, got {name!r}: {value!r}.")
    return metrics


def _check_details(details: Any) -> None:
    if not isinstance(details, CardDetails):
        raise TypeError(f"`details` must be CardDetails, got {type(details).__name__}.")
    for name in ("dataset", "dataset_id", "language", "tags"):
        value = getattr(details, name)
        if isinstance(value, str) or not all(isinstance(item, str) and item for item in value):
            raise TypeError(f"`details.{name}` must be a list of strings, got {value!r}.")
    if not details.repo or any(letter in details.repo for letter in '"\n\\'):
        raise ValueError(
            f"`details.repo` must be a name on the hub or a folder, which code quotes, got {details.repo!r}."
        )
    check_count("details.num_samples", details.num_samples, 1)


def _results(metrics: Metrics, task: str | None, details: CardDetails) -> list[EvalResult]:
    """None without a task, which every entry of `model-index` must have."""
    if task is None:
        return []
    dataset, dataset_id = next(iter(details.dataset), None), next(iter(details.dataset_id), None)
    scores = {name: value for name, value in metrics.items() if name not in UNCERTAINTIES}
    return evaluation_results(scores, task, dataset, dataset_id)


# -- together with a card that is there ------------------------------------------------------------------------------


def merge_card(existing: ModelCard, ours: ModelCard) -> ModelCard:
    """Return a card with the text and metadata of ``existing``, and our section in its place, or at the end.

    What ``existing`` says in its metadata stays; tags are united; of `model-index` entries of the same task, dataset
    and metric are replaced, and those that the replaced section measured go with it.

    Args:
        existing: the card that is there, such as a user's or PEFT's.
        ours: of `model_card`.
    """
    old: Any = existing.data
    new: Any = ours.data
    kept, added = old.to_dict(), new.to_dict()
    results = _united(_without_section(existing), list(new.eval_results or ()))
    united: dict[str, Any] = {key: value for key, value in {**added, **kept}.items() if key != "model-index"}
    for key in ("tags", "metrics"):
        union = list(dict.fromkeys([*(kept.get(key) or ()), *(added.get(key) or ())]))
        united |= {key: union} if union else {}
    if results:
        united |= {"eval_results": results, "model_name": old.model_name or new.model_name}
    found = _SECTION.search(ours.content)
    assert found is not None  # every card of ours has one
    section = found.group(0)
    text = existing.text
    if _SECTION.search(text):
        text = _SECTION.sub(lambda _: section, text, count=1)
    else:
        before, heading, after = text.partition(
            _DRAFT_HEADING
        )  # of a Trainer's draft: before what is still to be written
        text = f"{before.rstrip()}\n\n{section}\n{heading}{after}"
    return ModelCard(f"---\n{ModelCardData(**united).to_yaml()}\n---\n{text}")


def _without_section(card: ModelCard) -> list[EvalResult]:
    """The results that do not stand in the table of our section, which is about to be replaced."""
    found, data = _SECTION.search(card.text), card.data
    rows = set(_ROW.findall(found.group(0))) if found else set()
    results: list[EvalResult] = list(getattr(data, "eval_results", None) or ())
    shown = [shown_number(of.metric_value) if is_real(of.metric_value) else "" for of in results]
    return [of for of, number in zip(results, shown, strict=True) if (of.metric_type, number) not in rows]


def _united(kept: list[EvalResult], added: list[EvalResult]) -> list[EvalResult]:
    new = {(result.unique_identifier, result.metric_type, result.metric_name) for result in added}
    stays = [r for r in kept if (r.unique_identifier, r.metric_type, r.metric_name) not in new]
    return [*stays, *added]


def sealed(card: ModelCard) -> ModelCard:
    """Return the card with a hash of its text in our comment, by which `is_untouched` tells that nobody edited it."""
    open_text = _SEAL.sub(r"\1", card.text)
    card.text = _SEAL.sub(rf"\1 {_hash(open_text)}", open_text)
    return card


def is_untouched(card: ModelCard) -> bool:
    """Whether a card's text is as we wrote it, or the empty template that PEFT writes: nobody's words are lost."""
    found = _SEAL.search(card.text)
    if found is not None and found.group(2):
        return found.group(2).strip() == _hash(_SEAL.sub(r"\1", card.text))
    template = ModelCard.from_template(ModelCardData()).text
    return _hash(card.text) == _hash(template)


def _hash(text: str) -> str:
    """Of the lines, without empty ones and those that PEFT adds whenever it saves."""
    lines = [line.strip() for line in text.splitlines()]
    kept = [line for line in lines if line and not line.startswith(_WRITTEN_BY_PEFT)]
    return hashlib.sha256("\n".join(kept).encode()).hexdigest()[:16]
