"""What every Bayesian pipeline adds to transformers' own: a posterior, its uncertainty in each result, a policy."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from types import GeneratorType
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..checks import check_count, check_draw
from ..forward import wide
from ..guarantees import AbstentionPolicy
from ..guarantees.policy import PREDICTED
from ..guarantees.saving import mismatch, of_weights, weights_digest
from ..likelihoods import get_likelihood, unwrapped
from ..linearized.links import ignores_shift
from ..linearized.methods import METHODS, SAMPLING
from ..posteriors import BasePosterior, Posterior
from ..predictive import Predictive

__all__ = ["PARTS", "BayesianPipelineMixin", "check_head", "heads_of", "result_of", "uncertainties"]

PARTS = ("total", "aleatoric", "epistemic")
"""Of a result's ``uncertainty``, in this order on the last axis of `uncertainties`."""

NUM_SAMPLES = 16
_locks: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
_UNLOCKED = threading.RLock()  # of a pipeline without a tokenizer


class BayesianPipelineMixin:
    """A pipeline whose numbers are a posterior's, beside transformers' class of the task.

    Every call predicts with the draws of ``seed``, so that an input has one answer whatever stands beside it in its
    batch, and whichever thread asks. The model is left as it is, its mode included.

    Attributes:
        posterior: what is asked; its model is the pipeline's.
        num_samples: number S of draws.
        method: of `predict`; None: the posterior's own default.
        seed: of the draws.
        abstention: the policy that says when to refuse, or None.
        heads: names of transformers' classes that have the task's head; empty: any.
        scores_are_of: what results are about where that is not what the head predicts: a policy that was fitted to the
            head's predictions promises nothing for them.
    """

    heads: ClassVar[frozenset[str]] = frozenset()
    scores_are_of: ClassVar[str | None] = None
    posterior: Any
    model: Any
    tokenizer: Any
    task: str

    def __init__(
        self,
        *,
        model: nn.Module,
        posterior: Posterior,
        num_samples: int | None = None,
        method: str | None = None,
        seed: int = 0,
        abstention: AbstentionPolicy | None = None,
        **kwargs: Any,
    ) -> None:
        self.task = kwargs.get("task", "")
        check_head(model, self.heads, self.task)
        self.posterior, self.abstention, self.seed = posterior, abstention, seed
        fitted = getattr(abstention, "num_samples", None), getattr(abstention, "method", None)
        self.num_samples = num_samples if num_samples is not None else fitted[0] or NUM_SAMPLES
        self.method = method if method is not None else fitted[1]
        _check_how(self.num_samples, self.method, seed)
        _check_policy(abstention, posterior, self.num_samples, self.method, self.scores_are_of)
        super().__init__(model=model, **kwargs)  # type: ignore[call-arg]

    def _sanitize_parameters(self, **kwargs: Any) -> Any:
        """A call may have its own ``num_samples``, ``method`` and ``seed``."""
        how = self.checked({name: kwargs.pop(name, None) for name in ("num_samples", "method", "seed")})
        inputs, forward, results = super()._sanitize_parameters(**kwargs)  # type: ignore[misc]
        return inputs, {**forward, **how}, results

    def checked(self, how: Mapping[str, Any]) -> dict[str, Any]:
        """A call's own ``num_samples``, ``method`` and ``seed``, less those that are None.

        Returns:
            What `predict_batch` takes.

        Raises:
            ValueError: one is out of range, or not what the policy was fitted with, as are weights that have moved.
        """
        given = {name: value for name, value in how.items() if value is not None}
        _check_how(given.get("num_samples", 1), given.get("method"), given.get("seed", 0))
        num_samples, method = given.get("num_samples", self.num_samples), given.get("method", self.method)
        _check_policy(self.abstention, self.posterior, num_samples, method, self.scores_are_of)
        return given

    def __call__(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """As transformers' pipeline of the task.

        Args:
            inputs: one input, a list, a generator or a dataset of them.
            args: as there.
            kwargs: as there, and ``num_samples``, ``method`` and ``seed``.

        Returns:
            transformers' results, with what the mixin adds.

        Raises:
            ValueError: there is no input.
        """
        if isinstance(inputs, Sized) and not isinstance(inputs, (str, Mapping)) and len(inputs) == 0:
            raise ValueError(f"`inputs` of {self.task!r} must hold an input, got an empty {type(inputs).__name__}.")
        return super().__call__(inputs, *args, **kwargs)  # type: ignore[misc]

    def preprocess(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers does, one thread after the other: a fast tokenizer keeps its padding and truncation."""
        lock = _lock_of(self.tokenizer)
        with lock:
            made = super().preprocess(*args, **kwargs)  # type: ignore[misc]
        return _one_by_one(made, lock) if isinstance(made, GeneratorType) else made

    def predict_batch(self, inputs: Mapping[str, Any], how: Mapping[str, Any], **options: Any) -> Predictive:
        """What the posterior says about a batch.

        Args:
            inputs: what the model's forward takes.
            how: the call's own ``num_samples``, ``method`` and ``seed``, where it has them.
            options: further ones of the posterior's `predict`.

        Returns:
            The prediction.
        """
        method = how.get("method", self.method)
        given = {} if method is None else {"method": method}
        return self.posterior.predict(  # type: ignore[no-any-return]
            dict(inputs),
            num_samples=how.get("num_samples", self.num_samples),
            seed=how.get("seed", self.seed),
            **(self._with_contrasts(method, options) | given | options),
        )

    def _with_contrasts(self, method: str | None, options: Mapping[str, Any]) -> dict[str, Any]:
        """Of a linearised softmax: one backward pass fewer, and the same probabilities."""
        if type(self.posterior).predict is not BasePosterior.predict:  # another may not have the argument
            return {}
        method = self.posterior.default_method if method is None else method
        problem = options.get("problem_type") or self.posterior.problem_type()
        return {"contrasts": True} if method not in SAMPLING and ignores_shift(problem, "auto") else {}

    @property
    def is_average_of_passes(self) -> bool:
        """Whether a prediction is the plain average over `drawn_outputs`."""
        return hasattr(self.posterior, "passes") and not getattr(self.posterior, "predicts_itself", False)

    def drawn_outputs(self, inputs: Mapping[str, Any], how: Mapping[str, Any]) -> Iterator[Any]:
        """The model's output under each draw; of networks, for heads that no linearised method is for.

        Args:
            inputs: what the model's forward takes.
            how: as of `predict_batch`.

        Returns:
            The outputs, one after the other.

        Raises:
            ValueError: another method was asked for.
        """
        method = how.get("method", self.method)
        if method is not None and method not in SAMPLING:
            raise ValueError(f"`method` of {self.task!r} must be one of {SAMPLING}, got {method!r}.")
        num_samples, seed = how.get("num_samples", self.num_samples), how.get("seed", self.seed)
        outputs: Iterator[Any] = self.posterior.passes(dict(inputs), num_samples=num_samples, seed=seed)
        return outputs

    def refusals(self, predictive: Predictive) -> dict[str, Tensor]:
        """Where the policy refuses, under the name of the field in the outputs; nothing without a policy."""
        return {} if self.abstention is None else {"abstain": self.abstention.abstain(predictive)}

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """Write the model, its posterior, its policy and its tokenizer or processor into a folder.

        Args:
            save_directory: the folder.
            kwargs: as of the model's `save_pretrained`.
        """
        super().save_pretrained(save_directory, **kwargs)  # type: ignore[misc]
        is_own = getattr(self.model, "posterior", None) is self.posterior
        if not is_own and getattr(self.posterior, "file_name", None) is not None:
            self.posterior.save(save_directory)
        if self.abstention is not None:
            of_weights(self.abstention, self.model).save(save_directory)


def uncertainties(predictive: Predictive) -> Tensor:
    """Return total, aleatoric and epistemic uncertainty on a last axis, (B, ..., 3), in float32 or wider.

    They are entropies in nats, of a regression variances; NaN where a regression's noise is not known.
    """
    if not get_likelihood(predictive.problem_type).has_noise:
        parts = predictive.predictive_entropy, predictive.expected_entropy, predictive.mutual_information
        return torch.stack(parts, dim=-1)
    epistemic = wide(predictive.epistemic_variance)
    try:
        aleatoric = predictive.aleatoric_variance.to(epistemic)
    except ValueError:  # its noise is not known
        aleatoric = torch.full_like(epistemic, torch.nan)
    return torch.stack([epistemic + aleatoric, aleatoric, epistemic], dim=-1)


def result_of(parts: Tensor | Sequence[float]) -> dict[str, float | None]:
    """Return a result's ``uncertainty``; None for what is not known.

    >>> result_of([0.75, 0.5, 0.25])
    {'total': 0.75, 'aleatoric': 0.5, 'epistemic': 0.25}
    """
    values = parts.tolist() if isinstance(parts, Tensor) else [float(part) for part in parts]
    return {name: None if value != value else value for name, value in zip(PARTS, values, strict=True)}


def heads_of(mapping: Mapping[str, Any]) -> frozenset[str]:
    """Return the names of the classes that a table of transformers' Auto classes holds."""
    entries = [entry if isinstance(entry, (tuple, list)) else (entry,) for entry in mapping.values()]
    return frozenset(name for names in entries for name in names)


def check_head(model: nn.Module, heads: frozenset[str], task: str) -> None:
    """Check that a model of transformers has the head of a task; another library's model is taken at its word.

    Args:
        model: the model, adapters around it included.
        heads: names of transformers' classes that have the head; empty: any.
        task: the name of the task, for the error.

    Raises:
        ValueError: it has another head, of which the pipeline would make wrong results.
    """
    inner = unwrapped(model)
    known = {kind.__name__ for kind in type(inner).__mro__ if kind.__module__.startswith("transformers.")}
    is_transformers = type(inner).__module__.startswith("transformers.")
    if heads and is_transformers and not known & heads:
        raise ValueError(
            f"`model` of {task!r} must have that task's head, got {type(inner).__name__}: load it with the Auto class "
            "of the task, or name the task of its head."
        )


def _check_how(num_samples: int, method: str | None, seed: int) -> None:
    check_count("num_samples", num_samples, 1)
    check_draw(0, seed)
    if method is not None and method not in METHODS:
        raise ValueError(f"`method` must be one of {METHODS} or None, got {method!r}.")


def _check_policy(
    policy: AbstentionPolicy | None,
    posterior: Posterior,
    num_samples: int,
    method: str | None,
    scores_are_of: str | None,
) -> None:
    """Raise ValueError where a policy promises nothing for the predictions that are asked for."""
    if policy is None:
        return
    reason = "it was fitted to other weights than the model has" if _has_moved(policy, posterior) else None
    reason = reason or mismatch(policy, posterior, method, num_samples)
    if policy.groups is not None and policy.group_by != PREDICTED:
        reason = f"it has a threshold for each {policy.group_by or 'group'}, which no pipeline knows"
    if scores_are_of is not None and policy.posterior is not None:
        reason = f"it was calibrated on what the head predicts, and the pipeline's scores are of {scores_are_of}"
    if reason is not None:
        raise ValueError(
            f"`abstention` promises nothing here: {reason}. Fit a policy for these predictions, or pass "
            "`abstention=False` and ask the policy yourself."
        )


def _has_moved(policy: AbstentionPolicy, posterior: Posterior) -> bool:
    return policy.weights is not None and policy.weights != weights_digest(posterior.model)


def _lock_of(tokenizer: Any) -> Any:
    """Of a tokenizer, which several pipelines may share."""
    return _UNLOCKED if tokenizer is None else _locks.setdefault(tokenizer, threading.RLock())


def _one_by_one(made: Iterator[Any], lock: Any) -> Iterator[Any]:
    """The items of a generator, each made under the lock, which nobody holds in between."""
    following: Callable[[], Any] = made.__next__
    while True:
        with lock:
            try:
                item = following()
            except StopIteration:
                return
        yield item
