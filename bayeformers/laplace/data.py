"""Batches as curvature needs them: inputs for the forward, labels, which positions count, no padding duplicates."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler

from ..jacobians import Inputs, batch_size, examples
from ..posteriors.base import without_labels
from ..predictive import IGNORED, ProblemType, resolve_problem_type, unwrapped
from .hessian import Likelihood

_LIKELIHOODS: dict[str, Likelihood] = {
    "single_label_classification": "classification",
    "multi_label_classification": "multilabel",
    "regression": "regression",
    "token_classification": "classification",
    "causal_lm": "classification",
    "seq2seq_lm": "classification",
    "unknown": "classification",
}


@dataclass(frozen=True, eq=False)
class Batch:
    """One batch.

    Attributes:
        inputs: what the model's forward takes, without labels.
        labels: aligned with the outputs, or None.
        attended: the attention mask (B, T) as bool, or None.
        has_padding: whether positions may be padding.
        numbers: where the examples stand in their dataset, if that is known.
    """

    inputs: Inputs
    labels: Tensor | None = None
    attended: Tensor | None = None
    has_padding: bool = False
    numbers: Sequence[int] | None = None

    def __len__(self) -> int:
        return batch_size(self.inputs)

    def examples(self) -> Iterator[Batch]:
        """The same as batches of one."""
        for i, inputs in enumerate(examples(self.inputs, len(self))):
            labels, attended = (None if part is None else part[i : i + 1] for part in (self.labels, self.attended))
            yield Batch(inputs, labels, attended, self.has_padding)


def likelihood_of(model: nn.Module, labels: Tensor | None = None) -> Likelihood:
    """The likelihood of the model's head; classification for a model that transformers does not know.

    ``labels``: of a batch; they tell single from multi label where the configuration does not.

    Raises:
        ValueError: a head whose labels are positions.
    """
    problem = resolve_problem_type(model, labels)
    if problem not in _LIKELIHOODS:
        raise ValueError(f"There is no Laplace posterior for a {problem!r} head yet; `to_bayesian` supports it.")
    return _LIKELIHOODS[problem]


def prepare(model: nn.Module, batch: Any, device: torch.device, keep: int | None = None) -> Batch:
    """A batch of a DataLoader as a `Batch` on a device: a mapping with labels inside, (inputs, labels), or inputs.

    ``keep``: number of leading examples that are no padding duplicates.

    Raises:
        TypeError: a batch of another kind.
    """
    given, labels = _split(batch)
    if keep is not None and keep < batch_size(given):
        given, labels = _first(given, keep), None if labels is None else labels[:keep]
    given = {k: _moved(v, device) for k, v in given.items()} if isinstance(given, Mapping) else given.to(device)
    labels = None if labels is None else labels.to(device)
    inputs = without_labels(
        model, given if isinstance(given, Tensor) or labels is None else {**given, "labels": labels}
    )
    problem = resolve_problem_type(model, labels)
    is_padded = isinstance(inputs, Mapping) and any("mask" in name for name in inputs)
    return Batch(inputs, _aligned(labels, problem), _attended(model, inputs), has_padding=is_padded)


def real_examples(loader: Iterable[Any], number: int, length: int) -> int | None:
    """How many examples of batch ``number`` (of ``length``) are no duplicates; None: all.

    Two samplers repeat examples so that every process has as many: torch's DistributedSampler, at the end, and that of
    a loader that accelerate prepared, in its last round.
    """
    sampler = getattr(loader, "sampler", None)
    if isinstance(loader, DataLoader) and isinstance(sampler, DistributedSampler) and not sampler.drop_last:
        size, start = len(sampler.dataset), number * (loader.batch_size or 1)  # type: ignore[arg-type]
        return sum(sampler.rank + (start + i) * sampler.num_replicas < size for i in range(length))
    remainder = getattr(loader, "remainder", -1) if getattr(loader, "end_of_dataloader", False) else -1
    if remainder is not None and remainder > 0 and torch.distributed.is_initialized():
        first = torch.distributed.get_rank() * length
        return max(0, min(length, remainder - first))
    return None


def _split(batch: Any) -> tuple[Any, Tensor | None]:
    if isinstance(batch, Tensor):
        return batch, None
    if isinstance(batch, Mapping):
        labels = next((batch[name] for name in ("labels", "label") if batch.get(name) is not None), None)
        return {k: v for k, v in batch.items() if k not in ("labels", "label")}, labels
    if isinstance(batch, list | tuple) and len(batch) in (1, 2) and isinstance(batch[0], Tensor | Mapping):
        inputs, inside = _split(batch[0])
        return inputs, batch[1] if len(batch) == 2 else inside
    raise TypeError(f"`dataloader` must give mappings, (inputs, labels) pairs or tensors, got {type(batch).__name__}.")


def _first(inputs: Inputs, count: int) -> Inputs:
    if isinstance(inputs, Tensor):
        return inputs[:count]
    size = batch_size(inputs)
    return {k: v[:count] if isinstance(v, Tensor) and v.ndim and len(v) == size else v for k, v in inputs.items()}


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def _aligned(labels: Tensor | None, problem: ProblemType) -> Tensor | None:
    """Position t of a causal language model is scored on label t + 1."""
    if labels is None or problem != "causal_lm":
        return labels
    return torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORED)], dim=1)


def _attended(model: nn.Module, inputs: Inputs) -> Tensor | None:
    """None also for an encoder-decoder: its two sequences may be equally long, and which is meant cannot be seen."""
    if isinstance(inputs, Tensor) or getattr(getattr(unwrapped(model), "config", None), "is_encoder_decoder", False):
        return None
    mask = inputs.get("attention_mask")
    return mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None
