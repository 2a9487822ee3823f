"""Forward passes that remember what layers saw, and gradients at their outputs: no Jacobian over the parameters."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..forward import Inputs, batch_size, call, mapped, rows
from ..sampling.views import View, modules_of, viewed
from .rules import TENSOR, EmbeddingRule, LayerRule, rule_of


class Use:
    """One call of a layer.

    Attributes:
        module: the layer.
        rule: of its class.
        input: its (first) argument.
        output: what it returned, as a point of the graph at which gradients can be asked for.
    """

    def __init__(self, module: nn.Module, rule: LayerRule, input: Tensor, output: Tensor) -> None:
        self.module, self.rule, self.input, self.output = module, rule, input.detach(), output
        self._version = input._version

    @property
    def is_stale(self) -> bool:
        """Whether the input was changed in place since the call."""
        return self.input._version != self._version

    @property
    def dtype(self) -> torch.dtype:
        """In which to sum: that of the output, or float32 if it is narrower."""
        return torch.promote_types(self.output.dtype, torch.float32)

    def is_batched(self, batch: int) -> bool:
        """Whether the first axis is the batch beyond doubt: positions or experts may stand there, or be as many."""
        others = self.rule.position_axes(self.module, self.input)
        return len(self.input) == len(self.output) == batch and batch not in others

    def inputs(self, batch: int) -> Tensor:
        """a, (K, B, T, d_in). In a batch of one, whatever stands first is a position."""
        return _merged(self.rule.inputs(self.module, self.input), batch)

    def gradients(self, gradient: Tensor, batch: int) -> Tensor:
        """g, (K, B, T, d_out), of a gradient at the output."""
        return _merged(self.rule.gradients(self.module, gradient), batch)


class TensorUse(Use):
    """Whatever a forward does with one parameter, whose module has no rule; it is the point of the graph itself.

    Attributes:
        parameter: of the model; ``output`` is what a view has in its place.
    """

    def __init__(self, parameter: nn.Parameter, module: nn.Module, leaf: Tensor) -> None:
        super().__init__(module, TENSOR, parameter, leaf)
        self.parameter = parameter

    def is_batched(self, batch: int) -> bool:
        """A gradient in a parameter is a sum over the batch."""
        return batch == 1

    def inputs(self, batch: int) -> Tensor:
        """One number, (1, 1, 1, 1), that stands for all of the parameter's."""
        return self.rule.inputs(self.module, self.input)

    def gradients(self, gradient: Tensor, batch: int) -> Tensor:
        """g, (1, 1, 1, p)."""
        return self.rule.gradients(self.module, gradient)


@contextlib.contextmanager
def recording_view(
    model: nn.Module, tensors: Iterable[nn.Parameter] = (), *, training: bool | None = None, is_private: bool = True
) -> Iterator[View]:
    """A view of ``model`` for `record`: no Parameter of it requires a gradient but ``tensors``, all of which do.

    The arguments ``training`` and ``is_private`` are those of `viewed`.
    """
    wanted = set(tensors)
    own = {id(p): p for module in modules_of(model) for p in module._parameters.values() if p is not None}
    flagged = [p for p in own.values() if p.requires_grad or p in wanted]  # by identity: a Parameter's hash is slow
    replaced = {id(p): nn.Parameter(p.detach(), requires_grad=bool(wanted) and p in wanted) for p in flagged}
    with viewed(model, replaced, training=training, is_private=is_private) as view:
        if view.is_private:
            yield view
            return
        with _flags({p: p in wanted for p in flagged}):
            yield view


def record(
    model: nn.Module | View,
    inputs: Inputs,
    modules: Iterable[nn.Module],
    output_of: Callable[[Any], Tensor],
    tensors: Mapping[nn.Parameter, nn.Module] | None = None,
) -> tuple[Tensor, list[Use]]:
    """``output_of(model(inputs))`` and every call of ``modules``, in order; then a use of each of ``tensors``.

    The graph begins at the first of these calls: nothing is stored for layers before it. Lower precision is switched
    off, for curvature needs float32. Nothing of the model changes, in no thread's eyes; who records often makes a
    `recording_view` of it once. ``modules`` and ``tensors``, with their modules, are the model's own.

    Raises:
        ValueError: a module has no rule.
    """
    rules, tensors = {module: _rule(module) for module in modules}, tensors or {}
    expand = any(isinstance(rule, EmbeddingRule) for rule in rules.values())
    with contextlib.nullcontext(model) if isinstance(model, View) else recording_view(model, tensors) as view:
        run = functools.partial(_forward, view, inputs, rules, output_of)
        try:
            output, uses = run(copy=False, expand=expand)
        except Exception:
            if not expand:
                raise
            expand = False  # a model that repeats its positions for the batch cannot take them repeated
            output, uses = run(copy=False, expand=expand)
        if any(use.is_stale for use in uses):
            output, uses = run(copy=True, expand=expand)
        return output, uses + [TensorUse(p, module, view.parameter(p)) for p, module in tensors.items()]


def _forward(
    view: View,
    inputs: Inputs,
    rules: Mapping[nn.Module, LayerRule],
    output_of: Callable[[Any], Tensor],
    *,
    copy: bool,
    expand: bool,
) -> tuple[Tensor, list[Use]]:
    uses: list[Use] = []
    batch, model = batch_size(inputs), view.model

    def note(module: nn.Module, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        given = args[0] if args else next(iter(kwargs.values()))
        rule = rules[module]
        if not isinstance(given, Tensor) or not isinstance(output, Tensor):
            raise ValueError(f"The Jacobian of {type(module).__name__} needs one tensor in and one tensor out.")
        if given.numel() == 0:  # an expert without tokens
            return output
        if (
            expand and isinstance(rule, EmbeddingRule) and len(given) == 1 < batch
        ):  # positions, looked up once for all examples
            given, output = given.expand(batch, *given.shape[1:]), output.expand(batch, *output.shape[1:])
        output = output if output.requires_grad else output.detach().requires_grad_()
        uses.append(Use(module, rule, given.clone() if copy else given, output))
        return output.clone()  # what follows may edit it in place

    hooks = {view.hookable(module): functools.partial(note, module) for module in rules}
    handles = [module.register_forward_hook(hook, with_kwargs=True) for module, hook in hooks.items()]
    norms = [module for module in modules_of(view.origin) if isinstance(module, _BatchNorm) and module not in rules]
    for module in map(view.hookable, norms):
        handles += [module.register_forward_pre_hook(_plain_input), module.register_forward_hook(_plain_gradient)]
    device = next((parameter.device.type for parameter in model.parameters()), "cpu")
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device, enabled=False):
            return output_of(call(model, mapped(inputs, _tracked))), uses
    finally:
        for handle in handles:
            handle.remove()


def _plain_input(module: nn.Module, args: tuple[Any, ...]) -> Any:
    """In torch 2.13 the gradient of a batch norm is wrong where an axis has length 1 and not all is laid out alike."""
    return (args[0].contiguous(), *args[1:]) if args and 1 in args[0].shape else None


def _plain_gradient(module: nn.Module, args: Any, output: Tensor) -> None:
    if 1 in output.shape and output.requires_grad:
        output.register_hook(Tensor.contiguous)  # type: ignore[no-untyped-call]


def gradients(output: Tensor, uses: Sequence[Use], weights: Tensor, *, last: bool = False) -> list[Tensor]:
    """Gradient of sum(output * weights) at every recorded output, 0 where it does not reach; float32 or wider.

    ``last``: the graph is not needed again.
    """
    points = [use.output for use in uses]
    if not points:  # this batch takes a way around all of the layers
        return []
    with torch.inference_mode(False):
        found = torch.autograd.grad(output, points, _tracked(weights), retain_graph=not last, allow_unused=True)
    parts = [torch.zeros_like(point) if grad is None else grad for point, grad in zip(points, found, strict=True)]
    return [part.to(torch.promote_types(part.dtype, torch.float32)) for part in parts]


def examples(inputs: Inputs, count: int) -> Iterator[Inputs]:
    """The batch as ``count`` batches of one."""
    for i in range(count):
        yield rows(inputs, slice(i, i + 1), count)


def _merged(tensor: Tensor, batch: int) -> Tensor:
    return tensor.flatten(1, 2).unsqueeze(1) if batch == 1 and tensor.shape[1] != 1 else tensor


def _tracked(value: Tensor) -> Tensor:
    """What was made under `torch.inference_mode()` has no version and can be part of no graph."""
    return value.clone() if value.is_inference() else value


def _rule(module: nn.Module) -> LayerRule:
    rule = rule_of(module)
    if rule is None:
        raise ValueError(f"There is no rule for the Jacobian of {type(module).__name__}; see `register_curvature`.")
    return rule


@contextlib.contextmanager
def _flags(wanted: Mapping[nn.Parameter, bool]) -> Iterator[None]:
    """These `requires_grad` flags until exit."""
    changed = [parameter for parameter, flag in wanted.items() if parameter.requires_grad != flag]
    try:
        for parameter in changed:
            parameter.requires_grad_(wanted[parameter])
        yield
    finally:
        for parameter in changed:
            parameter.requires_grad_(not wanted[parameter])
