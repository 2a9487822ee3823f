"""S networks of a posterior that generate together: in one batch where that is possible, else one after the other."""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import GenerationMixin

from ..forward import call, logits_of, mapped
from ..posteriors import Posterior
from ..posteriors.base import BasePosterior
from ..sampling.batched import FAILURES, MAX_BYTES, BatchedDraws, CannotBatch, repeated, same_output
from ..sampling.views import View, itself, lend, private_view, undisturbed

logger = logging.getLogger(__name__)

_verdicts: WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], str | None]] = WeakKeyDictionary()
"""Whether draws of a model go into one batch, by its modules and the random set: None, or why not."""


class Networks:
    """S draws of a posterior, ready to run step by step.

    Args:
        posterior: whose draws.
        view: a private view of its model, or the model itself.
        indices: which draws.
        seed: of the sequence of draws.

    Attributes:
        model: what generates.
        generator: the module of it that has transformers' ``generate``.
        batched: the view's random layers for all draws at once; None: the draws run one after the other.
    """

    def __init__(self, posterior: Posterior, view: View, indices: range, seed: int) -> None:
        self.posterior, self.view, self.indices, self.seed = posterior, view, indices, seed
        self.model = view.model
        self.generator = generator_of(view.model)
        self.batched: BatchedDraws | None = None
        self._caches: tuple[Any, list[Any]] = None, []
        self._verdict: tuple[dict[tuple[Any, ...], str | None], tuple[Any, ...]] = {}, ()

    def generate(self, **arguments: Any) -> Tensor:
        """Sequences by the ``generate`` of the view's model."""
        model: Any = self.model
        sequences: Tensor = model.generate(**arguments)
        return sequences

    def __len__(self) -> int:
        return len(self.indices)

    @contextlib.contextmanager
    def draw(self, index: int) -> Iterator[None]:
        """One draw, in the view or in the model itself."""
        posterior = self.posterior
        if self.view.is_private and isinstance(posterior, BasePosterior) and posterior.draws_in_views:
            with undisturbed(posterior.model), posterior.draw_in(self.view, index, self.seed):
                yield
        else:
            with itself(posterior.model), posterior.draw(index, self.seed):
                yield

    def batch(self, inputs: Mapping[str, Any]) -> str | None:
        """Put the draws into one batch; on first use they are compared with the loop.

        Args:
            inputs: of B rows, on which they are compared.

        Returns:
            Why they stay apart; None: they are in one batch.
        """
        posterior = self.posterior
        if not (self.view.is_private and isinstance(posterior, BasePosterior) and posterior.shares_prefix):
            return "the posterior does not draw in a private view, or draws more than weights"
        random = list(posterior.random_parameters())
        try:
            batched = BatchedDraws(self.view, random)
        except CannotBatch as error:
            return str(error)
        if batched.bytes_per_draw * len(self) > MAX_BYTES:
            return f"the weights of {len(self)} draws need more than {MAX_BYTES} bytes"
        known = _verdicts.setdefault(posterior.model, {})
        key = frozenset(map(id, posterior.model.modules())), frozenset(map(id, random))
        if known.get(key) is not None:
            return known[key]
        batched.read(map(self.draw, self.indices), in_view=posterior.draws_in_views)
        if key not in known:
            known[key] = self._compared(batched, inputs)
            if known[key] is not None:
                logger.info("Draws of %s generate one by one: %s.", type(posterior.model).__name__, known[key])
        self.batched = batched if known[key] is None else None
        self._verdict = known, key
        return known[key]

    def give_up(self, reason: str) -> None:
        """Draws of this model stay apart from now on."""
        known, key = self._verdict
        known[key] = reason

    def _compared(self, batched: BatchedDraws, inputs: Mapping[str, Any]) -> str | None:
        """Why the batch is not to be trusted on these inputs, by its first and last draw; None: it is."""
        count, size = len(self), rows_of(inputs)
        try:
            with torch.no_grad():
                with batched.installed([count * size]):
                    whole = logits_of(call(self.model, repeated(inputs, size, count)))
                for place in {0, count - 1}:
                    with self.draw(self.indices[place]):
                        alone = logits_of(call(self.model, inputs))
                    if not same_output(whole[place * size : (place + 1) * size], alone):
                        return "the batch differed from the loop"
        except FAILURES as error:
            return f"the batch failed with {error!r}"
        return None

    def installed(self, *sizes: int) -> AbstractContextManager[None]:
        """The draws are in the view until exit, if they go in one batch; ``sizes``: what number of inputs there are."""
        if self.batched is None:
            return contextlib.nullcontext()
        return self.batched.installed([len(self) * size for size in sizes])

    def run(self, forward: Callable[..., Any], arguments: Mapping[str, Any], size: int) -> Any:
        """One step of all networks.

        Args:
            forward: of the generator, or of its encoder.
            arguments: of R rows; what the encoder gave has those of all draws, draw-major, and so has the cache, or
                those of the first draw.
            size: number R of rows of one draw.

        Returns:
            The output, of S * R rows.
        """
        if self.batched is not None or len(self) == 1:
            with self.draw(self.indices[0]) if self.batched is None else contextlib.nullcontext():
                return forward(**expanded(arguments, size, len(self)))
        caches = self._caches_beside(arguments.get("past_key_values"))
        outputs = []
        for place, index in enumerate(self.indices):
            own = _of_draw(arguments, place, size)
            if caches:
                own["past_key_values"] = caches[place]
            with self.draw(index):
                outputs.append(forward(**own))
        return _joined(outputs)

    def _caches_beside(self, cache: Any) -> list[Any]:
        """A cache for each draw: the one that `generate` made is the first's."""
        if cache is None:
            return []
        known, caches = self._caches
        if known is not cache:
            caches = [cache, *(copy.deepcopy(cache) for _ in self.indices[1:])]
            self._caches = cache, caches
        return caches

    def reorder(self, cache: Any, order: Tensor) -> None:
        """Beams change places: of all draws alike.

        Args:
            cache: the one that `generate` knows.
            order: (R,), which row comes to each place.
        """
        kind = type(cache).reorder_cache
        if self.batched is not None:
            shift = torch.arange(len(self), device=order.device)[:, None] * len(order)
            kind(cache, (shift + order).flatten())
        else:
            for own in self._caches_beside(cache) or [cache]:
                kind(own, order)


@contextlib.contextmanager
def networks(posterior: Posterior, indices: range, seed: int) -> Iterator[Networks]:
    """Networks in a private view, or where there can be none in the model itself, for this caller alone until exit.

    Args:
        posterior: whose draws.
        indices: which draws.
        seed: of the sequence of draws.

    Yields:
        The networks.

    Raises:
        CannotBatch: their batch failed inside, and is not made again.
    """
    view = None
    if isinstance(posterior, BasePosterior):
        own = {id(p): room for p, room in posterior.own_parameters().items()} if posterior.draws_in_views else {}
        view = private_view(posterior.model, own)
    if view is not None:
        if not posterior.draws_in_views:  # type: ignore[attr-defined]
            lend(posterior.model)
        many = Networks(posterior, view, indices, seed)
        try:
            yield many
        except CannotBatch as error:  # at a step that the comparison did not see
            many.give_up(str(error))
            raise
    else:
        lend(posterior.model)
        with itself(posterior.model) as whole:
            yield Networks(posterior, whole, indices, seed)


def generator_of(model: nn.Module) -> Any:
    """The outermost module that has transformers' ``generate``, found through wrappers such as PEFT's; None: none."""
    return next((module for module in model.modules() if isinstance(module, GenerationMixin)), None)


@contextlib.contextmanager
def standing_in(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Each module has this forward until exit."""
    kept = {module: vars(module).get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            vars(module)["forward"] = forward
        yield
    finally:
        for module, own in kept.items():
            if own is None:
                vars(module).pop("forward", None)
            else:
                vars(module)["forward"] = own


def rows_of(arguments: Mapping[str, Any]) -> int:
    """Return the number of rows that a forward is given.

    Raises:
        ValueError: there is none.
    """
    for name in ("decoder_input_ids", "input_ids", "inputs_embeds", "decoder_inputs_embeds", "input_features"):
        if isinstance(arguments.get(name), Tensor):
            return len(arguments[name])
    for value in arguments.values():
        if isinstance(value, Tensor) and value.ndim > 1:
            return len(value)
    raise ValueError(f"The model is given no rows, only {sorted(arguments)}.")


def expanded(arguments: Mapping[str, Any], size: int, times: int) -> dict[str, Any]:
    """Return arguments of ``size`` rows for ``times`` draws; what the encoder gave has rows of all draws already.

    Args:
        arguments: of the generator's forward, by name.
        size: number R of rows.
        times: number S of draws.
    """
    found = {}
    for name, value in arguments.items():
        if name == "position_ids" and isinstance(value, Tensor) and value.ndim == 3:  # (3, R, T) of some vision models
            found[name] = value.repeat(1, times, 1)
        elif name in ("encoder_outputs", "past_key_values"):
            found[name] = value
        else:
            found[name] = mapped(value, functools.partial(_repeat, size=size, times=times))
    return found


def _repeat(tensor: Tensor, size: int, times: int) -> Tensor:
    if tensor.ndim < 2 or len(tensor) != size:
        return tensor
    return tensor.repeat(times, *[1] * (tensor.ndim - 1))


def _of_draw(arguments: Mapping[str, Any], place: int, size: int) -> dict[str, Any]:
    """The arguments for one draw, which has its own rows of what the encoder gave."""
    found, encoded = dict(arguments), arguments.get("encoder_outputs")
    if encoded is not None:
        part = slice(place * size, (place + 1) * size)
        rows = {key: mapped(value, lambda t: t[part] if t.ndim > 1 else t) for key, value in encoded.items()}
        found["encoder_outputs"] = type(encoded)(**rows)
    return found


def _joined(outputs: list[Any]) -> Any:
    """The draws' outputs as one of S * R rows; the cache is the first's."""
    first = outputs[0]
    fields = {}
    for name in ("logits", "last_hidden_state"):
        if name in first:
            fields[name] = torch.cat([getattr(output, name) for output in outputs])
    if first.get("past_key_values") is not None:
        fields["past_key_values"] = first["past_key_values"]
    return type(first)(**fields)
