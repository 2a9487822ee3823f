"""How far a draw moves each tensor from its mean: the numbers of the float posterior, of coded scales and factors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, Self

from torch import Tensor, nn

from ..nn.noise import Draw, TensorSpec
from .codes import ScaleCodes

Rows = Callable[[Tensor], Tensor]


class Noise(ABC):
    """Draw ``index`` of ``seed`` of every random tensor, by the first name of its Parameter in the model."""

    kind: str

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """The random tensors."""

    @abstractmethod
    def deviation(self, name: str, index: int, seed: int) -> Tensor:
        """Return a tensor's step away from its mean under a draw, in float.

        Args:
            name: first name of the Parameter in the model.
            index: of the draw, from 0.
            seed: of the sequence of draws.
        """

    def rows(self, name: str, index: int, seed: int) -> Rows | None:
        """Return what makes rows of `deviation`, (*) -> (*, width); None where they cannot be made without the rest.

        Args:
            name: first name of the Parameter in the model.
            index: of the draw, from 0.
            seed: of the sequence of draws.
        """
        return None

    @abstractmethod
    def sizes(self, name: str) -> tuple[int, int]:
        """Bytes of what the draws of a tensor need: in the float posterior, and here."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """All that is stored, by unique name."""

    @abstractmethod
    def meta(self) -> dict[str, Any]:
        """What else a reload needs, as JSON has it."""


class NoNoise(Noise):
    """Of a point estimate."""

    kind = "point"
    names = ()

    def deviation(self, name: str, index: int, seed: int) -> Tensor:
        """Refuse: no tensor of a point estimate moves.

        Args:
            name: first name of the Parameter in the model.
            index: of the draw, from 0.
            seed: of the sequence of draws.

        Raises:
            KeyError: always.
        """
        raise KeyError(name)

    def sizes(self, name: str) -> tuple[int, int]:
        """None."""
        return 0, 0

    def tensors(self) -> dict[str, Tensor]:
        """None."""
        return {}

    def meta(self) -> dict[str, Any]:
        """Nothing."""
        return {}


class MeanFieldNoise(Noise):
    """sigma * eps with the eps of `bayeformers.fixed_draw`: the same numbers for the same index, seed and tensor.

    Args:
        scales: coded standard deviations of INT8 weights; float32 ones of the tensors that stay float.
        specs: what the noise of each depends on.
    """

    kind = "mean_field"

    def __init__(self, scales: Mapping[str, ScaleCodes | Tensor], specs: Mapping[str, TensorSpec]) -> None:
        self.scales, self.specs = dict(scales), dict(specs)

    @property
    def names(self) -> tuple[str, ...]:
        """In the model's order."""
        return tuple(self.scales)

    def deviation(self, name: str, index: int, seed: int) -> Tensor:
        """Return the deviation sigma * eps, float32 or the wider dtype of a float scale.

        Args:
            name: first name of the Parameter in the model.
            index: of the draw, from 0.
            seed: of the sequence of draws.
        """
        scale = self.scales[name]
        like = scale if isinstance(scale, Tensor) else scale.codes
        eps = Draw(seed, index, keep=False).noise(self.specs[name], like)
        return eps * (scale if isinstance(scale, Tensor) else scale.dequantize())

    def rows(self, name: str, index: int, seed: int) -> Rows | None:
        """Return what makes rows of a table whose noise is addressable by row; None for others and for float scales.

        Args:
            name: first name of the Parameter in the model.
            index: of the draw, from 0.
            seed: of the sequence of draws.
        """
        scale, spec = self.scales[name], self.specs[name]
        if not spec.by_row or isinstance(scale, Tensor):
            return None
        draw = Draw(seed, index, keep=False)

        def rows(ids: Tensor) -> Tensor:
            own = ids.to(scale.codes.device)
            return draw.noise(spec, scale.codes, own).mul_(scale.rows(own))

        return rows

    def sizes(self, name: str) -> tuple[int, int]:
        """Of rho, which is float32, and of the codes."""
        scale = self.scales.get(name)
        if scale is None:
            return 0, 0
        return 4 * (scale if isinstance(scale, Tensor) else scale.codes).numel(), scale.nbytes

    def tensors(self) -> dict[str, Tensor]:
        """Scales and codes of scales."""
        found: dict[str, Tensor] = {}
        for name, scale in self.scales.items():
            if isinstance(scale, Tensor):
                found[f"{name}/scale"] = scale
            else:
                found |= {f"{name}/{part}": getattr(scale, part) for part in ("codes", "top", "step")}
        return found

    def meta(self) -> dict[str, Any]:
        """The tensors' specs."""
        return {"specs": {name: asdict(spec) for name, spec in self.specs.items()}}

    @classmethod
    def from_saved(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], model: nn.Module) -> Self:
        """Return the noise of which `tensors` and `meta` were saved.

        Args:
            tensors: what `tensors` gave, by the same names.
            meta: what `meta` gave, as JSON has it.
            model: the copy that is drawn, which is not needed here.
        """
        specs = {name: TensorSpec(**{"noise_version": 1, **spec}) for name, spec in meta["specs"].items()}
        scales: dict[str, ScaleCodes | Tensor] = {}
        for name in specs:
            whole = tensors.get(f"{name}/scale")
            scales[name] = (
                ScaleCodes(*(tensors[f"{name}/{part}"] for part in ("codes", "top", "step")))
                if whole is None
                else whole
            )
        return cls(scales, specs)
