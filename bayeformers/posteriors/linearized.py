"""The linearised predictive: logits f ~ N(f(x; mu), J Sigma J^T) for a Gaussian over the weights.

One forward and C backward passes instead of S draws, and no Jacobian over the parameters: with the inputs a_t of a
layer and the gradients g_ct of logit c at its output, the layer's Jacobian is M_c = sum_t g_ct a_t^T, and its part of
the covariance is S_cd = sum_ij M_c,ij M_d,ij sigma_ij^2. Immer et al. 2021 (arXiv 2008.08400), section 3; Khan et al.
2019 (arXiv 1906.01930).
In a curved network large weight noise is not what the local Gaussian means: this predictive keeps the decision of the
mean, where sampling the network at the same scale can destroy it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from scipy.stats.qmc import MultivariateNormalQMC
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..predictive import logits_of

Variances = Mapping[nn.Parameter, Tensor]
"""Marginal posterior variance sigma^2 of each random Parameter, of its shape."""

_CHUNK_ELEMENTS = 2**22  # of one layer's per-example Jacobian: 16 MiB in float32, about a processor's cache


def linearized_logits(
    model: nn.Module, inputs: Mapping[str, Any] | Tensor, variances: Variances
) -> tuple[Tensor, Tensor]:
    """Mean (B, C) and covariance (B, C, C) of the logits, for a model that stands at its posterior mean in `eval()`.

    Layers that share a Parameter or are called several times are added before they are squared: one weight, one noise.

    Args:
        model: with (B, C) logits.
        inputs: without labels.
        variances: of the random Parameters of `nn.Linear`, transformers' `Conv1D` and `nn.Embedding` layers.

    Raises:
        ValueError: logits of another shape, or a tensor that both an Embedding and another layer use.
    """
    with torch.enable_grad():
        logits, uses = _record(model, inputs, variances)
        if len(logits) > 1 and not all(use.is_batched(len(logits)) for use in uses):
            parts = [linearized_logits(model, one, variances) for one in _examples(inputs, len(logits))]
            mean, covariance = (torch.cat(column) for column in zip(*parts, strict=True))
            return mean, covariance
        _backpropagate(logits, uses)
    covariance = logits.new_zeros(*logits.shape, logits.shape[1]).detach()
    for parameter, variance in variances.items():
        own = [use for use in uses if any(parameter is p for p in use.module._parameters.values())]
        if own:
            covariance += _covariance(own, parameter, variance.sqrt())
    return logits.detach(), covariance


def logit_draws(mean: Tensor, covariance: Tensor, num_samples: int, seed: int) -> Tensor:
    """Draws from N(mean, covariance) with common random numbers: every example uses the same quasi-random normals.

    Shape: (B, C), (B, C, C) -> (S, B, C).
    """
    values, vectors = torch.linalg.eigh(covariance.double())
    root = vectors * values.clamp_min(0).sqrt().unsqueeze(-2)
    normals = MultivariateNormalQMC(np.zeros(mean.shape[-1]), rng=seed).random(num_samples)
    noise = torch.einsum("bcd,sd->sbc", root, torch.as_tensor(normals, device=mean.device))
    return (mean.double() + noise).to(mean.dtype)


class _Use:
    """One call of a layer with random weights: its input, its output, and the gradients of the logits there."""

    def __init__(self, module: nn.Module, input: Tensor, output: Tensor) -> None:
        self.module, self.input, self.output = module, input.detach(), output
        self.grads = torch.empty(0)

    def is_batched(self, batch: int) -> bool:
        """Whether the first axis is the batch beyond doubt: positions or experts may stand there, or be as many."""
        features = 0 if isinstance(self.module, nn.Embedding) else 1
        others = self.input.shape[1 : self.input.ndim - features]
        return len(self.input) == len(self.output) == batch and batch not in others

    def inputs(self, batch: int) -> Tensor:
        """Inputs with all axes between batch and features joined: (B, T, d_in); ids (B, T) of a table."""
        if isinstance(self.module, nn.Embedding):
            return self.input.reshape(batch, -1)
        return _joined(self.input, batch)


def _record(model: nn.Module, inputs: Mapping[str, Any] | Tensor, variances: Variances) -> tuple[Tensor, list[_Use]]:
    uses: list[_Use] = []
    random = {id(parameter) for parameter in variances}

    batch = _batch_size(inputs)

    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        ids = args[0]
        if isinstance(module, nn.Embedding) and len(ids) == 1 < batch:  # positions, looked up once for all examples
            ids, output = ids.expand(batch, *ids.shape[1:]), output.expand(batch, *output.shape[1:])
        output = output if output.requires_grad else output.detach().requires_grad_()
        uses.append(_Use(module, ids, output))
        return output.clone()  # what follows may edit it in place

    layers = [m for m in model.modules() if any(id(p) in random for p in m._parameters.values())]
    for layer in layers:
        if not isinstance(layer, (nn.Linear, Conv1D, nn.Embedding)):
            raise ValueError(f"The linearised predictive has no rule for {type(layer).__name__}; use method='sample'.")
    handles = [layer.register_forward_hook(hook) for layer in layers]
    try:
        logits = logits_of(model(inputs) if isinstance(inputs, Tensor) else model(**inputs))
    finally:
        for handle in handles:
            handle.remove()
    if logits.ndim != 2:
        raise ValueError(f"The linearised predictive needs logits (B, C), got shape {tuple(logits.shape)}.")
    return logits, uses


def _backpropagate(logits: Tensor, uses: list[_Use]) -> None:
    """Gradients of every logit at every recorded output: (B, C, T, d_out) each."""
    outputs = [use.output for use in uses]
    rows = [
        torch.autograd.grad(logits[:, c].sum(), outputs, retain_graph=True, allow_unused=True)
        for c in range(logits.shape[1])
    ]
    for use, column in zip(uses, zip(*rows, strict=True), strict=True):
        grads = [torch.zeros_like(use.output) if grad is None else grad for grad in column]
        use.grads = torch.stack([_joined(grad, len(logits)) for grad in grads], dim=1)


def _covariance(uses: list[_Use], parameter: nn.Parameter, std: Tensor) -> Tensor:
    """One Parameter's part of the covariance, its uses joined along the position axis: (B, C, C)."""
    tables = [use for use in uses if isinstance(use.module, nn.Embedding)]
    if tables and len(tables) < len(uses):
        raise ValueError("The linearised predictive has no rule for an Embedding tied to another layer.")
    grads = torch.cat([use.grads for use in uses], dim=2)
    if parameter.ndim == 1:
        return _gram(grads.sum(2) * std)
    inputs = torch.cat([use.inputs(len(grads)) for use in uses], dim=1)
    if tables:  # a row looked up at several positions has one noise: add its gradients before they are squared
        same = (inputs[:, :, None] == inputs[:, None, :]).to(grads.dtype)
        scaled = grads * std[inputs][:, None]
        return torch.bmm(scaled.flatten(2), torch.einsum("bts,bcsd->bctd", same, scaled).flatten(2).mT)
    jacobian = "bti,bctj->bcij" if isinstance(uses[0].module, Conv1D) else "btj,bcti->bcij"
    size = max(1, _CHUNK_ELEMENTS // (grads.shape[1] * parameter.numel()))
    chunks = zip(torch.split(inputs.to(grads.dtype), size), torch.split(grads, size), strict=True)
    return torch.cat([_gram(torch.einsum(jacobian, a, g).mul_(std).flatten(2)) for a, g in chunks])


def _gram(rows: Tensor) -> Tensor:
    return torch.bmm(rows, rows.mT)


def _joined(tensor: Tensor, batch: int) -> Tensor:
    """(B, ..., d) -> (B, T, d)."""
    return tensor.reshape(batch, -1, tensor.shape[-1])


def _batch_size(inputs: Mapping[str, Any] | Tensor) -> int:
    tensors = [inputs] if isinstance(inputs, Tensor) else [v for v in inputs.values() if isinstance(v, Tensor)]
    return len(tensors[0]) if tensors and tensors[0].ndim else 1


def _examples(inputs: Mapping[str, Any] | Tensor, count: int) -> Iterator[Mapping[str, Any] | Tensor]:
    for i in range(count):
        if isinstance(inputs, Tensor):
            yield inputs[i : i + 1]
        else:
            yield {
                name: value[i : i + 1] if isinstance(value, Tensor) and value.ndim and len(value) == count else value
                for name, value in inputs.items()
            }
