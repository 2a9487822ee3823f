"""`BayesianTrainer`: transformers' Trainer with the ELBO as its loss and Monte-Carlo prediction in its evaluation."""

import contextlib
import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from ..checkpoint.saving import saved_along
from ..conversion.convert import is_bayesian
from ..conversion.record import conversion_record, update_config, without_stale_record
from ..likelihoods import HEAD, ProblemType, get_likelihood, resolve_problem_type, without_ignored
from ..nn.draws import one_draw_per_forward, posterior_mean, training_draw
from ..nn.kl import kl_divergence, log_variational_posterior
from . import adapter_checkpoints, checkpoints, checks
from .alignment import CalibrationTerm
from .arguments import BayesianTrainingArguments, parse_noise_std
from .elbo import Group, count_label_column, count_training_items, elbo_loss, infer_num_items, kl_warmup
from .items import as_labels, check_label_names, count_items, model_inputs
from .laplace import LaplaceTrainer
from .objective_check import ObjectiveCheck, OwnObjective, check_bases
from .optimizer import ScalesApart
from .own_terms import OWN_TERMS, ForwardPass, given_loss, has_own_terms, own_terms
from .precision import lost_steps_warning
from .records import SILENT_LAYERS, TrainingRecord
from .resuming import Resuming

__all__ = ["BayesianTrainer"]

logger = logging.getLogger(__name__)


class BayesianTrainer(OwnObjective, ScalesApart, Resuming, LaplaceTrainer):
    """Trains a Bayesian model on the ELBO and evaluates it by S weight draws; another one trains as ever.

    It takes the arguments of `Trainer`, with `args` a `BayesianTrainingArguments`. Convert the model, or build it of
    `bayeformers.nn` layers, *before* making the trainer; a `model_init` returns such a model. The loss of every
    optimizer step is

        mean NLL of its items + (kl_weight / N) * KL

    whatever the batch size, accumulation and number of processes (see `training.elbo`); with `num_train_samples` > 1
    the NLL is averaged over as many draws. A `calibration_loss` is added with its weight (`training.calibration_term`).
    An unconverted model trains on its own loss, scaled as exactly, or, with `noise_std`="head", on its Gaussian NLL.

    Errors: TypeError for other training arguments; ValueError for what would make the ELBO wrong (label smoothing),
    for `nn.DataParallel`, FSDP and DeepSpeed, and for an empty dataset.
    """

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
        if model is not None and is_bayesian(model):
            checks.check_converted(args)
            if args.ddp_find_unused_parameters is None:
                # The KL reaches every converted parameter; the search would mark an uncalled one as ready twice.
                args.ddp_find_unused_parameters = False
        checks.check_dataset(kwargs.get("train_dataset"), "train_dataset")
        checks.check_dataset(kwargs.get("eval_dataset"), "eval_dataset")
        self._run: TrainingRecord | None = None
        self.start_anew()
        super().__init__(model, args, *positional, **kwargs)
        self.add_callback(ObjectiveCheck(self, BayesianTrainer))

    def start_anew(self) -> None:
        """Forget a training that has ended, or that begins again with smaller batches."""
        if self._run is not None:
            self._run.close()
        self._group: Group | None = None
        self._calibration: CalibrationTerm | None = None
        self._run, self._begun, self._has_own_terms = None, False, False
        self.forget_loss()

    def problem_type(self, inputs: Mapping[str, Any]) -> ProblemType:
        """The problem type of the model's head, for a batch whose labels may decide between single and multi label."""
        labels = as_labels(inputs, self.args.label_names).get("labels")
        self._settle_problem_type(labels)
        # a plain model trains on its own loss, and a function that is given needs no likelihood of ours
        needs_none = self.compute_loss_func is not None or not is_bayesian(self.model)
        problem_type = resolve_problem_type(self.model, labels, or_unknown=needs_none)
        checks.check_variance_head(self.args.noise_std, problem_type)
        if self.compute_loss_func is None:
            checks.check_classes(self.model, problem_type)
        return problem_type

    def count_items(self, inputs: Mapping[str, Any]) -> Tensor:
        """Items of a batch in the unit of its loss: a 0-dimensional tensor. Override it along with a custom loss."""
        problem_type = self.problem_type(inputs)
        labelled = as_labels(inputs, self.args.label_names)
        return count_items(without_ignored(labelled, self.model, problem_type), problem_type)

    # -- train -------------------------------------------------------------------------------------------------------

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """As `Trainer.train`. Records N, the KL's weight and a regression's noise in `config.bayesian`.

        Errors: ValueError where N is unknown, labels do not fit the head, or a checkpoint is of another conversion.
        """
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
        if self._run is not None and self._run.fits_noise:
            self.store_residual()  # the means may have moved
        self._group = None
        if trial is not None:
            self.objective: float | None = None  # the search then evaluates: see `hyperparameter_search`
        return output

    def hyperparameter_search(
        self, hp_space: Any = None, compute_objective: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        """As `Trainer.hyperparameter_search`. A trial's objective is that of the model that it ends with.

        It is evaluated after training with `num_eval_samples` draws; with `load_best_model_at_end` that is the best
        epoch's model, where the stock search takes the last epoch's. The evaluations inside `train` serve to prune.
        Without ``compute_objective`` it is the loss, or the sum of the metrics that `compute_metrics` returns.

        Errors: ValueError for a value of a trial that is out of the argument's range.
        """
        return super().hyperparameter_search(hp_space, compute_objective or self.default_objective, *args, **kwargs)

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """As `Trainer.call_model_init`, for a model that is converted in it."""
        model: nn.Module = super().call_model_init(trial)
        if is_bayesian(model) and self.args.ddp_find_unused_parameters is None:
            self.args.ddp_find_unused_parameters = False  # as in `__init__`, where the accelerator stands by now
            if self.accelerator.ddp_handler is not None:
                self.accelerator.ddp_handler.find_unused_parameters = False
        return model

    def _hp_search_setup(self, trial: Any) -> None:
        super()._hp_search_setup(trial)
        self.args.check_bayesian()

    def _begin(self, inputs: Mapping[str, Any]) -> TrainingRecord | None:
        """At the first batch of a `train()`: by then `model_init` has made the model and a checkpoint is loaded."""
        if not is_bayesian(self.model):
            checks.check_uncalibrated(self.args)
            self._say(
                "The model is not Bayesian: this is ordinary training of a point estimate. Call `to_bayesian(model)` "
                "before making the trainer for variational inference, or `fit_laplace()` after training."
            )
            return None
        checks.check_converted(self.args)
        if conversion_record(self.model) is None:
            one_draw_per_forward(self.model)  # built by hand: ties share a draw, as after a conversion
        problem_type = self.problem_type(inputs)
        check_label_names(self.args.label_names, problem_type)
        if (warning := lost_steps_warning(self.model, self.args.learning_rate)) is not None:
            self._say(warning)
        self._has_own_terms = self._find_own_terms(inputs, problem_type)
        self._calibration = self._calibration_term(problem_type)
        num_items = infer_num_items(
            self.train_dataset, problem_type, lambda: self._count_labels(problem_type), self.args.num_training_items
        )
        update_config(self.model, num_training_items=num_items, kl_weight=float(self.args.kl_weight))
        is_regression = get_likelihood(problem_type).has_noise
        noise_std = self.noise_std() if is_regression else None
        if is_regression:
            update_config(self.model, noise_std=noise_std)
        return TrainingRecord(
            self.model,
            num_items,
            fits_noise=is_regression and noise_std != HEAD and parse_noise_std(self.args.noise_std) is None,
            watch_calls=not self.args.torch_compile,
            has_calibration=self._calibration is not None,
            has_own_terms=self._has_own_terms,
        )

    def _find_own_terms(self, inputs: Mapping[str, Any], problem_type: ProblemType) -> bool:
        if self.compute_loss_func is not None or self.args.noise_std == HEAD:
            return False
        given = self._prepare_inputs(dict(inputs))
        if not has_own_terms(self.model, as_labels(given, self.args.label_names), given, problem_type):
            return False
        self._say(OWN_TERMS.format(type(self.model).__name__))
        return True

    def _calibration_term(self, problem_type: ProblemType) -> CalibrationTerm | None:
        if self.args.calibration_loss is None:
            return None
        warmup_steps = math.ceil(self.args.calibration_warmup_ratio * self.state.max_steps)
        term = CalibrationTerm(self.args, problem_type, warmup_steps)
        if self._resumed is not None:
            term.load(self._resumed, self.state.global_step)
        return term

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self._calibration is not None:
            self._fold_calibration(self._calibration)
            if self.args.should_save:  # before the stock part, which may push the folder
                folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
                self._calibration.save(folder)
        super()._save_checkpoint(model, trial)

    def _fold_calibration(self, term: CalibrationTerm) -> None:
        term.fold(lambda sums: self.accelerator.reduce(sums, "sum"), self.args.device, self.state.global_step)

    def _count_labels(self, problem_type: ProblemType) -> int:
        """Labels of the training data: those of its column, or each rank's share of the collated examples."""
        names = self.args.label_names
        likelihood = get_likelihood(problem_type)
        if "labels" in likelihood.label_names and not likelihood.has_many_items:
            counted = count_label_column(self.train_dataset, names or ())
            if counted is not None:
                return counted
        collate = self._get_collator_with_removed_columns(self.data_collator, description="training")
        share = count_training_items(
            self.train_dataset,
            lambda items: without_ignored(as_labels(collate(items), names), self.model, problem_type),
            problem_type,
            batch_size=self.args.train_batch_size,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
        )
        return int(self.accelerator.gather(torch.tensor([share], device=self.args.device)).sum())

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As `Trainer.save_model`, with the fitted posterior of an unconverted model beside the weights.

        The config of an unconverted model records no conversion, whatever stands in it: see `without_stale_record`.
        """
        own = self._posterior
        if own is not None and self.args.should_save and saved_along(self.model) is not own:
            own.save(output_dir or str(self.args.output_dir))  # first: a push to the hub takes it along
        inner, folder = checkpoints.unwrapped(self.model), output_dir or str(self.args.output_dir)
        has_adapter = adapter_checkpoints.is_peft(inner) and is_bayesian(inner) and not self._is_sharded()
        if has_adapter and self.args.should_save:
            adapter_checkpoints.save_beside(inner, folder)
        # PEFT saves what its prompt encoders compute
        with without_stale_record(self.model), posterior_mean(inner) if has_adapter else contextlib.nullcontext():
            super().save_model(output_dir, _internal_call)

    # -- loss --------------------------------------------------------------------------------------------------------

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], None]:
        """One optimizer step's micro-batches. The Trainer's own item count is not used: it is wrong for most heads."""
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        self.forget_loss(has_batches=True)
        if batches and not self._begun:
            self._run, self._begun = self._begin(batches[0]), True
        if self._calibration is not None:
            self._fold_calibration(self._calibration)
        counts = [self.count_items(batch).to(device) for batch in batches]
        own = torch.stack(counts).sum() if counts else torch.zeros((), dtype=torch.long, device=device)
        num_items = self.accelerator.gather(own.reshape(1)).sum()
        self._group = Group(num_items, max(len(batches), 1), self.accelerator.num_processes)
        if self._run is not None:
            self._run.start_step()
        return batches, None

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """This micro-batch's share of its optimizer step's loss in training; the plain mean NLL in `eval()` mode."""
        if not model.training:
            nll, _, outputs = self._pass(model, inputs)
            loss = nll / self.count_items(inputs)
            return (loss, outputs) if return_outputs else loss
        self.loss_is_ours, bayesian = True, is_bayesian(self.model)
        passes = [self._pass(model, inputs) for _ in range(self.args.num_train_samples if bayesian else 1)]
        nll = torch.stack([found.nll for found in passes]).mean()
        group = self._group or Group(self.count_items(inputs), 1)
        if not bayesian:
            loss = elbo_loss(nll, group)[0]
        else:
            calibration = self._calibrated([found.outputs for found in passes], inputs, group)
            loss = self._elbo(nll, group, calibration, self._mean_own_terms(passes, inputs, group))
        return (loss, passes[-1].outputs) if return_outputs else loss

    def _mean_own_terms(self, passes: list[ForwardPass], inputs: dict[str, Any], group: Group) -> Tensor | float:
        """This micro-batch's share of the model's own terms, weighted by its items as the NLL is; 0 without any."""
        if not self._has_own_terms:
            return 0.0
        count = self.count_items(inputs)
        if not count:
            return 0.0  # the own loss is a mean over nothing
        mean = sum(found.own_terms for found in passes) / len(passes)
        return elbo_loss(mean * count, group)[0]

    def _calibrated(self, outputs: list[Any], inputs: dict[str, Any], group: Group) -> Tensor | float:
        """This micro-batch's share of the calibration loss, weighted by its items as the NLL is; 0 without one."""
        if self._calibration is None:
            return 0.0
        noise_std = self.noise_std() if get_likelihood(self.problem_type(inputs)).has_noise else None
        value = self._calibration(outputs, as_labels(inputs, self.args.label_names), noise_std, self.state.global_step)
        return 0.0 if value is None else elbo_loss(value * self.count_items(inputs), group)[0]

    def _elbo(
        self, nll_sum: Tensor, group: Group, calibration: Tensor | float = 0.0, own_terms: Tensor | float = 0.0
    ) -> Tensor:
        num_items = self.args.num_training_items if self._run is None else self._run.num_items
        if num_items is None:
            raise ValueError("`num_training_items` must be given to compute the ELBO outside `train()`.")
        kl = kl_divergence(self.model).to(nll_sum.device)
        weight = self.args.kl_weight * kl_warmup(
            self.state.global_step, self.state.max_steps, self.args.kl_warmup_ratio
        )
        nll, kl_term = elbo_loss(nll_sum, group, weight * kl / num_items)
        if self._run is not None:
            with torch.no_grad():
                log_posterior = log_variational_posterior(self.model) if self._run.starts_step else 0.0
            self._run.add(nll, kl / group.num_batches, log_posterior, calibration, own_terms)
            if names := self._run.silent_layers():
                self._say(SILENT_LAYERS.format(len(names), ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")))
        return nll + kl_term + self.args.calibration_weight * calibration + own_terms

    def _pass(self, model: nn.Module, given: dict[str, Any]) -> ForwardPass:
        """One forward under one training draw; a custom label's name is the model's, "labels" is the likelihood's."""
        inputs = as_labels(given, self.args.label_names)
        has_own_loss = self.compute_loss_func is not None
        problem_type = self.problem_type(inputs)
        likelihood = get_likelihood(problem_type)
        has_likelihood = is_bayesian(self.model) or self.args.noise_std == HEAD
        has_likelihood = has_likelihood or (likelihood.is_known and not likelihood.has_stock_loss)
        if not has_own_loss and not has_likelihood:
            loss, outputs = super().compute_loss(model, dict(given), return_outputs=True)
            return ForwardPass(loss * self.count_items(inputs), 0.0, outputs)
        # as in the stock Trainer, a function is handed "labels", and others stay in the forward
        is_labelled = not likelihood.is_known or self._has_own_terms
        is_labelled = "labels" not in inputs if has_own_loss else is_labelled
        with training_draw(self.model):
            outputs = model(**given) if is_labelled else model(**model_inputs(self.model, inputs))
        if self.compute_loss_func is not None:
            # Given the batch's own count, a function that divides by it and one that takes a mean agree.
            count = self.count_items(inputs)
            loss = given_loss(self.compute_loss_func, outputs, inputs.get("labels"), count)
            return ForwardPass(loss * count, 0.0, outputs)
        noise_std = self.noise_std() if likelihood.has_noise else None
        labelled = without_ignored(inputs, self.model, problem_type)
        own = own_terms(outputs, labelled, problem_type) if self._has_own_terms else 0.0
        return ForwardPass(likelihood.nll(outputs, labelled, noise_std).sum(), own, outputs)

    # -- reporting ---------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the ELBO's parts, as means since the last log, to every log of the training loss."""
        if "loss" in logs and self._run is not None:
            logs.update(self._run.drain(lambda sums: self.accelerator.reduce(sums, "mean")))
            if self._calibration is not None:
                logs.update(self._calibration.report())
        super().log(logs, start_time)
