"""`SharingTrainer`: the card and the pushes of a model with a posterior, and monitors that write into each log."""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, TrainerState
from transformers.trainer_utils import EvalLoopOutput, HubStrategy

from ..cards import CardDetails, evaluation_intervals, model_card
from ..cards.card import is_untouched, merge_card, sealed
from ..guarantees.policy import POLICY_FILE
from ..posteriors import BasePosterior, PointPosterior
from ..posteriors.files import saved_kinds
from .evaluator import Columns
from .heads import HeadTrainer
from .monitor import PosteriorMonitor, writers_of

__all__ = ["SharingTrainer"]

README, PICTURE = "README.md", "reliability.png"
_NO_PICTURE = "There is no reliability picture: matplotlib (the extra `plots`) was not installed."
_NOT_MEASURED = "Nothing was measured: call `trainer.evaluate()` before the card is written."
_OTHER_WEIGHTS = (
    "The last evaluation was of other weights, or of another posterior: call `trainer.evaluate()` before the card is "
    "written."
)
_BESIDE = ("bayesian_*", POLICY_FILE)
_FROM_NOTHING = ("This model is a fine-tuned version of [](https://huggingface.co/) on", "This model was trained on")
_STOCK_RESULTS = "It achieves the following results on the evaluation set:"


@dataclass(frozen=True)
class Evaluated:
    """One evaluation of one set.

    Attributes:
        prefix: of its metrics' names, "eval" or "eval_NAME".
        metrics: without the prefix.
        columns: what was kept of its rows.
        num_rows: how many rows.
        num_samples: draws of a prediction.
        method: how these were predicted; None: by the posterior's own default.
        state: of the trainer by then; every training begins with a new one.
        step: optimizer steps of the training by then.
        in_training: whether the training went on.
        posterior: what predicted.
    """

    prefix: str
    metrics: dict[str, float]
    columns: Columns
    num_rows: int
    num_samples: int
    method: str | None
    state: TrainerState
    step: int
    in_training: bool
    posterior: BasePosterior | None


class SharingTrainer(HeadTrainer):
    """A Trainer whose model card says what the posterior is; see `bayeformers.cards`."""

    _evaluated: Evaluated | None = None

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As of its base; the last evaluation is kept for the card.

        Args:
            dataloader: the batches.
            description: of the progress bar.
            prediction_loss_only: whether the loss is enough.
            ignore_keys: outputs that are no predictions.
            metric_key_prefix: before every metric's name.

        Returns:
            As of its base.
        """
        posterior, state, step = self.posterior, self.state, self.state.global_step
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        found = {k.removeprefix(f"{metric_key_prefix}_"): v for k, v in (output.metrics or {}).items()}
        rows, samples = int(output.num_samples or 0), self._num_samples()
        method = None if posterior is None or posterior.predicts_itself else self.args.eval_method
        self._evaluated = Evaluated(
            metric_key_prefix, found, self._columns, rows, samples, method, state, step, bool(self.is_in_train),
            posterior,
        )  # fmt: skip
        return output

    # -- the card ----------------------------------------------------------------------------------------------------

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
        **others: Any,
    ) -> None:
        """Write ``README.md`` as `Trainer.create_model_card` does, with a section about the uncertainty.

        The section and the metadata are `bayeformers.cards.model_card`'s; the metrics are the last evaluation's, with
        bootstrap intervals where the head predicts per example, if it was of the present weights and posterior. The
        reliability picture lies beside the card. A card that somebody has edited keeps its words and its metadata: our
        section alone is replaced, or appended. Only process 0 writes.

        Args:
            language: as of `Trainer`.
            license: as of `Trainer`.
            tags: as of `Trainer`; ours are added.
            model_name: as of `Trainer`.
            finetuned_from: as of `Trainer`.
            tasks: as of `Trainer`; by default that of the model's class.
            dataset_tags: as of `Trainer`.
            dataset: as of `Trainer`.
            dataset_args: as of `Trainer`.
            **others: of another library's Trainer behind this one.
        """
        if not self.is_world_process_zero():
            return
        path = Path(str(self.args.output_dir)) / README
        given: dict[str, Any] = {
            "language": language, "license": license, "tags": list(tags) if isinstance(tags, list) else tags,
            "model_name": model_name, "finetuned_from": finetuned_from, "tasks": tasks, "dataset_tags": dataset_tags,
            "dataset": dataset, "dataset_args": dataset_args,
        }  # fmt: skip
        before = path.read_bytes() if path.is_file() else None
        kept = None if before is None or is_untouched(found := ModelCard.load(path)) else found
        try:
            super().create_model_card(**{k: v for k, v in given.items() if v is not None}, **others)
            draft = _without_results(ModelCard.load(path))
            ours = self._own_card(draft, _listed(tasks), _listed(dataset), model_name)
            merged = merge_card(draft, ours)
            (sealed(merged) if kept is None else merge_card(kept, merged)).save(path)
        except BaseException:
            _put_back(path, before)
            raise

    def _own_card(self, draft: ModelCard, tasks: list[str], dataset: list[str], model_name: str | None) -> ModelCard:
        metrics, said = self._measured()
        last = self._evaluated if metrics else None
        data: Any = draft.data
        dataset_id = _listed(data.datasets)
        details = CardDetails(
            repo=str(self.hub_model_id or self.args.output_dir),
            name=model_name or data.model_name,
            task=tasks[0] if tasks else None,
            dataset=dataset or dataset_id,
            dataset_id=dataset_id,
            tags=["peft"] if data.library_name == "peft" else [],
            measured_on=said,
            num_samples=self._num_samples() if last is None else last.num_samples,
            method=None if last is None else last.method,
            picture=self._picture() if metrics else None,
            has_tokenizer=isinstance(self.processing_class, PreTrainedTokenizerBase),
        )
        posterior = PointPosterior(self.model) if self.posterior is None else self.posterior
        return model_card(self.model, posterior, metrics, details=details)

    def _measured(self) -> tuple[dict[str, Any], str]:
        """Metrics of the present posterior, and on which rows; none, and why."""
        last = self._evaluated
        if last is None:
            return {}, _NOT_MEASURED
        if not self._is_present(last):
            return {}, _OTHER_WEIGHTS
        ignored = ("loss", "runtime", "samples_per_second", "steps_per_second", "epoch", "model_preparation_time")
        found: dict[str, Any] = {k: v for k, v in last.metrics.items() if k not in ignored and _is_number(v)}
        if last.columns.per_example:
            own = evaluation_intervals(last.columns.items())  # a `compute_metrics` may mean another thing by a name
            own = {
                k: of for k, of in own.items() if k not in found or math.isclose(of.estimate, found[k], rel_tol=1e-5)
            }
            found |= own
        names = {"eval": "the evaluation set", "test": "the set that was predicted last"}
        rows = names.get(last.prefix, f"the set `{last.prefix}`")
        return found, f"the {last.num_rows:,} rows of {rows}"

    def _is_present(self, last: Evaluated) -> bool:
        """Whether the weights and the posterior are still those that were evaluated."""
        state, own = self.state, self.posterior
        is_best = last.in_training and self.args.load_best_model_at_end and not self.is_in_train
        step = getattr(state, "best_global_step", None) if is_best else state.global_step
        if last.state is not state or last.step != step:
            return False
        follows = type(own) is type(last.posterior) and own is not None and own.file_name is None  # made at each call
        return own is last.posterior or follows

    def _picture(self) -> str | None:
        """The file's name, or why there is none; None for a head without classes."""
        columns = self._evaluated.columns.items() if self._evaluated else {}
        if "probs" not in columns or not len(columns.get("labels", ())) or columns["probs"].ndim != 2:
            return None
        from ..reports.plots import page, reliability_diagram, save_figure  # imports matplotlib when a figure is made

        name = "point estimate" if self.posterior is None else type(self.posterior).__name__.removesuffix("Posterior")
        try:
            figure, panels = page("", 1, 1, figsize=(6, 6))
        except ImportError:
            return _NO_PICTURE
        probs = columns["probs"].astype("float64")
        reliability_diagram(panels[0], {name: probs / probs.sum(1, keepdims=True)}, columns["labels"])
        save_figure(figure, Path(str(self.args.output_dir)) / PICTURE)
        return PICTURE

    # -- pushes of checkpoints ---------------------------------------------------------------------------------------

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """As of `Trainer`, which copies the weights alone: the posterior's files go along, and no older ones stay."""
        running = self.push_in_progress
        waits = running is not None and not running.is_done() and not self.args.hub_always_push
        if self.is_world_process_zero() and self.args.hub_strategy != HubStrategy.END and not waits:
            _copy_beside(Path(checkpoint_folder), Path(str(self.args.output_dir)))
        super()._push_from_checkpoint(checkpoint_folder)

    # -- monitors ----------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds what the monitors among the callbacks see, to the logs of a training's loss."""
        if "loss" in logs and self.is_world_process_zero():
            callbacks = self.callback_handler.callbacks
            for monitor in (callback for callback in callbacks if isinstance(callback, PosteriorMonitor)):
                logs.update(monitor.look(self.model, self.state, logs, writers_of(callbacks)))
        super().log(logs, start_time)


def _listed(value: str | Sequence[str] | None) -> list[str]:
    return [] if value is None else [value] if isinstance(value, str) else list(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _without_results(draft: ModelCard) -> ModelCard:
    """The Trainer's draft without its list of results, which may be of other weights; ours stand in the section."""
    lines, skips = [], False
    for line in draft.text.splitlines():
        skips = line.strip() == _STOCK_RESULTS or (skips and line.startswith("- "))
        if not skips:
            lines.append(line)
    draft.text = "\n".join(lines).replace(*_FROM_NOTHING) + "\n"
    data: Any = draft.data
    data.eval_results = None
    with contextlib.suppress(AttributeError):
        del data.metrics
    return draft


def _put_back(path: Path, before: bytes | None) -> None:
    if before is None:
        path.unlink(missing_ok=True)
    else:
        path.write_bytes(before)


def _beside(folder: Path) -> Iterator[Path]:
    for pattern in (*_BESIDE, *saved_kinds()):
        yield from folder.glob(pattern)


def _copy_beside(source: Path, target: Path) -> None:
    for stale in _beside(target):
        stale.unlink()
    for file in _beside(source):
        shutil.copy(file, target / file.name)
