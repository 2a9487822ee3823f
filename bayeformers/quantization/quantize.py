"""`quantize`: a float posterior becomes an INT8 one, in a copy of its model."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Literal, get_args

from torch import Tensor, nn

from ..checks import is_finite
from ..laplace import LaplacePosterior
from ..nn import FactorLinear, variational_tensors
from ..patterns import Patterns
from ..posteriors import PointPosterior, Posterior, VariationalPosterior
from ..posteriors.predict import as_posterior
from .calibrate import Inputs, Measured, Probe, as_batches
from .candidates import Candidates, report_of
from .codes import Codes, ScaleCodes
from .install import Weight, install, own, parameter_names, twin
from .laplace_noise import LaplaceNoise
from .layers import Arithmetic, QuantizedLayer
from .noise import MeanFieldNoise, Noise, NoNoise
from .posterior import QuantizedPosterior

Choice = Literal["auto", "int8", "float"]
Source = VariationalPosterior | LaplacePosterior | PointPosterior
MAX_ERROR, MAX_NOISE = 0.05, 0.3


def quantize(
    posterior: nn.Module | Posterior,
    calibration_inputs: Inputs | Iterable[Inputs],
    *,
    arithmetic: Choice = "auto",
    max_error: float = MAX_ERROR,
    max_noise: float = MAX_NOISE,
    exclude_modules: Patterns | None = None,
) -> QuantizedPosterior:
    r"""Return the posterior with INT8 means and scales, around a copy of its model; nothing is trained.

    Linear, transformers' Conv1D, Conv1d to Conv3d, their transposed forms and Embedding hold their weight in INT8,
    random or not; all else (biases, norms, LSTM, GRU, attention's own parameters, bare Parameters) stays float and is
    drawn as ever. A weight has one step per channel, :math:`w \approx s\,q`; a scale one per channel of its logarithm;
    a Laplace posterior's eigenvectors have INT8 codes, the sharpest eighth INT16. The draws have the float posterior's
    noise.

    A Linear or Conv1D multiplies in INT8 where that adds less to its outputs, under a draw, than ``max_noise`` times
    what the draw itself changes: of independent errors a ratio r widens the draws by :math:`\sqrt{1 + r^2} - 1`, 4.4 %
    at 0.3. Otherwise it multiplies in float with the weight that it holds.

    Args:
        posterior: a `VariationalPosterior`, `LaplacePosterior` or `PointPosterior`, or a model that has one.
        calibration_inputs: what the model's ``forward`` takes, or an iterable of that: every layer is compared with its
            INT8 form on them.
        arithmetic: "auto", or "int8" or "float" for all of these layers.
        max_error: a layer stays float whose outputs at the mean are further off, relative to their root mean square.
        max_noise: see above; for layers without noise, before any that has it, ``max_error`` holds instead.
        exclude_modules: patterns of layers or containers that stay float.

    Raises:
        TypeError: ``posterior`` or ``calibration_inputs`` is of another kind.
        ValueError: an argument is not one of these; a weight or a scale is not finite; or no layer can be INT8.

    >>> import torch
    >>> from bayeformers import to_bayesian
    >>> model = to_bayesian(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)), delta=0.1)
    >>> quantized = quantize(model, torch.randn(32, 8))
    >>> quantized.predict(torch.ones(2, 8), num_samples=4).probs.shape
    torch.Size([2, 3])
    """
    _check(arithmetic, max_error=max_error, max_noise=max_noise)
    batches, source = as_batches(calibration_inputs), _source(posterior)
    model, twins = twin(source.model)
    layers = Candidates.of(model, exclude_modules)
    codes = {name: _coded(name, model.get_parameter(name), axis) for name, axis in layers.axes.items()}
    noise = _noise(source, model, twins, layers.axes)
    by_layer = {user: codes[name] for user, name in layers.weights.items()}
    measured = Probe(model, layers.kinds, by_layer, layers.weights, noise).run(batches)
    if layers.drop(measured, max_error):
        noise = _noise(source, model, twins, layers.axes)
    choose = functools.partial(_arithmetic, arithmetic, max_error=max_error, max_noise=max_noise)
    weights = [
        Weight(
            name,
            users := layers.users(name),
            choose([layers.kinds[user] for user in users], [measured[user] for user in users], name in noise.names),
            model.get_parameter(name).dtype,
            codes[name],
        )
        for name in layers.axes
    ]
    report = report_of(model, weights, noise, measured, layers.skipped)
    install(model, weights)
    own(model, twins.values())
    return QuantizedPosterior(
        model, noise, weights, report, problem_type=source.problem_type(), noise_std=source.recorded_noise_std()
    )


def _check(arithmetic: str, **limits: float) -> None:
    if arithmetic not in get_args(Choice):
        raise ValueError(f"`arithmetic` must be one of {list(get_args(Choice))}, got {arithmetic!r}.")
    for name, value in limits.items():
        if not (is_finite(value) and value > 0):
            raise ValueError(f"`{name}` must be a finite number > 0, got {value!r}; it is a ratio, such as 0.05.")


def _source(posterior: nn.Module | Posterior) -> Source:
    found = as_posterior(posterior)
    if not isinstance(found, Source):
        raise TypeError(
            "`posterior` must be a VariationalPosterior, LaplacePosterior or PointPosterior, or a model that has one, "
            f"got {type(found).__name__}."
        )
    if any(isinstance(module, FactorLinear) for module in found.model.modules()):
        raise ValueError("`posterior`: INT8 has no rank-1 layers, whose random tensors are no weights.")
    return found


def _coded(name: str, weight: Tensor, axis: int) -> Codes:
    if not weight.isfinite().all():
        raise ValueError(f"`posterior`: the weight {name!r} has values that are not finite; INT8 has none for them.")
    return Codes.of(weight, axis)


def _noise(
    source: Source, model: nn.Module, twins: Mapping[nn.Parameter, nn.Parameter], axes: Mapping[str, int]
) -> Noise:
    """With INT8 scales for the weights that ``axes`` names."""
    own_names = parameter_names(model)
    names = {parameter: own_names[shared] for parameter, shared in twins.items() if shared in own_names}
    if isinstance(source, LaplacePosterior):
        return LaplaceNoise.of(source, model, names)
    if isinstance(source, PointPosterior):
        return NoNoise()
    scales: dict[str, ScaleCodes | Tensor] = {}
    specs = {}
    for tensor in variational_tensors(source.model):
        name, scale = names[tensor.loc], tensor.scale().detach()
        if not scale.isfinite().all():
            raise ValueError(f"`posterior`: the scale of {name!r} has values that are not finite.")
        scales[name] = ScaleCodes.of(scale, axes[name]) if name in axes else scale.clone()
        specs[name] = replace(tensor.spec, name=tensor.name, named=True)
    return MeanFieldNoise(scales, specs)


def _arithmetic(
    choice: Choice,
    users: Sequence[type[QuantizedLayer]],
    measured: Sequence[Measured],
    is_random: bool,
    *,
    max_error: float,
    max_noise: float,
) -> Arithmetic:
    """Of a weight that these layers use."""
    if choice == "float" or not all(kind.multiplies for kind in users):
        return "float"
    called = [one for one in measured if one.is_called]
    limit = max_noise if is_random else max_error
    noises = [one.relative_noise for one in called if is_random or not one.after_random]
    close = len(noises) == len(called) and all(noise is not None and noise <= limit for noise in noises)
    return "int8" if choice == "int8" or (called and close) else "float"
