"""Jacobians by `torch.func` through the whole network, and dense eigenvectors, for linearised predictives."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.pytorch_utils import Conv1D

from bayeformers.linearized import TENSOR
from bayeformers.linearized.blocks import GaussianBlock


def as_matrix(module: nn.Module, tensors: Mapping[str, Tensor]) -> Tensor:
    """(..., *shape) of a layer's weight and bias -> (..., K, d_out, d_in'), by hand."""
    weight, bias = tensors.get("weight"), tensors.get("bias")
    if isinstance(module, nn.Embedding):
        assert weight is not None
        return weight[..., None, :, :]
    if not isinstance(module, nn.Linear | Conv1D | nn.Conv1d | nn.Conv2d):  # a gain and a bias, one row each
        return torch.stack([value for value in (weight, bias) if value is not None], dim=-2)[..., None, :, :]
    blocks, parts = getattr(module, "groups", 1), []
    if weight is not None:
        weight = weight.mT if isinstance(module, Conv1D) else weight
        weight = weight.flatten(-module.weight.ndim + 1) if module.weight.ndim > 2 else weight
        parts.append(weight.unflatten(-2, (blocks, -1)))
    if bias is not None:
        parts.append(bias.unflatten(-1, (blocks, -1)).unsqueeze(-1))
    return torch.cat(parts, dim=-1)


def logits(model: nn.Module, weights: dict[str, Tensor], inputs: Any) -> Tensor:
    """Outputs (B, ..., C) under other weights."""
    args, kwargs = ((inputs,), {}) if isinstance(inputs, Tensor) else ((), inputs)
    output = functional_call(model, weights, args, kwargs, tie_weights=True)
    return output if isinstance(output, Tensor) else output.logits


def named(model: nn.Module, parameters: Iterable[nn.Parameter]) -> dict[nn.Parameter, str]:
    """First names; a tied Parameter has one."""
    wanted = set(parameters)
    return {parameter: name for name, parameter in model.named_parameters() if parameter in wanted}


def jacobians(model: nn.Module, blocks: Sequence[GaussianBlock], inputs: Any) -> list[Tensor]:
    """M of each block, (B, ..., C, K, d_out, d_in'), the model standing at its posterior mean in `eval()`."""
    names = named(model, (p for block in blocks for p in block.parameters.values()))
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernel has no double backward to batch over
        weights = {name: parameter.detach() for parameter, name in names.items()}
        found = jacrev(lambda given: logits(model, given, inputs))(weights)
    matrices = []
    for block in blocks:
        module = block.modules[0]
        if block.rule is TENSOR:
            ((_, parameter),) = block.parameters.items()
            matrices.append(found[names[parameter]].detach().flatten(-parameter.ndim)[..., None, None, :])
            continue
        rows = {key: found[names[parameter]].detach() for key, parameter in block.parameters.items()}
        if getattr(module, "padding_idx", None) is not None:
            rows["weight"] = rows["weight"].index_fill(-2, torch.tensor(module.padding_idx), 0)
        matrices.append(as_matrix(module, rows))
    return matrices


def eigenbases(block: GaussianBlock) -> list[Tensor]:
    """Eigenvectors as columns, of each of the K groups, or of all weights together."""
    found = []
    for k, values in enumerate(block.variances()[0]):
        left = torch.eye(values.shape[0]).double() if block.left is None else block.left[k].contiguous()
        right = torch.eye(values.shape[1]).double() if block.right is None else block.right[k].contiguous()
        found.append(torch.kron(left, right))
    return found


def directions(model: nn.Module, blocks: Sequence[GaussianBlock], inputs: Any) -> tuple[Tensor, Tensor]:
    """Variances V (D,) of all eigen-directions v, in falling order, and J v (B, ..., C, D)."""
    variances, products = [], []
    for block, matrix in zip(blocks, jacobians(model, blocks, inputs), strict=True):
        flat = matrix.flatten(-3).unsqueeze(-2) if block.is_flat else matrix.flatten(-2)
        moved = [flat[..., k, :] @ basis for k, basis in enumerate(eigenbases(block))]
        products.append(torch.cat(moved, dim=-1))
        variances.append(block.variances()[0].flatten())
    values = torch.cat(variances)
    order = values.argsort(descending=True, stable=True)
    return values[order], torch.cat(products, dim=-1)[..., order]


def forward_product(model: nn.Module, tangents: Mapping[nn.Parameter, Tensor], inputs: Any) -> Tensor:
    """J eta, (B, ..., C), by forward mode; ``tangents`` holds eta."""
    names = named(model, tangents)
    weights = {names[p]: p.detach() for p in tangents}
    moved = {names[p]: value for p, value in tangents.items()}
    with sdpa_kernel(SDPBackend.MATH):
        return jvp(lambda given: logits(model, given, inputs), (weights,), (moved,))[1].detach()
