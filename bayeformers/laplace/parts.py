"""The tensors of a saved posterior: all that its layers need, and nothing else, of the right form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..storage import check_whole
from .kronecker import KroneckerEigen
from .targets import Target

PARTS = ("left", "right", "eigenvalues")
_FACTORS = ("left_eigenvalues", "right_eigenvalues")


def packed(layers: Mapping[str, KroneckerEigen]) -> dict[str, Tensor]:
    """The layers' tensors by "layer/part"; of eigenvalues that are products of two vectors the vectors alone."""
    tensors: dict[str, Tensor] = {}
    for layer, eigen in layers.items():
        parts: dict[str, Tensor | None] = {name: getattr(eigen, name) for name in PARTS}
        if eigen.factors is not None and _is_product(eigen.eigenvalues, *eigen.factors):
            del parts["eigenvalues"]
            parts |= dict(zip(_FACTORS, eigen.factors, strict=True))
        tensors |= {f"{layer}/{name}": value for name, value in parts.items() if value is not None}
    return tensors


def unpacked(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, tuple[Tensor, Tensor]]]:
    """The same with all eigenvalues, bit for bit, and by layer the vectors that they are products of."""
    found, factors = dict(tensors), dict[str, tuple[Tensor, Tensor]]()
    for name in tensors:
        layer, _, part = name.rpartition("/")
        pair = [found.get(f"{layer}/{each}") for each in _FACTORS]
        if part == _FACTORS[0] and all(value is not None and value.dim() == 2 for value in pair):
            gamma, alpha = (found.pop(f"{layer}/{each}") for each in _FACTORS)
            found[f"{layer}/eigenvalues"], factors[layer] = _product(gamma, alpha), (gamma, alpha)
    return found, factors


def _is_product(eigenvalues: Tensor, gamma: Tensor, alpha: Tensor) -> bool:
    """Bit for bit: a reload may have another dtype or device than the vectors."""
    is_alike = (eigenvalues.dtype, eigenvalues.device) == (gamma.dtype, gamma.device)
    return is_alike and torch.equal(_product(gamma, alpha), eigenvalues)


def _product(gamma: Tensor, alpha: Tensor) -> Tensor:
    return gamma.unsqueeze(-1) * alpha.unsqueeze(-2)


def check_parts(tensors: Mapping[str, Tensor], targets: Sequence[Target], curvature: str, what: str) -> None:
    """Eigenvalues of every layer, finite and >= 0, with the eigenvectors that they belong to.

    Args:
        tensors: those of a file, by "layer/part".
        targets: the layers that it covers.
        curvature: kind of the fit.
        what: the file, in an error's words.

    Raises:
        ValueError: a tensor is missing or of no layer, of another shape, not finite, or negative.
    """
    expected = {f"{target.name}/{part}" for target in targets for part in _needed(target, curvature)}
    optional = {f"{target.name}/{part}" for target in targets for part in PARTS}
    check_whole(tensors, expected | (optional & tensors.keys()), what)
    for target in targets:
        values = tensors[f"{target.name}/eigenvalues"]
        if values.dim() != 3 or values.numel() != target.num_weights:
            raise ValueError(
                f"{what} has eigenvalues of shape {tuple(values.shape)} for {target.name!r}, whose weights number "
                f"{target.num_weights}."
            )
        if bool((values < 0).any()):
            raise ValueError(f"{what} is damaged: {target.name!r} has negative eigenvalues.")
        for part, axis in (("left", 1), ("right", 2)):
            vectors = tensors.get(f"{target.name}/{part}")
            width = values.shape[axis]
            if vectors is not None and tuple(vectors.shape) != (values.shape[0], width, width):
                raise ValueError(
                    f"{what} is damaged: {target.name!r} has {part} eigenvectors of shape {tuple(vectors.shape)}, not "
                    f"{(values.shape[0], width, width)}."
                )


def _needed(target: Target, curvature: str) -> tuple[str, ...]:
    """Which parts no file of such a layer can lack; a table or a normalisation has fewer."""
    if not target.rule.is_affine or curvature == "diagonal":
        return ("eigenvalues",)
    return ("right", "eigenvalues") if curvature == "full" else PARTS
