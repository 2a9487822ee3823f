"""Recurrent layers step by step, with an estimator's noise in each affine map: what a fused kernel cannot do.

The steps are torch's own (`torch.nn.LSTM`, `torch.nn.GRU`), with biases b_ih and b_hh inside W_ih x_t and W_hh h.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from .estimators import Estimator, Layout
from .variational import Variational

State = tuple[Tensor, ...]
"""(h, c) of an LSTM, (h,) of a GRU: (B, features) each."""

Project = Callable[[Tensor], Tensor]
"""From the cell's output to h; the identity without `proj_size`."""

Step = Callable[[Tensor, Tensor, State, Project], State]
"""One time step, from the gates' input part W_ih x_t, their recurrent part W_hh h, and the state."""

_TIME_FIRST = Layout(examples=1)


@dataclass(frozen=True)
class Weights:
    """The random tensors of one layer and direction, under torch's names."""

    weight_ih: Variational
    weight_hh: Variational
    bias_ih: Variational | None = None
    bias_hh: Variational | None = None
    weight_hr: Variational | None = None


@dataclass(frozen=True)
class Recurrence:
    """One recurrent layer in one direction.

    Attributes:
        step: the cell.
        estimator: how the noise enters.
        weights: drawn once, used at every step.
        reverse: from the last step to the first.
    """

    step: Step
    estimator: Estimator
    weights: Weights
    reverse: bool

    def __call__(self, inputs: Tensor, state: State, alive: Tensor | None) -> tuple[Tensor, State]:
        """Return the outputs of all steps and the final state; where not ``alive``, an example keeps its state.

        Shape: ``inputs`` (T, B, d), ``state`` (B, features) each, ``alive`` (T, B, 1) -> (T, B, features of h), state.
        """
        w, outputs = self.weights, []
        gates = self.estimator.affine(F.linear, (inputs,), w.weight_ih, w.bias_ih, _TIME_FIRST).unbind()
        for t in reversed(range(len(gates))) if self.reverse else range(len(gates)):
            recurrent = self.estimator.affine(F.linear, (state[0],), w.weight_hh, w.bias_hh)
            new = self.step(gates[t], recurrent, state, self._project)
            if alive is not None:
                new = tuple(torch.where(alive[t], after, before) for after, before in zip(new, state, strict=True))
            outputs.append(new[0])
            state = new
        return torch.stack(outputs[::-1] if self.reverse else outputs), state

    def _project(self, output: Tensor) -> Tensor:
        if self.weights.weight_hr is None:
            return output
        return self.estimator.affine(F.linear, (output,), self.weights.weight_hr, None)


def lstm_step(gates: Tensor, recurrent: Tensor, state: State, project: Project) -> State:
    """Return h' = W_hr (o * tanh c'), c' = f * c + i * g; the gates are i, f, g, o: g by tanh, others by sigmoid.

    Args:
        gates: the gates' input part W_ih x_t + b_ih, (B, 4 * hidden).
        recurrent: their recurrent part W_hh h + b_hh, of the same shape.
        state: h, (B, hidden or projection), and c, (B, hidden).
        project: W_hr; the identity without `proj_size`.
    """
    i, f, g, o = (gates + recurrent).chunk(4, -1)
    cell = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    return project(o.sigmoid() * cell.tanh()), cell


def gru_step(gates: Tensor, recurrent: Tensor, state: State, project: Project) -> State:
    """Return h' = (1 - z) * n + z * h, n = tanh(gates_n + r * recurrent_n); the gates are r, z, n: r, z by sigmoid.

    Args:
        gates: the gates' input part W_ih x_t + b_ih, (B, 3 * hidden).
        recurrent: their recurrent part W_hh h + b_hh, of the same shape.
        state: h alone, (B, hidden).
        project: the identity, which is not applied: a GRU has no projection.
    """
    reset, update, new = gates.chunk(3, -1)
    reset_h, update_h, new_h = recurrent.chunk(3, -1)
    candidate = (new + (reset + reset_h).sigmoid() * new_h).tanh()
    return (candidate + (update + update_h).sigmoid() * (state[0] - candidate),)


@dataclass(frozen=True)
class Cell:
    """A kind of recurrent layer: its step, and the number of its states."""

    step: Step
    num_states: int


CELLS = {"LSTM": Cell(lstm_step, 2), "GRU": Cell(gru_step, 1)}
"""By `torch.nn.RNNBase.mode`."""


def run_layers(
    layers: Sequence[Sequence[Recurrence]], inputs: Tensor, states: State, alive: Tensor | None, dropout: float
) -> tuple[Tensor, State]:
    """Return the outputs of a stack of recurrent layers, (T, B, directions * features of h), and the final states.

    Args:
        layers: from the first to the last, each with its directions, whose outputs are joined.
        inputs: (T, B, d), of T steps and B examples.
        states: the initial states, (layers * directions, B, features) each.
        alive: (T, B, 1), False where an example has ended and keeps its state; None: all have the same length.
        dropout: rate between the layers, in [0, 1]; 0 outside of training.
    """
    final: list[State] = []
    for number, directions in enumerate(layers):
        if number:
            inputs = F.dropout(inputs, dropout, training=dropout > 0)
        outputs = []
        for recurrence in directions:
            output, state = recurrence(inputs, tuple(s[len(final)] for s in states), alive)
            outputs.append(output)
            final.append(state)
        inputs = torch.cat(outputs, -1)
    return inputs, tuple(torch.stack(part) for part in zip(*final, strict=True))


def time_first(input: Tensor | PackedSequence, batch_first: bool) -> tuple[Tensor, Tensor | None]:
    """Return sequences of any form as (T, B, d), and (T, B, 1) where they are alive, if they differ in length.

    Examples are in the caller's order, so that their signs do not depend on the packing.
    """
    if isinstance(input, PackedSequence):
        steps, lengths = pad_packed_sequence(input)
        alive = torch.arange(len(steps))[:, None] < lengths
        return steps, alive.unsqueeze(-1).to(steps.device)
    if input.dim() == 2:
        return input.unsqueeze(1), None
    return (input.transpose(0, 1) if batch_first else input), None


def as_given(steps: Tensor, input: Tensor | PackedSequence, batch_first: bool) -> Tensor | PackedSequence:
    """Return sequences in the form, and in the order, in which the caller gave them: the inverse of :func:`time_first`.

    Args:
        steps: the outputs of all steps, (T, B, d).
        input: what the caller gave, padded, packed, or one example.
        batch_first: whether a padded ``input`` is (B, T, d).
    """
    if not isinstance(input, PackedSequence):
        if input.dim() == 2:
            return steps.squeeze(1)
        return steps.transpose(0, 1) if batch_first else steps
    if input.sorted_indices is not None:
        steps = steps.index_select(1, input.sorted_indices)
    alive = torch.arange(steps.shape[1]) < input.batch_sizes[:, None]
    return PackedSequence(steps[alive.to(steps.device)], *input[1:])
