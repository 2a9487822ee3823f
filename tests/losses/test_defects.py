"""Calibration losses: each property against the formula that broke it elsewhere."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bayeformers.losses import auavu_loss, avuc_loss

Loss = Callable[[Tensor, Tensor], Tensor]
EPS = 0.01


def counts(log_probs: Tensor, labels: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """(n_AC + n_IU, n_AU + n_IC) of mutual information, one example at a time; ``log_probs`` (S, N, C)."""
    aligned = misaligned = torch.zeros(())
    for n, label in enumerate(labels):
        draws = log_probs[:, n].exp()
        p = draws.mean(0)
        u = -(p * p.log()).sum() + (draws * draws.log()).sum(-1).mean()
        right, certain = p.argmax() == label, u <= threshold
        weight = (p.max() if right else 1 - p.max()) * (1 - u.tanh() if certain else u.tanh())
        aligned, misaligned = (aligned + weight, misaligned) if right == certain else (aligned, misaligned + weight)
    return aligned, misaligned


@pytest.mark.protects("avuc_runs")
def test_avuc_runs() -> None:
    """A batch of one gives a loss below log(1 + (1 + eps) / eps) = 4.6; an eps of 1e-10 gives 23."""
    logits = torch.tensor([[9.0, 0.0, 0.0]], requires_grad=True)  # certain and wrong

    def check(loss: Loss) -> None:
        value = loss(logits, torch.tensor([1]))
        (slope,) = torch.autograd.grad(value, logits)
        assert bool(slope.isfinite().all())
        assert float(value.detach()) <= math.log1p((1 + EPS) / EPS)

    check(lambda logits, labels: avuc_loss(logits, labels, 0.5))
    check(auavu_loss)

    def with_empty_groups(logits: Tensor, labels: Tensor) -> Tensor:
        p = logits.softmax(-1)
        n_ic = p.max(-1).values * (1 - (-(p * p.log()).sum(-1)).tanh())
        return torch.log(1 + n_ic.sum() / (0 + 1e-10))

    with pytest.raises(AssertionError):
        check(with_empty_groups)


@pytest.mark.protects("avuc_runs")
def test_avuc_is_differentiable() -> None:
    """The area under AvU has a gradient; computed in NumPy it has none, and where NumPy's error is hidden it is 0."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 3, generator=generator, requires_grad=True)
    labels = torch.randint(3, (6,), generator=generator)

    def check(loss: Loss) -> None:
        value = loss(logits, labels)
        assert value.requires_grad and float(value.detach()) > 0
        (slope,) = torch.autograd.grad(value, logits)
        assert bool((slope != 0).any())

    def hidden(logits: Tensor, labels: Tensor) -> Tensor:
        try:
            area = float(logits.softmax(-1).numpy().mean())
        except RuntimeError:
            area = 0.0
        return torch.tensor(area)

    check(auavu_loss)
    with pytest.raises(AssertionError):
        check(hidden)


@pytest.mark.protects("avuc_runs")
def test_avuc_reduces_over_draws() -> None:
    """The mutual information is of each example over its draws; a mean over the batch mixes examples up."""
    generator = torch.Generator().manual_seed(0)
    log_probs = (2 * torch.randn(5, 7, 3, generator=generator)).log_softmax(-1)
    labels = torch.randint(3, (7,), generator=generator)

    def check(loss: Loss) -> None:
        aligned, misaligned = counts(log_probs, labels, 0.3)
        expected = torch.log1p((misaligned + EPS) / (aligned + EPS))
        torch.testing.assert_close(loss(log_probs, labels), expected)

    def over_the_batch(log_probs: Tensor, labels: Tensor) -> Tensor:
        mixed = log_probs.transpose(0, 1)[:, : len(labels)]  # (N, S, C), its first axis averaged
        aligned, misaligned = counts(mixed, labels[: mixed.shape[1]], 0.3)
        return torch.log1p((misaligned + EPS) / (aligned + EPS))

    check(lambda draws, labels: avuc_loss(draws, labels, 0.3, uncertainty="mutual_information"))
    with pytest.raises(AssertionError):
        check(over_the_batch)
