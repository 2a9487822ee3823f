"""What INT8 does to each layer's outputs on the calibration inputs, and what is decided by it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..posteriors import PointPosterior
from .codes import Codes
from .layers import QuantizedLayer, product
from .noise import Noise

Inputs = Mapping[str, Any] | Tensor


@dataclass
class Measured:
    """Sums of squares of one layer over the calibration inputs.

    Attributes:
        output, error: of the outputs, and of what rounding the weight changes, both at the mean.
        spread, noise: of what one draw changes, and of what INT8 arithmetic adds to it; of a layer without noise, of
            the outputs, and of what INT8 arithmetic changes.
        after_random: whether a random layer ran before.
    """

    output: float = 0.0
    error: float = 0.0
    spread: float = 0.0
    noise: float = 0.0
    after_random: bool = False
    is_called: bool = False

    @property
    def relative_error(self) -> float | None:
        """None if the layer was not called."""
        return _ratio(self.error, self.output) if self.is_called else None

    @property
    def relative_noise(self) -> float | None:
        """None if there is no INT8 arithmetic for the layer, or it was not called."""
        return None if self.spread == self.noise == 0 else _ratio(self.noise, self.spread)


def _ratio(part: float, whole: float) -> float:
    if part == 0:
        return 0.0
    return math.sqrt(part / whole) if whole > 0 else math.inf


class Probe:
    """Compares each layer's own output with that of its INT8 forms, while the float model runs at its mean.

    Args:
        model: with its float weights.
        kinds: layers that can hold INT8.
        codes: by layer, those of its weight.
        names: by layer, the name of its weight in ``noise``.
        noise: of the posterior.
    """

    def __init__(
        self,
        model: nn.Module,
        kinds: Mapping[str, type[QuantizedLayer]],
        codes: Mapping[str, Codes],
        names: Mapping[str, str],
        noise: Noise,
    ) -> None:
        self.model, self.kinds, self.codes, self.names, self.noise = model, kinds, codes, names, noise
        self.measured = {name: Measured() for name in kinds}
        self._is_busy = self._after_random = False

    def run(self, inputs: Sequence[Inputs]) -> dict[str, Measured]:
        """One pass over the inputs."""
        with self._hooks():
            for batch in inputs:
                self._after_random = False
                for _ in PointPosterior(self.model).passes(batch, num_samples=1):
                    pass
        return self.measured

    @contextmanager
    def _hooks(self) -> Iterator[None]:
        random = {name.rpartition(".")[0] for name in self.noise.names}
        with ExitStack() as stack:
            for name, module in self.model.named_modules():
                if name in self.kinds:
                    hook = functools.partial(self._compare, name)
                    stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
                if name in random or self.names.get(name) in self.noise.names:
                    stack.callback(module.register_forward_hook(self._note_random).remove)
            yield

    def _note_random(self, module: nn.Module, args: Any, output: Any) -> None:
        self._after_random = self._after_random or not self._is_busy

    def _compare(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        if self._is_busy:  # by the calls below
            return
        self._is_busy = True
        try:
            self._measure(name, output, functools.partial(_call, module, args, kwargs), module, args)
        finally:
            self._is_busy = False

    def _measure(
        self, name: str, output: Tensor, call: Callable[[Tensor], Tensor], module: nn.Module, args: tuple[Any, ...]
    ) -> None:
        measured, codes, kind = self.measured[name], self.codes[name], self.kinds[name]
        measured.is_called, measured.after_random = True, measured.after_random or self._after_random
        rounded = call(codes.dequantize())
        measured.output += _squares(output)
        measured.error += _squares(rounded - output)
        if not (kind.multiplies and args and output.numel()):
            return
        reference, base, coded = output, None, codes
        if self.names[name] in self.noise.names:
            weight, coded = self._draw(name, kind.axis)
            reference, base = call(weight), rounded
        found = product(args[0], coded, getattr(module, "bias", None), kind.axis)
        measured.noise += _squares(found - reference)
        measured.spread += _squares(reference if base is None else reference - base)

    def _draw(self, name: str, axis: int) -> tuple[Tensor, Codes]:
        """The weight under draw 0, and the codes of it."""
        mean, deviation = self.codes[name].dequantize(), self.noise.deviation(self.names[name], 0, 0)
        return mean + deviation, Codes.of(mean + deviation, axis)


def _call(module: nn.Module, args: Any, kwargs: Any, weight: Tensor) -> Tensor:
    own: Any = module._parameters["weight"]
    found: Tensor = torch.func.functional_call(module, {"weight": weight.to(own.dtype)}, args, kwargs)
    return found


def _squares(tensor: Tensor) -> float:
    return float(tensor.double().square().sum())


def as_batches(calibration_inputs: Inputs | Iterable[Inputs]) -> list[Inputs]:
    """Return what `forward` takes, or several of it.

    Raises:
        TypeError: an argument is of a wrong kind.
        ValueError: neither, or none.
    """
    if isinstance(calibration_inputs, Tensor | Mapping):
        return [calibration_inputs]
    if isinstance(calibration_inputs, str) or not isinstance(calibration_inputs, Iterable):
        raise TypeError(
            "`calibration_inputs` must be a tensor, a mapping of names to tensors, or an iterable of them, got "
            f"{type(calibration_inputs).__name__}."
        )
    batches = list(calibration_inputs)
    wrong = next((batch for batch in batches if not isinstance(batch, Tensor | Mapping)), None)
    if wrong is not None:
        raise TypeError(
            "Each of `calibration_inputs` must be a tensor or a mapping of names to tensors, got "
            f"{type(wrong).__name__}: leave labels out, or give {{name: tensor}}."
        )
    if not batches:
        raise ValueError("`calibration_inputs` is empty: give at least one batch of what the model's forward takes.")
    return batches
