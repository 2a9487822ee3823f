"""Random recurrent layers and sequences of every form that torch takes, and torch's own layer with given weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import bayeformers.nn as bnn
from bayeformers.nn.variational import Draw
from tests.reference import dense_noise, key_of, sigma, signs_of

FORMS = ("batched", "unbatched", "packed sorted", "packed")


@dataclass(frozen=True)
class Case:
    """One combination of a layer's arguments, the form of its input, and whether states are given."""

    kind: str
    arguments: dict[str, Any]
    form: str
    lengths: list[int]
    with_states: bool
    seed: int

    def plain(self, dtype: torch.dtype = torch.float64) -> Any:
        """torch's layer."""
        torch.manual_seed(self.seed)
        return getattr(nn, self.kind)(**self.arguments, dtype=dtype)

    def bayesian(self, estimator: str = "reparameterization", delta: float = 0.5) -> Any:
        """The Bayesian layer with the same means, in float64."""
        torch.manual_seed(self.seed)
        layer = getattr(bnn, self.kind)(**self.arguments, dtype=torch.float64, estimator=estimator, delta=delta)
        return layer.train()

    def examples(self) -> list[Tensor]:
        """Sequences (T, input_size), one per example."""
        generator = torch.Generator().manual_seed(self.seed)
        width = self.arguments["input_size"]
        return [torch.randn(n, width, generator=generator, dtype=torch.float64) for n in self.lengths]

    def input(self) -> Tensor | PackedSequence:
        """The examples in the case's form."""
        examples = self.examples()
        if self.form == "unbatched":
            return examples[0]
        if self.form.startswith("packed"):
            return pack_sequence(examples, enforce_sorted=self.form == "packed sorted")
        return torch.stack(examples, 0 if self.arguments["batch_first"] else 1)

    def states(self) -> Any:
        """Initial states as torch takes them, or None."""
        if not self.with_states:
            return None
        generator = torch.Generator().manual_seed(self.seed + 1)
        a = self.arguments
        number = a["num_layers"] * (1 + a["bidirectional"])
        widths = [a.get("proj_size") or a["hidden_size"], a["hidden_size"]]
        found = [torch.randn(number, len(self.lengths), w, generator=generator, dtype=torch.float64) for w in widths]
        found = [s.squeeze(1) if self.form == "unbatched" else s for s in found]
        return tuple(found) if self.kind == "LSTM" else found[0]

    def state_of(self, example: int) -> Any:
        """The initial states of one example, (layers * directions, 1, features) each."""
        given = self.states()
        if given is None or self.form == "unbatched":
            return None if given is None else _each(given, lambda s: s.unsqueeze(1))
        return _each(given, lambda s: s[:, example : example + 1].contiguous())


@st.composite
def cases(draw: Any, kind: str, dropout: bool = False) -> Case:
    """All arguments, at small sizes."""
    form = draw(st.sampled_from(FORMS))
    hidden = draw(st.integers(1, 4))
    arguments = {
        "input_size": draw(st.integers(1, 4)),
        "hidden_size": hidden,
        "num_layers": draw(st.integers(1, 3)),
        "bias": draw(st.booleans()),
        "batch_first": draw(st.booleans()),
        "bidirectional": draw(st.booleans()),
    }
    if dropout and arguments["num_layers"] > 1:
        arguments["dropout"] = draw(st.sampled_from([0.0, 0.5]))
    if kind == "LSTM":
        arguments["proj_size"] = draw(st.integers(0, hidden - 1))
    if form.startswith("packed"):
        lengths = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
        lengths = sorted(lengths, reverse=True) if form == "packed sorted" else lengths
    else:
        lengths = [draw(st.integers(1, 5))] * (1 if form == "unbatched" else draw(st.integers(1, 3)))
    return Case(kind, arguments, form, lengths, draw(st.booleans()), draw(st.integers(0, 2**20)))


def tensors(output: Any) -> list[Tensor]:
    """All tensors of a layer's output, those of a packed sequence with its order; None counts as empty."""
    if output is None:
        return [torch.empty(0)]
    return [output] if isinstance(output, Tensor) else [t for part in output for t in tensors(part)]


def same_form(a: Any, b: Any) -> bool:
    """Whether two outputs are of the same types, down to the tensors' shapes and dtypes."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.shape == b.shape and a.dtype == b.dtype
    if a is None or b is None:
        return a is b
    return type(a) is type(b) and len(a) == len(b) and all(same_form(x, y) for x, y in zip(a, b, strict=True))


def assert_same(found: Any, expected: Any, tolerance: float = 0.0) -> None:
    """Same form, and values within an absolute and relative tolerance."""
    assert same_form(found, expected)
    for a, b in zip(tensors(found), tensors(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def noise_of_draw(layer: Any, draw: Draw) -> dict[str, Tensor]:
    """eps of each weight of a hand-built layer under a draw, float64."""
    return {
        name: dense_noise(key_of(draw.seed, draw.index, name), tuple(layer.get_parameter(name).shape)).double()
        for name in layer.specs
    }


def signs_of_draw(layer: Any, draw: Draw, name: str, examples: int) -> Tensor:
    """t_b r_b^T of a weight, or t_b of the bias that is added to its product: (examples, *shape)."""
    owner = name.replace("bias_", "weight_")
    axes = [
        signs_of(key_of(draw.seed, draw.index, f"{owner}/signs{axis}"), (examples, size))
        for axis, size in enumerate(layer.get_parameter(owner).shape)
    ]
    return (axes[0] if name != owner else axes[0][:, :, None] * axes[1][:, None]).double()


def weights_of(layer: Any, noise: dict[str, Tensor]) -> dict[str, Tensor]:
    """mu + sigma * eps of each weight."""
    return {n: layer.get_parameter(n).detach() + sigma(layer.get_parameter(f"{n}_rho")) * noise[n] for n in noise}


def nll(output: Any) -> Tensor:
    """A loss of outputs and final states."""
    steps, hidden = output
    last = hidden[0] if isinstance(hidden, tuple) else hidden
    return steps.tanh().square().sum() + last.sum().sin()


class Tagger(nn.Module):
    """Table, recurrent layer, head: the last output is classified."""

    def __init__(self, kind: str = "LSTM", **arguments: Any) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 3)
        self.rnn = getattr(nn, kind)(3, 4, batch_first=True, **arguments)
        self.head = nn.Linear(4, 2)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.rnn(self.table(ids))[0][:, -1])  # type: ignore[no-any-return]


def _each(states: Any, function: Any) -> Any:
    return function(states) if isinstance(states, Tensor) else tuple(map(function, states))
