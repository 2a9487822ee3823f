"""One batch's prediction, scored against its labels: of S outputs, reduced as they come, or of a `Predictive`."""

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import MultivariateNormal

from ..likelihoods import HEAD, NoiseStd, ProblemType, drawn_values, regression_values, resized, token_mask
from ..likelihoods.outputs import TOKEN_PROBLEMS
from ..predictive import Predictive, RunningPredictive
from .likelihood import item_nll, output_field, regression_labels
from .scores import CONFIDENCE, WRONG

__all__ = ["BatchPrediction", "infer_problem_type", "predict_batch", "score_predictive"]

MAX_CLASSES = 1024
"""Above it (a vocabulary) the probabilities are not gathered, so there is no ECE and no Brier score."""


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
    """The averaged prediction of the S model ``outputs`` for one batch, scored where ``inputs`` has labels.

    ``noise_std``: a regression's, or "head"; without it there is neither an aleatoric variance nor an NLL.

    Errors: ValueError for labels that do not fit the head.

    >>> draws = [torch.tensor([[0.9, 0.1]]).log(), torch.tensor([[0.1, 0.9]]).log()]
    >>> batch = predict_batch(draws, {"labels": torch.tensor([1])}, "single_label_classification")
    >>> batch.predictions.exp(), batch.scores["nll"]
    (tensor([[0.5000, 0.5000]]), tensor([0.6931]))
    """
    if problem_type == "regression":
        draws = (
            (drawn_values(output, problem_type, inputs), None)
            if noise_std is None
            else regression_values(output, noise_std)
            for output in outputs
        )
        return _sampled_regression(draws, inputs)
    if problem_type == "semantic_segmentation":
        return _segmented(outputs, inputs)
    running = RunningPredictive()
    for output in outputs:
        running.update(drawn_values(output, problem_type, inputs))
    return _classified(running, inputs, problem_type)


def score_predictive(
    predictive: Predictive,
    inputs: Mapping[str, Any],
    problem_type: ProblemType,
    noise_std: NoiseStd | None = None,
) -> BatchPrediction:
    """The same columns of a `Predictive`, linearised or of draws: its averaged prediction is what is scored.

    Of a linearised regression everything is in closed form, the NLL that of N(y; mean, covariance + noise) over all
    outputs of an example, with the noise's variances on the diagonal. A ``noise_std`` that is given replaces the
    predictive's own number.

    Errors: ValueError for labels that do not fit the head.

    >>> draws = torch.tensor([[[0.9, 0.1]], [[0.1, 0.9]]]).log()
    >>> predictive = Predictive(problem_type="single_label_classification", log_probs=draws)
    >>> batch = score_predictive(predictive, {"labels": torch.tensor([1])}, "single_label_classification")
    >>> batch.predictions.exp(), batch.scores["nll"]
    (tensor([[0.5000, 0.5000]]), tensor([0.6931]))
    """
    if problem_type != "regression":
        return _classified(predictive, inputs, problem_type, predictive.mask)
    if noise_std is not None and HEAD not in (noise_std, predictive.noise_std):
        predictive = replace(predictive, noise_std=noise_std)
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


def _joint_nll(mean: Tensor, covariance: Tensor, labels: Tensor, noise: Tensor) -> Tensor:
    """-log N(y; mean, covariance + diag(noise)) in float64: (B, L), (B, L, L) -> (B,) in the dtype of ``mean``."""
    diagonal = noise.reshape(mean.shape).double().diag_embed()
    # the noise makes it positive definite; what rounding leaves of asymmetry is no reason to refuse it
    density = MultivariateNormal(mean.double(), covariance.double() + diagonal, validate_args=False)
    log_prob: Tensor = density.log_prob(labels.reshape(mean.shape).double())  # type: ignore[no-untyped-call]
    return -log_prob.to(mean.dtype)


def _classified(
    found: RunningPredictive | Predictive,
    inputs: Mapping[str, Any],
    problem_type: ProblemType,
    mask: Tensor | None = None,
) -> BatchPrediction:
    log_probs = found.mean_log_probs
    batch = BatchPrediction(
        _as_logits(log_probs, problem_type),
        _uncertainties(found),
        attended=token_mask(log_probs, problem_type, inputs) if mask is None else mask,
    )
    if batch.attended is None and log_probs.dim() == 3 and problem_type in TOKEN_PROBLEMS:
        batch.attended = torch.ones(log_probs.shape[:2], dtype=torch.bool, device=log_probs.device)
    if problem_type == "question_answering":
        batch.uncertainty = {name: value.sum(1) for name, value in batch.uncertainty.items()}  # start and end
    _score(batch, log_probs, inputs, problem_type)
    return batch


def _segmented(outputs: Iterable[Any], inputs: Mapping[str, Any]) -> BatchPrediction:
    """Predictions of the head's logits, channel first, as stock recipes take them; the rest where the labels are.

    Labels are finer: each draw's logits are interpolated to them before the draws are averaged. Every pixel's
    probabilities would not fit in memory, so what metrics need of them is computed here.
    """
    labels = inputs.get("labels")
    coarse, fine = RunningPredictive(), RunningPredictive()
    for output in outputs:
        log_probs = drawn_values(output, "semantic_segmentation", inputs)
        coarse.update(log_probs)
        if labels is not None:
            fine.update(resized(log_probs, (labels.shape[-2], labels.shape[-1])))
    found = coarse if labels is None else fine
    batch = BatchPrediction(coarse.mean_log_probs.movedim(-1, 1).contiguous(), _uncertainties(found))
    if labels is not None:
        log_probs = fine.mean_log_probs
        nll, batch.mask = item_nll(log_probs.movedim(-1, 1), inputs, "semantic_segmentation")
        probs, labels = log_probs.exp(), labels.masked_fill(~batch.mask, 0)
        confidence, decision = probs.max(-1)
        of_label = probs.gather(-1, labels[..., None].long()).squeeze(-1)
        brier = probs.square().sum(-1) - 2 * of_label + 1
        batch.scores = {"nll": nll, "brier": brier, CONFIDENCE: confidence, WRONG: (decision != labels).to(torch.uint8)}
    return batch


def _uncertainties(found: RunningPredictive | Predictive) -> dict[str, Tensor]:
    return {
        "predictive_entropy": found.predictive_entropy,
        "expected_entropy": found.expected_entropy,
        "mutual_information": found.mutual_information,
    }


def _as_logits(log_probs: Tensor, problem_type: ProblemType) -> Any:
    if problem_type == "multi_label_classification":
        return log_probs[..., 1] - log_probs[..., 0]
    if problem_type == "question_answering":
        return log_probs[:, 0].contiguous(), log_probs[:, 1].contiguous()
    return log_probs


def _score(batch: BatchPrediction, log_probs: Tensor, inputs: Mapping[str, Any], problem_type: ProblemType) -> None:
    """Adds the items' NLL; for classes also their probabilities and labels, from which ECE and Brier follow."""
    if problem_type == "question_answering":
        if inputs.get("start_positions") is not None and inputs.get("end_positions") is not None:
            sides = {"start_logits": log_probs[:, 0], "end_logits": log_probs[:, 1]}
            nll, batch.mask = item_nll(sides, inputs, problem_type)
            batch.scores = {"nll": nll}
        return
    shifted = inputs.get("shift_labels")
    labels = inputs.get("labels") if shifted is None else shifted
    if labels is None:
        return
    if problem_type == "multi_label_classification":
        nll, batch.mask = item_nll(log_probs[..., 1] - log_probs[..., 0], inputs, problem_type)
        batch.scores = {"nll": nll, "probs": log_probs[..., 1].exp(), "labels": labels}
        return
    # Log-probabilities are logits of themselves: the averaged prediction has the training likelihood's form.
    nll, mask = item_nll(log_probs, inputs, problem_type)
    last = int(problem_type == "causal_lm" and shifted is None)
    labels = labels[:, last:] if last else labels.view(mask.shape)
    if mask.dim() == 2:  # a causal LM's last position, and virtual tokens in front, predict no label
        around = (log_probs.shape[1] - mask.shape[1] - last, last)
        nll, mask, labels = (F.pad(values, around) for values in (nll, mask, labels))
    batch.scores, batch.mask = {"nll": nll}, mask
    if log_probs.shape[-1] <= MAX_CLASSES:
        batch.scores |= {"probs": log_probs.exp(), "labels": labels}


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
    """log N(y; mean, variance), summed over the outputs of an example, (B,)."""
    squares = (regression_labels(inputs, mean) - mean.reshape(len(mean), -1)).square()
    spread = variance.reshape(len(mean), -1)
    return -0.5 * (squares / spread + spread.log() + math.log(2 * math.pi)).sum(1)


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


def infer_problem_type(output: Any, labels: Any) -> ProblemType:
    """For a class that transformers does not know: classification if logits and integer labels look like it.

    >>> infer_problem_type({"logits": torch.zeros(4, 3)}, torch.zeros(4, dtype=torch.long))
    'single_label_classification'
    """
    logits = output_field(output, "logits") if isinstance(output, (Tensor, Mapping)) else None
    if logits is None or not isinstance(labels, Tensor) or labels.is_floating_point() or logits.dim() < 2:
        return "unknown"
    if logits.dim() == 4 and labels.dim() == 3 and logits.shape[1] > 1:
        return "semantic_segmentation"
    if logits.shape[-1] < 2:
        return "unknown"
    if logits.dim() == 2 and labels.dim() == 1:
        return "single_label_classification"
    is_tokens = logits.dim() == 3 and logits.shape[:2] == labels.shape
    return "token_classification" if is_tokens else "unknown"
