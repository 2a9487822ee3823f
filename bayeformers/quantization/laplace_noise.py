"""The draws of a Laplace posterior from coded eigenvectors and variances."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor, nn

from ..laplace import LaplacePosterior
from ..laplace.blocks import LaplaceBlock
from ..linearized.blocks import block_noise, from_matrix, to_matrix
from ..sampling.generators import NOISE_VERSION, check_noise_version
from .basis import Basis
from .codes import ScaleCodes
from .noise import Noise

_SIDES = ("left", "right")


@dataclass(frozen=True, eq=False)
class LayerNoise:
    """U_G (std * Z) U_A^T of one layer, with the Z of the float posterior.

    Attributes:
        name: of the layer; seeds Z.
        module: the layer, of which the matrix form is known.
        names: "weight", "bias" -> the Parameter's name in the model.
        std: coded square roots of the variances along the eigen-directions, (K d_out, d_in').
        shape: (K, d_out, d_in').
        left, right: the eigenvectors; None: the identity.
        noise_version: which draws, see `bayeformers.sampling.generators`.
    """

    name: str
    module: nn.Module
    names: Mapping[str, str]
    std: ScaleCodes
    shape: tuple[int, int, int]
    left: Basis | None
    right: Basis | None
    noise_version: int = NOISE_VERSION

    @classmethod
    def of(cls, block: LaplaceBlock, module: nn.Module, names: Mapping[str, str]) -> Self:
        """Return the noise of one Laplace block, in INT8 where its basis is large enough.

        Args:
            block: the layer's factors in the float posterior.
            module: the layer of the copy that is drawn.
            names: "weight", "bias" -> the Parameter's name in the model.
        """
        variance = block.variances()[0]
        curvature = block.eigen.eigenvalues
        left, right = (
            None if vectors is None else Basis.of(vectors, curvature.sum(axis))
            for vectors, axis in ((block.left, -1), (block.right, -2))
        )
        std = ScaleCodes.of(variance.sqrt().flatten(0, 1), log_range=float("inf"))
        shape = (variance.shape[0], variance.shape[1], variance.shape[2])
        return cls(block.name, module, dict(names), std, shape, left, right, block.noise_version)

    def deviation(self, index: int, seed: int) -> dict[str, Tensor]:
        """By the Parameters' names in the model."""
        std = self.std.dequantize().view(self.shape)
        drawn = block_noise(self.name, self.shape, index, seed, self.noise_version).to(std).mul_(std)
        drawn = drawn if self.left is None else self.left.matrix() @ drawn
        drawn = drawn if self.right is None else drawn @ self.right.matrix().mT
        if self.shape[:2] == (1, 1):  # a dense block is flat
            drawn = drawn.view(self._matrix_shape())
        found = from_matrix(self.module, drawn, self.names)
        padding = getattr(self.module, "padding_idx", None)
        if padding is not None:
            found["weight"] = found["weight"].index_fill(0, self.std.codes.new_tensor([padding]).long(), 0.0)
        return {self.names[key]: value for key, value in found.items()}

    def _matrix_shape(self) -> tuple[int, ...]:
        return tuple(to_matrix(self.module, {key: getattr(self.module, key) for key in self.names}).shape)

    @property
    def sizes(self) -> tuple[int, int]:
        """Bytes of eigenvectors and eigenvalues in float32, and of what is stored."""
        groups, rows, columns = self.shape
        sides = [width for width, basis in ((rows, self.left), (columns, self.right)) if basis is not None]
        numbers = groups * (rows * columns + sum(width**2 for width in sides))
        return 4 * numbers, sum(value.nbytes for value in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """What is stored."""
        found = {f"{self.name}/std/{part}": getattr(self.std, part) for part in ("codes", "top", "step")}
        for side in _SIDES:
            basis = getattr(self, side)
            found |= {} if basis is None else basis.tensors(f"{self.name}/{side}")
        return found


class LaplaceNoise(Noise):
    """One `LayerNoise` per covered layer."""

    kind = "laplace"

    def __init__(self, layers: Sequence[LayerNoise]) -> None:
        self.layers = list(layers)
        self._of = {name: layer for layer in self.layers for name in layer.names.values()}
        self._last: tuple[tuple[str, int, int], dict[str, Tensor]] | None = None

    @classmethod
    def of(cls, posterior: LaplacePosterior, model: nn.Module, names: Mapping[nn.Parameter, str]) -> Self:
        """Return the noise of all layers that a Laplace posterior covers.

        Args:
            posterior: the float posterior, which stays as it is.
            model: the copy that is drawn.
            names: of the posterior's Parameters in ``model``.
        """
        layers = []
        for block in posterior.blocks():
            own = {key: names[parameter] for key, parameter in block.parameters.items()}
            layers.append(LayerNoise.of(block, model.get_submodule(block.name), own))
        return cls(layers)

    @property
    def names(self) -> tuple[str, ...]:
        """In the model's order."""
        return tuple(self._of)

    def deviation(self, name: str, index: int, seed: int) -> Tensor:
        """Return a tensor's step away from its mean under a draw.

        A layer's weight and bias come of one product: the other of them is kept until it is asked for.

        Args:
            name: first name of the Parameter in the model.
            index: of the draw, from 0.
            seed: of the sequence of draws.
        """
        layer = self._of[name]
        key = (layer.name, index, seed)
        last, made = self._last or (None, {})
        if last != key or name not in made:
            made = layer.deviation(index, seed)
        value = made.pop(name)
        self._last = (key, made) if made else None
        return value

    def sizes(self, name: str) -> tuple[int, int]:
        """Of a layer's factors, which count for its weight."""
        layer = self._of.get(name)
        return layer.sizes if layer is not None and layer.names.get("weight") == name else (0, 0)

    def tensors(self) -> dict[str, Tensor]:
        """Codes of the standard deviations and of the bases."""
        return {name: value for layer in self.layers for name, value in layer.tensors().items()}

    def meta(self) -> dict[str, Any]:
        """The layers' shapes and Parameters."""
        return {
            "layers": {
                layer.name: {"names": layer.names, "shape": layer.shape, "noise_version": layer.noise_version}
                for layer in self.layers
            }
        }

    @classmethod
    def from_saved(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], model: nn.Module) -> Self:
        """Return the noise of which `tensors` and `meta` were saved.

        Args:
            tensors: what `tensors` gave, by the same names.
            meta: what `meta` gave, as JSON has it.
            model: the copy that is drawn, which has the layers.
        """
        layers = []
        for name, recorded in meta["layers"].items():
            std = ScaleCodes(*(tensors[f"{name}/std/{part}"] for part in ("codes", "top", "step")))
            left, right = (Basis.from_saved(tensors, f"{name}/{side}") for side in _SIDES)
            first, second, third = recorded["shape"]
            module, version = model.get_submodule(name), check_noise_version(recorded.get("noise_version", 1))
            shape = first, second, third
            layers.append(LayerNoise(name, module, recorded["names"], std, shape, left, right, version))
        return cls(layers)
