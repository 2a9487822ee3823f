"""The fitted posterior as a value: its Gaussian, its draws, what changes nothing, and its file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bayeformers.laplace import LaplacePosterior, example_gradients, fit, inner_products
from bayeformers.laplace.posterior import FILE
from bayeformers.linearized.blocks import block_draw
from bayeformers.linearized.methods import METHODS, SAMPLING, num_directions
from tests.laplace.networks import QUIET, batches, built, classes, fitted, mlp, reader, regression_data, text
from tests.laplace.reference import close, dense, jacobian, normal

KINDS = ("kfac", "ekfac", "diagonal", "dense")
each_kind = pytest.mark.parametrize("kind", KINDS)
LINEARIZED = [method for method in METHODS if method not in SAMPLING]


def posterior(kind: str = "kfac", **options: object) -> LaplacePosterior:
    return fitted(mlp(), normal(8, 4), classes(8), **{"curvature": kind, **options})


def weights(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def unchanged(model: nn.Module, before: list[Tensor]) -> bool:
    return all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_repr_says_what_it_is() -> None:
    assert repr(posterior()) == "LaplacePosterior(kfac, 2 layers, 43 weights, prior_precision=1)"
    assert repr(posterior(prior_precision={"0": 0.5, "2": 2.0})).endswith("prior_precision=0.5..2 per layer)")


# --------------------------------------------------------------------------------------------------------- the Gaussian


@each_kind
@pytest.mark.parametrize("prior_precision", [0.3, {"0": 0.3, "2": 4.0}])
def test_marginal_variances_are_those_of_the_dense_inverse(
    kind: str, prior_precision: float | dict[str, float]
) -> None:
    found = posterior(kind, prior_precision=prior_precision, temperature=0.5)
    variances = found.variances()
    for target in found.targets:
        tau = prior_precision if isinstance(prior_precision, float) else prior_precision[target.name]
        precision = 2 * dense(found.layers[target.name]) + tau * torch.eye(target.num_weights, dtype=torch.float64)
        parts = [variances[target.parameters["weight"]], variances[target.parameters["bias"]][:, None]]
        close(torch.cat(parts, 1).flatten(), torch.linalg.inv(precision).diagonal(), 1e-12)


@each_kind
def test_linearize_is_dense(kind: str) -> None:
    """Every form gives J P^-1 J^T, for tables and normalisations too."""
    model, inputs = reader(), text()
    found = fitted(model, inputs, classes(6), curvature=kind, target_modules=".+", prior_precision=0.7)
    expected = torch.zeros(6, 3, 3, dtype=torch.float64)
    for layer, eigen in found.layers.items():
        rows = torch.stack(jacobian(model, layer, inputs)).flatten(2)
        covariance = torch.linalg.inv(dense(eigen) + 0.7 * torch.eye(rows.shape[-1], dtype=torch.float64))
        expected += torch.einsum("bcp,pq,bdq->bcd", rows, covariance, rows)
    close(found.linearize(inputs)[1], expected, 1e-10)
    one = torch.cat([found.linearize({k: v[n : n + 1] for k, v in inputs.items()})[1] for n in range(6)])
    close(one, expected, 1e-10)  # an example's covariance does not depend on its batch


def test_other_settings_leave_the_curvature() -> None:
    first = posterior()
    changed = first.with_prior_precision(5.0).with_temperature(0.25)
    for layer, eigen in first.layers.items():
        assert changed.layers[layer] is eigen
    assert (first.prior_precision, first.temperature) == (1.0, 1.0)
    assert (changed.prior_precision, changed.temperature, changed.likelihood_precision) == (5.0, 0.25, 4.0)
    refitted = posterior(prior_precision=5.0, temperature=0.25)
    for p, q in zip(changed.variances().values(), refitted.variances().values(), strict=True):
        torch.testing.assert_close(p, q)
    assert changed.log_marginal_likelihood == pytest.approx(refitted.log_marginal_likelihood)
    per_layer = first.with_prior_precision({"0": 1.0, "2": 1.0})
    assert per_layer.log_marginal_likelihood == pytest.approx(first.log_marginal_likelihood, rel=1e-12)


def test_temperature_is_the_power_of_the_likelihood() -> None:
    """A posterior of twice the data is one of temperature 1/2."""
    model, x, y = mlp(), normal(8, 4), classes(8)
    twice = fit(model, [(x, y), (x, y)], prior_precision=1.0, curvature="kfac", **QUIET)
    cold = fitted(model, x, y, curvature="kfac", temperature=0.5)
    for p, q in zip(cold.variances().values(), twice.variances().values(), strict=True):
        torch.testing.assert_close(p, q)
    assert cold.log_marginal_likelihood == pytest.approx(twice.log_marginal_likelihood)


def test_noise_scales_the_curvature_of_a_regression() -> None:
    x, y = regression_data()
    model = built(nn.Linear(3, 2))
    first = fitted(model, x, y, likelihood="regression", noise_std=1.0)
    noisy = first.with_noise_std(2.0)
    assert noisy.likelihood_precision == 0.25 and noisy.recorded_noise_std() == 2.0
    density = torch.distributions.Normal(model(x).detach(), 2.0).log_prob(y).sum()
    assert noisy._log_likelihood() == pytest.approx(float(density))


def test_effective_parameters() -> None:
    first = posterior(prior_precision=0.5)
    for layer, gamma in first.effective_parameters.items():
        f = dense(first.layers[layer])
        expected = (f @ torch.linalg.inv(f + 0.5 * torch.eye(len(f), dtype=torch.float64))).trace()
        assert gamma == pytest.approx(float(expected))


def test_no_evidence_without_labels() -> None:
    unlabelled = fitted(mlp(), normal(8, 4), curvature="kfac", prior_precision="marglik")
    with pytest.raises(ValueError, match="The fit's data had no labels"):
        _ = unlabelled.log_marginal_likelihood
    labelled = posterior(prior_precision="marglik")
    assert unlabelled.prior_precision == pytest.approx(labelled.prior_precision)


# ---------------------------------------------------------------------------------------------------------------- draws


@each_kind
def test_draws_are_samples_of_the_gaussian(kind: str) -> None:
    """n = 2,000 draws: sample variances within 5 standard errors, variance sqrt(2 / n) relative; 43 of them."""
    found = posterior(kind)
    found.draw_cache_bytes = 0
    before, variances = weights(found.model), found.variances()
    sums = {parameter: torch.zeros_like(parameter) for parameter in variances}
    for index in range(2000):
        for parameter, moved in found._deviation(index, 0).items():
            sums[parameter] += moved.square()
    for parameter, variance in variances.items():
        assert float((sums[parameter].detach() / 2000 / variance - 1).abs().max()) < 5 * (2 / 2000) ** 0.5
    assert unchanged(found.model, before)


@each_kind
def test_a_draw_comes_and_goes(kind: str) -> None:
    found = posterior(kind)
    before, names = weights(found.model), [name for name, _ in found.model.named_parameters()]
    with found.draw(3):
        first = weights(found.model)
        assert not any(torch.equal(p, q) for p, q in zip(first, before, strict=True)), names
    assert unchanged(found.model, before)
    with pytest.raises(RuntimeError, match="inside"), found.draw(3):
        raise RuntimeError("inside")
    assert unchanged(found.model, before)
    again = posterior(kind)  # another object: the same draws
    with again.draw(3):
        assert unchanged(again.model, first)
    with again.draw(3, seed=1):
        assert not unchanged(again.model, first)
    with pytest.raises(ValueError, match="`index` must be in"), found.draw(-1):
        pass
    with pytest.raises(TypeError, match="`seed` must be a whole number"), found.draw(0, 0.5):  # type: ignore[arg-type]
        pass


def test_draws_nest() -> None:
    found = posterior()
    before = weights(found.model)
    with found.draw(0):
        outer = weights(found.model)
        with found.mean(), found.draw(1):
            assert not unchanged(found.model, outer)
        assert unchanged(found.model, outer)
    assert unchanged(found.model, before)


def test_the_cache_holds_what_its_limit_allows() -> None:
    found = posterior()
    size = 43 * 8
    found.draw_cache_bytes = 2 * size
    for index in range(4):
        first = found._deviation(index, 0)
        again = found._deviation(index, 0)
        for parameter, moved in first.items():
            assert torch.equal(again[parameter], moved)
    assert len(found._cache) == 2
    assert found.with_prior_precision(2.0)._cache == {}


def test_a_padding_row_is_not_random() -> None:
    model = built(nn.Sequential(nn.Embedding(6, 4, padding_idx=2), nn.Flatten(), nn.Linear(12, 3)))
    ids = torch.tensor([[0, 2, 1], [4, 3, 2]])
    for kind in KINDS:
        found = fitted(model, ids, classes(2), curvature=kind, target_modules=["0"])
        row = model[0].weight[2].clone()
        with found.draw(0):
            assert torch.equal(model[0].weight[2], row)
            assert not torch.equal(model[0].weight[0], found.layers["0"].eigenvalues.new_zeros(4))
        assert float(found.variances()[model[0].weight][2].abs().max()) == 0
        (block,) = found.blocks()
        if not block.is_flat:  # whose coordinates are no rows of the table
            assert float(block.variances()[..., 2, :].abs().max()) == 0
            assert float(block_draw(block, 0, 0)[0, 2].abs().max()) == 0
            assert num_directions([block]) == 5 * 4
            assert bool((block.variances()[..., [0, 1, 3, 4, 5], :] > 0).all())


@each_kind
@pytest.mark.parametrize(("fitted_in", "cast_to"), [(torch.float32, torch.float64), (torch.float64, torch.float32)])
def test_the_model_may_be_cast_after_the_fit(kind: str, fitted_in: torch.dtype, cast_to: torch.dtype) -> None:
    """Every method computes in the model's own dtype, and gives the covariance of a softmax's logits in float64; what
    the curvature lost in float32 stays lost."""
    model, x = mlp().to(fitted_in), normal(8, 4)
    found = fitted(model, x.to(fitted_in), classes(8), curvature=kind)
    options = {"num_samples": 3, "seed": 1}
    expected = {method: found.linearize(x.to(fitted_in), method=method, **options)[1] for method in LINEARIZED}
    model.to(cast_to)
    for method in LINEARIZED:
        covariance = found.linearize(x.to(cast_to), method=method, **options)[1]
        assert covariance.dtype == torch.float64
        close(covariance.double(), expected[method].double(), 2e-3)  # float32 takes `FAST_TOLERANCE` = 1e-3
    assert {value.dtype for value in found.variances().values()} == {cast_to}
    gradients = example_gradients(found, x.to(cast_to), classes(8))
    assert inner_products(found, gradients, gradients).dtype == cast_to
    with found.draw(0):
        assert model(x.to(cast_to)).dtype == cast_to


def test_half_precision_weights_have_a_float32_posterior() -> None:
    model, x = mlp(), normal(8, 4)
    expected = fitted(model, x, classes(8)).linearize(x)[1]
    found = fitted(model.float(), x.float(), classes(8))
    model.bfloat16()
    covariance = found.linearize(x.bfloat16())[1]
    assert covariance.dtype == torch.float64 and {block.dtype for block in found.blocks()} == {torch.float32}
    close(covariance.double(), expected, 0.1)  # a bfloat16 has 8 bits


# ----------------------------------------------------------------------------------------------------------------- file


@each_kind
@pytest.mark.parametrize("tau", [0.8, {"0": 0.5, "2": 3.0}])
def test_round_trip(kind: str, tau: float | dict[str, float], tmp_path: Path) -> None:
    first = posterior(kind, prior_precision=tau, temperature=0.5)
    first.save(tmp_path)
    model = mlp()
    found = LaplacePosterior.load(tmp_path, model)
    assert repr(found) == repr(first)
    assert (found.prior_precision, found.temperature, found.noise_std) == (tau, 0.5, 1.0)
    assert found.record == first.record
    assert found.log_marginal_likelihood == first.log_marginal_likelihood
    for layer, eigen in first.layers.items():
        other = found.layers[layer]
        for part in ("left", "right", "eigenvalues"):
            one, two = getattr(eigen, part), getattr(other, part)
            assert (one is None) == (two is None) and (one is None or torch.equal(one, two))
    x = normal(5, 4, seed=3)
    for one, two in zip(first.linearize(x), found.linearize(x), strict=True):
        assert torch.equal(one, two)
    with first.draw(2), found.draw(2):
        assert unchanged(model, weights(first.model))


def test_several_kinds_of_layers_come_back(tmp_path: Path) -> None:
    first = fitted(reader(), text(), classes(6), target_modules=".+", exclude_modules=["key"])
    first.save(tmp_path)
    found = LaplacePosterior.load(tmp_path / FILE, reader())
    assert found.record.skipped == {"key": "in exclude_modules"}
    assert torch.equal(found.linearize(text())[1], first.linearize(text())[1])


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="There is no laplace file"):
        LaplacePosterior.load(tmp_path, mlp())
    posterior().save(tmp_path)
    with pytest.raises(ValueError, match=r"covers '0' .* does not have"):
        LaplacePosterior.load(tmp_path, reader())
    with pytest.raises(ValueError, match="fitted to other weights: those of '0'"):
        LaplacePosterior.load(tmp_path, built(mlp(), seed=4))
    wider, fitted_to = mlp(hidden=7), mlp()
    with torch.no_grad():
        for i in (0, 2):  # of the same norms
            norm = sum(p.square().sum() for p in fitted_to[i].parameters()) ** 0.5
            wider[i].bias.zero_()
            wider[i].weight.mul_(norm / wider[i].weight.norm())
    with pytest.raises(ValueError, match=r"other weights: those of '0'"):
        LaplacePosterior.load(tmp_path, wider)
    path = tmp_path / FILE
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is damaged or no laplace file"):
        LaplacePosterior.load(tmp_path, mlp())


def test_a_checkpoint_of_a_pass_is_no_posterior(tmp_path: Path) -> None:
    path = tmp_path / "sums.safetensors"
    fit(mlp(), batches(normal(8, 4), classes(8)), checkpoint=path, **QUIET)
    with pytest.raises(ValueError, match="holds 'curvature', not 'laplace'"):
        LaplacePosterior.load(path, mlp())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prior_precision": 0.0}, "`prior_precision` must be a finite number > 0, got 0.0"),
        ({"prior_precision": float("inf")}, "`prior_precision` must be a finite number > 0, got inf"),
        ({"prior_precision": True}, "`prior_precision` must be a finite number > 0, got True"),
        ({"prior_precision": {"0": 1.0}}, r"must name each of the 2 layers once: missing \['2'\]"),
        ({"prior_precision": {"0": 1.0, "2": -1.0}}, r"`prior_precision\['2'\]` must be a finite number > 0, got -1.0"),
        ({"temperature": -1.0}, "`temperature` must be a finite number > 0"),
        ({"noise_std": float("nan")}, "`noise_std` must be a finite number > 0"),
    ],
)
def test_wrong_settings(changes: dict[str, object], message: str) -> None:
    found = posterior()
    with pytest.raises(ValueError, match=message):
        found._replace(**changes)
