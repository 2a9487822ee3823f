"""The tensors of a saved posterior: all that its layers need, and nothing else, of the right form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from .storage import check_whole
from .targets import Target

PARTS = ("left", "right", "eigenvalues")


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
