"""Ways to the covariance S = J Sigma J^T of the linearised network's outputs, and how each uses the captures.

| method | covariance |
| --- | --- |
| ``glm`` | S, exactly |
| ``mc_glm`` | (1/K) sum_k (J eta_k)(J eta_k)^T, eta_k ~ N(0, Sigma): unbiased, rank K |
| ``one_glm`` | the same with K = 1; the trace's relative standard deviation is sqrt(2 / effective rank) or more |
| ``lr_glm`` | from K eigen-directions v_k: a bound below S (the K largest variances) or above it (the K smallest) |
| ``e_glm`` | V_k (J v_k)(J v_k)^T of one eigen-direction |

Directions are those of all blocks together, in the order of their posterior variance V_k = 1 / (lambda_k + tau); what
has no variance, such as the padding row of a table, is not among them. After Lee et al. 2020 (INF, arXiv 2006.11631).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from ..checks import is_real, is_whole
from .blocks import GaussianBlock, block_draw
from .captured import Captured, Statistic, covariance
from .kinds import Gaussian

Method = Literal["sample", "nn", "glm", "mc_glm", "one_glm", "lr_glm", "e_glm"]
Bound = Literal["lower", "upper"]
METHODS: tuple[str, ...] = get_args(Method)
SAMPLING: tuple[str, ...] = ("sample", "nn")
"""Two names of one method: the network itself under draws of its weights."""

Directions = Mapping[str, Tensor]
"""By block name: flat indices into its (K, d_out, d_in') coordinates."""


def statistic(
    method: str,
    blocks: Sequence[GaussianBlock],
    *,
    num_samples: int,
    seed: int,
    bound: Bound,
    direction: int | float,
    cache_bytes: int = 0,
) -> Statistic:
    """What `linearize` computes for a method.

    Args:
        method: "glm", "mc_glm", "one_glm", "lr_glm" or "e_glm".
        blocks: the posterior.
        num_samples: of "mc_glm" the draws, of "lr_glm" the directions.
        seed: of the draws.
        bound: of "lr_glm".
        direction: of "e_glm".
        cache_bytes: memory in which it may keep draws, from one token position or batch to the next.

    Returns:
        From captures to (1, B, C, C).

    Raises:
        ValueError: ``method``, ``bound`` or ``direction`` is not one of those allowed.
    """
    if method == "glm":
        return covariance
    if method in ("mc_glm", "one_glm"):
        return _monte_carlo(_Draws(seed, cache_bytes), 1 if method == "one_glm" else num_samples)
    if method == "e_glm":
        return _directions(select(blocks, *ranks(blocks, direction)))
    if method == "lr_glm":
        if bound not in get_args(Bound):
            raise ValueError(f"`bound` must be one of {get_args(Bound)}, got {bound!r}.")
        count = min(num_samples, num_directions(blocks))
        chosen = select(blocks, 0, count) if bound == "lower" else select(blocks, -count, None)
        return _directions(chosen, is_upper=bound == "upper")
    raise ValueError(f"`method` must be one of {METHODS}, got {method!r}.")


def select(blocks: Sequence[GaussianBlock], start: int, stop: int | None) -> Directions:
    """Return directions start .. stop of all blocks' in falling order of variance, by block.

    Args:
        blocks: the posterior, one Gaussian per layer.
        start: the rank of the first direction, 0 the most uncertain; a negative one counts from the end.
        stop: the rank after the last, likewise; None: to the end.
    """
    of_block = [block.variances()[0].flatten() for block in blocks]
    values = torch.cat(of_block)
    first, last, _ = slice(start, stop).indices(int(values.count_nonzero()))  # those without variance come last
    chosen = _leading(values, last) & ~_leading(values, first)
    parts = zip(blocks, torch.split(chosen, [len(variances) for variances in of_block]), strict=True)
    return {block.name: part.nonzero().squeeze(1) for block, part in parts if bool(part.any())}


def _leading(values: Tensor, count: int) -> Tensor:
    """Which are the ``count`` largest; of equal ones the first, so that directions of different ranks differ."""
    if count == 0:
        return torch.zeros_like(values, dtype=torch.bool)
    threshold = values.kthvalue(len(values) - count + 1).values
    chosen, ties = values > threshold, (values == threshold).nonzero().squeeze(1)
    chosen[ties[: count - int(chosen.sum())]] = True
    return chosen


class _Draws:
    """Deviations of blocks by draw; the first ones asked for stay in memory while they fit."""

    def __init__(self, seed: int, cache_bytes: int) -> None:
        self.seed, self.free = seed, cache_bytes
        self._kept: dict[tuple[str, int], Tensor] = {}

    def of(self, block: Gaussian, index: int, like: Tensor) -> Tensor:
        """On the device and in the dtype of ``like``: a posterior's model may have been moved since."""
        key = (block.name, index)
        drawn = self._kept[key] if key in self._kept else block_draw(block, index, self.seed)
        if key not in self._kept and drawn.nbytes <= self.free:
            self._kept[key] = drawn
            self.free -= drawn.nbytes
        return drawn.to(like)


def _monte_carlo(draws: _Draws, num_samples: int) -> Statistic:
    """Every example is met by the same draws, whatever its batch."""

    def estimate(captured: Sequence[Captured]) -> Tensor:
        products = []
        for k in range(num_samples):
            parts = [part.products(draws.of(part.block, k, part.gradients)) for part in captured]
            products.append(torch.stack(parts).sum(0))
        stacked = torch.stack(products, dim=-1)  # (B, C, K)
        return (torch.bmm(stacked, stacked.mT) / num_samples).unsqueeze(0)

    return estimate


def _directions(directions: Directions, *, is_upper: bool = False) -> Statistic:
    """Sum of V_k (J v_k)(J v_k)^T over the given directions k, or with ``is_upper`` a bound from above."""
    # from above every direction has its block's prior variance, but for those given, which have their own:
    # ceil J J^T - sum_k (ceil - V_k)(J v_k)(J v_k)^T >= S, with ceil = 1/tau, or the block's largest V without a tau

    def estimate(captured: Sequence[Captured]) -> Tensor:
        gradients = captured[0].gradients
        total = gradients.new_zeros(1, gradients.shape[1], gradients.shape[2], gradients.shape[2])
        for part in captured:
            if part.block.name not in directions and not is_upper:
                continue
            variances, ceiling = part.block.variances()[0].flatten(), gradients.new_zeros(())
            if is_upper:
                prior = part.block.prior_variances()
                ceiling = variances.max() if prior is None else prior[0]
                total = total + ceiling * part.gram()
            if part.block.name in directions:
                chosen = directions[part.block.name].to(variances.device)
                products = part.selected(chosen)  # (B, C, m)
                total = total + torch.bmm(products * (variances[chosen] - ceiling), products.mT).unsqueeze(0)
        return total

    return estimate


def ranks(blocks: Sequence[GaussianBlock], direction: int | float) -> tuple[int, int]:
    """What `select` takes for a rank, or for a quantile: 0.0 the most, 1.0 the least uncertain.

    Args:
        blocks: the posterior.
        direction: a rank as an int, negative from the end, or a quantile as a float.

    Returns:
        The rank and the next one.

    Raises:
        ValueError: ``direction`` is no such number.
    """
    total = num_directions(blocks)
    is_quantile = is_real(direction) and not is_whole(direction)
    if not is_real(direction) or (is_quantile and not 0 <= direction <= 1) or not -total <= direction < total:
        raise ValueError(
            f"`direction` must be a rank (int, 0..{total - 1}, or negative from the end) or a quantile "
            f"(float, 0.0..1.0), got {direction!r}."
        )
    rank = round(direction * (total - 1)) if is_quantile else int(direction) % total
    return rank, rank + 1


def num_directions(blocks: Sequence[GaussianBlock]) -> int:
    """How many eigen-directions have a variance."""
    return sum(int(block.variances()[0].count_nonzero()) for block in blocks)
