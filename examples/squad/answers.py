"""From a model to its answers: logits of every window under every draw, spans, and a temperature."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from bayeformers import BayesianTrainer
from bayeformers.posteriors import PointPosterior
from examples.squad.scores import exact_match, f1
from examples.squad.spans import SpanDistribution, SpanLogits, span_distribution
from examples.squad.windows import Reading, Readings

Array = NDArray[np.float64]
TEMPERATURES = (0.05, 20.0)
"""Between which one is sought."""


# --- Logits ----------------------------------------------------------------------------------------------------------
def predict_logits(trainer: BayesianTrainer, readings: Readings) -> list[SpanLogits]:
    """Logits of every question under the draws of the trainer's posterior, or of its point estimate; in all processes.

    Draw s is the same network for all windows and batches, whichever process reads them.
    """
    posterior = trainer.posterior or PointPosterior(trainer.model)
    args, rows = trainer.args, []
    for batch in tqdm(_in_order(trainer, readings), desc="answering", disable=args.disable_tqdm):
        with torch.no_grad(), trainer.compute_loss_context_manager():
            outputs = posterior.passes(batch, num_samples=args.num_eval_samples, seed=args.eval_seed)
            ends = [torch.stack([output.start_logits, output.end_logits], 1) for output in outputs]
        drawn = torch.stack(ends, dim=1).float()  # (B, S, 2, T)
        drawn = trainer.accelerator.pad_across_processes(drawn, dim=3)
        rows += list(trainer.accelerator.gather_for_metrics(drawn).cpu())
    return list(_by_question(rows, readings.rows))


def _in_order(trainer: BayesianTrainer, readings: Readings) -> DataLoader[Any]:
    """Batches in the order of the rows; the Trainer's own sort by length if training's do."""
    names = set(readings.features.column_names) - {"start_positions", "end_positions"}
    features = readings.features.select_columns(sorted(names))
    loader = DataLoader(features, trainer.args.eval_batch_size, collate_fn=trainer.data_collator)
    return trainer.accelerator.prepare_data_loader(loader)


def _by_question(rows: list[torch.Tensor], readings: Sequence[Reading]) -> Iterator[SpanLogits]:
    """Windows (S, 2, T) of several lengths -> a question's (S, W, T) each; what is added at the end counts nowhere."""
    begin = 0
    for reading in readings:
        windows = rows[begin : begin + len(reading.windows)]
        begin += len(reading.windows)
        length = max(window.shape[-1] for window in windows)
        padded = [torch.nn.functional.pad(window, (0, length - window.shape[-1])) for window in windows]
        start, end = torch.stack(padded, dim=2).unbind(1)
        yield SpanLogits(start, end)


# --- Answers ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Answers:
    """One method's answers to N questions; arrays (N,), entropies in nats.

    ``confidence`` is the probability of the answer given, ``no_answer`` that of none (0 where it is no option), ``nll``
    that of the truth, infinite where the truth is out of reach. ``epistemic`` is 0 for a point estimate.
    """

    texts: list[str]
    confidence: Array
    no_answer: Array
    total: Array
    aleatoric: Array
    epistemic: Array
    nll: Array
    exact_match: Array
    f1: Array

    def __getitem__(self, mask: NDArray[np.bool_]) -> Answers:
        """Those of some questions."""
        texts = [text for text, kept in zip(self.texts, mask, strict=True) if kept]
        arrays = {name: value[mask] for name, value in vars(self).items() if name != "texts"}
        return Answers(texts, **arrays)


@dataclass(frozen=True)
class Reader:
    """How logits become answers: the longest span, whether "no answer" is an option, and a temperature."""

    max_length: int
    has_null: bool
    temperature: float = 1.0

    def distribution(self, reading: Reading, logits: SpanLogits) -> SpanDistribution:
        return span_distribution(
            reading, logits, max_length=self.max_length, has_null=self.has_null, temperature=self.temperature
        )

    def answers(self, readings: Readings, logits: Sequence[SpanLogits]) -> Answers:
        rows = [_answer(self.distribution(*pair)) for pair in zip(readings.rows, logits, strict=True)]
        columns = {name: np.array([row[name] for row in rows], dtype=np.float64) for name in rows[0] if name != "text"}
        return Answers([row["text"] for row in rows], **columns)

    def nll(self, readings: Readings, logits: Sequence[SpanLogits]) -> Array:
        """-log p of the truths, (N,)."""
        pairs = zip(readings.rows, logits, strict=True)
        return np.array([self.distribution(reading, found).nll for reading, found in pairs])


def _answer(distribution: SpanDistribution) -> dict[str, Any]:
    predictive, log_probs = distribution.predictive, distribution.log_probs
    is_point = predictive.num_samples == 1  # whose mutual information is 0, not the rounding error of a difference
    text, truths = distribution.answer, distribution.reading.question.truths
    null = distribution.null
    return {
        "text": text,
        "confidence": float(log_probs.max().exp()),
        "no_answer": 0.0 if null is None else float(log_probs[null].exp()),
        "total": float(predictive.predictive_entropy),
        "aleatoric": float(predictive.expected_entropy),
        "epistemic": 0.0 if is_point else float(predictive.mutual_information),
        "nll": distribution.nll,
        "exact_match": exact_match(text, truths),
        "f1": f1(text, truths),
    }


def fit_span_temperature(reader: Reader, readings: Readings, logits: Sequence[SpanLogits]) -> float:
    """The T of least mean NLL of softmax(scores / T), over the questions whose truth is in reach.

    Raises:
        ValueError: there is no such question.
    """
    reachable = np.isfinite(reader.nll(readings, logits))
    if not reachable.any():
        raise ValueError(
            "no validation question has its answer in reach: `max_answer_length` is shorter than each, or all are "
            "unanswerable and training has no such question."
        )

    def loss(log_temperature: float) -> float:
        tempered = Reader(reader.max_length, reader.has_null, math.exp(log_temperature))
        return float(tempered.nll(readings, logits)[reachable].mean())

    low, high = map(math.log, TEMPERATURES)
    return math.exp(minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 0.01}).x)
