"""`DiagonalPosterior`: independent Gaussians around the model's own weights."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ..linearized.blocks import block_noise
from ..sampling.generators import NOISE_VERSION, check_noise_version
from ..storage import check_whole, digest, folder, read, saved_file, write
from .files import register_posterior
from .weights import Values, WeightsPosterior

__all__ = ["DiagonalPosterior"]

_NARROWER = (torch.float32, torch.bfloat16, torch.float16)


@register_posterior
class DiagonalPosterior(WeightsPosterior):
    """Every weight is N(w, scale^2) with the model's own w, independent of the others.

    The model stays as it is; weights without a scale are deterministic. Predictions average over draws, or linearise
    the network (`method="glm"`, ...), for the posterior is Gaussian.

    Args:
        model: at the posterior mean.
        scales: standard deviations >= 0 by the Parameter's name in the model, each of its shape.

    Raises:
        TypeError: ``model`` is no module, ``scales`` no mapping of names to tensors.
        ValueError: no scale at all, a name that the model has not, or scales of another shape, negative or not finite.

    >>> model = nn.Linear(2, 1, bias=False)
    >>> posterior = DiagonalPosterior(model, {"weight": torch.tensor([[0.1, 0.0]])})
    >>> with posterior.draw(0):
    ...     drawn = model.weight.detach().clone()
    >>> (drawn != model.weight).tolist()
    [[True, False]]
    """

    file_name: ClassVar[str | None] = "diagonal.safetensors"

    def __init__(self, model: nn.Module, scales: Mapping[str, Tensor]) -> None:
        super().__init__(model)
        self.noise_version = NOISE_VERSION
        self._scales = _checked(model, scales)
        self._digests = {name: digest(model.get_parameter(name)) for name in self._scales}

    @property
    def scales(self) -> Mapping[str, Tensor]:
        """Standard deviations by the Parameter's name."""
        return dict(self._scales)

    def random_parameters(self) -> Iterable[nn.Parameter]:
        """Those that have a scale."""
        return [self.model.get_parameter(name) for name in self._scales]

    def weights(self, index: int, seed: int) -> Values:
        """Return w + scale * eps; eps is a function of the seed, the index and the Parameter's name.

        Args:
            index: the draw's place in the sequence, >= 0.
            seed: which sequence of draws.

        Yields:
            Each random Parameter with its value.
        """
        for name, scale in self._scales.items():
            parameter = self.model.get_parameter(name)
            noise = block_noise(name, tuple(scale.shape), index, seed, self.noise_version)
            scale = scale.to(parameter.device)
            yield parameter, parameter.detach() + noise.to(scale) * scale

    def variances(self) -> dict[nn.Parameter, Tensor]:
        """Return scale^2 of every random Parameter."""
        parameters = {name: self.model.get_parameter(name) for name in self._scales}
        return {p: self._scales[name].to(p.device).square() for name, p in parameters.items()}

    def is_of_present_weights(self) -> bool:
        """Whether the model still has the weights that the posterior was made around."""
        return all(digest(self.model.get_parameter(name)) == value for name, value in self._digests.items())

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write the scales, in their own precision, and what tells the weights that they belong to.

        Raises:
            ValueError: the model's weights have moved since the posterior was made.
        """
        if not self.is_of_present_weights():
            raise ValueError("The model's weights have moved since its posterior was made: train, or make it, again.")
        digests = {name: _digests(self.model.get_parameter(name)) for name in self._scales}
        meta = {"digests": digests, "noise_version": self.noise_version, **self._told()}
        write(folder(directory) / str(self.file_name), self._scales, meta, kind=self._kind())

    @classmethod
    def load(cls, directory: str | os.PathLike[str], model: nn.Module) -> Self:
        """Return what `save` wrote, around the model that it was saved with.

        Args:
            directory: the folder of `save`, or the file itself.
            model: the model, with the same weights, perhaps in another precision.

        Raises:
            TypeError: ``model`` is not a module.
            ValueError: the file is missing, damaged or changed, or the model has other parameters or weights.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"`model` must be a torch.nn.Module, got {type(model).__name__}.")
        path = saved_file(directory, str(cls.file_name))
        scales, meta = read(path, kind=cls._kind())
        check_whole(scales, meta["digests"], repr(str(path)))
        own = dict(model.named_parameters())
        for name, recorded in meta["digests"].items():
            if name not in own or not _matches(own[name], recorded):
                raise ValueError(
                    f"The posterior in {str(path)!r} belongs to other weights: those of {name!r} in the model are not "
                    "the ones that were saved with it. Load the model that it was saved with."
                )
        posterior = cls._from_file(model, {name: scales[name] for name in meta["digests"]}, meta)
        posterior.noise_version = check_noise_version(meta["noise_version"])
        return posterior

    def _told(self) -> dict[str, Any]:
        """What a subclass has to say in its file, JSON-able."""
        return {}

    @classmethod
    def _from_file(cls, model: nn.Module, scales: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Self:
        return cls(model, scales)

    @classmethod
    def _kind(cls) -> str:
        return str(cls.file_name).partition(".")[0]


def _checked(model: nn.Module, scales: Any) -> dict[str, Tensor]:
    if not isinstance(scales, Mapping):
        raise TypeError(f"`scales` must map names of parameters to tensors, got {type(scales).__name__}.")
    if not scales:
        raise ValueError("`scales` is empty: a posterior needs the scale of a parameter at least.")
    own, found = dict(model.named_parameters()), dict[str, Tensor]()
    for name, scale in scales.items():
        if not isinstance(scale, Tensor):
            raise TypeError(f"`scales` must map names to tensors, got {type(scale).__name__} for {name!r}.")
        if name not in own:
            raise ValueError(f"`scales` names {name!r}, which is no parameter of the model ({type(model).__name__}).")
        if scale.shape != own[name].shape:
            raise ValueError(
                f"`scales` of {name!r} must have shape {tuple(own[name].shape)}, got {tuple(scale.shape)}."
            )
        if not scale.is_floating_point() or not bool(torch.isfinite(scale).all() and (scale >= 0).all()):
            raise ValueError(f"`scales` of {name!r} must be finite numbers >= 0.")
        found[name] = scale.detach().to(torch.promote_types(scale.dtype, torch.float32), copy=True)
    return found


def _digests(parameter: Tensor) -> dict[str, str]:
    """Of the values as they are, and rounded to fewer bits: a model that is loaded in those is recognised."""
    narrower = [dtype for dtype in _NARROWER if dtype.itemsize < parameter.dtype.itemsize]
    return {str(dtype): digest(parameter.detach().to(dtype)) for dtype in (parameter.dtype, *narrower)}


def _matches(parameter: Tensor, recorded: Mapping[str, str]) -> bool:
    """Whether the values are those recorded, or those rounded to fewer bits or copied into more."""
    if str(parameter.dtype) in recorded:
        return digest(parameter) == recorded[str(parameter.dtype)]
    saved = getattr(torch, next(iter(recorded)).removeprefix("torch."))
    rounded = parameter.detach().to(saved)
    return bool((rounded.to(parameter.dtype) == parameter).all()) and digest(rounded) == recorded[str(saved)]
