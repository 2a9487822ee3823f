"""The protocol of every posterior, and prediction from draws for all of them."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from os import PathLike
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from ..checks import check_draw, is_real, is_whole
from ..forward import Inputs, call, check_filled, check_inputs
from ..likelihoods import (
    HEAD,
    IGNORED,
    NoiseStd,
    ProblemType,
    check_noise_std,
    check_problem_type,
    get_likelihood,
    ignored_label,
    is_encoder_decoder_lm,
    logits_of,
    mean_and_variance,
    resolve_problem_type,
    unwrapped,
)
from ..linearized import check_reads, recording_view
from ..linearized.blocks import GaussianBlock, TensorBlock, mean_field_blocks
from ..linearized.captured import Statistic, bare_tensors, linearize
from ..linearized.links import Link, ignores_shift, linearized_predictive
from ..linearized.methods import METHODS, SAMPLING, Bound, statistic
from ..predictive import Predictive
from ..sampling.passes import monte_carlo
from ..sampling.random_state import left_alone
from ..sampling.views import View, itself, private_view

_SPANS = ("start_positions", "end_positions")
_CACHES = ("past_key_values", "cache_params")


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
        """What the posterior says about ``inputs``."""

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
    """

    is_shared_by_views = True

    model: nn.Module
    num_draws: int | None = None
    default_method: str = "sample"
    draw_cache_bytes: int = 0
    draws_in_views: bool = False

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

    def passes(self, inputs: Inputs, *, num_samples: int = 16, seed: int = 0) -> Iterator[Any]:
        """Yields the model's output under each draw, in ``eval()`` mode, without gradients and without labels.

        Between two yields, and afterwards, the model and the caller's random state are as they were. There are at most
        ``num_draws`` passes.

        Raises:
            TypeError, ValueError: ``inputs`` or ``num_samples`` is not as described.
        """
        check_num_samples(num_samples)
        check_draw(0, seed)
        inputs = without_labels(self.model, inputs)
        check_filled(inputs)
        num_samples = num_samples if self.num_draws is None else min(num_samples, self.num_draws)

        random = list(self.random_parameters())
        view = (
            private_view(self.model, {id(p): own for p, own in self.own_parameters().items()})
            if self.draws_in_views
            else None
        )

        @contextlib.contextmanager
        def draw(index: int, seed: int) -> Iterator[None]:
            if view is not None:
                with self.draw_in(view, index, seed):
                    yield
            else:
                with itself(self.model), self.draw(index, seed):
                    yield

        return monte_carlo(
            self.model if view is None else view.model,
            draw,
            random if view is None else [view.parameter(parameter) for parameter in random],
            inputs,
            num_samples=num_samples,
            seed=seed,
            known_as=(self.model, random),
            keeps_random_state=True,
        )

    # -- on a view ---------------------------------------------------------------------------------------------------

    def own_parameters(self) -> Mapping[nn.Parameter, nn.Parameter]:
        """Parameters of the model, and what a private view has in their place for `draw_in` to write."""
        return {}

    def draw_in(self, view: View, index: int, seed: int) -> AbstractContextManager[None]:
        """Draw ``index`` of ``seed`` in a private view, which has no other user: nothing needs to be put back."""
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
                `posteriors.methods`. By default `default_method`.
            link: from the linearised network's Gaussian logits to probabilities: see `posteriors.logits`.
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
            outputs = self.passes(inputs, num_samples=num_samples, seed=seed)
            values = torch.stack([likelihood.values(output, inputs) for output in outputs])
            if likelihood.has_noise:
                return _regressed(values, noise_std)
            return Predictive(
                problem_type=problem,
                log_probs=values,
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
        """Mean (B, C) and covariance (B, C, C) of the linearised network's outputs, or (B, T, C) and (B, T, C, C).

        Arguments are as in `predict`. The covariance of a softmax's logits is float64: what they share may vary so much
        more than their differences that float32 would lose these.

        Raises:
            ValueError: the posterior is not Gaussian, or the model has no rule for a layer or no such outputs.
        """
        check_num_samples(num_samples)
        check_draw(0, seed)
        blocks, inputs = self.blocks(), without_labels(self.model, inputs)
        check_filled(inputs)
        how = self._statistic(method, blocks, num_samples=num_samples, seed=seed, bound=bound, direction=direction)
        modules = [m for block in blocks if not isinstance(block, TensorBlock) for m in block.modules]
        of_softmax = get_likelihood(problem_type or self.problem_type()).ignores_shift
        with self.recording_view(bare_tensors(blocks)) as view, left_alone(self.model, lambda: called(view, inputs)):
            check_reads(self.model, inputs, modules, self.outputs_of)
            mean, covariance = linearize(
                view, inputs, blocks, how, self.outputs_of, contrasts=contrasts, of_softmax=of_softmax
            )
        return mean, covariance[0]

    @contextlib.contextmanager
    def recording_view(self, tensors: Iterable[nn.Parameter] = ()) -> Iterator[View]:
        """The model at its mean in ``eval()``, for `jacobians.record`: a view where there can be one."""
        with (
            recording_view(self.model, tensors, training=False, is_private=self.draws_in_views) as view,
            self.mean_in(view) if view.is_private else self.mean(),
        ):
            yield view

    def _statistic(self, method: str, blocks: Sequence[GaussianBlock], **options: Any) -> Statistic:
        """A posterior whose blocks never change may keep it for the next batch."""
        return statistic(method, blocks, cache_bytes=self.draw_cache_bytes, **options)

    def blocks(self) -> Sequence[GaussianBlock]:
        """The posterior as independent Gaussians, one per layer.

        Raises:
            ValueError: it is not Gaussian.
        """
        return mean_field_blocks(self.model, self.variances())

    def variances(self) -> dict[nn.Parameter, Tensor]:
        """Marginal variance of every random Parameter.

        Raises:
            ValueError: the posterior is not Gaussian.
        """
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


def _regressed(values: Tensor, noise_std: NoiseStd | None) -> Predictive:
    """Of the drawn outputs (S, B, ...)."""
    if noise_std != HEAD:
        return Predictive(problem_type="regression", values=values, noise_std=noise_std)
    mean, variance = mean_and_variance(values)
    return Predictive(problem_type="regression", values=mean, noise_std=HEAD, noise_variance=variance)


def check_num_samples(num_samples: int) -> None:
    """A whole number >= 1.

    Raises:
        ValueError: otherwise.
    """
    if not is_whole(num_samples) or num_samples < 1:
        raise ValueError(f"`num_samples` must be a whole number >= 1, got {num_samples!r}.")


def called(view: View, inputs: Inputs) -> Any:
    """What the model, or a view of it, returns."""
    with torch.no_grad():
        return call(view.model, inputs)


def without_labels(model: nn.Module, inputs: Inputs) -> Inputs:
    """``inputs`` less every kind of label, so that the model computes no loss; decoder inputs are made of them first.

    Raises:
        TypeError: neither a mapping nor a tensor, nor several.
        ValueError: the inputs hold a key-value cache, which belongs to one network.
    """
    check_inputs(inputs)
    if not isinstance(inputs, Mapping):
        return inputs
    cached = [name for name in _CACHES if inputs.get(name) is not None]
    if cached:
        raise ValueError(f"`inputs` must not hold {cached}: the cache of one network is no cache of another draw.")
    kept = {name: value for name, value in inputs.items() if "label" not in name and name not in _SPANS}
    labels = inputs.get("labels")
    given = {"decoder_input_ids", "decoder_inputs_embeds"} & set(kept)
    if labels is not None and not given and is_encoder_decoder_lm(model):
        kept["decoder_input_ids"] = _decoder_input_ids(unwrapped(model), labels)
    return kept


def _decoder_input_ids(model: Any, labels: Tensor) -> Tensor:
    """What the model's own forward makes of labels: shifted right behind the start token, -100 replaced by padding."""
    prepare = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if callable(prepare):
        return cast(Tensor, prepare(labels=labels))
    start = labels.new_full((labels.shape[0], 1), model.config.decoder_start_token_id)
    shifted = torch.cat([start, labels[:, :-1]], dim=1)
    return shifted.masked_fill(shifted == IGNORED, model.config.pad_token_id)


def known_problem_type(model: nn.Module) -> ProblemType:
    """The head's problem type; single-label classification for a model that transformers does not know."""
    problem = resolve_problem_type(model)
    return "single_label_classification" if problem == "unknown" else problem


def has_many_logits(model: nn.Module, problem_type: ProblemType) -> bool:
    """Whether the head has too many logits per prediction for a covariance of them: over a vocabulary or positions."""
    if not get_likelihood(problem_type).is_linearizable:
        return True
    output_embeddings = getattr(unwrapped(model), "get_output_embeddings", None)  # a masked language model's too
    return callable(output_embeddings) and output_embeddings() is not None


def recorded_noise_std(model: nn.Module) -> NoiseStd | None:
    """A regression's noise as its configuration records it, or None."""
    recorded = getattr(getattr(unwrapped(model), "config", None), "bayesian", None)
    noise = recorded.get("noise_std") if isinstance(recorded, Mapping) else None
    if noise == HEAD:
        return HEAD
    return float(noise) if is_real(noise) else None
