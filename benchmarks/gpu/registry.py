"""Which checks there are, in their order, and how many seconds each of them may take on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from . import checks, speed
from .setup import MODELS, Setup

Numbers = dict[str, float]


@dataclass(frozen=True)
class Check:
    """One function; ``seconds`` is its limit, after which it is ended."""

    name: str
    seconds: float
    run: Callable[[Setup], Numbers]
    about: str


def _right(function: Callable[[Setup], Numbers], seconds: float = 15) -> Check:
    return Check(function.__name__, seconds, function, _first_line(function))


def _fast(function: Callable[..., Numbers], seconds: float, model: str | None = None) -> Check:
    name = function.__name__ if model is None else f"{function.__name__}_{model}"
    options = {} if model is None else {"build": MODELS[model]}
    return Check(name, seconds, partial(_timed, function, seconds, options), _first_line(function))


def _timed(function: Callable[..., Numbers], seconds: float, options: dict[str, object], setup: Setup) -> Numbers:
    return function(setup, seconds / 2, **options)


def _first_line(function: Callable[..., object]) -> str:
    return (function.__doc__ or "").splitlines()[0]


CHECKS: dict[str, Check] = {
    check.name: check
    for check in (
        _right(checks.mean_equals_cpu),
        _right(checks.noise_of_device),
        _right(checks.draws_equal_cpu),
        _right(checks.draws_repeat),
        _right(checks.prediction),
        _right(checks.random_state),
        _right(checks.bfloat16),
        _right(checks.autocast),
        _right(checks.trainer, 20),
        _right(checks.one_rank, 20),
        _right(checks.compilation, 60),
        _right(checks.laplace_on_device, 20),
        _right(checks.generation),
        _right(checks.memory_formula, 25),
        _fast(speed.noise_of_draws, 15),
        *(_fast(speed.steps, seconds, name) for name, seconds in (("bert", 25), ("vit", 25), ("llama", 40))),
        *(_fast(speed.draws, 20, name) for name in MODELS),
        _fast(speed.generation_of_draws, 25),
        # the slowest, and last
        *(_fast(speed.compiled_step, 60, name) for name in MODELS),
        *(_fast(speed.laplace_fit, 90, name) for name in ("bert", "vit")),
    )
}
