"""`to_blob`: LoRA trained by Bayes by backpropagation in A alone (Wang et al. 2024)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_utils import has_length

from ..checks import check_count, check_number
from ..conversion.convert import to_bayesian
from ..distributions import NormalPrior
from ..nn.base import variational_tensors
from .layers import lora_pairs

__all__ = ["BlobReweighting", "blob_kl_weights", "to_blob"]


def to_blob(
    model: nn.Module,
    *,
    epsilon: float = 0.05,
    prior_std: float = 0.2,
    estimator: str = "flipout",
    seed: int = 0,
) -> nn.Module:
    r"""Make the active LoRA adapter Bayesian in its A, as BLoB does, in place; B and a fresh head train as they are.

    Wang et al. 2024 (arXiv 2406.11675). The posterior is A ~ N(M, \Omega^2), each element by itself; with B fixed it
    is a Gaussian of low rank over the whole weight W0 + s B A (theorem 3.1). The prior of the weight is N(W0, s^2
    prior_std^2 B B^T (x) I), of the same directions; then KL(q(W) || p(W)) = KL(q(A) || N(0, prior_std^2)) (theorem
    3.2), whatever B of full column rank is, which is what `kl_divergence` computes. The scales start at G^2 with G
    uniform in [epsilon / sqrt(2), epsilon], elementwise: far below the prior's, so that a fresh adapter learns before
    the noise grows.

    The paper trains G by the rate of the means; rho moves log sigma as fast at 2 / G times that rate:
    ``rho_learning_rate = 2 * learning_rate / epsilon``. There are so many more elements in A than rows of data that the
    plain ELBO ends at the prior: the paper weights the KL by the number of data that it pretends to have, here
    ``kl_weight`` below 1, and over an epoch by `BlobReweighting`.

    Args:
        model: a PEFT model with an active LoRA adapter.
        epsilon: the largest G, > 0.
        prior_std: standard deviation of the prior, > 0.
        estimator: how noise enters in training; "flipout" gives every example its own signs (section 3.3).
        seed: of the initial scales.

    Returns:
        The same object.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: a number that is not > 0, no active LoRA adapter, or what `to_bayesian` refuses.
    """
    check_number("epsilon", epsilon, 0.0, strict=True)
    check_number("prior_std", prior_std, 0.0, strict=True)
    names = [pair.down_name for pair in lora_pairs(model)]
    to_bayesian(
        model,
        freeze=False,
        prior=NormalPrior(std=float(prior_std), centre=0.0),
        scale="additive",
        estimator=estimator,
        target_modules=names,
    )
    generator = torch.Generator().manual_seed(seed)
    for tensor in variational_tensors(model):
        share = torch.rand(tensor.loc.shape, generator=generator)
        low = 1 / math.sqrt(2)
        tensor.module.set_scale(tensor.parameter_name, (epsilon * (low + (1 - low) * share)).square().to(tensor.rho))
    return model


def blob_kl_weights(num_batches: int) -> list[float]:
    """Weights of the KL in the batches of an epoch, M 2^i / (2^M - 1) for i = 0 ... M - 1: their mean is 1.

    Blundell et al. 2015 (arXiv 1505.05424, section 3.4), in BLoB's order: the first batches of an epoch are driven by
    the data, the last ones by the prior. With more than 50 batches nearly all of it falls on the last five or so.

    Args:
        num_batches: M, >= 1.

    Returns:
        The M weights.

    >>> [round(weight, 3) for weight in blob_kl_weights(3)]
    [0.429, 0.857, 1.714]
    """
    check_count("num_batches", num_batches, 1)
    total = -math.expm1(-num_batches * math.log(2))  # (2^M - 1) / 2^M
    return [num_batches * math.exp((i - num_batches) * math.log(2)) / total for i in range(num_batches)]


class BlobReweighting(TrainerCallback):
    """Weights a `BayesianTrainer`'s KL over each epoch by `blob_kl_weights`, times its own ``kl_weight``.

    >>> BlobReweighting().weights
    []
    """

    def __init__(self) -> None:
        self.weights: list[float] = []
        self._own = 1.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count the optimizer steps of an epoch.

        Args:
            args: of the training; its ``kl_weight`` is the mean of those to come.
            state: how far the training is.
            control: what the training does next; it stays as it is.
            **kwargs: what else a callback is given; the ``train_dataloader``'s length is that of an epoch.
        """
        self._own, self.weights = args.kl_weight, blob_kl_weights(_steps_per_epoch(args, state, **kwargs))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set the weight of the coming step.

        Args:
            args: of the training.
            state: how far the training is.
            control: what the training does next; it stays as it is.
            **kwargs: what else a callback is given.
        """
        args.kl_weight = self._own * self.weights[state.global_step % len(self.weights)]

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the weight back.

        Args:
            args: of the training.
            state: how far the training is.
            control: what the training does next; it stays as it is.
            **kwargs: what else a callback is given.
        """
        args.kl_weight = self._own


def _steps_per_epoch(args: Any, state: Any, train_dataloader: Any = None, **_: Any) -> int:
    """Of the data; of a stream that has no length as many as the training takes. The last epoch may end early."""
    if train_dataloader is not None and has_length(train_dataloader):
        return int(max(1, math.ceil(len(train_dataloader) / args.gradient_accumulation_steps)))
    return int(max(1, state.max_steps // max(1, math.ceil(state.num_train_epochs or 1))))
