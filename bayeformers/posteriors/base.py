"""The protocol of every posterior, and prediction from draws for all of them."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from os import PathLike
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ..checks import check_count, check_draw
from ..forward import Inputs, call, check_filled
from ..likelihoods import (
    HEAD,
    Likelihood,
    NoiseStd,
    ProblemType,
    check_noise_std,
    check_problem_type,
    get_likelihood,
    ignored_label,
    logits_of,
    mean_and_variance,
    unwrapped,
)
from ..linearized import check_reads, recording_view
from ..linearized.blocks import GaussianBlock, mean_field_blocks
from ..linearized.captured import Statistic, bare_tensors, layers_of, linearize
from ..linearized.links import Link, ignores_shift, linearized_predictive
from ..linearized.methods import METHODS, SAMPLING, Bound, statistic
from ..predictive import Predictive
from ..sampling.batched_passes import in_batches
from ..sampling.passes import monte_carlo
from ..sampling.random_state import left_alone
from ..sampling.views import View, itself, lend, private_view, undisturbed
from .heads import has_many_logits, known_problem_type, recorded_noise_std, without_labels


@runtime_checkable
class Posterior(Protocol):
    """Something that can put one draw of the weights into a model."""

    model: nn.Module
    num_draws: int | None

    def mean(self) -> AbstractContextManager[None]:
        """The model with the posterior mean, until exit."""

    def draw(self, index: int, seed: int = 0) -> AbstractContextManager[None]:
        """The model with draw ``index`` of the sequence ``seed``, until exit."""

    def predict(self, inputs: Inputs, *, num_samples: int = 16, method: str | None = None, seed: int = 0) -> Predictive:
        """Return what the posterior says about some inputs.

        Args:
            inputs: what the model's ``forward`` takes; labels are ignored.
            num_samples: how many draws to average over, >= 1.
            method: how to predict, "sample" or a linearised method; None: the posterior's own default.
            seed: the same seed gives the same draws.
        """

    def save(self, directory: str | PathLike[str]) -> None:
        """Write all that a reload needs into a folder."""


class BasePosterior(ABC):
    """Prediction from draws; a posterior adds what its draws are.

    A draw is exception-safe and leaves the model bit-identical. Predictions do not touch the model, so that several
    threads may ask it at once: see :mod:`~bayeformers.sampling.views`. A draw computes weights inside the layers, or
    copies them in place under ``torch.no_grad()``, never through ``.data``: see
    :func:`~bayeformers.sampling.passes.monte_carlo`.

    Attributes:
        model: whose weights are drawn; used in ``eval()`` mode, restored afterwards.
        num_draws: how many distinct draws there are; None: unlimited.
        default_method: of `predict`.
        draw_cache_bytes: memory in which draws are kept for the next batch.
        draws_in_views: whether it has `draw_in` and `mean_in`, by which several threads predict at once. One that has
            not draws in the model itself, one prediction after the other.
        file_name: what `save` writes beside the model's own files; None: it is not saved along with the model.
        wraps: whether it is made of other posteriors, which are saved beside it.
        follows_weights: whether it is of whatever weights the model has, so that it stays when these are trained.
        predicts_itself: whether its `predict` is more than an average over `passes`: evaluation asks `predict`.
        shares_prefix: whether a draw changes nothing but `random_parameters`, so that what does not depend on these may
            be computed once for all draws.
    """

    is_shared_by_views = True

    model: nn.Module
    num_draws: int | None = None
    default_method: str = "sample"
    draw_cache_bytes: int = 0
    draws_in_views: bool = False
    file_name: ClassVar[str | None] = None
    wraps: ClassVar[bool] = False
    follows_weights: ClassVar[bool] = False
    predicts_itself: ClassVar[bool] = False
    shares_prefix: ClassVar[bool] = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """A class with a ``draw`` or ``mean`` of its own has to say it anew: those of a view are its base's."""
        super().__init_subclass__(**kwargs)
        own = vars(cls)
        if "draws_in_views" not in own and any(name in own and f"{name}_in" not in own for name in ("draw", "mean")):
            cls.draws_in_views = False

    @abstractmethod
    def mean(self) -> AbstractContextManager[None]:
        """The model with the posterior mean, until exit."""

    @abstractmethod
    def draw(self, index: int, seed: int = 0) -> AbstractContextManager[None]:
        """The model with draw ``index`` of the sequence ``seed``, until exit."""

    @abstractmethod
    def random_parameters(self) -> Iterable[nn.Parameter]:
        """Every Parameter that a draw affects: what does not depend on them is computed once for all draws."""

    @abstractmethod
    def save(self, directory: str | PathLike[str]) -> None:
        """Write all that a reload needs into a folder."""

    @classmethod
    def load(cls, directory: str | PathLike[str], model: nn.Module) -> BasePosterior:
        """Return what `save` wrote, around the model that it was saved with.

        Args:
            directory: the folder, or the file of `file_name` itself.
            model: the model, with the weights that it had.

        Raises:
            NotImplementedError: the class cannot be read again.
        """
        raise NotImplementedError(f"{cls.__name__} has no `load`.")

    def is_of_present_weights(self) -> bool:
        """Whether the model still has the weights that the posterior goes with."""
        return True

    def passes(self, inputs: Inputs, *, num_samples: int = 16, seed: int = 0) -> Iterator[Any]:
        """The model's output under each draw, in ``eval()`` mode, without gradients.

        Between two of them, and afterwards, the model and the caller's random state are as they were.

        Args:
            inputs: what the model's ``forward`` takes; labels are ignored.
            num_samples: how many draws, >= 1; a posterior with fewer distinct ones gives those.
            seed: of the draws.

        Returns:
            The outputs, one after the other.
        """
        check_count("num_samples", num_samples, 1)
        check_draw(0, seed)
        inputs = without_labels(self.model, inputs)
        check_filled(inputs)
        num_samples = num_samples if self.num_draws is None else min(num_samples, self.num_draws)
        random = list(self.random_parameters())
        own = {id(p): own for p, own in self.own_parameters().items()}
        view = private_view(self.model, own) if self.draws_in_views else None
        if view is None:
            lend(self.model)

        draw = partial(self._one_draw, view)
        loop = partial(
            monte_carlo,
            self.model if view is None else view.model,
            draw,
            random if view is None else [view.parameter(parameter) for parameter in random],
            inputs,
            num_samples=num_samples,
            seed=seed,
            share=self.shares_prefix,
            known_as=(self.model, random),
            keeps_random_state=True,
        )
        if num_samples == 1 or not self.shares_prefix:
            return loop()
        return in_batches(loop, self.model, view, random, partial(draw, seed=seed), inputs, num_samples)

    @contextlib.contextmanager
    def _one_draw(self, view: View | None, index: int, seed: int) -> Iterator[None]:
        """One draw in a private view, or in the model itself."""
        with (
            itself(self.model) if view is None else undisturbed(self.model),
            self.draw(index, seed) if view is None else self.draw_in(view, index, seed),
        ):
            yield

    # -- on a view ---------------------------------------------------------------------------------------------------

    def own_parameters(self) -> Mapping[nn.Parameter, nn.Parameter]:
        """Parameters of the model, and what a private view has in their place for `draw_in` to write."""
        return {}

    def draw_in(self, view: View, index: int, seed: int) -> AbstractContextManager[None]:
        """Return a context with one draw in a private view, which has no other user: nothing needs to be put back.

        Args:
            view: a view with what `own_parameters` gave in the Parameters' place.
            index: the draw's place in the sequence, >= 0.
            seed: which sequence of draws.
        """
        raise NotImplementedError

    def mean_in(self, view: View) -> AbstractContextManager[None]:
        """The mean, likewise."""
        raise NotImplementedError

    def predict(
        self,
        inputs: Inputs,
        *,
        num_samples: int = 16,
        method: str | None = None,
        link: Link = "auto",
        seed: int = 0,
        problem_type: ProblemType | None = None,
        noise_std: NoiseStd | None = None,
        bound: Bound = "lower",
        direction: int | float = 0,
        contrasts: bool = False,
    ) -> Predictive:
        """What the posterior says about ``inputs``.

        Args:
            inputs: what the model's ``forward`` takes: a mapping of names to arguments, one tensor, or a tuple or list
                of several; labels are ignored.
            num_samples: number S of draws ("sample", "mc_glm"), or of directions ("lr_glm"). A posterior with fewer
                distinct draws gives those.
            method: "sample" (or "nn"): average the network's probabilities over draws; "glm": the linearised network's,
                whose outputs are Gaussian; "mc_glm", "one_glm", "lr_glm", "e_glm": approximations of it, see
                `linearized.methods`. By default `default_method`.
            link: from the linearised network's Gaussian logits to probabilities: see `linearized.links`.
            seed: the same seed gives the same draws, for every batch and process.
            problem_type: what the head predicts; by default found from the model's class and configuration, and
                classification for a model that transformers does not know. "semantic_segmentation" is of logits
                (B, C, H, W).
            noise_std: a regression's noise, or "head" of a model that predicts it: L means, then L log variances; by
                default what the posterior or the configuration records. A linearised method takes the covariance of the
                means, and the noise at the posterior mean.
            bound: of "lr_glm": "lower" or "upper".
            direction: of "e_glm": a rank, 0 the most uncertain, or a quantile as a float.
            contrasts: give the covariance of the centred logits f_c - mean f, all that a softmax depends on: the same
                probabilities with one backward pass fewer, for classes and a link that ignores what all logits share.

        Returns:
            The prediction.

        Raises:
            ValueError: an argument is not one of these, or a linearised method was asked of a posterior that is not
                Gaussian, or of a head over a vocabulary or over positions.
        """
        method = self.default_method if method is None else method
        if method not in METHODS:
            raise ValueError(f"`method` must be one of {METHODS}, got {method!r}.")
        problem = self.problem_type() if problem_type is None else check_problem_type(problem_type)
        likelihood = get_likelihood(problem)
        if likelihood.has_noise:
            noise_std = self.recorded_noise_std() if noise_std is None else check_noise_std(noise_std)
        if method in SAMPLING:
            values, normalizers = _stacked(likelihood, self.passes(inputs, num_samples=num_samples, seed=seed), inputs)
            if likelihood.has_noise:
                return _regressed(values, noise_std)
            return Predictive(
                problem_type=problem,
                log_probs=values,
                log_normalizers=normalizers,
                mask=likelihood.attended(values[0], inputs),
                ignored_label=ignored_label(self.model, problem),
            )
        if has_many_logits(self.model, problem):
            raise ValueError(
                f"`method`={method!r} needs few logits per prediction, got a {problem!r} head over a vocabulary or "
                f"over positions ({type(unwrapped(self.model)).__name__}); use 'sample'."
            )
        if contrasts and not ignores_shift(problem, link):
            raise ValueError(f"`contrasts` are for classes and a link that ignores shifts, got {problem!r}, {link!r}.")
        mean, covariance = self.linearize(
            inputs,
            method=method,
            num_samples=num_samples,
            seed=seed,
            bound=bound,
            direction=direction,
            contrasts=contrasts,
            problem_type=problem,
        )
        mask = likelihood.attended(mean, inputs)
        return linearized_predictive(mean, covariance, problem, link=link, seed=seed, noise_std=noise_std, mask=mask)

    def linearize(
        self,
        inputs: Inputs,
        *,
        method: str = "glm",
        num_samples: int = 16,
        seed: int = 0,
        bound: Bound = "lower",
        direction: int | float = 0,
        contrasts: bool = False,
        problem_type: ProblemType | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The Gaussian of the linearised network's outputs.

        A posterior that is not Gaussian is a ValueError, and so is a model with a layer that has no rule, or with other
        outputs.

        Args:
            inputs: what the model's ``forward`` takes; labels are ignored.
            method: the way to the covariance; this and the rest as in `predict`.
            num_samples: of "mc_glm" and "lr_glm".
            seed: of the draws.
            bound: of "lr_glm".
            direction: of "e_glm".
            contrasts: whether the covariance is that of the centred logits.
            problem_type: what the head predicts.

        Returns:
            Mean (B, C) and covariance (B, C, C), or (B, T, C) and (B, T, C, C); of a softmax's logits in float64, for
            what they share may vary so much more than their differences that float32 would lose these.
        """
        check_count("num_samples", num_samples, 1)
        check_draw(0, seed)
        blocks, inputs = self.blocks(), without_labels(self.model, inputs)
        check_filled(inputs)
        how = self._statistic(method, blocks, num_samples=num_samples, seed=seed, bound=bound, direction=direction)
        of_softmax = get_likelihood(problem_type or self.problem_type()).ignores_shift

        def again() -> Any:
            with torch.no_grad():
                return call(view.model, inputs)

        with self.recording_view(bare_tensors(blocks)) as view, left_alone(self.model, again):
            check_reads(self.model, inputs, layers_of(blocks), self.outputs_of)
            mean, covariance = linearize(
                view, inputs, blocks, how, self.outputs_of, contrasts=contrasts, of_softmax=of_softmax
            )
        return mean, covariance[0]

    @contextlib.contextmanager
    def recording_view(self, tensors: Iterable[nn.Parameter] = ()) -> Iterator[View]:
        """The model at its mean in ``eval()``, for `linearized.record`: a view where there can be one."""
        with (
            undisturbed(self.model),
            recording_view(self.model, tensors, training=False, is_private=self.draws_in_views) as view,
            self.mean_in(view) if view.is_private else self.mean(),
        ):
            yield view

    def _statistic(self, method: str, blocks: Sequence[GaussianBlock], **options: Any) -> Statistic:
        """A posterior whose blocks never change may keep it for the next batch."""
        return statistic(method, blocks, cache_bytes=self.draw_cache_bytes, **options)

    def blocks(self) -> Sequence[GaussianBlock]:
        """The posterior as independent Gaussians, one per layer; ValueError where it is none."""
        return mean_field_blocks(self.model, self.variances())

    def variances(self) -> dict[nn.Parameter, Tensor]:
        """Marginal variance of every random Parameter; ValueError where the posterior is not Gaussian."""
        raise ValueError(f"A linearised `method` needs a Gaussian posterior, got {type(self).__name__}; use 'sample'.")

    def outputs_of(self, output: Any) -> Tensor:
        """The logits (or values) in what the model returns."""
        return logits_of(output)

    def problem_type(self) -> ProblemType:
        """What the head predicts; single-label classification for a model that transformers does not know."""
        return known_problem_type(self.model)

    def recorded_noise_std(self) -> NoiseStd | None:
        """A regression's noise as the configuration records it, or None."""
        return recorded_noise_std(self.model)


def _stacked(likelihood: Likelihood, outputs: Iterable[Any], inputs: Inputs) -> tuple[Tensor, Tensor | None]:
    """The draws' values, (S, B, ...), and of a softmax over the last axis the logarithms of what it divides by."""
    values, normalizers = [], []
    for output in outputs:
        values.append(likelihood.values(output, inputs))
        normalizer = likelihood.log_normalizers(output, values[-1])
        if normalizer is not None and normalizer.shape == values[-1].shape[:-1]:
            normalizers.append(normalizer)
    return torch.stack(values), torch.stack(normalizers) if len(normalizers) == len(values) else None


def _regressed(values: Tensor, noise_std: NoiseStd | None) -> Predictive:
    """Of the drawn outputs (S, B, ...)."""
    if noise_std != HEAD:
        return Predictive(problem_type="regression", values=values, noise_std=noise_std)
    mean, variance = mean_and_variance(values)
    return Predictive(problem_type="regression", values=mean, noise_std=HEAD, noise_variance=variance)
