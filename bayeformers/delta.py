"""How much noise a trained model can bear: the search for delta."""

from __future__ import annotations

import contextlib
import copy
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor, nn
from tqdm.auto import tqdm

from .checks import is_finite, is_real
from .conversion.convert import is_bayesian, to_bayesian, to_deterministic
from .forward import Inputs, check_inputs
from .likelihoods import IGNORED, NoiseStd, get_likelihood
from .linearized.links import linearized_predictive
from .nn import variational_tensors
from .posteriors import PointPosterior, VariationalPosterior
from .predictive import Predictive
from .sampling.views import alone, private_view

logger = logging.getLogger(__name__)

Batch = Inputs
BOUNDS = {"sample": (1e-2, 1.0), "glm": (1e-2, 10.0)}
"""Between which values delta is sought, by method."""
_GRID = 7
_LOG_PRECISION = 0.03  # of delta, relative: far below what the noise of the held-out NLL resolves


def calibrate_delta(
    model: nn.Module,
    inputs: Batch | Iterable[Batch],
    labels: Tensor | Iterable[Tensor] | None = None,
    *,
    method: Literal["sample", "glm"] = "sample",
    num_samples: int = 16,
    seed: int = 0,
    bounds: tuple[float, float] | None = None,
    tolerance: float = 0.003,
    noise_std: NoiseStd | None = None,
    progress: bool = True,
    **conversion: Any,
) -> float:
    """The initial scale delta (sigma = delta |w|) that suits a trained model, found on held-out inputs.

    With ``labels``: the delta of the smallest Monte-Carlo NLL; one number is fitted, as in temperature scaling. The
    same draws serve every delta. The model comes back as it was.

    Without labels there are two rules. "sample" takes the largest delta whose NLL against the mean model's own argmax
    labels rises by at most ``tolerance``, relative (after TFB, Shi et al. 2025); it protects accuracy, and on an
    over-fitted model it stops far too early. "glm" takes the largest delta at which no input has a leverage above 1,
    the trace of H^{1/2} J S J^T H^{1/2} with H the loss Hessian in the logits: of two classes no training row of an
    exact posterior has. Give it training rows, 256 or so; a regression needs a ``noise_std`` that is a number.

    Args:
        model: a trained model, converted or not.
        inputs: one batch, or batches, of what the model's forward takes; 500 examples are enough. Labels inside, and
            the second of pairs, count as ``labels`` where that is not given.
        labels: of the batch, or of each batch.
        method: of the predictive that is to be used: "sample" the network, or "glm", the linearised network, whose
            covariance is delta^2 times one number per input, so that a single pass serves every delta.
        num_samples: draws per delta.
        seed: of the draws.
        bounds: smallest and largest delta to consider; by default (0.01, 1), and (0.01, 10) for "glm", whose decision
            does not suffer from large scales.
        tolerance: allowed relative rise of the NLL in the search without labels, of "sample".
        noise_std: of a regression, or "head" of a model that predicts it; by default what the configuration records.
        progress: show a progress bar.
        conversion: arguments of :func:`to_bayesian` for a model that is not converted (``target_modules``, ...).

    Returns:
        delta, for ``to_bayesian(model, delta)``.

    Raises:
        ValueError: an argument is not one of these, there is no batch, no label counts, or a regression has none.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    >>> delta = calibrate_delta(net, torch.randn(64, 4), torch.randint(3, (64,)), num_samples=4, progress=False)
    >>> 0.01 <= delta <= 1.0
    True
    """
    if method not in BOUNDS:
        raise ValueError(f"`method` must be one of {sorted(BOUNDS)}, got {method!r}.")
    low, high = check_bounds(BOUNDS[method] if bounds is None else bounds)
    if not (is_finite(tolerance) and tolerance > 0):
        raise ValueError(f"`tolerance` must be a finite number > 0, got {tolerance!r}; 0.003 is 0.3 %.")
    batches, targets = as_batches(inputs, labels)
    with _converted(model, conversion) as model, tqdm(desc="delta", unit="try", disable=not progress) as bar:
        posterior = VariationalPosterior(model)
        with posterior.mean():
            means = [PointPosterior(model).predict(batch, noise_std=noise_std) for batch in batches]
        if targets is None and method == "glm":
            largest = _largest_leverage(_linearized(posterior, batches, means, progress=progress), means)
            return _bounded(largest, low, high)
        own = [own_labels(mean) for mean in means] if targets is None else targets
        if method == "glm":
            predictives = _linearized_search(posterior, batches, means, seed=seed, progress=progress)
        else:
            predictives = _sampled_search(posterior, batches, num_samples=num_samples, seed=seed, noise_std=noise_std)

        def nll(log_delta: float) -> float:
            value = mean_nll(predictives(math.exp(log_delta)), own)
            bar.update()
            bar.set_postfix(delta=f"{math.exp(log_delta):.3g}", nll=f"{value:.4g}")
            return value

        if targets is None:
            limit = mean_nll(means, own) * (1 + tolerance)
            return math.exp(largest_within(nll, limit, math.log(low), math.log(high)))
        delta = math.exp(_smallest(nll, math.log(low), math.log(high)))
    if (end := delta_end(delta, low, high)) is not None:
        logger.warning(
            "calibrate_delta found the least NLL at the %s end of `bounds`, delta = %.4g: the true minimum lies beyond "
            "or there is none, and the scale means nothing. Noise of any size %s the held-out NLL.",
            end,
            delta,
            "lowers" if end == "largest" else "raises",
        )
    return delta


def delta_end(delta: float, low: float, high: float) -> Literal["smallest", "largest"] | None:
    """Which end of the range that was searched ``delta`` is, if it is one.

    Args:
        delta: what `calibrate_delta` found.
        low: its smaller bound.
        high: its larger bound.

    Returns:
        The end; None inside the range.

    >>> delta_end(10.0, *BOUNDS["glm"]), delta_end(0.3, *BOUNDS["glm"])
    ('largest', None)
    """
    if delta <= low * (1 + 1e-9):
        return "smallest"
    return "largest" if delta >= high * (1 - 1e-9) else None


def _sampled_search(
    posterior: VariationalPosterior, batches: list[Batch], **options: Any
) -> Callable[[float], Iterator[Predictive]]:
    """Predictives of every batch at a delta, by sampling the network."""

    def predictives(delta: float) -> Iterator[Predictive]:
        _set_scales(posterior.model, delta)
        return (posterior.predict(batch, **options) for batch in batches)

    return predictives


def _linearized_search(
    posterior: VariationalPosterior,
    batches: list[Batch],
    means: list[Predictive],
    *,
    seed: int,
    progress: bool,
) -> Callable[[float], Iterator[Predictive]]:
    """The same for the linearised network: its covariance at delta = 1, scaled."""
    logits = _linearized(posterior, batches, means, progress=progress)

    def predictives(delta: float) -> Iterator[Predictive]:
        for (mean, covariance), point in zip(logits, means, strict=True):
            yield linearized_predictive(
                mean, delta**2 * covariance, point.problem_type, seed=seed, noise_std=point.noise_std
            )

    return predictives


def _linearized(
    posterior: VariationalPosterior, batches: list[Batch], means: list[Predictive], *, progress: bool
) -> list[tuple[Tensor, Tensor]]:
    """Mean and covariance of every batch's logits at delta = 1."""
    _set_scales(posterior.model, 1.0)
    pairs = tqdm(list(zip(batches, means, strict=True)), desc="linearised", leave=False, disable=not progress)
    return [posterior.linearize(batch, problem_type=mean.problem_type) for batch, mean in pairs]


def _largest_leverage(logits: list[tuple[Tensor, Tensor]], points: list[Predictive]) -> float:
    """Over all items that count: the largest trace of S^T (J Sigma J^T) S, S S^T = H the loss Hessian."""
    largest = 0.0
    for (mean, covariance), point in zip(logits, points, strict=True):
        likelihood = get_likelihood(point.problem_type)
        scale = 1.0
        if likelihood.has_noise:
            if not is_real(point.noise_std):
                raise ValueError(
                    "`labels` are needed, or a `noise_std` that is a number: a regression has no labels of its own."
                )
            scale = float(point.noise_std) ** -2
        columns = torch.stack(list(likelihood.hessian_columns(mean)), dim=-1).to(covariance)
        found = scale * (columns.mT @ covariance @ columns).double().diagonal(dim1=-2, dim2=-1).sum(-1)
        found = found if point.mask is None else found[point.mask]
        largest = max([largest, *found.flatten().tolist()])
    return largest


def _bounded(largest: float, low: float, high: float) -> float:
    """The delta at which the ``largest`` leverage, which grows with its square, is 1; or the nearest end, said."""
    delta = largest**-0.5 if largest > 0 else math.inf
    if not low <= delta <= high:
        logger.warning(
            "calibrate_delta found the largest leverage to be 1 at delta = %.4g, outside `bounds`: the nearest "
            "end is taken. Sure predictions have small leverages, and say little about the scale.",
            delta,
        )
    return min(max(low, delta), high)


def _smallest(function: Callable[[float], float], low: float, high: float) -> float:
    """Minimum by a grid, then golden-section steps between the best point's neighbours."""
    step = (high - low) / (_GRID - 1)
    grid = [low + i * step for i in range(_GRID)]
    values = [function(x) for x in grid]
    best = min(range(_GRID), key=values.__getitem__)
    bounds = (grid[max(best - 1, 0)], grid[min(best + 1, _GRID - 1)])
    result = minimize_scalar(function, bounds=bounds, method="bounded", options={"xatol": _LOG_PRECISION})
    return float(result.x) if result.fun < values[best] else grid[best]


def largest_within(function: Callable[[float], float], limit: float, low: float, high: float) -> float:
    """Bisection for the largest argument with ``function`` <= ``limit``, which rises with it; ``low`` if none.

    Args:
        function: of the logarithm of a scale; what noise costs.
        limit: the most that it may be.
        low: the least argument.
        high: the largest, which is the answer where it is within the limit.

    Returns:
        The argument, to 3 % of the scale.
    """
    if function(high) <= limit:
        return high
    while high - low > _LOG_PRECISION:
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) <= limit else (low, middle)
    return low


def mean_nll(predictives: Iterable[Predictive], targets: list[Tensor]) -> float:
    """Mean negative log probability per label; labels of -100 do not count."""
    total, count = 0.0, 0
    for predictive, target in zip(predictives, targets, strict=True):
        log_prob = predictive.log_prob(target)
        kept = log_prob[~log_prob.isnan()]
        total, count = total - float(kept.double().sum()), count + kept.numel()
    if count == 0:
        raise ValueError("`labels` hold none that counts: all are -100, or beyond the sequence.")
    return total / count


def own_labels(predictive: Predictive) -> Tensor:
    """The decisions, where tokens count; a causal language model's is about the token that follows."""
    if predictive.log_probs is None:
        raise ValueError("`labels` are needed: a regression has no labels of its own to hold on to.")
    labels = get_likelihood(predictive.problem_type).unaligned(predictive.mean_log_probs.argmax(-1))
    return labels if predictive.mask is None else labels.masked_fill(~predictive.mask, IGNORED)


def _set_scales(model: nn.Module, delta: float) -> None:
    with torch.no_grad():
        for tensor in variational_tensors(model):
            rule = replace(tensor.module.initial_scale(tensor.parameter_name, tensor.loc), delta=delta)
            tensor.module.set_scale(tensor.parameter_name, rule(tensor.loc))


@contextlib.contextmanager
def _converted(model: nn.Module, conversion: dict[str, Any]) -> Iterator[nn.Module]:
    """A copy of ``model`` around the same means, converted; a model that cannot be copied itself, until exit."""
    if is_bayesian(model) and conversion:
        raise TypeError(f"`model` is converted already: {sorted(conversion)} can only be given for a plain model.")
    copied = _copy_around(model, [tensor.rho for tensor in variational_tensors(model)])
    if copied is not None:
        yield copied if is_bayesian(copied) else to_bayesian(copied, **conversion)
        return
    with alone(model):
        was_bayesian = is_bayesian(model)
        before = [tensor.rho.detach().clone() for tensor in variational_tensors(model)]
        if not was_bayesian:
            to_bayesian(model, **conversion)
        try:
            yield model
        finally:
            if not was_bayesian:
                to_deterministic(model)
            with torch.no_grad():
                for tensor, rho in zip(variational_tensors(model), before, strict=True):
                    tensor.rho.copy_(rho)


def _copy_around(model: nn.Module, own: Iterable[nn.Parameter]) -> nn.Module | None:
    """A copy, to be changed at will, whose Parameters share the model's memory, but for ``own`` ones; None: no copy."""
    if private_view(model) is None:
        return None
    apart = {id(parameter) for parameter in own}
    memo: dict[int, Any] = {id(buffer): buffer for buffer in model.buffers()}
    for parameter in model.parameters():
        value = parameter.detach().clone() if id(parameter) in apart else parameter.detach()
        memo[id(parameter)] = nn.Parameter(value, requires_grad=parameter.requires_grad)
    carried = vars(model).get("posterior")  # which is left out
    if carried is not None:
        memo[id(carried)] = None
    try:
        return copy.deepcopy(model, memo)
    except (TypeError, ValueError, RuntimeError):  # a lock, or what else has no copy
        return None


def as_batches(
    inputs: Batch | Iterable[Batch], labels: Tensor | Iterable[Tensor] | None
) -> tuple[list[Batch], list[Tensor] | None]:
    """Make a list of one batch or several, and one of their labels.

    Args:
        inputs: one batch, batches, or pairs of a batch and its labels.
        labels: of the batch, or of each batch; None: those inside, if there are any.

    Returns:
        The batches and the labels, None where there are none.

    Raises:
        TypeError: ``inputs`` or ``labels`` is of a wrong kind.
        ValueError: there is no batch, or labels of some batches alone.
    """
    if not isinstance(inputs, Iterable) or isinstance(inputs, str):
        raise TypeError(
            f"`inputs` must be one batch (a mapping, a tensor or a tuple of several) or batches, got {inputs!r}."
        )
    is_one = isinstance(inputs, (Mapping, Tensor)) or (isinstance(inputs, tuple) and isinstance(labels, Tensor))
    batches: list[Any] = [inputs] if is_one else list(inputs)
    if not batches:
        raise ValueError("`inputs` holds no batch: give one batch of inputs, or an iterable of batches.")
    if labels is None and all(_is_pair(batch) for batch in batches):
        batches, labels = [batch[0] for batch in batches], [batch[1] for batch in batches]
    for batch in batches:
        check_inputs(batch)
    if labels is None:
        found = [batch.get("labels") if isinstance(batch, Mapping) else None for batch in batches]
        inside = [labels for labels in found if labels is not None]
        if inside and len(inside) < len(batches):
            raise ValueError(f"`inputs` holds labels in {len(inside)} of {len(batches)} batches: give all or none.")
        return batches, inside or None
    if not isinstance(labels, Iterable) or isinstance(labels, str):
        raise TypeError(f"`labels` must be a tensor, or one for each batch of `inputs`, got {labels!r}.")
    targets = [labels] if isinstance(labels, Tensor) else list(labels)
    wrong = next((target for target in targets if not isinstance(target, Tensor)), None)
    if wrong is not None:
        raise TypeError(f"`labels` must be a tensor for each batch of `inputs`, got {type(wrong).__name__}.")
    if len(targets) != len(batches):
        raise ValueError(f"`labels` must be given for each batch of `inputs`: {len(batches)}, got {len(targets)}.")
    return batches, targets


def _is_pair(batch: Any) -> bool:
    """(inputs, labels), as a DataLoader gives them."""
    return isinstance(batch, (list, tuple)) and len(batch) == 2 and isinstance(batch[1], Tensor)


def check_bounds(bounds: tuple[float, float]) -> tuple[float, float]:
    """Two finite numbers, 0 < low < high; TypeError or ValueError for anything else."""
    if not isinstance(bounds, Sequence) or len(bounds) != 2:
        raise TypeError(f"`bounds` must be two numbers (low, high), got {bounds!r}.")
    low, high = bounds
    if not (is_finite(low) and is_finite(high) and 0 < low < high):
        raise ValueError(f"`bounds` must be two finite numbers, 0 < low < high, got {bounds!r}.")
    return low, high
