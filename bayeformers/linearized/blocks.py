"""A Gaussian over the parameters of one layer, in matrix form: what linearised predictives need of any posterior."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from ..sampling import philox
from ..sampling.generators import NOISE_VERSION, keyed_generator
from .kinds import Gaussian
from .rules import TENSOR, LayerRule, rule_of


class GaussianBlock(Gaussian, Protocol):
    """A `Gaussian` over the parameters of layers with a rule, or over one tensor of a module without one."""

    @property
    def rule(self) -> LayerRule:
        """That of the layers; `TENSOR` of a single tensor."""


@dataclass(frozen=True, eq=False)
class MeanFieldBlock:
    """Independent weights with ``variance`` sigma^2, (K, d_out, d_in'); the rest as in `GaussianBlock`."""

    name: str
    modules: tuple[nn.Module, ...]
    parameters: Mapping[str, nn.Parameter]
    variance: Tensor
    rule: LayerRule = TENSOR
    left: None = None
    right: None = None
    is_flat: bool = False
    noise_version: int = NOISE_VERSION

    def variances(self) -> Tensor:
        """sigma^2 of the one posterior, (1, K, d_out, d_in')."""
        return self.variance.unsqueeze(0)

    def prior_variances(self) -> None:
        """None: every weight has a prior of its own."""

    def separable(self, tolerance: float) -> None:
        """None: they are no sum of products."""


def mean_field_blocks(model: nn.Module, variances: Mapping[nn.Parameter, Tensor]) -> list[MeanFieldBlock]:
    """One block per layer; a Parameter that several layers share is a block of its own.

    So is every tensor of a module without a rule, and one that layers of different kinds share.

    Args:
        model: whose layers.
        variances: sigma^2 of every random Parameter, of its shape.

    Returns:
        The blocks of layers in the model's order, then those of single tensors.
    """
    owners: dict[nn.Parameter, list[tuple[str, nn.Module, str]]] = {}
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None and parameter in variances:
                owners.setdefault(parameter, []).append((name, module, key))
    grouped: dict[tuple[nn.Module, ...], dict[str, nn.Parameter]] = {}
    names: dict[tuple[nn.Module, ...], str] = {}
    rules: dict[tuple[nn.Module, ...], LayerRule] = {}
    alone: list[MeanFieldBlock] = []
    for parameter, places in owners.items():
        modules, (name, _, key) = tuple(module for _, module, _ in places), places[0]
        rule = rule_of(modules[0])
        if rule is None or any(type(rule_of(module)) is not type(rule) for module in modules):
            flat = variances[parameter].reshape(1, 1, -1)
            alone.append(MeanFieldBlock(f"{name}.{key}", modules, {key: parameter}, flat))
            continue
        if modules not in names:  # a shared weight and a bias of its own: two blocks of one layer, two names
            names[modules] = f"{name}.{key}" if name in names.values() else name
        grouped.setdefault(modules, {})[key], rules[modules] = parameter, rule
    blocks = []
    for modules, parameters in grouped.items():
        of_layer = {key: variances[parameter] for key, parameter in parameters.items()}
        matrix = rules[modules].to_matrix(modules[0], of_layer)
        blocks.append(MeanFieldBlock(names[modules], modules, parameters, matrix, rules[modules]))
    return blocks + alone


def to_matrix(module: nn.Module, tensors: Mapping[str, Tensor]) -> Tensor:
    """A layer's tensors, "weight" and/or "bias", as one matrix (K, d_out, d_in'); rows of a normalisation's gain."""
    rule = rule_of(module)
    assert rule is not None  # of a block
    return rule.to_matrix(module, tensors)


def from_matrix(module: nn.Module, matrix: Tensor, names: Iterable[str]) -> dict[str, Tensor]:
    """Return tensors of the parameters' shapes by name, the inverse of `to_matrix`.

    Args:
        module: the layer.
        matrix: its matrix form, (K, d_out, d_in').
        names: the parameters that the matrix holds: "weight" and/or "bias".
    """
    rule = rule_of(module)
    assert rule is not None  # of a block
    return rule.from_matrix(module, matrix, list(names))


def block_draw(block: Gaussian, index: int, seed: int) -> Tensor:
    """Return a deviation from the mean, U_G (V^1/2 * Z) U_A^T, in the layer's matrix form (K, d_out, d_in').

    Args:
        block: the layer's Gaussian, at its first variances.
        index: the draw's place in the sequence, >= 0.
        seed: which sequence of draws.
    """
    variance = block.variances()[0]
    noise = block_noise(block.name, tuple(variance.shape), index, seed, block.noise_version)
    noise = noise.to(variance) * variance.sqrt()
    if block.left is not None:
        noise = block.left @ noise
    drawn = noise if block.right is None else noise @ block.right.mT
    return drawn.reshape(to_matrix(block.modules[0], block.parameters).shape) if block.is_flat else drawn


def block_noise(name: str, shape: tuple[int, ...], index: int, seed: int, noise_version: int = NOISE_VERSION) -> Tensor:
    """Return standard normal float32 of the CPU, the same in every process and on every device.

    Args:
        name: the block's name, of which the noise is a function too.
        shape: the shape of the result.
        index: the draw's place in the sequence, >= 0.
        seed: which sequence of draws.
        noise_version: how noise follows from these, see `bayeformers.sampling.generators`.
    """
    if noise_version >= 3:
        return philox.normal(philox.key_of(f"{name}/{seed}/{index}"), shape, torch.device("cpu"))
    key = hashlib.blake2b(f"{name}/{seed}/{index}".encode(), digest_size=8).digest()
    number = int.from_bytes(key) >> (noise_version == 1)
    return torch.randn(shape, generator=keyed_generator(number, torch.device("cpu"), noise_version))
