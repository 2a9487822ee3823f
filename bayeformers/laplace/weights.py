"""Between a layer's matrix form and the model's Parameters, and a model whose weights are moved for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from ..linearized.blocks import from_matrix, to_matrix
from .targets import Target


def by_parameter(target: Target, matrix: Tensor) -> dict[nn.Parameter, Tensor]:
    """A layer's matrix, cut into its Parameters' shapes; the padding row of a table is not random.

    Shape: ``matrix`` (K, d_out, d_in'), or (1, 1, p) of a dense block.
    """
    module = target.modules[0]
    if matrix.shape[1:-1] == (1,) and matrix.shape[-1] == target.num_weights:
        matrix = matrix.reshape(target.matrix_shape)
    found = from_matrix(module, matrix, target.parameters)
    padding = getattr(module, "padding_idx", None)
    if padding is not None:
        found["weight"] = found["weight"].clone()
        found["weight"][padding] = 0
    return {target.parameters[name]: value for name, value in found.items()}


def as_matrix(target: Target, tensors: Mapping[nn.Parameter, Tensor], *, is_flat: bool = False) -> Tensor:
    """The inverse of `by_parameter`: (K, d_out, d_in'), or (1, 1, p) of a dense block."""
    given = {name: tensors[parameter] for name, parameter in target.parameters.items()}
    matrix = to_matrix(target.modules[0], given)
    return matrix.reshape(1, 1, -1) if is_flat else matrix


@contextlib.contextmanager
def holding(deviation: Mapping[nn.Parameter, Tensor]) -> Iterator[None]:
    """The model with ``deviation`` added to its weights, until exit; they come back bit by bit."""
    kept = {parameter: parameter.detach().clone() for parameter in deviation}
    try:
        _copy({parameter: kept[parameter] + moved.to(parameter) for parameter, moved in deviation.items()})
        yield
    finally:
        _copy(kept)


def _copy(values: Mapping[nn.Parameter, Tensor]) -> None:
    """In place, so that version counters tell; autocast keeps low-precision copies of what it has seen."""
    with torch.no_grad():
        for parameter, value in values.items():
            parameter.copy_(value)
    torch.clear_autocast_cache()
