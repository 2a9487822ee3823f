"""Bayesian `torch.nn.Embedding` and `torch.nn.EmbeddingBag`: only the rows that are looked up are drawn."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..distributions import Prior
from ..sampling import batched
from .base import DEFAULT_DELTA, DEFAULT_PRIOR, BayesianModule
from .estimators import REPARAMETERIZATION, Layout
from .variational import Variational

_TABLE = Layout(transposed=True)  # a bag's counts meet the table's rows


class _Table(BayesianModule):
    """A lookup table, whose noise is addressable by row."""

    by_row = True

    @classmethod
    def refusal(cls, module: torch.nn.Module) -> str | None:
        """Lookup options that a random table cannot honour."""
        used = [name for name in ("max_norm", "sparse", "scale_grad_by_freq") if getattr(module, name, None)]
        if used:
            return f"{type(module).__name__} with {', '.join(used)} is not supported"
        return super().refusal(module)


class Embedding(_Table, torch.nn.Embedding):
    """`torch.nn.Embedding` with weights N(weight, scale^2): random in `train()`, the mean in `eval()`.

    A row has one value per draw, at every position and in every batch; the row of ``padding_idx`` has no noise. Local
    reparameterization is plain reparameterization here.

    Args:
        num_embeddings, embedding_dim, padding_idx, device, dtype: as in `torch.nn.Embedding`; its other options
            (``max_norm``, ``sparse``, ``scale_grad_by_freq``) have no meaning for a random table and are refused.
        prior, delta, estimator: as in :class:`BayesianModule`.

    Shape: ids (*) -> (*, embedding_dim).

    >>> table = Embedding(10, 4, padding_idx=0).train()
    >>> a, b = table(torch.tensor([3, 3]))
    >>> bool((a == b).all())
    True
    """

    torch_class = torch.nn.Embedding

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        device: Any = None,
        dtype: Any = None,
        prior: Prior = DEFAULT_PRIOR,
        delta: float = DEFAULT_DELTA,
        estimator: str = "reparameterization",
    ) -> None:
        super().__init__(
            num_embeddings,
            embedding_dim,
            padding_idx,
            device=device,
            dtype=dtype,
            prior=prior,
            delta=delta,
            estimator=estimator,
        )

    def forward(self, input: Tensor) -> Tensor:
        """Look the ids up in the mean, the held draw or a fresh draw."""
        if not self.is_random:
            return super().forward(input)
        return self.active_estimator.lookup(input, self.variational("weight"))


class EmbeddingBag(_Table, torch.nn.EmbeddingBag):
    """`torch.nn.EmbeddingBag` with weights N(weight, scale^2): random in `train()`, the mean in `eval()`.

    A row has one value per draw; the row of ``padding_idx`` has no noise and no part in any bag. Sums and means are
    linear in the table, y = C W with C_br the weight of row r in bag b, and take every estimator; a bag is an example.

    Args:
        num_embeddings, embedding_dim, mode, include_last_offset, padding_idx, device, dtype: as in
            `torch.nn.EmbeddingBag`; its other options (``max_norm``, ``sparse``, ``scale_grad_by_freq``) have no
            meaning for a random table and are refused.
        prior, delta, estimator: as in :class:`BayesianModule`; ``mode="max"`` is not linear and always takes
            "reparameterization".

    Shape: ids (B, n), or (n,) with offsets (B,), -> (B, embedding_dim).

    >>> bags = EmbeddingBag(10, 4, mode="sum").train()
    >>> bags(torch.tensor([1, 2, 4, 5, 4]), torch.tensor([0, 3])).shape
    torch.Size([2, 4])
    """

    torch_class = torch.nn.EmbeddingBag

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        mode: str = "mean",
        include_last_offset: bool = False,
        padding_idx: int | None = None,
        device: Any = None,
        dtype: Any = None,
        prior: Prior = DEFAULT_PRIOR,
        delta: float = DEFAULT_DELTA,
        estimator: str = "reparameterization",
    ) -> None:
        if mode not in ("sum", "mean", "max"):
            raise ValueError(f"`mode` must be 'sum', 'mean' or 'max', got {mode!r}.")
        super().__init__(
            num_embeddings,
            embedding_dim,
            mode=mode,
            include_last_offset=include_last_offset,
            padding_idx=padding_idx,
            device=device,
            dtype=dtype,
            prior=prior,
            delta=delta,
            estimator=estimator,
        )

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        """Return the bags' sums, means or maxima of the mean's, the held draw's or a fresh draw's rows.

        Ids, offsets or weights that torch refuses, such as a mean with ``per_sample_weights``, raise ValueError.

        Args:
            input: ids (B, n), or (n,) with ``offsets``.
            offsets: places (B,) of the bags' first ids.
            per_sample_weights: weight of each id in its bag, in the shape of ``input``.

        Raises:
            TypeError: nested tensors.
        """
        if not self.is_random:
            return super().forward(input, offsets, per_sample_weights)
        if input.is_nested:
            raise TypeError("`input` is a nested tensor, which a random table does not take: give ids and `offsets`.")
        weight = self.variational("weight")
        if self.mode == "max" or self.active_estimator is REPARAMETERIZATION:
            return self._reduced(input, offsets, per_sample_weights, weight)
        counts, rows = self._counts(input, offsets, per_sample_weights)
        return self.active_estimator.affine(_product, (counts,), weight.rows(rows), None, _TABLE)

    def _reduced(
        self, input: Tensor, offsets: Tensor | None, per_sample_weights: Tensor | None, weight: Variational
    ) -> Tensor:
        """Torch's own reduction over the rows of the active draw."""
        if torch.compiler.is_compiling():  # it cannot trace the data-dependent shape of `unique`
            ids, table, padding_idx = input, weight.sample(), self.padding_idx
        else:
            ids, rows, padding_idx = self._renumbered(input)
            table = weight.sample_rows(rows)
            offsets = None if offsets is None else offsets.to(ids.dtype)
        return F.embedding_bag(
            ids,
            table,
            offsets,
            mode=self.mode,
            per_sample_weights=per_sample_weights,
            include_last_offset=self.include_last_offset,
            padding_idx=padding_idx,
        )

    def _renumbered(self, input: Tensor) -> tuple[Tensor, Tensor, int | None]:
        """Ids as places among the distinct rows that occur, these rows (u,), and the place of the padding row."""
        if self.padding_idx is None:
            rows, places = torch.unique(input, return_inverse=True)
            return places, rows, None
        rows, places = torch.unique(F.pad(input.flatten(), (0, 1), value=self.padding_idx), return_inverse=True)
        return places[:-1].reshape(input.shape), rows, int(places[-1])

    def _counts(
        self, input: Tensor, offsets: Tensor | None, per_sample_weights: Tensor | None
    ) -> tuple[Tensor, Tensor | slice]:
        """C (B, u), the weight of each distinct row in each bag, and these rows; all rows while compiling."""
        bags, size = self._bags(input, offsets)
        if per_sample_weights is None:
            mean = self.get_parameter("weight")
            weights = torch.ones(input.numel(), dtype=mean.dtype, device=mean.device)
        elif self.mode == "sum" and per_sample_weights.shape == input.shape:
            weights = per_sample_weights.flatten()
        else:
            raise ValueError(
                "`per_sample_weights` needs mode='sum' and the shape of `input`, got "
                f"mode={self.mode!r}, {tuple(per_sample_weights.shape)} and {tuple(input.shape)}."
            )
        if self.padding_idx is not None:
            weights = weights.masked_fill(input.flatten() == self.padding_idx, 0.0)
        if torch.compiler.is_compiling():
            places, rows = input, None
        else:
            places, rows, _ = self._renumbered(input)
        width = self.num_embeddings if rows is None else len(rows)
        counts = weights.new_zeros(size, width).index_put((bags, places.flatten()), weights, accumulate=True)
        if self.mode == "mean":
            counts = counts / counts.sum(1, keepdim=True).clamp_min(1)
        return counts, slice(None) if rows is None else rows

    def _bags(self, input: Tensor, offsets: Tensor | None) -> tuple[Tensor, int]:
        """The bag of each id, (n,), and the number of bags."""
        if input.dim() == 2 and offsets is None:
            numbers = torch.arange(len(input), device=input.device)
            return numbers.repeat_interleave(input.shape[1]), len(input)
        if input.dim() != 1 or offsets is None or offsets.dim() != 1:
            raise ValueError(
                "`input` must be (B, n) without `offsets`, or (n,) with `offsets` (B,), got "
                f"{tuple(input.shape)} and {None if offsets is None else tuple(offsets.shape)}."
            )
        if not torch.compiler.is_compiling() and len(offsets):
            self._check(offsets, len(input))
        places = torch.arange(len(input), device=input.device)
        starts = (offsets[:-1] if self.include_last_offset else offsets).contiguous()
        return torch.searchsorted(starts, places.to(starts.dtype), right=True) - 1, len(starts)

    def _check(self, offsets: Tensor, size: int) -> None:
        if int(offsets[0]) != 0:
            raise ValueError(f"`offsets` must begin with 0, the place of the first id, got {int(offsets[0])}.")
        if self.include_last_offset and int(offsets[-1]) != size:  # torch's kernels differ in what they do then
            raise ValueError(f"`offsets` must end with {size}, the number of ids, got {int(offsets[-1])}.")


def _product(counts: Tensor, table: Tensor, bias: None) -> Tensor:
    return counts @ table


batched.register_batched(Embedding, batched.embedding)
