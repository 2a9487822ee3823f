"""`acquire`: which rows of a pool to label next."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor, nn

from ..checks import check_choice, check_count
from ..likelihoods import get_likelihood
from ..posteriors import Posterior
from ..posteriors.predict import as_posterior
from ..predictive import Predictive
from . import gaussian, scores
from .batchbald import batchbald
from .draws import DrawMethod, are_joint, joint_predictive, noise_variance, number_of_draws
from .pool import Collator, Pool

__all__ = ["STRATEGIES", "Acquisition", "Strategy", "acquire"]

logger = logging.getLogger(__name__)

Strategy = Literal["bald", "power_bald", "batchbald", "epig", "entropy", "margin", "random"]
STRATEGIES: tuple[str, ...] = get_args(Strategy)

_EPISTEMIC = ("bald", "power_bald", "batchbald", "epig")
_JOINT = ("batchbald", "epig")
_MAX_TARGETS = 512
_MAX_BYTES = 2**30
"""Of the draws that "batchbald" keeps: of more rows those with the largest BALD scores."""


class Acquisition(NamedTuple):
    """What to label.

    Attributes:
        indices: the chosen rows of the pool, the most wanted first.
        scores: of these rows by the strategy, (n,) in float64; of "batchbald" what each adds to those before it; of
            "random" zeros.
    """

    indices: list[int]
    scores: Tensor


def acquire(
    posterior: Posterior | nn.Module,
    pool: Any,
    n: int,
    strategy: Strategy = "bald",
    *,
    targets: Any = None,
    num_samples: int = 32,
    method: DrawMethod | None = None,
    batch_size: int = 32,
    data_collator: Collator | None = None,
    num_configurations: int = 1024,
    seed: int = 0,
    progress: bool = True,
) -> Acquisition:
    """Choose the ``n`` rows of a pool whose labels are worth most.

    | strategy | wants the rows with | |
    | --- | --- | --- |
    | "bald" | largest I(y; w): what the label tells of the weights | Houlsby et al. 2011 |
    | "power_bald" | the same, drawn with probability proportional to it, without replacement | Kirsch et al. 2021 |
    | "batchbald" | largest I(y_1 .. y_n; w) together, greedily: no two rows that tell the same | Kirsch et al. 2019 |
    | "epig" | largest I(y; y*): what it tells of the labels of ``targets`` | Bickford Smith et al. 2023 |
    | "entropy" | largest H[y], noise of the labels included | |
    | "margin" | the smallest lead of the likeliest class | Scheffer et al. 2001 |
    | "random" | all alike | |

    Draw s is one network for all rows. Rows of equal score are taken in random order. A multi-label head's scores are
    summed over its labels, a token classifier's averaged over the tokens of a row; "batchbald" and "epig" are for heads
    with one class per row, and for regressions of one output.

    Args:
        posterior: a posterior, a converted model, or a model with a ``posterior`` attribute; it is not changed.
        pool: the rows, whose labels are ignored: a `datasets.Dataset`, a list of mappings or tensors, a mapping of
            tensors, or a tensor. Columns that the model's forward does not take are left out.
        n: how many rows, 1 .. length of the pool.
        strategy: see above.
        targets: of "epig": rows like those that will be predicted, in any form of ``pool``; None: rows of the pool. Of
            more than 512 a random 512 are taken.
        num_samples: draws S, >= 2 for strategies of information; a posterior with fewer gives those.
        method: "sample": the network at drawn weights; "linearized": the linearised network at these, of a Laplace
            posterior; None: as the posterior predicts by default.
        batch_size: rows per forward pass.
        data_collator: from a list of rows to a batch; None: transformers' default, for rows of one length.
        num_configurations: of "batchbald": up to so many configurations of the chosen rows' labels are enumerated, of
            more as many are sampled.
        seed: of the draws and of every other choice: the same seed chooses the same rows.
        progress: whether to show a bar.

    Returns:
        The rows' numbers, and their scores.

    Raises:
        TypeError: the pool is of another kind.
        ValueError: an argument is not one of these; the posterior has one draw, or draws that agree on every row, so
            that information ranks nothing; a score is not finite; a head that the strategy is not for.

    >>> from bayeformers import to_bayesian
    >>> model = to_bayesian(nn.Linear(4, 3), delta=0.5)
    >>> acquire(model, torch.randn(100, 4), 5, "batchbald", progress=False).scores.shape
    torch.Size([5])
    """
    check_choice("strategy", strategy, STRATEGIES)
    for name, value, least in (("n", n, 1), ("num_samples", num_samples, 1), ("batch_size", batch_size, 1)):
        check_count(name, value, least)
    check_count("num_configurations", num_configurations, 2)
    check_count("seed", seed, 0)
    if method is not None:
        check_choice("method", method, get_args(DrawMethod))
    if targets is not None and strategy != "epig":
        raise ValueError(f"`targets` are of `strategy`='epig', got {strategy!r}.")
    known = as_posterior(posterior)
    rows = Pool.of(known.model, pool, "pool", data_collator)
    if n > len(rows):
        raise ValueError(f"`n` must be at most the {len(rows)} rows of `pool`, got {n}.")
    generator = torch.Generator().manual_seed(seed)
    if strategy == "random":
        return Acquisition(torch.randperm(len(rows), generator=generator)[:n].tolist(), torch.zeros(n).double())
    _check_draws(known, strategy, num_samples)
    scorer = _Scorer(known, strategy, num_samples, method, batch_size, seed, progress)
    if strategy == "batchbald":
        return scorer.together(rows, n, num_configurations)
    if strategy == "epig":
        others = rows if targets is None else Pool.of(known.model, targets, "targets", data_collator)
        scorer.targets = scorer.kept(
            others.subset(torch.randperm(len(others), generator=generator)[:_MAX_TARGETS].tolist())
        )
    found = scorer.scores(rows)
    order = torch.randperm(len(found), generator=generator)  # of equal scores none is first by its place in the pool
    keys = found[order]
    if strategy == "power_bald":  # Gumbel's trick: the n largest are a sample without replacement
        noise = torch.rand(len(keys), generator=generator, dtype=torch.float64).clamp_min(1e-300)
        keys = keys.log() - (-noise.log()).log()
    best = order[keys.argsort(descending=True, stable=True)[:n]]
    return Acquisition(best.tolist(), found[best])


@dataclass
class _Scorer:
    """How rows are scored, batch by batch.

    Attributes:
        targets: draws of the targets of "epig": classes or values (S, T, ...), and a regression's noise (T,).
    """

    posterior: Posterior
    strategy: str
    num_samples: int
    method: DrawMethod | None
    batch_size: int
    seed: int
    progress: bool
    targets: tuple[Tensor, Tensor | None] | None = None

    def predictives(self, rows: Pool) -> Iterator[Predictive]:
        """Every batch under the same draws."""
        for batch in rows.batches(self.batch_size, self.strategy, self.progress):
            yield joint_predictive(
                self.posterior, batch, num_samples=self.num_samples, method=self.method, seed=self.seed
            )

    def scores(self, rows: Pool) -> Tensor:
        """One score per row, (N,), in float64."""
        found = torch.cat([self.of_batch(predictive).cpu() for predictive in self.predictives(rows)])
        _check_scores(found, self.strategy, len(rows))
        return found

    def of_batch(self, predictive: Predictive) -> Tensor:
        """One score per row of a batch."""
        _check_head(predictive, self.strategy)
        name = "bald" if self.strategy in ("power_bald", "batchbald") else self.strategy
        if get_likelihood(predictive.problem_type).has_noise:
            values, noise = cast(Tensor, predictive.values), noise_variance(predictive)
            if name == "epig" and self.targets is not None:
                return gaussian.gaussian_epig(values, noise, self.targets[0], cast(Tensor, self.targets[1]))
            return (gaussian.gaussian_bald if name == "bald" else gaussian.gaussian_entropy)(values, noise)
        log_probs = cast(Tensor, predictive.log_probs)
        if name == "epig" and self.targets is not None:
            return scores.epig(log_probs, self.targets[0])
        function = {"bald": scores.bald, "entropy": scores.entropy, "margin": scores.margin}[name]
        return _per_row(function(log_probs), predictive)

    def kept(self, rows: Pool) -> tuple[Tensor, Tensor | None]:
        """The draws of some rows, (S, N, ...), and a regression's noise, (N,)."""
        draws, noises = [], []
        for predictive in self.predictives(rows):
            _check_head(predictive, self.strategy)
            has_values = predictive.values is not None
            draws.append(cast(Tensor, predictive.values if has_values else predictive.log_probs))
            noises += [noise_variance(predictive)] if has_values else []
        return torch.cat(draws, dim=1), torch.cat(noises) if noises else None

    def together(self, rows: Pool, n: int, num_configurations: int) -> Acquisition:
        """Rows that are chosen jointly, of as many candidates as memory is meant for."""
        candidates, draws, noise, bounds = self._candidates(rows, n)
        _check_scores(bounds, self.strategy, len(rows))
        if noise is not None:
            chosen, gains = gaussian.gaussian_batchbald(draws, noise, n)
        else:
            chosen, gains = batchbald(draws, n, num_configurations=num_configurations, seed=self.seed)
        return Acquisition(candidates[chosen].tolist(), gains)

    def _candidates(self, rows: Pool, n: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """What a joint choice needs of the rows; where they are too many, of those with the largest BALD scores.

        A row's gain is never above its BALD score: those left out could win only late in a batch.

        Returns:
            Numbers (K,), draws (S, K, ...), a regression's noise (K,), and BALD scores (K,).
        """
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(self.seed))
        kept: list[Tensor] = []
        for number, predictive in enumerate(self.predictives(rows.subset(order.tolist()))):
            bounds = self.of_batch(predictive).cpu()
            has_values = predictive.values is not None
            draws = cast(Tensor, predictive.values if has_values else predictive.log_probs).cpu()
            noise = noise_variance(predictive).cpu() if has_values else torch.zeros(len(bounds))
            start = number * self.batch_size
            own = [order[start : start + len(bounds)], draws.movedim(1, 0), noise, bounds]
            kept = [torch.cat(pair) for pair in zip(kept, own, strict=True)] if kept else own
            most = max(n, _MAX_BYTES // max(1, kept[1][0].nbytes))
            if len(kept[3]) > most:
                best = kept[3].argsort(descending=True, stable=True)[:most]
                kept = [part[best] for part in kept]
        numbers, draws, noise, bounds = kept
        return numbers, draws.movedim(0, 1), noise if draws.dim() == 2 else None, bounds


def _per_row(values: Tensor, predictive: Predictive) -> Tensor:
    """Labels' information summed, tokens' averaged over those that count."""
    if values.dim() == 1:
        return values
    if get_likelihood(predictive.problem_type).is_bernoulli:
        return values.sum(1)
    mask = torch.ones_like(values, dtype=torch.bool) if predictive.mask is None else predictive.mask
    return (values * mask).sum(1) / mask.sum(1).clamp_min(1)


def _check_draws(posterior: Posterior, strategy: str, num_samples: int) -> None:
    if strategy in _EPISTEMIC and number_of_draws(posterior, num_samples) < 2:
        told = "`num_samples`=1" if num_samples == 1 else f"one draw of {type(posterior).__name__}"
        raise ValueError(
            f"`strategy`={strategy!r} needs draws that can disagree, got {told}: every score would be 0. Give a "
            "posterior (`to_bayesian`, `laplace.fit`, an ensemble) with 2 draws or more, or take 'entropy' or 'random'."
        )
    if strategy in _JOINT and not are_joint(posterior):
        raise ValueError(
            f"`strategy`={strategy!r} needs draws that are one network for all rows, got dropout with "
            "`masks`='element': use 'unit'."
        )


def _check_head(predictive: Predictive, strategy: str) -> None:
    likelihood, problem = get_likelihood(predictive.problem_type), predictive.problem_type
    if likelihood.has_noise:
        if strategy == "margin":
            raise ValueError("`strategy`='margin' needs classes, got a regression; use 'bald' or 'entropy'.")
        return
    shape = cast(Tensor, predictive.log_probs).shape
    is_one_class = len(shape) == 3 and not likelihood.is_bernoulli
    has_parts = problem in ("multi_label_classification", "token_classification")
    if not (is_one_class or (has_parts and strategy not in _JOINT)):
        allowed = "; use 'bald', 'entropy' or 'margin'" if has_parts else ""
        raise ValueError(f"`strategy`={strategy!r} needs one class per row, got a {problem!r} head{allowed}.")


def _check_scores(scores: Tensor, strategy: str, num_rows: int) -> None:
    """Raise ValueError for scores that are not finite, or that are 0 on every row."""
    if not bool(scores.isfinite().all()):
        bad = int((~scores.isfinite()).sum())
        raise ValueError(f"`posterior` gives scores that are not finite on {bad} of {num_rows} rows of `pool`.")
    if strategy in _EPISTEMIC and float(scores.max()) < 1e-12:
        raise ValueError(
            f"`strategy`={strategy!r}: the draws agree on every row of `pool`, so every score is 0 and ranks nothing. "
            "Use 'entropy' or 'random', or a posterior with a spread."
        )
