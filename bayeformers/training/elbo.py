r"""The ELBO's scale: how many items there are (N), what one micro-batch contributes, and the KL's warm-up.

For every optimizer step, over the group G of all micro-batches i on all W ranks r, with n_G items in total,

    loss(r, i) = W * s(r, i) / n_G  +  kl_weight * KL / (N * k_r)

where s(r, i) is the *sum* of the items' NLL and k_r the rank's number of micro-batches. Accumulation sums over i and
DistributedDataParallel averages over r, so the gradient is that of

    mean NLL over G  +  (kl_weight / N) * KL

for any batch size, accumulation and number of processes, partial last batches included.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Subset
from transformers.trainer_utils import has_length

from ..likelihoods import ProblemType, get_likelihood
from ..sampling.random_state import preserved as preserved_rng
from .items import IGNORED, count_items

__all__ = [
    "Group",
    "count_label_column",
    "count_training_items",
    "elbo_loss",
    "infer_num_items",
    "kl_warmup",
    "preserved_rng",
]

_LABEL_COLUMNS = ("labels", "label", "label_ids")  # what transformers' collators make "labels" of


@dataclass(frozen=True)
class Group:
    """One optimizer step's micro-batches.

    Attributes:
        num_items: n_G, items over all ranks; a 0-dimensional tensor.
        num_batches: k, on this rank.
        world_size: W.
    """

    num_items: Tensor
    num_batches: int
    world_size: int = 1


def elbo_loss(nll_sum: Tensor, group: Group, kl_term: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
    """Return this micro-batch's (W * s / n_G, kl_term / k); the loss is their sum.

    Args:
        nll_sum: s, summed NLL of the micro-batch's items.
        group: of its optimizer step.
        kl_term: kl_weight * KL / N.

    >>> group = Group(torch.tensor(8), num_batches=2)
    >>> nll, kl = elbo_loss(torch.tensor(4.0), group, kl_term=1.0)
    >>> float(nll), float(kl)
    (0.5, 0.5)
    """
    nll = nll_sum * group.world_size / group.num_items.clamp_min(1)
    return nll, torch.as_tensor(kl_term, device=nll.device) / group.num_batches


def kl_warmup(step: int, max_steps: int, ratio: float) -> float:
    """Return the KL's share at an optimizer step (from 0): min(1, step / (ratio * max_steps)); 1 without warm-up.

    Args:
        step: the optimizer step.
        max_steps: of the training.
        ratio: the warm-up's share of them.

    >>> [kl_warmup(step, max_steps=10, ratio=0.4) for step in (0, 2, 4, 9)]
    [0.0, 0.5, 1.0, 1.0]
    """
    warmup_steps = math.ceil(ratio * max_steps)
    return 1.0 if warmup_steps == 0 else min(1.0, step / warmup_steps)


def count_training_items(
    dataset: Any,
    collate: Callable[[list[Any]], Mapping[str, Any]],
    problem_type: ProblemType,
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
) -> int:
    """Return this rank's share of N, counted over every ``world_size``-th collated example; their sum is N.

    With random masks the count of one pass stands for the expected count (its relative error is below 1/sqrt(N)).
    The global generators are left untouched.

    Args:
        dataset: of known length.
        collate: from examples to a batch with labels.
        problem_type: what the head predicts.
        batch_size: of the examples that are collated at once.
        rank: of this process.
        world_size: number of processes.
    """
    share = Subset(dataset, range(rank, len(dataset), world_size))
    generator = torch.Generator().manual_seed(rank)  # else the DataLoader draws its seed from the global one
    loader = DataLoader(share, batch_size=batch_size, collate_fn=collate, generator=generator)
    with preserved_rng():
        return int(sum(int(count_items(batch, problem_type)) for batch in loader))


def count_label_column(dataset: Any, names: Iterable[str] = ()) -> int | None:
    """Return the number of labels other than -100 in the column of a `datasets.Dataset`, making no row; else None.

    ``names``: what the column may be called besides. A transform or a collator that takes labels away is not seen.
    """
    columns = set(getattr(dataset, "column_names", None) or ())
    found = [name for name in dict.fromkeys((*names, *_LABEL_COLUMNS)) if name in columns]
    if len(found) != 1 or not hasattr(dataset, "with_format"):
        return None
    column = np.asarray(dataset.with_format("numpy")[found[0]][:])
    is_class_per_row = column.dtype.kind in "iub" and column.size == len(dataset)
    return int((column != IGNORED).sum()) if is_class_per_row else None


def infer_num_items(
    dataset: Any,
    problem_type: ProblemType,
    count: Callable[[], int],
    given: int | None = None,
) -> int:
    """N: ``given``, else the number of examples, or of labels where an example may have none or many.

    Args:
        dataset: the training data; a stream of known length is counted by its length, but for a loss per token.
        problem_type: what the head predicts.
        count: counts the labels.
        given: N, if it is known.

    Returns:
        N.

    Raises:
        ValueError: a dataset that is missing, empty, without a length or without any label, and no ``given``.

    >>> infer_num_items([0] * 7, "regression", count=lambda: 0)
    7
    """
    if given is not None:
        return given
    if dataset is None:
        raise ValueError("`num_training_items` must be given where there is no `train_dataset` to count.")
    is_stream, likelihood = isinstance(dataset, IterableDataset), get_likelihood(problem_type)
    if not has_length(dataset) or (likelihood.has_many_items and is_stream):
        raise ValueError(
            "`num_training_items` must be given: `train_dataset` is an IterableDataset, whose N (examples, or label "
            "tokens of a per-token loss) cannot be counted, and the ELBO's KL is weighted by 1/N."
        )
    if len(dataset) == 0:
        raise ValueError("`train_dataset` is empty.")
    counted = count() if likelihood.may_be_unlabelled and not is_stream else len(dataset)
    if counted == 0:
        raise ValueError("`train_dataset` has no label to learn from: every one is -100, or outside its text.")
    return counted
