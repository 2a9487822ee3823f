"""Training a VBLL or SNGP head: its objective in place of the model's own loss, and what SNGP does between steps."""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_utils import has_length

from ..conversion.convert import is_bayesian
from ..forward import labels_of
from ..heads import HeadPosterior, RandomFeatureHead, fit_covariance, project_spectra
from ..heads.base import check_way, features_of, with_logits
from ..heads.find import check_likelihood, find_head, head_of
from ..heads.spectral import check_spectral_layers
from ..posteriors.heads import without_labels
from ..sampling.views import viewed
from .arguments import parse_noise_std
from .checks import check_converted, check_uncalibrated
from .elbo import preserved_rng
from .items import LabelledBatch, check_label_names
from .ivon import IVONTrainer
from .own_terms import ForwardPass
from .records import HeadRecord

__all__ = ["HeadTrainer", "has_prior", "head_pass"]

logger = logging.getLogger(__name__)


def has_prior(model: nn.Module) -> bool:
    """Whether the loss of a model has a term besides the likelihood: it is Bayesian, or has a VBLL or SNGP head."""
    return is_bayesian(model) or find_head(model) is not None


def head_pass(model: nn.Module, wrapped: nn.Module, batch: LabelledBatch) -> ForwardPass | None:
    """One training forward of a model with a VBLL or SNGP head; None of another model.

    Args:
        model: the model itself.
        wrapped: what is called, such as its DistributedDataParallel.
        batch: with labels.

    Returns:
        The head's nll, with the mean logits in the outputs.
    """
    head = find_head(model)
    if head is None or is_bayesian(model):
        return None
    labels_of(batch.labelled)
    outputs, features = features_of(wrapped, head, without_labels(model, batch.inputs))
    items = head.item_nll(features, batch.labelled, batch.likelihood)
    return ForwardPass(items.sum(), 0.0, with_logits(outputs, head(features)))


class HeadTrainer(IVONTrainer):
    """A Trainer that knows the heads of `bayeformers.heads`; of other models it is as its base."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_callback(_BetweenSteps(self))

    def fit_covariance(self, train_dataset: Any = None) -> HeadPosterior:
        """Compute an SNGP head's covariance from the training data, as `train` does when it ends.

        Args:
            train_dataset: the data; by default the trainer's.

        Returns:
            The posterior.

        Raises:
            ValueError: the model has no SNGP head, or there are no data.
        """
        data = self.train_dataset if train_dataset is None else train_dataset
        self._check_rows(data, "fit_covariance")
        head_of(self.model)
        with self._measuring(self.args.seed):
            batches = self._curvature_batches(data, "training", self.args.per_device_eval_batch_size)
            return fit_covariance(self.model, batches)

    def _begin_head(self: Any, inputs: Mapping[str, Any]) -> bool:
        """At the first batch of a `train()` of a model with such a head; False of another model."""
        head = find_head(self.model)
        if head is None:
            return False
        if is_bayesian(self.model):
            raise ValueError(
                "The model has a VBLL or SNGP head and Bayesian layers: their objectives do not go together. Call "
                "`to_plain_head(model)` or `to_deterministic(model)`."
            )
        if self.trains_by_ivon:
            raise ValueError(
                "IVON makes a posterior of its own, and this model's VBLL or SNGP head is one already: call "
                "`to_plain_head(model)` first, or train it with another optimizer."
            )
        check_converted(self.args)
        check_uncalibrated(self.args)
        if self.compute_loss_func is not None:
            raise ValueError("`compute_loss_func` must be None for a VBLL or SNGP head, whose loss is its own bound.")
        if parse_noise_std(self.args.noise_std) is not None:
            raise ValueError(
                f"`noise_std`={self.args.noise_std!r} is the head's own: give it to `to_vbll` or `to_sngp`."
            )
        likelihood = self._read(dict(inputs)).likelihood
        check_label_names(self.args.label_names, likelihood.problem_type)
        check_likelihood(head, likelihood)
        self._check_way(without_labels(self.model, self._prepare_inputs(dict(inputs))))
        self._objective.record = HeadRecord(self._count_items(likelihood))
        if isinstance(head, RandomFeatureHead):
            head.forget()
            check_spectral_layers(self.model, head)
        return True

    def _check_way(self, inputs: Any) -> None:
        with torch.no_grad(), preserved_rng(), viewed(self.model, training=False) as view:
            head = head_of(view.model)
            check_way(view.model, head, inputs, features_of(view.model, head, inputs)[1])

    def _check_can_fit(self) -> None:
        if find_head(self.model) is not None:
            raise ValueError(
                "`fit_laplace` needs a model with one set of weights; the VBLL or SNGP head of this one is a posterior "
                "already. Call `to_plain_head(model)` first."
            )
        super()._check_can_fit()


class _BetweenSteps(TrainerCallback):
    """SNGP: spectra after every optimizer step, the covariance after the last."""

    def __init__(self, trainer: HeadTrainer) -> None:
        self.trainer = trainer

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        head = find_head(self.trainer.model)
        if isinstance(head, RandomFeatureHead):
            project_spectra(self.trainer.model, head)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if isinstance(find_head(self.trainer.model), RandomFeatureHead) and self.trainer.train_dataset is not None:
            if has_length(self.trainer.train_dataset):
                self.trainer.fit_covariance()
            else:
                logger.warning(
                    "`train_dataset` has no length: call `fit_covariance` with data for this SNGP head's covariance."
                )
