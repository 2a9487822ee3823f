"""`AdapterPosterior`: Gaussians over the A matrices of a trained LoRA, each of low rank."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from ..laplace.blocks import TargetBlock
from ..laplace.moved import MovedPosterior, by_parameter
from ..laplace.saving import recorded_layers, saved_targets
from ..laplace.targets import Fingerprint, Target
from ..likelihoods import logits_of
from ..linearized import rule_of
from ..linearized.blocks import block_draw
from ..linearized.captured import OutputOf
from ..posteriors.files import register_posterior
from ..sampling.generators import NOISE_VERSION, check_noise_version
from ..storage import check_whole, folder, read, saved_file, write
from .layers import LoraPair

__all__ = ["AdapterPosterior", "LowRankBlock"]

FILE = "adapter_posterior.safetensors"
_KIND = "adapter posterior"
_PARTS = ("variance", "left", "columns")


@dataclass(frozen=True, eq=False)
class LowRankBlock(TargetBlock):
    """N(A, U diag(V) U^T) with U = U_G (x) U_A, of which the directions outside of U have no noise; a `GaussianBlock`.

    Attributes:
        target: the layer of A.
        variance: V, (1, q, p) of a q x p matrix of independent noise.
        left: U_G, (1, r, q); None: of a dense block, q = 1.
        columns: U_A, (1, d_in, p); None: the identity, p = d_in. Of noise in the core they are (1, r, p), of a dense
            block (1, r^2, p).
        core: the trained A, (r, d_in), where the noise is C A with the core C (r, r); None: it is in A itself.
        noise_version: which draws, see `bayeformers.sampling.generators`.
    """

    target: Target
    variance: Tensor
    left: Tensor | None
    columns: Tensor | None = None
    core: Tensor | None = None
    noise_version: int = NOISE_VERSION

    @property
    def is_flat(self) -> bool:
        """Whether the block is dense."""
        return self.left is None

    @property
    def right(self) -> Tensor | None:
        """U_A of A itself: (1, d_in, p), or (1, r d_in, p) of a dense block; None: the identity."""
        if self.core is None or self.columns is None:
            return self.columns
        if self.left is not None:
            return self.core.mT @ self.columns
        rank, width = self.core.shape
        by_row = self.columns.reshape(rank, rank, -1)
        return torch.einsum("kj,ikp->ijp", self.core, by_row).reshape(1, rank * width, -1)

    def variances(self) -> Tensor:
        """V of the one posterior, (1, 1, q, p)."""
        return self.variance.unsqueeze(0)

    def prior_variances(self) -> None:
        """None: what the data do not know has no noise of a common size."""

    def separable(self, tolerance: float) -> None:
        """None: the matrices are small."""

    def marginal(self) -> Tensor:
        """Variance of every element of A, in the layer's matrix form: U_G^2 V (U_A^2)^T."""
        rows = self.variance if self.left is None else self.left.square() @ self.variance
        return rows if self.right is None else rows @ self.right.square().mT

    def placed(self) -> LowRankBlock:
        """The same on the layer's device, and in its dtype, or float32 where that is wider."""
        like = self.parameters["weight"]
        dtype = torch.promote_types(like.dtype, torch.float32)

        def moved(part: Tensor | None) -> Tensor | None:
            return None if part is None else part.to(like.device, dtype)

        variance = self.variance.to(like.device, dtype)
        left, columns, core = moved(self.left), moved(self.columns), moved(self.core)
        return replace(self, variance=variance, left=left, columns=columns, core=core)


def target_of(pair: LoraPair) -> Target:
    """The A of one adapted layer, whether or not it requires a gradient."""
    rule = rule_of(pair.down)
    assert rule is not None  # `plain_lora_pairs`
    return Target(pair.down_name, (pair.down,), {"weight": pair.down.get_parameter("weight")}, rule)


@register_posterior
class AdapterPosterior(MovedPosterior):
    """The result of `fit_tfb` and `fit_core`: every A of a LoRA is Gaussian around its trained value; B is as trained.

    The weight of an adapted layer is W0 + s B (A + E) with E = U_G (V^1/2 * Z) U_A^T, Z standard normal: noise in a
    few directions of A, the same function of seed, index and the layer's name in every process. It predicts from draws
    or linearised (`method="glm"`). `save` writes it beside the adapter's own files, whose weights must still be those
    of the fit.

    Args:
        model: the model with the trained adapter; it is not copied.
        blocks: one Gaussian per layer.
        method: which fit it is the result of, such as "tfb".
        scale: the number that the fit found, such as TFB's sigma.
        default_method: of `predict`.
        outputs_of: the logits in what the model returns.
        fingerprints: layer name -> the weights that it belongs to; None: the present ones.

    Attributes:
        method: as given.
        scale_found: the number that the fit found; NaN where it finds none.

    Raises:
        ValueError: there is no block.
    """

    file_name: ClassVar[str | None] = FILE
    noise_std = 1.0
    likelihood_precision = 1.0

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[LowRankBlock],
        *,
        method: str,
        scale: float = float("nan"),
        default_method: str = "sample",
        outputs_of: OutputOf = logits_of,
        fingerprints: Mapping[str, Fingerprint] | None = None,
    ) -> None:
        if not blocks:
            raise ValueError("`blocks` is empty: a posterior needs one layer at least.")
        self.model, self.method, self.scale_found = model, method, float(scale)
        self.default_method = default_method
        self._blocks, self._outputs_of = list(blocks), outputs_of
        self.fingerprints = fingerprints or {target.name: target.fingerprint for target in self.targets}

    def __repr__(self) -> str:
        count = sum(block.variance.numel() for block in self._blocks)
        return f"AdapterPosterior({self.method}, {len(self._blocks)} layers, {count:,} random numbers)"

    @property
    def targets(self) -> list[Target]:
        """The layers of A, in the model's order."""
        return [block.target for block in self._blocks]

    def blocks(self) -> Sequence[LowRankBlock]:
        """One Gaussian per layer, where the layer lies."""
        return [block.placed() for block in self._blocks]

    def variances(self) -> dict[nn.Parameter, Tensor]:
        """Marginal variance of every element of the A matrices."""
        found: dict[nn.Parameter, Tensor] = {}
        for block in self.blocks():
            found |= by_parameter(block.target, block.marginal())
        return found

    def recorded_noise_std(self) -> float | None:  # type: ignore[override]
        """None: that of the model's configuration is asked for."""
        return super(MovedPosterior, self).recorded_noise_std()  # type: ignore[return-value]

    def _deviation(self, index: int, seed: int) -> dict[nn.Parameter, Tensor]:
        drawn: dict[nn.Parameter, Tensor] = {}
        for block in self.blocks():
            drawn |= by_parameter(block.target, block_draw(block, index, seed))
        return drawn

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write ``adapter_posterior.safetensors`` beside the adapter's own files.

        Raises:
            ValueError: the adapter's weights have moved since the fit.
        """
        tensors = {
            f"{block.name}/{part}": value
            for block in self._blocks
            for part in _PARTS
            if (value := getattr(block, part)) is not None
        }
        meta = {
            "method": self.method,
            "scale": None if math.isnan(self.scale_found) else self.scale_found,
            "default_method": self.default_method,
            "has_core": self._blocks[0].core is not None,
            "layers": recorded_layers(self.targets, self.fingerprints),
            "noise_version": self._blocks[0].noise_version,
        }
        write(folder(directory) / FILE, tensors, meta, kind=_KIND)

    @classmethod
    def load(cls, directory: str | os.PathLike[str], model: nn.Module, *, outputs_of: OutputOf = logits_of) -> Self:
        """Return what `save` wrote, around the model that it was fitted to.

        Args:
            directory: the folder of `save`, or the file itself.
            model: the model with the same adapter.
            outputs_of: from what the model returns to its logits; it is not saved.

        Raises:
            TypeError: ``model`` is not a module.
            ValueError: the file is missing, damaged or changed, or the model has other layers or weights.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"`model` must be a torch.nn.Module, got {type(model).__name__}.")
        path = saved_file(directory, FILE)
        tensors, meta = read(path, kind=_KIND)
        targets = saved_targets(model, meta["layers"])
        needed = {f"{target.name}/variance" for target in targets}
        optional = {f"{target.name}/{part}" for target in targets for part in ("left", "columns")}
        check_whole(tensors, needed | (optional & tensors.keys()), repr(str(path)))
        version = check_noise_version(meta["noise_version"])
        blocks = [_read_block(target, tensors, has_core=meta["has_core"], version=version) for target in targets]
        for block in blocks:
            _check_shapes(block, f"{str(path)!r}")
        scale = math.nan if meta["scale"] is None else meta["scale"]
        return cls(
            model,
            blocks,
            method=meta["method"],
            scale=scale,
            default_method=meta["default_method"],
            outputs_of=outputs_of,
        )


def _read_block(target: Target, tensors: Mapping[str, Tensor], *, has_core: bool, version: int) -> LowRankBlock:
    parts = {part: tensors.get(f"{target.name}/{part}") for part in _PARTS}
    core = target.parameters["weight"].detach().clone() if has_core else None
    return LowRankBlock(target, core=core, noise_version=version, **parts)  # type: ignore[arg-type]


def _check_shapes(block: LowRankBlock, what: str) -> None:
    """Raise ValueError where the tensors of a file do not go together, or a variance is negative."""
    depth, width = block.target.matrix_shape[1:]
    inner = depth if block.core is not None else width
    variance, left, columns = block.variance, block.left, block.columns
    fits = variance.dim() == 3
    if fits and left is not None:
        fits = tuple(left.shape) == (1, depth, variance.shape[1])
    if fits:
        side = inner if left is not None else depth * inner
        found = (1, side, side) if columns is None else tuple(columns.shape)
        fits = found == (1, side, variance.shape[2]) and (left is not None or variance.shape[1] == 1)
    if not fits or bool((variance < 0).any()):
        raise ValueError(f"{what} is damaged: the Gaussian of {block.name!r} has other shapes or negative variances.")
