"""One rule per layer class: how what a layer saw, and the gradient at its output, become its Jacobian.

An affine layer's Jacobian for one example and one scalar output of the network is a matrix of rank at most T,

    M = sum_t g_t a_t^T     (d_out, d_in')

with the layer's input a_t at position t, and the gradient g_t at its output. A bias is one more column, whose input is
1. Rules bring a layer's tensors into that form, or name another kind; `register_rule` adds one for a class of your own.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from .kinds import AffineCaptured, Captured, GainCaptured, Gaussian, TableCaptured, TensorCaptured

R = TypeVar("R", bound="type[LayerRule]")


class LayerRule(ABC):
    """Brings one layer class into matrix form. K is the number of independent blocks: groups of a convolution, else 1.

    Attributes:
        by_default: whether a posterior over "all" layers includes the class.
        kind: what the Jacobian is made of; M = sum_t g_t a_t^T unless a rule says otherwise.
    """

    by_default: ClassVar[bool] = True
    kind: ClassVar[type[Captured]] = AffineCaptured

    @property
    def is_affine(self) -> bool:
        """Whether M = sum_t g_t a_t^T."""
        return self.kind.is_affine

    @abstractmethod
    def inputs(self, module: Any, input: Tensor) -> Tensor:
        """a, (K, B, T, d_in), of an input whose first axis is the batch."""

    @abstractmethod
    def gradients(self, module: Any, gradient: Tensor) -> Tensor:
        """g, (K, B, T, d_out), of a gradient at the output whose first axis is the batch."""

    @abstractmethod
    def matrix(self, module: Any, weight: Tensor) -> Tensor:
        """A tensor of the weight's shape as (K, d_out, d_in)."""

    @abstractmethod
    def weight(self, module: Any, matrix: Tensor) -> Tensor:
        """The inverse of `matrix`."""

    def bias_matrix(self, module: Any, bias: Tensor) -> Tensor:
        """A tensor of the bias's shape as a column (K, d_out, 1)."""
        return bias.reshape(getattr(module, "groups", 1), -1, 1)

    def to_matrix(self, module: Any, tensors: Mapping[str, Tensor]) -> Tensor:
        """The layer's "weight" and/or "bias" as one matrix (K, d_out, d_in'): the bias is the last column."""
        parts = [self.matrix(module, tensors["weight"])] if "weight" in tensors else []
        parts += [self.bias_matrix(module, tensors["bias"])] if "bias" in tensors else []
        return torch.cat(parts, dim=-1)

    def from_matrix(self, module: Any, matrix: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """Return tensors of the parameters' shapes by name, the inverse of `to_matrix`.

        Args:
            module: the layer.
            matrix: its matrix form, (K, d_out, d_in').
            names: the parameters that the matrix holds: "weight" and/or "bias", the last column.
        """
        found = {}
        if "weight" in names:
            found["weight"] = self.weight(module, matrix[..., :-1] if "bias" in names else matrix)
        if "bias" in names:
            found["bias"] = matrix[..., -1].flatten()
        return found

    def position_axes(self, module: Any, input: Tensor) -> tuple[int, ...]:
        """Sizes of the axes between batch and features: one as large as the batch could be mistaken for it."""
        return tuple(input.shape[1:-1])

    def owners(self, block: Gaussian) -> Iterable[nn.Module | nn.Parameter]:
        """Whose uses are those of a block: its layers, of which every call is recorded."""
        return block.modules


_RULES: dict[type[nn.Module], LayerRule] = {}


def register_rule(*kinds: type[nn.Module]) -> Callable[[R], R]:
    """Class decorator: this `LayerRule` is that of exactly these module classes, and of subclasses with their forward.

    Args:
        *kinds: the module classes.

    Returns:
        The decorator, which gives the rule back.

    >>> class Scaled(nn.Linear):
    ...     def forward(self, x): return 2 * super().forward(x)
    >>> rule_of(Scaled(2, 2)) is None
    True
    >>> @register_rule(Scaled)
    ... class ScaledRule(LinearRule):
    ...     def gradients(self, module, gradient): return 2 * super().gradients(module, gradient)
    >>> type(rule_of(Scaled(2, 2))).__name__
    'ScaledRule'
    >>> _ = _RULES.pop(Scaled)  # the registry is global, and this class was an example
    """

    def register(rule: R) -> R:
        if getattr(rule, "is_affine", None) is False:  # as rules said it before 0.2
            raise TypeError(f"{rule.__name__}: name the `kind` of its Jacobian in place of `is_affine = False`.")
        for kind in kinds:
            _RULES[kind] = rule()
        return rule

    return register


register_curvature = register_rule
"""The name of `register_rule` before 0.2."""


def rule_of(module: nn.Module) -> LayerRule | None:
    """The rule of a module's class, or of the nearest ancestor whose forward it inherits unchanged; or None."""
    # a subclass with its own forward may use its weight differently; so does a module whose weight others read
    if getattr(module, "is_read", False):
        return None
    # a variational layer computes at its mean what its torch class does
    source = getattr(type(module), "torch_class", None) or type(module)
    for kind in source.__mro__:
        if kind in _RULES:
            own = source is type(module) and "forward" in vars(module)
            return _RULES[kind] if source.forward is kind.forward and not own else None
    return _NORM if _is_rms_norm(module) else None


def supported_layers() -> str:
    """Names of the classes that have a rule."""
    return ", ".join(sorted(kind.__name__ for kind in _RULES)) + ", RMSNorm of any model"


@register_rule(nn.Linear)
class LinearRule(LayerRule):
    """y_t = W a_t + b."""

    def inputs(self, module: Any, input: Tensor) -> Tensor:
        """a, (1, B, T, d_in), of an input (B, ..., d_in)."""
        return input.reshape(1, len(input), -1, input.shape[-1])

    def gradients(self, module: Any, gradient: Tensor) -> Tensor:
        """g, (1, B, T, d_out), of a gradient (B, ..., d_out)."""
        return gradient.reshape(1, len(gradient), -1, gradient.shape[-1])

    def matrix(self, module: Any, weight: Tensor) -> Tensor:
        """The weight itself, (1, d_out, d_in)."""
        return weight.unsqueeze(0)

    def weight(self, module: Any, matrix: Tensor) -> Tensor:
        """The matrix without its first axis."""
        return matrix.squeeze(0)


@register_rule(Conv1D)
class Conv1DRule(LinearRule):
    """transformers' Conv1D: a Linear whose weight is stored transposed, (d_in, d_out)."""

    def matrix(self, module: Any, weight: Tensor) -> Tensor:
        """The weight's transpose, (1, d_out, d_in)."""
        return weight.mT.unsqueeze(0)

    def weight(self, module: Any, matrix: Tensor) -> Tensor:
        """The matrix's transpose, (d_in, d_out)."""
        return matrix.squeeze(0).mT


@register_rule(nn.Embedding)
class EmbeddingRule(LinearRule):
    """A Linear on one-hot rows, W = table^T never formed: (K, d_out, d_in') is here (1, V, d), a row per entry."""

    by_default = False
    kind: ClassVar[type[Captured]] = TableCaptured

    def inputs(self, module: Any, input: Tensor) -> Tensor:
        """Ids (1, B, T) in place of one-hot rows."""
        return input.reshape(1, len(input), -1)

    def position_axes(self, module: Any, input: Tensor) -> tuple[int, ...]:
        """All axes of the ids but the first."""
        return tuple(input.shape[1:])


@register_rule(nn.Conv1d, nn.Conv2d, nn.Conv3d)
class ConvRule(LayerRule):
    """A Linear on patches, at every position of the output; one block per group."""

    def inputs(self, module: Any, input: Tensor) -> Tensor:
        """Patches, (K, B, T, C_in / K * kernel), of the padded input."""
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        padded = F.pad(input, module._reversed_padding_repeated_twice, mode=mode)
        return _patches(module, padded, module.stride)

    def gradients(self, module: Any, gradient: Tensor) -> Tensor:
        """g, (K, B, T, C_out / K), of a gradient (B, C_out, ...)."""
        batch, channels = gradient.shape[:2]
        return gradient.reshape(batch, module.groups, channels // module.groups, -1).permute(1, 0, 3, 2)

    def matrix(self, module: Any, weight: Tensor) -> Tensor:
        """The kernels as rows, (K, C_out / K, C_in / K * kernel)."""
        return weight.reshape(module.groups, weight.shape[0] // module.groups, -1)

    def weight(self, module: Any, matrix: Tensor) -> Tensor:
        """The rows as kernels, (C_out, C_in / K, *kernel)."""
        return matrix.reshape(module.weight.shape)

    def position_axes(self, module: Any, input: Tensor) -> tuple[int, ...]:
        """None: torch's convolutions have the batch first."""
        return ()


@register_rule(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
class ConvTransposeRule(ConvRule):
    """A convolution of stride 1, by the kernel reversed, of the input with ``stride - 1`` zeros between its values."""

    def inputs(self, module: Any, input: Tensor) -> Tensor:
        """Patches of the spread input, reversed."""
        sizes = [(n - 1) * stride + 1 for n, stride in zip(input.shape[2:], module.stride, strict=True)]
        spread = input.new_zeros(*input.shape[:2], *sizes)
        spread[:, :, *(slice(None, None, stride) for stride in module.stride)] = input
        geometry = zip(module.kernel_size, module.dilation, module.padding, module.output_padding, strict=True)
        pads = [((k - 1) * d - p, (k - 1) * d - p + extra) for k, d, p, extra in geometry]
        padded = F.pad(spread, [side for pair in reversed(pads) for side in pair])  # a negative number crops
        return _patches(module, padded, (1,) * len(module.kernel_size), flip=True)

    def gradients(self, module: Any, gradient: Tensor) -> Tensor:
        """As of a convolution, for a call without an output size of its own."""
        geometry = zip(module.kernel_size, module.dilation, module.padding, module.output_padding, strict=True)
        smallest = [(k - 1) * d + 1 - 2 * p + extra for k, d, p, extra in geometry]  # of an input of size 1
        if any((n - least) % s for n, least, s in zip(gradient.shape[2:], smallest, module.stride, strict=True)):
            raise ValueError(
                f"There is no rule for the Jacobian of {type(module).__name__} when it is called with an "
                "`output_size` that `output_padding` does not give."
            )
        return super().gradients(module, gradient)

    def matrix(self, module: Any, weight: Tensor) -> Tensor:
        """The kernels as rows, of a weight (C_in, C_out / K, *kernel)."""
        grouped = weight.reshape(module.groups, module.in_channels // module.groups, *weight.shape[1:])
        return grouped.transpose(1, 2).flatten(2)

    def weight(self, module: Any, matrix: Tensor) -> Tensor:
        """The rows as kernels, (C_in, C_out / K, *kernel)."""
        grouped = matrix.reshape(*matrix.shape[:2], module.in_channels // module.groups, *module.kernel_size)
        return grouped.transpose(1, 2).reshape(module.weight.shape)


@register_rule(nn.LayerNorm)
class NormRule(LayerRule):
    """A gain and a bias of normalised inputs, each one row of the matrix: see `GainCaptured`.

    The output is affine in the gain, so xhat = f(x; 1) - f(x; 0), whatever the class calls its normalisation.
    """

    by_default = False
    kind: ClassVar[type[Captured]] = GainCaptured

    def inputs(self, module: Any, input: Tensor) -> Tensor:
        """Normalised inputs xhat, (1, B, T, d)."""
        weight = module.weight
        gains = (torch.ones_like(weight), torch.zeros_like(weight))
        at_one, at_zero = (functional_call(module, {"weight": gain}, (input,)).detach() for gain in gains)
        return (at_one - at_zero).reshape(1, len(input), -1, weight.numel())  # type: ignore[no-any-return]

    def gradients(self, module: Any, gradient: Tensor) -> Tensor:
        """g, (1, B, T, d), whatever axes are normalised."""
        return gradient.reshape(1, len(gradient), -1, module.weight.numel())

    def matrix(self, module: Any, weight: Tensor) -> Tensor:
        """The gain or the bias as a row, (1, 1, d)."""
        return weight.reshape(1, 1, -1)

    def weight(self, module: Any, matrix: Tensor) -> Tensor:
        """A row in the shape of the gain."""
        return matrix.reshape(tuple(module.weight.shape))

    def to_matrix(self, module: Any, tensors: Mapping[str, Tensor]) -> Tensor:
        """The gain and/or the bias as rows, (1, 1 or 2, d)."""
        return torch.cat([self.matrix(module, tensors[name]) for name in ("weight", "bias") if name in tensors], dim=-2)

    def from_matrix(self, module: Any, matrix: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """Return the rows by name, in the shape of the gain.

        Args:
            module: the normalisation.
            matrix: its matrix form, with a row for each name.
            names: the parameters that the matrix holds, in the order of the rows.
        """
        rows = matrix.chunk(len(names), dim=-2)
        return {name: self.weight(module, row) for name, row in zip(names, rows, strict=True)}

    def position_axes(self, module: Any, input: Tensor) -> tuple[int, ...]:
        """The axes between the batch and those that are normalised."""
        return tuple(input.shape[1 : input.ndim - module.weight.ndim])


_NORM = NormRule()


class TensorRule(NormRule):
    """One parameter of a module without a rule, as a row like a gain: its gradient, of a batch of one."""

    kind: ClassVar[type[Captured]] = TensorCaptured

    def inputs(self, module: Any, input: Tensor) -> Tensor:
        """One number, (1, 1, 1, 1), that stands for all of the parameter's."""
        return input.new_ones(1, 1, 1, 1)

    def gradients(self, module: Any, gradient: Tensor) -> Tensor:
        """g, (1, 1, 1, p)."""
        return gradient.reshape(1, 1, 1, -1)

    def position_axes(self, module: Any, input: Tensor) -> tuple[int, ...]:
        """None: what the module does with the parameter is unknown."""
        return ()

    def owners(self, block: Gaussian) -> Iterable[nn.Module | nn.Parameter]:
        """The parameter itself: nothing is known of its module's calls."""
        return block.parameters.values()


TENSOR = TensorRule()


def _is_rms_norm(module: nn.Module) -> bool:
    """nn.RMSNorm, LlamaRMSNorm, T5LayerNorm, ...: one vector of gains and nothing else."""
    name = type(module).__name__
    own = [key for key, p in module._parameters.items() if p is not None and not key.endswith("_rho")]
    return name.endswith(("RMSNorm", "LayerNorm")) and own == ["weight"] and "forward" not in vars(module)


def _patches(module: Any, input: Tensor, stride: tuple[int, ...], *, flip: bool = False) -> Tensor:
    """What the kernel meets at every position of the output, (K, B, T, C_in / K * kernel); ``flip`` reverses it."""
    patches = input
    sizes = zip(module.kernel_size, stride, module.dilation, strict=True)
    for axis, (kernel, step, dilation) in enumerate(sizes, start=2):
        patches = patches.unfold(axis, (kernel - 1) * dilation + 1, step)[..., ::dilation]
    if flip:
        patches = patches.flip(tuple(range(input.ndim, patches.ndim)))
    batch, channels = patches.shape[:2]  # (B, C_in, *positions, *kernel)
    grouped = patches.reshape(batch, module.groups, channels // module.groups, -1, math.prod(module.kernel_size))
    return grouped.permute(1, 0, 3, 2, 4).flatten(3)
