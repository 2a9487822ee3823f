"""Where mixed precision has to stay outside: curvature and Jacobians; and steps that 16 bits cannot hold."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..nn.base import variational_tensors
from ..sampling.views import unwrapped_forward

__all__ = ["lost_steps", "lost_steps_warning", "own_precision"]

SAMPLED_PER_TENSOR = 4096


@contextlib.contextmanager
def own_precision(model: nn.Module) -> Iterator[None]:
    """Without the autocast that accelerate puts into the ``forward`` of a mixed-precision run, until exit.

    It lies inside: a `torch.autocast(enabled=False)` around the call does not reach it. Covariances are sums of squares
    of gradients, for which eight bits are too few.
    """
    with unwrapped_forward(model):
        yield


def lost_steps_warning(model: nn.Module, learning_rate: float) -> str | None:
    """What to say of :func:`lost_steps`; None where few are lost."""
    share, dtype = lost_steps(model, learning_rate)
    if share <= 0.05:
        return None
    return (
        f"The means are {dtype}, in which a step of `learning_rate`={learning_rate} leaves {share:.0%} of them where "
        "they are. Load the model with `dtype=torch.float32`; `bf16=True` computes in 16 bits all the same."
    )


@torch.no_grad()
def lost_steps(model: nn.Module, learning_rate: float) -> tuple[float, torch.dtype | None]:
    """Return the share of trainable 16-bit means that a step of ``learning_rate`` does not move, and their dtype.

    A number w = m 2^e, 1/2 <= m < 1, has neighbours 2^(e - 1) eps away: less than half of that rounds to w again.
    """
    means = [tensor.loc for tensor in variational_tensors(model)]
    narrow = [mean for mean in means if mean.requires_grad and mean.dtype in (torch.bfloat16, torch.float16)]
    if not narrow:
        return 0.0, None
    lost = torch.cat([_is_lost(mean, learning_rate).cpu() for mean in narrow])
    return float(lost.float().mean()), narrow[0].dtype


def _is_lost(mean: Tensor, learning_rate: float) -> Tensor:
    sampled = mean.flatten()[:: max(1, mean.numel() // SAMPLED_PER_TENSOR)].float()
    exponent = torch.frexp(sampled).exponent
    half_spacing = torch.ldexp(torch.full_like(sampled, torch.finfo(mean.dtype).eps), exponent - 2)
    return (half_spacing > learning_rate) & (sampled != 0)
