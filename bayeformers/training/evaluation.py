"""Bayesian evaluation inside transformers' loop: by weight draws, or by the linearised network."""

import contextlib
import logging
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, SequentialSampler
from transformers import Seq2SeqTrainer, Trainer
from transformers.trainer_utils import EvalLoopOutput, default_compute_objective, has_length

from ..checkpoint.saving import carry
from ..conversion.convert import is_bayesian
from ..conversion.record import conversion_record, update_config
from ..likelihoods import (
    NoiseStd,
    ProblemType,
    check_noise_std,
    get_likelihood,
    record_problem_type,
    resolve_problem_type,
    unwrapped,
    without_ignored,
)
from ..likelihoods.registry import infer_problem_type
from ..linearized.links import ignores_shift
from ..linearized.methods import SAMPLING
from ..nn.draws import posterior_mean
from ..posteriors import BasePosterior, PointPosterior, VariationalPosterior
from ..posteriors.heads import has_many_logits
from .arguments import BayesianTrainingArguments, parse_noise_std
from .checks import check_dataset, check_test_dataset, check_variance_head
from .columns import BatchPrediction, predict_batch, score_predictive
from .elbo import preserved_rng
from .items import LABEL_NAMES, as_labels
from .lengths import LENGTHS, LengthCache
from .order import LongestFirst, RowOrder
from .precision import own_precision
from .residual import residual_std
from .scores import BayesianPredictionOutput, Columns, evaluation_metrics

__all__ = ["MonteCarloTrainer"]

logger = logging.getLogger(__name__)


class MonteCarloTrainer(Trainer):
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
        self._evaluated: BasePosterior | None = None
        self._columns = Columns()
        self._added: set[str] = set()  # names of the metrics that no function of the user's returned
        self._residual: float | None = None
        self._said: set[str] = set()
        self._lengths = LengthCache()

    @property
    def posterior(self) -> BasePosterior | None:
        """What evaluation draws weights from: the variational layers, else a fit's posterior; None: point estimate."""
        if is_bayesian(self.model):
            return VariationalPosterior(self.model, draw_cache_bytes=self.args.draw_cache_bytes)
        return self._posterior

    @posterior.setter
    def posterior(self, posterior: BasePosterior | None) -> None:
        if posterior is not None and is_bayesian(self.model):
            raise ValueError(
                "`posterior` cannot be set: the model is Bayesian, and its layers are the posterior. "
                "Call `to_deterministic(model)` first."
            )
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
        """The stock loop, plus metrics of the averaged prediction; the global generators are left as they were.

        Errors: ValueError for an empty dataset.
        """
        check_dataset(getattr(dataloader, "dataset", None), "eval_dataset")
        self._columns, self._evaluated = Columns(), self.posterior
        order = RowOrder(self.args.world_size)
        if self._evaluated is None:
            self._say(
                "Evaluating a point estimate (one pass, no epistemic uncertainty). For a posterior call "
                "`to_bayesian(model)` before making the trainer, or `fit_laplace()` after training."
            )
        try:
            with preserved_rng(), order.recording(dataloader), self._sorting(order):
                output = super().evaluation_loop(
                    dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
                )
        finally:
            self._evaluated = None  # and with it the cached draws
        self._add_metrics(output.metrics or {}, metric_key_prefix)
        if not self.args.eval_do_concat_batches:
            return output
        self._columns.sort(order.sort)
        return output._replace(predictions=order.sort(output.predictions), label_ids=order.sort(output.label_ids))

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
        """By length where that saves padding and all rows can be put back; else the dataset's order.

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

    def _can_sort(self) -> bool:
        """Whether nothing of the caller's sees single batches, or counts on the last rows being dropped."""
        is_ours = type(self).prediction_step is MonteCarloTrainer.prediction_step
        sees_batches = self.args.batch_eval_metrics or self.preprocess_logits_for_metrics is not None
        is_whole = self.args.eval_do_concat_batches and not self.args.dataloader_drop_last
        fills_up = self.accelerator.dispatch_batches  # the last batch, by rows of the first, which must be as long
        return is_ours and is_whole and not sees_batches and not fills_up

    def _add_metrics(self, found: dict[str, float], prefix: str) -> None:
        """The user's own names win, but for the loss: the stock one weights the batches wrongly."""
        own = evaluation_metrics(self._columns)
        if math.isnan(own.get("nll", 0.0)):
            self._say("No label of the evaluated data counts (all are -100, or no answer is in its text): loss NaN.")
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
        """As `Trainer.predict`; `predictions` are log mean probabilities, `.uncertainty` holds arrays (N, ...).

        Of labels they are log p - log(1 - p). ``generation``: a `Seq2SeqTrainer`'s, of what is generated.

        Errors: ValueError for an empty dataset; TypeError for several, or an iterator.
        """
        check_test_dataset(test_dataset)
        output = super().predict(test_dataset, ignore_keys, metric_key_prefix, **generation)
        return BayesianPredictionOutput(*output, uncertainty=self._columns.uncertainties())

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        """(mean NLL, log mean probabilities, labels) of one batch; None for what there is not."""
        given = self._prepare_inputs(inputs)
        inputs = dict(as_labels(given, self.args.label_names))
        problem_type = self._prediction_type(inputs)
        check_variance_head(self.args.noise_std, problem_type)
        if not get_likelihood(problem_type).is_known:
            return super().prediction_step(model, given, prediction_loss_only, ignore_keys)
        noise_std = self.noise_std() if get_likelihood(problem_type).has_noise else None
        if self._is_linearized(problem_type):
            batch = self._linearized(inputs, problem_type, noise_std)
        else:
            with torch.no_grad(), self.compute_loss_context_manager():
                labelled = without_ignored(inputs, self.model, problem_type)
                batch = predict_batch(self._passes(inputs), labelled, problem_type, noise_std)
        self._keep(batch)
        if prediction_loss_only:
            return batch.loss, None, None
        if isinstance(self, Seq2SeqTrainer) and self.args.predict_with_generate:
            self._say("`predict_with_generate`: the posterior mean generates; loss and uncertainties are the draws'.")
            return batch.loss, *super().prediction_step(model, given, prediction_loss_only, ignore_keys)[1:]
        return batch.loss, batch.predictions, self._present_labels(given)

    def _length_names(self) -> tuple[str, ...]:
        return (self.args.length_column_name, *LENGTHS)

    # -- one batch ---------------------------------------------------------------------------------------------------

    def _passes(self, inputs: Mapping[str, Any]) -> Iterator[Any]:
        """The model's outputs, one per draw."""
        posterior = self._evaluated or PointPosterior(self.model)
        return posterior.passes(inputs, num_samples=self._num_samples(), seed=self.args.eval_seed)

    def _num_samples(self) -> int:
        during = self.args.num_eval_samples_during_training if self.is_in_train else None
        return self.args.num_eval_samples if during is None else during

    def _method(self) -> str:
        """The method in force; a point estimate gives one answer by all of them."""
        if self._evaluated is None:
            return "sample"
        return self.args.eval_method or self._evaluated.default_method

    def _is_linearized(self, problem_type: ProblemType) -> bool:
        """Whether to predict with the linearised network.

        Errors: ValueError where `eval_method` asks for it and the head's logits are too many.
        """
        method = self._method()
        if method in SAMPLING:
            return False
        if not has_many_logits(self.model, problem_type):
            return True
        reason = f"{type(unwrapped(self.model)).__name__} has too many logits per prediction for a covariance of them"
        if self.args.eval_method is not None:
            raise ValueError(f'`eval_method`={method!r} linearises the network, but {reason}: use "sample".')
        self._say(f"The posterior's own method {method!r} linearises the network, but {reason}: sampling it instead.")
        return False

    def _linearized(
        self, inputs: dict[str, Any], problem_type: ProblemType, noise_std: NoiseStd | None
    ) -> BatchPrediction:
        """In the model's own precision, not autocast's: covariances are sums of squares of gradients."""
        posterior = self._evaluated
        assert posterior is not None  # else `_method` samples
        # Jacobians are taken by autograd, whatever the caller has switched off.
        with torch.enable_grad(), own_precision(self.model):
            predictive = posterior.predict(
                inputs,
                num_samples=self._num_samples(),
                method=self._method(),
                seed=self.args.eval_seed,
                problem_type=problem_type,
                noise_std=noise_std,
                link=self.args.eval_link,
                contrasts=ignores_shift(problem_type, self.args.eval_link),
            )
        return score_predictive(predictive, inputs, problem_type, noise_std)

    def _prediction_type(self, inputs: Mapping[str, Any]) -> ProblemType:
        labels = inputs.get("labels")
        self._settle_problem_type(labels)
        needs_none = self.compute_loss_func is not None or self._evaluated is None
        known = resolve_problem_type(self.model, labels, or_unknown=needs_none)
        if known != "unknown":
            return known
        with torch.no_grad(), posterior_mean(self.model):
            inferred = infer_problem_type(self.model(**inputs), labels)
        if inferred == "unknown":
            self._say(
                f"The likelihood of {type(self.model).__name__} is unknown: it is evaluated at the posterior mean, by "
                "its own loss, without uncertainties. Set `config.problem_type` if it classifies or regresses."
            )
        return inferred

    def _settle_problem_type(self, labels: Any) -> None:
        """As a model's own loss does at its first labels, which it is not given here."""
        if not isinstance(labels, Tensor):
            return
        if self.compute_loss_func is None:
            record_problem_type(self.model, labels)
        elif (
            labels.is_floating_point()
            and resolve_problem_type(self.model, or_unknown=True) == "single_label_classification"
        ):
            self._say(
                "`config.problem_type` is not set and the labels are floating-point numbers: the head is evaluated as "
                "multi-label, and read as a softmax where there are no labels. Set it."
            )

    def _present_labels(self, inputs: Mapping[str, Any]) -> Any:
        names = self.label_names or [name for name in LABEL_NAMES if name in inputs]
        labels = tuple(inputs.get(name) for name in names)
        if not labels or any(label is None for label in labels):
            return None
        return labels[0] if len(labels) == 1 else labels

    def _keep(self, batch: BatchPrediction) -> None:
        masks = {"mask": batch.mask, "attended": batch.attended}
        flags = {name: mask.to(torch.uint8) for name, mask in masks.items() if mask is not None}
        columns = {**batch.uncertainty, **batch.scores, **flags}
        self._columns.add({name: self._gathered(column) for name, column in columns.items()}, tuple(batch.uncertainty))

    def _gathered(self, column: Tensor) -> NDArray[Any]:
        """All ranks' rows without the samples that even batches duplicate; what pads other ranks' rows is masked."""
        for axis in range(1, column.dim()):
            column = self.accelerator.pad_across_processes(column, dim=axis, pad_index=0)
        gathered: NDArray[Any] = self.gather_function(column).cpu().numpy()
        return gathered

    # -- noise of a regression ---------------------------------------------------------------------------------------

    def noise_std(self) -> NoiseStd | None:
        """A regression's noise: the argument, else what the posterior or the converted model stores, else its residual.

        The residual is that of the training data. None for a point estimate without a number: it has no likelihood, and
        is judged by its squared error.
        """
        given = parse_noise_std(self.args.noise_std)
        if given is not None:
            return given
        if not is_bayesian(self.model):
            return None if self._posterior is None else self._posterior.recorded_noise_std()
        record = conversion_record(self.model)
        stored = self._residual if record is None else record.config.noise_std
        return self.store_residual() if stored is None else check_noise_std(stored)

    def store_residual(self) -> float:
        """Estimate the noise as the RMSE of the posterior mean on the training data, and record it in the model.

        Errors: ValueError without a `train_dataset` of known length, or for a residual of 0.
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
