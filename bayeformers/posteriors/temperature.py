"""`TemperaturePosterior`: another posterior's averaged prediction, calibrated on held-out labels."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from os import PathLike
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor, nn

from ..checks import check_choice, check_count
from ..forward import Inputs, labels_of
from ..likelihoods import IGNORED, NoiseStd, ProblemType, check_problem_type, get_likelihood, ignored_label
from ..metrics import fit_temperature
from ..metrics.scaling import LOG_FLOOR, fit_linear_map
from ..predictive import Predictive
from ..predictive.mixture import MixturePredictive, mixture_of
from ..storage import check_whole, folder, read, saved_file, weight_digests, write
from .base import BasePosterior
from .files import load_beside, register_posterior
from .point import PointPosterior
from .variational import VariationalPosterior

__all__ = ["Calibration", "TemperaturePosterior"]

Calibration = Literal["scalar", "vector", "dirichlet"]

FILE = "temperature.safetensors"
_KIND = "temperature"
_BASE = "base"
_MANY = ("causal_lm", "seq2seq_lm", "question_answering")


@register_posterior
class TemperaturePosterior(BasePosterior):
    r"""A posterior whose averaged prediction p is calibrated: softmax(W log p + b), with W = I / T of a temperature.

    The draws are pooled first and calibrated then (Rahaman & Thiery 2021, arXiv 2007.08792), for a temperature that
    suits each draw does not suit their average, which is less confident. So the calibrated probabilities are exact;
    the draws, of which the entropies are, go through the same map one by one. A regression's predictive distribution is
    stretched around its mean by a factor T: its noise and its epistemic standard deviation alike.

    `fit` makes one from held-out rows.

    Args:
        base: the posterior: a point estimate, Laplace, dropout, an ensemble, a mixture, ...
        kind: "scalar", one temperature, which leaves every decision as it is; "vector", a factor and a bias for each
            class (Guo et al. 2017); "dirichlet", a full matrix (Kull et al. 2019).
        weight: W: of "scalar" the number 1 / T > 0 (of a regression T itself), else (C, C), of "vector" diagonal.
        bias: b, (C,); None for "scalar".
        method: the base's way to predict, for which it was fitted; None: its default.
        problem_type: what the head predicts, where its model does not say; None: as the base says.

    Raises:
        TypeError: ``base`` is no posterior.
        ValueError: another kind, or a weight or bias that is not of it.

    >>> rows = [{"input": torch.tensor([[2.0, 0.0]] * 4), "labels": torch.tensor([0, 0, 0, 1])}]
    >>> posterior = TemperaturePosterior.fit(PointPosterior(nn.Identity()), rows)
    >>> round(posterior.temperature, 4), posterior.predict(rows[0]).probs[0]
    (1.8205, tensor([0.7500, 0.2500]))
    """

    file_name = FILE
    wraps = True
    predicts_itself = True

    def __init__(
        self,
        base: BasePosterior,
        kind: Calibration = "scalar",
        *,
        weight: Tensor | float = 1.0,
        bias: Tensor | None = None,
        method: str | None = None,
        problem_type: ProblemType | None = None,
    ) -> None:
        if not isinstance(base, BasePosterior):
            raise TypeError(f"`base` must be a posterior, got {type(base).__name__}.")
        check_choice("kind", kind, get_args(Calibration))
        self.base, self.kind, self.model = base, kind, base.model
        self.weight, self.bias = _checked(kind, weight, bias)
        self.draw_cache_bytes = base.draw_cache_bytes
        self.method, self.default_method = method, base.default_method if method is None else method
        self._problem_type = None if problem_type is None else check_problem_type(problem_type)
        self._fitted_to: dict[str, str] | None = None

    def __repr__(self) -> str:
        shown = f"T={self.temperature:.4g}" if self.kind == "scalar" else f"{len(self.weight)} classes"
        return f"TemperaturePosterior({type(self.base).__name__}, {self.kind}, {shown})"

    @property
    def num_draws(self) -> int | None:  # type: ignore[override]
        """The base's."""
        return self.base.num_draws

    @property
    def temperature(self) -> float:
        """T of "scalar": above 1, the base was too sure of itself.

        Raises:
            ValueError: another kind, which has no single temperature.
        """
        if self.kind != "scalar":
            raise ValueError(f"`temperature` is of kind 'scalar', got {self.kind!r}: see `weight` and `bias`.")
        value = float(self.weight)
        return value if get_likelihood(self.problem_type()).has_noise else 1 / value

    @classmethod
    def fit(
        cls,
        base: BasePosterior,
        batches: Iterable[Mapping[str, Any]],
        kind: Calibration = "scalar",
        *,
        num_samples: int = 16,
        method: str | None = None,
        seed: int = 0,
        penalty: float | None = None,
        problem_type: ProblemType | None = None,
        noise_std: NoiseStd | None = None,
    ) -> TemperaturePosterior:
        """Return a posterior that is calibrated on rows that the model was not trained on, by their NLL.

        Args:
            base: the posterior.
            batches: mappings of what the model's ``forward`` takes, with labels; in several processes all rows in each.
            kind: of the map; "vector" and "dirichlet" are for heads with one softmax.
            num_samples: draws of each prediction, as it will be used: fewer are less calibrated by themselves.
            method: how the base predicts; None: its default.
            seed: of the draws.
            penalty: of "vector" and "dirichlet", see `metrics.fit_linear_map`; None: cross-validated.
            problem_type: what the head predicts; None: as its model says.
            noise_std: of a regression, as `predict` will be asked with: None: as the base knows it.

        Raises:
            TypeError: ``base`` is no posterior, or ``batches`` are not mappings.
            ValueError: no label that counts, a head over a vocabulary or over positions, a kind that is not for it, or
                a regression whose noise is not known.
        """
        cls(base, method=method)  # checks
        check_choice("kind", kind, get_args(Calibration))
        check_count("num_samples", num_samples, 1)
        problem = base.problem_type() if problem_type is None else problem_type
        _check_head(problem, kind)
        options = {"num_samples": num_samples, "method": method, "seed": seed}
        found = _collected(base, batches, problem, **options, **({} if noise_std is None else {"noise_std": noise_std}))
        weight: Tensor | float
        known: dict[str, Any] = {"method": method, "problem_type": problem_type}
        if get_likelihood(problem).has_noise:
            return cls(base, kind, weight=_stretch(found), **known)._of_these_weights()
        log_probs = torch.cat([values for values, _ in found]).double().cpu().numpy()
        labels = torch.cat([classes for _, classes in found]).cpu().numpy()
        if kind == "scalar":
            weight = 1 / fit_temperature(log_probs.clip(LOG_FLOOR), labels)
            return cls(base, kind, weight=weight, **known)._of_these_weights()
        linear = fit_linear_map(log_probs, labels, kind, penalty)
        weight, bias = torch.from_numpy(linear.weight), torch.from_numpy(linear.bias)
        return cls(base, kind, weight=weight, bias=bias, **known)._of_these_weights()

    # -- a posterior -------------------------------------------------------------------------------------------------

    def mean(self) -> AbstractContextManager[None]:
        """The base's mean network: a calibration changes predictions, not weights."""
        return self.base.mean()

    def draw(self, index: int, seed: int = 0) -> AbstractContextManager[None]:
        """The base's draw ``index`` of ``seed``."""
        return self.base.draw(index, seed)

    def random_parameters(self) -> Iterable[nn.Parameter]:
        """The base's."""
        return self.base.random_parameters()

    def is_of_present_weights(self) -> bool:
        """As the base says; of one that does not know, whether the weights are those it was fitted or loaded with."""
        is_same = self._fitted_to is None or self._fitted_to == weight_digests(self.model)
        return is_same and self.base.is_of_present_weights()

    def _of_these_weights(self) -> Self:
        if type(self.base).is_of_present_weights is BasePosterior.is_of_present_weights:  # it follows any weights
            self._fitted_to = weight_digests(self.model)
        return self

    def problem_type(self) -> ProblemType:
        """That for which it is calibrated, or the base's."""
        return self._problem_type or self.base.problem_type()

    def recorded_noise_std(self) -> NoiseStd | None:
        """The base's, which `predict` stretches."""
        return self.base.recorded_noise_std()

    def passes(self, inputs: Inputs, *, num_samples: int = 16, seed: int = 0) -> Iterator[Any]:
        """Return the base's outputs, which are not calibrated: their average is what `predict` calibrates.

        Args:
            inputs: what the model's ``forward`` takes.
            num_samples: how many draws.
            seed: of the draws.
        """
        return self.base.passes(inputs, num_samples=num_samples, seed=seed)

    def predict(
        self, inputs: Inputs, *, num_samples: int = 16, method: str | None = None, seed: int = 0, **options: Any
    ) -> Predictive:
        """Return the base's prediction, calibrated; a linearised one without the logits' Gaussian, which is the base's.

        Args:
            inputs: what the model's ``forward`` takes; labels are ignored.
            num_samples: as of the base; the number that it was fitted with.
            method: None, or the one that it was fitted for.
            seed: of the draws.
            **options: as of `BasePosterior.predict`, handed to the base.

        Raises:
            ValueError: another method, or a head that the calibration is not for.
        """
        is_same = method == self.default_method and not self.base.wraps  # a mixture's parts have methods of their own
        if method not in (None, self.method) and not is_same:
            raise ValueError(f"`method` must be {self.default_method!r}, for which it is calibrated, got {method!r}.")
        if self._problem_type is not None and options.get("problem_type") is None:
            options["problem_type"] = self._problem_type
        predictive = self.base.predict(inputs, num_samples=num_samples, method=self.method, seed=seed, **options)
        _check_head(predictive.problem_type, self.kind)
        if predictive.log_probs is None:
            return stretched(predictive, float(self.weight))  # whatever the model says of its head
        return replace(
            predictive,
            log_probs=self._mapped(predictive.log_probs),
            link_log_probs=self._mapped(predictive.mean_log_probs),
            logit_mean=None,
            logit_covariance=None,
        )

    def _mapped(self, log_probs: Tensor) -> Tensor:
        if self.bias is None:
            return (log_probs.double() * self.weight.to(log_probs.device)).log_softmax(-1).to(log_probs.dtype)
        if log_probs.shape[-1] != len(self.weight):
            raise ValueError(
                f"The calibration is of {len(self.weight)} classes, got a head with {log_probs.shape[-1]}."
            )
        values = log_probs.double().clamp_min(LOG_FLOOR) @ self.weight.T.to(log_probs.device)
        return (values + self.bias.to(log_probs.device)).log_softmax(-1).to(log_probs.dtype)

    # -- persistence -------------------------------------------------------------------------------------------------

    def save(self, directory: str | PathLike[str]) -> None:
        """Write ``temperature.safetensors``, and the base beside it, or into ``base`` if that is made of others.

        A converted model's own posterior lies in its checkpoint.

        Raises:
            ValueError: the base is not saved beside its model.
        """
        base, place = self.base, folder(directory)
        if base.file_name is None and type(base) not in (PointPosterior, VariationalPosterior):
            raise ValueError(f"`base`: a {type(base).__name__} is not saved beside its model; save the model itself.")
        if base.file_name is not None:
            base.save(place / _BASE if base.wraps else place)
        tensors = {"weight": self.weight} | ({} if self.bias is None else {"bias": self.bias})
        meta = {"kind": self.kind, "base": base.file_name, "wraps": base.wraps, "method": self.method}
        meta |= {"problem_type": self._problem_type}
        write(place / FILE, tensors, meta, kind=_KIND)

    @classmethod
    def load(cls, directory: str | PathLike[str], model: nn.Module) -> TemperaturePosterior:
        """Return what `save` wrote, with the base.

        Args:
            directory: the folder, or the file in it.
            model: the base's model, with the weights that it had.

        Raises:
            ValueError: a file is missing, damaged or of other weights.
        """
        path = saved_file(directory, FILE)
        tensors, meta = read(path, kind=_KIND)
        check_whole(tensors, ["weight"] if meta["kind"] == "scalar" else ["weight", "bias"], f"{str(path)!r}")
        base = load_beside(path.parent / _BASE if meta["wraps"] else path.parent, meta["base"], model)
        problem_type = meta.get("problem_type")  # older files say nothing
        loaded = cls(base, meta["kind"], **tensors, method=meta["method"], problem_type=problem_type)
        return loaded._of_these_weights()


def stretched(predictive: Predictive, factor: float, centre: Tensor | None = None) -> Predictive:
    """Return a regression's predictive distribution, wider by ``factor`` around its mean.

    Args:
        predictive: of draws, linearised, or a mixture.
        factor: of its standard deviations, > 0.
        centre: what stays where it is; None: the mean.
    """
    centre = predictive.mean if centre is None else centre
    if isinstance(predictive, MixturePredictive):
        return mixture_of([stretched(part, factor, centre) for part in predictive.parts], predictive.weights.tolist())
    assert predictive.values is not None  # a regression
    changes: dict[str, Any] = {"values": centre + factor * (predictive.values - centre)}
    if predictive.noise_variance is not None:
        changes["noise_variance"] = factor**2 * predictive.noise_variance
    elif isinstance(predictive.noise_std, float):
        changes["noise_std"] = factor * predictive.noise_std
    if predictive.logit_mean is not None and predictive.logit_covariance is not None:
        fixed = centre.reshape(predictive.logit_mean.shape)
        changes["logit_mean"] = fixed + factor * (predictive.logit_mean - fixed)
        changes["logit_covariance"] = factor**2 * predictive.logit_covariance
    return replace(predictive, **changes)


def _checked(kind: Calibration, weight: Any, bias: Any) -> tuple[Tensor, Tensor | None]:
    value = torch.as_tensor(weight, dtype=torch.float64).detach().cpu()
    if not torch.isfinite(value).all():
        raise ValueError(f"`weight` must be finite, got {weight!r}.")
    if kind == "scalar":
        if value.ndim or value <= 0 or bias is not None:
            raise ValueError(f"`weight` of 'scalar' must be one number > 0, without a `bias`, got {weight!r}.")
        return value, None
    if value.ndim != 2 or value.shape[0] != value.shape[1] or len(value) < 2:
        raise ValueError(f"`weight` of {kind!r} must be (C, C) with C >= 2, got {tuple(value.shape)}.")
    if kind == "vector" and (value - value.diagonal().diag()).any():
        raise ValueError("`weight` of 'vector' must be diagonal.")
    if not isinstance(bias, Tensor) or bias.shape != value.shape[:1] or not torch.isfinite(bias).all():
        raise ValueError(f"`bias` of {kind!r} must be {len(value)} finite numbers, got {bias!r}.")
    return value, bias.detach().double().cpu()


def _check_head(problem_type: ProblemType, kind: Calibration) -> None:
    likelihood = get_likelihood(problem_type)
    if problem_type in _MANY or likelihood.is_per_pixel:
        raise ValueError(f"`base` must have few classes per prediction to be calibrated, got a {problem_type!r} head.")
    if kind != "scalar" and (likelihood.has_noise or likelihood.is_bernoulli):
        raise ValueError(f"`kind` must be 'scalar' for a {problem_type!r} head, which has no softmax, got {kind!r}.")


def _collected(
    base: BasePosterior, batches: Iterable[Any], problem_type: ProblemType, **options: Any
) -> list[tuple[Any, Tensor]]:
    """Of every batch the averaged log-probabilities (n, C) and labels (n,) of its items; of values the predictive."""
    found: list[tuple[Any, Tensor]] = []
    count = 0
    for batch in batches:
        if not isinstance(batch, Mapping):
            raise TypeError(f"`batches` must be mappings with labels, got {type(batch).__name__}.")
        labels = labels_of(batch)
        predictive = base.predict(batch, problem_type=problem_type, **options)
        if predictive.log_probs is None:
            if labels.numel() != predictive.mean.numel():
                raise ValueError(f"`labels` must have shape {tuple(predictive.mean.shape)}, got {tuple(labels.shape)}.")
            found.append((predictive, labels.reshape(predictive.mean.shape)))
            count += labels.numel()
            continue
        log_probs, classes = predictive.mean_log_probs, get_likelihood(problem_type).class_numbers(labels)
        if classes.shape != log_probs.shape[:-1]:
            raise ValueError(f"`labels` must have shape {tuple(log_probs.shape[:-1])}, got {tuple(classes.shape)}.")
        counts = (classes != IGNORED) & (classes != ignored_label(base.model, problem_type))
        found.append((log_probs[counts], classes[counts]))
        count += int(counts.sum())
    if count == 0:
        raise ValueError("`batches` hold no label that counts: there is nothing to calibrate on.")
    return found


def _stretch(found: list[tuple[Predictive, Tensor]]) -> float:
    """The factor of a regression's standard deviations with the least NLL."""
    from scipy.optimize import minimize_scalar  # here: importing scipy.optimize takes longer than most uses

    def loss(log_factor: float) -> float:
        scores = [stretched(one, math.exp(log_factor)).log_prob(labels).double() for one, labels in found]
        return -float(torch.cat([score.flatten() for score in scores]).mean())

    return math.exp(minimize_scalar(loss, bounds=(-7, 7), method="bounded", options={"xatol": 1e-9}).x)
