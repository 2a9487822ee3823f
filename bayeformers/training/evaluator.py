"""One evaluation: how its batches are predicted, the columns that are kept of them, and their metrics."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers.trainer_utils import PredictionOutput

from ..likelihoods import Likelihood, NoiseStd, ProblemType, get_likelihood, unwrapped, without_ignored
from ..likelihoods.registry import infer_problem_type
from ..likelihoods.segmentation import CONFIDENCE, WRONG
from ..linearized.links import ignores_shift
from ..linearized.methods import SAMPLING
from ..metrics import aurc, brier_score, expected_calibration_error
from ..metrics.calibration import DEFAULT_BINS, bins_of
from ..nn.draws import posterior_mean
from ..posteriors import BasePosterior, PointPosterior
from ..posteriors.heads import has_many_logits
from ..sampling.views import unwrapped_forward
from .arguments import BayesianTrainingArguments
from .checks import check_variance_head
from .columns import BatchPrediction, predict_batch, score_predictive
from .items import LikelihoodsByLabels, settled_problem_type

__all__ = ["BayesianPredictionOutput", "Columns", "Evaluation", "evaluation_metrics"]

_UNKNOWN = (
    "The likelihood of {} is unknown: it is evaluated at the posterior mean, by its own loss, without uncertainties. "
    "Set `config.problem_type` if it classifies or regresses."
)


class BayesianPredictionOutput(PredictionOutput):
    """A `PredictionOutput` (it unpacks into the same three) with `uncertainty`: arrays (N, ...) by name.

    Token-level arrays are padded with NaN to the longest example. `abstain` says which inputs the model's abstention
    policy refuses, bool (N,), or (N, T) of tokens; None where it has none that holds of these predictions.
    """

    uncertainty: dict[str, NDArray[np.floating]]
    abstain: NDArray[np.bool_] | None

    def __new__(
        cls,
        predictions: Any,
        label_ids: Any,
        metrics: Any,
        uncertainty: dict[str, NDArray[np.floating]],
        abstain: NDArray[np.bool_] | None = None,
    ) -> "BayesianPredictionOutput":
        """Takes `PredictionOutput`'s three fields, the uncertainties and what is refused."""
        output = super().__new__(cls, predictions, label_ids, metrics)
        output.uncertainty, output.abstain = uncertainty, abstain
        return output

    def __getnewargs__(self) -> tuple[Any, ...]:
        return (*self, self.uncertainty, self.abstain)


class Columns:
    """Gathered arrays by name, one list entry per batch."""

    def __init__(self) -> None:
        self._batches: list[dict[str, NDArray[Any]]] = []
        self._uncertainty: tuple[str, ...] = ()
        self._sort: Callable[[NDArray[Any]], NDArray[Any]] = np.asarray

    def add(self, columns: dict[str, NDArray[Any]], uncertainty: tuple[str, ...]) -> None:
        """One batch's arrays; ``uncertainty`` names those that describe inputs whether or not they have labels."""
        self._batches.append(columns)
        self._uncertainty = uncertainty

    def sort(self, rows_of: Callable[[NDArray[Any]], NDArray[Any]]) -> None:
        """Change the order in which `uncertainties` gives the rows."""
        self._sort = rows_of

    @property
    def per_example(self) -> bool:
        """Whether each uncertainty is one number per example, not per word or pixel; no process waits for others."""
        return all(batch[name].ndim == 1 for batch in self._batches for name in self._uncertainty)

    def uncertainties(self) -> dict[str, NDArray[np.floating]]:
        """(N,), (N, L) or (N, T) by name; shorter rows are padded with NaN."""
        padded = {name: _padded([_attended(batch, name) for batch in self._batches]) for name in self._uncertainty}
        return {name: self._sort(column) for name, column in padded.items()}

    def items(self) -> dict[str, NDArray[Any]]:
        """Every column at the items that count: (n,) or (n, C) each."""
        names = [name for batch in self._batches[:1] for name in batch if name not in ("mask", "attended")]
        return {name: np.concatenate([_counted(batch, name) for batch in self._batches]) for name in names}


def _attended(columns: dict[str, NDArray[Any]], name: str) -> NDArray[Any]:
    """NaN at padding, where a value depends on what the example was batched with."""
    attended = columns.get("attended")
    return columns[name] if attended is None else np.where(attended.astype(bool), columns[name], np.nan)


def _counted(columns: dict[str, NDArray[Any]], name: str) -> NDArray[Any]:
    mask = columns.get("mask")
    return columns[name] if mask is None else columns[name][mask.astype(bool)]


def _padded(arrays: list[NDArray[Any]]) -> NDArray[np.floating]:
    shape = np.max([array.shape[1:] for array in arrays], axis=0)
    missing = [[(0, 0), *((0, n) for n in shape - array.shape[1:])] for array in arrays]
    padded = [np.pad(array, width, constant_values=np.nan) for array, width in zip(arrays, missing, strict=True)]
    return np.concatenate(padded)


def evaluation_metrics(columns: Columns) -> dict[str, float]:
    """Metrics over the items of an evaluation, unprefixed: means of the columns, and scores of the probabilities.

    `nll` is that of the averaged prediction; a regression adds `rmse`. Without labels only the uncertainties.

    Returns:
        Metrics by name.
    """
    items = columns.items()
    confidence, wrong = items.pop(CONFIDENCE, None), items.pop(WRONG, None)
    averaged = {name: values for name, values in items.items() if name not in ("probs", "labels") and values.size > 0}
    metrics = {name: float(np.mean(values, dtype=np.float64)) for name, values in averaged.items()}
    if "nll" in items and "nll" not in averaged:
        metrics["nll"] = float("nan")  # labels, none of which counts: no loss, and no best model by it
    if "squared_error" in metrics:
        metrics["rmse"] = metrics.pop("squared_error") ** 0.5
    if "probs" in items and "labels" in items and len(items["labels"]):
        probs = items["probs"].reshape(-1, items["probs"].shape[-1]).astype(np.float64)
        probs, labels = probs / probs.sum(1, keepdims=True), items["labels"].ravel().astype(np.int64)
        metrics["ece"] = expected_calibration_error(probs, labels)
        metrics["brier"] = brier_score(probs, labels)
        metrics["aurc"] = aurc(probs.max(1), (probs.argmax(1) != labels).astype(np.float64))
    if confidence is not None and wrong is not None and len(wrong):
        bins = bins_of(confidence.astype(np.float64), wrong == 0, DEFAULT_BINS, "width")
        metrics["ece"], metrics["aurc"] = bins.expected_error, aurc(confidence, wrong.astype(np.float64))
    return metrics


@dataclass
class Evaluation:
    """One pass over a dataset: how its batches are predicted, and what was predicted so far.

    Attributes:
        model: the network.
        args: the method, the draws' seed and the link.
        posterior: where the weights are drawn from, with the draws that it caches; None of a point estimate.
        num_samples: draws per prediction.
        has_own_loss: whether a function of the user's is the loss, so that the head may be of any kind.
        noise_std: a regression's noise; asked for when a batch needs it.
        autocast: the context of a forward under mixed precision.
        say: tells the user, once.
        columns: what was kept of the batches.
    """

    model: nn.Module
    args: BayesianTrainingArguments
    posterior: BasePosterior | None
    num_samples: int
    has_own_loss: bool
    noise_std: Callable[[], NoiseStd | None]
    autocast: Callable[[], contextlib.AbstractContextManager[Any]]
    say: Callable[[str], None]
    columns: Columns = field(default_factory=Columns)
    _likelihoods: LikelihoodsByLabels = field(default_factory=LikelihoodsByLabels)

    def likelihood(self, inputs: Mapping[str, Any]) -> Likelihood:
        """The head's, which is found at the first batch of a kind of labels."""
        labels = inputs.get("labels")
        return self._likelihoods.get(labels, lambda: self._find_likelihood(inputs, labels))

    def _find_likelihood(self, inputs: Mapping[str, Any], labels: Any) -> Likelihood:
        own_loss = self.has_own_loss
        or_unknown = own_loss or self.posterior is None
        found = settled_problem_type(self.model, labels, self.say, has_own_loss=own_loss, or_unknown=or_unknown)
        if found == "unknown":
            with torch.no_grad(), posterior_mean(self.model):
                found = infer_problem_type(self.model(**inputs), labels)
            if found == "unknown":
                self.say(_UNKNOWN.format(type(self.model).__name__))
        check_variance_head(self.args.noise_std, found)
        return get_likelihood(found)

    def predict(self, inputs: dict[str, Any]) -> BatchPrediction:
        """The averaged prediction of one batch, scored where it has labels; for a likelihood that is known."""
        likelihood = self.likelihood(inputs)
        noise_std = self.noise_std() if likelihood.has_noise else None
        if self._is_linearized(likelihood):
            return self._linearized(inputs, likelihood, noise_std)
        posterior = self.posterior or PointPosterior(self.model)
        problem_type = likelihood.problem_type
        if posterior.predicts_itself:
            return self._own_prediction(posterior, inputs, problem_type, noise_std)
        with torch.no_grad(), self.autocast():
            outputs = posterior.passes(inputs, num_samples=self.num_samples, seed=self.args.eval_seed)
            return predict_batch(outputs, without_ignored(inputs, self.model, problem_type), problem_type, noise_std)

    def _own_prediction(
        self, posterior: BasePosterior, inputs: dict[str, Any], problem_type: ProblemType, noise_std: NoiseStd | None
    ) -> BatchPrediction:
        """Of a posterior whose prediction is more than an average of passes: it knows what to make of the noise."""
        is_sampled = (self.args.eval_method or posterior.default_method) in SAMPLING
        with self.autocast() if is_sampled else _linearizing(self.model):
            predictive = posterior.predict(
                inputs,
                num_samples=self.num_samples,
                seed=self.args.eval_seed,
                method=self.args.eval_method,
                link=self.args.eval_link,
                problem_type=problem_type,
                noise_std=noise_std,
            )
        return score_predictive(predictive, inputs, problem_type)

    def keep(self, batch: BatchPrediction, gather: Callable[[Tensor], NDArray[Any]]) -> None:
        """Add a batch's columns, those of all ranks."""
        masks = {"mask": batch.mask, "attended": batch.attended}
        flags = {name: mask.to(torch.uint8) for name, mask in masks.items() if mask is not None}
        columns = {**batch.uncertainty, **batch.scores, **flags}
        self.columns.add({name: gather(column) for name, column in columns.items()}, tuple(batch.uncertainty))

    def metrics(self) -> dict[str, float]:
        """Those of all that was kept, without a prefix."""
        found = evaluation_metrics(self.columns)
        if math.isnan(found.get("nll", 0.0)):
            self.say("No label of the evaluated data counts (all are -100, or no answer is in its text): loss NaN.")
        return found

    @property
    def method(self) -> str:
        """The method in force; a point estimate gives one answer by all of them."""
        own = self.posterior
        if own is None or own.predicts_itself:
            return "sample"
        return self.args.eval_method or own.default_method

    def _is_linearized(self, likelihood: Likelihood) -> bool:
        """Whether to predict with the linearised network; ValueError where it is asked for and cannot be done."""
        if self.method in SAMPLING:
            return False
        if not has_many_logits(self.model, likelihood.problem_type):
            return True
        reason = f"{type(unwrapped(self.model)).__name__} has too many logits per prediction for a covariance of them"
        if self.args.eval_method is not None:
            raise ValueError(f'`eval_method`={self.method!r} linearises the network, but {reason}: use "sample".')
        self.say(
            f"The posterior's own method {self.method!r} linearises the network, but {reason}: sampling it instead."
        )
        return False

    def _linearized(
        self, inputs: dict[str, Any], likelihood: Likelihood, noise_std: NoiseStd | None
    ) -> BatchPrediction:
        """In the model's own precision: covariances are sums of squares of gradients, which need their bits."""
        assert self.posterior is not None  # else `method` samples
        with _linearizing(self.model):
            predictive = self.posterior.predict(
                inputs,
                num_samples=self.num_samples,
                method=self.method,
                seed=self.args.eval_seed,
                problem_type=likelihood.problem_type,
                noise_std=noise_std,
                link=self.args.eval_link,
                contrasts=ignores_shift(likelihood.problem_type, self.args.eval_link),
            )
        return score_predictive(predictive, inputs, likelihood.problem_type, noise_std)


@contextlib.contextmanager
def _linearizing(model: nn.Module) -> Iterator[None]:
    """Without the autocast that accelerate puts into `forward`, where `torch.autocast(enabled=False)` has no say.

    Jacobians are taken by autograd, whatever the caller has switched off.
    """
    with torch.enable_grad(), unwrapped_forward(model):
        yield
