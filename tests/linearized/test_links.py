"""From Gaussian logits to predictions: every link against quadrature or a loop over the printed formula, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bayeformers.likelihoods import ProblemType
from bayeformers.linearized import links as logits
from bayeformers.linearized.links import LINKS, Link, linearized_predictive, link_log_probs, logit_draws
from bayeformers.predictive import Predictive

CLASSES: ProblemType = "single_label_classification"
LABELS: ProblemType = "multi_label_classification"
TOKENS: ProblemType = "token_classification"


def gaussian(*shape: int, seed: int = 0, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Logits (..., C) of standard deviation 2 and full covariances (..., C, C) of variances near ``scale`` C."""
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(*shape, shape[-1], generator=generator, dtype=torch.float64)
    return 2 * torch.randn(*shape, generator=generator, dtype=torch.float64), scale * root @ root.mT


def hermite(degree: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights of E g(z), z ~ N(0, 1)."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(degree)
    return torch.as_tensor(nodes), torch.as_tensor(weights / math.sqrt(2 * math.pi))


def expected_sigmoid(mean: Tensor, variance: Tensor) -> Tensor:
    """E sigmoid(f), f ~ N(mean, variance), by the trapezoidal rule over +-12 deviations: exact to rounding."""
    z = torch.linspace(-12, 12, 4001, dtype=torch.float64)
    density = torch.exp(-0.5 * z.square()) / math.sqrt(2 * math.pi)
    return torch.trapezoid((mean[..., None] + variance.sqrt()[..., None] * z).sigmoid() * density, z)


def expected_softmax(mean: Tensor, covariance: Tensor, degree: int = 60) -> Tensor:
    """E softmax(f) of C = 3 logits: softmax sees two differences of logits, and over those a grid of nodes is laid."""
    contrast = torch.tensor([[1.0, 0, -1], [0, 1, -1]], dtype=torch.float64)
    root = torch.linalg.cholesky(contrast @ covariance @ contrast.mT)
    nodes, weights = hermite(degree)
    grid, mass = torch.cartesian_prod(nodes, nodes), torch.cartesian_prod(weights, weights).prod(-1)
    differences = (contrast @ mean[..., None]).mT + grid @ root.mT
    nodes = torch.cat([differences, torch.zeros_like(differences[..., :1])], dim=-1)
    return (mass[:, None] * nodes.softmax(-1)).sum(-2)


def probs(link: Link, mean: Tensor, covariance: Tensor, problem: ProblemType = CLASSES, **options: Any) -> Tensor:
    return linearized_predictive(mean, covariance, problem, link=link, **options).probs


# --------------------------------------------------------------------------------------------------------------- probit


def test_pairwise_probit_against_quadrature() -> None:
    """The formula itself to rounding, and what the approximation costs: .003 on average, nowhere more than .0189.

    That is the largest distance between sigmoid(x) and the probit of equal slope at 0, Phi(sqrt(pi / 8) x), which the
    approximation takes for each other twice, with errors of opposite sign.
    """
    mean, covariance = gaussian(400, 2)
    found = probs("probit", mean, covariance)
    assert torch.equal(found, probs("auto", mean, covariance))
    for b in range(5):
        (m0, m1), ((s00, s01), (_, s11)) = mean[b].tolist(), covariance[b].tolist()
        logit = (m1 - m0) / math.sqrt(1 + math.pi * (s00 + s11 - 2 * s01) / 8)
        assert found[b, 1].item() == pytest.approx(1 / (1 + math.exp(-logit)), rel=1e-12)
    difference = torch.tensor([-1.0, 1.0], dtype=torch.float64)
    exact = expected_sigmoid(mean @ difference, difference @ covariance @ difference)
    error = (found[:, 1] - exact).abs()  # of two classes this is the total variation
    assert error.max() < 0.0189
    assert 0.001 < error.mean() < 0.004


@pytest.mark.parametrize("link", ["auto", "probit", "mc"])
def test_what_both_logits_share_changes_nothing(link: Link) -> None:
    """A shift, and noise of rank one along (1, 1); what the draws add, 2 / S, is their own error."""
    mean, covariance = gaussian(20, 2)
    found = probs(link, mean, covariance)
    tolerance = 2 / 1024 if link == "mc" else 1e-10
    torch.testing.assert_close(probs(link, mean + 7, covariance), found, rtol=0, atol=1e-12)
    torch.testing.assert_close(probs(link, mean, covariance + 50), found, rtol=0, atol=tolerance)


def test_every_label_has_its_own_probit() -> None:
    """Covariances between labels play no part in their marginals."""
    mean, covariance = gaussian(30, 3)
    variance = covariance.diagonal(dim1=-2, dim2=-1)
    found = linearized_predictive(mean, covariance, LABELS)
    assert found.probs.shape == (30, 3, 2)
    assert found.predictive_entropy.shape == (30, 3)
    torch.testing.assert_close(found.probs.sum(-1), torch.ones(30, 3, dtype=torch.float64))
    expected = (mean / (1 + math.pi / 8 * variance).sqrt()).sigmoid()
    torch.testing.assert_close(found.probs[..., 1], expected)
    assert (found.probs[..., 1] - expected_sigmoid(mean, variance)).abs().max() < 0.0189
    diagonal = linearized_predictive(mean, torch.diag_embed(variance), LABELS)
    torch.testing.assert_close(found.probs, diagonal.probs)
    labels = torch.ones(30, 3)
    torch.testing.assert_close(found.log_prob(labels).exp(), expected)


def test_diagonal_probit_by_a_loop() -> None:
    mean, covariance = gaussian(4, 3)
    found = probs("probit_diagonal", mean, covariance)
    for b in range(4):
        moderated = [mean[b, c].item() / math.sqrt(1 + math.pi / 8 * covariance[b, c, c].item()) for c in range(3)]
        total = sum(map(math.exp, moderated))
        assert found[b].tolist() == pytest.approx([math.exp(value) / total for value in moderated], rel=1e-12)


# --------------------------------------------------------------------------------------------------------- Monte Carlo


def test_draws_against_quadrature_over_three_classes() -> None:
    """Gauss-Hermite is converged (80 nodes agree with 60). Scrambled Sobol points err by about 1 / S: twice that."""
    mean, covariance = gaussian(50, 3, scale=0.5)
    exact = expected_softmax(mean, covariance)
    assert (exact - expected_softmax(mean, covariance, 80)).abs().max() < 1e-6
    found = linearized_predictive(mean, covariance, CLASSES)
    assert found.link_log_probs is None and found.num_samples == 1024
    assert (found.probs - exact).abs().max() < 2 / 1024
    more = linearized_predictive(mean, covariance, CLASSES, num_draws=16_384)
    assert (more.probs - exact).abs().max() < 2 / 16_384


def test_draws_against_quadrature_over_two_classes() -> None:
    mean, covariance = gaussian(50, 2)
    difference = torch.tensor([-1.0, 1.0], dtype=torch.float64)
    exact = expected_sigmoid(mean @ difference, difference @ covariance @ difference)
    assert (probs("mc", mean, covariance)[:, 1] - exact).abs().max() < 2 / 1024


def test_draws_depend_on_the_contrasts_alone_and_move_little_with_the_covariance() -> None:
    """Equal eigenvalues let eigenvectors turn at a rounding error: padding must not make other draws."""
    generator = torch.Generator().manual_seed(0)
    mean, noise = torch.zeros(1, 4, dtype=torch.float64), torch.randn(4, 4, dtype=torch.float64, generator=generator)
    covariance = torch.eye(4, dtype=torch.float64)[None] + 0.1  # all contrasts have variance 1
    nearly = covariance + 1e-9 * (noise + noise.mT)
    centre = torch.eye(4, dtype=torch.float64) - 0.25
    for centred in (True, False):
        draws = logit_draws(mean, covariance, 64, seed=1, centred=centred)
        torch.testing.assert_close(logit_draws(mean, nearly, 64, seed=1, centred=centred), draws, atol=1e-7, rtol=0)
    draws = logit_draws(mean, covariance, 2048, seed=1, centred=True)
    torch.testing.assert_close(logit_draws(mean, centre @ covariance @ centre, 2048, seed=1, centred=True), draws)
    # 2,048 scrambled Sobol points: the error of a covariance's entry is far below 1 / sqrt(2048) = .02
    torch.testing.assert_close((draws[:, 0].mT @ draws[:, 0]) / 2048, centre, atol=0.01, rtol=0)


def test_draws_are_those_of_the_logits() -> None:
    """Common random numbers: equal inputs have equal draws, wherever they stand; fewer draws are the first of more."""
    mean, covariance = gaussian(3, 4)
    draws = logit_draws(mean, covariance, 100, seed=2)
    assert draws.shape == (100, 3, 4)
    torch.testing.assert_close(draws[:, 1:2], logit_draws(mean[1:2], covariance[1:2], 100, seed=2))
    torch.testing.assert_close(draws[:37], logit_draws(mean, covariance, 37, seed=2))
    tokens = logit_draws(mean[:, None].expand(3, 2, 4), covariance[:, None].expand(3, 2, 4, 4), 100, seed=2)
    torch.testing.assert_close(tokens[:, :, 1], draws)
    predictive = linearized_predictive(mean, covariance, CLASSES, num_draws=100, seed=2)
    centred = logit_draws(mean, covariance, 100, seed=2, centred=True)
    torch.testing.assert_close(predictive.log_probs, centred.log_softmax(-1))
    noise = centred - mean
    torch.testing.assert_close(noise.sum(-1), torch.zeros_like(noise[..., 0]), atol=1e-6, rtol=0)


def test_uncertainties_come_from_the_draws_whatever_the_link() -> None:
    mean, covariance = gaussian(40, 2)
    closed, sampled = (linearized_predictive(mean, covariance, CLASSES, link=link) for link in ("probit", "mc"))
    assert not torch.equal(closed.probs, sampled.probs)
    for name in ("predictive_entropy", "expected_entropy", "mutual_information"):
        assert torch.equal(getattr(closed, name), getattr(sampled, name))
    assert (closed.mutual_information >= 0).all()
    labels = torch.arange(40) % 2
    torch.testing.assert_close(closed.log_prob(labels), closed.link_log_probs.gather(1, labels[:, None])[:, 0])


# --------------------------------------------------------------------------------------------------------------- bridge


def bridge(mean: list[float], covariance: list[list[float]]) -> list[float]:
    """The printed formulas, one class at a time."""
    count = len(mean)
    rows, shift = [sum(row) for row in covariance], sum(mean)
    total = sum(rows)
    centred = [mean[c] - rows[c] * shift / total for c in range(count)]
    variance = [covariance[c][c] - rows[c] ** 2 / total for c in range(count)]
    inverse = sum(math.exp(-value) for value in centred)
    alpha = [(1 - 2 / count + math.exp(centred[c]) * inverse / count**2) / variance[c] for c in range(count)]
    return [value / sum(alpha) for value in alpha]


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_bridge_is_the_printed_formula(classes: int) -> None:
    mean, covariance = gaussian(10, classes)
    found = probs("bridge", mean, covariance)
    for b in range(10):
        assert found[b].tolist() == pytest.approx(bridge(mean[b].tolist(), covariance[b].tolist()), rel=1e-9)


def test_bridge_returns_the_dirichlet_that_it_comes_from() -> None:
    """The Gaussian that Hobbhahn et al. map Dirichlet(alpha) to, equation (12), is mapped back to alpha / sum alpha."""
    alpha = torch.tensor([[0.5, 2.0, 4.0], [3.0, 3.0, 3.0], [20.0, 1.0, 7.0]], dtype=torch.float64)
    centring = torch.eye(3, dtype=torch.float64) - 1 / 3
    mean = alpha.log() @ centring
    covariance = centring @ torch.diag_embed(1 / alpha) @ centring
    torch.testing.assert_close(probs("bridge", mean, covariance), alpha / alpha.sum(-1, keepdim=True))


# ------------------------------------------------------------------------------------------------------------- edges

EVERY_LINK: list[tuple[Link, ProblemType, int]] = [
    *((link, CLASSES, 2) for link in LINKS),
    *((link, CLASSES, 3) for link in LINKS if link != "probit"),
    *((link, LABELS, 3) for link in ("auto", "probit", "mc")),
]


@pytest.mark.parametrize(("link", "problem", "classes"), EVERY_LINK)
def test_without_variance_the_logits_are_known(link: Link, problem: ProblemType, classes: int) -> None:
    mean, covariance = gaussian(5, classes)
    found = linearized_predictive(mean, 0 * covariance, problem, link=link)
    expected = mean.softmax(-1) if problem == CLASSES else torch.stack([(-mean).sigmoid(), mean.sigmoid()], -1)
    torch.testing.assert_close(found.probs, expected)
    assert found.mutual_information.max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("link", "problem", "classes"), EVERY_LINK)
def test_saturated_logits_and_singular_covariances(
    link: Link, problem: ProblemType, classes: int, dtype: torch.dtype
) -> None:
    """Finite and normalised; noise of rank one, shared by all logits or between two of them."""
    mean = torch.zeros(4, classes, dtype=dtype)
    mean[:, 0] = torch.tensor([300.0, -300.0, 0.0, 1e4])
    shared = torch.ones(classes, classes, dtype=dtype)
    between = torch.zeros(classes, dtype=dtype)
    between[:2] = torch.tensor([1.0, -1.0])
    for covariance in (shared, 1e6 * shared, torch.outer(between, between), torch.eye(classes, dtype=dtype) * 1e-30):
        found = linearized_predictive(mean, covariance.expand(4, classes, classes), problem, link=link)
        assert found.mean_log_probs.isfinite().all() and found.mean_log_probs.dtype == dtype
        # log_softmax of logits near 1e4 (1e6 shared noise: 1e3 deviations) is exact to their rounding
        total = found.probs.sum(-1)
        torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-4)
        assert (found.mutual_information >= 0).all()


def test_half_precision_logits_are_computed_in_float32() -> None:
    mean, covariance = gaussian(4, 3)
    found = linearized_predictive(mean.bfloat16(), covariance.bfloat16(), CLASSES)
    expected = linearized_predictive(mean.bfloat16().float(), covariance.bfloat16().float(), CLASSES)
    assert found.probs.dtype == torch.float32
    torch.testing.assert_close(found.probs, expected.probs)


@pytest.mark.parametrize("classes", [2, 3])
def test_tokens_are_so_many_inputs(classes: int) -> None:
    mean, covariance = gaussian(2, 5, classes)
    mask = torch.arange(5) < torch.tensor([[5], [3]])
    found = linearized_predictive(mean, covariance, TOKENS, mask=mask)
    flat = linearized_predictive(mean.flatten(0, 1), covariance.flatten(0, 1), CLASSES, num_draws=found.num_samples)
    assert found.num_samples == 256 and found.mask is mask
    torch.testing.assert_close(found.probs.flatten(0, 1), flat.probs)
    torch.testing.assert_close(found.mutual_information.flatten(), flat.mutual_information)
    labels = torch.arange(10).reshape(2, 5) % classes
    torch.testing.assert_close(found.log_prob(labels).flatten(), flat.log_prob(labels.flatten()))


@pytest.mark.parametrize(("elements", "draws"), [(2**26, 1024), (512 * 6, 512), (513 * 6, 512), (6, 64)])
def test_draws_of_a_large_batch_fit_the_memory(elements: int, draws: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logits, "_DRAW_ELEMENTS", elements)
    assert linearized_predictive(*gaussian(2, 3), CLASSES).num_samples == draws


# ----------------------------------------------------------------------------------------------------------- regression


@pytest.mark.parametrize("outputs", [1, 3])
def test_regression_is_closed_form(outputs: int) -> None:
    """log p(y) = log integral N(y; f, s^2) N(f; m, S_ll) df per output, by quadrature; the draws agree to theirs."""
    mean, covariance = gaussian(6, outputs)
    noise = 0.7
    found = linearized_predictive(mean, covariance, "regression", noise_std=noise)
    shape = (6,) if outputs == 1 else (6, outputs)
    variance = covariance.diagonal(dim1=-2, dim2=-1)
    assert torch.equal(found.mean, mean.reshape(shape))
    assert torch.equal(found.epistemic_variance, variance.reshape(shape))
    assert found.aleatoric_variance.shape == shape
    labels = mean + torch.linspace(-2, 2, mean.numel(), dtype=torch.float64).reshape(mean.shape)
    z = torch.linspace(-12, 12, 4001, dtype=torch.float64)
    values = mean[..., None] + variance.sqrt()[..., None] * z
    likelihood = torch.distributions.Normal(values, noise).log_prob(labels[..., None]).exp()
    density = torch.trapezoid(likelihood * torch.exp(-0.5 * z.square()) / math.sqrt(2 * math.pi), z)
    torch.testing.assert_close(found.log_prob(labels.reshape(shape)), density.log().reshape(shape))
    sampled = Predictive(problem_type="regression", values=found.values, noise_std=noise)
    torch.testing.assert_close(sampled.log_prob(labels.reshape(shape)), density.log().reshape(shape), rtol=0, atol=0.02)


def test_regression_without_variance_and_without_noise() -> None:
    mean, covariance = gaussian(6, 1)
    known = linearized_predictive(mean, 0 * covariance, "regression", noise_std=0.5)
    expected = torch.distributions.Normal(mean[:, 0], 0.5).log_prob(torch.zeros(6))
    torch.testing.assert_close(known.log_prob(torch.zeros(6)), expected)
    assert (known.epistemic_variance == 0).all()
    with pytest.raises(ValueError, match="`noise_std` is not known"):
        linearized_predictive(mean, covariance, "regression").log_prob(torch.zeros(6))


# --------------------------------------------------------------------------------------------------------------- errors

MEAN, COVARIANCE = gaussian(2, 3)
BAD: list[tuple[Callable[[], Any], str]] = [
    (lambda: probs("probit", MEAN, COVARIANCE), "'probit' is for 2 classes, got 3: use 'mc', .* or 'probit_diagonal'"),
    (lambda: probs("softmax", MEAN, COVARIANCE), r"`link` must be one of \('auto', 'probit', .*got 'softmax'"),  # type: ignore[arg-type]
    (lambda: probs("bridge", MEAN, COVARIANCE, LABELS), "`link` must be 'auto', 'probit' or 'mc' .*got 'bridge'"),
    (lambda: probs("bridge", MEAN[:, :1], COVARIANCE[:, :1, :1]), "needs at least 2 classes, got 1"),
    (lambda: probs("mc", MEAN, COVARIANCE, "regression"), "`link` must be 'auto' for regression, got 'mc'"),
    (lambda: probs("auto", MEAN, COVARIANCE, "question_answering"), "`problem` must .*got 'question_answering'"),
    (lambda: probs("auto", MEAN[0], COVARIANCE[0]), r"`mean` must have shape .*got \(3,\)"),
    (lambda: probs("auto", MEAN, COVARIANCE[:1]), r"`covariance` must have shape \(2, 3, 3\), got \(1, 3, 3\)"),
    (lambda: probs("auto", MEAN / 0, COVARIANCE), "`mean` must be finite"),
    (lambda: probs("auto", MEAN, COVARIANCE * torch.nan), "`covariance` must be finite"),
    (lambda: probs("auto", MEAN, COVARIANCE, num_draws=0), "`num_samples` must be a whole number >= 1, got 0"),
    (lambda: probs("auto", MEAN, COVARIANCE, seed=-1), "`seed` must be a whole number >= 0, got -1"),
    (lambda: link_log_probs(MEAN, COVARIANCE, "probit", TOKENS), "'probit' is for 2 classes"),
    (
        lambda: Predictive(problem_type=CLASSES, log_probs=torch.zeros(4, 2, 1), link_log_probs=torch.zeros(2, 3)),
        r"`link_log_probs` must have shape \(2, 1\), as one draw of `log_probs`, got \(2, 3\)",
    ),
    (
        lambda: Predictive(problem_type="regression", values=torch.zeros(4, 2), link_log_probs=torch.zeros(2)),
        "`link_log_probs` must be None for a regression",
    ),
    (
        lambda: Predictive(problem_type=CLASSES, log_probs=torch.zeros(4, 2, 1), logit_mean=torch.zeros(2, 1)),
        "`logit_mean` and `logit_covariance` go together",
    ),
]


@pytest.mark.parametrize(("action", "message"), BAD)
def test_errors_say_what_is_wrong(action: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        action()
