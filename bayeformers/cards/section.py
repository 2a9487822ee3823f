"""The section of a model card about its uncertainty: what the posterior is, what was measured, how to load it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from ..likelihoods import get_likelihood
from ..linearized.methods import SAMPLING
from ..metrics import BootstrapInterval
from ..posteriors import PointPosterior, Posterior
from .facts import facts_of
from .results import Metrics

__all__ = ["BEGIN", "END", "CardDetails", "Describes", "shown_number", "uncertainty_section"]

BEGIN, END = "<!-- bayeformers: begin", "<!-- bayeformers: end -->"
_REPLACED = " (what stands between these two comments is replaced when the card is written again) -->"


class Describes(Protocol):
    """An abstention policy."""

    def describe(self) -> str:
        """What it promises, in words."""


@dataclass(frozen=True, kw_only=True)
class CardDetails:
    """What a card says beside the posterior and its metrics; what is None is left out.

    Attributes:
        repo: the name on the hub, or the folder, from which the card's own code loads the model.
        name: of the model; None: the last part of ``repo``.
        task: such as "text-classification"; None: found from the model's class.
        dataset: names of the data, for readers.
        dataset_id: the data's names on the hub.
        base_model: name on the hub of the model that was fine-tuned.
        license: its identifier on the hub.
        language: codes of the languages.
        tags: further tags.
        measured_on: the rows of the metrics, in words; where there are none, why.
        num_samples: draws of a prediction, as the metrics were measured.
        method: how these were predicted, as of `predict`; None: by the posterior's own default.
        picture: file of the reliability picture, relative to the card; where there is none, a line that says why.
        has_tokenizer: whether a tokenizer is saved beside the model.
    """

    repo: str = "."
    name: str | None = None
    task: str | None = None
    dataset: Sequence[str] = ()
    dataset_id: Sequence[str] = ()
    base_model: str | None = None
    license: str | None = None
    language: Sequence[str] = ()
    tags: Sequence[str] = ()
    measured_on: str | None = None
    num_samples: int = 16
    method: str | None = None
    picture: str | None = None
    has_tokenizer: bool = False


def uncertainty_section(
    posterior: Posterior, metrics: Metrics, policy: Describes | None, details: CardDetails, task: str | None
) -> str:
    """Return the section as Markdown, between the comments by which it is found again.

    Args:
        posterior: what predicts.
        metrics: by name, numbers or intervals.
        policy: when the model refuses; None: never.
        details: the rest.
        task: of the hub; None: none of it.
    """
    parts = [
        f"{BEGIN}{_REPLACED}",
        "## Uncertainty",
        _opening(posterior),
        _table(("", ""), [(name, text) for name, text in (facts_of(posterior) | _draws(posterior, details)).items()]),
        "### Measured",
        *_measured(metrics, details),
        "### When it refuses",
        _no_policy() if policy is None else policy.describe(),
        "### How to load it",
        *_loading(posterior, details, task),
        "### What the uncertainty means, and what it does not",
        _meaning(posterior),
        END,
    ]
    return "\n\n".join(parts)


def _opening(posterior: Posterior) -> str:
    if isinstance(posterior, PointPosterior):
        return "This model is a point estimate: its probabilities are those of one network."
    return (
        "This model is a posterior over networks, made with [bayeformers](https://pypi.org/project/bayeformers/): a "
        "prediction averages over them, and says how far they agree."
    )


def _draws(posterior: Posterior, details: CardDetails) -> dict[str, str]:
    if isinstance(posterior, PointPosterior):
        return {}
    method = _method(posterior, details)
    if _is_sampled(posterior, details):
        return {"prediction": f"the average over {details.num_samples} drawn networks, as measured below"}
    is_head = method == "head"
    how = "the last layer's own Gaussian, in one pass" if is_head else f"the linearised network (`{method}`), no draws"
    return {"prediction": how}


def _method(posterior: Posterior, details: CardDetails) -> str:
    return details.method or str(getattr(posterior, "default_method", "sample"))


def _is_sampled(posterior: Posterior, details: CardDetails) -> bool:
    return _method(posterior, details) in SAMPLING


def _options(posterior: Posterior, details: CardDetails) -> str:
    """Arguments with which a prediction is the one that was measured."""
    method = [] if details.method is None else [f'method="{details.method}"']
    draws = [f"num_samples={details.num_samples}"] if _is_sampled(posterior, details) else []
    return "".join(f", {option}" for option in (*method, *draws))


def _measured(metrics: Metrics, details: CardDetails) -> list[str]:
    if not metrics:
        return [details.measured_on or "Nothing was measured yet."]
    rows, resamples = [], set()
    for name, value in metrics.items():
        if isinstance(value, BootstrapInterval):
            resamples.add(value.num_resamples)
            rows.append((
                name,
                shown_number(value.estimate),
                f"{shown_number(value.low)} to {shown_number(value.high)}",
            ))
        else:
            rows.append((name, shown_number(value), ""))
    found = [f"On {details.measured_on}:" if details.measured_on else "On rows that are not named:"]
    found.append(_table(("metric", "value", "95 % interval"), rows))
    if resamples:
        found.append(f"Intervals: percentiles of {max(resamples):,} bootstrap resamples of the rows.")
    said = ", ".join(f"{name} ({text})" for name, text in _LOWER.items() if name in metrics)
    if said:
        found.append(f"Lower is better: {said}.")
    if details.picture:
        is_file = details.picture.endswith(".png")
        alt = "Accuracy against confidence, in bins of equal numbers of examples, with 95 % intervals"
        found.append(f"![{alt}]({details.picture})" if is_file else details.picture)
    return found


_LOWER = {
    "nll": "negative log-likelihood, in nats",
    "ece": "expected calibration error",
    "brier": "squared error of the probabilities",
    "aurc": "area under the risk-coverage curve",
    "rmse": "root mean squared error",
}


def _no_policy() -> str:
    return (
        "It never refuses: no abstention policy was fitted. `bayeformers.fit_abstention` makes one, from labelled rows "
        "and the risk that is allowed."
    )


def _loading(posterior: Posterior, details: CardDetails, task: str | None) -> list[str]:
    if isinstance(posterior, PointPosterior):
        kind = type(posterior.model).__name__
        return [_code(f"from transformers import {kind}", "", f'model = {kind}.from_pretrained("{details.repo}")')]
    options = _options(posterior, details)
    found = [_code(*_load_lines(details, task, options, _is_regression(posterior)))]
    if task in _ASKED and task != _GENERATES and details.has_tokenizer:
        found.append(_code(*_pipeline_lines(details, task, options)))
    library = "PEFT" if "peft" in details.tags else "transformers"
    found.append(f"Loaded by {library} alone, without bayeformers, it is the network at the posterior's mean.")
    return found


_ASKED = {
    "text-classification": '"A text to classify."',
    "token-classification": '"Ada Lovelace lived in London."',
    "fill-mask": 'f"A word is {ask.tokenizer.mask_token}."',
    "text-generation": '"Once upon a time"',
}
_TEXT, _GENERATES = ("text-classification", "token-classification"), "text-generation"


def _load_lines(details: CardDetails, task: str | None, options: str, is_regression: bool) -> list[str]:
    draws = f"num_samples={details.num_samples}, max_new_tokens=20"
    generate = f"answers = bayeformers.generate(model, [{_ASKED[_GENERATES]}], {draws}, tokenizer=tokenizer)"
    predict = f"predictive = bayeformers.predict(model, inputs{options})"
    reads = [
        "predictive.probs               # averaged over the posterior",
        "predictive.predictive_entropy  # total uncertainty, in nats",
        "predictive.mutual_information  # the part that more data could remove",
    ]
    if is_regression:
        reads = [
            "predictive.mean                # averaged over the posterior",
            "predictive.epistemic_variance  # the part of the variance that more data could remove",
        ]
    load = f'model = bayeformers.from_pretrained("{details.repo}").eval()'
    written = [
        "answers.text       # by each network",
        "answers.epistemic  # of each token: how far they differ, in nats",
    ]
    if task not in (*_TEXT, _GENERATES) or not details.has_tokenizer:
        then = f"# then: bayeformers.predict(model, inputs{options}), of what the model's forward takes"
        return ["import bayeformers", "", load, then]
    head = ["import bayeformers", "from transformers import AutoTokenizer", "", load]
    head.append(f'tokenizer = AutoTokenizer.from_pretrained("{details.repo}")')
    if task == _GENERATES:
        return [*head, generate, *written]
    return [*head, f'inputs = dict(tokenizer([{_ASKED[task]}], return_tensors="pt"))', predict, *reads]


def _pipeline_lines(details: CardDetails, task: str, options: str) -> list[str]:
    return [
        "from bayeformers import pipeline",
        "",
        f'ask = pipeline("{task}", model="{details.repo}"{options})',
        f"ask({_ASKED[task]})",
    ]


def _is_regression(posterior: Posterior) -> bool:
    problem_type = getattr(posterior, "problem_type", None)  # a posterior of somebody else's may not say
    return problem_type is not None and get_likelihood(problem_type()).has_noise


def _meaning(posterior: Posterior) -> str:
    return "\n".join([
        *(_OF_NUMBERS if _is_regression(posterior) else _OF_CLASSES),
        "* It says nothing about rows unlike those that were measured, and a small epistemic part does not prove "
        "that an input is familiar: the posterior is an approximation, over the weights named above and around "
        "one training.",
        "* It is no judgement of harm, fairness or truth: labels that are wrong in the training data are learned "
        "with confidence.",
    ])


_OF_CLASSES = (
    "* The **score** is an averaged probability. How far it can be trusted as a frequency, on data like those "
    "above, is what the calibration error and the picture say.",
    "* The **total** uncertainty is the entropy of the averaged prediction. Its **aleatoric** part is what the "
    "networks say by themselves: ambiguous inputs, noisy labels. Its **epistemic** part (mutual information) "
    "is how far they contradict each other: what more training data could settle.",
)
_OF_NUMBERS = (
    "* The prediction is the average of the networks' numbers.",
    "* The **total** uncertainty is the variance of the prediction. Its **aleatoric** part is the noise around each "
    "network's number. Its **epistemic** part is the variance among these numbers: what more training data could "
    "settle.",
)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _code(*lines: str) -> str:
    return "\n".join(["```python", *lines, "```"])


def shown_number(value: float) -> str:
    """A metric as the section's table has it."""
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:.4g}"
