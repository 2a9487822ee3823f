"""Cases with a known posterior: Bayesian linear regression, softmax regression, deep linear networks."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from bayeformers.laplace import LaplacePosterior, fit
from tests.laplace.networks import QUIET, built, classes, fitted, regression_data
from tests.laplace.reference import (
    basis,
    close,
    dense,
    error,
    exact_log_evidence,
    ggn,
    jacobian,
    normal,
    outputs_of,
)

NOISE, TAU = 0.5, 2.0


def with_ones(x: Tensor) -> Tensor:
    return torch.cat([x, torch.ones_like(x[:, :1])], dim=1)


def at_the_map(x: Tensor, y: Tensor, tau: float, noise: float) -> nn.Linear:
    """A Linear at argmin |y - W x|^2 / s^2 + tau |W|^2, bias included."""
    features = with_ones(x)
    precision = features.T @ features / noise**2 + tau * torch.eye(features.shape[1], dtype=torch.float64)
    solution = torch.linalg.solve(precision, features.T @ y / noise**2).T
    model = nn.Linear(x.shape[1], y.shape[1]).double()
    with torch.no_grad():
        model.weight.copy_(solution[:, :-1])
        model.bias.copy_(solution[:, -1])
    return model


def linear_regression(tau: float = TAU, noise: float = NOISE) -> tuple[nn.Linear, Tensor, Tensor]:
    x, y = regression_data()
    return at_the_map(x, y, tau, noise), x, y


def regression_posterior(model: nn.Module, x: Tensor, y: Tensor, **options: object) -> LaplacePosterior:
    chosen = {"likelihood": "regression", "prior_precision": TAU, "noise_std": NOISE, **options}
    return fitted(model, x, y, **chosen)


def precision_of(posterior: LaplacePosterior, layer: str = "") -> Tensor:
    eigen = posterior.layers[layer]
    return posterior.likelihood_precision * dense(eigen) + posterior.prior_precision * torch.eye(
        eigen.eigenvalues.numel(), dtype=torch.float64
    )


# ------------------------------------------------------------------------------------------ Bayesian linear regression


@pytest.mark.parametrize("curvature", ["kfac", "ekfac", "dense"])
def test_linear_regression_has_its_exact_posterior(curvature: str) -> None:
    """N(W | MAP, (X^T X / s^2 + tau)^-1), independent rows."""
    model, x, y = linear_regression()
    features = with_ones(x)
    row = features.T @ features / NOISE**2 + TAU * torch.eye(4, dtype=torch.float64)
    posterior = regression_posterior(model, x, y, curvature=curvature)
    close(precision_of(posterior), torch.block_diag(row, row), 1e-13)
    new = normal(5, 3, seed=7)
    found = posterior.predict(new)
    variance = torch.einsum("bi,ij,bj->b", with_ones(new), torch.linalg.inv(row), with_ones(new))
    mean, covariance = posterior.linearize(new)
    close(mean, model(new), 1e-14)
    close(covariance, variance[:, None, None] * torch.eye(2, dtype=torch.float64), 1e-12)
    assert found.noise_std == NOISE


@pytest.mark.protects("evidence_sign")
def test_the_evidence_is_exact_at_the_map() -> None:
    """Laplace's method is exact for a Gaussian: the MAP of any tau and noise gives the evidence of that pair."""
    for tau, noise in ((2.0, 0.5), (0.1, 0.5), (30.0, 1.7)):
        model, x, y = linear_regression(tau, noise)
        posterior = regression_posterior(model, x, y, prior_precision=tau, noise_std=noise)
        expected = exact_log_evidence(with_ones(x), y, tau, noise)
        assert posterior.log_marginal_likelihood == pytest.approx(expected, rel=0, abs=1e-8)


def test_tuned_precision_and_noise_maximise_the_exact_evidence() -> None:
    """Retrained under what was found until nothing changes, they are the maximum of the exact evidence."""
    x, y = regression_data(count=30)
    tau, noise = 1.0, 1.0
    for _ in range(60):
        model = at_the_map(x, y, tau, noise)
        posterior = regression_posterior(model, x, y, prior_precision="marglik", noise_std=None)
        tau, noise = float(posterior.prior_precision), posterior.noise_std  # type: ignore[arg-type]
    best = exact_log_evidence(with_ones(x), y, tau, noise)
    assert posterior.log_marginal_likelihood == pytest.approx(best, rel=0, abs=1e-6)
    log_tau, log_noise = (torch.tensor(math.log(v), dtype=torch.float64, requires_grad=True) for v in (tau, noise))
    features, count = with_ones(x), len(x)
    covariance = features @ features.T / log_tau.exp() + (2 * log_noise).exp() * torch.eye(count, dtype=torch.float64)
    density = torch.distributions.MultivariateNormal(torch.zeros(count, dtype=torch.float64), covariance)
    slopes = torch.autograd.grad(density.log_prob(y.T).sum(), (log_tau, log_noise))
    assert max(abs(float(slope)) for slope in slopes) < 1e-5
    for other in ((tau * 1.1, noise), (tau / 1.1, noise), (tau, noise * 1.05), (tau, noise / 1.05)):
        assert exact_log_evidence(features, y, *other) < best


def test_predictive_covariance_formula() -> None:
    """S = J P^-1 J^T with P dense and J by autograd, for a hidden layer too."""
    model = built(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
    x, y = regression_data()
    posterior = regression_posterior(model, x, y)
    new, expected = normal(5, 3, seed=7), torch.zeros(5, 2, 2, dtype=torch.float64)
    for layer in posterior.layers:
        covariance = torch.linalg.inv(precision_of(posterior, layer))
        rows = torch.stack(jacobian(model, layer, new)).flatten(2)
        expected += torch.einsum("bcp,pq,bdq->bcd", rows, covariance, rows)
    close(posterior.linearize(new)[1], expected, 1e-12)


# --------------------------------------------------------------------------------------------------- softmax regression


def softmax_regression(weight: Tensor, **options: object) -> tuple[LaplacePosterior, nn.Module, Tensor, Tensor]:
    x, y = normal(30, 4, seed=1), classes(30)
    model = nn.Linear(4, 3, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(weight)
    return fitted(model, x, y, **{"curvature": "kfac", **options}), model, x, y


def test_kfac_is_exact_for_constant_probabilities() -> None:
    """At W = 0 the loss Hessian is the same for every example, so the sum of products is a product of sums."""
    posterior, model, x, y = softmax_regression(torch.zeros(3, 4))
    close(dense(posterior.layers[""]), ggn(model, "", x, y), 1e-13)


def test_kfac_differs_elsewhere_and_the_ggn_is_the_hessian() -> None:
    posterior, model, x, y = softmax_regression(normal(3, 4, seed=2))
    exact = ggn(model, "", x, y)
    full, *_ = softmax_regression(normal(3, 4, seed=2), curvature="dense")

    def loss(weight: Tensor) -> Tensor:
        return nn.functional.cross_entropy(x @ weight.T, y, reduction="sum")

    hessian = torch.autograd.functional.hessian(loss, model.weight.detach()).reshape(12, 12)
    close(exact, hessian, 1e-13)
    close(dense(full.layers[""]), hessian, 1e-13)
    assert error(dense(posterior.layers[""]), exact) > 0.1


def test_one_example_and_equal_inputs_are_exact() -> None:
    """One position of one example; or a_n the same for all: no expectation of products is split."""
    model = nn.Linear(4, 3).double()
    for x, y in ((normal(1, 4), classes(1)), (normal(1, 4).expand(7, 4).contiguous(), classes(7))):
        close(dense(fitted(model, x, y, curvature="kfac").layers[""]), ggn(model, "", x, y), 1e-13)


def test_ekfac_is_the_best_diagonal_in_its_basis() -> None:
    """Lam = diag(U^T F U): the trace is exact and the error is at most KFAC's."""
    posterior, model, x, y = softmax_regression(normal(3, 4, seed=2))
    corrected, *_ = softmax_regression(normal(3, 4, seed=2), curvature="ekfac")
    exact, kfac, ekfac = ggn(model, "", x, y), posterior.layers[""], corrected.layers[""]
    u = basis(ekfac)
    close(ekfac.eigenvalues.flatten(), (u.T @ exact @ u).diagonal(), 1e-13)
    close(dense(ekfac).trace(), exact.trace(), 1e-13)
    assert error(dense(ekfac), exact) < error(dense(kfac), exact)


# ------------------------------------------------------------------------------------------------------ one Gaussian


@pytest.mark.protects("damping_split")
def test_determinant_marginals_and_the_damping_split() -> None:
    """The split (G + sqrt(tau)/pi)(x)(A + pi sqrt(tau)) has the cross terms too: P' > P understates the variance."""
    posterior, *_ = softmax_regression(normal(3, 4, seed=2), prior_precision=0.7)
    eigen, precision = posterior.layers[""], precision_of(posterior)
    covariance = torch.linalg.inv(precision)
    close(eigen.log_determinant(0.7), torch.linalg.slogdet(precision).logabsdet, 1e-13)
    (marginal,) = posterior.variances().values()
    close(marginal.flatten(), covariance.diagonal(), 1e-13)
    x = normal(30, 4, seed=1)
    inputs = x.T @ x / 30
    p = (x @ normal(3, 4, seed=2).T).softmax(-1)
    gradients = torch.diag(p.sum(0)) - p.T @ p
    pi = math.sqrt(float((inputs.trace() / 4) / (gradients.trace() / 3)))
    damped = torch.kron(
        gradients + math.sqrt(0.7) / pi * torch.eye(3), inputs + pi * math.sqrt(0.7) * torch.eye(4, dtype=torch.float64)
    )
    assert float(torch.linalg.eigvalsh(damped - precision).min()) > 0
    assert float(torch.linalg.inv(damped).trace() / covariance.trace()) < 0.9


@pytest.mark.protects("draw_covariance")
def test_draws_have_the_posterior_covariance() -> None:
    """n = 2e5 draws: an entry of the empirical covariance has variance (S_ii S_jj + S_ij^2) / n; within 5 of its sd.

    78 entries at 5 sigma fail by chance 5e-5 of the time.
    """
    posterior, *_ = softmax_regression(normal(3, 4, seed=2), prior_precision=0.7)
    eigen, count = posterior.layers[""], 200_000
    covariance = torch.linalg.inv(precision_of(posterior))
    rows = eigen.draw(normal(count, 1, 3, 4, seed=2), 0.7).flatten(1)
    marginal = covariance.diagonal()
    allowed = 5 * ((torch.outer(marginal, marginal) + covariance.square()) / count).sqrt()
    assert bool(((rows.T @ rows / count - covariance).abs() < allowed).all())


# ------------------------------------------------------------------------------------------------ deep linear networks


class Linears(nn.Module):
    """Two Linears without an activation, then a pooling over positions (or none)."""

    def __init__(self, pooling: str) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 5), nn.Linear(5, 2)
        self.pooling = pooling

    def forward(self, x: Tensor, attention_mask: Tensor) -> SequenceClassifierOutput:
        f = self.second(self.first(x))
        weight = attention_mask[..., None].to(f.dtype)
        if self.pooling == "mean":
            f = (f * weight).sum(1) / weight.sum(1)
        if self.pooling == "first":
            f = f[:, 0]
        if self.pooling == "none":
            f = f * weight  # so that padding has no curvature
        return SequenceClassifierOutput(logits=f)


def block_errors(pooling: str, lengths: tuple[int, ...], sharing: str) -> list[float]:
    """Errors of both layers' blocks; padding holds other numbers than 0."""
    model, count = built(Linears(pooling), seed=5), len(lengths)
    mask = (torch.arange(4) < torch.tensor(lengths)[:, None]).long()
    inputs = {"x": normal(count, 4, 3, seed=5), "attention_mask": mask}
    posterior = fitted(model, inputs, likelihood="regression", weight_sharing=sharing, curvature="kfac")
    labels = torch.zeros_like(outputs_of(model, inputs))
    return [
        error(dense(eigen), ggn(model, layer, inputs, labels, "regression"))
        for layer, eigen in posterior.layers.items()
    ]


@pytest.mark.parametrize("lengths", [(4,) * 6, (4, 2, 1, 3, 4, 2)])
def test_deep_linear_networks_are_exact(lengths: tuple[int, ...]) -> None:
    """Expand where every position has a loss term, reduce where positions are averaged to one; padding is masked."""
    assert max(block_errors("none", lengths, "expand")) < 1e-13
    assert min(block_errors("none", lengths, "reduce")) > 0.1
    assert max(block_errors("mean", lengths, "reduce")) < 1e-13
    assert min(block_errors("mean", lengths, "expand")) > 0.1


def test_a_first_token_head_is_neither() -> None:
    assert min(block_errors("first", (4,) * 6, "expand")) > 0.1
    assert min(block_errors("first", (4,) * 6, "reduce")) > 0.1


@pytest.mark.protects("no_n")
def test_fit_takes_the_whole_dataset_as_the_sum() -> None:
    """G is a sum over data: twice the data is twice the curvature."""
    model, x, y = linear_regression()
    once = regression_posterior(model, x, y)
    twice = fit(
        model,
        [(x, y), (x, y)],
        likelihood="regression",
        prior_precision=TAU,
        noise_std=NOISE,
        curvature="kfac",
        **QUIET,
    )
    close(dense(twice.layers[""]), 2 * dense(once.layers[""]), 1e-13)
