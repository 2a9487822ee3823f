"""The items of a batch, the unit in which the ELBO counts data: their labels, their number and their NLL.

A model's `loss` is often no log-likelihood: it is a mean over whatever the head averages (labels, positions, tokens of
this micro-batch), it halves the question-answering sum, and for regression it is a squared error without a variance.
So the NLL comes from the logits and the labels, one number per *item*: an example, or, where every token or pixel has
a label, each label other than -100. The classes of `likelihoods` say what it is.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..forward import IGNORED, labels_of, output_field
from ..likelihoods import ItemNLL, NoiseStd, ProblemType, get_likelihood
from ..likelihoods.classes import align_causal
from ..likelihoods.gaussian import regression_labels
from ..posteriors.heads import without_labels

__all__ = ["IGNORED", "LABEL_NAMES", "ItemNLL", "align_causal", "as_labels", "check_label_names", "count_items",
           "item_nll", "labels_of", "model_inputs", "output_field", "regression_labels"]  # fmt: skip

LABEL_NAMES = ("labels", "shift_labels", "start_positions", "end_positions")


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
