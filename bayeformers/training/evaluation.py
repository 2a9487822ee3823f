"""Bayesian evaluation inside transformers' loop: by weight draws, or by the linearised network."""

import contextlib
import logging
from collections.abc import Iterator, Mapping
from typing import Any

from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, SequentialSampler
from transformers import Seq2SeqTrainer
from transformers.trainer_utils import EvalLoopOutput, default_compute_objective, has_length

from ..checkpoint.saving import carry
from ..conversion.convert import is_bayesian
from ..conversion.record import conversion_record, update_config
from ..guarantees import AbstentionPolicy
from ..heads import HeadPosterior
from ..heads.find import find_head
from ..likelihoods import NoiseStd, check_noise_std
from ..posteriors import BasePosterior, VariationalPosterior
from ..posteriors.files import check_model
from ..sampling.random_state import preserved as preserved_rng
from .abstention import abstained, fit_by_trainer
from .arguments import BayesianTrainingArguments, parse_noise_std
from .checks import check_dataset, check_test_dataset
from .evaluator import BayesianPredictionOutput, Columns, Evaluation
from .items import LABEL_NAMES, as_labels, residual_std
from .order import LENGTHS, LengthCache, LongestFirst, RowOrder
from .sharded import ShardedTrainer

__all__ = ["MonteCarloTrainer"]

logger = logging.getLogger(__name__)

_POINT_ESTIMATE = (
    "Evaluating a point estimate (one pass, no epistemic uncertainty). For a posterior call `to_bayesian(model)` "
    "before making the trainer, or `fit_laplace()` after training."
)


class MonteCarloTrainer(ShardedTrainer):
    """A Trainer whose `evaluate` and `predict` average over the posterior; how it trains is its subclass's.

    By weight draws, or by the linearised network: `args.eval_method`, else what the posterior does by default.
    `prediction_step` is replaced; the loop around it stays transformers'. Draw s is the same network for every batch
    and process, so metrics do not depend on either.
    """

    args: BayesianTrainingArguments
    model: nn.Module

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._posterior: BasePosterior | None = None
        self._evaluation: Evaluation | None = None  # the one that is running
        self._columns = Columns()  # of the last one
        self._added: set[str] = set()  # names of the metrics that no function of the user's returned
        self._residual: float | None = None
        self._said: set[str] = set()
        self._lengths = LengthCache()

    @property
    def posterior(self) -> BasePosterior | None:
        """What evaluation asks: the variational layers, else a fit's posterior, or the head's; None: point estimate."""
        if is_bayesian(self.model):
            return VariationalPosterior(self.model, draw_cache_bytes=self.args.draw_cache_bytes)
        if self._posterior is None and find_head(self.model) is not None:
            return HeadPosterior(self.model)
        return self._posterior

    @posterior.setter
    def posterior(self, posterior: BasePosterior | None) -> None:
        if posterior is not None and is_bayesian(self.model):
            raise ValueError(
                "`posterior` cannot be set: the model is Bayesian, and its layers are the posterior. "
                "Call `to_deterministic(model)` first."
            )
        if posterior is not None:
            check_model(posterior, self.model, "`posterior`")
            own = vars(self.model).get("posterior")
            if isinstance(own, BasePosterior) and posterior.file_name:  # in place of the one that the model brought
                self.model.posterior = posterior  # type: ignore[assignment]
        self._posterior = posterior
        carry(self.model, posterior)

    # -- the loop ----------------------------------------------------------------------------------------------------

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Run the stock loop, and add metrics of the averaged prediction; the global generators are left as they were.

        Args:
            dataloader: the batches; a ValueError names an empty dataset.
            description: of the progress bar.
            prediction_loss_only: whether the loss is enough.
            ignore_keys: outputs that are no predictions.
            metric_key_prefix: before every metric's name.

        Returns:
            As of `Trainer.evaluation_loop`, with rows in the dataset's order.
        """
        check_dataset(getattr(dataloader, "dataset", None), "eval_dataset")
        evaluation = self._evaluation = self._begin_evaluation(self.posterior)
        self._columns, order = evaluation.columns, RowOrder(self.args.world_size)
        if evaluation.posterior is None:
            self._say(_POINT_ESTIMATE)
        try:
            with preserved_rng(), order.recording(dataloader), self._sorting(order):
                output = super().evaluation_loop(
                    dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
                )
        finally:
            self._evaluation = evaluation.posterior = None  # and with it the cached draws
        self._add_metrics(evaluation.metrics(), output.metrics or {}, metric_key_prefix)
        if not self.args.eval_do_concat_batches:
            return output
        self._columns.sort(order.sort)
        return output._replace(predictions=order.sort(output.predictions), label_ids=order.sort(output.label_ids))

    def _begin_evaluation(self, posterior: BasePosterior | None) -> Evaluation:
        self.settle_shards()
        return Evaluation(
            self.model,
            self.args,
            posterior,
            self._num_samples(),
            has_own_loss=self.compute_loss_func is not None,
            noise_std=self.noise_std,
            autocast=self.compute_loss_context_manager,
            say=self._say,
        )

    def _num_samples(self) -> int:
        during = self.args.num_eval_samples_during_training if self.is_in_train else None
        return self.args.num_eval_samples if during is None else during

    @contextlib.contextmanager
    def _sorting(self, order: RowOrder) -> Iterator[None]:
        """`compute_metrics` sees rows in the dataset's order too; batch by batch there is no such order."""
        own = self.compute_metrics
        if own is None or self.args.batch_eval_metrics or not self.args.eval_do_concat_batches:
            yield
            return
        self.compute_metrics = lambda found: own(order.sort_prediction(found))
        try:
            yield
        finally:
            self.compute_metrics = own

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        """Return the order by length where that saves padding and all rows can be put back; else the dataset's.

        Stock `train_sampling_strategy="group_by_length"` shuffles evaluations too, and leaves their rows shuffled.
        """
        check_dataset(eval_dataset, "eval_dataset")
        if eval_dataset is None or not has_length(eval_dataset):
            return None
        known = {"names": self._length_names(), "collate": self.data_collator}
        lengths = self._lengths(eval_dataset, **known) if self._can_sort() else None
        if lengths is not None:
            return LongestFirst(lengths)
        return SequentialSampler(eval_dataset) if self.args.world_size <= 1 else None

    def _length_names(self) -> tuple[str, ...]:
        return (self.args.length_column_name, *LENGTHS)

    def _can_sort(self) -> bool:
        """Whether nothing of the caller's sees single batches, or counts on the last rows being dropped."""
        is_ours = type(self).prediction_step is MonteCarloTrainer.prediction_step
        sees_batches = self.args.batch_eval_metrics or self.preprocess_logits_for_metrics is not None
        is_whole = self.args.eval_do_concat_batches and not self.args.dataloader_drop_last
        fills_up = self.accelerator.dispatch_batches  # the last batch, by rows of the first, which must be as long
        return is_ours and is_whole and not sees_batches and not fills_up

    def _add_metrics(self, own: dict[str, float], found: dict[str, float], prefix: str) -> None:
        """The user's own names win, but for the loss: the stock one weights the batches wrongly."""
        if "nll" in own or "rmse" in own:
            found[f"{prefix}_loss"] = own["nll"] if "nll" in own else own["rmse"] ** 2
        for name, value in ((f"{prefix}_{name}", value) for name, value in own.items()):
            (self._added.discard if name in found else self._added.add)(name)
            found.setdefault(name, value)

    def default_objective(self, metrics: dict[str, float]) -> float:
        """A search's objective: the loss, or the sum of the metrics that the user's own function returns, if any."""
        own = {name: value for name, value in metrics.items() if name not in self._added}
        return float(default_compute_objective({k: v for k, v in own.items() if not k.endswith("_preparation_time")}))

    def predict(
        self,
        test_dataset: Any,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "test",
        **generation: Any,
    ) -> BayesianPredictionOutput:
        """Predict as `Trainer.predict` does, by the posterior.

        Args:
            test_dataset: one dataset; a TypeError names several, or an iterator, a ValueError an empty one.
            ignore_keys: outputs that are no predictions.
            metric_key_prefix: before every metric's name.
            **generation: a `Seq2SeqTrainer`'s, of what is generated.

        Returns:
            `predictions` are log mean probabilities, of labels log p - log(1 - p); `.uncertainty` has arrays (N, ...),
            and `.abstain` says what the model's abstention policy refuses, if it has one.
        """
        check_test_dataset(test_dataset)
        output = super().predict(test_dataset, ignore_keys, metric_key_prefix, **generation)
        found = BayesianPredictionOutput(*output, uncertainty=self._columns.uncertainties())
        found.abstain = abstained(self, test_dataset, found)
        return found

    def fit_abstention(self, dataset: Any = None, **options: Any) -> AbstentionPolicy:
        """Fit from which score on the model answers, by predictions as `predict` makes them, and attach the policy.

        Args:
            dataset: labelled rows that the model was neither trained on nor chosen by; None: `eval_dataset`.
            **options: ``max_risk``, ``confidence``, ``score``, ``groups``, ``errors`` of
                :func:`~bayeformers.guarantees.fit_abstention`; an array of errors has one entry per row.

        Returns:
            The policy, which `save_model` writes and `predict` applies from now on.
        """
        return fit_by_trainer(self, self.eval_dataset if dataset is None else dataset, **options)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        """Return (mean NLL, log mean probabilities, labels) of one batch; None for what there is not.

        Args:
            model: the network, perhaps wrapped.
            inputs: the batch.
            prediction_loss_only: whether the loss is enough.
            ignore_keys: outputs that are no predictions.
        """
        given = self._prepare_inputs(inputs)
        named = dict(as_labels(given, self.args.label_names))
        evaluation = self._evaluation or self._begin_evaluation(None)
        if not evaluation.likelihood(named).is_known:
            return super().prediction_step(model, given, prediction_loss_only, ignore_keys)
        batch = evaluation.predict(named)
        evaluation.keep(batch, self._gathered)
        if prediction_loss_only:
            return batch.loss, None, None
        if isinstance(self, Seq2SeqTrainer) and self.args.predict_with_generate:
            self._say("`predict_with_generate`: the posterior mean generates; loss and uncertainties are the draws'.")
            return batch.loss, *super().prediction_step(model, given, prediction_loss_only, ignore_keys)[1:]
        return batch.loss, batch.predictions, self._present_labels(given)

    def _present_labels(self, inputs: Mapping[str, Any]) -> Any:
        names = self.label_names or [name for name in LABEL_NAMES if name in inputs]
        labels = tuple(inputs.get(name) for name in names)
        if not labels or any(label is None for label in labels):
            return None
        return labels[0] if len(labels) == 1 else labels

    def _gathered(self, column: Tensor) -> NDArray[Any]:
        """All ranks' rows without the samples that even batches duplicate; what pads other ranks' rows is masked."""
        for axis in range(1, column.dim()):
            column = self.accelerator.pad_across_processes(column, dim=axis, pad_index=0)
        gathered: NDArray[Any] = self.gather_function(column).cpu().numpy()
        return gathered

    # -- noise of a regression ---------------------------------------------------------------------------------------

    def noise_std(self) -> NoiseStd | None:
        """Return a regression's noise: the argument, else what the posterior or the model stores, else its residual.

        The residual is that of the training data. None for a point estimate without a number: it has no likelihood, and
        is judged by its squared error.
        """
        given = parse_noise_std(self.args.noise_std)
        if given is not None:
            return given
        if not is_bayesian(self.model):
            return None if self.posterior is None else self.posterior.recorded_noise_std()
        record = conversion_record(self.model)
        stored = self._residual if record is None else record.config.noise_std
        return self.store_residual() if stored is None else check_noise_std(stored)

    def store_residual(self) -> float:
        """Estimate the noise as the RMSE of the posterior mean on the training data, and record it in the model.

        Returns:
            The noise's standard deviation, in the labels' unit.

        Raises:
            ValueError: no `train_dataset` of known length, or a residual of 0.
        """
        if not has_length(self.train_dataset):
            raise ValueError(
                '`noise_std`="residual" needs a `train_dataset` with a length to compute the residual on: '
                "pass it, or give a number."
            )
        loader = self.get_eval_dataloader(self.train_dataset)  # type: ignore[arg-type]
        batches = (as_labels(self._prepare_inputs(batch), self.args.label_names) for batch in loader)
        with preserved_rng():  # a DataLoader takes its seed from the global generator
            value = residual_std(self.model, batches, self.accelerator.gather_for_metrics)
        update_config(self.model, noise_std=value)
        self._residual = value  # a network that was built by hand has no record to keep it in
        return value

    def _say(self, message: str) -> None:
        """Once per trainer, by the main process."""
        if message not in self._said and self.is_world_process_zero():
            logger.warning(message)
        self._said.add(message)
