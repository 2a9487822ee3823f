"""Where mixed precision has to stay outside: curvature and Jacobians."""

import contextlib
from collections.abc import Iterator

from torch import nn

__all__ = ["own_precision"]


@contextlib.contextmanager
def own_precision(model: nn.Module) -> Iterator[None]:
    """Without the autocast that accelerate puts into the ``forward`` of a mixed-precision run, until exit.

    It lies inside: a `torch.autocast(enabled=False)` around the call does not reach it. Covariances are sums of squares
    of gradients, for which eight bits are too few.
    """
    wrapped, original = model.__dict__.get("forward"), model.__dict__.get("_original_forward")
    if wrapped is None or original is None:
        yield
        return
    model.forward = original
    try:
        yield
    finally:
        model.forward = wrapped
