"""The linearised network: outputs f ~ N(f(x; mu), J Sigma J^T) for a Gaussian over the weights.

One forward and one backward pass per output instead of S draws, and no Jacobian over the parameters: see `kinds`, of
what each layer captures. Immer et al. 2021 (arXiv 2008.08400), section 3; Khan et al. 2019 (arXiv 1906.01930). In a
curved network large weight noise is not what the local Gaussian means: this predictive keeps the decision of the mean,
where sampling the network at the same scale can destroy it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..forward import Inputs, batch_size
from ..likelihoods import logits_of
from ..sampling.views import View
from .blocks import GaussianBlock
from .kinds import Captured, in_block
from .recording import Use, examples, gradients, record, recording_view
from .soundness import separation

__all__ = [
    "Captured",
    "OutputOf",
    "Statistic",
    "bare_tensors",
    "capture",
    "captured_block",
    "covariance",
    "in_block",
    "layers_of",
    "linearize",
]

MAX_COVARIANCE = 2**28
"""Elements of all covariances of a batch: 2 GiB in float64."""

OutputOf = Callable[[Any], Tensor]
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
    """The network's outputs, and a ``statistic`` of the C outputs of each, such as their `covariance`.

    Positions are taken one after the other, so a token classifier costs T C backward passes; so are the examples where
    a layer does not keep them apart, or where a tensor of a module without a rule is random.

    Args:
        model: at its posterior mean in `eval()`, or a `recording_view` of it.
        inputs: what its forward takes, without labels.
        blocks: the Gaussian, one per layer.
        statistic: from what was captured to (n, B, C, C).
        output_of: the logits in what the model returns.
        contrasts: take the statistic of the centred outputs f - mean_c f_c instead, all that a softmax depends on, with
            one backward pass fewer.
        of_softmax: take it in the basis of the contrasts and of what all outputs share: data do not know the latter, so
            its variance may be so much larger that float32 would hold nothing of the differences that a softmax depends
            on. Both are given in float64.

    Returns:
        Outputs (B, C) or (B, T, C), and the statistic (n, B, C, C) or (n, B, T, C, C). A layer without a rule is a
        ValueError, and so are outputs of another shape, or so many that their covariances have over 2^28 elements.
    """
    options = {"contrasts": contrasts, "of_softmax": of_softmax}
    tensors = bare_tensors(blocks)
    if not isinstance(model, View):
        with recording_view(model, tensors) as view:
            return linearize(view, inputs, blocks, statistic, output_of, **options)
    recorded = _recorded_apart(model, inputs, blocks, tensors, output_of)
    if recorded is None:
        alone = examples(inputs, batch_size(inputs))
        parts = [linearize(model, one, blocks, statistic, output_of, **options) for one in alone]
        return torch.cat([mean for mean, _ in parts]), torch.cat([value for _, value in parts], dim=1)
    outputs, uses = recorded
    identity = torch.eye(outputs.shape[-1]).to(outputs)
    basis = _contrasts(identity, with_shared=not contrasts) if contrasts or of_softmax else identity
    with torch.no_grad(), torch.autocast(outputs.device.type, enabled=False):
        positions = range(outputs.shape[1]) if outputs.ndim == 3 else [None]
        values = [statistic(capture(outputs, position, uses, blocks, basis)) for position in positions]
        if basis is not identity:
            back = basis.double()
            values = [back @ value.double() @ back.mT for value in values]
    return outputs.detach(), torch.stack(values, dim=2) if outputs.ndim == 3 else values[0]


def _recorded_apart(
    view: View,
    inputs: Inputs,
    blocks: Sequence[GaussianBlock],
    tensors: Mapping[nn.Parameter, nn.Module],
    output_of: OutputOf,
) -> tuple[Tensor, list[Use]] | None:
    """Outputs and uses of a batch whose examples are kept apart by all that the model does; None where they are not."""
    count = batch_size(inputs)
    if tensors and count > 1:
        return None
    outputs, uses = record(view, inputs, layers_of(blocks), output_of, tensors)
    if outputs.ndim not in (2, 3) or len(outputs) != count:
        raise ValueError(f"The linearised predictive needs logits (B, C) or (B, T, C), got {tuple(outputs.shape)}.")
    if not (uses and outputs.requires_grad):
        raise ValueError("The outputs depend on none of the layers that the posterior covers: it cannot be linearised.")
    elements = outputs.numel() * outputs.shape[-1]
    if elements > MAX_COVARIANCE:
        raise ValueError(
            f"The covariances of the outputs {tuple(outputs.shape)} would have {elements:,} elements, more than "
            f"{MAX_COVARIANCE:,}: give smaller batches, or, for outputs over a vocabulary, use the method 'sample'."
        )
    return (outputs, uses) if separation(view, inputs, outputs, uses, output_of) == "examples" else None


def bare_tensors(blocks: Iterable[GaussianBlock]) -> dict[nn.Parameter, nn.Module]:
    """Parameters of modules without a rule, with the module."""
    owners = [(owner, block.modules[0]) for block in blocks for owner in block.rule.owners(block)]
    return {owner: module for owner, module in owners if isinstance(owner, nn.Parameter)}


def layers_of(blocks: Iterable[GaussianBlock]) -> list[nn.Module]:
    """Layers with a rule, of which every call is recorded."""
    owners = [owner for block in blocks for owner in block.rule.owners(block)]
    return [owner for owner in owners if isinstance(owner, nn.Module)]


def covariance(captured: Sequence[Captured]) -> Tensor:
    """S = J Sigma J^T, (n, B, C, C): blocks are independent, so their parts add."""
    total, *others = [part.covariance() for part in captured]
    for other in others:
        total = total + other
    return total


def _contrasts(identity: Tensor, *, with_shared: bool) -> Tensor:
    """Orthonormal columns (C, C - 1) that span C outputs without their mean (Helmert); ``with_shared`` the mean too."""
    steps = torch.arange(1, len(identity)).to(identity)
    columns = identity.new_ones(identity.shape).triu(1)[:, 1:] - steps * identity[:, 1:]
    columns = columns / (steps * (steps + 1)).sqrt()
    shared = identity.new_full((len(identity), 1), len(identity) ** -0.5)
    return torch.cat([columns, shared], 1) if with_shared else columns


def capture(
    outputs: Tensor, position: int | None, uses: Sequence[Use], blocks: Sequence[GaussianBlock], basis: Tensor
) -> list[Captured]:
    """Gradients of outputs @ basis at every use, by block.

    Args:
        outputs: (B, C) or (B, T, C), with their graph.
        position: which of the T; None of outputs (B, C).
        uses: of the blocks' layers, as they were recorded.
        blocks: whose captures are wanted.
        basis: (C, C'), in place of C unit vectors.

    Returns:
        One for every block that has a use.
    """
    by_output = []
    for column in basis.unbind(1):
        weights = torch.zeros_like(outputs)
        weights[slice(None) if position is None else (slice(None), position)] = column
        by_output.append(gradients(outputs, uses, weights))
    grads = list(zip(*by_output, strict=True))
    of_owner: dict[nn.Module | nn.Parameter, list[int]] = {}
    for number, use in enumerate(uses):
        of_owner.setdefault(use.owner, []).append(number)
    captured = []
    for block in blocks:
        numbers = sorted(number for owner in block.rule.owners(block) for number in of_owner.get(owner, ()))
        if numbers:
            of_block = [uses[number] for number in numbers], [grads[number] for number in numbers]
            captured.append(captured_block(block, *of_block, len(outputs)))
    return captured


def captured_block(
    block: GaussianBlock, uses: Sequence[Use], grads: Sequence[Sequence[Tensor]], batch: int
) -> Captured:
    """Return what a block's Jacobian is made of: its uses, joined along the positions.

    Args:
        block: the Gaussian of the layer.
        uses: the block's recorded uses, one or more.
        grads: for each use the C gradients at its output, of the output's shape.
        batch: the number B of examples.
    """
    inputs = _joined([use.inputs(batch) for use in uses], 2)
    of_uses = [
        _stacked([use.gradients(grad, batch) for grad in of_use], 2) for use, of_use in zip(uses, grads, strict=True)
    ]
    return block.rule.kind.from_parts(block, inputs, _joined(of_uses, 3))


def _joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    """`torch.cat` that does not copy a single part."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


def _stacked(parts: Sequence[Tensor], dim: int) -> Tensor:
    """`torch.stack` that does not copy a single part."""
    return parts[0].unsqueeze(dim) if len(parts) == 1 else torch.stack(list(parts), dim)
