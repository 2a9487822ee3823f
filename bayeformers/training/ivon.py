"""Training with `IVON`: every optimizer step is taken at one draw, and the training ends in an `IVONPosterior`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_utils import TrainOutput

from ..conversion.convert import is_bayesian
from ..likelihoods import Likelihood
from ..optim import IVON, SGHMC
from ..posteriors import IVONPosterior
from .arguments import parse_noise_std
from .laplace import LaplaceTrainer
from .schedules import check_chain

__all__ = ["IVONTrainer"]

_POINT_ESTIMATE = (
    "The model is not Bayesian: this is ordinary training of a point estimate. Call `to_bayesian(model)` before making "
    "the trainer for variational inference, train with `IVON`, or call `fit_laplace()` after training."
)
"""Said of a training that ends without a posterior."""

_SQUARED_ERROR = (
    "The loss of this regression is the squared error, and the posterior that of a Gaussian likelihood with a noise of "
    "0.7071 (2 s^2 = 1). Give the labels' own noise as `noise_std`."
)
"""Said of a sampling optimizer, for which the scale of the loss is that of the likelihood."""

_FILE = str(IVONPosterior.file_name)


class IVONTrainer(LaplaceTrainer):
    """A Trainer that, where its optimizer is an `IVON`, takes every step at one draw and ends with its posterior.

    One draw spans all micro-batches of a step, on all processes the same, so that the averaged gradient times the noise
    is what one process would have. It ends before gradients are clipped, which so shortens the step and leaves the
    Hessian's estimate alone. Outside of it the model is the posterior mean. Evaluations and checkpoints during training
    have the posterior of their moment.
    """

    def __init__(self, model: nn.Module | None = None, *args: Any, **kwargs: Any) -> None:
        super().__init__(model, *args, **kwargs)
        self._ivon: IVON | None = None
        self._is_sampler = False  # whether the optimizer is IVON or SGHMC, which need the likelihood's own scale
        self.add_callback(_Draws(self))

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """As `Trainer.train`.

        Args:
            *args: as of `Trainer`.
            **kwargs: as of `Trainer`.

        Returns:
            As of `Trainer`.

        Raises:
            ValueError: `IVON` with a model that is Bayesian already, with several draws per step, or in float16.
        """
        self._ivon = None
        try:
            output = super().train(*args, **kwargs)
        finally:
            if self._ivon is not None:
                self._ivon.leave_draw(keeps=False)  # one that an exception has left open
        self._end()
        return output

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """As `Trainer.training_step`; the draw ends with the last micro-batch of a step.

        Args:
            model: the network, perhaps wrapped.
            inputs: the micro-batch.
            *args: as of `Trainer`.
            **kwargs: as of `Trainer`.

        Returns:
            The loss.
        """
        loss = super().training_step(model, inputs, *args, **kwargs)
        if self._ivon is not None and self.accelerator.sync_gradients:
            self._ivon.leave_draw()
        return loss

    @property
    def trains_by_ivon(self) -> bool:
        """Whether the optimizer of the present training is an `IVON`."""
        return self._ivon is not None

    def settle_ivon(self, count: Callable[[], int]) -> None:
        """At the first batch of a model that is not Bayesian: ``ess`` becomes ``count()``, the number N, if unset."""
        if self._ivon is None:
            self._say(_POINT_ESTIMATE)
            return
        unknown = [group for group in self._ivon.param_groups if group["ess"] is None]
        if unknown:
            num_items = count()
            for group in unknown:
                group["ess"] = num_items

    def trains_by_noise(self, likelihood: Likelihood) -> bool:
        """Whether the loss is the Gaussian NLL of the noise that was given, as N times the mean loss has to be."""
        if not (self._is_sampler and likelihood.has_noise and self.compute_loss_func is None):
            return False
        if parse_noise_std(self.args.noise_std) is None:
            self._say(_SQUARED_ERROR)
            return False
        return True

    def find_ivon(self, optimizer: Any) -> None:
        """Take up an optimizer, which accelerate may have wrapped, if it is an `IVON`.

        Raises:
            ValueError: it cannot train this model, or not so; or the gradients of an `SGHMC` are changed.
        """
        inner = getattr(optimizer, "optimizer", optimizer)
        self._ivon = inner if isinstance(inner, IVON) else None
        self._is_sampler = isinstance(inner, IVON | SGHMC)
        check_chain(inner, self.args)
        if self._ivon is None:
            return
        self._ivon.leave_draw(keeps=False)  # of a training that begins again with smaller batches
        if is_bayesian(self.model):
            raise ValueError(
                "IVON makes a posterior of its own, and this model's layers have one already: call "
                "`to_deterministic(model)` first, or train it with another optimizer."
            )
        if self.args.fp16:
            raise ValueError("IVON cannot train with `fp16`, which scales the gradients: use `bf16`, or float32.")
        if self._ivon.mc_samples != 1:
            raise ValueError(
                f"`mc_samples` of IVON must be 1 in a Trainer, where a step is one draw, got {self._ivon.mc_samples}. "
                "Use a larger batch, or `gradient_accumulation_steps`."
            )

    def begin_ivon_draw(self) -> None:
        """Before the first micro-batch of a step. A draw that is open is of a stream's last batches, without a step."""
        if self._ivon is not None:
            self._ivon.leave_draw(keeps=False)
            self._ivon.enter_draw()

    def update_ivon(self) -> None:
        """`trainer.posterior` becomes that of the present moment."""
        if self._ivon is not None:
            self.posterior = IVONPosterior.from_optimizer(self.model, self._ivon)

    def _end(self) -> None:
        """The posterior of the weights that a training ends with: the best checkpoint has its own beside it."""
        best = self.state.best_model_checkpoint if self.args.load_best_model_at_end else None
        if self._ivon is not None and best is not None and Path(best, _FILE).is_file():
            self.posterior = IVONPosterior.load(Path(best, _FILE), self.model)
        else:
            self.update_ivon()


class _Draws(TrainerCallback):
    """Tells an `IVONTrainer` where in the training it is."""

    def __init__(self, trainer: IVONTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.find_ivon(kwargs.get("optimizer"))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.begin_ivon_draw()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_evaluate or control.should_save:
            self.trainer.update_ivon()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_evaluate or control.should_save:
            self.trainer.update_ivon()
