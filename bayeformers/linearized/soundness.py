"""Whether a record of calls holds the whole Jacobian, one example at a time: found out once for a model.

A layer may run on something that all examples share: relative positions, learned queries, a table of classes. The
gradient at its output is then a sum over the examples, of which no product can be taken. Found with two copies of one
example: each alone is given a gradient, and a row that both reach is shared. What a call of a layer sees is a matter
of the model's code and not of its data, so every call is tried once.

A weight may also be read outside its layer's forward, where no record of calls sees the use, and the Jacobian in it
would lack a part. Found in a view of the model where a weight requires a gradient only while its own layer does not
run; then the outputs' graph reaches it or does not.
"""

from __future__ import annotations

import functools
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..forward import Inputs, batch_size, call, rows
from ..sampling.dora import tell_of_held_norms
from ..sampling.views import View, viewed
from .recording import Use, examples, gradients, record

Separation = Literal["examples", "rows", "none"]
"""Of all uses in a batch: the first axis is the example; or every row is of one example; or some row is of several."""

_Verdict = Literal["example", "row", "shared"]
_Call = tuple["weakref.ref[nn.Module]", int, int, int]
_Known = dict[_Call, tuple[_Verdict, int | None]]  # without a gradient a verdict holds for these weights alone
_KNOWN: weakref.WeakKeyDictionary[nn.Module, _Known] = weakref.WeakKeyDictionary()
_WITHOUT_READS: weakref.WeakKeyDictionary[nn.Module, set[tuple[Any, ...]]] = weakref.WeakKeyDictionary()
"""Layers and names of inputs that were looked at and found to be read nowhere else."""


# -- examples apart ---------------------------------------------------------------------------------------------------


def separation(
    model: nn.Module | View, inputs: Inputs, outputs: Tensor, uses: Sequence[Use], output_of: Callable[[Any], Tensor]
) -> Separation:
    """Return how one `record` keeps the batch's examples apart.

    Args:
        model: the model that was recorded, or a view of it.
        inputs: what its forward took, B examples.
        outputs: the recorded outputs, (B, ...), with their graph.
        uses: the recorded uses of the layers.
        output_of: the logits in what the model returns.
    """
    if len(outputs) == 1:
        return "examples"
    verdicts = _verdicts(model, inputs, len(outputs), uses, output_of)
    if verdicts is None:
        return _tested(outputs, uses)
    if "shared" in verdicts:
        return "none"
    return "rows" if "row" in verdicts else "examples"


def examples_first(
    model: nn.Module | View, inputs: Inputs, batch: int, uses: Sequence[Use], output_of: Callable[[Any], Tensor]
) -> set[Use]:
    """Return the uses of which the first axis is the example.

    Told in a batch of one too, where whatever is shared looks so.

    Args:
        model: the model that was recorded, or a view of it.
        inputs: what its forward took.
        batch: the number B of examples in it.
        uses: the recorded uses of the layers.
        output_of: the logits in what the model returns.
    """
    verdicts = _verdicts(model, inputs, batch, uses, output_of)
    if verdicts is None:
        return {use for use in uses if len(use.input) == len(use.output) == batch}
    return {use for use, verdict in zip(uses, verdicts, strict=True) if verdict == "example"}


def _verdicts(
    model: nn.Module | View, inputs: Inputs, batch: int, uses: Sequence[Use], output_of: Callable[[Any], Tensor]
) -> list[_Verdict] | None:
    """One per use; None where the model cannot be run on two copies of an example."""
    origin = model.origin if isinstance(model, View) else model
    known, calls = _KNOWN.setdefault(origin, {}), _calls(uses)
    version = sum(parameter._version for parameter in origin.parameters())
    # an expert that was given one token of each copy has a row per token, not per example
    others = {key for key, use in zip(calls, uses, strict=True) if not len(use.input) == len(use.output) == batch}

    def verdict(key: _Call) -> _Verdict | None:
        told, valid = known.get(key, (None, None))
        return told if valid in (None, version) and not (told == "example" and key in others) else None

    for i in range(batch):
        if all(map(verdict, calls)):
            break
        try:
            pair = rows(inputs, torch.tensor([i, i]), batch)
            probed = _probed(model, pair, {use.module for use in uses}, output_of)
        except Exception:  # whatever a model raises for inputs of which not every tensor has one row per example
            return None
        for key, (told, sees) in probed.items():
            if verdict(key) is None:
                told = "row" if told == "example" and key in others else told
                known[key] = told, None if sees else version
    return [verdict(key) or "shared" for key in calls]  # else no single example makes that call


def _probed(
    model: nn.Module | View, pair: Inputs, modules: Iterable[nn.Module], output_of: Callable[[Any], Tensor]
) -> dict[_Call, tuple[_Verdict, bool]]:
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
        for key, use, of_first, of_second in zip(_calls(uses), uses, *parts, strict=True)
    }


def _verdict(use: Use, first: Tensor, second: Tensor, calls: int) -> tuple[_Verdict, bool]:
    """``first`` and ``second``: gradients of the first and of the second copy's outputs."""
    if not bool(first.any() or second.any()):  # its rows count nowhere but beside those of another call
        return "example" if use.is_batched(2) else "shared" if calls > 1 else "row", False
    if len(use.input) == len(use.output) == 2 and not bool(first[1].any() or second[0].any()):
        return "example", True
    reached = [use.rule.gradients(use.module, part).ne(0).any(-1) for part in (first, second)]
    return "shared" if bool((reached[0] & reached[1]).any()) else "row", True


def _calls(uses: Sequence[Use]) -> list[_Call]:
    """The number of a call of its module tells what it sees: hidden states first, say, then relative positions."""
    calls: Counter[nn.Module] = Counter()
    keys: list[_Call] = []
    for use in uses:
        keys.append((weakref.ref(use.module), calls[use.module], use.input.ndim, use.output.ndim))
        calls[use.module] += 1
    return keys


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
        once, many = (use.rule.gradients(use.module, part) for part in (one, other))
        norms = once.square().sum(-1, keepdim=True)
        ratio = (once * many).sum(-1, keepdim=True) / torch.where(norms > 0, norms, 1.0)
        nearest = torch.exp2(torch.log2(ratio.clamp_min(torch.finfo(ratio.dtype).tiny)).round())
        if not _close(many, once * nearest):
            return "none"
        worst = "rows"
    return worst


def _close(given: Tensor, expected: Tensor) -> bool:
    return bool((given - expected).abs().max() <= 1e-4 * expected.abs().max())


# -- weights read elsewhere -------------------------------------------------------------------------------------------


def check_reads(
    model: nn.Module, inputs: Inputs, modules: Iterable[nn.Module], output_of: Callable[[Any], Tensor]
) -> None:
    """Raise ValueError if a weight is read outside its layer's forward.

    Args:
        model: the model to be linearised.
        inputs: what its forward takes, one example or more.
        modules: the layers whose weights are asked about.
        output_of: the logits in what the model returns.

    Raises:
        ValueError: there is such a weight; its layer is named.
    """
    modules = list(modules)
    key = frozenset(map(id, modules)), tuple(inputs) if isinstance(inputs, Mapping) else ()
    if key in _WITHOUT_READS.setdefault(model, set()):
        return
    tell_of_held_norms(model, modules)
    read = set(read_outside(model, inputs, modules, output_of))
    if read:
        some = [name for name, module in model.named_modules() if module in read]
        raise ValueError(
            f"The model reads the weights of {some[:3]}{' and others' if len(some) > 3 else ''} outside these layers' "
            "own forward, where their Jacobians cannot be recorded: predict with method='sample', or leave such layers "
            "deterministic by `exclude_modules`."
        )
    _WITHOUT_READS[model].add(key)


def read_outside(
    model: nn.Module, inputs: Inputs, modules: Iterable[nn.Module], output_of: Callable[[Any], Tensor]
) -> list[nn.Module]:
    """Return the layers whose weights are read outside their own forward; none where it cannot be told.

    Args:
        model: the model to be linearised.
        inputs: what its forward takes, of which the first example is tried.
        modules: the layers whose weights are asked about.
        output_of: the logits in what the model returns.
    """
    modules = list(modules)
    weights = {p for module in modules for p in module._parameters.values() if p is not None and p.is_floating_point()}
    if not weights:
        return []
    counterparts = {weight: nn.Parameter(weight.detach()) for weight in weights}
    with viewed(model, {id(weight): own for weight, own in counterparts.items()}, training=False) as view:
        if not view.is_private:
            return []
        for module in modules:
            _switch_off_inside(view.hookable(module))
        with torch.inference_mode(False), torch.enable_grad():
            try:
                outputs = output_of(call(view.model, next(examples(inputs, batch_size(inputs)))))
            except Exception:  # what cannot run on one example alone is left to the caller's own pass
                return []
            if not outputs.requires_grad:
                return []
            grads = torch.autograd.grad(outputs.sum(), list(counterparts.values()), allow_unused=True)
    reached = {weight for weight, grad in zip(counterparts, grads, strict=True) if grad is not None}
    return [module for module in modules if not reached.isdisjoint(module._parameters.values())]


def _switch_off_inside(layer: nn.Module) -> None:
    """Let the weights of a view's layer require a gradient only while it does not run."""
    weights = [p for p in layer._parameters.values() if p is not None and p.is_floating_point()]

    def switch(on: bool, *_: Any) -> None:
        for weight in weights:
            weight.requires_grad_(on)

    layer.register_forward_pre_hook(functools.partial(switch, False))
    layer.register_forward_hook(functools.partial(switch, True))
