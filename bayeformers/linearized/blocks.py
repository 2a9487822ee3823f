"""A Gaussian over the parameters of one layer, in matrix form: what linearised predictives need of any posterior."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from ..sampling.generators import NOISE_VERSION, keyed_generator
from . import TENSOR, LayerRule, rule_of
from .covariance import Separable


class GaussianBlock(Protocol):
    """N(mean, U diag(V) U^T) with U = U_G (x) U_A, independent of all other blocks.

    The matrix of a layer is (K, d_out, d_in'): K groups of a convolution (1 elsewhere), the bias as the last column.

    Attributes:
        name: of the layer; seeds the block's noise, so no two blocks have the same.
        modules: the layers that use the parameters.
        parameters: by their name in the layer: "weight", "bias" or both.
        left: U_G, (K, d_out, d_out); None: the identity.
        right: U_A, (K, d_in', d_in'); None: the identity.
        is_flat: the matrix is flattened to (1, 1, p), and U_A is (1, p, p): a dense covariance.
        noise_version: which draws, see `bayeformers.sampling.generators`.
    """

    @property
    def name(self) -> str: ...
    @property
    def modules(self) -> tuple[nn.Module, ...]: ...
    @property
    def parameters(self) -> Mapping[str, nn.Parameter]: ...
    @property
    def left(self) -> Tensor | None: ...
    @property
    def right(self) -> Tensor | None: ...
    @property
    def is_flat(self) -> bool: ...
    @property
    def noise_version(self) -> int: ...

    def variances(self) -> Tensor:
        """V, (n, K, d_out, d_in'), of n posteriors with one U: one pass gives n covariances."""

    def prior_variances(self) -> Tensor | None:
        """(n,): the V of directions that the data do not know; None where there is no such common value."""

    def separable(self, tolerance: float) -> Separable | None:
        """The variances as a short sum of products, where they are: see `Separable`."""


@dataclass(frozen=True, eq=False)
class MeanFieldBlock:
    """Independent weights with ``variance`` sigma^2, (K, d_out, d_in'); the rest as in `GaussianBlock`."""

    name: str
    modules: tuple[nn.Module, ...]
    parameters: Mapping[str, nn.Parameter]
    variance: Tensor
    left: None = None
    right: None = None
    is_flat: bool = False
    noise_version: int = NOISE_VERSION

    def variances(self) -> Tensor:
        """(1, K, d_out, d_in')."""
        return self.variance.unsqueeze(0)

    def prior_variances(self) -> None:
        """None: every weight has a prior of its own."""

    def separable(self, tolerance: float) -> None:
        """None: they are not."""


@dataclass(frozen=True, eq=False)
class TensorBlock(MeanFieldBlock):
    """One tensor of a module without a rule, flat: ``variance`` is (1, 1, p)."""


def mean_field_blocks(model: nn.Module, variances: Mapping[nn.Parameter, Tensor]) -> list[MeanFieldBlock]:
    """One block per layer; a Parameter that several layers share is a block of its own.

    So is every tensor of a module without a rule, and one that layers of different kinds share.
    """
    owners: dict[nn.Parameter, list[tuple[str, nn.Module, str]]] = {}
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None and parameter in variances:
                owners.setdefault(parameter, []).append((name, module, key))
    grouped: dict[tuple[nn.Module, ...], dict[str, nn.Parameter]] = {}
    names: dict[tuple[nn.Module, ...], str] = {}
    alone: list[MeanFieldBlock] = []
    for parameter, found in owners.items():
        modules, (name, _, key) = tuple(module for _, module, _ in found), found[0]
        if not _share_a_rule(modules):
            flat = variances[parameter].reshape(1, 1, -1)
            alone.append(TensorBlock(f"{name}.{key}", modules, {key: parameter}, flat))
            continue
        if modules not in names:  # a shared weight and a bias of its own: two blocks of one layer, two names
            names[modules] = f"{name}.{key}" if name in names.values() else name
        grouped.setdefault(modules, {})[key] = parameter
    return [_mean_field(names[modules], modules, given, variances) for modules, given in grouped.items()] + alone


def block_rule(block: GaussianBlock) -> LayerRule:
    """The rule of the block's layers, or that of single tensors."""
    rule = TENSOR if isinstance(block, TensorBlock) else rule_of(block.modules[0])
    assert rule is not None  # of a block
    return rule


def _share_a_rule(modules: Iterable[nn.Module]) -> bool:
    rules = [rule_of(module) for module in modules]
    return None not in rules and len({type(rule) for rule in rules}) == 1


def _mean_field(
    name: str,
    modules: tuple[nn.Module, ...],
    parameters: dict[str, nn.Parameter],
    variances: Mapping[nn.Parameter, Tensor],
) -> MeanFieldBlock:
    given = {key: variances[parameter] for key, parameter in parameters.items()}
    return MeanFieldBlock(name, modules, parameters, to_matrix(modules[0], given))


def to_matrix(module: nn.Module, tensors: Mapping[str, Tensor]) -> Tensor:
    """A layer's tensors, "weight" and/or "bias", as one matrix (K, d_out, d_in'); rows of a normalisation's gain."""
    rule = rule_of(module)
    assert rule is not None  # of a block
    parts = [rule.matrix(module, tensors["weight"])] if "weight" in tensors else []
    if "bias" in tensors:
        as_matrix = rule.bias_matrix if rule.is_affine else rule.matrix
        parts.append(as_matrix(module, tensors["bias"]))
    return torch.cat(parts, dim=-1 if rule.is_affine else -2)


def from_matrix(module: nn.Module, matrix: Tensor, names: Iterable[str]) -> dict[str, Tensor]:
    """The inverse of `to_matrix`: tensors of the parameters' shapes."""
    rule = rule_of(module)
    assert rule is not None  # of a block
    names = list(names)
    if not rule.is_affine:
        rows = matrix.chunk(len(names), dim=-2)
        return {name: rule.weight(module, row) for name, row in zip(names, rows, strict=True)}
    found = {}
    if "weight" in names:
        found["weight"] = rule.weight(module, matrix[..., :-1] if "bias" in names else matrix)
    if "bias" in names:
        found["bias"] = matrix[..., -1].flatten()
    return found


def block_draw(block: GaussianBlock, index: int, seed: int) -> Tensor:
    """Deviation from the mean of draw ``index``, U_G (V^1/2 * Z) U_A^T, in the layer's matrix form."""
    variance = block.variances()[0]
    noise = block_noise(block.name, tuple(variance.shape), index, seed, block.noise_version)
    noise = noise.to(variance) * variance.sqrt()
    if block.left is not None:
        noise = block.left @ noise
    drawn = noise if block.right is None else noise @ block.right.mT
    if not block.is_flat:
        return drawn
    shape = to_matrix(block.modules[0], dict(block.parameters)).shape
    return drawn.reshape(shape)


def block_noise(name: str, shape: tuple[int, ...], index: int, seed: int, noise_version: int = NOISE_VERSION) -> Tensor:
    """Standard normal float32 of the CPU, the same in every process and on every device."""
    key = hashlib.blake2b(f"{name}/{seed}/{index}".encode(), digest_size=8).digest()
    number = int.from_bytes(key) >> (noise_version == 1)
    return torch.randn(shape, generator=keyed_generator(number, torch.device("cpu"), noise_version))
