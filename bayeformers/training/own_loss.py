"""Other trainers' own losses: what their items are, whether they are a likelihood's, and how draws are evaluated.

A trainer of trl or sentence-transformers computes its loss itself, as a mean over items: tokens, pairs, rows. That
mean, times the number of items, is the sum that the ELBO's scale needs (see `training.elbo`). One class per family of
trainers; nothing here imports their libraries.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import Trainer

from ..conversion.convert import is_bayesian
from ..likelihoods import get_likelihood
from ..nn.draws import posterior_mean
from .items import LabelledBatch
from .optimizer import rho_parameters
from .own_terms import ForwardPass

__all__ = ["OwnLoss", "PairLoss", "PolicyLoss", "RowLoss", "TokenLoss", "find_own_loss", "reference_mean"]

_NO_LIKELIHOOD = (
    "{} is not known to be a mean negative log-likelihood: with the KL it is no ELBO but a generalised posterior's "
    "objective, whose temperature is the loss's scale. {}"
)


class OwnLoss:
    """The loss that a trainer's own `compute_loss` returns; stateless.

    Attributes:
        problem_type: of the likelihood that counts its items; None: that of the model's head.
        has_likelihood: whether draws are evaluated by that likelihood, from what the model's forward returns.
    """

    problem_type: ClassVar[str | None] = None
    has_likelihood: ClassVar[bool] = False

    def construction(self, model: nn.Module) -> contextlib.AbstractContextManager[None]:
        """While the trainer is made around a Bayesian model."""
        return contextlib.nullcontext()

    def check(self, trainer: Any) -> None:
        """Raise ValueError for arguments under which the loss of a Bayesian model would be wrong."""

    def warning(self, trainer: Any) -> str | None:
        """What to say of a loss that is not known to be a negative log-likelihood; None of one that is."""
        return None

    def has_terms(self, trainer: Any) -> bool:
        """Whether the loss has terms besides the likelihood."""
        return False

    def item_mask(self, trainer: Any, inputs: Mapping[str, Any]) -> Tensor:
        """The items of a batch, of any shape."""
        return get_likelihood(self.problem_type or trainer.problem_type(inputs)).item_mask(inputs)

    def training_pass(self, trainer: Any, model: nn.Module, batch: LabelledBatch) -> ForwardPass:
        """Compute one draw's loss, which the caller holds.

        Args:
            trainer: the trainer.
            model: what is called, perhaps wrapped.
            batch: the micro-batch.

        Returns:
            The items' summed loss.
        """
        return ForwardPass(trainer.base_loss(model, dict(batch.given)) * batch.num_items, 0.0, {})

    def outputs(self, trainer: Any, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Any]:
        """Compute one draw's mean loss in evaluation.

        Args:
            trainer: the trainer.
            model: what is called, perhaps wrapped.
            inputs: the batch.

        Returns:
            The mean, and outputs that the likelihood of `problem_type` reads, None where there are none.
        """
        return trainer.base_loss(model, dict(inputs)), None


class TokenLoss(OwnLoss):
    """trl's `SFTTrainer`: the mean cross-entropy over the tokens that are predicted."""

    problem_type = "causal_lm"
    has_likelihood = True

    def check(self, trainer: Any) -> None:
        """No loss whose weights depend on the probabilities."""
        if getattr(trainer.args, "loss_type", "nll") != "nll":
            raise ValueError(
                f'`loss_type` must be "nll" for a Bayesian model, got {trainer.args.loss_type!r}: its tokens are '
                "weighted by the model's own probabilities, which is no log-likelihood, and the ELBO needs one."
            )

    def item_mask(self, trainer: Any, inputs: Mapping[str, Any]) -> Tensor:
        """Labels that are predicted; behind the virtual tokens of a prompt the first one is, too."""
        mask = super().item_mask(trainer, inputs)
        labels = inputs["labels"]
        return labels != -100 if _has_virtual_tokens(trainer.model) else mask


class PairLoss(OwnLoss):
    """trl's `RewardTrainer`: -log sigmoid(r_chosen - r_rejected - margin), and perhaps a centring term."""

    problem_type = "pairwise_preference"
    has_likelihood = True

    def has_terms(self, trainer: Any) -> bool:
        """`center_rewards_coefficient` pulls the sum of the two rewards to 0."""
        return getattr(trainer.args, "center_rewards_coefficient", None) is not None

    def training_pass(self, trainer: Any, model: nn.Module, batch: LabelledBatch) -> ForwardPass:
        """The likelihood, and what the loss holds besides.

        Args:
            trainer: the trainer.
            model: what is called, perhaps wrapped.
            batch: the micro-batch.

        Returns:
            The pairs' summed NLL, and the centring term.
        """
        loss, outputs = trainer.base_loss(model, dict(batch.given), return_outputs=True)
        if not self.has_terms(trainer):
            return ForwardPass(loss * batch.num_items, 0.0, outputs)
        nll = batch.likelihood.nll(outputs, batch.given).sum()
        return ForwardPass(nll, loss - nll / batch.num_items, outputs)

    def outputs(self, trainer: Any, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Any]:
        """Compute one draw's mean loss in evaluation.

        Args:
            trainer: the trainer.
            model: what is called, perhaps wrapped.
            inputs: the batch.

        Returns:
            The mean, and the rewards.
        """
        found: tuple[Tensor, Any] = trainer.base_loss(model, dict(inputs), return_outputs=True)
        return found


class PolicyLoss(OwnLoss):
    """trl's `DPOTrainer`: -log sigmoid of the difference of two implicit rewards beta log(pi / pi_ref).

    The reference has no draw: its log-probabilities are computed at the posterior mean before the policy's pass, with
    the adapter switched off where there is one, and handed to the loss.
    """

    problem_type = "pairwise_preference"
    _logistic: ClassVar[tuple[str, ...]] = ("sigmoid", "sigmoid_norm")

    def construction(self, model: nn.Module) -> contextlib.AbstractContextManager[None]:
        """An adapter is copied, parameter by parameter, into one of the name "ref", which has no scales."""
        return _without_scales(model)

    def check(self, trainer: Any) -> None:
        """No reference that follows the model, whose parameters are paired by their order."""
        if getattr(trainer.args, "sync_ref_model", False):
            raise ValueError(
                "`sync_ref_model` must be False for a Bayesian model: trl pairs the parameters of the model with those "
                "of the reference by their order, and the model has scales among them."
            )

    def warning(self, trainer: Any) -> str | None:
        """Of a loss other than the logistic one."""
        if list(trainer.loss_types) in [[kind] for kind in self._logistic] and not trainer.use_weighting:
            return None
        return _NO_LIKELIHOOD.format(
            f"DPO's `loss_type`={list(trainer.loss_types)}", 'A likelihood\'s is `loss_type=["sigmoid"]`.'
        )

    def training_pass(self, trainer: Any, model: nn.Module, batch: LabelledBatch) -> ForwardPass:
        """The pairs' summed loss; the reference is computed once for all draws of a micro-batch.

        Args:
            trainer: the trainer.
            model: what is called, perhaps wrapped.
            batch: the micro-batch, which keeps the reference's log-probabilities.

        Returns:
            The sum over the pairs.
        """
        batch.given.update(self._reference(trainer, batch.given))
        with _given_reference(trainer):
            return super().training_pass(trainer, model, batch)

    def outputs(self, trainer: Any, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Any]:
        """Compute one draw's mean loss in evaluation.

        Args:
            trainer: the trainer.
            model: what is called, perhaps wrapped.
            inputs: the batch, which keeps the reference's log-probabilities.

        Returns:
            The mean, and the implicit rewards (2 B,); None of a loss that is no logistic one.
        """
        inputs.update(self._reference(trainer, inputs))
        seen: list[Any] = []
        hook = model.register_forward_hook(lambda module, args, output: seen.append(output))
        try:
            with _given_reference(trainer):
                loss = trainer.base_loss(model, dict(inputs))
        finally:
            hook.remove()
        return loss, {"logits": self._rewards(trainer, seen[0], inputs)} if self._is_plain(trainer) else None

    def _is_plain(self, trainer: Any) -> bool:
        """Whether the loss is the logistic one of plain log-ratios."""
        return self.warning(trainer) is None and trainer.f_divergence_type == "reverse_kl" and trainer.ld_alpha is None

    def _rewards(self, trainer: Any, outputs: Any, inputs: Mapping[str, Any]) -> Tensor:
        mask = inputs["completion_mask"]
        log_probs = outputs.log_probs[:, -(mask.shape[1] - 1) :].sum(1)
        reference = torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])
        rewards: Tensor = trainer.beta * (log_probs - reference.to(log_probs))
        return rewards / mask.sum(1).clamp_min(1) if list(trainer.loss_types) == ["sigmoid_norm"] else rewards

    def _reference(self, trainer: Any, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        if "ref_chosen_logps" in inputs:
            return {}
        model = trainer.model if trainer.ref_model is None else trainer.ref_model
        chosen, rejected = trainer.compute_ref_log_probs(model, inputs)
        return {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}


class RowLoss(OwnLoss):
    """A trainer of sentence-transformers, or one of the user's: a mean over the rows of a batch."""

    problem_type = "unknown"
    _likelihoods: ClassVar[frozenset[str]] = frozenset({
        "BinaryCrossEntropyLoss",
        "CrossEntropyLoss",
        "MultipleNegativesRankingLoss",
        "SoftmaxLoss",
    })

    def check(self, trainer: Any) -> None:
        """No loss that runs the model again in its backward pass, under another draw."""
        cached = sorted({name for name in self._names(trainer, nested=True) if name.startswith("Cached")})
        if cached:
            raise ValueError(
                f"`loss` must not be {cached[0]} for a Bayesian model: it runs the model again in its backward pass, "
                "whose draw would be another. Use the loss without the cache, and smaller batches."
            )

    def warning(self, trainer: Any) -> str | None:
        """Of a loss that is none of the known cross-entropies."""
        unknown = [name for name in self._names(trainer) if name not in self._likelihoods]
        if not unknown:
            return None
        return _NO_LIKELIHOOD.format(unknown[0], "Override `count_items` where its mean is not over rows.")

    def item_mask(self, trainer: Any, inputs: Mapping[str, Any]) -> Tensor:
        """Every row, (B,), of the first column; a cross-encoder's batch is texts, which its loss tokenises."""
        columns = [len(value) for value in inputs.values() if isinstance(value, list | tuple) or _is_column(value)]
        if not columns:
            raise ValueError(f"The rows of a batch cannot be counted, got {sorted(inputs)}: override `count_items`.")
        return torch.ones(columns[0], dtype=torch.bool)

    def _names(self, trainer: Any, *, nested: bool = False) -> Iterator[str]:
        own = getattr(trainer, "loss", None)
        losses = list(own.values()) if isinstance(own, dict) else [own]
        for loss in losses:
            if not isinstance(loss, nn.Module):
                yield type(trainer).__name__ + ".compute_loss"
            elif nested:
                yield from (type(module).__name__ for module in loss.modules())
            else:
                yield type(loss).__name__


_KNOWN: dict[tuple[str, str], OwnLoss] = {
    ("trl", "SFTTrainer"): TokenLoss(),
    ("trl", "RewardTrainer"): PairLoss(),
    ("trl", "DPOTrainer"): PolicyLoss(),
    ("sentence_transformers", "BaseTrainer"): RowLoss(),
}
"""By the library and the name of a class: the libraries are optional, and none is imported for a look at a name."""


def find_own_loss(kind: type, own: type) -> OwnLoss | None:
    """What the loss of the trainer behind ``own`` among the bases of ``kind`` is; None where it is the stock one.

    Args:
        kind: the trainer's class.
        own: ours among its bases.

    Returns:
        The one object of its family.

    Raises:
        TypeError: a trainer of trl whose loss is no mean over labelled items.
    """
    behind = kind.__mro__[kind.__mro__.index(own) + 1 :]
    owner = next(base for base in behind if "compute_loss" in vars(base))
    if owner is Trainer:
        return None
    library = owner.__module__.partition(".")[0]
    if library == "trl" and (library, owner.__name__) not in _KNOWN:  # such as GRPO's, of sampled answers' rewards
        supported = ", ".join(name for known, name in _KNOWN if known == library)
        raise TypeError(
            f"`{kind.__name__}` stands before trl's `{owner.__name__}`, whose loss is no mean negative log-likelihood "
            f"of labelled items: there is no ELBO of it. Supported of trl: {supported}."
        )
    names = ((base.__module__.partition(".")[0], base.__name__) for base in behind)
    return next((_KNOWN[name] for name in names if name in _KNOWN), RowLoss())


@contextlib.contextmanager
def reference_mean(*models: nn.Module) -> Iterator[None]:
    """The models at their posterior mean, whose adapter may be switched inside."""
    with _same_flags(*models), contextlib.ExitStack() as stack:
        for model in filter(is_bayesian, models):
            stack.enter_context(posterior_mean(model))
        yield


@contextlib.contextmanager
def _without_scales(model: nn.Module) -> Iterator[None]:
    """`named_parameters` of the model leaves its scales out, and every `requires_grad` is as it was at exit."""
    scales, named = {id(rho) for rho in rho_parameters(model)}, model.named_parameters

    def others(*args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        return (pair for pair in named(*args, **kwargs) if id(pair[1]) not in scales)

    with _same_flags(model):
        vars(model)["named_parameters"] = others
        try:
            yield
        finally:
            del vars(model)["named_parameters"]


@contextlib.contextmanager
def _same_flags(*models: nn.Module) -> Iterator[None]:
    """Every `requires_grad` is as it was at exit: PEFT sets them anew whenever an adapter is switched."""
    flags = [(parameter, parameter.requires_grad) for model in models for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextlib.contextmanager
def _given_reference(trainer: Any) -> Iterator[None]:
    """The loss takes the reference's log-probabilities from the batch, as it does where they were computed before."""
    given = trainer.precompute_ref_logps
    trainer.precompute_ref_logps = True
    try:
        yield
    finally:
        trainer.precompute_ref_logps = given


def _is_column(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0


def _has_virtual_tokens(model: nn.Module) -> bool:
    """Whether PEFT puts learned embeddings in front of the text; a prefix is put into the cache instead."""
    config = getattr(model, "active_peft_config", None)
    is_prefix = "PREFIX" in str(getattr(config, "peft_type", ""))
    return bool(getattr(config, "is_prompt_learning", False)) and not is_prefix
