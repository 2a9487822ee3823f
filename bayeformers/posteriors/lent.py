"""`LentPosterior`: draws that are written into the model piece by piece, so that one model's memory is enough."""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_draw
from ..sampling.views import alone, lend
from ..storage import digest
from .base import BasePosterior
from .streamed import same_bits, write

Pieces = Callable[[], Iterable[Tensor]]


class LentPosterior(BasePosterior):
    """The model lends its modules: a draw writes its tensors, a quarter million elements at a time.

    What stood there comes back bit by bit. It waits in the host's memory, or is read again where a subclass says from
    where: so draws need the device memory of one model. One prediction runs after the other.

    Args:
        model: whose tensors are written; it is not copied.
        tensors: by name those that a draw writes, Parameters and buffers.
        shared: by name the others, which are the model's own in every draw.
    """

    def __init__(self, model: nn.Module, tensors: Mapping[str, Tensor], shared: Mapping[str, Tensor]) -> None:
        self.model = model
        self._tensors, self._shared = dict(tensors), dict(shared)
        self._versions = {name: _version(tensor) for name, tensor in self._shared.items()}
        self._digests = {name: (tensor.dtype, digest(tensor)) for name, tensor in self._shared.items()}
        lend(model)

    @abstractmethod
    def pieces(self, name: str, index: int, seed: int) -> Iterable[Tensor]:
        """The elements of one tensor in draw ``index`` of ``seed``, in order, as flat tensors of any length."""

    @abstractmethod
    def mean_pieces(self, name: str) -> Iterable[Tensor]:
        """The elements of one tensor in the mean."""

    def standing(self, name: str) -> Iterable[Pieces]:
        """What may stand in the model between draws, and can be read again at any time; none by default."""
        return ()

    @contextlib.contextmanager
    def draw(self, index: int, seed: int = 0) -> Iterator[None]:
        """The model at draw ``index`` of the sequence ``seed``, until exit; its weights come back bit by bit."""
        check_draw(index, seed, self.num_draws)
        with self._holding(lambda name: self.pieces(name, index, seed)):
            yield

    @contextlib.contextmanager
    def mean(self) -> Iterator[None]:
        """The model at the posterior mean, until exit."""
        with self._holding(self.mean_pieces):
            yield

    def find_tensors(self) -> None:
        """Take up the model's tensors: ``model.to`` makes other buffers, and loading by assignment other Parameters."""
        model = self.model
        own: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
        own |= dict(model.named_buffers(remove_duplicate=False))
        for known in (self._tensors, self._shared):
            known.update({name: own.get(name, tensor) for name, tensor in known.items()})

    def random_parameters(self) -> Iterable[nn.Parameter]:
        """The Parameters that a draw writes."""
        self.find_tensors()
        return [tensor for tensor in self._tensors.values() if isinstance(tensor, nn.Parameter)]

    @contextlib.contextmanager
    def _holding(self, pieces: Callable[[str], Iterable[Tensor]]) -> Iterator[None]:
        kept: dict[str, Pieces] = {}
        with alone(self.model):
            self.find_tensors()
            try:
                with torch.no_grad():
                    for name, tensor in self._tensors.items():
                        kept[name] = self._kept(name, tensor)
                        write(tensor, pieces(name))
                torch.clear_autocast_cache()  # which keeps low-precision copies of what it has seen
                yield
            finally:
                with torch.no_grad():
                    for name, back in kept.items():
                        write(self._tensors[name], back())
                torch.clear_autocast_cache()

    def _kept(self, name: str, tensor: Tensor) -> Pieces:
        """How to get back what stands in the model: by reading it again if it has the same bits, else from a copy."""
        if tensor.device.type == "cpu":  # elsewhere the host has room, and comparing would wait for the device
            for again in self.standing(name):
                if same_bits(tensor, again()):
                    return again
        copy = tensor.detach().to("cpu", copy=True).reshape(-1)
        return lambda: [copy]

    # -- what draws do not write -------------------------------------------------------------------------------------

    def is_of_present_weights(self) -> bool:
        """Whether the tensors that all draws share are as they were, or are so again after another posterior's draw."""
        self.find_tensors()
        for name, tensor in self._shared.items():
            version, (dtype, found) = _version(tensor), self._digests[name]
            if version != self._versions[name]:
                if tensor.dtype == dtype and digest(tensor) != found:  # in another precision it may be
                    return False
                self._versions[name] = version
        return True

    def shared_record(self) -> dict[str, list[str]]:
        """Return dtype and digest of each tensor that all draws share, for `check_shared` of a reload.

        Raises:
            ValueError: one has changed since.
        """
        if not self.is_of_present_weights():
            raise ValueError(f"Weights that all draws of this {type(self).__name__} share have changed: it is stale.")
        return {name: [str(tensor.dtype), digest(tensor)] for name, tensor in self._shared.items()}


def check_shared(own: Mapping[str, Tensor], record: Mapping[str, Any], written: Iterable[str], where: str) -> None:
    """Check that a model is the one that a posterior was saved with; in another precision it may be.

    Args:
        own: the model's tensors by name.
        record: what `shared_record` gave.
        written: names of the tensors that draws write.
        where: the file, for the error.

    Raises:
        ValueError: it is not.
    """
    missing = [name for name in (*record, *written) if name not in own]
    there = {name: entry for name, entry in record.items() if name in own}
    changed = [n for n, (dtype, found) in there.items() if str(own[n].dtype) == dtype and digest(own[n]) != found]
    if missing or changed:
        raise ValueError(
            f"{where} goes with another model: `model` lacks {missing[:3]} ({len(missing)}) and has other values in "
            f"{changed[:3]} ({len(changed)}). Load the model that it was saved with."
        )


def _version(tensor: Tensor) -> tuple[int, int]:
    """Which tensor it is, and how often it was written; one that was made in inference mode does not count."""
    return id(tensor), 0 if tensor.is_inference() else tensor._version
