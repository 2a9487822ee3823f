"""`Curvature`: raw sums over data, layer by layer. They add over batches, passes and processes.

| kind | of a layer | sums |
| --- | --- | --- |
| "kfac" | G (x) A, A = mean of a a^T, G = sum of g g^T | ``inputs`` sum a a^T, ``count`` of positions, ``gradients`` |
| "ekfac" | the same basis U, eigenvalues sum (U^T vec M)^2 | and ``squares`` of a second pass |
| "diagonal" | diag of the GGN | ``squares`` sum M^2 |
| "dense" | the dense GGN | ``products`` sum vec(M) vec(M)^T |

An Embedding's input factor is the diagonal of its counts, (V,); a normalisation always has the exact diagonal. Martens
& Grosse 2015; Eschenhagen et al. 2023 (arXiv 2311.00636: expand, reduce); George et al. 2018 (EKFAC).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..processes import gathered, num_processes, summed
from ..storage import check_whole, digest, read, write
from .config import CurvatureConfig
from .kronecker import KroneckerEigen, add_second_moment, symmetric, symmetric_eigen
from .targets import Target

_FACTORS = ("inputs", "gradients", "products")
_SCALARS = ("num_examples", "num_batches", "log_likelihood", "squared_error", "num_outputs", "num_unlabelled")


@dataclass(eq=False)
class Curvature:
    """Sums over the data that were seen.

    Attributes:
        config: how they are measured.
        sums: layer name -> name of the sum -> tensor; see the module's table.
        num_examples: examples seen, of those with a loss term.
        num_batches: batches seen (by this process), for resuming a pass.
        log_likelihood: sum of log p(y | x, theta*) of the labels seen; NaN without labels.
        squared_error: of a regression, sum over items and outputs; else 0.
        num_outputs: N C: items with a loss term times outputs; of a regression without labels 0.
        num_unlabelled: examples seen whose every label is -100: they are no data.
        data_scale: N / num_examples where only a part of the N examples was seen.
        weights: layer name -> |theta*|^2, by which a resumed pass knows its model again;
        digests: and a hash of the weights; none in sums that earlier versions saved.

    >>> a, b = (Curvature(CurvatureConfig(), {"head": {"count": torch.ones(())}}, num_examples=n) for n in (3, 4))
    >>> a.merge(b).num_examples, a.sums["head"]["count"].item()
    (7, 2.0)
    """

    config: CurvatureConfig
    sums: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    num_examples: int = 0
    num_batches: int = 0
    log_likelihood: float = 0.0
    squared_error: float = 0.0
    num_outputs: int = 0
    num_unlabelled: int = 0
    data_scale: float = 1.0
    weights: dict[str, float] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)

    def add(self, layer: str, name: str, value: Tensor, device: torch.device | None = None) -> None:
        """Add to one sum, which begins at the first value.

        Args:
            layer: the layer's name.
            name: which of the layer's sums, as in the module's table.
            value: what to add, of the sum's shape; a sum that exists keeps its device and dtype.
            device: where a new sum is kept; by default with its first value.
        """
        value = value.detach() if device is None else value.detach().to(device)
        own = self.sums.setdefault(layer, {})
        if name in own:
            own[name] += value.to(own[name].device)
        else:
            own[name] = value.clone()

    def add_second_moment(
        self, layer: str, name: str, rows: Tensor, device: torch.device | None = None, *, with_one: bool = False
    ) -> None:
        """Add sum_p r_p r_p^T to one sum, of which the upper triangle alone is meant.

        Args:
            layer: the layer's name.
            name: which of the layer's sums, as in the module's table.
            rows: the vectors r_p, (K, P, d).
            device: where a new sum is kept; by default with its first rows.
            with_one: of (r_p, 1) instead.
        """
        own = self.sums.setdefault(layer, {})
        if name not in own:
            width, place = rows.shape[-1] + with_one, rows.device if device is None else device
            own[name] = torch.zeros(len(rows), width, width, dtype=rows.dtype, device=place)
        add_second_moment(own[name], rows.detach().to(own[name].device), with_one=with_one)

    def merge(self, other: Curvature) -> Curvature:
        """Return these sums with those of other data, added in place.

        Raises:
            ValueError: they were measured in another way, or of other layers; or are squares of "ekfac", which stand in
                different bases.
        """
        if other.config != self.config:
            raise ValueError(f"`other` was measured with {other.config}, these sums with {self.config}.")
        if self.sums and other.sums and not self._adds_to(other):
            raise ValueError("`other` holds sums of other layers, shapes or weights than these.")
        if any({"gradients", "squares"} <= set(sums) for sums in (*self.sums.values(), *other.sums.values())):
            raise ValueError('The squares of "ekfac" stand in a basis of their own: merge sums of the first pass.')
        for layer, sums in other.sums.items():
            for name, value in sums.items():
                self.add(layer, name, value)
        for name in _SCALARS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.weights = {**other.weights, **self.weights}
        self.digests = {**other.digests, **self.digests}
        return self

    def all_reduce(self) -> Curvature:
        """Sum over all processes of the default group, in place; alone, nothing happens."""
        if num_processes() == 1:
            return self
        own = {(layer, name): value for layer, sums in self.sums.items() for name, value in sums.items()}
        shapes = gathered({key: (value.shape, value.dtype) for key, value in own.items()})
        device = next((value.device for value in own.values()), None)
        for key in sorted({key for found in shapes for key in found}):  # a layer may be called in one process only
            shape, dtype = next(found[key] for found in shapes if key in found)
            value = own[key] if key in own else torch.zeros(shape, dtype=dtype, device=device)
            self.sums.setdefault(key[0], {})[key[1]] = summed(value)
        scalars = torch.tensor([float(getattr(self, n)) for n in _SCALARS], dtype=torch.float64)
        for name, value in zip(_SCALARS, summed(scalars).tolist(), strict=True):
            setattr(self, name, value if name in ("log_likelihood", "squared_error") else round(value))
        return self

    def factors(self, layer: str) -> tuple[Tensor, Tensor]:
        """Return (G, A) of a layer: G (K, d_out, d_out), a sum over the data; A (K, d_in', d_in') or (V,), an average.

        Raises:
            ValueError: the layer has no Kronecker factors.
        """
        sums = self._layer(layer)
        if "gradients" not in sums:
            raise ValueError(f"`layer` {layer!r} has {sorted(sums)}, no Kronecker factors.")
        inputs = sums["inputs"] / sums["count"].clamp_min(1)
        return symmetric(sums["gradients"]) * self.data_scale, inputs if inputs.ndim == 1 else symmetric(inputs)

    def eigen(self, layer: str, known: dict[str, tuple[Tensor, Tensor]] | None = None) -> KroneckerEigen:
        """Return the layer's curvature, eigendecomposed.

        ``known``: spectra by the digest of their input factor; layers that read the same tensor (query, key, value)
        share one.
        A sum that is not finite is refused with a ValueError.
        """
        sums = self._layer(layer)
        check_finite(layer, sums)
        if "products" in sums:
            values, vectors = symmetric_eigen(symmetric(sums["products"]))
            return KroneckerEigen(None, vectors, self.data_scale * values.unsqueeze(1))
        if "gradients" not in sums:
            return KroneckerEigen(None, None, self.data_scale * sums["squares"])
        gradients, inputs = self.factors(layer)
        gamma, left = symmetric_eigen(gradients)
        if inputs.ndim == 1:  # a table: rows are eigenvectors, and the row's features are rotated
            eigen = KroneckerEigen.from_product(None, left, inputs[None], gamma)
        else:
            alpha, right = _shared_spectrum(inputs, {} if known is None else known)
            eigen = KroneckerEigen.from_product(left, right, gamma, alpha)
        if "squares" not in sums:
            return eigen
        return replace(eigen, eigenvalues=self.data_scale * sums["squares"], factors=None)

    def decomposed(self, targets: Iterable[Target], *, releases: bool = False) -> list[tuple[Target, KroneckerEigen]]:
        """Each layer with its eigendecomposed curvature; layers that read the same tensor share one basis.

        Args:
            targets: the layers.
            releases: drop a layer's factors once they are decomposed, so that all factors and all bases never stand
                side by side.

        Returns:
            In the order of ``targets``.
        """
        known: dict[str, tuple[Tensor, Tensor]] = {}
        found = []
        for target in targets:
            found.append((target, self.eigen(target.name, known)))
            if releases:
                for name in _FACTORS:
                    self.sums[target.name].pop(name, None)
        return found

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the sums to one safetensors file; a crash while writing leaves the former file whole."""
        tensors = {f"{layer}/{name}": value for layer, sums in self.sums.items() for name, value in sums.items()}
        scalars = {name: getattr(self, name) for name in (*_SCALARS, "data_scale")}
        write(
            path,
            tensors,
            {"config": asdict(self.config), "weights": self.weights, "digests": self.digests, **scalars},
            kind="curvature",
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Curvature:
        """Return what `save` wrote; a file that is missing, damaged or of another kind is refused with a ValueError."""
        tensors, meta = read(path, kind="curvature")
        check_whole(tensors, tensors, f"{str(path)!r}")
        sums: dict[str, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            layer, _, name = key.rpartition("/")
            sums.setdefault(layer, {})[name] = value
        return cls(CurvatureConfig(**meta.pop("config")), sums, **meta)

    def scaled_to(self, num_data: int) -> Curvature:
        """The same sums, which stand for ``num_data`` examples."""
        return replace(self, data_scale=num_data / self.num_examples)

    def to(self, device: torch.device) -> Curvature:
        """The same sums on a device."""
        moved = {layer: {name: v.to(device) for name, v in sums.items()} for layer, sums in self.sums.items()}
        return replace(self, sums=moved)

    def without(self, layers: Iterable[str]) -> Curvature:
        """The same sums less some layers'."""
        dropped = set(layers)
        return replace(self, sums={name: sums for name, sums in self.sums.items() if name not in dropped})

    def _adds_to(self, other: Curvature) -> bool:
        """A layer may have been called in one pass only, where both know which layers there are."""
        if not (self.weights and other.weights):
            return bool(_shapes(self.sums) == _shapes(other.sums))
        same = self.weights.keys() == other.weights.keys()
        same = same and all(math.isclose(w, other.weights[name], rel_tol=1e-6) for name, w in self.weights.items())
        same = same and all(other.digests.get(name, own) == own for name, own in self.digests.items())
        shared = [name for name in self.sums if self.sums[name] and other.sums.get(name)]
        own, others = ({name: sums[name] for name in shared} for sums in (self.sums, other.sums))
        return bool(same and _shapes(own) == _shapes(others))

    def _layer(self, layer: str) -> dict[str, Tensor]:
        if layer not in self.sums:
            raise ValueError(f"`layer` must be one of {list(self.sums)[:5]}..., got {layer!r}.")
        return self.sums[layer]


def check_finite(layer: str, sums: Mapping[str, Tensor]) -> None:
    """Raise ValueError for sums of a layer that are not finite."""
    for name, value in sums.items():
        if not bool(value.isfinite().all()):
            raise ValueError(
                f"The {'inputs' if name == 'inputs' else 'gradients'} of the layer {layer!r} are not finite, or their "
                f"squares overflow {value.dtype}: check the model's weights and data, or exclude the layer."
            )


def _shapes(sums: Mapping[str, Mapping[str, Tensor]]) -> Any:
    return {layer: {name: value.shape for name, value in own.items()} for layer, own in sums.items()}


def _shared_spectrum(factor: Tensor, known: dict[str, tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    key = digest(factor)
    if key not in known:
        known[key] = symmetric_eigen(factor)
    return known[key]
