"""The items of a batch, the unit in which the ELBO counts data: their labels, their number and their NLL.

A model's `loss` is often no log-likelihood: it is a mean over whatever the head averages (labels, positions, tokens of
this micro-batch), it halves the question-answering sum, and for regression it is a squared error without a variance.
So the NLL comes from the logits and the labels, one number per *item*: an example, or, where every token or pixel has
a label, each label other than -100. The classes of `likelihoods` say what it is.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..conversion.convert import is_bayesian
from ..forward import IGNORED, labels_of, logits_of, output_field
from ..likelihoods import (
    ItemNLL,
    Likelihood,
    NoiseStd,
    ProblemType,
    get_likelihood,
    record_problem_type,
    resolve_problem_type,
)
from ..likelihoods.classes import align_causal
from ..likelihoods.gaussian import regression_labels, squeezed
from ..posteriors import PointPosterior, VariationalPosterior
from ..posteriors.heads import without_labels
from ..sampling.random_state import preserved

__all__ = [
    "IGNORED", "LABEL_NAMES", "ItemNLL", "LabelledBatch", "LikelihoodsByLabels", "align_causal", "as_labels",
    "check_label_names", "count_items", "item_nll", "labels_of", "model_inputs", "output_field",
    "regression_labels", "residual_std", "settled_problem_type",
]  # fmt: skip

LABEL_NAMES = ("labels", "shift_labels", "start_positions", "end_positions")


_OPEN = (
    "`config.problem_type` is not set and the labels are floating-point numbers: the head is evaluated as multi-label, "
    "and read as a softmax where there are no labels. Set it."
)


def as_labels(inputs: Mapping[str, Any], label_names: Sequence[str] | None) -> Mapping[str, Any]:
    """The batch with the one label that `label_names` names under "labels", where the likelihoods look for it."""
    own = [name for name in label_names or () if name not in LABEL_NAMES and name in inputs]
    if len(own) != 1 or "labels" in inputs or "start_positions" in inputs:
        return inputs
    return {"labels" if name == own[0] else name: value for name, value in inputs.items()}


def check_label_names(label_names: Sequence[str] | None, problem_type: ProblemType) -> None:
    """Raise ValueError for several `label_names` of a head with one likelihood."""
    own = [name for name in label_names or () if name not in LABEL_NAMES]
    if get_likelihood(problem_type).is_known and len(own) > 1:
        raise ValueError(
            f"`label_names` must name one label of a {problem_type} head, got {list(own)}: the others would not be "
            "trained. Pass them on as inputs, and train them by `compute_loss_func`."
        )


@dataclass
class LabelledBatch:
    """A batch as the training loss reads it, once per micro-batch.

    Attributes:
        given: what the model takes, labels under its own names.
        inputs: the same with the label under "labels".
        labelled: the same in which the label that counts for nothing is -100.
        likelihood: of the labels.
        count: counts the items; asked for when a loss needs it.
    """

    given: dict[str, Any]
    inputs: Mapping[str, Any]
    labelled: Mapping[str, Any]
    likelihood: Likelihood
    count: Callable[[], Tensor]

    @cached_property
    def num_items(self) -> Tensor:
        """Items of the batch in the unit of its loss, 0-dimensional."""
        return self.count()


class LikelihoodsByLabels:
    """The likelihood of one head for every kind of labels, found at the first batch of the kind."""

    def __init__(self) -> None:
        self._known: dict[torch.dtype | None, Likelihood] = {}

    def get(self, labels: Any, find: Callable[[], Likelihood]) -> Likelihood:
        """That of a batch's ``labels``, by their dtype; of a batch without any, that of None."""
        kind = labels.dtype if isinstance(labels, Tensor) else None
        if kind not in self._known:
            self._known[kind] = find()
        return self._known[kind]


def settled_problem_type(
    model: nn.Module, labels: Any, say: Callable[[str], None], *, has_own_loss: bool, or_unknown: bool
) -> ProblemType:
    """The problem type of a model's head, which first labels decide as they do in the model's own loss.

    Args:
        model: the model, in whose configuration they are recorded.
        labels: of a batch, if it has any.
        say: tells the user of labels that do not go with the configuration.
        has_own_loss: whether a function of the user's is the loss, and labels decide nothing.
        or_unknown: whether a head of no known kind is "unknown", else an error.

    Returns:
        The problem type.
    """
    if isinstance(labels, Tensor) and not has_own_loss:
        record_problem_type(model, labels)
    elif isinstance(labels, Tensor) and labels.is_floating_point():
        unlabelled = resolve_problem_type(model, or_unknown=True)
        if unlabelled == "single_label_classification":
            say(_OPEN)
    return resolve_problem_type(model, labels, or_unknown=or_unknown)


def model_inputs(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What the forward takes: the batch less its labels, so that it computes no loss."""
    kept = without_labels(model, inputs)
    assert isinstance(kept, Mapping)  # as `inputs` is
    return dict(kept)


def count_items(inputs: Mapping[str, Any], problem_type: ProblemType) -> Tensor:
    """Count the items of a batch.

    Returns:
        A 0-dimensional int64 tensor on the batch's device.

    >>> import torch
    >>> labels = torch.tensor([[5, 6, 7], [5, 6, -100]])
    >>> count_items({"labels": labels}, "causal_lm").item()     # the first position is never predicted
    3
    """
    return get_likelihood(problem_type).item_mask(inputs).sum()


def item_nll(
    outputs: Any, inputs: Mapping[str, Any], problem_type: ProblemType, noise_std: NoiseStd | None = None
) -> ItemNLL:
    """Take -log p(y | x, w) of each item of a batch.

    Args:
        outputs: the model's output: a ModelOutput, dict, tuple or logits.
        inputs: the batch, labels included.
        problem_type: what the head predicts.
        noise_std: the Gaussian likelihood's standard deviation, in the labels' unit, or "head" for outputs that are L
            means and then L log variances; regression only.

    Returns:
        Nats, float32 or better, with gradient; a ValueError names labels that are missing or do not fit.

    >>> import torch
    >>> logits, labels = torch.zeros(2, 4), torch.tensor([1, 3])
    >>> item_nll(logits, {"labels": labels}, "single_label_classification").values
    tensor([1.3863, 1.3863])
    """
    return get_likelihood(problem_type).nll(outputs, inputs, noise_std)


@torch.no_grad()
def residual_std(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    gather: Callable[[Tensor], Tensor] = lambda values: values,
) -> float:
    """Measure sqrt(mean (y - f(x; mu))^2) of ``model`` at its posterior mean.

    Args:
        model: the model, whose mode and random state are left as they were.
        batches: the training data, with labels.
        gather: collects a batch's per-example values from all ranks.

    Returns:
        A standard deviation in the labels' unit.

    Raises:
        ValueError: a residual of 0, which is no noise.
    """
    squared = []
    posterior = VariationalPosterior(model, 0) if is_bayesian(model) else PointPosterior(model)
    with preserved(), posterior.recording_view() as view:
        for inputs in batches:
            values = squeezed(logits_of(view.model(**model_inputs(model, inputs)))).double()
            residual = (labels_of(inputs).to(values).reshape(values.shape) - values).reshape(len(values), -1)
            squared.append(gather(residual.square().mean(1)).cpu())
    rmse = float(torch.cat(squared).mean().sqrt())
    if not rmse > 0:
        raise ValueError(f'`noise_std`="residual" is {rmse} on this training data; give a number > 0.')
    return rmse
