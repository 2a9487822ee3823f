"""`BayesianTrainerMixin`: another library's Trainer, its own loss as the likelihood of the ELBO."""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from ..conversion.convert import is_bayesian
from ..heads.find import find_head
from ..likelihoods import Likelihood, ProblemType
from ..nn.draws import posterior_mean, training_draw
from .arguments import BayesianArguments
from .checks import check_dataset
from .columns import predict_batch
from .evaluation import MonteCarloTrainer
from .evaluator import Evaluation
from .items import LabelledBatch
from .objective import check_bases
from .own_loss import OwnLoss, find_own_loss, reference_mean
from .own_terms import ForwardPass
from .trainer import BayesianTrainer

__all__ = ["BayesianTrainerMixin"]


class BayesianTrainerMixin(BayesianTrainer):
    """Before another Trainer among the bases of a class: the ELBO with that trainer's own loss.

        class BayesianSFTTrainer(BayesianTrainerMixin, SFTTrainer): ...

    The loss of every optimizer step is mean own loss of its items + (kl_weight / N) KL, as with `BayesianTrainer`. What
    the items are is known of trl's `SFTTrainer` (predicted tokens), `RewardTrainer` and `DPOTrainer` (pairs), of the
    trainers of sentence-transformers (rows), and of a trainer whose loss is transformers' own, such as
    `Seq2SeqTrainer` (as with `BayesianTrainer`). The loss of any other class behind is taken as a mean over the rows
    of a batch; override `count_items` where it is not. `args` are a dataclass of `BayesianArguments` and the other
    trainer's own.

    Raises:
        TypeError: the other order of bases, or a trainer whose loss is no mean over items, both when the class is
            made; arguments of another class.
        ValueError: what `BayesianTrainer` refuses, and what would make the other trainer's loss no likelihood.
    """

    own_loss: ClassVar[OwnLoss | None] = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        check_bases(cls, BayesianTrainerMixin)
        cls.own_loss = find_own_loss(cls, BayesianTrainer)
        cls.loads_by_name = cls.own_loss is not None

    def __init__(self, *positional: Any, **kwargs: Any) -> None:
        kind = type(self)
        names = list(inspect.signature(_owner_of_init(kind).__init__).parameters)[1:]  # type: ignore[misc]
        kwargs = _named(kind, names, positional, kwargs)
        model, args = kwargs.pop("model", None), kwargs.pop("args", None)
        _check_config(kind, args)
        is_prepared = isinstance(model, nn.Module) and is_bayesian(model)
        if is_prepared and kwargs.get("peft_config") is not None:
            raise ValueError(
                "`peft_config` must be None for a Bayesian model: the adapter would be made after the conversion, and "
                "freeze the scales. Call `get_peft_model(model, peft_config)`, then `to_bayesian`."
            )
        if self.own_loss is not None and args.calibration_loss is not None:
            raise ValueError(
                f"`calibration_loss`={args.calibration_loss!r} reads logits, which the own loss of {kind.__name__} "
                "does not give: use `BayesianTrainer`."
            )
        own = self.own_loss if is_prepared else None
        with contextlib.nullcontext() if own is None else own.construction(model):
            super().__init__(model, args, **kwargs)
        if self.own_loss is not None and is_bayesian(self.model):
            self.own_loss.check(self)

    # -- loss --------------------------------------------------------------------------------------------------------

    def base_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False) -> Any:
        """Compute the loss of the trainer behind, its mean over the items of one batch.

        Args:
            model: the network, perhaps wrapped.
            inputs: the batch.
            return_outputs: whether to return (loss, outputs).

        Returns:
            The loss.
        """
        return super(BayesianTrainer, self).compute_loss(model, inputs, return_outputs)

    def compute_ref_log_probs(self, model: nn.Module, inputs: Mapping[str, Any]) -> Any:
        """As `DPOTrainer.compute_ref_log_probs`, at the posterior mean.

        Args:
            model: the reference, or the model whose adapter is switched off.
            inputs: the batch.

        Returns:
            Log-probabilities of the chosen and of the rejected answers, (B,) each.
        """
        with reference_mean(self.model, model):
            return super().compute_ref_log_probs(model, inputs)  # type: ignore[misc]

    @property
    def uses_own_loss(self) -> bool:
        """Whether the loss is that of the trainer behind: not the stock one, nor a function's, nor a head's bound."""
        return self.own_loss is not None and self.compute_loss_func is None and find_head(self.model) is None

    def problem_type(self, inputs: Mapping[str, Any]) -> ProblemType:
        """The problem type by which the items are counted."""
        own = self.own_loss.problem_type if self.own_loss is not None else None
        return super().problem_type(inputs) if own is None else own

    def count_items(self, inputs: Mapping[str, Any]) -> Tensor:
        """Items of a batch, over which the own loss is a mean: a 0-dimensional tensor."""
        if self.own_loss is None:
            return super().count_items(inputs)
        return self.own_loss.item_mask(self, inputs).sum()

    def _count_items(self, likelihood: Likelihood) -> int:
        data = self.train_dataset
        if not isinstance(data, dict) or self.args.num_training_items is not None:
            return super()._count_items(likelihood)
        check_dataset(data, "train_dataset")
        return sum(len(part) for part in data.values())

    def _begin(self, inputs: Mapping[str, Any]) -> None:
        own = self.own_loss
        if own is not None and self.uses_own_loss and is_bayesian(self.model):
            own.check(self)
            if (warning := own.warning(self)) is not None:
                self._say(warning)
        super()._begin(inputs)

    def _find_own_terms(self, inputs: Mapping[str, Any], likelihood: Likelihood) -> bool:
        if self.own_loss is None or not self.uses_own_loss:
            return super()._find_own_terms(inputs, likelihood)
        return self.own_loss.has_terms(self)

    def _pass(self, model: nn.Module, batch: LabelledBatch) -> ForwardPass:
        if self.own_loss is None or not self.uses_own_loss:
            return super()._pass(model, batch)
        with training_draw(self.model):
            return self.own_loss.training_pass(self, model, batch)

    def _check_can_fit(self) -> None:
        if self.own_loss is not None and self.own_loss.problem_type != "causal_lm":
            raise ValueError(
                "`fit_laplace` takes the likelihood of the model's head, of which there is none in this trainer's loss "
                f"(problem type {self.own_loss.problem_type!r}): convert the model by `to_bayesian` instead."
            )
        super()._check_can_fit()

    # -- evaluation --------------------------------------------------------------------------------------------------

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        """Return (loss, log mean probabilities, labels) of one batch; None for what there is not.

        The loss is the NLL of the averaged prediction where the trainer's loss is a known likelihood's, else the mean
        over the draws of its own loss.

        Args:
            model: the network, perhaps wrapped.
            inputs: the batch.
            prediction_loss_only: whether the loss is enough.
            ignore_keys: outputs that are no predictions.
        """
        if self.own_loss is None or not self.uses_own_loss:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        given = dict(self._prepare_inputs(inputs))
        evaluation = self._evaluation or self._begin_evaluation(self.posterior)
        if self.own_loss.problem_type == "causal_lm":
            found = MonteCarloTrainer.prediction_step(self, model, inputs, prediction_loss_only, ignore_keys)
            with torch.no_grad(), self.compute_loss_context_manager(), self._mean():
                self.base_loss(model, given)  # what the trainer itself logs of an evaluation
            return found
        return self._predict(model, given, evaluation, prediction_loss_only)

    def _predict(
        self, model: nn.Module, given: dict[str, Any], evaluation: Evaluation, prediction_loss_only: bool
    ) -> tuple[Tensor | None, Any, Any]:
        assert self.own_loss is not None
        with torch.no_grad(), self.compute_loss_context_manager():
            found = [self.own_loss.outputs(self, model, given) for _ in self._draws(evaluation)]
        losses, outputs = zip(*found, strict=True)
        if any(output is None for output in outputs):
            return torch.stack([loss.detach() for loss in losses]).mean(), None, None
        batch = predict_batch(outputs, given, str(self.own_loss.problem_type))
        evaluation.keep(batch, self._gathered)
        if prediction_loss_only:
            return batch.loss, None, None
        return batch.loss, batch.predictions, batch.scores["labels"]

    def _draws(self, evaluation: Evaluation) -> Iterator[int]:
        """Every draw of an evaluation in the model, one after the other; a point estimate is one."""
        posterior = evaluation.posterior
        if posterior is None:
            yield 0
            return
        number, most = evaluation.num_samples, posterior.num_draws
        for index in range(number if most is None else min(number, most)):
            with posterior.draw(index, self.args.eval_seed):
                yield index

    def _mean(self) -> contextlib.AbstractContextManager[None]:
        return posterior_mean(self.model) if is_bayesian(self.model) else contextlib.nullcontext()


def _owner_of_init(kind: type) -> type:
    """The class behind ours whose constructor takes the arguments."""
    behind = kind.__mro__[kind.__mro__.index(MonteCarloTrainer) + 1 :]
    return next(base for base in behind if "__init__" in vars(base))


def _named(kind: type, names: Sequence[str], positional: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments by their names in the constructor of the trainer behind, whose order is its own."""
    named = dict(zip(names, positional, strict=False))
    twice = sorted(named.keys() & kwargs.keys())
    if twice or len(positional) > len(names):
        what = f"`{twice[0]}` was given twice" if twice else f"{len(positional)} were given without a name"
        raise TypeError(f"`{kind.__name__}` takes the arguments {tuple(names)} in this order, and {what}.")
    return {**named, **kwargs}


def _check_config(kind: type, args: Any) -> None:
    """Raise TypeError unless ``args`` are ours and those of the trainer behind."""
    expected = _config_of(kind)
    name = f"Bayesian{expected.__name__}"
    if not (isinstance(args, expected) and isinstance(args, BayesianArguments)):
        raise TypeError(
            f"`args` must be a {expected.__name__} with the fields of `BayesianArguments`, got {type(args).__name__}. "
            f"Write `@dataclass class {name}(BayesianArguments, {expected.__name__}): ...` and pass `{name}(...)`."
        )


def _config_of(kind: type) -> type:
    """The class of arguments that the trainer behind ours takes: sentence-transformers names it, others annotate it."""
    if isinstance(named := getattr(kind, "training_args_class", None), type):
        return named
    owner = _owner_of_init(kind)
    declared = inspect.signature(owner.__init__).parameters  # type: ignore[misc]
    found: Any = declared["args"].annotation if "args" in declared else None
    if isinstance(found, str):
        try:
            found = eval(found, vars(sys.modules[owner.__module__]))
        except NameError:
            found = None
    kinds = [one for one in get_args(found) or (found,) if isinstance(one, type) and issubclass(one, TrainingArguments)]
    return max(kinds, key=lambda one: len(one.__mro__), default=TrainingArguments)
