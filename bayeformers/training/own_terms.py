"""What a model's own loss holds besides the likelihood: a mixture's balance loss, a z-loss, smoothing, class weights.

The ELBO takes its likelihood from the logits, and such terms would vanish with the model's loss. They are what the own
loss leaves when the plain mean that heads of this kind take is subtracted: loss - mean_loss. A `compute_loss_func`
takes the place of both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..forward import output_field
from ..likelihoods import ProblemType, get_likelihood, without_ignored
from ..nn.draws import posterior_mean
from ..sampling.random_state import preserved

__all__ = ["OWN_TERMS", "ForwardPass", "given_loss", "has_own_terms", "own_terms"]

OWN_TERMS = (
    "The own loss of {} has terms besides the likelihood (a mixture's balance loss, class weights, ...): they are "
    "trained along, and logged as `own_terms`."
)

_NO_LOSS = (
    "`compute_loss_func` must return its loss as a tensor, got {}. The batch's labels are taken out of the model's "
    "forward and handed to the function, so `outputs` has no `loss`: compute it from `outputs` and `labels`, the "
    "function's second argument."
)


class ForwardPass(NamedTuple):
    """One training forward: the items' summed NLL, what the model's own loss holds besides, and its outputs."""

    nll: Tensor
    own_terms: Tensor | float
    outputs: Any


def own_terms(outputs: Any, inputs: Mapping[str, Any], problem_type: ProblemType) -> Tensor:
    """Subtract from the model's ``loss`` the mean likelihood that it contains.

    Args:
        outputs: the model's output, of a forward with labels.
        inputs: the batch, in which the label that counts for nothing is -100.
        problem_type: what the head predicts.

    Returns:
        A scalar with gradient.

    Raises:
        ValueError: ``outputs`` have no loss.
    """
    loss: Tensor | None = output_field(outputs, "loss")
    if loss is None:
        raise ValueError("The model's output has no `loss`, of which its own terms are a part.")
    return loss.float().mean() - get_likelihood(problem_type).mean_loss(outputs, inputs)


@torch.no_grad()
def has_own_terms(
    model: nn.Module, inputs: Mapping[str, Any], labelled: Mapping[str, Any], problem_type: ProblemType
) -> bool:
    """Try on one batch, at the posterior mean in `eval()`, whether the model's loss is more than its likelihood.

    Args:
        model: the model, whose mode and random state are left as they were.
        inputs: the batch, its labels under "labels" or as ends of a span.
        labelled: the same as the model takes it.
        problem_type: what the head predicts.

    Returns:
        Whether it has terms of its own; False where it does not take these labels.
    """
    likelihood = get_likelihood(problem_type)
    if not likelihood.has_stock_loss or not isinstance(inputs.get(likelihood.label_names[0]), Tensor):
        return False
    inputs = without_ignored(inputs, model, problem_type)
    modes = {module: module.training for module in model.modules()}
    try:
        with preserved(), posterior_mean(model.eval()):
            outputs = model(**labelled)
            loss = output_field(outputs, "loss")
            if not isinstance(loss, Tensor):
                return False
            terms, plain = own_terms(outputs, inputs, problem_type), likelihood.mean_loss(outputs, inputs)
    except (KeyError, RuntimeError, TypeError, ValueError, IndexError, AttributeError, NameError):
        # a loss that does not take these labels is not what would be trained; NameError: DPT's without auxiliary head
        return False
    finally:
        for module, mode in modes.items():
            module.training = mode
    if any(_is_close(loss, other, 1e-3) for other in likelihood.other_means(outputs, inputs)):
        return False
    # a cross-entropy has the dtype that it is computed in; a squared error of float32 labels hides that of the logits
    has_float_labels = likelihood.has_noise or likelihood.is_bernoulli
    rounding = 2e-5 if (outputs["logits"] if has_float_labels else loss).dtype.itemsize > 2 else 2e-2
    return bool(terms.isfinite()) and not _is_close(loss, plain, rounding)


def _is_close(loss: Tensor, plain: Tensor, rounding: float) -> bool:
    return float((loss.float().mean() - plain).abs()) <= rounding * max(1.0, float(plain.abs()))


def given_loss(function: Callable[..., Any], outputs: Any, labels: Any, num_items: Tensor) -> Tensor:
    """Call ``function(outputs, labels, num_items)``.

    Args:
        function: the user's loss.
        outputs: of the model, which was given no labels.
        labels: of the batch.
        num_items: of the batch.

    Returns:
        The loss.

    Raises:
        ValueError: the function returns no tensor, or reads a loss that is not there.
        AttributeError: an error of the function's own.
        KeyError: the same.
        TypeError: the same.
    """
    try:
        loss = function(outputs, labels, num_items_in_batch=num_items)
    except (AttributeError, KeyError, TypeError) as error:
        reads_loss = any(word in str(error) for word in ("'loss'", "NoneType"))
        if not reads_loss or output_field(outputs, "loss") is not None:
            raise
        raise ValueError(_NO_LOSS.format(repr(error))) from error
    if not isinstance(loss, Tensor):
        raise ValueError(_NO_LOSS.format(repr(loss)))
    return loss
