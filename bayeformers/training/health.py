"""What a posterior in training looks like: scales and KL by group of layers, and what its draws make of a few rows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..likelihoods import get_likelihood
from ..nn.adapters import active_tensors
from ..nn.base import NamedVariational
from ..nn.kl import tensor_kl
from ..nn.shards import gathered
from ..posteriors import VariationalPosterior
from ..posteriors.heads import has_many_logits
from ..processes.dtensors import reshard

__all__ = ["DrawnRows", "LayerGroup", "drawn_rows", "effective_draws", "group_name", "layer_groups"]

SAMPLED_PER_TENSOR = 4096
_WRAPPERS = ("base_model.model.", "base_model.", "module.")


def group_name(name: str) -> str:
    """Return the group of a tensor: its block in a stack of layers, else the first two parts of its module's name.

    >>> group_name("bert.encoder.layer.3.output.dense.weight"), group_name("bert.pooler.dense.bias")
    ('bert.encoder.layer.3', 'bert.pooler')
    """
    for wrapper in _WRAPPERS:
        name = name.removeprefix(wrapper)
    parts = name.split(".")[:-1]
    number = next((index for index, part in enumerate(parts) if part.isdecimal()), None)
    return ".".join(parts[:2] if number is None else parts[: number + 1]) or "model"


@dataclass(frozen=True)
class LayerGroup:
    """The Bayesian tensors of one block.

    Attributes:
        kl: KL(q || p) summed over them, in nats.
        relative_scales: sigma / |mu| of at most about 4096 evenly spaced weights of each, where mu is not 0.
    """

    kl: float
    relative_scales: Tensor


@torch.no_grad()
def layer_groups(model: nn.Module) -> dict[str, LayerGroup]:
    """By name, the groups of a Bayesian model, in its order; their KL add up to `kl_divergence(model)`."""
    reshard(model)
    tensors: dict[str, list[NamedVariational]] = {}
    for tensor in active_tensors(model):
        tensors.setdefault(group_name(tensor.name), []).append(tensor)
    return {name: _layer_group(own) for name, own in tensors.items()}


def _layer_group(tensors: list[NamedVariational]) -> LayerGroup:
    kls, scales = zip(*((float(tensor_kl(t)), _relative_scales(t)) for t in map(gathered, tensors)), strict=True)
    return LayerGroup(sum(kls), torch.cat(scales))


def _relative_scales(tensor: NamedVariational) -> Tensor:
    every = slice(None, None, max(1, tensor.loc.numel() // SAMPLED_PER_TENSOR))
    loc, scale = tensor.loc.reshape(-1)[every].float().abs(), tensor.scale().reshape(-1)[every].float()
    return (scale[loc > 0] / loc[loc > 0]).cpu()


def effective_draws(log_likelihoods: Tensor) -> Tensor:
    """Return the effective number of draws in the density of each item: (sum_s p_s)^2 / sum_s p_s^2, in [1, S].

    p_s = p(y | x, w_s) is the weight that draw s would take if the posterior learned the item too (Chopin 2002,
    Biometrika 89, section 2), and the ratio is the effective sample size of such weights (Kong 1992): S where the draws
    agree on the label, 1 where the average rests on one of them.

    Shape: ``log_likelihoods`` (S draws, n), in nats -> (n,).

    >>> effective_draws(torch.tensor([[0.5, 0.9], [0.5, 0.0]]).log())
    tensor([2., 1.])
    """
    logs = log_likelihoods.double()
    return (2 * logs.logsumexp(0) - (2 * logs).logsumexp(0)).exp().to(log_likelihoods.dtype)


@dataclass(frozen=True)
class DrawnRows:
    """What S draws say about a few labelled rows; means over their items.

    Attributes:
        num_items: how many items.
        num_draws: S.
        mutual_information: in nats.
        entropy: of the averaged prediction, in nats.
        effective_draws: see `effective_draws`.
        largest_class: the class that is predicted oftenest; None of a head without one choice per item.
        predicted_share: of the items, those of which it is predicted.
        label_share: those of which it is the label.
    """

    num_items: int
    num_draws: int
    mutual_information: float
    entropy: float
    effective_draws: float
    largest_class: int | None = None
    predicted_share: float = math.nan
    label_share: float = math.nan


def drawn_rows(model: nn.Module, inputs: Mapping[str, Any], num_draws: int) -> DrawnRows | None:
    """Return what draws of a Bayesian model say about a batch; the model and the random state are left alone.

    Args:
        model: in `train()` or `eval()`.
        inputs: the batch, with labels.
        num_draws: S, of seed 0.

    Returns:
        None of a head without class probabilities, with a logit for each token of a vocabulary or each position, and of
        a batch without a label that counts.
    """
    posterior = VariationalPosterior(model, draw_cache_bytes=0)
    likelihood = get_likelihood(posterior.problem_type())
    if not likelihood.is_known or likelihood.has_noise or has_many_logits(model, likelihood.problem_type):
        return None
    predictive = posterior.predict(inputs, num_samples=num_draws, problem_type=likelihood.problem_type)
    scored = likelihood.scores(predictive.mean_log_probs, inputs)
    if predictive.log_probs is None or scored is None or not bool(scored[1].any()):
        return None
    scores, counts = scored
    logs = [likelihood.scores(draw, inputs) for draw in predictive.log_probs]
    weights = torch.stack([-found[0]["nll"][counts] for found in logs if found is not None])
    mask = torch.ones_like(predictive.mutual_information, dtype=torch.bool)
    mask = mask if predictive.mask is None else predictive.mask.bool().expand_as(mask)
    return DrawnRows(
        num_items=int(counts.sum()),
        num_draws=len(weights),
        mutual_information=float(predictive.mutual_information[mask].mean()),
        entropy=float(predictive.predictive_entropy[mask].mean()),
        effective_draws=float(effective_draws(weights).mean()),
        **_largest_class(scores, counts),
    )


def _largest_class(scores: Mapping[str, Tensor], counts: Tensor) -> dict[str, Any]:
    if "probs" not in scores or "labels" not in scores:
        return {}
    predicted, labels = scores["probs"][counts].argmax(-1).reshape(-1), scores["labels"][counts].reshape(-1)
    largest = int(predicted.mode().values)
    shares = [float((values == largest).double().mean()) for values in (predicted, labels)]
    return {"largest_class": largest, "predicted_share": shares[0], "label_share": shares[1]}
