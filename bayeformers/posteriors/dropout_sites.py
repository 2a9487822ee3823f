"""Where a model drops units, and a pass in which what is dropped is a function of a key.

Modules that drop are put into training mode one by one, so that their own code asks for dropout; all others stay in
``eval()``. A function mode of this thread then answers every call of torch's dropout and of its attention.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import TorchFunctionMode

from ..checks import is_real
from ..forward import batch_size, rows
from .dropout_masks import keeps, mixed, row_words, words

__all__ = ["Dropping", "Masks", "Pass", "check_model", "check_running", "dropout_rates", "switch_on"]

Masks = Literal["element", "unit"]

_ALPHA = (nn.AlphaDropout, nn.FeatureAlphaDropout)
_CHANNELS = {functional.dropout1d: 1, functional.dropout2d: 2, functional.dropout3d: 3}
_HELD = ("eager", "sdpa")
_CACHES = ("past_key_values", "cache_params")
_LAYER_DROP = "layerdrop"
_MARK = "is_of_dropout"
_NOTHING = types.SimpleNamespace()


# ---------------------------------------------------------------------------------------------------------- the model


def dropout_rates(model: nn.Module) -> dict[str, float]:
    """Every rate that the modules hold, by its name in the model, those of 0 included."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.RNNBase):
            continue
        if isinstance(module, _DropoutNd):
            found[name] = float(module.p)
            continue
        config = vars(getattr(module, "config", None) or _NOTHING)
        read = {key: config[key] for key in _names_read(module) if key in config and not hasattr(module, key)}
        held = {**vars(module), **read}
        found |= {f"{name}.{key}": float(value) for key, value in held.items() if _is_rate(key, value)}
    return found


def sites(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules whose forward may drop, by name."""
    for name, module in model.named_modules():
        if isinstance(module, nn.RNNBase):
            continue
        has_child = any(isinstance(child, _DropoutNd) for child in module.children())
        has_rate = any(_is_rate(key, value) for key, value in vars(module).items())
        if isinstance(module, _DropoutNd) or has_child or has_rate or any(map(_is_name, _names_read(module))):
            yield name, module


def _names_read(module: nn.Module) -> tuple[str, ...]:
    """Attributes and functions that the forward of the module's class names."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return () if code is None else code.co_names


def _is_name(name: str) -> bool:
    """Of a rate or a function: "dropout", "attention_dropout", "resid_pdrop", "attn_drop"; not of a dropped path."""
    return "dropout" in name or "pdrop" in name or name.endswith("_drop")


def _is_rate(name: str, value: Any) -> bool:
    return _is_name(name) and is_real(value) and 0 <= value <= 1


def check_model(model: nn.Module, rate: float | None) -> None:
    """A model whose dropout can be held; ``rate`` is what replaces its rates, or None.

    Raises:
        ValueError: it has no dropout, or dropout that nobody can hold.
    """
    for name, module in model.named_modules():
        reason = _unheld(module)
        if reason is not None:
            raise ValueError(
                f"`model` cannot have draws of its dropout: {name or 'it'} ({type(module).__name__}) {reason}"
            )
    rates, may_drop = dropout_rates(model), [name for name, _ in sites(model)]
    if not may_drop:
        raise ValueError(f"`model` ({type(model).__name__}) has no dropout.")
    if rate is None and rates and not any(rates.values()):
        raise ValueError(
            f"`model` ({type(model).__name__}) has dropout of rate 0 only: it was trained without. Give a `rate`."
        )


def _unheld(module: nn.Module) -> str | None:
    if isinstance(module, nn.RNNBase) and module.dropout and module.num_layers > 1:
        return "drops between its layers, inside of torch's own kernel: set its `dropout` to 0."
    if isinstance(module, _ALPHA):
        return "is alpha dropout, which sets units to another value than 0."
    if (
        isinstance(module, torch.jit.ScriptModule)
        or module._compiled_call_impl is not None
        or hasattr(module, "_orig_mod")
    ):
        return "is compiled or scripted: give the model itself."
    is_own_kind = "Dropout" in type(module).__name__ and not isinstance(module, _DropoutNd)
    if is_own_kind and not any(isinstance(child, _DropoutNd) for child in module.modules()):
        return "is a dropout of its own kind."
    for owner in (module, getattr(module, "config", None)):
        names = [key for key in _names_read(module) if _LAYER_DROP in key]
        if any(is_real(value := getattr(owner, key, 0)) and value > 0 for key in names):
            return "leaves out whole layers (LayerDrop) in training mode: set `layerdrop`, or the config's, to 0."
    return None


def check_running(model: nn.Module) -> None:
    """Raise ValueError where attention runs in a kernel that draws its own numbers."""
    for _, module in sites(model):
        kernel = getattr(getattr(module, "config", None), "_attn_implementation", None)
        if isinstance(kernel, str) and kernel not in _HELD:
            raise ValueError(
                f"`model` runs its attention by {kernel!r}, which would drop by numbers of its own: call "
                '`model.set_attn_implementation("sdpa")`.'
            )


# ----------------------------------------------------------------------------------------------------------- one pass


@dataclass(eq=False)
class Pass:
    """One draw's passes: which numbers are used where.

    Attributes:
        key: of the draw.
        masks: the kind.
        rate: in place of the model's rates, or None.
        replaces_zero: whether also in place of rates of 0.
        axes: of every kind of inputs, what passes found out: in which axis each place has the rows; None: in none.
    """

    key: str
    masks: Masks
    rate: float | None
    replaces_zero: bool
    axes: dict[Any, dict[str, int | None]]
    _places: list[str] = field(default_factory=lambda: [""])
    _calls: list[int] = field(default_factory=lambda: [0])
    _counts: Counter[str] = field(default_factory=Counter)
    _rows: Tensor | None = None
    _axis: Mapping[str, int | None] = field(default_factory=dict)
    _shapes: dict[str, tuple[int, ...]] | None = None
    _num_masks: int = 0
    _in_attention: int = 0

    def around_model(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The model's own forward, which begins a pass; ValueError where nothing was dropped in it."""
        if self.masks == "element":
            inputs = _by_name(forward, args, kwargs)
            kind = tuple(
                (name, value.ndim if isinstance(value, Tensor) else type(value)) for name, value in inputs.items()
            )
            if kind not in self.axes:
                self.axes[kind] = self._find_rows(forward, args, kwargs)
            self._axis, self._rows = self.axes[kind], row_words(inputs)
        output = self._run(forward, args, kwargs)
        if not self._num_masks:
            told = " but attention weights, which `masks`='unit' leaves alone" if self.masks == "unit" else ""
            raise ValueError(f"The model dropped nothing{told}: its draws are all the same.")
        return output

    def _run(self, forward: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        self._places, self._calls, self._counts, self._num_masks = [""], [0], Counter(), 0
        return forward(*args, **kwargs)

    def _find_rows(
        self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> dict[str, int | None]:
        """By place, the axis that doubles with the batch: the first example is run two and four times over."""
        if any(kwargs.get(name) is not None for name in _CACHES):
            raise ValueError("`masks`='element' has no draws of a generation with a cache: use 'unit'.")
        size, shapes = batch_size((*args, *kwargs.values())), []
        for count in (2, 4):
            part = torch.zeros(count, dtype=torch.long)
            self._shapes = {}
            try:
                self._run(forward, rows(args, part, size), rows(kwargs, part, size))  # type: ignore[arg-type]
            finally:
                found, self._shapes = self._shapes, None
            shapes.append(found)
        return {place: _doubled(two, shapes[1].get(place, ())) for place, two in shapes[0].items()}

    def around(self, name: str, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The forward of a module that drops."""
        self._places.append(name)
        self._calls.append(0)
        try:
            return forward(*args, **kwargs)
        finally:
            self._places.pop()
            self._calls.pop()

    def rate_of(self, own: float) -> float:
        """The rate in force, of a place with a rate of its own."""
        return own if self.rate is None or not (own or self.replaces_zero) else self.rate

    def dropped(self, values: Tensor, own_rate: float, *, channels: int = 0) -> Tensor:
        """Return ``values`` with a part at 0 and the rest divided by 1 - rate.

        Args:
            values: of any shape, rows first.
            own_rate: the place's own rate.
            channels: of dropout of whole channels, how many axes stand behind theirs.
        """
        rate = self.rate_of(own_rate)
        if rate == 0 or (self.masks == "unit" and self._is_attention(values)):
            return values
        if rate == 1:
            return values * 0
        place = self._next()
        if self._shapes is not None:
            self._shapes[place] = tuple(values.shape)
            return values
        sizes = values.shape[: values.ndim - channels]
        axes = self._words(place, sizes, values.device)
        lengths = [1 if own is None else size for size, own in zip(sizes, axes, strict=True)]
        keep = keeps(rate, axes).reshape(*lengths, *[1] * channels)
        self._num_masks += 1
        return values * keep.to(values.dtype) / (1 - rate)  # so that the rounding of 1 / (1 - rate) is no bias

    def _words(self, place: str, sizes: Sequence[int], device: torch.device) -> list[Tensor | None]:
        """Of every axis; None of those along which all share their fate."""
        key, rank = f"{self.key}/{place}", len(sizes)
        own = [words(f"{key}/{axis}", size, device) for axis, size in enumerate(sizes)]
        if self.masks == "unit":
            return [None if self._is_shared(axis, rank) else its for axis, its in enumerate(own)]
        if place not in self._axis:
            raise ValueError(
                f"`masks`='element' drops in a forward of the whole model alone, got one of {place!r} by itself, or by "
                "another way than before: use 'unit'."
            )
        axis = self._axis[place]
        if axis is not None:
            own[axis] = self._of_rows(key, sizes[axis], device)
        return list(own)

    def _is_shared(self, axis: int, rank: int) -> bool:
        """Whether along rows and positions; of more than three axes, such as an image's, along the rows alone."""
        return axis < rank - 1 if rank <= 3 else axis == 0

    def _is_attention(self, values: Tensor) -> bool:
        return self._in_attention > 0 or (values.ndim > 3 and "att" in self._places[-1].lower())

    def _next(self) -> str:
        """One call of dropout: its number among those of the module, and of "element" that of the module's call."""
        self._calls[-1] += 1
        place = f"{self._places[-1]}/{self._calls[-1]}"
        if self.masks == "element":
            self._counts[place] += 1
            place = f"{place}/{self._counts[place]}"
        return place

    def _of_rows(self, key: str, length: int, device: torch.device) -> Tensor:
        """Words of the examples, or of each of their heads, choices or windows."""
        count = 0 if self._rows is None else len(self._rows)
        if self._rows is None or count == 0 or length % count:
            raise ValueError(f"`masks`='element' found {length} rows where the batch has {count}: use 'unit'.")
        each = length // count
        own = self._rows.to(device) ^ words(f"{key}/rows", 1, device)
        return mixed(own.repeat_interleave(each) ^ words(f"{key}/parts", each, device).repeat(count))


def _doubled(two: tuple[int, ...], four: tuple[int, ...]) -> int | None:
    """The first axis that is twice as long for twice as many rows."""
    return next((axis for axis, (a, b) in enumerate(zip(two, four, strict=False)) if b == 2 * a and a), None)


def _by_name(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What the model is called with, positional arguments by their names too."""
    names = list(inspect.signature(forward).parameters)
    return {**dict(zip(names, args, strict=False)), **kwargs}


def switch_on(
    model: nn.Module, state: Pass, counterpart: Callable[[nn.Module], nn.Module] = lambda module: module
) -> list[tuple[nn.Module, dict[str, Any]]]:
    """Put every module that drops into training mode, and let ``state`` know where a pass is.

    Args:
        model: the model.
        state: of the draw.
        counterpart: from a module of the model to the one that is called.

    Returns:
        The changed modules with their attributes as they were, in order.
    """
    kept = []
    wrapped: list[tuple[nn.Module, Callable[..., Any]]] = [
        (counterpart(module), functools.partial(state.around, name)) for name, module in sites(model)
    ]
    for module, handle in [*wrapped, (counterpart(model), state.around_model)]:
        own = vars(module)
        kept.append((module, dict(own)))
        own["training"] = own["training"] or handle != state.around_model
        forward = module.forward
        while getattr(forward, _MARK, state) is not state:  # of a draw around this one, which this one replaces
            forward = forward.__wrapped__  # type: ignore[attr-defined]
        own["forward"] = _wrapped(forward, handle, state)
    return kept


def _wrapped(forward: Callable[..., Any], handle: Callable[..., Any], state: Pass) -> Callable[..., Any]:
    @functools.wraps(forward)  # transformers inspects the signature
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return handle(forward, args, kwargs)

    setattr(wrapper, _MARK, state)
    return wrapper


class Dropping(TorchFunctionMode):
    """While entered, this thread's dropout is that of ``state``."""

    def __init__(self, state: Pass) -> None:
        super().__init__()
        self._state = state

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.dropout:
            return self._dropout(*args, **kwargs)
        if func in _CHANNELS:
            return self._dropout(*args, **{**kwargs, "channels": _CHANNELS[func]})
        if func is functional.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        if func is functional.multi_head_attention_forward:
            self._state._in_attention += 1
            try:
                with self:
                    return _undispatched()(*args, **kwargs)
            finally:
                self._state._in_attention -= 1
        return func(*args, **kwargs)

    def _dropout(
        self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False, channels: int = 0
    ) -> Tensor:
        return self._state.dropped(input, p, channels=channels) if training else input

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        state = self._state
        if state.masks == "unit" or state.rate_of(dropout_p) == 0 or len(state._places) == 1:
            with torch._C.DisableTorchFunction():  # nor does a draw around this one add its own
                return functional.scaled_dot_product_attention(
                    query, key, value, attn_mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa
                )
        if enable_gqa:
            key, value = (t.repeat_interleave(query.shape[-3] // t.shape[-3], -3) for t in (key, value))
        scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
        if is_causal:
            scores = scores.masked_fill(torch.ones_like(scores[..., :, :], dtype=torch.bool).triu(1), -torch.inf)
        if attn_mask is not None:
            is_bool = attn_mask.dtype == torch.bool
            scores = scores.masked_fill(~attn_mask, -torch.inf) if is_bool else scores + attn_mask
        weights = scores.softmax(-1).masked_fill((scores == -torch.inf).all(-1, keepdim=True), 0.0)
        return state.dropped(weights, dropout_p) @ value


@functools.cache
def _undispatched() -> Callable[..., Any]:
    """Torch's attention over heads, which calls its parts itself: asked as it is, it would be this mode's again."""
    original = functional.multi_head_attention_forward
    own = {**original.__globals__, "has_torch_function": lambda _: False}
    copied = types.FunctionType(original.__code__, own, original.__name__, original.__defaults__, original.__closure__)
    copied.__kwdefaults__ = original.__kwdefaults__
    return copied
