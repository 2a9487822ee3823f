"""Per-example gradients in Kronecker form: g and a of every layer, never a tensor of all weights per example."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...likelihoods.registry import likelihood_of_family
from ...linearized import Inputs, gradients, record, separation
from ...linearized.captured import Captured, captured_block
from ...sampling.views import View
from ..data import Batch, prepare
from ..posterior import LaplacePosterior, check_laplace

Output = int | tuple[int, int]
"""Column c of logits (B, C), or (position t, column c) of logits (B, T, C)."""


@dataclass(frozen=True, eq=False)
class ExampleGradients:
    """Gradient of one number per example in the weights of every covered layer, M = sum_t g_t a_t^T.

    A layer that no example reached has gradient 0 and is left out.

    Attributes:
        captured: layer name -> inputs and gradients at its outputs.
        num_examples: B.
    """

    captured: Mapping[str, Captured]
    num_examples: int

    def __len__(self) -> int:
        return self.num_examples

    @property
    def layers(self) -> list[str]:
        """Names, in the model's order."""
        return list(self.captured)

    def inputs(self, layer: str) -> Tensor:
        """a, (K, B, T, d_in'): the layer's inputs, the last one 1 for a bias; ids (1, B, T) of a table."""
        return self._of(layer).inputs

    def gradients(self, layer: str) -> Tensor:
        """g, (K, B, T, d_out): the gradients at the layer's outputs."""
        return self._of(layer).gradients[:, :, 0]

    def matrix(self, layer: str) -> Tensor:
        """Return M, (B, K, d_out, d_in'), the bias as the last column; (B, 1, V, d) of a table of V rows."""
        return self._of(layer).jacobian()[:, :, 0].movedim(0, 1)

    def coordinates(self, layer: str) -> Tensor:
        """N = U_G^T M U_A in the posterior's eigenbasis, (B, K, d_out, d_in'), or (B, 1, 1, p) of a dense block."""
        return self._of(layer).coordinates()[:, :, 0].movedim(0, 1)

    def _of(self, layer: str) -> Captured:
        if layer not in self.captured:
            raise ValueError(f"`layer` must be one of {self.layers[:5]} (of {len(self.captured)}), got {layer!r}.")
        return self.captured[layer]


def example_gradients(
    posterior: LaplacePosterior, inputs: Inputs, labels: Tensor | None = None, *, output: Output | None = None
) -> ExampleGradients:
    """Return every example's gradient of log p(y | x, theta*), or of one ``output``, in Kronecker form.

    One forward and one backward pass for the batch. For one position M = g a^T exactly (Martens & Grosse 2015);
    several positions, and several uses of a shared layer, add up. The log-likelihood is that of the labels given, with
    the posterior's noise and without its temperature; several labels of an example (tokens) add up.

    Args:
        posterior: whose layers and mean.
        inputs: what the model's ``forward`` takes, on any device; labels may be inside.
        labels: of these examples, as `fit` takes them.
        output: of which logit the gradient is taken instead: column c, or (position, column).

    Raises:
        ValueError: neither labels nor ``output``, both, or one that does not fit the model's outputs.

    >>> from torch import nn
    >>> from bayeformers.laplace import fit
    >>> net, x = nn.Linear(3, 2), torch.randn(20, 3)
    >>> posterior = fit(net, [(x, torch.randint(2, (20,)))], progress=False)
    >>> found = example_gradients(posterior, x[:4], output=0)
    >>> found.layers, found.matrix("").shape  # the bias is the last column
    ([''], torch.Size([4, 1, 2, 4]))
    """
    check_laplace(posterior)
    model, device = posterior.model, next(posterior.model.parameters()).device
    batch = prepare(model, inputs if labels is None else (inputs, labels), device)
    if output is None and batch.labels is None:
        raise ValueError("`labels` or `output` must say of what the gradients are: there are no labels in `inputs`.")
    if output is not None and labels is not None:
        raise ValueError(f"`labels` and `output`={output!r} exclude each other.")
    with posterior.recording_view() as view:
        return _of_batch(posterior, view, batch, output)


# -- capture ----------------------------------------------------------------------------------------------------------


def _of_batch(posterior: LaplacePosterior, view: View, batch: Batch, output: Output | None) -> ExampleGradients:
    blocks = posterior.blocks()
    modules = [module for block in blocks for module in block.modules]
    outputs, uses = record(view, batch.inputs, modules, posterior.outputs_of)
    if separation(view, batch.inputs, outputs, uses, posterior.outputs_of) != "examples":
        return _joined([_of_batch(posterior, view, one, output) for one in batch.examples()])
    with torch.no_grad():
        grads = gradients(outputs, uses, _column(posterior, outputs.detach(), batch, output), last=True)
        captured = {}
        for block in blocks:
            own = [(use, grad) for use, grad in zip(uses, grads, strict=True) if use.module in block.modules]
            if own:
                found = captured_block(block, [use for use, _ in own], [(grad,) for _, grad in own], len(batch))
                captured[block.name] = found
    return ExampleGradients(captured, len(batch))


def _column(posterior: LaplacePosterior, outputs: Tensor, batch: Batch, output: Output | None) -> Tensor:
    """The derivative of log p, or of one output, in the outputs."""
    if output is None:
        assert batch.labels is not None  # checked before
        likelihood = likelihood_of_family(posterior.record.config.likelihood)
        return -likelihood.empirical_column(outputs, batch.labels) / posterior.noise_std**2
    index = output if isinstance(output, tuple) else (output,)
    fits = len(index) == outputs.ndim - 1 and all(-n <= i < n for i, n in zip(index, outputs.shape[1:], strict=True))
    if not fits:
        form = "a column" if outputs.ndim == 2 else "(position, column)"
        raise ValueError(f"`output` must be {form} of outputs {tuple(outputs.shape)}, got {output!r}.")
    column = torch.zeros_like(outputs)
    column[(slice(None), *index)] = 1
    return column


def _joined(parts: Sequence[ExampleGradients]) -> ExampleGradients:
    """One after the other; positions that an example lacks have gradient 0."""
    found: dict[str, list[Captured | None]] = {name: [] for part in parts for name in part.captured}
    for part in parts:
        for name, captured in found.items():
            captured.append(part.captured.get(name))
    return ExampleGradients({name: _stacked(captured) for name, captured in found.items()}, len(parts))


def _stacked(parts: Sequence[Captured | None]) -> Captured:
    like = max((part for part in parts if part is not None), key=lambda part: part.inputs.shape[2])
    inputs = like.inputs.new_zeros(like.inputs.shape[0], len(parts), *like.inputs.shape[2:])
    grads = like.gradients.new_zeros(like.gradients.shape[0], len(parts), *like.gradients.shape[2:])
    for number, part in enumerate(parts):
        if part is not None:
            inputs[:, number, : part.inputs.shape[2]] = part.inputs[:, 0]
            grads[:, number, :, : part.gradients.shape[3]] = part.gradients[:, 0]
    return replace(like, inputs=inputs, gradients=grads)
