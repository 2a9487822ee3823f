"""`PosteriorMonitor`: scales, KL and draws of a posterior in training, and a line in the log where one is ill."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import has_length

from ..checks import check_count, check_number
from ..conversion.convert import is_bayesian
from ..conversion.record import conversion_record
from ..sampling.random_state import preserved as preserved_rng
from .health import DrawnRows, LayerGroup, drawn_rows, layer_groups
from .items import as_labels
from .schedules import lent_model

__all__ = ["PosteriorMonitor", "writers_of"]

logger = logging.getLogger(__name__)

COLLAPSE_SHARE, LABEL_SHARE, AGREEING, OUTWEIGHS = 0.98, 0.9, 1e-3, 10.0
LEAST_ITEMS, LEAST_ENTROPY = 16, 0.01  # below which every draw is certain, and that they agree means nothing
_COLLAPSE = (
    "Collapse: class {0} is predicted for {1:.0%} of {2} training items, and is the label of {3:.0%} (averages of {4} "
    "draws). Lower `learning_rate`, look whether the labels fit the inputs, or let the KL in later by "
    "`kl_warmup_ratio`."
)
_AGREES = (
    "The draws agree: their mutual information is {0:.2g} nats, {1:.2%} of the entropy ({2} training items, "
    "{3} draws), so that the posterior says no more than its mean. Raise `delta` of `to_bayesian`{4}, or "
    "`rho_learning_rate` if `median_log_scale_change` stays near 0."
)
_HEAVY_KL = (
    "The KL outweighs the data: kl_weight * kl / N = {0:.3g} nats per item, the NLL {1:.3g} (means since the last log, "
    "N = {2:,}). The weights go to the prior whatever the data say: choose a prior around the trained weights "
    "(`MopedPrior`), a wider one, a `kl_weight` below {3:g}, or `kl_warmup_ratio`."
)
_NOT_FED = (
    "`PosteriorMonitor` sees the logs of a `BayesianTrainer` alone: this trainer's have no KL, and nothing of it."
)


class PosteriorMonitor(TrainerCallback, ExportableState):
    """Watches a converted model while it trains, at each log of the loss.

        trainer = BayesianTrainer(model=model, args=args, train_dataset=train, callbacks=[PosteriorMonitor()])

    It adds to the log, and so to whatever `report_to` names, ``kl/GROUP`` (nats) and ``relative_scale/GROUP`` (the
    median of sigma / |mu|) of each group of layers; and of draws on a few training rows ``draws_mutual_information``,
    ``draws_entropy`` (nats) and ``draws_effective``, the share of the draws that count in the predicted density of a
    label (Kong 1992; Chopin 2002). TensorBoard gets histograms of log10(sigma / |mu|) too.

    Three alarms are one line of the log each, once in a training, after ``patience`` looks one after the other:
    predictions that have collapsed to one class, draws that agree, and a KL that outweighs the data tenfold. The rows
    are the same at every look, evenly spaced in the training data; heads without few class probabilities (regressions,
    language models, spans) are watched without them. Training goes on as without it, bit for bit. Process 0 alone
    looks.

    Args:
        every: of how many logs one is looked at, >= 1.
        num_rows: training rows that are predicted, >= 0; 0: none.
        num_draws: draws of these predictions, >= 2.
        patience: looks in a row before an alarm, >= 1.
        after: share of the steps before which there is no alarm, in [0, 1].
        histograms: whether TensorBoard gets histograms.

    Raises:
        ValueError: an argument is out of range; in training, a model that is not Bayesian.
    """

    def __init__(
        self,
        every: int = 1,
        num_rows: int = 32,
        num_draws: int = 8,
        *,
        patience: int = 3,
        after: float = 0.1,
        histograms: bool = True,
    ) -> None:
        for name, value, least in (("every", every, 1), ("num_rows", num_rows, 0), ("num_draws", num_draws, 2)):
            check_count(name, value, least)
        check_count("patience", patience, 1)
        check_number("after", after, 0.0, 1.0)
        if not isinstance(histograms, bool):
            raise ValueError(f"`histograms` must be True or False, got {histograms!r}.")
        self.every, self.num_rows, self.num_draws, self.patience = every, num_rows, num_draws, patience
        self.after, self.histograms = float(after), histograms
        self.said: list[str] = []  # names of the alarms
        self._streaks: dict[str, int] = {}
        self._rows: Mapping[str, Any] | None = None
        self._num_logs, self._seen_step = 0, -1

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, for `restore_callback_states_from_checkpoint`: the alarms that were given."""
        names = ("every", "num_rows", "num_draws", "patience", "after", "histograms")
        return {"args": {name: getattr(self, name) for name in names}, "attributes": {"said": list(self.said)}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Choose the rows; ValueError where there is no posterior to watch."""
        model = lent_model(kwargs)
        if not is_bayesian(model):
            raise ValueError(
                f"`PosteriorMonitor` watches the scales of a converted model, and this {type(model).__name__} has "
                "none: call `to_bayesian(model)` before making the trainer."
            )
        self._streaks, self._num_logs, self._seen_step, self._rows = {}, 0, -1, None
        if state.global_step == 0:
            self.said = []
        if self.num_rows and state.is_world_process_zero:
            self._rows = _rows_of(kwargs.get("train_dataloader"), self.num_rows, args.label_names)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Say once that another trainer does not ask."""
        is_missed = "loss" in (kwargs.get("logs") or {}) and self._seen_step != state.global_step
        if is_missed and state.is_world_process_zero and "not fed" not in self.said:
            self.said.append("not fed")
            logger.warning(_NOT_FED)

    def look(
        self, model: nn.Module, state: TrainerState, logs: Mapping[str, float], writers: Iterable[Any] = ()
    ) -> dict[str, float]:
        """Return what to add to a log of the training's loss; `BayesianTrainer` asks, before it logs.

        Args:
            model: unwrapped.
            state: how far the training is.
            logs: with the parts of the ELBO.
            writers: of TensorBoard.
        """
        self._seen_step = state.global_step
        self._num_logs += 1
        if (self._num_logs - 1) % self.every or not is_bayesian(model):
            return {}
        with preserved_rng():
            groups, drawn = layer_groups(model), self._drawn(model)
        for writer in writers if self.histograms else ():
            _write_histograms(writer, groups, state.global_step)
        self._sound(model, state, logs, drawn)
        found = {f"kl/{name}": group.kl for name, group in groups.items()}
        scales = {name: group.relative_scales for name, group in groups.items() if len(group.relative_scales)}
        found |= {f"relative_scale/{name}": float(values.median()) for name, values in scales.items()}
        if drawn is not None:
            found["draws_mutual_information"], found["draws_entropy"] = drawn.mutual_information, drawn.entropy
            found["draws_effective"] = drawn.effective_draws / drawn.num_draws
        return found

    def _drawn(self, model: nn.Module) -> DrawnRows | None:
        if self._rows is None:
            return None
        device = next(model.parameters()).device
        return drawn_rows(model, {k: v.to(device) for k, v in self._rows.items()}, self.num_draws)

    def _sound(self, model: nn.Module, state: TrainerState, logs: Mapping[str, float], drawn: DrawnRows | None) -> None:
        """Each alarm once, when its condition has held at ``patience`` looks in a row."""
        found = {"kl": _heavy_kl(model, logs), "collapse": None, "agreement": None}
        if drawn is not None and drawn.num_items >= LEAST_ITEMS:
            found |= {"collapse": _collapsed(drawn), "agreement": _agreeing(model, drawn)}
        is_early = state.global_step < self.after * state.max_steps
        for name, message in found.items():
            self._streaks[name] = 0 if message is None or is_early else self._streaks.get(name, 0) + 1
            if message is not None and self._streaks[name] >= self.patience and name not in self.said:
                self.said.append(name)
                logger.warning("PosteriorMonitor, step %d: %s", state.global_step, message)


def writers_of(callbacks: Iterable[Any]) -> list[Any]:
    """The TensorBoard writers that a Trainer's callbacks hold."""
    writers = (getattr(callback, "tb_writer", None) for callback in callbacks)
    return [writer for writer in writers if hasattr(writer, "add_histogram")]


def _rows_of(loader: Any, num_rows: int, label_names: list[str] | None) -> Mapping[str, Any] | None:
    """Evenly spaced training rows, collated; None where rows cannot be read by their number, or have no labels."""
    data, collate = getattr(loader, "dataset", None), getattr(loader, "collate_fn", None)
    if collate is None or not (has_length(data) and hasattr(data, "__getitem__")) or not len(data):
        return None
    with preserved_rng():
        batch = collate([data[int(index)] for index in np.unique(np.linspace(0, len(data) - 1, num_rows).round())])
    if not isinstance(batch, Mapping):
        return None
    named = as_labels(batch, label_names)
    rows = {name: value for name, value in named.items() if isinstance(value, Tensor)}
    return rows if "labels" in rows else None


def _write_histograms(writer: Any, groups: Mapping[str, LayerGroup], step: int) -> None:
    for name, group in groups.items():
        values = group.relative_scales
        if len(values):
            smallest = torch.finfo(values.dtype).tiny
            writer.add_histogram(f"log10_relative_scale/{name}", values.clamp_min(smallest).log10().numpy(), step)


def _collapsed(drawn: DrawnRows) -> str | None:
    if drawn.largest_class is None or drawn.predicted_share < COLLAPSE_SHARE or drawn.label_share > LABEL_SHARE:
        return None
    shares = drawn.predicted_share, drawn.num_items, drawn.label_share
    return _COLLAPSE.format(drawn.largest_class, *shares, drawn.num_draws)


def _agreeing(model: nn.Module, drawn: DrawnRows) -> str | None:
    if drawn.entropy < LEAST_ENTROPY or drawn.mutual_information >= AGREEING * drawn.entropy:
        return None
    record = conversion_record(model)
    delta = "" if record is None else f" (now {record.config.delta:g})"
    share = drawn.mutual_information / drawn.entropy
    return _AGREES.format(drawn.mutual_information, share, drawn.num_items, drawn.num_draws, delta)


def _heavy_kl(model: nn.Module, logs: Mapping[str, float]) -> str | None:
    record = conversion_record(model)
    num_items = None if record is None else record.config.num_training_items
    if record is None or num_items is None or "kl" not in logs or "nll" not in logs:
        return None
    share = record.config.kl_weight * logs["kl"] / num_items
    if share <= OUTWEIGHS * logs["nll"] or logs["nll"] <= 0:
        return None
    return _HEAVY_KL.format(share, logs["nll"], num_items, record.config.kl_weight)
