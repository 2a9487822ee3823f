"""One batch's prediction, scored against its labels: of S outputs, reduced as they come, or of a `Predictive`."""

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from ..likelihoods import (
    HEAD,
    Likelihood,
    NoiseStd,
    ProblemType,
    gaussian_log_prob,
    get_likelihood,
    regression_values,
    resized,
)
from ..likelihoods.gaussian import regression_labels
from ..predictive import MixturePredictive, Predictive, RunningPredictive

__all__ = ["BatchPrediction", "predict_batch", "score_predictive"]


@dataclass
class BatchPrediction:
    """One batch's averaged prediction.

    Attributes:
        predictions: log mean probabilities, of labels log p - log(1 - p), or regression means; shaped as the logits.
        uncertainty: by name, per example (B,), per label (B, L), per token (B, T) or per pixel (B, H, W).
        scores: by name, where there are labels: the items' `nll` and what other metrics need.
        mask: which items count, (B,), (B, T) or (B, H, W); None without labels.
        attended: which tokens are no padding, (B, T); None where every entry of ``uncertainty`` counts.
    """

    predictions: Any
    uncertainty: dict[str, Tensor]
    scores: dict[str, Tensor] = field(default_factory=dict)
    mask: Tensor | None = None
    attended: Tensor | None = None

    @property
    def loss(self) -> Tensor | None:
        """Mean NLL of the batch's items, or squared error where the noise is not known; None without labels."""
        if self.mask is None:
            return None
        values = self.scores["nll"] if "nll" in self.scores else self.scores["squared_error"]
        return values.sum() / self.mask.sum()  # NaN where no item counts, as the stock loss: 0 would be the best


def predict_batch(
    outputs: Iterable[Any],
    inputs: Mapping[str, Any],
    problem_type: ProblemType,
    noise_std: NoiseStd | None = None,
) -> BatchPrediction:
    """Average the predictions of the S model ``outputs`` for one batch, and score them where ``inputs`` has labels.

    Args:
        outputs: one per draw.
        inputs: the batch.
        problem_type: what the head predicts.
        noise_std: a regression's, or "head"; without it there is neither an aleatoric variance nor an NLL.

    Returns:
        The batch's columns.

    >>> draws = [torch.tensor([[0.9, 0.1]]).log(), torch.tensor([[0.1, 0.9]]).log()]
    >>> batch = predict_batch(draws, {"labels": torch.tensor([1])}, "single_label_classification")
    >>> batch.predictions.exp(), batch.scores["nll"]
    (tensor([[0.5000, 0.5000]]), tensor([0.6931]))
    """
    likelihood = get_likelihood(problem_type)
    if likelihood.has_noise:
        draws = (
            (likelihood.values(output, inputs), None) if noise_std is None else regression_values(output, noise_std)
            for output in outputs
        )
        return _sampled_regression(draws, inputs)
    size, drawn, scored = _label_size(likelihood, inputs), RunningPredictive(), RunningPredictive()
    for output in outputs:
        log_probs = likelihood.values(output, inputs)
        drawn.update(log_probs)
        if size is not None:
            scored.update(resized(log_probs, size))
    return _classified(likelihood, drawn, drawn if size is None else scored, inputs)


def score_predictive(
    predictive: Predictive,
    inputs: Mapping[str, Any],
    problem_type: ProblemType,
    noise_std: NoiseStd | None = None,
) -> BatchPrediction:
    """Score the averaged prediction of a `Predictive`, linearised or of draws.

    Of a linearised regression everything is in closed form, the NLL that of N(y; mean, covariance + noise) over all
    outputs of an example, with the noise's variances on the diagonal.

    Args:
        predictive: of the batch.
        inputs: the batch.
        problem_type: what the head predicts.
        noise_std: a regression's, in place of the predictive's own number.

    Returns:
        The columns of `predict_batch`.

    >>> draws = torch.tensor([[[0.9, 0.1]], [[0.1, 0.9]]]).log()
    >>> predictive = Predictive(problem_type="single_label_classification", log_probs=draws)
    >>> batch = score_predictive(predictive, {"labels": torch.tensor([1])}, "single_label_classification")
    >>> batch.predictions.exp(), batch.scores["nll"]
    (tensor([[0.5000, 0.5000]]), tensor([0.6931]))
    """
    likelihood = get_likelihood(problem_type)
    if not likelihood.has_noise:
        size = _label_size(likelihood, inputs)
        scored = predictive if size is None else predictive.resized(size)
        return _classified(likelihood, predictive, scored, inputs, predictive.mask)
    if noise_std is not None and HEAD not in (noise_std, predictive.noise_std):
        predictive = replace(predictive, noise_std=noise_std)
    if isinstance(predictive, MixturePredictive):
        return _mixed_regression(predictive, inputs, problem_type)
    noise = None if predictive.noise_std is None else predictive.aleatoric_variance
    if predictive.logit_mean is None or predictive.logit_covariance is None:
        assert predictive.values is not None  # a regression
        own = predictive.noise_variance
        variances = itertools.repeat(noise) if own is None else iter(own)
        return _sampled_regression(zip(predictive.values, variances, strict=False), inputs)
    batch = _regressed(predictive.mean, predictive.epistemic_variance, noise, inputs)
    if batch.mask is not None and noise is not None:
        labels = regression_labels(inputs, predictive.mean)
        batch.scores["nll"] = _joint_nll(predictive.logit_mean, predictive.logit_covariance, labels, noise)
    return batch


def _mixed_regression(
    predictive: MixturePredictive, inputs: Mapping[str, Any], problem_type: ProblemType
) -> BatchPrediction:
    """Each part scored by itself, and the mixture's density of all outputs of an example, sum_k w_k p_k(y)."""
    scored = [score_predictive(part, inputs, problem_type) for part in predictive.parts]
    knows_noise = all("aleatoric_variance" in part.uncertainty for part in scored)
    noise = predictive.aleatoric_variance if knows_noise else None
    batch = _regressed(predictive.mean, predictive.epistemic_variance, noise, inputs)
    if all("nll" in part.scores for part in scored):
        weights = predictive.weights.to(predictive.mean.device)
        nll = torch.stack([part.scores["nll"].double() for part in scored])
        batch.scores["nll"] = -(weights.log()[:, None] - nll).logsumexp(0).to(predictive.mean.dtype)
    return batch


def _joint_nll(mean: Tensor, covariance: Tensor, labels: Tensor, noise: Tensor) -> Tensor:
    """-log N(y; mean, covariance + diag(noise)) in float64: (B, L), (B, L, L) -> (B,) in the dtype of ``mean``."""
    diagonal = noise.reshape(mean.shape).double().diag_embed()
    # the noise makes it positive definite; what rounding leaves of asymmetry is no reason to refuse it
    density = MultivariateNormal(mean.double(), covariance.double() + diagonal, validate_args=False)
    log_prob: Tensor = density.log_prob(labels.reshape(mean.shape).double())  # type: ignore[no-untyped-call]
    return -log_prob.to(mean.dtype)


def _label_size(likelihood: Likelihood, inputs: Mapping[str, Any]) -> tuple[int, int] | None:
    """(H, W) of pixels' labels, which are finer than the logits: draws are interpolated before they are averaged."""
    labels = inputs.get("labels") if likelihood.is_per_pixel else None
    return None if labels is None else (labels.shape[-2], labels.shape[-1])


def _classified(
    likelihood: Likelihood,
    drawn: RunningPredictive | Predictive,
    scored: RunningPredictive | Predictive,
    inputs: Mapping[str, Any],
    mask: Tensor | None = None,
) -> BatchPrediction:
    """The prediction of ``drawn``; uncertainties and scores of ``scored``, which differs for pixels alone."""
    log_probs = scored.mean_log_probs
    mask = likelihood.attended(log_probs, inputs) if mask is None else mask
    if mask is None and likelihood.is_per_token and log_probs.dim() == 3:
        mask = torch.ones(log_probs.shape[:2], dtype=torch.bool, device=log_probs.device)
    uncertainty = {
        "predictive_entropy": likelihood.per_example(scored.predictive_entropy),
        "expected_entropy": likelihood.per_example(scored.expected_entropy),
        "mutual_information": likelihood.per_example(scored.mutual_information),
    }
    predictions = likelihood.predictions(drawn.mean_log_probs)
    scores, items = likelihood.scores(log_probs, inputs) or ({}, None)
    return BatchPrediction(predictions, uncertainty, scores, items, mask)


def _sampled_regression(draws: Iterable[tuple[Tensor, Tensor | None]], inputs: Mapping[str, Any]) -> BatchPrediction:
    """Of the draws' means and noise variances: their averages, and, with labels, -log mean_s N(y; f_s, sigma_s^2)."""
    running, density, noise = RunningPredictive(), None, None
    for mean, variance in draws:
        running.update_values(mean)
        if variance is None:
            continue
        noise = variance if noise is None else noise + variance
        if inputs.get("labels") is not None:
            drawn = _log_density(mean, variance, inputs)
            density = drawn if density is None else torch.logaddexp(density, drawn)
    noise = None if noise is None else noise / running.num_samples
    batch = _regressed(running.mean, running.epistemic_variance, noise, inputs)
    if density is not None:
        batch.scores["nll"] = math.log(running.num_samples) - density
    return batch


def _log_density(mean: Tensor, variance: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    """The density log N(y; mean, variance), summed over the outputs of an example, (B,)."""
    labels = regression_labels(inputs, mean)
    log_scale = 0.5 * variance.reshape(labels.shape).log()
    return gaussian_log_prob(labels, mean.reshape(labels.shape), log_scale).sum(1)


def _regressed(mean: Tensor, epistemic: Tensor, aleatoric: Tensor | None, inputs: Mapping[str, Any]) -> BatchPrediction:
    """All but the NLL; with labels, the squared error per example."""
    batch = BatchPrediction(mean[:, None] if mean.dim() == 1 else mean, {"epistemic_variance": epistemic})
    if aleatoric is not None:
        batch.uncertainty["aleatoric_variance"] = aleatoric
    if inputs.get("labels") is not None:
        residual = regression_labels(inputs, mean) - mean.reshape(len(mean), -1)
        batch.scores["squared_error"] = residual.square().mean(1)
        batch.mask = torch.ones(len(mean), dtype=torch.bool, device=mean.device)
    return batch
