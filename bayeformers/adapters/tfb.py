"""`fit_tfb`: noise for a trained LoRA without training, as much as its answers bear (Shi et al. 2025)."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..checks import check_choice, check_count, is_finite
from ..delta import as_batches, check_bounds, largest_within, mean_nll, own_labels
from ..forward import Inputs, logits_of
from ..linearized.captured import OutputOf
from ..posteriors import PointPosterior
from ..predictive import Predictive
from .layers import LoraPair, plain_lora_pairs
from .posterior import AdapterPosterior, LowRankBlock, target_of

__all__ = ["fit_tfb", "tfb_posterior"]

logger = logging.getLogger(__name__)

Criterion = Literal["nll", "accuracy"]
BOUNDS = (1e-4, 1.0)
"""Between which values sigma is sought."""


def tfb_posterior(model: nn.Module, sigma: float, *, outputs_of: OutputOf = logits_of) -> AdapterPosterior:
    r"""The posterior of TFB at a given scale: noise of one size in every direction that the adapter's B reaches.

    With the singular values B = U diag(d) V^T the change of a weight is B A = (U diag(d)) A', A' = V^T A, and A' ~
    N(V^T A, \Omega^2) with \Omega_ij = sigma / d_i (Shi et al. 2025, arXiv 2412.05723, eq. 5). The noise of the weight
    is then s sigma U Z with Z (r, d_in) standard normal: N(0, s^2 sigma^2 U U^T (x) I), whatever basis A and B are
    written in. Directions in which B is 0, up to rounding, have none. B stays as it is.

    Args:
        model: with a trained LoRA adapter.
        sigma: > 0, in units of the weight divided by the adapter's scaling s.
        outputs_of: the logits in what the model returns.

    Returns:
        The posterior.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: sigma is no number > 0; no LoRA; one that is merged, Bayesian or not trained, so that its B is 0.
    """
    if not (is_finite(sigma) and sigma > 0):
        raise ValueError(f"`sigma` must be a finite number > 0, got {sigma!r}; it is a standard deviation.")
    return _scaled(model, _unit_blocks(plain_lora_pairs(model)), float(sigma), outputs_of)


def fit_tfb(
    model: nn.Module,
    inputs: Inputs | Iterable[Inputs],
    labels: Tensor | Iterable[Tensor] | None = None,
    *,
    tolerance: float = 0.003,
    criterion: Criterion = "nll",
    bounds: tuple[float, float] = BOUNDS,
    num_samples: int = 10,
    seed: int = 0,
    outputs_of: OutputOf = logits_of,
    progress: bool = True,
) -> AdapterPosterior:
    """Make a trained LoRA Bayesian without training: the largest sigma that its answers to an anchor set bear.

    TFB, training-free Bayesianization (Shi et al. 2025, arXiv 2412.05723): the posterior is `tfb_posterior`, a single
    number is sought, by bisection of its logarithm, and the same draws serve every try. A few hundred rows are enough,
    and need no labels: without them the adapter's own decisions stand in. Rows that it was trained on allow less noise
    than held-out ones.

    Args:
        model: with a trained LoRA adapter; it comes back as it was.
        inputs: the anchor set: one batch, or batches, of what the model's forward takes. Labels inside, and the second
            of pairs, count as ``labels`` where that is not given.
        labels: of the batch, or of each batch.
        tolerance: how far the criterion may get worse: the NLL by this share of itself, the accuracy by this much.
        criterion: "nll", or "accuracy".
        bounds: smallest and largest sigma to consider.
        num_samples: draws per try.
        seed: of the draws.
        outputs_of: the logits in what the model returns.
        progress: show a progress bar.

    Returns:
        The posterior; its `scale_found` is sigma. It changes nothing in the model: `model.posterior = ...` carries it.

    Raises:
        TypeError: an argument is of a wrong kind.
        ValueError: an argument is not one of these, no batch, no label that counts, or a model that `tfb_posterior`
            refuses.
    """
    check_choice("criterion", criterion, ("nll", "accuracy"))
    check_count("num_samples", num_samples, 1)
    low, high = check_bounds(bounds)
    if not (is_finite(tolerance) and tolerance > 0):
        raise ValueError(f"`tolerance` must be a finite number > 0, got {tolerance!r}; 0.003 is 0.3 %.")
    blocks = _unit_blocks(plain_lora_pairs(model))
    batches, given = as_batches(inputs, labels)
    means = [PointPosterior(model).predict(batch) for batch in batches]
    targets = [own_labels(mean) for mean in means] if given is None else given

    def cost(predictives: Iterable[Predictive]) -> float:
        return mean_nll(predictives, targets) if criterion == "nll" else _error(predictives, targets)

    with tqdm(desc="sigma", unit="try", disable=not progress) as bar:

        def at(log_sigma: float) -> float:
            posterior = _scaled(model, blocks, math.exp(log_sigma), outputs_of)
            value = cost(posterior.predict(batch, num_samples=num_samples, seed=seed) for batch in batches)
            bar.update()
            bar.set_postfix(sigma=f"{math.exp(log_sigma):.3g}", **{criterion: f"{value:.4g}"})
            return value

        start = cost(means)
        limit = start * (1 + tolerance) if criterion == "nll" else start + tolerance
        sigma = math.exp(largest_within(at, limit, math.log(low), math.log(high)))
    _tell_of_end(sigma, low, high, at)
    return _scaled(model, blocks, sigma, outputs_of)


def _tell_of_end(sigma: float, low: float, high: float, at: Callable[[float], float]) -> None:
    """The answer at an end of the range is none."""
    for end, value in (("smallest", low), ("largest", high)):
        if math.isclose(sigma, value, rel_tol=1e-9):
            logger.warning(
                "fit_tfb found the %s sigma of `bounds`, %.4g: the answers bear %s noise than that. Widen `bounds`.",
                end,
                sigma,
                "less" if end == "smallest" else "more",
            )


def _error(predictives: Iterable[Predictive], targets: Sequence[Tensor]) -> float:
    """Share of the labels that are not the most probable class; labels of -100 do not count."""
    wrong, count = 0, 0
    for predictive, target in zip(predictives, targets, strict=True):
        found = own_labels(predictive)
        kept = (target.to(found.device) >= 0) & (found >= 0)
        wrong += int((found[kept] != target.to(found.device)[kept]).sum())
        count += int(kept.sum())
    if count == 0:
        raise ValueError("`labels` hold none that counts: all are -100, or beyond the sequence.")
    return wrong / count


def _unit_blocks(pairs: Sequence[LoraPair]) -> list[LowRankBlock]:
    """Those of sigma = 1."""
    return list(_blocks(pairs))


def _blocks(pairs: Sequence[LoraPair]) -> Iterator[LowRankBlock]:
    for pair in pairs:
        b = pair.up.weight.detach()
        b = b.to(torch.promote_types(b.dtype, torch.float32))
        # of the small Gram matrix's root, so that a B of 100,000 rows costs no more than one product
        _, d, basis = torch.linalg.svd(torch.linalg.qr(b, mode="r")[1], full_matrices=False)
        kept = d > d.amax() * max(b.shape) * torch.finfo(b.dtype).eps
        if not bool(kept.any()):
            raise ValueError(
                f"`model` has a B of zeros in {pair.name!r}: noise in A would change nothing. Train the adapter first."
            )
        width = pair.down.weight.shape[1]
        variance = d[kept].square().reciprocal()[:, None].expand(-1, width)
        yield LowRankBlock(target_of(pair), variance[None].contiguous(), basis[kept].mT[None].contiguous())


def _scaled(model: nn.Module, blocks: Sequence[LowRankBlock], sigma: float, outputs_of: OutputOf) -> AdapterPosterior:
    scaled = [replace(block, variance=sigma**2 * block.variance) for block in blocks]
    return AdapterPosterior(model, scaled, method="tfb", scale=sigma, outputs_of=outputs_of)
