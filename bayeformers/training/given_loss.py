"""What a `compute_loss_func` returns, and what is wrong with one that reads the model's own loss."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .likelihood import output_field

__all__ = ["given_loss"]

_NO_LOSS = (
    "`compute_loss_func` must return its loss as a tensor, got {}. The batch's labels are taken out of the model's "
    "forward and handed to the function, so `outputs` has no `loss`: compute it from `outputs` and `labels`, the "
    "function's second argument."
)


def given_loss(function: Callable[..., Any], outputs: Any, labels: Any, num_items: Tensor) -> Tensor:
    """``function(outputs, labels, num_items_in_batch)``.

    Errors: ValueError where it is no tensor, or where the function reads the loss of ``outputs`` that have none.
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
