"""The noise of a draw, tensor by tensor: a pure function of (seed, draw index, tensor name, element).

The same key gives the same values for every batch, rank, token of `generate` and after a reload, whatever was drawn
before, on every device. (Noise of the versions before 3, which saved posteriors keep, differs between CPU and GPU.)
"""

from __future__ import annotations

import hashlib
import math
import weakref
from collections.abc import Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..sampling import philox
from ..sampling.generators import NOISE_VERSION, keyed_generator

_INT32 = 0xFFFFFFFF


@dataclass(frozen=True)
class TensorSpec:
    """What the noise of a tensor depends on besides the draw; tied tensors share one.

    Attributes:
        name: first name that owns the tensor in the unwrapped model: the key of its noise.
        by_row: noise addressable by row (an Embedding owns the tensor), so that a lookup needs no whole table.
        padding_idx: row without noise and without KL.
        untrained_idx: where there is no such row, one whose lookups give no gradient: torch's padding row, of a table
            whose tied head predicts that token.
        named: False while a hand-built layer has only its parameter's name, which is not unique in a model.
        noise_version: which draws, see `bayeformers.sampling.generators`.
    """

    is_shared_by_views: ClassVar[bool] = True

    name: str
    by_row: bool = False
    padding_idx: int | None = None
    named: bool = False
    untrained_idx: int | None = None
    noise_version: int = NOISE_VERSION

    @property
    def unlearned_row(self) -> int | None:
        """The row whose lookups give no gradient."""
        return self.untrained_idx if self.padding_idx is None else self.padding_idx


@dataclass(frozen=True)
class Kept:
    """What a tensor keeps of itself in a held draw.

    Attributes:
        stamp: of the mean and the scale that it was made of.
        value: the tensor's value, or a table that is filled as its rows are asked for.
        made: (rows, 1), 1 for the rows that are there; None: all of them.
    """

    stamp: tuple[Any, ...]
    value: Tensor
    made: Tensor | None = None


class Handed:
    """Tensors of a draw as attributes: of a dictionary a compiler would see the entries of one moment only."""


class Draw:
    """One draw of all weights of a model: the noise and the signs of each tensor, made when asked for.

    Attributes:
        seed, index: which draw.
        kept: tensor name -> what the tensor keeps of itself; None in a training draw, whose values live as long as
            autograd needs them. Either way the same tensor always gets the same value.
        handed: what compiled code reads of the draw, see `compiling`.
    """

    def __init__(self, seed: int, index: int = 0, *, keep: bool = True) -> None:
        self.seed, self.index = seed, index
        self.kept: dict[str, Kept] | None = {} if keep else None
        self.handed = Handed()
        self._noise: MutableMapping[str, Tensor] = {} if keep else weakref.WeakValueDictionary()

    def noise(self, spec: TensorSpec, like: Tensor, rows: Tensor | None = None) -> Tensor:
        """Return N(0, 1) in float32 for one tensor, or for some rows of a table alone; zero in the padding row.

        Args:
            spec: what the tensor's noise depends on.
            like: the whole tensor, whose shape and device the noise takes.
            rows: row numbers (n,) of a table, which give (n, width); None: all of it.
        """
        if rows is not None:
            return self._noise_of_rows(spec, like, rows)
        value = self._noise.get(spec.name)
        if value is None or value.shape != like.shape or value.device != like.device:
            value = self._make_noise(spec, like)
            if self.kept is None or torch.is_grad_enabled():  # else the tensor keeps its value instead
                self._noise[spec.name] = value
        return value

    def signs(self, spec: TensorSpec, axis: int, shape: tuple[int, int], device: torch.device) -> Tensor:
        """Return fair signs, -1 or 1, of one axis of a tensor: the same whenever this draw is asked for them.

        Args:
            spec: what the tensor's noise depends on.
            axis: of the tensor, each with signs of its own.
            shape: numbers of examples and features.
            device: where the signs are made.
        """
        return philox.signs(noise_key(self.seed, self.index, f"{spec.name}/signs{axis}"), shape, device)

    @property
    def nbytes(self) -> int:
        """Memory of the values that are kept."""
        kept = [entry.value for entry in list((self.kept or {}).values())]  # another thread may add to them
        return sum(value.numel() * value.element_size() for value in [*kept, *self._noise.values()])

    def blocks(self, spec: TensorSpec, like: Tensor) -> Iterator[tuple[slice, Tensor]] | None:
        """Return :meth:`noise` of a tensor of the CPU piece by piece, so that it is never there as a whole.

        Args:
            spec: what the tensor's noise depends on; its padding row is none here.
            like: the whole tensor.

        Returns:
            Where each piece lies in the flattened tensor, and its noise, whose memory the next one takes; None where
            the whole is at hand, or is made at once.
        """
        if spec.noise_version < 3 or like.device.type != "cpu" or spec.name in self._noise:
            return None
        return philox.blocks(noise_key(self.seed, self.index, spec.name), 0, like.numel())

    def _make_noise(self, spec: TensorSpec, like: Tensor) -> Tensor:
        if spec.by_row and spec.noise_version < 3:
            return self._noise_of_rows(spec, like, torch.arange(like.shape[0], device=like.device))
        version = spec.noise_version
        if torch.compiler.is_compiling():
            value: Tensor = traced_normal(str(self.seed), self.index, spec.name, list(like.shape), like.device, version)
        else:
            value = normal(noise_key(self.seed, self.index, spec.name, version), like.shape, like.device, version)
        if spec.padding_idx is not None:
            value[spec.padding_idx] = 0.0
        return value

    def _noise_of_rows(self, spec: TensorSpec, like: Tensor, rows: Tensor) -> Tensor:
        version, width = spec.noise_version, like.shape[1]
        if torch.compiler.is_compiling():
            noise: Tensor = traced_rows(str(self.seed), self.index, spec.name, rows, width, version)
        else:
            noise = rows_of(noise_key(self.seed, self.index, spec.name, version), rows, width, version)
        return _without_padding(noise, spec, rows)


class TracedDraw:
    """A training draw inside `torch.compile`: noise straight from torch's default generator, without graph breaks."""

    kept: ClassVar[None] = None

    def __init__(self) -> None:
        self._made: dict[Any, Tensor] = {}

    def noise(self, spec: TensorSpec, like: Tensor, rows: Tensor | None = None) -> Tensor:
        """Return the noise of one tensor, once per forward; rows are looked up in the whole, which the compiler fuses.

        Args:
            spec: the tensor's name and its padding row.
            like: the whole tensor, whose shape and device the noise takes.
            rows: row numbers of any shape (*) into a table, which give (*, width); None: all of it.
        """
        if spec.name not in self._made:
            numbers = torch.arange(like.shape[0], device=like.device)
            # on a CPU the compiler's own generator takes longer than all that it may be fused with
            own = like.device.type == "cpu" and not torch.compiler.is_exporting()
            eps = (
                torch.ops.bayeformers.fresh_normal(like.detach())
                if own
                else torch.randn_like(like, dtype=torch.float32)
            )
            self._made[spec.name] = _without_padding(eps, spec, numbers)
        return self._made[spec.name] if rows is None else F.embedding(rows, self._made[spec.name])

    def signs(self, spec: TensorSpec, axis: int, shape: tuple[int, int], device: torch.device) -> Tensor:
        """Return fair signs, -1 or 1, of one axis of a tensor, once per forward and shape.

        Args:
            spec: of the tensor, of which the name is used.
            axis: of the tensor, each with signs of its own.
            shape: numbers of examples and features.
            device: where the signs are made.
        """
        key = (spec.name, axis, shape)
        if key not in self._made:
            self._made[key] = torch.randint(2, shape, device=device, dtype=torch.float32) * 2 - 1
        return self._made[key]


class HandedDraw:
    """A held draw inside `torch.compile`: its values and its noise are inputs of the graph, see `compiling`.

    Attributes:
        layer, name: which tensor's it is.
        draw: the draw that is held.
    """

    kept: ClassVar[None] = None

    def __init__(self, layer: Any, name: str, draw: Draw) -> None:
        self.layer, self.name, self.draw = layer, name, draw

    def value(self, spec: TensorSpec) -> Tensor:
        """The tensor's value, where no gradient is asked for."""
        return self._handed("value", spec)

    def noise(self, spec: TensorSpec, like: Tensor, rows: Tensor | None = None) -> Tensor:
        """Return N(0, 1) for the tensor, or for some rows of a table.

        Args:
            spec: what the tensor's noise depends on.
            like: the whole tensor.
            rows: row numbers (n,) of a table, which give (n, width); None: all of it.
        """
        noise = self._handed("noise", spec)
        return noise if rows is None else F.embedding(rows, noise)

    def signs(self, spec: TensorSpec, axis: int, shape: tuple[int, int], device: torch.device) -> Tensor:
        """A held draw is one network, of which no estimator asks signs.

        Args:
            spec: what the tensor's noise depends on.
            axis: of the tensor.
            shape: numbers of examples and features.
            device: of the signs.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(f"The held draw of {spec.name!r} is one network, without signs.")

    def _handed(self, kind: str, spec: TensorSpec) -> Tensor:
        self.layer.hand_in(self.name, kind)
        value: Tensor = getattr(self.draw.handed, handed_name(kind, spec))
        return value


def handed_name(kind: str, spec: TensorSpec) -> str:
    """The attribute of `Handed` for a tensor's "value" or "noise"; of names with dots a compiler can make no guard."""
    return f"{kind} {spec.name}".replace("%", "%25").replace(".", "%2E")


def _without_padding(eps: Tensor, spec: TensorSpec, rows: Tensor) -> Tensor:
    if spec.padding_idx is None:
        return eps
    return eps.masked_fill((rows == spec.padding_idx)[:, None], 0.0)


def noise_key(seed: int, index: int, name: str, version: int = NOISE_VERSION) -> int:
    """Return the key of one tensor's noise in one draw: of 128 bits, of 64 before version 3.

    Args:
        seed: of the sequence of draws.
        index: of the draw in the sequence, from 0.
        name: of the tensor in the unwrapped model.
        version: of the noise, see `bayeformers.sampling.generators`.
    """
    text = f"{seed}/{index}/{name}"
    if version >= 3:
        return philox.key_of(text)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def normal(key: int, shape: Sequence[int], device: torch.device, version: int = NOISE_VERSION) -> Tensor:
    """Return N(0, 1) in float32, a function of the key alone.

    Args:
        key: from :func:`noise_key`, of the same version.
        shape: of the result, in any number of axes.
        device: of the result.
        version: of the noise, see `bayeformers.sampling.generators`.
    """
    if version >= 3:
        return philox.normal(key, tuple(shape), device)
    generator = keyed_generator(key, device, version)
    return torch.randn(*shape, generator=generator, device=device, dtype=torch.float32)


torch.library.define("bayeformers::fresh_normal", "(Tensor like) -> Tensor", tags=(torch.Tag.nondeterministic_seeded,))


@torch.library.impl("bayeformers::fresh_normal", "default")
def _(like: Tensor) -> Tensor:
    return torch.randn_like(like, dtype=torch.float32, memory_format=torch.contiguous_format)


@torch.library.register_fake("bayeformers::fresh_normal")  # type: ignore[untyped-decorator]
def _(like: Tensor) -> Tensor:
    return like.new_empty(like.shape, dtype=torch.float32)


@torch.library.custom_op("bayeformers::normal", mutates_args=())
def traced_normal(seed: str, index: int, name: str, shape: list[int], device: torch.device, version: int) -> Tensor:
    """Return :func:`normal` of :func:`noise_key`, opaque to a compiler.

    Args:
        seed: of the sequence of draws, as text, for it may have over 63 bits.
        index: of the draw in the sequence, from 0.
        name: of the tensor in the unwrapped model.
        shape: of the result, in any number of axes.
        device: where the generator runs.
        version: of the noise, see `bayeformers.sampling.generators`.
    """
    return normal(noise_key(int(seed), index, name, version), shape, device, version)


@traced_normal.register_fake
def _(seed: str, index: int, name: str, shape: list[int], device: torch.device, version: int) -> Tensor:
    return torch.empty(shape, device=device, dtype=torch.float32)


@torch.library.custom_op("bayeformers::normal_rows", mutates_args=())
def traced_rows(seed: str, index: int, name: str, rows: Tensor, width: int, version: int) -> Tensor:
    """Return :func:`rows_of` of :func:`noise_key`, opaque to a compiler.

    Args:
        seed: of the sequence of draws, as text, for it may have over 63 bits.
        index: of the draw in the sequence, from 0.
        name: of the tensor in the unwrapped model.
        rows: row numbers (n,).
        width: columns of the table.
        version: of the noise, see `bayeformers.sampling.generators`.
    """
    return rows_of(noise_key(int(seed), index, name, version), rows, width, version)


@traced_rows.register_fake
def _(seed: str, index: int, name: str, rows: Tensor, width: int, version: int) -> Tensor:
    return torch.empty(*rows.shape, width, device=rows.device, dtype=torch.float32)


def rows_of(key: int, rows: Tensor, width: int, version: int = NOISE_VERSION) -> Tensor:
    """Return N(0, 1) of the given rows of a table, without the rest of it.

    Args:
        key: from :func:`noise_key`, of the same version.
        rows: row numbers, any integer dtype.
        width: columns of the table.
        version: of the noise, see `bayeformers.sampling.generators`.

    Shape: ``rows`` (n,) -> (n, width), float32.
    """
    return philox.normal_rows(key, rows, width) if version >= 3 else normal_rows(key, rows, width)


def normal_rows(key: int, rows: Tensor, width: int) -> Tensor:
    """Return N(0, 1) of rows of a table before version 3, without the rest of it: element (r, c) hashes (key, r, c).

    Two rounds of a 32-bit mixer (Wellons' lowbias32) with 64 bits of state per row, then the inverse normal CDF of the
    upper 24 bits; |values| < 5.3. Element by element, so a row's noise does not depend on the other rows asked for.

    Args:
        key: 64 bits, from :func:`noise_key`.
        rows: row numbers, any integer dtype.
        width: columns of the table.

    Shape: ``rows`` (n,) -> (n, width), float32.
    """
    device = rows.device
    low, high = _signed(key & _INT32), _signed(key >> 32 & _INT32)
    row = rows.to(torch.int32)
    first, second = _mix(row ^ low), _mix(_mix(row ^ high) ^ low)
    column = torch.arange(width, dtype=torch.int32, device=device).mul_(_signed(0x9E3779B9))
    bits = _mix(_mix(first[:, None] + column).bitwise_xor_(second[:, None]))
    uniform = ((bits >> 8).to(torch.float32) + 0.5) * 2.0**-23  # exact in float32, strictly inside (-1, 1)
    return torch.erfinv(uniform) * math.sqrt(2.0)


def _mix(x: Tensor) -> Tensor:
    """lowbias32: a bijection of 32-bit integers whose every input bit flips each output bit about half of the time."""
    x = x ^ ((x >> 16) & 0xFFFF)  # the mask makes the shift of a signed integer logical
    x = x * 0x7FEB352D
    x = x ^ ((x >> 15) & 0x1FFFF)
    x = x * _signed(0x846CA68B)
    return x ^ ((x >> 16) & 0xFFFF)


def _signed(value: int) -> int:
    return value - 2**32 if value >= 2**31 else value
