"""What a file of a posterior holds: the layers and weights that it was fitted to, and the tensors of each layer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..linearized import rule_of
from ..storage import check_whole
from .kronecker import KroneckerEigen
from .targets import Fingerprint, Target, owners_of

PARTS = ("left", "right", "eigenvalues")
_FACTORS = ("left_eigenvalues", "right_eigenvalues")


# -- which weights ----------------------------------------------------------------------------------------------------


def recorded_layers(targets: Iterable[Target], fitted: Mapping[str, Fingerprint]) -> dict[str, dict[str, Any]]:
    """Return what a file says about the layers of a posterior; ``fitted`` are their fingerprints at the fit.

    Raises:
        ValueError: the weights have moved since.
    """
    targets = list(targets)
    moved = [target.name for target in targets if not target.has_weights(fitted[target.name])]
    if moved:
        raise ValueError(
            f"The model's weights are not those that the posterior was fitted to: {moved[:3]} ({len(moved)}) have "
            "moved since (training, or a draw that is held). Fit again, or save outside the draw."
        )
    return {
        target.name: {
            "parameters": list(target.parameters),
            "squared_norm": target.squared_norm,
            "digests": target.fingerprint,
            "padding_idx": getattr(target.modules[0], "padding_idx", None),
        }
        for target in targets
    }


def saved_targets(model: nn.Module, layers: Mapping[str, Mapping[str, Any]]) -> list[Target]:
    """Return the targets of a saved posterior, whose tables have the recorded padding rows again.

    A configuration whose padding id was changed has built others.

    Args:
        model: the model that the posterior was fitted to.
        layers: by name, the ``parameters`` covered, the ``squared_norm`` and ``digests`` of their trained values, and
            the ``padding_idx``; files of earlier versions have no digests, and their norms alone are compared.

    Raises:
        ValueError: the model lacks a layer, or its weights are not those that the posterior was fitted to.
    """
    modules, owners, targets = dict(model.named_modules()), owners_of(model), []
    for name, recorded in layers.items():
        module = modules.get(name)
        rule = None if module is None else rule_of(module)
        parameters = {key: getattr(module, key, None) for key in recorded["parameters"]}
        present = {key: value for key, value in parameters.items() if value is not None}
        if module is None or rule is None or len(present) < len(parameters):
            raise ValueError(
                f"The posterior covers {name!r} ({recorded['parameters']}), which the model does not have."
            )
        targets.append(Target(name, tuple(owners[id(next(iter(present.values())))]), present, rule))
        _check_norm(targets[-1], recorded["squared_norm"])
    for target in targets:
        recorded = layers[target.name]
        if hasattr(target.modules[0], "padding_idx") and "padding_idx" in recorded:
            target.modules[0].padding_idx = recorded["padding_idx"]
    for target in targets:
        digests = layers[target.name].get("digests")
        if digests is not None and not target.has_weights(digests):
            raise ValueError(
                f"The posterior was fitted to other weights: those of {target.name!r} in the model are not the ones "
                "that were saved with it. Load the model that it was fitted to, or fit again."
            )
    return targets


def _check_norm(target: Target, recorded: float) -> None:
    if not math.isclose(target.squared_norm, recorded, rel_tol=1e-3, abs_tol=1e-12):
        raise ValueError(
            f"The posterior was fitted to other weights: those of {target.name!r} have squared norm "
            f"{target.squared_norm:.6g}, the posterior's {recorded:.6g}."
        )


# -- which tensors ----------------------------------------------------------------------------------------------------


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
    return ("right", "eigenvalues") if curvature in ("dense", "full") else PARTS
