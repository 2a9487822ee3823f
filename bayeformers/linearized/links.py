r"""From Gaussian logits f ~ N(m, S) to a prediction: p = E softmax(f), in closed form or from draws of f.

What a linearised network says about an input is such a Gaussian. A *link* gives the mean probability; the uncertainties
always come from draws, which cost no pass of the network.

| link | log p | for |
| --- | --- | --- |
| ``"probit"``, C = 2 | log sigmoid(-+ d / sqrt(1 + pi v / 8)), d = m_1 - m_0, v = S_00 + S_11 - 2 S_01 | two classes |
| ``"probit"``, labels | log sigmoid(-+ m_l / sqrt(1 + pi S_ll / 8)) | each label of a multi-label head |
| ``"mc"`` | log mean_s softmax(f_s), draws f_s | all |
| ``"bridge"`` | log(alpha_c / sum alpha), alpha of the Laplace bridge | C > 1, by name |
| ``"probit_diagonal"`` | log softmax(m_c / sqrt(1 + pi S_cc / 8)) | C > 1, by name |
| ``"auto"`` | "probit" where that is defined, else "mc" | all |

Softmax ignores what all logits share. So do the pairwise probit and the draws; of the other two links a common shift of
the logits, or noise that all of them share, changes the answer. Mean total-variation errors on random Gaussians (logits
of standard deviation 2, full covariances): of two classes probit .003, draws .0001, diagonal probit .04, bridge .18; of
three classes draws .0001, diagonal probit .05, bridge .30.
Sources: MacKay 1992 (the probit approximation), Hobbhahn et al. 2020 (arXiv 2003.01227: the bridge), Immer et al. 2021
(arXiv 2008.08400: the linearised predictive).
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import is_whole
from ..forward import wide
from ..likelihoods import HEAD, NoiseStd, ProblemType, get_likelihood, split_variance_head
from ..likelihoods.gaussian import squeezed
from ..predictive import Predictive

__all__ = ["LINKS", "Link", "check_link", "ignores_shift", "link_log_probs", "linearized_predictive", "logit_draws"]

Link = Literal["auto", "probit", "mc", "bridge", "probit_diagonal"]
LINKS: tuple[Link, ...] = get_args(Link)

_DRAWS = 1024
_TOKEN_DRAWS = 256  # of each of many tokens: a power of two, below which Sobol points lose their balance
_MIN_DRAWS = 64
_DRAW_ELEMENTS = 2**26  # of all draws of one batch: 256 MiB in float32


def linearized_predictive(
    mean: Tensor,
    covariance: Tensor,
    problem: ProblemType,
    *,
    link: Link = "auto",
    num_draws: int | None = None,
    seed: int = 0,
    noise_std: NoiseStd | None = None,
    mask: Tensor | None = None,
) -> Predictive:
    """What Gaussian logits say: the link's probabilities, and all uncertainties from one set of logit draws.

    A regression's mean, variance and density need no draws: f ~ N(mean, covariance).

    Args:
        mean: (B, C), or (B, T, C) per token; (B, L) of a multi-label head or of a regression.
        covariance: of one input's logits: of the same shape with one more C.
        problem: what the head predicts.
        link: from logits to the mean probability; a regression takes only "auto".
        num_draws: of the logits; by default 1,024, or 256 per token, and fewer, at least 64, for a batch whose draws
            would have more than 2^26 elements.
        seed: the same seed gives the same draws, for every input, batch and process.
        noise_std: a regression's noise, or "head": of 2 L outputs the first L are targets, with their block of the
            covariance, and the last L log variances, taken at their mean; their own spread is left out.
        mask: which tokens count, (B, T) bool.

    Returns:
        The prediction; ValueError for an argument that is not one of these, or a link not defined for the problem.

    >>> mean, covariance = torch.tensor([[0.0, 2.0]]), 4 * torch.eye(2)[None]
    >>> predictive = linearized_predictive(mean, covariance, "single_label_classification")
    >>> predictive.probs, torch.softmax(mean, -1)  # noise makes the prediction less certain
    (tensor([[0.2723, 0.7277]]), tensor([[0.1192, 0.8808]]))
    """
    _check_gaussian(mean, covariance)
    mean, covariance, likelihood = wide(mean), wide(covariance), get_likelihood(problem)
    variance = None
    if likelihood.has_noise and noise_std == HEAD:
        mean, log_variance = split_variance_head(mean)
        covariance = covariance[..., : mean.shape[-1], : mean.shape[-1]]
        variance = squeezed(log_variance.exp())[None]
    log_probs = link_log_probs(mean, covariance, link, problem)
    num_draws = _default_draws(mean) if num_draws is None else num_draws
    draws = logit_draws(mean, covariance, num_draws, seed, centred=likelihood.ignores_shift)
    values, has_values = likelihood.values(draws, {}, is_stacked=True), likelihood.has_noise
    return Predictive(
        problem_type=problem,
        log_probs=None if has_values else values,
        values=values if has_values else None,
        noise_std=noise_std if has_values else None,
        noise_variance=variance,
        mask=mask,
        logit_mean=mean,
        logit_covariance=covariance,
        link_log_probs=log_probs,
    )


def ignores_shift(problem: ProblemType, link: Link) -> bool:
    """Whether noise that all logits of an item share changes nothing: a softmax with a link that respects it."""
    return get_likelihood(problem).ignores_shift and link in ("auto", "probit", "mc")


def link_log_probs(mean: Tensor, covariance: Tensor, link: Link, problem: ProblemType) -> Tensor | None:
    """Log probabilities of the link in closed form.

    Args:
        mean: of the logits, (..., C).
        covariance: of the logits, (..., C, C).
        link: ValueError for one that is unknown, or not defined for this problem or number of classes.
        problem: what the head predicts.

    Returns:
        log p, (..., C), for a multi-label head (..., L, 2); None where draws give it.

    >>> mean, covariance = torch.tensor([[0.0, 2.0]]), 4 * torch.eye(2)[None]
    >>> link_log_probs(mean, covariance, "probit", "single_label_classification").exp()
    tensor([[0.2723, 0.7277]])
    >>> link_log_probs(mean, covariance, "mc", "single_label_classification") is None
    True
    """
    check_link(link, problem, mean.shape[-1])
    likelihood = get_likelihood(problem)
    if link == "mc" or likelihood.has_noise:
        return None
    dtype, wider = mean.dtype, torch.promote_types(mean.dtype, covariance.dtype)  # variances of differences cancel
    mean, covariance = mean.to(wider), covariance.to(wider)
    if likelihood.is_bernoulli:
        return _bernoulli(mean, _diagonal(covariance)).to(dtype)
    if link == "bridge":
        return _bridge(mean, covariance).to(dtype)
    if link == "probit_diagonal":
        return _moderated(mean, _diagonal(covariance)).log_softmax(-1).to(dtype)
    has_pair = mean.shape[-1] == 2 and "probit" in likelihood.links
    return _pairwise(mean, covariance).to(dtype) if has_pair else None


def check_link(link: str, problem: ProblemType, num_classes: int) -> None:
    """Raise ValueError for a link that is unknown, or not defined for the problem.

    Args:
        link: the name of a link, one of `LINKS`.
        problem: what the head predicts.
        num_classes: the number C of logits per prediction.

    Raises:
        ValueError: the link is unknown, or the problem or its number of classes has no such link.
    """
    if link not in LINKS:
        raise ValueError(f"`link` must be one of {LINKS}, got {link!r}.")
    likelihood = get_likelihood(problem)
    if not likelihood.links:
        raise ValueError(f"`problem` must have logits (..., C) per input or token, got {problem!r}.")
    if link not in likelihood.links:
        *others, last = map(repr, likelihood.links)
        allowed = f"{', '.join(others)} or {last}" if others else last
        raise ValueError(f"`link` must be {allowed} for {problem}, got {link!r}.")
    if likelihood.is_bernoulli:
        return
    if link == "probit" and num_classes != 2:
        raise ValueError(
            f"`link`='probit' is for 2 classes, got {num_classes}: use 'mc', which is exact but for its draws, or "
            "'probit_diagonal', which ignores the covariances between logits."
        )
    elif link in ("bridge", "probit_diagonal") and num_classes < 2:
        raise ValueError(f"`link`={link!r} needs at least 2 classes, got {num_classes}.")


def logit_draws(mean: Tensor, covariance: Tensor, num_samples: int, seed: int, *, centred: bool = False) -> Tensor:
    """Draws from N(mean, covariance) with common random numbers: every input uses the same quasi-random normals.

    Args:
        mean: of the logits, (..., C).
        covariance: of the logits, (..., C, C); it may be singular.
        num_samples: S; scrambled Sobol points, so fewer draws are the first of more.
        seed: of the scrambling.
        centred: leave out the noise that all C share, which a softmax ignores and beside which float32 may hold nothing
            of the rest.

    Returns:
        The draws, (S, ..., C).

    Raises:
        ValueError: ``num_samples`` or ``seed`` is not a whole number >= 1, or >= 0.

    >>> logit_draws(torch.zeros(5, 3), torch.eye(3).expand(5, 3, 3), num_samples=64, seed=0).shape
    torch.Size([64, 5, 3])
    """
    from scipy.stats.qmc import MultivariateNormalQMC  # here: a twentieth of the time that importing the package takes

    for name, value, minimum in (("num_samples", num_samples, 1), ("seed", seed, 0)):
        if not is_whole(value) or value < minimum:
            raise ValueError(f"`{name}` must be a whole number >= {minimum}, got {value!r}.")
    balanced = 2 ** math.ceil(math.log2(num_samples))
    normals = MultivariateNormalQMC(np.zeros(mean.shape[-1]), rng=seed).random(balanced)[:num_samples]
    with torch.autocast(mean.device.type, enabled=False):
        return mean + _noise(covariance, torch.as_tensor(normals).to(mean), centred)


def _noise(covariance: Tensor, normals: Tensor, centred: bool) -> Tensor:
    """Covariance (..., C, C) and standard normals (S, C) -> (S, ..., C)."""
    variances = _diagonal(covariance)
    if not bool((covariance - variances.diag_embed()).any()):  # independent logits, as of a VBLL or SNGP head
        noise = normals.reshape(len(normals), *[1] * (variances.dim() - 1), -1) * variances.clamp_min(0).sqrt().to(
            normals
        )
        return noise - noise.mean(-1, keepdim=True) if centred else noise
    if not centred:
        return torch.einsum("...cd,sd->s...c", _root(covariance.double()).to(normals), normals)
    # In a basis of the contrasts, so that what all logits share has no part in it: the draws are those of its absence.
    basis = _contrasts(covariance.shape[-1]).to(covariance.device)
    root = basis @ _root(basis.mT @ covariance.double() @ basis)
    return torch.einsum("...cd,sd->s...c", root.to(normals), normals[:, : root.shape[-1]])


def _root(covariance: Tensor) -> Tensor:
    """The symmetric square root, which alone moves little where the covariance does: eigenvectors may turn at will."""
    values, vectors = torch.linalg.eigh(covariance)
    root: Tensor = vectors * values.clamp_min(0).sqrt().unsqueeze(-2) @ vectors.mT  # rounding must not become NaN
    return root


def _contrasts(num_classes: int) -> Tensor:
    """Orthonormal columns (C, C - 1) that are orthogonal to the vector of ones (Helmert)."""
    steps = torch.arange(1, num_classes, dtype=torch.float64)
    columns = torch.ones(num_classes, num_classes, dtype=torch.float64).triu(1)[:, 1:]
    columns = columns - steps * torch.eye(num_classes, dtype=torch.float64)[:, 1:]
    return columns / (steps * (steps + 1)).sqrt()


def _pairwise(mean: Tensor, covariance: Tensor) -> Tensor:
    """Two classes: the probit approximation of the difference of their logits."""
    variance = covariance[..., 0, 0] + covariance[..., 1, 1] - covariance[..., 0, 1] - covariance[..., 1, 0]
    return _bernoulli(mean[..., 1] - mean[..., 0], variance)


def _bernoulli(mean: Tensor, variance: Tensor) -> Tensor:
    """E sigmoid(f) of f ~ N(mean, variance): log probabilities of absent and present, on a new last axis."""
    logit = _moderated(mean, variance)
    return torch.stack([F.logsigmoid(-logit), F.logsigmoid(logit)], dim=-1)


def _moderated(mean: Tensor, variance: Tensor) -> Tensor:
    return mean / (1 + math.pi / 8 * variance.clamp_min(0)).sqrt()


def _bridge(mean: Tensor, covariance: Tensor) -> Tensor:
    """Of zero-sum logits alpha_c = (1 / S_cc) (1 - 2/C + e^{m_c} C^-2 sum_k e^{-m_k}), in logarithms."""
    # conditioning on sum f = 0 gives m - S1 (1^T m) / (1^T S 1) and S - S1 1^T S / (1^T S 1); a common shift (the limit
    # of vanishing isotropic noise) stands in where the sum has no variance
    classes, tiny = mean.shape[-1], torch.finfo(mean.dtype).eps
    row_sums, sum_of_means = covariance.sum(-1), mean.sum(-1, keepdim=True)
    total = row_sums.sum(-1, keepdim=True)
    certain = total <= tiny * covariance.abs().sum((-2, -1))[..., None]
    gain = torch.where(certain, 1 / classes, row_sums / total.masked_fill(certain, 1))
    mean = mean - gain * sum_of_means
    variance = _diagonal(covariance) - torch.where(certain, 0, gain * row_sums)
    # Only ratios of variances matter; a class without any would take all the mass.
    largest = variance.amax(-1, keepdim=True)
    variance = torch.where(largest > 0, variance.clamp_min(tiny * largest), 1)
    evidence = mean - 2 * math.log(classes) + (-mean).logsumexp(-1, keepdim=True)
    constant = torch.full_like(evidence, math.log(1 - 2 / classes) if classes > 2 else -math.inf)
    bridged = (evidence.logaddexp(constant) - variance.log()).log_softmax(-1)
    return torch.where(largest > 0, bridged, mean.log_softmax(-1))  # S = 0: the logits are known


def _diagonal(covariance: Tensor) -> Tensor:
    return covariance.diagonal(dim1=-2, dim2=-1)


def _default_draws(mean: Tensor) -> int:
    """Of whole batches; halved until they fit."""
    draws = _DRAWS if mean.dim() == 2 else _TOKEN_DRAWS
    while draws > _MIN_DRAWS and draws * mean.numel() > _DRAW_ELEMENTS:
        draws //= 2
    return draws


def _check_gaussian(mean: Tensor, covariance: Tensor) -> None:
    if mean.dim() not in (2, 3):
        raise ValueError(f"`mean` must have shape (B, C) or (B, T, C), got {tuple(mean.shape)}.")
    expected = (*mean.shape, mean.shape[-1])
    if covariance.shape != expected:
        raise ValueError(f"`covariance` must have shape {expected}, got {tuple(covariance.shape)}.")
    for name, tensor in (("mean", mean), ("covariance", covariance)):
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"`{name}` must be finite; a diverged model or a dtype that overflowed gives what is not.")
