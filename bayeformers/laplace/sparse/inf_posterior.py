"""INF as a posterior: sampling prediction from k eigenpairs and a diagonal per layer (Lee et al. 2020).

Of a layer with p = d_out d_in' weights an EKFAC posterior keeps d_out^2 + d_in'^2 + p numbers; this one k eigenvalues
with at most k (d_out + d_in') numbers for their vectors, and p for the diagonal. See `bayeformers.laplace.sparse.inf`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ...checks import is_whole
from ...likelihoods import ProblemType, logits_of
from ...linearized.blocks import block_noise
from ...linearized.captured import OutputOf
from ...posteriors.files import register_posterior
from ...sampling.generators import NOISE_VERSION, check_noise_version
from ...storage import check_whole, folder, read, saved_file, write
from ..blocks import LaplaceBlock
from ..moved import MovedPosterior, by_parameter
from ..posterior import LaplacePosterior, check_laplace
from ..saving import recorded_layers, saved_targets
from ..targets import Fingerprint, Target
from .inf import LowRankPlusDiagonal

FILE = "inf.safetensors"
_PARTS = ("left", "right", "rows", "columns", "eigenvalues", "unclamped_diagonal")
InfBlocks = Sequence[LowRankPlusDiagonal]
"""One per group of a convolution, one elsewhere."""


@register_posterior
class InfPosterior(MovedPosterior):
    """N(theta*, (scale (V lam V^T + D) + tau)^-1) layer by layer; see `inf_posterior`.

    It predicts by sampling the network: a linearised method needs the eigenvectors that it gave up.

    Args:
        model: the trained model.
        layers: each layer with its sparse form.
        prior_precisions: layer name -> tau.
        likelihood_precision: 1 / (temperature noise_std^2).
        problem_type: what the head predicts.
        noise_std: s of a regression.
        outputs_of: the logits in what the model returns.
        noise_version: which draws, see `bayeformers.sampling.generators`.
    """

    file_name = FILE

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[tuple[Target, InfBlocks]],
        *,
        prior_precisions: Mapping[str, float],
        likelihood_precision: float,
        problem_type: ProblemType,
        noise_std: float = 1.0,
        outputs_of: OutputOf = logits_of,
        noise_version: int = NOISE_VERSION,
        fingerprints: Mapping[str, Fingerprint] | None = None,
    ) -> None:
        self.model, self.layers, self.noise_version = model, list(layers), check_noise_version(noise_version)
        self.fingerprints = fingerprints or {target.name: target.fingerprint for target in self.targets}
        self.prior_precisions, self.noise_std = dict(prior_precisions), noise_std
        self.likelihood_precision = likelihood_precision
        self._problem_type, self._outputs_of = problem_type, outputs_of

    @property
    def num_stored(self) -> int:
        """Numbers kept for all layers."""
        return sum(getattr(block, part).numel() for _, blocks in self.layers for block in blocks for part in _PARTS)

    def log_determinant(self) -> Tensor:
        """The log determinant of the precision, summed over the layers."""
        found = [
            block.log_determinant(self.prior_precisions[target.name], scale=self.likelihood_precision)
            for target, blocks in self.layers
            for block in blocks
        ]
        return torch.stack([value.cpu() for value in found]).sum()

    @property
    def targets(self) -> list[Target]:
        """The covered layers, in the model's order."""
        return [target for target, _ in self.layers]

    def problem_type(self) -> ProblemType:
        """As given."""
        return self._problem_type

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write ``inf.safetensors``; weights that have moved since the fit are refused with a ValueError."""
        tensors = {
            f"{target.name}/{number}/{part}": getattr(block, part)
            for target, blocks in self.layers
            for number, block in enumerate(blocks)
            for part in _PARTS
        }
        meta = {
            "prior_precisions": self.prior_precisions,
            "scale": self.likelihood_precision,
            "problem_type": self._problem_type,
            "noise_std": self.noise_std,
            "noise_version": self.noise_version,
            "layers": recorded_layers(self.targets, self.fingerprints),
            "groups": {target.name: len(blocks) for target, blocks in self.layers},
        }
        write(folder(directory) / FILE, tensors, meta, kind="inf")

    @classmethod
    def load(
        cls, directory: str | os.PathLike[str], model: nn.Module, *, outputs_of: OutputOf = logits_of
    ) -> InfPosterior:
        """Return what `save` wrote, around the model that the posterior was fitted to.

        Args:
            directory: the folder of `save`, or the file itself.
            model: the model that the posterior was fitted to, with the same weights.
            outputs_of: from what the model returns to its logits; it is not saved.

        Raises:
            ValueError: the file is missing, damaged or changed, or the model has other layers or weights.
        """
        path = folder(directory)
        tensors, meta = read(saved_file(directory, FILE), kind="inf")
        recorded, groups = meta.pop("layers"), meta.pop("groups")
        targets = saved_targets(model, recorded)
        numbered = [f"{target.name}/{number}" for target in targets for number in range(groups[target.name])]
        check_whole(tensors, [f"{name}/{part}" for name in numbered for part in _PARTS], f"{str(path)!r}")
        if any(bool((tensors[f"{name}/eigenvalues"] < 0).any()) for name in numbered):
            raise ValueError(f"{str(path)!r} is damaged: it has negative eigenvalues.")
        layers = []
        for target in targets:
            device = next(iter(target.parameters.values())).device
            keys = [[f"{target.name}/{number}/{part}" for part in _PARTS] for number in range(groups[target.name])]
            layers.append((target, [LowRankPlusDiagonal(*(tensors[key].to(device) for key in own)) for own in keys]))
        precision = meta.pop("scale")  # its name in files
        return cls(model, layers, outputs_of=outputs_of, likelihood_precision=precision, **{"noise_version": 1, **meta})

    def _deviation(self, index: int, seed: int) -> dict[nn.Parameter, Tensor]:
        found: dict[nn.Parameter, Tensor] = {}
        for target, blocks in self.layers:
            like, tau = blocks[0].unclamped_diagonal, self.prior_precisions[target.name]
            shape = len(blocks), *like.shape
            noise = block_noise(target.name, shape, index, seed, self.noise_version).to(like)
            drawn = [
                block.draw(z, tau, scale=self.likelihood_precision) for block, z in zip(blocks, noise, strict=True)
            ]
            found |= by_parameter(target, torch.stack(drawn))
        return found


def inf_posterior(posterior: LaplacePosterior, rank: int, diagonal: LaplacePosterior | None = None) -> InfPosterior:
    """Return the sparse information form of a posterior: the ``rank`` largest eigenpairs of each layer, and a diagonal.

    Args:
        posterior: fitted with curvature="ekfac" (or "kfac", whose eigenvalues are not corrected).
        rank: k of every layer (of every group of a convolution); all pairs of a smaller one.
        diagonal: fitted to the same data with curvature="diagonal": its diagonal of F, which is exact, becomes that of
            this form, as in Lee et al. 2020 (arXiv 2006.11631), but where the difference to the eigenpairs' is negative
            and clamped. None: the diagonal of the posterior's own curvature, which needs no pass and no clamp.

    Raises:
        ValueError: ``rank`` below 1, a ``diagonal`` of another curvature or of other layers.

    >>> from bayeformers.laplace import fit
    >>> net, x = nn.Linear(3, 2), torch.randn(20, 3)
    >>> posterior = fit(net, [(x, torch.randint(2, (20,)))], curvature="ekfac", progress=False)
    >>> inf_posterior(posterior, rank=2).predict(x[:4], num_samples=8).probs.shape
    torch.Size([4, 2])
    """
    check_laplace(posterior)
    if not is_whole(rank) or rank < 1:
        raise ValueError(f"`rank` must be a whole number >= 1, got {rank!r}.")
    exact = None if diagonal is None else _diagonals(posterior, diagonal)
    layers = [
        (block.target, _sparse(block, rank, None if exact is None else exact[block.name]))
        for block in posterior.blocks()
    ]
    return InfPosterior(
        posterior.model,
        layers,
        prior_precisions={block.name: block.prior_precisions[0] for block in posterior.blocks()},
        likelihood_precision=posterior.likelihood_precision,
        problem_type=posterior.problem_type(),
        noise_std=posterior.noise_std,
        outputs_of=posterior._outputs_of,
        noise_version=posterior.record.noise_version,
        fingerprints=posterior.fingerprints,
    )


def _diagonals(posterior: LaplacePosterior, diagonal: LaplacePosterior) -> dict[str, Tensor]:
    if diagonal.record.config.curvature != "diagonal":
        raise ValueError(f'`diagonal` must be of curvature="diagonal", got {diagonal.record.config.curvature!r}.')
    found = {name: eigen.eigenvalues for name, eigen in diagonal.layers.items()}
    shapes = {name: values.shape for name, values in found.items()}
    if shapes != {name: eigen.eigenvalues.shape for name, eigen in posterior.layers.items()}:
        raise ValueError("`diagonal` must be of the same layers as `posterior`, fitted with their own form.")
    return found


def _sparse(block: LaplaceBlock, rank: int, diagonal: Tensor | None) -> list[LowRankPlusDiagonal]:
    eigen = block.eigen
    own = eigen.diagonal() if diagonal is None else diagonal.to(eigen.eigenvalues)
    return [
        LowRankPlusDiagonal.from_ekfac(
            None if eigen.left is None else eigen.left[k],
            None if eigen.right is None else eigen.right[k],
            values,
            own[k],
            min(rank, values.numel()),
        )
        for k, values in enumerate(eigen.eigenvalues)
    ]
