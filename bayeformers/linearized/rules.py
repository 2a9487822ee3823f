"""One rule per layer class: how what a layer saw, and the gradient at its output, become its Jacobian.

An affine layer's Jacobian for one example and one scalar output of the network is a matrix of rank at most T,

    M = sum_t g_t a_t^T     (d_out, d_in')

with the layer's input a_t at position t, and the gradient g_t at its output. A bias is one more column, whose input is
1. Rules bring a layer's tensors into that form; `register_curvature` adds a rule for a class of your own.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

R = TypeVar("R", bound="type[LayerRule]")


class LayerRule(ABC):
    """Brings one layer class into matrix form. K is the number of independent blocks: groups of a convolution, else 1.

    Attributes:
        by_default: whether a posterior over "all" layers includes the class.
        is_affine: whether M = sum_t g_t a_t^T; else `jacobian` gives M.
    """

    by_default: ClassVar[bool] = True
    is_affine: ClassVar[bool] = True

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
        blocks = getattr(module, "groups", 1)
        return bias.reshape(blocks, -1, 1)

    def position_axes(self, module: Any, input: Tensor) -> tuple[int, ...]:
        """Sizes of the axes between batch and features: one as large as the batch could be mistaken for it."""
        return tuple(input.shape[1:-1])

    def jacobian(self, module: Any, input: Tensor, gradients: Tensor) -> Tensor:
        """M (B, C, 1, d_out, d_in') of a rule that is not affine, for ``gradients`` (B, C, ...) at the output."""
        raise NotImplementedError


_RULES: dict[type[nn.Module], LayerRule] = {}


def register_curvature(*kinds: type[nn.Module]) -> Callable[[R], R]:
    """Class decorator: this `LayerRule` is that of exactly these module classes, and of subclasses with their forward.

    >>> class Scaled(nn.Linear):
    ...     def forward(self, x): return 2 * super().forward(x)
    >>> rule_of(Scaled(2, 2)) is None
    True
    >>> @register_curvature(Scaled)
    ... class ScaledRule(LinearRule):
    ...     def gradients(self, module, gradient): return 2 * super().gradients(module, gradient)
    >>> type(rule_of(Scaled(2, 2))).__name__
    'ScaledRule'
    >>> _ = _RULES.pop(Scaled)  # the registry is global, and this class was an example
    """

    def register(rule: R) -> R:
        for kind in kinds:
            _RULES[kind] = rule()
        return rule

    return register


def rule_of(module: nn.Module) -> LayerRule | None:
    """The rule of a module's class, or of the nearest ancestor whose forward it inherits unchanged; None without one.

    A subclass with a forward of its own may use its weight differently, and so does a module whose weight others read.
    """
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


@register_curvature(nn.Linear)
class LinearRule(LayerRule):
    """y_t = W a_t + b."""

    def inputs(self, module: nn.Module, input: Tensor) -> Tensor:
        return _positions(input)

    def gradients(self, module: nn.Module, gradient: Tensor) -> Tensor:
        return _positions(gradient)

    def matrix(self, module: nn.Module, weight: Tensor) -> Tensor:
        return weight.unsqueeze(0)

    def weight(self, module: nn.Module, matrix: Tensor) -> Tensor:
        return matrix.squeeze(0)


@register_curvature(Conv1D)
class Conv1DRule(LinearRule):
    """transformers' Conv1D: a Linear whose weight is stored transposed, (d_in, d_out)."""

    def matrix(self, module: nn.Module, weight: Tensor) -> Tensor:
        return weight.mT.unsqueeze(0)

    def weight(self, module: nn.Module, matrix: Tensor) -> Tensor:
        return matrix.squeeze(0).mT


@register_curvature(nn.Conv1d, nn.Conv2d, nn.Conv3d)
class ConvRule(LayerRule):
    """A Linear on patches, at every position of the output; one block per group."""

    def inputs(self, module: Any, input: Tensor) -> Tensor:
        return _patches(module, _padded(module, input), module.stride)

    def gradients(self, module: Any, gradient: Tensor) -> Tensor:
        batch, channels = gradient.shape[:2]
        return gradient.reshape(batch, module.groups, channels // module.groups, -1).permute(1, 0, 3, 2)

    def matrix(self, module: Any, weight: Tensor) -> Tensor:
        return weight.reshape(module.groups, weight.shape[0] // module.groups, -1)

    def weight(self, module: Any, matrix: Tensor) -> Tensor:
        return matrix.reshape(module.weight.shape)

    def position_axes(self, module: Any, input: Tensor) -> tuple[int, ...]:
        return ()  # torch's convolutions have the batch first


@register_curvature(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
class ConvTransposeRule(ConvRule):
    """A convolution of stride 1, by the kernel reversed, of the input with ``stride - 1`` zeros between its values."""

    def inputs(self, module: Any, input: Tensor) -> Tensor:
        return _patches(module, _spread(module, input), (1,) * len(module.kernel_size), flip=True)

    def gradients(self, module: Any, gradient: Tensor) -> Tensor:
        for size, smallest, stride in zip(gradient.shape[2:], _smallest(module), module.stride, strict=True):
            if (size - smallest) % stride:
                raise ValueError(
                    f"There is no rule for the Jacobian of {type(module).__name__} when it is called with an "
                    "`output_size` that `output_padding` does not give."
                )
        return super().gradients(module, gradient)

    def matrix(self, module: Any, weight: Tensor) -> Tensor:
        grouped = weight.reshape(module.groups, module.in_channels // module.groups, *weight.shape[1:])
        return grouped.transpose(1, 2).flatten(2)

    def weight(self, module: Any, matrix: Tensor) -> Tensor:
        grouped = matrix.reshape(*matrix.shape[:2], module.in_channels // module.groups, *module.kernel_size)
        return grouped.transpose(1, 2).reshape(module.weight.shape)


@register_curvature(nn.Embedding)
class EmbeddingRule(LayerRule):
    """A Linear on one-hot rows, W = table^T never formed: (K, d_out, d_in') is here (1, V, d), a row per entry."""

    by_default = False
    is_affine = False

    def inputs(self, module: nn.Embedding, input: Tensor) -> Tensor:
        return input.reshape(1, len(input), -1)

    def gradients(self, module: nn.Embedding, gradient: Tensor) -> Tensor:
        return _positions(gradient)

    def matrix(self, module: nn.Embedding, weight: Tensor) -> Tensor:
        return weight.unsqueeze(0)

    def weight(self, module: nn.Embedding, matrix: Tensor) -> Tensor:
        return matrix.squeeze(0)

    def position_axes(self, module: nn.Embedding, input: Tensor) -> tuple[int, ...]:
        return tuple(input.shape[1:])


@register_curvature(nn.LayerNorm)
class NormRule(LayerRule):
    """A gain and a bias of normalised inputs: row 0 of M is sum_t g_t * xhat_t, row 1 is sum_t g_t.

    The output is affine in the gain, so xhat = f(x; 1) - f(x; 0), whatever the class calls its normalisation.
    """

    by_default = False
    is_affine = False

    def inputs(self, module: Any, input: Tensor) -> Tensor:
        weight = module.weight
        gains = (torch.ones_like(weight), torch.zeros_like(weight))
        at_one, at_zero = (functional_call(module, {"weight": gain}, (input,)).detach() for gain in gains)
        normalised: Tensor = at_one - at_zero
        return normalised.reshape(1, len(input), -1, weight.numel())

    def gradients(self, module: Any, gradient: Tensor) -> Tensor:
        return gradient.reshape(1, len(gradient), -1, module.weight.numel())

    def matrix(self, module: Any, weight: Tensor) -> Tensor:
        return weight.reshape(1, 1, -1)

    def weight(self, module: Any, matrix: Tensor) -> Tensor:
        return matrix.reshape(tuple(module.weight.shape))

    def position_axes(self, module: Any, input: Tensor) -> tuple[int, ...]:
        return tuple(input.shape[1 : input.ndim - module.weight.ndim])


_NORM = NormRule()


class TensorRule(LayerRule):
    """One parameter of any module, flat: M (B, C, 1, 1, p) is its gradient, which autograd gives for a batch of one."""

    by_default = False
    is_affine = False

    def inputs(self, module: nn.Module, input: Tensor) -> Tensor:
        return input.new_ones(1, 1, 1, 1)

    def gradients(self, module: nn.Module, gradient: Tensor) -> Tensor:
        return gradient.reshape(1, 1, 1, -1)

    def matrix(self, module: nn.Module, weight: Tensor) -> Tensor:
        return weight.reshape(1, 1, -1)

    def weight(self, module: nn.Module, matrix: Tensor) -> Tensor:
        raise NotImplementedError  # nothing puts a single tensor back

    def position_axes(self, module: nn.Module, input: Tensor) -> tuple[int, ...]:
        return ()


TENSOR = TensorRule()


def _is_rms_norm(module: nn.Module) -> bool:
    """nn.RMSNorm, LlamaRMSNorm, T5LayerNorm, ...: one vector of gains and nothing else."""
    name = type(module).__name__
    own = [key for key, p in module._parameters.items() if p is not None and not key.endswith("_rho")]
    return name.endswith(("RMSNorm", "LayerNorm")) and own == ["weight"] and "forward" not in vars(module)


def _padded(module: Any, input: Tensor) -> Tensor:
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return F.pad(input, module._reversed_padding_repeated_twice, mode=mode)


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


def _spread(module: Any, input: Tensor) -> Tensor:
    """The input of a transposed convolution with zeros between its values, padded as a convolution needs it."""
    sizes = [(n - 1) * stride + 1 for n, stride in zip(input.shape[2:], module.stride, strict=True)]
    spread = input.new_zeros(*input.shape[:2], *sizes)
    steps = [slice(None, None, stride) for stride in module.stride]
    spread[:, :, *steps] = input
    geometry = zip(module.kernel_size, module.dilation, module.padding, module.output_padding, strict=True)
    pads = [((k - 1) * d - p, (k - 1) * d - p + extra) for k, d, p, extra in geometry]
    return F.pad(spread, [side for pair in reversed(pads) for side in pair])  # a negative number crops


def _smallest(module: Any) -> list[int]:
    """Sizes of the output of a transposed convolution for an input of size 1."""
    geometry = zip(module.kernel_size, module.dilation, module.padding, module.output_padding, strict=True)
    return [(k - 1) * d + 1 - 2 * p + extra for k, d, p, extra in geometry]


def _positions(tensor: Tensor) -> Tensor:
    """(B, ..., d) -> (1, B, T, d)."""
    return tensor.reshape(1, len(tensor), -1, tensor.shape[-1])
