"""Forward passes that remember what layers saw, and gradients at their outputs: no Jacobian over the parameters."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn.modules.batchnorm import _BatchNorm

from ..forward import Inputs, batch_size, call, mapped, rows
from ..sampling.views import View, modules_of, viewed
from .rules import TENSOR, EmbeddingRule, LayerRule, rule_of


@dataclass(frozen=True, eq=False)
class Point:
    """Where in a graph a tensor stands, at which gradients can be asked for; the tensor itself need not be kept.

    Attributes:
        edge: the place.
        shape: of the tensor.
        dtype: of the tensor.
        device: of the tensor.
    """

    edge: GradientEdge
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: Tensor) -> Point:
        """Return the place of a tensor that requires a gradient; what edits it in place later does not move it."""
        with torch.inference_mode(False):  # a leaf's place is found by a view, which inference mode does not record
            return cls(get_gradient_edge(tensor), tensor.shape, tensor.dtype, tensor.device)

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]


@dataclass(frozen=True, eq=False)
class Use:
    """One call of a layer, or whatever a forward does with one parameter whose module has no rule.

    Attributes:
        owner: whose use it is: the layer, or the parameter.
        module: the layer.
        rule: of its class.
        input: its (first) argument, detached; the parameter itself.
        output: where in the graph what it returned stands; what a view has in the parameter's place.
        version: of the input at the time of the call.
    """

    owner: nn.Module | nn.Parameter
    module: nn.Module
    rule: LayerRule
    input: Tensor
    output: Point
    version: int

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


def _merged(tensor: Tensor, batch: int) -> Tensor:
    return tensor.flatten(1, 2).unsqueeze(1) if batch == 1 and tensor.shape[1] != 1 else tensor


@contextlib.contextmanager
def recording_view(
    model: nn.Module, tensors: Iterable[nn.Parameter] = (), *, training: bool | None = None, is_private: bool = True
) -> Iterator[View]:
    """A view of ``model`` for `record`: no Parameter of it requires a gradient but ``tensors``, all of which do.

    Args:
        model: of which.
        tensors: Parameters whose gradients are wanted.
        training: mode of all modules inside; None: each its own.
        is_private: False for the model itself in any case.

    Yields:
        The view; the model itself where there can be none, with other flags until exit.
    """
    wanted = set(tensors)
    own = {id(p): p for module in modules_of(model) for p in module._parameters.values() if p is not None}
    flagged = [p for p in own.values() if p.requires_grad or p in wanted]  # by identity: a Parameter's hash is slow
    replaced = {id(p): nn.Parameter(p.detach(), requires_grad=bool(wanted) and p in wanted) for p in flagged}
    with viewed(model, replaced, training=training, is_private=is_private) as view:
        changed = [] if view.is_private else [p for p in flagged if p.requires_grad != (p in wanted)]
        try:
            for parameter in changed:
                parameter.requires_grad_(not parameter.requires_grad)
            yield view
        finally:
            for parameter in changed:
                parameter.requires_grad_(parameter not in wanted)


def record(
    model: nn.Module | View,
    inputs: Inputs,
    modules: Iterable[nn.Module],
    output_of: Callable[[Any], Tensor],
    tensors: Mapping[nn.Parameter, nn.Module] | None = None,
) -> tuple[Tensor, list[Use]]:
    """The model's outputs with their graph, and what its layers saw.

    The graph begins at the first call of these layers: nothing is stored for those before it. Lower precision is
    switched off, for curvature needs float32. Nothing of the model changes, in no thread's eyes.

    Args:
        model: a model, or a `recording_view` of it, which who records often makes once.
        inputs: what its forward takes.
        modules: the model's own layers whose calls are recorded.
        output_of: the logits in what the model returns.
        tensors: parameters of modules without a rule, with the module.

    Returns:
        ``output_of(model(inputs))`` and every call of ``modules``, in order; then a use of each of ``tensors``.

    Raises:
        ValueError: a module has no rule.
    """
    rules: dict[nn.Module, LayerRule] = {}
    for module in modules:
        rule = rule_of(module)
        if rule is None:
            raise ValueError(f"There is no rule for the Jacobian of {type(module).__name__}; see `register_rule`.")
        rules[module] = rule
    tensors = tensors or {}
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
        if any(use.input._version != use.version for use in uses):  # changed in place since the call
            output, uses = run(copy=True, expand=expand)
        bare = [Use(p, module, TENSOR, p.detach(), Point.of(view.parameter(p)), 0) for p, module in tensors.items()]
        return output, uses + bare


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
        input = args[0] if args else next(iter(kwargs.values()))
        if not isinstance(input, Tensor) or not isinstance(output, Tensor):
            raise ValueError(f"The Jacobian of {type(module).__name__} needs one tensor in and one tensor out.")
        if input.numel() == 0:  # an expert without tokens
            return output
        # positions, looked up once for all examples
        if expand and isinstance(rules[module], EmbeddingRule) and len(input) == 1 < batch:
            input, output = input.expand(batch, *input.shape[1:]), output.expand(batch, *output.shape[1:])
        is_first = not output.requires_grad
        output = output.detach().requires_grad_() if is_first else output
        kept = input.detach().clone() if copy else input.detach()
        uses.append(Use(module, module, rules[module], kept, Point.of(output), kept._version))
        return output.clone() if is_first else output  # a leaf must not be edited in place by what follows

    handles = [
        view.hookable(module).register_forward_hook(functools.partial(note, module), with_kwargs=True)
        for module in rules
    ]
    norms = [module for module in modules_of(view.origin) if isinstance(module, _BatchNorm) and module not in rules]
    for norm in map(view.hookable, norms):
        handles += [norm.register_forward_pre_hook(_plain_input), norm.register_forward_hook(_plain_gradient)]
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
    """Gradients at recorded outputs, in float32 or wider.

    Args:
        output: the model's, with its graph.
        uses: at whose outputs.
        weights: of the sum whose gradient is taken, of the output's shape.
        last: whether the graph is not needed again.

    Returns:
        d sum(output * weights) / d use.output for each use, 0 where it does not reach.
    """
    points = [use.output for use in uses]
    if not points:  # this batch takes a way around all of the layers
        return []
    with torch.inference_mode(False):
        grads = torch.autograd.grad(
            output, [point.edge for point in points], _tracked(weights), retain_graph=not last, allow_unused=True
        )
    parts = [
        torch.zeros(point.shape, dtype=point.dtype, device=point.device) if grad is None else grad
        for point, grad in zip(points, grads, strict=True)
    ]
    return [part.to(use.dtype) for part, use in zip(parts, uses, strict=True)]


def examples(inputs: Inputs, count: int) -> Iterator[Inputs]:
    """The batch as ``count`` batches of one."""
    return (rows(inputs, slice(i, i + 1), count) for i in range(count))


def _tracked(value: Tensor) -> Tensor:
    """What was made under `torch.inference_mode()` has no version and can be part of no graph."""
    return value.clone() if value.is_inference() else value
