"""`SWAGPosterior`: a Gaussian from the weights that training passed through (Maddox et al. 2019)."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_count, check_number
from ..sampling.generators import NOISE_VERSION, check_noise_version, normal_of
from ..storage import difference, file_digests
from ..storage import write as write_file
from .batch_norm import batch_norm_layers, batch_norm_statistics
from .files import register_posterior
from .lent import LentPosterior, Pieces, check_shared
from .members import Names
from .moments import DEVIATION, MEAN, VARIANCE, Moments
from .streamed import InFiles, whole

__all__ = ["SWAGPosterior"]

logger = logging.getLogger(__name__)

FILE = "swag.safetensors"
_KIND = "SWAG posterior"
_STATISTICS = "statistics"
_MEAN = "mean"  # of a draw's place: the statistics at the mean


@register_posterior
class SWAGPosterior(LentPosterior):
    """The Gaussian N(m, Sigma) of the trained Parameters, Sigma = (diag(v) + D D^T / (K - 1)) / 2.

    m and v are mean and variance of the snapshots, and the K columns of D the last ones' deviations from the mean that
    there was then. Draw s of a seed is m + (v^1/2 z_1 + D z_2 / (K - 1)^1/2) / 2^1/2 with z_1, z_2 standard normal,
    functions of the seed, s and the Parameter's name alone: the same in every process. Without columns (rank 0)
    Sigma = diag(v). Parameters that did not train are the model's own.

    A linearised method ("glm") takes the diagonal of Sigma, `variances`: without the correlations that D holds.

    A network with BatchNorm layers needs their statistics anew for every draw: see `update_batch_norm`.

    Args:
        model: a network of the same architecture; it is not copied, and stays at the weights that it has.
        moments: of the weights, from `bayeformers.training.SWAGCallback` or `RunningMoments`.
        scale: factor of every deviation from the mean, > 0: 1 is the formula above.
        draw_cache_bytes: memory of the host in which whole draws are kept for the next batch, >= 0.

    Raises:
        TypeError: ``model`` or ``moments`` is of a wrong kind.
        ValueError: moments of other Parameters, one column or no snapshot; ``scale`` is no number > 0; a converted
            model.
    """

    file_name = FILE

    def __init__(
        self, model: nn.Module, moments: Moments, *, scale: float = 1.0, draw_cache_bytes: int = 2 * 2**30
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"`model` must be a torch.nn.Module, got {type(model).__name__}.")
        if not isinstance(moments, Moments):
            raise TypeError(f"`moments` must be Moments, got {type(moments).__name__}.")
        check_number("scale", scale, 0, strict=True)
        check_count("draw_cache_bytes", draw_cache_bytes, 0)
        if moments.num_columns == 1:
            raise ValueError("`moments` have one column of deviations, of which there is no covariance: take two.")
        names = Names(model)
        _check_moments(moments, names)
        shared = {name: tensor for name, tensor in names.tensors.items() if name not in set(moments.names)}
        self.moments, self.scale, self.noise_version = moments, float(scale), NOISE_VERSION
        self._statistics: dict[str, Tensor] = {}
        self._statistics_of: tuple[int, int] | None = None
        self._cache: dict[tuple[int, int], dict[str, Tensor]] = {}
        super().__init__(model, {name: names.tensors[name] for name in moments.names}, shared)
        self.draw_cache_bytes = draw_cache_bytes
        if batch_norm_layers(model):
            logger.warning(
                "%s has BatchNorm layers: call `update_batch_norm(batches)`, or every draw is evaluated with the "
                "statistics of the model's own weights.",
                type(model).__name__,
            )

    @property
    def num_draws(self) -> int | None:  # type: ignore[override]
        """Unlimited, or as many as BatchNorm statistics were computed for."""
        return None if self._statistics_of is None else self._statistics_of[0]

    # -- draws -------------------------------------------------------------------------------------------------------

    def pieces(self, name: str, index: int, seed: int) -> Iterable[Tensor]:
        """Return one tensor of draw ``index`` of ``seed``, in pieces.

        Args:
            name: of a Parameter, or of a BatchNorm layer's statistic.
            index: the draw's place in the sequence, >= 0.
            seed: which sequence of draws.

        Raises:
            ValueError: BatchNorm statistics were computed for another seed.
        """
        if self._statistics_of is not None and seed != self._statistics_of[1]:
            raise ValueError(
                f"`seed` is {seed}, but the BatchNorm statistics are those of draws of seed {self._statistics_of[1]}: "
                "call `update_batch_norm` with this seed."
            )
        if name not in self._deviating:
            return [self._statistics[f"{_STATISTICS}/{index}/{name}"].reshape(-1)]
        kept = self._cache.get((index, seed), {}).get(name)
        if kept is not None:
            return [kept.reshape(-1)]
        made = self._drawn(name, index, seed)
        return self._keeping(name, index, seed, made) if self._has_room(index, seed) else made

    @property
    def _deviating(self) -> frozenset[str]:
        return frozenset(self.moments.names)

    def _drawn(self, name: str, index: int, seed: int) -> Iterator[Tensor]:
        """The formula of the class, a piece at a time: each has noise of its own key, and all the same z_2."""
        columns = self.moments.num_columns
        read = self.moments.tensors.chunks
        parts = [read(f"{MEAN}/{name}"), read(f"{VARIANCE}/{name}")]
        parts += [read(f"{DEVIATION}/{k}/{name}") for k in range(columns)]
        low_rank = normal_of(f"{seed}/{index}/deviations", [columns], version=self.noise_version)
        for number, (mean, variance, *deviations) in enumerate(zip(*parts, strict=True)):
            key = f"{seed}/{index}/{name}/{number}"
            noise = normal_of(key, mean.shape, version=self.noise_version).to(mean)
            moved = noise.mul_(variance.sqrt())
            if columns:
                for z, deviation in zip((low_rank / math.sqrt(columns - 1)).tolist(), deviations, strict=True):
                    moved.add_(deviation, alpha=z)
                moved.mul_(math.sqrt(0.5))
            yield moved.mul_(self.scale).add_(mean)

    def mean_pieces(self, name: str) -> Iterable[Tensor]:
        """The mean m; of BatchNorm layers its statistics."""
        if name not in self._deviating:
            return [self._statistics[f"{_STATISTICS}/{_MEAN}/{name}"].reshape(-1)]
        return self.moments.tensors.chunks(f"{MEAN}/{name}")

    def standing(self, name: str) -> Iterable[Pieces]:
        """The mean, where the model was left at it."""
        return [partial(self.mean_pieces, name)]

    # -- the cache ---------------------------------------------------------------------------------------------------

    def _has_room(self, index: int, seed: int) -> bool:
        if any(kept_seed != seed for _, kept_seed in self._cache):
            self.clear_cache()
        size = sum(tensor.numel() * tensor.element_size() for tensor in self._tensors.values())
        return len(self._cache.keys() | {(index, seed)}) * size <= self.draw_cache_bytes

    def _keeping(self, name: str, index: int, seed: int, made: Iterator[Tensor]) -> Iterable[Tensor]:
        kept = torch.empty(self._tensors[name].numel(), dtype=self._tensors[name].dtype)
        start = 0
        for piece in made:
            kept[start : start + piece.numel()].copy_(piece)
            start += piece.numel()
        self._cache.setdefault((index, seed), {})[name] = kept
        return [kept]

    def clear_cache(self) -> None:
        """Forget the draws that are kept in memory."""
        self._cache = {}

    # -- moments of the posterior ------------------------------------------------------------------------------------

    def variances(self) -> dict[nn.Parameter, Tensor]:
        """The diagonal of Sigma, by Parameter: (v + sum_k D_k^2 / (K - 1)) / 2, or v; times the scale's square."""
        found = {}
        columns = self.moments.num_columns
        self.find_tensors()
        for name in self.moments.names:
            parameter = self._tensors[name]
            assert isinstance(parameter, nn.Parameter)
            variance = self._whole(f"{VARIANCE}/{name}")
            if columns:
                squares = sum(self._whole(f"{DEVIATION}/{k}/{name}").square() for k in range(columns))
                variance = (variance + squares / (columns - 1)) / 2
            found[parameter] = (variance * self.scale**2).to(parameter.device)
        return found

    def _whole(self, name: str) -> Tensor:
        return whole(self.moments.tensors, [name])[name]

    def update_batch_norm(self, batches: Iterable[Any], num_draws: int = 16, seed: int = 0) -> None:
        """Compute the statistics of BatchNorm layers under the mean and under each of the first draws.

        From then on there are ``num_draws`` draws, of this seed alone; `save` keeps the statistics.

        Args:
            batches: inputs, as of `predict`, which are read once for every draw: a list or a DataLoader.
            num_draws: for how many draws, >= 1.
            seed: of the draws.

        Raises:
            TypeError: ``batches`` can be read once only.
            ValueError: the model has no such layer, or there is no batch.
        """
        check_count("num_draws", num_draws, 1)
        check_count("seed", seed, 0)
        layers = batch_norm_layers(self.model)
        if not layers:
            raise ValueError(f"{type(self.model).__name__} has no BatchNorm layer with running statistics.")
        self._statistics_of, self._statistics = None, {}
        buffers = {f"{name}.{key}": b for name, layer in layers.items() for key, b in layer._buffers.items()}
        own = {name: buffer for name, buffer in buffers.items() if buffer is not None}
        self._tensors = {name: self._tensors[name] for name in self.moments.names}
        found: dict[str, Tensor] = {}
        for place in (_MEAN, *range(num_draws)):
            with self.mean() if place == _MEAN else self.draw(int(place), seed):
                statistics = batch_norm_statistics(self.model, layers, batches)
            found |= {f"{_STATISTICS}/{place}/{name}": value for name, value in statistics.items()}
        self._adopt(own, found, num_draws, seed)

    def _adopt(self, own: Mapping[str, Tensor], found: Mapping[str, Tensor], num_draws: int, seed: int) -> None:
        self._statistics, self._statistics_of = dict(found), (num_draws, seed)
        self._tensors |= own
        for name in own:
            self._shared.pop(name, None)

    # -- files -------------------------------------------------------------------------------------------------------

    def save(self, directory: str | PathLike[str]) -> None:
        """Write the moments and BatchNorm statistics into one file.

        Raises:
            ValueError: weights that did not train have changed since.
        """
        shared = self.shared_record()
        tensors = whole(self.moments.tensors, list(self.moments.tensors.shapes)) | self._statistics
        meta = {
            "num_snapshots": self.moments.num_snapshots,
            "num_columns": self.moments.num_columns,
            "scale": self.scale,
            "noise_version": self.noise_version,
            "statistics_of": self._statistics_of,
            "shared": shared,
        }
        write_file(Path(directory) / FILE, tensors, meta, kind=_KIND)

    @classmethod
    def load(cls, directory: str | PathLike[str], model: nn.Module) -> SWAGPosterior:
        """Return what `save` wrote: the moments stay in the file, and are read as draws need them.

        Args:
            directory: the folder, or the file of `file_name` in it.
            model: the model, with the weights that it had.

        Raises:
            ValueError: the file is missing, damaged or of a newer version; the model is another.
        """
        path = Path(directory)
        path = path / FILE if path.is_dir() else path
        tensors, meta = _opened(path)
        moments = Moments(tensors, meta["num_snapshots"], meta["num_columns"])
        own = Names(model).tensors
        check_shared(own, meta["shared"], moments.names, repr(str(path)))
        posterior = cls(model, moments, scale=meta["scale"])
        posterior.noise_version = check_noise_version(meta["noise_version"])
        if meta["statistics_of"] is not None:
            num_draws, seed = meta["statistics_of"]
            statistics = [name for name in tensors.shapes if name.startswith(f"{_STATISTICS}/")]
            written = {name.split("/", 2)[2] for name in statistics}
            posterior._adopt({n: own[n] for n in written}, whole(tensors, statistics), num_draws, seed)
        return posterior


def _check_moments(moments: Moments, names: Names) -> None:
    parameters = {name for name, tensor in names.tensors.items() if isinstance(tensor, nn.Parameter)}
    if not moments.names or moments.num_snapshots < 1:
        raise ValueError("`moments` are of no Parameter.")
    unknown = [name for name in moments.names if name not in parameters]
    if unknown:
        raise ValueError(f"`moments` are of {unknown[:3]} ({len(unknown)}), which `model` does not have.")
    parts = [MEAN, VARIANCE, *(f"{DEVIATION}/{k}" for k in range(moments.num_columns))]
    for name in moments.names:
        expected = tuple(names.tensors[name].shape)
        shapes = {part: moments.tensors.shapes.get(f"{part}/{name}") for part in parts}
        wrong = {part: shape for part, shape in shapes.items() if shape is None or tuple(shape) != expected}
        if wrong:
            raise ValueError(f"`moments` of {name!r} have the shapes {wrong}, the Parameter {expected}.")


def _opened(path: Path) -> tuple[InFiles, dict[str, Any]]:
    tensors = InFiles([path])
    kind = tensors.metadata.get("kind")
    if kind != _KIND:
        raise ValueError(f"{str(path)!r} holds {kind or 'no bayeformers data'!r}, not {_KIND!r}.")
    told = difference(file_digests([path]), json.loads(tensors.metadata["digests"]))
    if told is not None:
        raise ValueError(f"{str(path)!r} is damaged: of the tensors that were written it {told}.")
    return tensors, json.loads(tensors.metadata["meta"])
