"""SNGP: its kernel, its exact Gaussian process, its Laplace precision by brute force, and the spectra of its layers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bayeformers.heads import (
    HeadPosterior,
    RandomFeatureHead,
    SNGPConfig,
    fit_covariance,
    head_of,
    project_spectra,
    to_sngp,
)
from bayeformers.heads.spectral import spectral_norm
from bayeformers.likelihoods import get_likelihood
from tests.training import tiny


def head(size: int, width: int = 3, outputs: int = 2, *, regresses: bool = False, **options: Any) -> RandomFeatureHead:
    config = SNGPConfig(num_features=size, **options)
    made = RandomFeatureHead(width, outputs, config, is_regression=regresses, dtype=torch.float64)
    made.reset()
    return made


def kernel(one: Tensor, other: Tensor, length_scale: float, variance: float) -> Tensor:
    return variance * (-torch.cdist(one, other).square() / (2 * length_scale**2)).exp()


def test_kernel() -> None:
    """Each of 1,024 terms 2 cos cos is in [-2, 2]: by Hoeffding |error| > .4 has p < 2 exp(-1024 .4^2 / 8) = 3e-9."""
    features = torch.randn(20, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    layer = head(1024, length_scale=0.8, kernel_variance=2.5, normalize=False)
    phi = layer.random_features(features)
    error = phi @ phi.T / 1024 - kernel(features, features, 0.8, 1.0)
    assert error.abs().max() < 0.4
    torch.testing.assert_close(layer.variance(features)[:, 0], 2.5 * phi.square().mean(1))  # the prior's
    normalised = head(64).random_features(5 * features + 7)  # whatever the location and scale
    torch.testing.assert_close(normalised, head(64).random_features(features), rtol=1e-3, atol=1e-3)


def test_gaussian_process_is_exact() -> None:
    """The GP of the features' kernel has mean k* (K + s^2 I)^-1 y and covariance k** - k* (K + s^2 I)^-1 k*."""
    noise, size, generator = 0.4, 8, torch.Generator().manual_seed(0)
    layer = head(size, outputs=1, regresses=True, noise_std=noise, kernel_variance=1.7, length_scale=1.1)
    train, test = (torch.randn(n, 3, dtype=torch.float64, generator=generator) for n in (15, 6))
    labels = torch.randn(15, dtype=torch.float64, generator=generator)
    layer.set_precision(layer.curvature(train), 15)

    def loss() -> Tensor:
        values, _ = layer.item_nll(train, {"labels": labels}, get_likelihood("regression"))
        return values.sum() + layer.penalty()

    gradient = torch.autograd.grad(loss(), layer.weight)[0]  # of a quadratic: Newton's step from 0 is the optimum
    with torch.no_grad():
        layer.weight.sub_(torch.linalg.solve(layer.precision, gradient[0]))
    assert torch.autograd.grad(loss(), layer.weight)[0].abs().max() < 1e-10

    phi, phi_test = (layer.random_features(rows) * math.sqrt(1.7 / size) for rows in (train, test))
    gram = phi @ phi.T + noise**2 * torch.eye(15)
    cross = phi_test @ phi.T
    mean = cross @ torch.linalg.solve(gram, labels)
    covariance = phi_test @ phi_test.T - cross @ torch.linalg.solve(gram, cross.T)
    torch.testing.assert_close(layer.mean(test)[:, 0].detach(), mean)
    torch.testing.assert_close(layer.variance(test)[:, 0].detach(), covariance.diagonal())
    # and the draws of the weights are those of that process: 2,000 of them, white to 5 standard errors
    draws = torch.stack([next(iter(layer.sampled(i, 0)))[1][0] for i in range(2000)])
    white = (draws - layer.weight[0].detach()) @ torch.linalg.cholesky(layer.precision)
    assert white.mean(0).abs().max() < 5 / 2000**0.5
    assert (torch.cov(white.T) - torch.eye(size)).abs().max() < 5 * (2 / 2000) ** 0.5


def made(kind: str, *, trained: bool = True, **options: Any) -> Any:
    """A tiny model in float64, with weights of the head that are not 0."""
    model = to_sngp(tiny.plain(kind).double().eval(), num_features=12, **options)
    if trained:
        with torch.no_grad():
            generator = torch.Generator().manual_seed(3)
            weight = head_of(model).weight
            weight.copy_(torch.randn(weight.shape, dtype=torch.float64, generator=generator))
    return model


def batches(kind: str, count: int = 10, size: int = 4) -> list[dict[str, Tensor]]:
    columns = tiny.dataset(kind, count).columns
    return [{name: column[i : i + size] for name, column in columns.items()} for i in range(0, count, size)]


def pooled(model: Any, batch: dict[str, Tensor], kind: str) -> Tensor:
    """What the classifier reads, by the model's own parts."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        output = model.bert(**inputs)
    return output.last_hidden_state if kind == "token" else output.pooler_output  # type: ignore[no-any-return]


@pytest.mark.parametrize("covariance", ["shared", "per_class"])
@pytest.mark.parametrize("kind", ["single", "multi", "token", "regression"])
def test_precision_by_brute_force(kind: str, covariance: str) -> None:
    """Item by item, class by class; padding tokens and ignored labels do not count."""
    model, data = made(kind, covariance=covariance, kernel_variance=2.0), batches(kind)
    if kind == "single":
        data[1]["labels"][2] = -100
    before = {name: value.clone() for name, value in model.state_dict().items()}
    posterior, layer = fit_covariance(model, data), head_of(model)
    assert isinstance(layer, RandomFeatureHead) and isinstance(posterior, HeadPosterior)
    outputs = layer.out_features
    expected = [6.0 * torch.eye(12, dtype=torch.float64) for _ in range(outputs)]
    shared, count = 6.0 * torch.eye(12, dtype=torch.float64), 0
    for batch in data:
        features = pooled(model, batch, kind)
        keep = batch["labels"] != -100 if kind in ("token", "single") else torch.ones(len(features), dtype=torch.bool)
        for row in features[keep]:
            phi = layer.random_features(row)
            logits = layer.weight.detach() @ phi
            p = logits.sigmoid() if kind == "multi" else logits.softmax(0)
            weights = [1 / layer.noise_variance.item()] if kind == "regression" else (p * (1 - p)).tolist()
            for k, weight in enumerate(weights):
                expected[k] = expected[k] + weight * torch.outer(phi, phi)
            shared, count = shared + max(weights) * torch.outer(phi, phi), count + 1
    found = torch.stack(expected) if covariance == "per_class" and kind != "regression" else shared
    torch.testing.assert_close(layer.precision, found)
    assert int(layer.num_fitted) == count
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"classifier.precision", "classifier.num_fitted"}


def test_prediction_in_one_pass() -> None:
    """Gaussian logits of one forward of the encoder; the mean-field logits of Lu et al. 2020 are a link."""
    model, batch = made("single", covariance="per_class"), batches("single")[0]
    posterior = fit_covariance(model, batches("single"))
    calls: list[int] = []
    handle = model.bert.register_forward_hook(lambda *_: calls.append(1))
    predictive = posterior.predict(batch, link="probit_diagonal")
    handle.remove()
    assert len(calls) == 1
    layer = head_of(model)
    phi = layer.random_features(pooled(model, batch, "single"))
    mean = phi @ layer.weight.detach().T
    variance = torch.einsum("bd,cde,be->bc", phi, torch.linalg.inv(layer.precision), phi)
    torch.testing.assert_close(predictive.logit_mean, mean)
    torch.testing.assert_close(predictive.logit_covariance, variance.diag_embed())
    torch.testing.assert_close(predictive.mean_log_probs, (mean / (1 + math.pi / 8 * variance).sqrt()).log_softmax(-1))
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, mean)


def test_variance_grows_off_the_data() -> None:
    """Relative to the prior's |phi|^2 / D: at most 1 / (1 + h |phi|^2 / D) at a training row, 1 far off the data."""
    layer = head(512, normalize=False, length_scale=0.3)
    train = torch.randn(20, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    layer.set_precision(layer.curvature(train), 20)
    near, far = (layer.variance(rows)[:, 0].detach() for rows in (train, train + 50))
    priors = [layer.random_features(rows).square().mean(1) for rows in (train, train + 50)]
    assert (near <= priors[0] / (1 + priors[0] / 4) + 1e-12).all()  # logits of 0 have h = p (1 - p) = 1/4
    assert (far / priors[1] > 0.9).all()


def test_no_covariance_yet(caplog: pytest.LogCaptureFixture) -> None:
    model, batch = made("single"), batches("single")[0]
    predictive = HeadPosterior(model).predict(batch)
    assert "no covariance yet" in caplog.text and not predictive.logit_covariance.any()  # type: ignore[union-attr]
    layer = head_of(model)
    assert isinstance(layer, RandomFeatureHead)
    fit_covariance(model, batches("single"))
    assert layer.is_fitted
    layer.forget()
    assert not layer.is_fitted and torch.equal(layer.precision, 12 * torch.eye(12, dtype=torch.float64))


# -- spectra ----------------------------------------------------------------------------------------------------------


def test_spectral_norm() -> None:
    """Within the rate of power iteration, (s_2 / s_1)^(2 n): of these spectra below 1e-4 when it has settled."""
    generator = torch.Generator().manual_seed(0)
    for shape in ((5, 5), (7, 3), (3, 7)):
        weight = torch.randn(shape, dtype=torch.float64, generator=generator)
        direction = torch.randn(shape[1], dtype=torch.float64, generator=generator)
        found, exact = spectral_norm(weight, direction), torch.linalg.matrix_norm(weight, 2)
        assert found <= exact * (1 + 1e-12)
        torch.testing.assert_close(found, exact, rtol=1e-4, atol=0)
    assert spectral_norm(torch.zeros(2, 2), torch.ones(2)) == 0


def test_projection() -> None:
    """To the bound where a norm is above it; below it, and of frozen layers, nothing changes; ties hold."""
    model = tiny.plain("single")
    layers = ["attention.self.query", "attention.self.key", "pooler.dense"]
    query, key = (model.bert.encoder.layer[0].attention.self.get_submodule(name) for name in ("query", "key"))
    key.weight = query.weight
    with torch.no_grad():
        model.bert.pooler.dense.weight.mul_(0.01)
    to_sngp(model, num_features=8, layers=layers, spectral_bound=0.7)
    assert head_of(model).config.spectral_layers == (  # type: ignore[attr-defined]
        "bert.encoder.layer.0.attention.self.query",
        "bert.encoder.layer.0.attention.self.key",
        "bert.pooler.dense",
    )
    small, layer = model.bert.pooler.dense.weight.detach().clone(), head_of(model)
    assert isinstance(layer, RandomFeatureHead) and torch.linalg.matrix_norm(query.weight, 2) > 1
    query.weight.requires_grad_(False)
    kept = query.weight.detach().clone()
    project_spectra(model, layer)
    assert torch.equal(query.weight, kept)
    query.weight.requires_grad_(True)
    project_spectra(model, layer)
    assert key.weight is query.weight and torch.equal(model.bert.pooler.dense.weight, small)
    assert torch.linalg.matrix_norm(query.weight.detach(), 2).item() == pytest.approx(0.7, rel=1e-4)
    model.bert.pooler.dense = nn.Identity()
    with pytest.raises(ValueError, match=r"names 'bert.pooler.dense', which is a Identity now"):
        project_spectra(model, layer)
