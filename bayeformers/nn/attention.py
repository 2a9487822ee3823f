"""Bayesian `torch.nn.MultiheadAttention`, with all of its tensors: projections, biases, the extra key and value."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import BayesianModule
from .estimators import REPARAMETERIZATION
from .parameters import random_class
from .variational import Variational


class MultiheadAttention(BayesianModule, torch.nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` with Gaussian weights: random in `train()`, the mean in `eval()`.

    With "reparameterization", and for every held draw, torch's own function gets the drawn tensors. The other
    estimators act on the projections, per example of the batch; ``bias_k`` and ``bias_v``, which meet no input, are
    then drawn once for the batch. The child ``out_proj``, which torch never calls, owns its draw as
    :class:`RandomParameters`; the estimator of the attention is its estimator too.

    Its arguments are those of `torch.nn.MultiheadAttention`, and those of :class:`BayesianModule`.

    Shape: query (N, L, E), key (N, S, kdim), value (N, S, vdim) -> (N, L, E), and weights (N, L, S) or None; with
    ``batch_first=False`` the first two axes of inputs and output are swapped; without N unbatched.

    >>> layer = MultiheadAttention(8, 2, batch_first=True).train()
    >>> output, weights = layer(x := torch.ones(3, 5, 8), x, x)
    >>> output.shape, weights.shape
    (torch.Size([3, 5, 8]), torch.Size([3, 5, 5]))
    """

    torch_class = torch.nn.MultiheadAttention
    bayesian_parameters = (
        "in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias", "bias_k", "bias_v",
    )  # fmt: skip

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        output: Any = self.out_proj
        output.__class__ = random_class(type(output), ("weight", "bias") if output.bias is not None else ("weight",))  # type: ignore[arg-type]
        output.become_bayesian(prior=self.prior, delta=self.delta, estimator=self.estimator.name)

    @classmethod
    def names_of(cls, module: torch.nn.Module) -> tuple[str, ...]:
        """Those of ``bayesian_parameters`` that the instance has; the first is a projection."""
        return tuple(name for name in cls.bayesian_parameters if getattr(module, name, None) is not None)

    def reset_parameters(self) -> None:
        """As :meth:`_reset_parameters`."""
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        """As the torch layer, and the scales with it."""
        super()._reset_parameters()
        for module in (self, self.out_proj):
            for name in getattr(module, "specs", ()):
                module.reset_rho(name)  # type: ignore[operator]

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return what the mean, the held draw or fresh noise attend to, and the attention weights if asked for.

        Masks of the wrong shape, or a causal hint without a mask, raise ValueError, masks of another type TypeError;
        torch's own function, which draws by reparameterization go through, RuntimeError or AssertionError. All is as in
        `torch.nn.MultiheadAttention`, here with T queries and S keys of B examples.

        Args:
            query: (T, B, embed_dim), (B, T, embed_dim) with ``batch_first``, or (T, embed_dim) of one example.
            key: (S, B, kdim), in the same order of axes.
            value: (S, B, vdim), in the same order of axes.
            key_padding_mask: (B, S), or (S,) of one example: True at keys that are left out, or numbers that are added
                to their scores.
            need_weights: whether the attention weights are returned; otherwise None is.
            attn_mask: (T, S), or (B * heads, T, S): True where a query may not attend, or numbers added to the scores.
            average_attn_weights: whether the weights are averaged over heads, (B, T, S), or not, (B, heads, T, S).
            is_causal: the hint that ``attn_mask`` is the causal one.
        """
        inputs = query, key, value
        options: dict[str, Any] = {
            "key_padding_mask": key_padding_mask,
            "attn_mask": attn_mask,
            "is_causal": is_causal,
            "need_weights": need_weights,
            "average_attn_weights": average_attn_weights,
        }
        if not (self.is_random or getattr(self.out_proj, "is_random", False)):
            return super().forward(*inputs, **options)
        if self.is_random and self.active_estimator is not REPARAMETERIZATION:
            return self._estimated(*inputs, **options)
        return self._sampled(*inputs, **options)

    def _sampled(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> tuple[Tensor, Tensor | None]:
        """Torch's own function of one network for the batch; never its fused kernel, which reads the Parameters."""
        swapped = self.batch_first and query.dim() == 3
        if swapped:
            query, key, value = _each(_swap, query, key, value)
        output, weights = F.multi_head_attention_forward(
            query,
            key,
            value,
            self.embed_dim,
            self.num_heads,
            _drawn(self, "in_proj_weight"),
            _drawn(self, "in_proj_bias"),
            _drawn(self, "bias_k"),
            _drawn(self, "bias_v"),
            self.add_zero_attn,
            self.dropout,
            _drawn(self.out_proj, "weight"),  # type: ignore[arg-type]
            _drawn(self.out_proj, "bias"),
            training=self.training,
            use_separate_proj_weight=self._parameters.get("in_proj_weight") is None,
            q_proj_weight=_drawn(self, "q_proj_weight"),
            k_proj_weight=_drawn(self, "k_proj_weight"),
            v_proj_weight=_drawn(self, "v_proj_weight"),
            **options,
        )
        return (_swap(output) if swapped else output), weights

    def _estimated(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool,
        need_weights: bool,
        average_attn_weights: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """The same arithmetic with the batch first, as an estimator needs it; one unbatched input is a batch of one."""
        batched = query.dim() == 3
        if not batched:
            query, key, value = _each(_as_batch, query, key, value)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = _each(_swap, query, key, value)
        is_hint = is_causal and key_padding_mask is None and not need_weights  # as torch: then the mask is not read
        if is_causal and attn_mask is None:
            raise ValueError("`is_causal` is a hint about `attn_mask` and needs it, got `attn_mask=None`.")
        shape = (query.shape[0], self.num_heads, query.shape[1], key.shape[1])
        q, k, v = self._projected(query, key, value)
        mask = _merged_mask(None if is_hint else attn_mask, key_padding_mask, shape, q.dtype)
        k, v, mask = self._extended(k, v, mask)
        heads, weights = _attend((q, k, v), mask, self.num_heads, self.dropout * self.training, need_weights, is_hint)
        output = self._output(heads)
        if weights is not None and average_attn_weights:
            weights = weights.mean(dim=1)
        if not batched:
            return output.squeeze(0), None if weights is None else weights.squeeze(0)
        return (output if self.batch_first else _swap(output)), weights

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return random q, k, v, of three tensors or of rows [0, E), [E, 2E), [2E, 3E) of one, under its draw.

        Equal inputs are projected together.
        """
        bias = self.maybe("in_proj_bias")
        width, end = self.embed_dim, 3 * self.embed_dim
        if self._parameters.get("in_proj_weight") is None:
            names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
            biases = [bias and bias.rows(slice(i * width, (i + 1) * width)) for i in range(3)]
            inputs = zip((query, key, value), names, biases, strict=True)
            q, k, v = (self._project(x, self.variational(name), part) for x, name, part in inputs)
            return q, k, v
        weight = self.variational("in_proj_weight")

        def project(x: Tensor, rows: slice) -> Tensor:
            return self._project(x, weight.rows(rows), bias and bias.rows(rows))

        if query is key and key is value:
            q, k, v = self._project(query, weight, bias).chunk(3, dim=-1)
        elif key is value:
            k, v = project(key, slice(width, end)).chunk(2, dim=-1)
            q = project(query, slice(0, width))
        else:
            parts = zip((query, key, value), range(0, end, width), strict=True)
            q, k, v = (project(x, slice(start, start + width)) for x, start in parts)
        return q, k, v

    def _project(self, x: Tensor, weight: Variational, bias: Variational | None) -> Tensor:
        return self.active_estimator.affine(F.linear, (x,), weight, bias)

    def _output(self, heads: Tensor) -> Tensor:
        """The random output projection, or a deterministic one."""
        layer = self.out_proj
        if not (isinstance(layer, BayesianModule) and layer.is_random):
            return F.linear(heads, layer.weight, layer.bias)
        return self._project(heads, layer.variational("weight"), layer.maybe("bias"))

    def _extended(self, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values with the extra ones, which no mask hides: ``bias_k``, ``bias_v``, then zeros."""
        extra = 0
        if self._parameters.get("bias_k") is not None:
            k, v = (
                torch.cat([x, self.variational(name).sample().to(x.dtype).expand(len(x), -1, -1)], dim=1)
                for x, name in ((k, "bias_k"), (v, "bias_v"))
            )
            extra += 1
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
            extra += 1
        return k, v, None if mask is None else F.pad(mask, (0, extra))


def _drawn(layer: torch.nn.Module, name: str) -> Tensor | None:
    """A tensor of ``layer`` under its active draw; the Parameter itself where it is not random."""
    if isinstance(layer, BayesianModule) and layer.is_random and name in layer.specs:
        return layer.variational(name).sample()
    value: Tensor | None = getattr(layer, name)
    return value


def _each(
    change: Callable[[Tensor], Tensor], query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """``change`` of each; inputs that were one tensor stay one, which tells that they are projected together."""
    changed = change(key)
    return (
        changed if query is key else change(query),
        changed,
        changed if value is key else change(value),
    )


def _swap(x: Tensor) -> Tensor:
    return x.transpose(0, 1)


def _as_batch(x: Tensor) -> Tensor:
    return x.unsqueeze(0)


def _attend(
    qkv: tuple[Tensor, ...], mask: Tensor | None, num_heads: int, dropout: float, need_weights: bool, is_causal: bool
) -> tuple[Tensor, Tensor | None]:
    """Return softmax(q k^T / sqrt(d) + mask) v per head, d = E / num_heads (Vaswani et al. 2017, arXiv 1706.03762).

    Shape: ``qkv`` (N, L, E) and twice (N, S, E), ``mask`` broadcastable to (N, H, L, S) -> (N, L, E), and the
    attention weights (N, H, L, S) if they are needed.
    """
    q, k, v = (x.reshape(*x.shape[:2], num_heads, -1).transpose(1, 2) for x in qkv)
    if not need_weights:
        heads = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal)
        return heads.transpose(1, 2).flatten(2), None
    scores = (q * math.sqrt(1 / q.shape[-1])) @ k.mT
    weights = F.softmax(scores if mask is None else scores + mask, dim=-1)
    weights = F.dropout(weights, dropout) if dropout > 0 else weights
    return (weights @ v).transpose(1, 2).flatten(2), weights


def _merged_mask(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, shape: tuple[int, int, int, int], dtype: torch.dtype
) -> Tensor | None:
    """Return both masks as one to add to the scores (N, H, L, S): 0 or -inf for Booleans, floats as they are.

    Raises:
        ValueError: a mask of another shape.
    """
    examples, heads, queries, keys = shape
    merged = None
    if attn_mask is not None:
        if attn_mask.shape not in ((queries, keys), (examples * heads, queries, keys)):
            raise ValueError(
                f"`attn_mask` must have the shape {(queries, keys)} or {(examples * heads, queries, keys)}, got "
                f"{tuple(attn_mask.shape)}."
            )
        merged = _additive(attn_mask, dtype)
        merged = merged.view(examples, heads, queries, keys) if merged.dim() == 3 else merged.view(1, 1, queries, keys)
    if key_padding_mask is not None:
        if key_padding_mask.shape != (examples, keys):
            raise ValueError(
                f"`key_padding_mask` must have the shape {(examples, keys)}, got {tuple(key_padding_mask.shape)}."
            )
        padding = _additive(key_padding_mask, dtype).view(examples, 1, 1, keys)
        merged = padding if merged is None else merged + padding
    return merged


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.is_floating_point():
        return mask.to(dtype)
    if mask.dtype != torch.bool:
        raise TypeError(f"Masks must be Boolean or floating point, got {mask.dtype}.")
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)
