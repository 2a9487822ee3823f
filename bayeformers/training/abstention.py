"""What an abstention policy says of a Trainer's predictions, and a policy that is fitted to these."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from ..checks import check_choice, is_real
from ..guarantees import AbstentionPolicy, attach_policy, errors_of, fit_abstention, policy_of, score_of
from ..guarantees.policy import PREDICTED
from ..guarantees.saving import mismatch, settings_of, weights_digest
from ..likelihoods import get_likelihood
from ..posteriors import BasePosterior, PointPosterior
from ..posteriors.heads import known_problem_type
from ..predictive import Predictive
from .arguments import BayesianTrainingArguments

__all__ = ["abstained", "fit_by_trainer"]

_COLUMNS = {
    "entropy": "predictive_entropy",
    "mutual_information": "mutual_information",
    "expected_entropy": "expected_entropy",
}
_DEVIATIONS = ("epistemic_std", "predictive_std")
_OPTIONS = ("max_risk", "confidence", "score", "groups", "errors")


class _Trainer(Protocol):
    """What is asked of a trainer."""

    model: nn.Module
    args: BayesianTrainingArguments

    @property
    def posterior(self) -> BasePosterior | None:
        """That predicts."""

    def predict(self, test_dataset: Any) -> Any:
        """With `predictions`, `label_ids` and `uncertainty`."""

    def _num_samples(self) -> int: ...

    def _say(self, message: str) -> None: ...


def abstained(trainer: _Trainer, dataset: Any, output: Any) -> NDArray[np.bool_] | None:
    """Return what the model's policy refuses of the rows of a prediction, (N,) or (N, T).

    Args:
        trainer: whose model may carry a policy.
        dataset: that was predicted, of which a policy may need a column.
        output: of `trainer.predict`.

    Returns:
        None where there is no policy, or none that holds of such predictions, of which the trainer then tells.
    """
    policy = policy_of(trainer.model)
    if policy is None:
        return None
    reason = mismatch(policy, trainer.posterior, trainer.args.eval_method, trainer._num_samples())
    scores = None if reason else _scores(trainer, output, policy.score)
    if scores is None:
        reason = reason or f"its score {policy.score!r} cannot be computed of such predictions"
        trainer._say(f"The model's abstention policy is not applied: {reason}.")
        return None
    groups: Any = None
    if policy.group_by == PREDICTED:
        groups = torch.from_numpy(np.asarray(output.predictions)).argmax(-1)
    elif policy.groups is not None:
        column = policy.group_by or "group"
        if column not in (getattr(dataset, "column_names", None) or ()):
            trainer._say(f"The model's abstention policy is not applied: the dataset has no column {column!r}.")
            return None
        groups = list(dataset[column])
    return policy.abstain(scores, groups).numpy()


def fit_by_trainer(trainer: Any, dataset: Any, **options: Any) -> AbstentionPolicy:
    """Fit a policy to a Trainer's predictions of labelled rows, and attach it to the model.

    Args:
        trainer: a trainer.
        dataset: labelled rows.
        **options: of `fit_abstention`; the rest is as the trainer's arguments say.

    Returns:
        The policy.

    Raises:
        TypeError: another option.
        ValueError: rows without labels, or a score that the predictions have not.
    """
    for name in options:
        if name not in _OPTIONS:
            raise TypeError(
                f"`fit_abstention` of a trainer takes {_OPTIONS}, got {name!r}: the rest is as its `args` say."
            )
    if dataset is None:
        raise ValueError("`dataset` must hold labelled calibration rows, got None, and there is no `eval_dataset`.")
    attached = policy_of(trainer.model)
    attach_policy(trainer.model, None)
    try:
        output = trainer.predict(dataset)
        score, errors, groups = (options.pop(name, None) for name in ("score", "errors", "groups"))
        score = "confidence" if score is None else score
        scores = _scores(trainer, output, score)
        if scores is None:
            raise ValueError(
                f"`score`={score!r} cannot be computed of the predictions of a {_problem(trainer)!r} head."
            )
        if errors is None or is_real(errors):
            errors = _errors(trainer, output, errors)
        group_by = groups if isinstance(groups, str) else (None if groups is None else "group")
        if groups == PREDICTED and isinstance(groups, str):
            if get_likelihood(_problem(trainer)).is_bernoulli:
                raise ValueError(f"`groups`={PREDICTED!r} needs one predicted class, got a {_problem(trainer)!r} head.")
            groups = torch.from_numpy(np.asarray(output.predictions)).argmax(-1)
        elif isinstance(groups, str):
            check_choice("groups", groups, tuple(getattr(dataset, "column_names", None) or ()))
            groups = list(dataset[groups])
        found = fit_abstention(scores, score=score, errors=errors, groups=groups, **options)
    except BaseException:
        if attached is not None:
            attach_policy(trainer.model, attached)
        raise
    posterior = trainer.posterior or PointPosterior(trainer.model)
    policy = replace(
        found,
        group_by=group_by,
        method=trainer.args.eval_method or posterior.default_method,
        num_samples=trainer._num_samples(),
        posterior=type(posterior).__name__,
        weights=weights_digest(trainer.model),
        settings=settings_of(posterior),
    )
    attach_policy(trainer.model, policy)
    return policy


def _problem(trainer: Any) -> str:
    return known_problem_type(trainer.model)


def _errors(trainer: Any, output: Any, tolerance: float | None) -> Tensor:
    if output.label_ids is None:
        raise ValueError("`dataset` must have labels to calibrate on.")
    labels = output.label_ids
    given = labels if isinstance(labels, np.ndarray) else np.stack(labels, axis=1)
    predictive = _predictive(_problem(trainer), output)
    if predictive is None:
        raise ValueError(f"`errors` must be given for a {_problem(trainer)!r} head: one entry per row.")
    return errors_of(predictive, torch.from_numpy(given), tolerance)


def _predictive(problem_type: str, output: Any) -> Predictive | None:
    """The averaged prediction as one of a single draw; None of heads whose predictions are no array."""
    likelihood, values = get_likelihood(problem_type), output.predictions
    if not isinstance(values, np.ndarray) or likelihood.is_per_pixel or problem_type == "question_answering":
        return None
    tensor = torch.from_numpy(values).double()
    if likelihood.has_noise:
        return Predictive(problem_type=problem_type, values=(tensor[:, 0] if tensor.shape[-1] == 1 else tensor)[None])
    if likelihood.is_bernoulli:
        tensor = torch.stack([F.logsigmoid(-tensor), F.logsigmoid(tensor)], dim=-1)
    return Predictive(problem_type=problem_type, log_probs=tensor[None])


def _scores(trainer: Any, output: Any, score: str) -> Tensor | None:
    problem = _problem(trainer)
    if score in _COLUMNS and _COLUMNS[score] in output.uncertainty:
        values = -torch.from_numpy(output.uncertainty[_COLUMNS[score]]).double()
        is_free = get_likelihood(problem).is_per_token or get_likelihood(problem).is_per_pixel
        return values if is_free or values.dim() == 1 else values.flatten(1).sum(1)
    if score in _DEVIATIONS and "epistemic_variance" in output.uncertainty:
        parts = ["epistemic_variance", *(["aleatoric_variance"] if score == "predictive_std" else [])]
        if any(name not in output.uncertainty for name in parts):
            return None
        variance = torch.from_numpy(sum(output.uncertainty[name] for name in parts)).double()
        return -(variance.reshape(len(variance), -1).sqrt().amax(1))
    predictive = _predictive(problem, output)
    if predictive is None or score not in ("confidence", "margin") or get_likelihood(problem).has_noise:
        return None
    found = score_of(predictive, score)
    entropy = output.uncertainty.get("predictive_entropy")
    if found.dim() > 1 and entropy is not None:
        found = found.masked_fill(torch.from_numpy(entropy).isnan(), torch.nan)  # padding
    return found
