"""Which examples each row of what a layer saw belongs to: a Jacobian per example needs them apart.

A layer may run on something that all examples share: relative positions, learned queries, a table of classes. The
gradient at its output is then a sum over the examples, of which no product can be taken. Found with two copies of one
example: each alone is given a gradient, and a row that both reach is shared. What a call of a layer sees is a matter
of the model's code and not of its data, so every call is tried once.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..forward import Inputs, mapped
from ..sampling.views import View
from .recording import Use, gradients, record

Separation = Literal["examples", "rows", "none"]
"""Of all uses in a batch: the first axis is the example; or every row is of one example; or some row is of several."""

_Verdict = Literal["example", "row", "shared"]
_Key = tuple["weakref.ref[nn.Module]", int, int, int]
_Known = dict[_Key, tuple[_Verdict, int | None]]  # without a gradient a verdict holds for these weights alone
_KNOWN: weakref.WeakKeyDictionary[nn.Module, _Known] = weakref.WeakKeyDictionary()


def separation(
    model: nn.Module | View, inputs: Inputs, outputs: Tensor, uses: Sequence[Use], output_of: Callable[[Any], Tensor]
) -> Separation:
    """How the uses of one `record` keep the batch's examples apart."""
    batch = len(outputs)
    if batch == 1:
        return "examples"
    found = _verdicts(model, inputs, batch, uses, output_of)
    if found is None:
        return _tested(outputs, uses)
    if "shared" in found:
        return "none"
    return "rows" if "row" in found else "examples"


def examples_first(
    model: nn.Module | View, inputs: Inputs, batch: int, uses: Sequence[Use], output_of: Callable[[Any], Tensor]
) -> set[Use]:
    """Uses of which the first axis is the example; told in a batch of one too, where whatever is shared looks so."""
    found = _verdicts(model, inputs, batch, uses, output_of)
    if found is None:
        return {use for use in uses if len(use.input) == len(use.output) == batch}
    return {use for use, verdict in zip(uses, found, strict=True) if verdict == "example"}


def _verdicts(
    model: nn.Module | View, inputs: Inputs, batch: int, uses: Sequence[Use], output_of: Callable[[Any], Tensor]
) -> list[_Verdict] | None:
    """One per use; None where the model cannot be run on two copies of an example."""
    origin = model.origin if isinstance(model, View) else model
    known, keys = _KNOWN.setdefault(origin, {}), _keys(uses)
    version = sum(parameter._version for parameter in origin.parameters())
    # an expert that was given one token of each copy has a row per token, not per example
    others = {key for key, use in zip(keys, uses, strict=True) if not len(use.input) == len(use.output) == batch}
    for i in range(batch):
        if all(_holds(known.get(key), version, key in others) for key in keys):
            break
        try:
            found = _probed(model, _twice(inputs, batch, i), {use.module for use in uses}, output_of)
        except Exception:  # whatever a model raises for inputs of which not every tensor has one row per example
            return None
        for key, (verdict, sees) in found.items():
            if not _holds(known.get(key), version, key in others):
                verdict = "row" if verdict == "example" and key in others else verdict
                known[key] = verdict, None if sees else version
    return [known[key][0] if key in known else "shared" for key in keys]  # else no single example makes that call


def _holds(known: tuple[_Verdict, int | None] | None, version: int, is_other: bool) -> bool:
    return known is not None and known[1] in (None, version) and not (is_other and known[0] == "example")


def _probed(
    model: nn.Module | View, pair: Inputs, modules: Iterable[nn.Module], output_of: Callable[[Any], Tensor]
) -> dict[_Key, tuple[_Verdict, bool]]:
    """Verdicts from two copies of an example, and whether a gradient speaks for them."""
    outputs, uses = record(model, pair, modules, output_of)
    if len(outputs) != 2:
        raise ValueError(f"Two examples gave {len(outputs)} outputs.")
    first, second = torch.zeros_like(outputs), torch.zeros_like(outputs)
    first[0] = second[1] = torch.linspace(1, 2, outputs[0].numel()).to(outputs).view(outputs.shape[1:])
    parts = [gradients(outputs, uses, weights, last=weights is second) for weights in (first, second)]
    calls = Counter(use.module for use in uses)
    return {
        key: _verdict(use, of_first, of_second, calls[use.module])
        for key, use, of_first, of_second in zip(_keys(uses), uses, *parts, strict=True)
    }


def _verdict(use: Use, first: Tensor, second: Tensor, calls: int) -> tuple[_Verdict, bool]:
    """``first`` and ``second``: gradients of the first and of the second copy's outputs."""
    if not bool(first.any() or second.any()):  # its rows count nowhere but beside those of another call
        return "example" if use.is_batched(2) else "shared" if calls > 1 else "row", False
    if len(use.input) == len(use.output) == 2 and not bool(first[1].any() or second[0].any()):
        return "example", True
    reached = [use.rule.gradients(use.module, part).ne(0).any(-1) for part in (first, second)]
    return "shared" if bool((reached[0] & reached[1]).any()) else "row", True


def _keys(uses: Sequence[Use]) -> list[_Key]:
    """The number of a call of its module tells what it sees: hidden states first, say, then relative positions."""
    calls: Counter[nn.Module] = Counter()
    keys: list[_Key] = []
    for use in uses:
        keys.append((weakref.ref(use.module), calls[use.module], use.input.ndim, use.output.ndim))
        calls[use.module] += 1
    return keys


def _twice(inputs: Inputs, batch: int, index: int) -> Inputs:
    found: Inputs = mapped(inputs, lambda value: value[[index, index]] if value.ndim and len(value) == batch else value)
    return found


def _tested(outputs: Tensor, uses: Sequence[Use]) -> Separation:
    """Of this batch alone: a row of one example n gives 2^e_n times as much where each example is given 2^e_n."""
    exponents = (torch.arange(len(outputs)) % 13 - 6).to(outputs)
    scales = torch.exp2(exponents)
    weights = torch.linspace(1, 2, outputs.numel()).to(outputs).view(outputs.shape)
    plain = gradients(outputs, uses, weights)
    scaled = gradients(outputs, uses, weights * scales.view(-1, *[1] * (outputs.ndim - 1)))
    worst: Separation = "examples"
    for use, one, other in zip(uses, plain, scaled, strict=True):
        fits = len(use.input) == len(use.output) == len(outputs)
        if fits and _close(other, one * scales.to(one).view(-1, *[1] * (one.ndim - 1))):
            continue
        rows, many = (use.rule.gradients(use.module, part) for part in (one, other))
        norms = rows.square().sum(-1, keepdim=True)
        ratio = (rows * many).sum(-1, keepdim=True) / torch.where(norms > 0, norms, 1.0)
        nearest = torch.exp2(torch.log2(ratio.clamp_min(torch.finfo(ratio.dtype).tiny)).round())
        if not _close(many, rows * nearest):
            return "none"
        worst = "rows"
    return worst


def _close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() <= 1e-4 * expected.abs().max())
