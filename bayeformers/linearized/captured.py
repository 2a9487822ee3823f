"""The linearised network: outputs f ~ N(f(x; mu), J Sigma J^T) for a Gaussian over the weights.

One forward and one backward pass per output instead of S draws, and no Jacobian over the parameters: with the inputs
a_t of a layer and the gradients g_ct of output c there, the layer's Jacobian is M_c = sum_t g_ct a_t^T, and with
Sigma = U diag(V) U^T, U = U_G (x) U_A, its part of the covariance is

    S_cd = sum_ij N_c,ij N_d,ij V_ij,    N_c = U_G^T M_c U_A = sum_t (U_G^T g_ct) (U_A^T a_t)^T.

U is the identity for a mean-field posterior. Immer et al. 2021 (arXiv 2008.08400), section 3; Khan et al. 2019 (arXiv
1906.01930). In a curved network large weight noise is not what the local Gaussian means: this predictive keeps the
decision of the mean, where sampling the network at the same scale can destroy it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..likelihoods import logits_of
from ..sampling.views import View
from . import Inputs, TensorUse, Use, batch_size, examples, gradients, record, recording_view, separation
from .blocks import GaussianBlock, TensorBlock, block_rule, to_matrix
from .covariance import (
    affine_coordinates,
    affine_covariance,
    affine_products,
    jacobian_covariance,
    reached,
    rotated,
    separable_covariance,
    table_covariance,
    table_squares,
)
from .rules import EmbeddingRule

TOLERANCE = {torch.float64: 0.0}
"""Relative error that `Separable` variances may cause in the covariance, by dtype; elsewhere `FAST_TOLERANCE`."""
FAST_TOLERANCE = 1e-3

MAX_COVARIANCE = 2**28
"""Elements of all covariances of a batch: 2 GiB in float64."""

OutputOf = Callable[[Any], Tensor]


@dataclass(frozen=True, eq=False)
class Captured:
    """What one block's Jacobian is made of, for a batch and C outputs; its uses are joined along the positions.

    Attributes:
        block: whose Jacobian it is.
        inputs: a, (K, B, T, d_in'), with a last column of ones for a bias; ids (1, B, T) of a table.
        gradients: g, (K, B, C, T, d_out).
    """

    block: GaussianBlock
    inputs: Tensor
    gradients: Tensor

    def jacobian(self) -> Tensor:
        """M, (K, B, C, d_out, d_in'); mostly zeros for a table, whose other methods form none."""
        if isinstance(block_rule(self.block), EmbeddingRule):
            one_hot = nn.functional.one_hot(self.inputs[0], self._num_rows()).to(self.gradients)
            return torch.matmul(one_hot.mT.unsqueeze(1), self.gradients)
        if block_rule(self.block).is_affine:
            return torch.matmul(self.gradients.mT, self.inputs.unsqueeze(2))
        if isinstance(self.block, TensorBlock):
            return self.gradients
        inputs = {"weight": self.inputs, "bias": torch.ones_like(self.inputs)}
        rows = [(self.gradients * inputs[name].unsqueeze(2)).sum(3) for name in self.block.parameters]
        return torch.stack(rows, dim=-2)

    def split(self, size: int) -> Iterator[Captured]:
        """Parts of at most ``size`` examples."""
        for start in range(0, self.inputs.shape[1], size):
            part = slice(start, start + size)
            yield Captured(self.block, self.inputs[:, part], self.gradients[:, part])

    def squares(self) -> Tensor:
        """sum over examples and outputs of N^2, (K, d_out, d_in'): the diagonal of J^T J in the block's basis."""
        if isinstance(block_rule(self.block), EmbeddingRule):
            g = rotated(self.gradients, self.block.right)[0]
            return table_squares(self.inputs[0], g, self._num_rows())
        return self.coordinates().square().sum((1, 2))

    def covariance(self) -> Tensor:
        """This block's part of S, (n, B, C, C)."""
        block, rule = self.block, block_rule(self.block)
        if isinstance(rule, EmbeddingRule) and not block.is_flat:
            return table_covariance(self.inputs, self.gradients, block.right, block.variances())
        if not rule.is_affine or block.is_flat:
            return jacobian_covariance(self.coordinates(), block.variances())
        inputs, grads = reached(self.inputs, self.gradients)
        separable = block.separable(TOLERANCE.get(grads.dtype, FAST_TOLERANCE))
        if separable is not None and separable.pays(inputs, grads):
            assert block.left is not None and block.right is not None  # a separable block has a basis
            return separable_covariance(inputs, grads, block.left, block.right, separable)
        return affine_covariance(inputs, grads, block.left, block.right, block.variances())

    def coordinates(self) -> Tensor:
        """N = U_G^T M U_A, (K, B, C, d_out, d_in'), of the block's own form."""
        block = self.block
        if block_rule(block).is_affine and not block.is_flat:  # vectors are cheaper to rotate than matrices
            return affine_coordinates(self.inputs, self.gradients, block.left, block.right)
        matrix = self.jacobian()
        if block.is_flat:
            matrix = matrix.movedim(0, 2).flatten(2)[None, :, :, None]
        if block.left is not None:
            matrix = torch.matmul(block.left.mT[:, None, None], matrix)
        return matrix if block.right is None else torch.matmul(matrix, block.right[:, None, None])

    def selected(self, directions: Tensor) -> Tensor:
        """J v_k of eigen-directions, by their flat index in (K, d_out, d_in'): (B, C, m)."""
        block, rule = self.block, block_rule(self.block)
        if block.is_flat or not isinstance(rule, EmbeddingRule) and not rule.is_affine:
            return self.coordinates().movedim(0, 2).flatten(2)[..., directions]
        k, i, j = torch.unravel_index(directions, block.variances().shape[1:])
        if isinstance(rule, EmbeddingRule):
            g = rotated(self.gradients, block.right)[0]
            return torch.einsum("bctm,btm->bcm", g[..., j], (self.inputs[0, :, :, None] == i).to(g.dtype))
        a = (
            self.inputs[k, :, :, j]
            if block.right is None
            else torch.einsum("mbtj,mj->mbt", self.inputs[k], block.right[k, :, j])
        )
        g = (
            self.gradients[k, ..., i]
            if block.left is None
            else torch.einsum("mbcti,mi->mbct", self.gradients[k], block.left[k, :, i])
        )
        return torch.einsum("mbct,mbt->bcm", g, a)

    def gram(self) -> Tensor:
        """J J^T, (1, B, C, C)."""
        if isinstance(block_rule(self.block), EmbeddingRule) and not self.block.is_flat:
            return table_covariance(self.inputs, self.gradients, None, torch.ones_like(self.block.variances()[:1]))
        matrix = self.jacobian()
        return jacobian_covariance(matrix, torch.ones_like(matrix[:, 0, 0]).unsqueeze(0))

    def products(self, deviation: Tensor) -> Tensor:
        """J eta, (B, C), for a matrix eta (K, d_out, d_in')."""
        rule = block_rule(self.block)
        if isinstance(rule, EmbeddingRule):
            return torch.einsum("bctd,btd->bc", self.gradients[0], deviation[0, self.inputs[0]])
        if rule.is_affine:
            return affine_products(self.inputs, self.gradients, deviation)
        return torch.einsum("kbcij,kij->bc", self.jacobian(), deviation)

    def _num_rows(self) -> int:
        return int(to_matrix(self.block.modules[0], dict(self.block.parameters)).shape[1])


Statistic = Callable[[Sequence[Captured]], Tensor]
"""From the captures of C outputs to (n, B, ...)."""


def linearize(
    model: nn.Module | View,
    inputs: Inputs,
    blocks: Sequence[GaussianBlock],
    statistic: Statistic,
    output_of: OutputOf = logits_of,
    *,
    contrasts: bool = False,
    of_softmax: bool = False,
) -> tuple[Tensor, Tensor]:
    """Outputs (B, C) or (B, T, C), and the ``statistic`` of the C outputs of each: (n, B, C, C) or (n, B, T, C, C).

    ``model``, or a `recording_view` of it, stands at its posterior mean in `eval()`; ``inputs`` have no labels.
    Positions are taken one after the other, so a token classifier costs T C backward passes. ``contrasts``: the
    statistic of the centred outputs f - mean_c f_c instead, all that a softmax depends on, with one backward pass
    fewer. ``of_softmax``: the statistic is taken in the basis of the contrasts and of what all outputs share: data do
    not know the latter, so its variance may be so much larger that float32 would hold nothing of the differences that a
    softmax depends on. Both are given in float64. A tensor of a module without a rule (`TensorBlock`) has the examples
    taken one after the other.

    Raises:
        ValueError: a layer without a rule, outputs of another shape, or so many that their covariances have more than
            2^28 elements.
    """
    tensors = bare_tensors(blocks)
    with contextlib.nullcontext(model) if isinstance(model, View) else recording_view(model, tensors) as view:
        return _linearize(view, inputs, blocks, tensors, statistic, output_of, contrasts, of_softmax)


def bare_tensors(blocks: Iterable[GaussianBlock]) -> dict[nn.Parameter, nn.Module]:
    """Parameters of modules without a rule, with the module."""
    return {p: block.modules[0] for block in blocks if isinstance(block, TensorBlock) for p in _own(block)}


def _linearize(
    model: View,
    inputs: Inputs,
    blocks: Sequence[GaussianBlock],
    tensors: Mapping[nn.Parameter, nn.Module],
    statistic: Statistic,
    output_of: OutputOf,
    contrasts: bool,
    of_softmax: bool,
) -> tuple[Tensor, Tensor]:
    rest = (blocks, tensors, statistic, output_of, contrasts, of_softmax)
    if tensors and batch_size(inputs) > 1:
        return _one_by_one(model, inputs, batch_size(inputs), *rest)
    modules = [module for block in blocks if not isinstance(block, TensorBlock) for module in block.modules]
    outputs, uses = record(model, inputs, modules, output_of, tensors)
    if outputs.ndim not in (2, 3) or len(outputs) != batch_size(inputs):
        raise ValueError(f"The linearised predictive needs logits (B, C) or (B, T, C), got {tuple(outputs.shape)}.")
    if not (uses and outputs.requires_grad):
        raise ValueError("The outputs depend on none of the layers that the posterior covers: it cannot be linearised.")
    _check_size(outputs)
    if separation(model, inputs, outputs, uses, output_of) != "examples":
        return _one_by_one(model, inputs, len(outputs), *rest)
    positions = range(outputs.shape[1]) if outputs.ndim == 3 else [None]
    identity = torch.eye(outputs.shape[-1]).to(outputs)
    basis = identity
    if contrasts or of_softmax:
        basis = contrast_basis(identity) if contrasts else torch.cat([contrast_basis(identity), _shared(identity)], 1)
    with torch.no_grad(), torch.autocast(outputs.device.type, enabled=False):
        found = [statistic(capture(outputs, position, uses, blocks, basis)) for position in positions]
        if basis is not identity:
            back = basis.double()
            found = [back @ value.double() @ back.mT for value in found]
    return outputs.detach(), torch.stack(found, dim=2) if outputs.ndim == 3 else found[0]


def _check_size(outputs: Tensor) -> None:
    count = outputs.numel() * outputs.shape[-1]
    if count > MAX_COVARIANCE:
        raise ValueError(
            f"The covariances of the outputs {tuple(outputs.shape)} would have {count:,} elements, more than "
            f"{MAX_COVARIANCE:,}: give smaller batches, or, for outputs over a vocabulary, use the method 'sample'."
        )


def _shared(identity: Tensor) -> Tensor:
    """The direction (C, 1) that all outputs share."""
    return identity.new_full((len(identity), 1), len(identity) ** -0.5)


def _one_by_one(model: View, inputs: Inputs, count: int, *rest: Any) -> tuple[Tensor, Tensor]:
    parts = [_linearize(model, one, *rest) for one in examples(inputs, count)]
    return torch.cat([mean for mean, _ in parts]), torch.cat([value for _, value in parts], dim=1)


def covariance(captured: Sequence[Captured]) -> Tensor:
    """S = J Sigma J^T, (n, B, C, C): blocks are independent, so their parts add."""
    total, *others = [part.covariance() for part in captured]
    for other in others:
        total = total + other
    return total


def contrast_basis(identity: Tensor) -> Tensor:
    """Orthonormal columns (C, C - 1) that span what is left of C outputs without their mean (Helmert's contrasts)."""
    steps = torch.arange(1, len(identity)).to(identity)
    columns = identity.new_ones(identity.shape).triu(1)[:, 1:] - steps * identity[:, 1:]
    return columns / (steps * (steps + 1)).sqrt()


def capture(
    outputs: Tensor, position: int | None, uses: Sequence[Use], blocks: Sequence[GaussianBlock], basis: Tensor
) -> list[Captured]:
    """Gradients of outputs @ basis at every use, by block; ``basis`` (C, C') takes the place of C unit vectors.

    The outputs are (B, C), or those at one ``position`` of (B, T, C). Blocks without a use are left out.
    """
    by_output = []
    for column in basis.unbind(1):
        weights = torch.zeros_like(outputs)
        weights[slice(None) if position is None else (slice(None), position)] = column
        by_output.append(gradients(outputs, uses, weights))
    grads = list(zip(*by_output, strict=True))
    of_owner: dict[int, list[int]] = {}
    for number, use in enumerate(uses):
        of_owner.setdefault(id(use.parameter if isinstance(use, TensorUse) else use.module), []).append(number)
    captured = []
    for block in blocks:
        own = sorted(number for owner in _owners(block) for number in of_owner.get(id(owner), ()))
        if own:
            of_block = [uses[number] for number in own], [grads[number] for number in own]
            captured.append(captured_block(block, *of_block, len(outputs)))
    return captured


def _owners(block: GaussianBlock) -> Sequence[nn.Parameter | nn.Module]:
    """Whose uses are the block's."""
    return _own(block) if isinstance(block, TensorBlock) else block.modules


def _own(block: GaussianBlock) -> list[nn.Parameter]:
    return list(block.parameters.values())


def captured_block(
    block: GaussianBlock, uses: Sequence[Use], grads: Sequence[Sequence[Tensor]], batch: int
) -> Captured:
    """A block's uses joined along the positions; ``grads`` holds, for each use, the C gradients at its output."""
    inputs = torch.cat([block_inputs(block, use, batch) for use in uses], dim=2)
    of_use = [
        torch.stack([use.gradients(grad, batch) for grad in found], dim=2)
        for use, found in zip(uses, grads, strict=True)
    ]
    stacked = torch.cat(of_use, dim=3)
    padding = getattr(block.modules[0], "padding_idx", None)
    if padding is not None and not isinstance(block, TensorBlock):  # torch trains no padding row
        stacked = stacked * (inputs != padding)[:, :, None, :, None]
    return Captured(block, inputs, stacked)


def block_inputs(block: GaussianBlock, use: Use, batch: int) -> Tensor:
    """a of one use, (K, B, T, d_in'): the weight's inputs, then 1 for the bias, of those parameters that are random."""
    a = use.inputs(batch)
    if not use.rule.is_affine:
        return a
    return in_block(block.parameters, a.to(use.dtype))


def in_block(parameters: Iterable[str], a: Tensor) -> Tensor:
    """Inputs of the named parameters: a (..., d_in) of a weight, then 1 for a bias; (..., d_in')."""
    parts = {"weight": a, "bias": a.new_ones(*a.shape[:-1], 1)}
    return torch.cat([parts[name] for name in parameters], dim=-1)
