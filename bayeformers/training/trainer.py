"""`BayesianTrainer`: transformers' Trainer with the ELBO as its loss and Monte-Carlo prediction in its evaluation."""

import logging
import math
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from ..checkpoint.saving import save_posterior, saved_along
from ..conversion.convert import is_bayesian
from ..conversion.record import conversion_record, update_config, without_stale_record
from ..guarantees.attached import write_guarantees
from ..likelihoods import HEAD, Likelihood, ProblemType, get_likelihood, without_ignored
from ..nn.draws import one_draw_per_forward, training_draw
from ..sharding import gathered
from . import adapter_checkpoints, checkpoints, checks
from .alignment import CalibrationTerm
from .arguments import BayesianTrainingArguments, parse_noise_std
from .elbo import Group, count_label_column, count_training_items, infer_num_items
from .heads import has_prior, head_pass
from .items import LabelledBatch, as_labels, check_label_names, model_inputs, settled_problem_type
from .objective import Objective, ObjectiveCheck, check_bases
from .optimizer import clip_separately, holds_some, kl_regularised_names, rho_parameters, separate_rho
from .own_terms import OWN_TERMS, ForwardPass, given_loss, has_own_terms, own_terms
from .records import TrainingRecord, lost_steps_warning
from .sharing import SharingTrainer

__all__ = ["BayesianTrainer"]

logger = logging.getLogger(__name__)


class BayesianTrainer(SharingTrainer):
    """Trains a Bayesian model on the ELBO and evaluates it by S weight draws; another one trains as ever.

    It takes the arguments of `Trainer`, with `args` a `BayesianTrainingArguments`. Convert the model, or build it of
    `bayeformers.nn` layers, *before* making the trainer; a `model_init` returns such a model. The loss of every
    optimizer step is

        mean NLL of its items + (kl_weight / N) * KL

    whatever the batch size, accumulation and number of processes (see `training.elbo`); the NLL is averaged over
    `num_train_samples` draws. A `calibration_loss` is added with its weight (`training.alignment`).
    An unconverted model trains on its own loss, scaled as exactly, or, with `noise_std`="head", on its Gaussian NLL,
    one with a VBLL or SNGP head on that head's objective.

    Raises:
        TypeError: other training arguments, or bases whose order would replace the loss.
        ValueError: what would make the ELBO wrong (label smoothing), `nn.DataParallel`, FSDP1, DeepSpeed, no dataset.
    """

    _scaled: bool | None = None  # what the user says of the loss's scale
    _resumed: Path | None = None  # the checkpoint that the training goes on from
    loads_by_name: ClassVar[bool] = False  # whether the trainer behind takes a model's name for a model, as trl's do

    def __init__(
        self,
        model: nn.Module | None = None,
        args: BayesianTrainingArguments | None = None,
        *positional: Any,
        **kwargs: Any,
    ) -> None:
        check_bases(type(self), BayesianTrainer)
        args = BayesianTrainingArguments("tmp_trainer") if args is None else args
        checks.check_arguments(args)
        checks.check_data_parallel(args, model)
        if model is not None and not (self.loads_by_name and isinstance(model, str)) and has_prior(model):
            checks.check_converted(args)
            if args.ddp_find_unused_parameters is None:  # the KL reaches all; the search marks an uncalled one twice
                args.ddp_find_unused_parameters = False
        checks.check_dataset(kwargs.get("train_dataset"), "train_dataset")
        checks.check_dataset(kwargs.get("eval_dataset"), "eval_dataset")
        self._objective = Objective(args, self._say)
        # by name, for `args` are not the second of every trainer's arguments
        in_order, by_name = ((args, *positional), kwargs) if positional else ((), {"args": args, **kwargs})
        super().__init__(model, *in_order, **by_name)
        self.add_callback(ObjectiveCheck(self, BayesianTrainer))
        self.settle_shards()

    def start_anew(self) -> None:
        """Forget a training that has ended, or that begins again with smaller batches."""
        self._objective.close()
        self._objective = Objective(self.args, self._say)

    @property
    def loss_is_scaled_for_ga(self) -> bool | None:
        """Our loss is a share of its group's. An override's is a mean of its own, for the stock step to divide."""
        return self._objective.loss_is_ours if self._scaled is None else self._scaled

    @loss_is_scaled_for_ga.setter
    def loss_is_scaled_for_ga(self, value: bool | None) -> None:
        self._scaled = value

    def problem_type(self, inputs: Mapping[str, Any]) -> ProblemType:
        """The problem type of the model's head, for a batch whose labels may decide between single and multi label."""
        labels = as_labels(inputs, self.args.label_names).get("labels")
        has_own_loss = self.compute_loss_func is not None
        # a plain model trains on its own loss, and a function that is given needs no likelihood of ours
        or_unknown = has_own_loss or not is_bayesian(self.model)
        found = settled_problem_type(self.model, labels, self._say, has_own_loss=has_own_loss, or_unknown=or_unknown)
        checks.check_variance_head(self.args.noise_std, found)
        if not has_own_loss:
            checks.check_classes(self.model, found)
        return found

    def count_items(self, inputs: Mapping[str, Any]) -> Tensor:
        """Items of a batch in the unit of its loss: a 0-dimensional tensor. Override it along with a custom loss."""
        named = as_labels(inputs, self.args.label_names)
        likelihood = self._likelihood(named)
        return likelihood.item_mask(self._without_ignored(named, likelihood)).sum()

    def _likelihood(self, named: Mapping[str, Any]) -> Likelihood:
        """The head's, resolved once in a training for every kind of labels."""
        labels = named.get("labels")
        return self._objective.likelihoods.get(labels, lambda: get_likelihood(self.problem_type(named)))

    def _without_ignored(self, named: Mapping[str, Any], likelihood: Likelihood) -> Mapping[str, Any]:
        return without_ignored(named, self.model, likelihood.problem_type) if likelihood.is_per_pixel else named

    def _read(self, given: dict[str, Any]) -> LabelledBatch:
        named = as_labels(given, self.args.label_names)
        likelihood = self._likelihood(named)
        labelled = self._without_ignored(named, likelihood)
        return LabelledBatch(given, named, labelled, likelihood, lambda: self.count_items(given))

    # -- train -------------------------------------------------------------------------------------------------------

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """As `Trainer.train`; records N, the KL's weight and a regression's noise in `config.bayesian`."""
        self.start_anew()
        self._resumed = None
        self._drop_posterior()
        several = self.eval_dataset if isinstance(self.eval_dataset, dict) else {}
        if (contradiction := self.args.settle_direction(several)) is not None:
            self._say(contradiction)
        if self.args.activation_checkpointing:
            given = self.args.activation_checkpointing_kwargs
            kwargs = given if isinstance(given, dict) else {}
            self.args.activation_checkpointing_kwargs = {"use_reentrant": False, **kwargs}
        try:
            output = super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        finally:
            self.is_in_train = False  # a pruned trial leaves by an exception; evaluation then takes all draws again
        if (record := self._objective.record) is not None and record.fits_noise:
            self.store_residual()  # the means may have moved
        self._objective.group = None
        if trial is not None:
            self.objective: float | None = None  # the search then evaluates: see `hyperparameter_search`
        return output

    def hyperparameter_search(
        self, hp_space: Any = None, compute_objective: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Search as `Trainer.hyperparameter_search` does. A trial's objective is that of the model that it ends with.

        It is evaluated after training with `num_eval_samples` draws; with `load_best_model_at_end` that is the best
        epoch's model, where the stock search takes the last epoch's. The evaluations inside `train` serve to prune.
        Without ``compute_objective`` it is the loss, or the sum of the metrics that `compute_metrics` returns.

        Args:
            hp_space: from a trial to the values of its arguments; one out of range is a ValueError.
            compute_objective: from metrics to a number.
            *args: as of `Trainer`.
            **kwargs: as of `Trainer`.

        Returns:
            The best run, or runs.
        """
        return super().hyperparameter_search(hp_space, compute_objective or self.default_objective, *args, **kwargs)

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """As `Trainer.call_model_init`, for a model that is converted in it."""
        model: nn.Module = super().call_model_init(trial)
        if has_prior(model) and self.args.ddp_find_unused_parameters is None:
            self.args.ddp_find_unused_parameters = False  # as in `__init__`, where the accelerator stands by now
            if self.accelerator.ddp_handler is not None:
                self.accelerator.ddp_handler.find_unused_parameters = False
        return model

    def _hp_search_setup(self, trial: Any) -> None:
        super()._hp_search_setup(trial)
        self.args.check_bayesian()

    def _begin(self, inputs: Mapping[str, Any]) -> None:
        """At the first batch of a `train()`: by then `model_init` has made the model and a checkpoint is loaded."""
        if self._begin_head(inputs):
            return
        if not is_bayesian(self.model):
            checks.check_uncalibrated(self.args)
            return self.settle_ivon(lambda: self._count_items(self._read(dict(inputs)).likelihood))
        checks.check_converted(self.args)
        self.settle_shards()
        if conversion_record(self.model) is None:
            one_draw_per_forward(self.model)  # built by hand: ties share a draw, as after a conversion
        objective, likelihood = self._objective, self._read(dict(inputs)).likelihood
        check_label_names(self.args.label_names, likelihood.problem_type)
        if (warning := lost_steps_warning(self.model, self.args.learning_rate)) is not None:
            self._say(warning)
        objective.has_own_terms = self._find_own_terms(inputs, likelihood)
        objective.calibration = self._calibration_term(likelihood)
        num_items = self._count_items(likelihood)
        update_config(self.model, num_training_items=num_items, kl_weight=float(self.args.kl_weight))
        noise_std = self.noise_std() if likelihood.has_noise else None
        if likelihood.has_noise:
            update_config(self.model, noise_std=noise_std)
        is_estimated = likelihood.has_noise and noise_std != HEAD and parse_noise_std(self.args.noise_std) is None
        watches = not self.args.torch_compile
        objective.record = TrainingRecord(self.model, num_items, fits_noise=is_estimated, watch_calls=watches)

    def _find_own_terms(self, inputs: Mapping[str, Any], likelihood: Likelihood) -> bool:
        if self.compute_loss_func is not None or self.args.noise_std == HEAD:
            return False
        given = self._prepare_inputs(dict(inputs))
        named = as_labels(given, self.args.label_names)
        if not has_own_terms(self.model, named, given, likelihood.problem_type):
            return False
        self._say(OWN_TERMS.format(type(self.model).__name__))
        return True

    def _calibration_term(self, likelihood: Likelihood) -> CalibrationTerm | None:
        if self.args.calibration_loss is None:
            return None
        warmup_steps = math.ceil(self.args.calibration_warmup_ratio * self.state.max_steps)
        term = CalibrationTerm(self.args, likelihood.problem_type, warmup_steps)
        if self._resumed is not None:
            term.load(self._resumed, self.state.global_step)
        return term

    def _count_items(self, likelihood: Likelihood) -> int:
        """N, of the training data."""
        count, num_items = (lambda: self._count_labels(likelihood)), self.args.num_training_items
        return infer_num_items(self.train_dataset, likelihood.problem_type, count, num_items)

    def _count_labels(self, likelihood: Likelihood) -> int:
        """Labels of the training data: those of its column, or each rank's share of the collated examples."""
        names, is_column = self.args.label_names or (), "labels" in likelihood.label_names
        if is_column and not likelihood.has_many_items:
            counted = count_label_column(self.train_dataset, names)
            if counted is not None:
                return counted
        collate = self._get_collator_with_removed_columns(self.data_collator, description="training")
        share = count_training_items(
            self.train_dataset,
            lambda rows: self._without_ignored(as_labels(collate(rows), names), likelihood),
            likelihood.problem_type,
            batch_size=self.args.train_batch_size,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
        )
        return int(self.accelerator.gather(torch.tensor([share], device=self.args.device)).sum())

    # -- optimizer: rho has its own step size and clipping, and no weight decay ---------------------------------------

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Stock names less rho and the means of Bayesian layers, which the KL already pulls to their prior."""
        managed = kl_regularised_names(model)
        return [name for name in super().get_decay_parameter_names(model) if name not in managed]

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The stock optimizer with rho in a group of its own at `rho_learning_rate`; one that was passed in is kept."""
        is_new, rhos = self.optimizer is None, rho_parameters(self.model)
        optimizer = super().create_optimizer(model)
        if is_new:
            separate_rho(optimizer, rhos, self.args.rho_learning_rate)
        elif not holds_some(optimizer, rhos):
            self._say("The optimizer that was passed in holds no scale of the model: make it after `to_bayesian`.")
        return optimizer

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        rhos = {id(rho): rho for rho in rho_parameters(self.model)}
        if not rhos:
            return super()._clip_grad_norm(model)  # type: ignore[no-untyped-call]
        rest = [parameter for parameter in model.parameters() if id(parameter) not in rhos]
        norm = self.accelerator.clip_grad_norm_(rest, self.args.max_grad_norm)  # also unscales fp16, rho's included
        return clip_separately(rhos.values(), norm, self.args.max_grad_norm)

    # -- checkpoints: every tensor that is taken up is verified -------------------------------------------------------

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        target = checkpoints.saved_module(self.model if model is None else model)
        stock = partial(super()._load_from_checkpoint, resume_from_checkpoint, model)
        adapter_checkpoints.take_up(target, resume_from_checkpoint, stock, is_sharded=self._is_sharded())
        self._resumed = Path(resume_from_checkpoint)
        recorded = checkpoints.recorded_config(resume_from_checkpoint) or {}
        if recorded.get("noise_std") is not None:
            update_config(self.model, noise_std=recorded["noise_std"])  # that of the training that goes on

    def _load_best_model(self) -> None:
        if self._is_sharded():
            super()._load_best_model()
            return
        folder, target = str(self.state.best_model_checkpoint), checkpoints.saved_module(self.model)
        if not (checkpoints.weight_files(folder) or adapter_checkpoints.adapter_files(folder)):
            raise ValueError(f"The best checkpoint {folder!r} holds no weights for `load_best_model_at_end` to load.")
        logger.info("Loading the best model from %s (score: %s).", folder, self.state.best_metric)
        adapter_checkpoints.take_up(target, folder, super()._load_best_model, "The best checkpoint")

    def _is_sharded(self) -> bool:
        return bool(self.is_fsdp_enabled or self.is_deepspeed_enabled)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._fold_calibration()
        if self.args.should_save:  # before the stock part, which may push the folder
            folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            self._objective.save_calibration(folder)
        super()._save_checkpoint(model, trial)

    def _fold_calibration(self) -> None:
        term = self._objective.calibration
        if term is not None:
            term.fold(lambda sums: self.accelerator.reduce(sums, "sum"), self.args.device, self.state.global_step)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As `Trainer.save_model`, with the fitted posterior of an unconverted model beside the weights.

        The config of an unconverted model records no conversion, whatever stands in it: see `without_stale_record`.
        """
        own, folder = self._posterior, Path(output_dir or str(self.args.output_dir))
        with gathered(self.model), without_stale_record(self.model):
            if own is not None and self.args.should_save and saved_along(self.model) is not own:
                save_posterior(own, folder)  # first: a push takes it along
            super().save_model(output_dir, _internal_call)
            if self.args.should_save:
                write_guarantees(self.model, folder)  # of a plain module too

    # -- loss --------------------------------------------------------------------------------------------------------

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], None]:
        """One optimizer step's micro-batches. The Trainer's own item count is not used: it is wrong for most heads."""
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        objective = self._objective
        objective.loss_is_ours, objective.has_batches = False, True
        if batches and not objective.has_begun:
            self._begin(batches[0])
            objective.has_begun = True
        self._fold_calibration()
        counts = [self.count_items(batch).to(device) for batch in batches]
        own = torch.stack(counts).sum() if counts else torch.zeros((), dtype=torch.long, device=device)
        num_items = self.accelerator.gather(own.reshape(1)).sum()
        objective.start_step(Group(num_items, max(len(batches), 1), self.accelerator.num_processes))
        return batches, None

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """This micro-batch's share of its optimizer step's loss in training; the plain mean NLL in `eval()` mode."""
        batch, objective = self._read(inputs), self._objective
        draws = self.args.num_train_samples if model.training and is_bayesian(self.model) else 1
        passes = [self._pass(model, batch) for _ in range(draws)]
        if model.training:
            objective.loss_is_ours = True
            loss = objective.loss(self.model, self.state, passes, batch, self.noise_std)
        else:
            loss = passes[0].nll / batch.num_items
        return (loss, passes[-1].outputs) if return_outputs else loss

    def _pass(self, model: nn.Module, batch: LabelledBatch) -> ForwardPass:
        """One forward under one training draw; a custom label's name is the model's, "labels" is the likelihood's."""
        if (forward := head_pass(self.model, model, batch)) is not None:
            return forward
        likelihood, own_loss, trains_own = batch.likelihood, self.compute_loss_func, self._objective.has_own_terms
        is_ours = is_bayesian(self.model) or self.args.noise_std == HEAD or self.trains_by_noise(likelihood)
        if own_loss is None and not is_ours and (likelihood.has_stock_loss or not likelihood.is_known):
            loss, outputs = super().compute_loss(model, dict(batch.given), return_outputs=True)
            return ForwardPass(loss * batch.num_items, 0.0, outputs)
        # as in the stock Trainer, a function is handed "labels", and others stay in the forward
        keeps_labels = trains_own or not likelihood.is_known if own_loss is None else "labels" not in batch.inputs
        with training_draw(self.model):
            outputs = model(**(batch.given if keeps_labels else model_inputs(self.model, batch.inputs)))
        if own_loss is not None:
            # Given the batch's own count, a function that divides by it and one that takes a mean agree.
            loss = given_loss(own_loss, outputs, batch.inputs.get("labels"), batch.num_items)
            return ForwardPass(loss * batch.num_items, 0.0, outputs)
        own = own_terms(outputs, batch.labelled, likelihood.problem_type) if trains_own else 0.0
        noise_std = self.noise_std() if likelihood.has_noise else None
        return ForwardPass(likelihood.nll(outputs, batch.labelled, noise_std).sum(), own, outputs)

    # -- reporting ---------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the ELBO's parts, as means since the last log, to every log of the training loss."""
        if "loss" in logs:
            logs.update(self._objective.log(lambda sums: self.accelerator.reduce(sums, "mean")))
        super().log(logs, start_time)
