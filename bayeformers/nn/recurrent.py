"""Bayesian `torch.nn.LSTM` and `torch.nn.GRU`: weights are drawn once per sequence and used at every time step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from .base import BayesianModule
from .estimators import Estimator, Reparameterization
from .recurrence import CELLS, Recurrence, State, Weights, as_given, run_layers, time_first
from .variational import Variational


class Recurrent(BayesianModule, torch.nn.RNNBase):
    """What :class:`LSTM` and :class:`GRU` share: all weights are random.

    Reparameterization runs torch's fused kernel on the drawn weights. The other estimators give each example, or each
    output, weights of its own: no fused kernel does, so they run step by step.
    """

    @classmethod
    def names_of(cls, module: torch.nn.Module) -> tuple[str, ...]:
        """``weight_ih_l0``, ``weight_hh_l0``, ...: those that the instance has."""
        names: list[str] = module._flat_weights_names  # type: ignore[assignment]
        return tuple(names)

    def forward(self, input: Tensor | PackedSequence, hx: Any = None) -> Any:
        """Return torch's outputs, and raise its errors, with the layer's mean, its held draw or fresh noise."""
        if isinstance(input, PackedSequence):  # torch's LSTM does not check it, and its kernel reads past the end
            self.check_input(input.data, input.batch_sizes)
            if hx is not None:
                self.check_forward_args(input.data, hx, input.batch_sizes)
        if not self.is_random:
            return super().forward(input, hx)
        weights = {name: self.variational(name) for name in self.specs}
        estimator = self.active_estimator
        if isinstance(estimator, Reparameterization) or not self._has_axes(input, hx):  # torch says what is wrong
            return self._fused([weight.sample() for weight in weights.values()], input, hx)
        return self._by_steps(estimator, weights, input, hx)

    def _fused(self, weights: list[Tensor], input: Tensor | PackedSequence, hx: Any) -> Any:
        """Return torch's forward with other weights, by a view of the layer: nothing is written into the layer itself.

        Without names the view takes its flat weights for what they are, and does not look for the layer's Parameters.
        """
        view = object.__new__(type(self))
        view.__dict__.update(vars(self), _flat_weights=weights, _flat_weights_names=[], _flat_weight_refs=[])
        return super(Recurrent, view).forward(input, hx)

    def _by_steps(
        self, estimator: Estimator, weights: dict[str, Variational], input: Tensor | PackedSequence, hx: Any
    ) -> tuple[Tensor | PackedSequence, Any]:
        steps, alive = time_first(input, self.batch_first)
        states = self._initial_states(hx, steps)
        self.check_forward_args(steps.flatten(0, 1), self._hidden(states), torch.tensor([steps.shape[1]]))
        layers = list(self._layers(estimator, weights))
        outputs, states = run_layers(layers, steps, states, alive, self.dropout if self.training else 0.0)
        if isinstance(input, Tensor) and input.dim() == 2:
            states = tuple(state.squeeze(1) for state in states)
        return as_given(outputs, input, self.batch_first), self._hidden(states)

    def _has_axes(self, input: Tensor | PackedSequence, hx: Any) -> bool:
        """Whether input and states have the axes of one of the forms that torch takes, and a step at least."""
        states = self._states(hx)
        axes = 3 if isinstance(input, PackedSequence) else input.dim()
        steps = isinstance(input, PackedSequence) or axes < 3 or input.shape[1 if self.batch_first else 0]
        return bool(
            axes in (2, 3)
            and steps
            and len(states) in (0, CELLS[self.mode].num_states)
            and all(state.dim() == axes for state in states)
        )

    def _initial_states(self, hx: Any, steps: Tensor) -> State:
        """The given states with an axis of examples, or zeros: (layers * directions, B, features) each."""
        if hx is not None:
            return tuple(state if state.dim() == 3 else state.unsqueeze(1) for state in self._states(hx))
        number = self.num_layers * (2 if self.bidirectional else 1)
        features = (self.proj_size or self.hidden_size, self.hidden_size)[: CELLS[self.mode].num_states]
        return tuple(steps.new_zeros(number, steps.shape[1], width) for width in features)

    def _layers(self, estimator: Estimator, weights: dict[str, Variational]) -> Iterator[list[Recurrence]]:
        step = CELLS[self.mode].step
        for layer in range(self.num_layers):
            yield [
                Recurrence(step, estimator, _weights_of(weights, f"_l{layer}{suffix}"), reverse=bool(suffix))
                for suffix in (("", "_reverse") if self.bidirectional else ("",))
            ]

    def _states(self, hx: Any) -> State:
        """From torch's form of the states to a tuple of them; empty if none are given."""
        if hx is None:
            return ()
        return (hx,) if CELLS[self.mode].num_states == 1 else tuple(hx)

    def _hidden(self, states: State) -> Any:
        """The inverse of `_states`."""
        return states[0] if CELLS[self.mode].num_states == 1 else states


class LSTM(Recurrent, torch.nn.LSTM):
    """`torch.nn.LSTM` with weights N(weight, scale^2): random in `train()`, the mean in `eval()`.

    All time steps use one draw of the weights, as in Gal & Ghahramani 2016 (arXiv 1512.05287) and Fortunato et al. 2017
    (arXiv 1704.02798). With flipout it is one draw per example, also of a packed batch, and with local
    reparameterization every gate at every step has noise of its own: each step is then treated as having its own
    weights, and the same weights at two steps count as independent. Both run step by step, in Python.

    Its arguments are those of `torch.nn.LSTM`, and those of :class:`BayesianModule`; ``dropout`` acts between layers,
    in `train()`, besides the weights' noise.

    Shape: as `torch.nn.LSTM`, packed and unbatched sequences included: (T, B, input_size) or, with ``batch_first``,
    (B, T, input_size) -> the outputs (..., directions * h) and the final states h_n, c_n.

    >>> layer = LSTM(3, 4, num_layers=2, bidirectional=True, batch_first=True).train()
    >>> output, (h, c) = layer(torch.ones(5, 7, 3))
    >>> output.shape, h.shape
    (torch.Size([5, 7, 8]), torch.Size([4, 5, 4]))
    """

    torch_class = torch.nn.LSTM


class GRU(Recurrent, torch.nn.GRU):
    """`torch.nn.GRU` with Gaussian weights; one draw per sequence and all else as in :class:`LSTM`.

    Shape: as `torch.nn.GRU`.

    >>> layer = GRU(3, 4, batch_first=True, estimator="flipout").train()
    >>> output, h = layer(torch.ones(5, 7, 3))
    >>> output.shape, h.shape
    (torch.Size([5, 7, 4]), torch.Size([1, 5, 4]))
    """

    torch_class = torch.nn.GRU


def _weights_of(weights: dict[str, Variational], suffix: str) -> Weights:
    kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
    return Weights(*(weights.get(kind + suffix) for kind in kinds))  # type: ignore[arg-type]
