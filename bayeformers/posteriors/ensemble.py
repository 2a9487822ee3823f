"""`EnsemblePosterior`: members as draws, read tensor by tensor from where they lie."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..storage import difference, file_digests
from ..storage import write as write_file
from .files import register_posterior
from .lent import LentPosterior, Pieces, check_shared
from .members import Given, Names, varying
from .streamed import InFiles, InMemory, Tensors, whole

__all__ = ["EnsemblePosterior"]

FILE, FOLDER = "ensemble.json", "members"
_KIND, _VERSION = "ensemble member", 1


@register_posterior
class EnsemblePosterior(LentPosterior):
    """M networks of equal weight: draw s is member s, whatever the seed (Lakshminarayanan et al. 2017).

    The model lends its modules: a draw writes a member into it, a quarter million elements at a time, and what stood
    there comes back bit by bit. So M members need the device memory of one. What comes back is read again from the
    member that it is; where it is none, it waits in the host's memory. Of members that share a base, such as adapters
    or heads, only the tensors that differ are kept, written and saved. Buffers, such as a normalisation's statistics,
    are members' as parameters are.

    `mean` is the average of the members' weights: the posterior mean of snapshots of one training, as in stochastic
    weight averaging; of members from several initialisations it is no useful network, and nothing here predicts by it.

    Args:
        model: a network of the members' architecture; it is not copied, and its own weights are no member unless they
            are given as one.
        members: folders or safetensors files, of whole models or PEFT adapters, state dicts, which may hold a part of
            the tensors (the same in each), or modules, whose weights are copied.

    Raises:
        TypeError: ``model`` or a member is of a wrong kind.
        ValueError: no member; one of another architecture, with other shapes, labels or ties, or with values that are
            not finite; a converted model.

    >>> model = nn.Linear(1, 1, bias=False)
    >>> posterior = EnsemblePosterior(model, [{"weight": torch.full((1, 1), value)} for value in (1.0, 3.0)])
    >>> posterior.predict(torch.ones(1, 1), problem_type="regression", num_samples=16).values
    tensor([[1.],
            [3.]])
    """

    file_name = FILE

    def __init__(self, model: nn.Module, members: Sequence[Given]) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"`model` must be a torch.nn.Module, got {type(model).__name__}.")
        if isinstance(members, str | bytes | os.PathLike | nn.Module | dict) or not isinstance(members, Iterable):
            raise TypeError(
                f"`members` must be a list of folders, state dicts or modules, got {type(members).__name__}."
            )
        given = list(members)
        if not given:
            raise ValueError("`members` must have one member at least, got none.")
        names = Names(model)
        found = [names.member(member, f"`members[{index}]`") for index, member in enumerate(given)]
        self._settle(names, varying(names, found))
        on_disk = (str, os.PathLike, InFiles)
        self.members: list[Tensors] = [
            tensors if isinstance(member, on_disk) else InMemory(whole(tensors, self._tensors))
            for member, tensors in zip(given, found, strict=True)
        ]
        self._at: dict[str, int] = {}

    def _settle(self, names: Names, chosen: Iterable[str]) -> None:
        chosen = list(chosen)
        shared = {name: tensor for name, tensor in names.tensors.items() if name not in chosen}
        super().__init__(names.model, {name: names.tensors[name] for name in chosen}, shared)

    @property
    def num_draws(self) -> int:  # type: ignore[override]
        """How many members there are."""
        return len(self.members)

    def pieces(self, name: str, index: int, seed: int) -> Iterable[Tensor]:
        """Those of member ``index``; the seed changes nothing.

        Args:
            name: of the tensor.
            index: of the member.
            seed: of no use here.

        Returns:
            The pieces.
        """
        return self.members[index].chunks(name)

    def mean_pieces(self, name: str) -> Iterable[Tensor]:
        """The averages over the members; of whole numbers the first member's."""
        if not self._tensors[name].is_floating_point():
            return self.members[0].chunks(name)
        pieces = zip(*(member.chunks(name) for member in self.members), strict=True)
        return (torch.stack([piece.double() for piece in several]).mean(0) for several in pieces)

    def standing(self, name: str) -> Iterator[Pieces]:
        """The members, the one that stood there last first."""
        last = self._at.get(name, 0)
        for index in (last, *(other for other in range(self.num_draws) if other != last)):
            self._at[name] = index
            yield partial(self.members[index].chunks, name)

    # -- files -------------------------------------------------------------------------------------------------------

    def save(self, directory: str | PathLike[str]) -> None:
        """Write each member's own tensors into a file of the folder ``members``, and what a reload needs beside it.

        Raises:
            ValueError: the tensors that members share have changed since.
        """
        shared = self.shared_record()
        path = Path(directory)
        files = [f"{FOLDER}/{index:03d}.safetensors" for index in range(self.num_draws)]
        for file, member in zip(files, self.members, strict=True):
            write_file(path / file, whole(member, self._tensors), {}, kind=_KIND)
        content = {"version": _VERSION, "members": files, "varying": list(self._tensors), "shared": shared}
        partial = path / f"{FILE}.{os.getpid()}.partial"
        partial.write_text(json.dumps(content, indent=1) + "\n")
        partial.replace(path / FILE)
        for stale in set((path / FOLDER).glob("[0-9]*.safetensors")) - {path / file for file in files}:
            stale.unlink()  # of a larger ensemble that was saved here before

    @classmethod
    def load(cls, directory: str | PathLike[str], model: nn.Module) -> EnsemblePosterior:
        """Return what `save` wrote, around a model that has the weights that the members share.

        Args:
            directory: the folder, or the file of `file_name` in it.
            model: the model.

        Raises:
            ValueError: a file is missing, damaged or of a newer version; the model has other shared weights.
        """
        path = Path(directory)
        path = path / FILE if path.is_dir() else path
        content = _read(path)
        names = Names(model)
        check_shared(names.tensors, content["shared"], content["varying"], repr(str(path)))
        members = [_member(path.parent / name, content["varying"]) for name in content["members"]]
        posterior = cls(model, members)
        posterior._settle(names, content["varying"])  # in whatever of them the members agree with this model
        return posterior


def _read(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        version, is_whole = content["version"], {"members", "varying", "shared"} <= content.keys()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{str(path)!r} is missing or damaged: {error!r}.") from error
    if type(version) is not int or version > _VERSION:
        raise ValueError(f"{str(path)!r} has version {version!r}; this bayeformers reads up to {_VERSION}.")
    if not is_whole:
        raise ValueError(f"{str(path)!r} is damaged: it has {sorted(content)} only.")
    return content


def _member(path: Path, expected: Sequence[str]) -> InFiles:
    tensors = InFiles([path])
    kind = tensors.metadata.get("kind")
    if kind != _KIND:
        raise ValueError(f"{str(path)!r} holds {kind or 'no bayeformers data'!r}, not {_KIND!r}.")
    told = difference(file_digests([path]), json.loads(tensors.metadata["digests"]))
    lacking = set(expected) ^ set(tensors.shapes)
    if told or lacking:
        raise ValueError(f"{str(path)!r} is damaged: it {told or f'has other tensors than {sorted(lacking)[:3]}'}.")
    return tensors
