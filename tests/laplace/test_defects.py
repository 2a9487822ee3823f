"""Laplace posteriors: each property against the formula that broke it elsewhere, in float64 with dense matrices.

Notation: P = G + tau the posterior's precision, P = L L^T; G = sum_n J_n^T H_n J_n the curvature of N examples.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from bayeformers.laplace import LaplacePosterior, draw_along, eigen_direction, fit
from tests.laplace.networks import Twice, batches, built, classes, fitted, mlp, reader, regression_data, text
from tests.laplace.reference import (
    basis,
    close,
    dense,
    empirical_fisher,
    exact_log_evidence,
    ggn,
    normal,
    outputs_of,
)

TAU = 0.7


def softmax_regression() -> tuple[LaplacePosterior, nn.Module, Tensor, Tensor]:
    """A Linear on 30 examples with KFAC."""
    model, x, y = nn.Linear(4, 3, bias=False).double(), normal(30, 4, seed=1), classes(30)
    with torch.no_grad():
        model.weight.copy_(normal(3, 4, seed=2))
    return fitted(model, x, y, curvature="kfac", prior_precision=TAU), model, x, y


def precision_of(posterior: LaplacePosterior, layer: str = "") -> Tensor:
    """P, dense."""
    curvature = posterior.likelihood_precision * dense(posterior.layers[layer])
    return curvature + posterior.prior_precision * torch.eye(len(curvature), dtype=torch.float64)


def linear_regression() -> tuple[LaplacePosterior, Tensor, float, float]:
    """A Linear without bias at its MAP; its inputs, noise and prior precision."""
    (x, y), noise, tau = regression_data(), 0.5, 2.0
    model = nn.Linear(3, 2, bias=False).double()
    with torch.no_grad():
        precision = x.T @ x / noise**2 + tau * torch.eye(3, dtype=torch.float64)
        model.weight.copy_(torch.linalg.solve(precision, x.T @ y / noise**2).T)
    options = {"likelihood": "regression", "noise_std": noise, "prior_precision": tau}
    return fitted(model, x, y, **options), x, noise, tau


# ---------------------------------------------------------------------------------------------------------- covariances


@pytest.mark.protects("inverse_of_factor")
def test_inverse_of_factor() -> None:
    """The covariance is (L L^T)^-1; (L^T L)^-1 is another matrix."""
    posterior, *_ = softmax_regression()
    precision = precision_of(posterior)
    eigen, lower = posterior.layers[""], torch.linalg.cholesky(precision)

    def check(covariance: Tensor) -> None:
        close(covariance @ precision, torch.eye(12, dtype=torch.float64), 1e-10)

    columns = [eigen.covariance_product(unit.reshape(1, 3, 4), TAU).flatten() for unit in torch.eye(12).double()]
    check(torch.stack(columns, 1))
    with pytest.raises(AssertionError):
        check(torch.linalg.inv(lower.T @ lower))


@pytest.mark.protects("draw_covariance")
def test_draw_covariance() -> None:
    """A draw is A z with A A^T = P^-1, read off by unit noise; z A has covariance A^T A."""
    posterior, *_ = softmax_regression()
    covariance = torch.linalg.inv(precision_of(posterior))
    root = torch.linalg.cholesky(covariance)

    def check(draw: Callable[[Tensor], Tensor]) -> None:
        a = torch.stack([draw(z) for z in torch.eye(12, dtype=torch.float64)], 1)
        close(a @ a.T, covariance, 1e-10)

    check(lambda z: posterior.layers[""].draw(z.reshape(1, 3, 4), TAU).flatten())
    with pytest.raises(AssertionError):
        check(lambda z: z @ root)


@pytest.mark.protects("damping_split")
def test_damping_split() -> None:
    """tau is added to the product; (G + sqrt(tau) / pi) (x) (A + pi sqrt(tau)) has cross terms: a smaller variance."""
    posterior, _, x, _ = softmax_regression()
    exact = torch.linalg.inv(precision_of(posterior)).diagonal()

    def check(variances: Tensor) -> None:
        close(variances.flatten(), exact, 1e-10)

    (found,) = posterior.variances().values()
    check(found)
    p, inputs = (x @ normal(3, 4, seed=2).T).softmax(-1), x.T @ x / len(x)
    gradients = torch.diag(p.sum(0)) - p.T @ p
    pi = math.sqrt(float((inputs.trace() / 4) / (gradients.trace() / 3)))
    eye = [torch.eye(n, dtype=torch.float64) for n in (3, 4)]
    split = torch.kron(gradients + math.sqrt(TAU) / pi * eye[0], inputs + pi * math.sqrt(TAU) * eye[1])
    with pytest.raises(AssertionError):
        check(torch.linalg.inv(split).diagonal())


def check_precision(precision: Tensor) -> None:
    """X^T X / s^2 + tau for each of the two outputs of `linear_regression`."""
    _, x, noise, tau = linear_regression()
    row = x.T @ x / noise**2 + tau * torch.eye(3, dtype=torch.float64)
    close(precision, torch.block_diag(row, row), 1e-12)


@pytest.mark.protects("no_prior")
def test_no_prior() -> None:
    """The precision of a linear model is X^T X / s^2 + tau; without tau it is the likelihood's alone."""
    posterior = linear_regression()[0]
    check_precision(precision_of(posterior))
    with pytest.raises(AssertionError):
        check_precision(posterior.likelihood_precision * dense(posterior.layers[""]))


@pytest.mark.protects("no_n")
def test_no_n() -> None:
    """The curvature is a sum over the N examples; a mean over them understates it N times."""
    posterior, x, _, tau = linear_regression()
    check_precision(precision_of(posterior))
    with pytest.raises(AssertionError):
        check_precision(
            posterior.likelihood_precision * dense(posterior.layers[""]) / len(x)
            + tau * torch.eye(6, dtype=torch.float64)
        )


# ------------------------------------------------------------------------------------------------------------ curvature


def full(model: nn.Module, inputs: Tensor, labels: Tensor, *sizes: int, layer: str = "") -> Tensor:
    """The dense GGN of one layer as fitted to batches of the given sizes (by default one of all)."""
    loader = batches(inputs, labels, *sizes)
    return dense(fit(model, loader, curvature="dense", prior_precision=1.0, progress=False).layers[layer])


@pytest.mark.protects("eval_mode")
def test_eval_mode() -> None:
    """A fit to a model in `train()` is of the model without dropout."""
    model = built(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3)))
    x, y = normal(6, 4, seed=1), classes(6)
    expected = ggn(model, "3", x, y)

    def check(curvature: Tensor) -> None:
        close(curvature, expected, 1e-10)

    check(full(model.train(), x, y, layer="3"))
    torch.manual_seed(0)
    with pytest.raises(AssertionError):
        check(ggn(model.train(), "3", x, y))


@pytest.mark.protects("exact_fisher")
def test_exact_fisher() -> None:
    """The curvature is the expectation over the model's own labels; the empirical Fisher matrix is not it."""
    model, x, y = mlp(), normal(6, 4, seed=1), classes(6)
    expected = ggn(model, "2", x, y)

    def check(curvature: Tensor) -> None:
        close(curvature, expected, 1e-10)

    check(full(model, x, y, layer="2"))
    check(full(model, x, (y + 1) % 3, layer="2"))  # whatever the labels are
    with pytest.raises(AssertionError):
        check(empirical_fisher(model, "2", x, y, "classification"))


class TokensPooled(nn.Module):
    """A Linear on every token, tanh, the mean over tokens, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(torch.tanh(self.layer(x)).mean(1))
        return output


@pytest.mark.protects("three_dim_inputs")
def test_three_dim_inputs() -> None:
    """A layer on (B, T, d) has a curvature; products written for (B, d) raise."""
    model, x, y = built(TokensPooled()), normal(5, 3, 4, seed=1), classes(5)

    def check(curvature: Callable[[], Tensor]) -> None:
        close(curvature(), ggn(model, "layer", x, y), 1e-10)

    check(lambda: full(model, x, y, layer="layer"))
    with pytest.raises(RuntimeError):
        check(lambda: torch.kron(x.t() @ x, x.t() @ x))


@pytest.mark.protects("every_token_counts")
def test_every_token_counts() -> None:
    """All tokens' gradients and inputs enter; those of the last token alone are another curvature."""
    model, x, y = built(TokensPooled()), normal(5, 3, 4, seed=1), classes(5)

    def check(curvature: Tensor) -> None:
        close(curvature, ggn(model, "layer", x, y), 1e-10)

    class LastToken(TokensPooled):
        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.tanh(self.layer(x))
            seen = torch.cat([hidden[:, :-1].detach(), hidden[:, -1:]], 1)
            output: Tensor = self.head(seen.mean(1))
            return output

    last = LastToken().double()
    last.load_state_dict(model.state_dict())
    check(full(model, x, y, layer="layer"))
    with pytest.raises(AssertionError):
        check(full(last, x, y, layer="layer"))


@pytest.mark.protects("batch_size_one")
def test_batch_size_one() -> None:
    """Batches of one example sum to the batch of all; a squeezed batch axis turns a product into a number."""
    model, x, y = mlp(), normal(4, 4, seed=1), classes(4)

    def check(curvature: Tensor) -> None:
        close(curvature, ggn(model, "2", x, y), 1e-10)

    check(full(model, x, y, 1, 1, 1, 1, layer="2"))
    features = torch.tanh(model[0](x)).detach()
    with pytest.raises(AssertionError):
        check(sum((one.squeeze() @ one.squeeze() for one in features.split(1)), torch.zeros(())))


@pytest.mark.protects("padding_adds_no_curvature")
def test_padding_adds_no_curvature() -> None:
    """The input factor of a layer is the sum of a a^T over attended positions; padding has inputs too, which stay out.

    A is read off F = G (x) A as its partial trace, and compared up to the trace.
    """
    model, inputs, y = reader(), text(), classes(6)
    eigen = fitted(model, inputs, y, curvature="kfac").layers["value"]
    found = torch.einsum("oioj->ij", dense(eigen).reshape(4, 5, 4, 5))
    a = model.table(inputs["input_ids"]).detach()
    a = torch.cat([a, torch.ones_like(a[..., :1])], -1)

    def check(rows: Tensor) -> None:
        expected = rows.T @ rows
        close(found / found.trace(), expected / expected.trace(), 1e-10)

    check(a[inputs["attention_mask"].bool()])
    with pytest.raises(AssertionError):
        check(a.flatten(0, 1))


@pytest.mark.protects("tied_curvature")
def test_tied_curvature() -> None:
    """A weight in two layers is one tensor whose Jacobian is the sum over both uses, not two tensors."""
    model, x = built(Twice()), normal(5, 4)
    y = classes(5, outputs=4)

    def check(curvature: Tensor) -> None:
        close(curvature, ggn(model, "first", x, y), 1e-10)

    check(full(model, x, y, layer="first"))
    apart = built(Twice())
    apart.second.weight = nn.Parameter(apart.first.weight.detach().clone())
    apart.second.bias = nn.Parameter(apart.first.bias.detach().clone())
    with pytest.raises(AssertionError):
        check(ggn(apart, "first", x, y) + ggn(apart, "second", x, y))


# --------------------------------------------------------------------------------------------- predictions and evidence


@pytest.mark.protects("jvp_not_finite_difference")
def test_jvp_not_finite_difference() -> None:
    """The linearised covariance in float32 is float64's to 1e-4; differences with a step of 1e-6 are far off.

    float32 resolves an output of size 1 to 6e-8, so such a difference quotient to 6 % at best.
    """
    model, x, y = mlp(), normal(6, 4, seed=1), classes(6)
    posterior = fitted(model, x, y, curvature="diagonal", target_modules="2")
    exact = posterior.linearize(x)[1]

    def check(covariance: Tensor) -> None:
        close(covariance.double(), exact, 1e-4)

    single = mlp().float()
    check(fitted(single, x.float(), y, curvature="diagonal", target_modules="2").linearize(x.float())[1])
    start, columns = outputs_of(single, x.float()), []
    for name, variance in zip(("weight", "bias"), posterior.variances().values(), strict=True):
        parameter = single[2].get_parameter(name)
        for index in range(parameter.numel()):
            with torch.no_grad():
                kept = parameter.clone()
                parameter.view(-1)[index] += 1e-6
                slope = (outputs_of(single, x.float()) - start) / 1e-6
                parameter.copy_(kept)
            columns.append(slope.double() * variance.flatten()[index].sqrt())
    rows = torch.stack(columns, -1)
    with pytest.raises(AssertionError):
        check(rows @ rows.mT)


@pytest.mark.protects("eigen_draw")
def test_eigen_draw() -> None:
    """A draw along a direction moves the weights on that line alone; a plain draw moves them everywhere."""
    posterior, model, *_ = softmax_regression()
    direction = eigen_direction(posterior, 2)
    (v,) = (value.flatten() for value in direction.parameters.values())

    def check(moved: Tensor) -> None:
        step = (moved - model.weight.detach()).flatten()
        close(torch.outer(v, v) @ step, step, 1e-10)

    with draw_along(posterior, direction, index=0):
        along = model.weight.detach().clone()
    with posterior.draw(0):
        plain = model.weight.detach().clone()
    check(along)
    with pytest.raises(AssertionError):
        check(plain)


@pytest.mark.protects("eigen_draw")
def test_first_direction_is_the_least_determined() -> None:
    """Rank 0 has the largest posterior variance; the largest eigenvalue of the curvature has the smallest."""
    posterior, *_ = softmax_regression()
    eigen, covariance = posterior.layers[""], torch.linalg.inv(precision_of(posterior))

    def check(v: Tensor) -> None:
        close(v @ covariance @ v, torch.linalg.eigvalsh(covariance)[-1], 1e-10)

    (found,) = eigen_direction(posterior, 0).parameters.values()
    check(found.flatten())
    with pytest.raises(AssertionError):
        check(basis(eigen)[:, int(eigen.eigenvalues.flatten().argmax())])


@pytest.mark.protects("evidence_sign")
def test_evidence_sign() -> None:
    """The evidence of a linear model at its MAP is exact; with the determinants' sign flipped it is not."""
    posterior, x, noise, tau = linear_regression()
    model, (_, y) = posterior.model, regression_data()
    expected = exact_log_evidence(x, y, tau, noise)

    def check(evidence: float) -> None:
        assert evidence == pytest.approx(expected, rel=0, abs=1e-8)

    check(posterior.log_marginal_likelihood)
    log_likelihood = torch.distributions.Normal(model(x), noise).log_prob(y).sum()
    ratio = torch.linalg.slogdet(precision_of(posterior) / tau).logabsdet
    flipped = log_likelihood - 0.5 * tau * model.weight.square().sum() + 0.5 * ratio
    with pytest.raises(AssertionError):
        check(float(flipped.detach()))
