"""Spectra, eigen-directions and draws along them, against dense matrices in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bayeformers.laplace import LaplacePosterior, draw_along, eigen_direction, factor_spectrum
from bayeformers.laplace.analysis.directions import EigenDirection
from tests.laplace import reference
from tests.laplace.networks import built, classes, fitted, mlp, reader, text
from tests.laplace.reference import close, in_matrix_form, normal


def posterior_of_mlp(curvature: str = "kfac", **options: object) -> LaplacePosterior:
    return fitted(mlp(), normal(8, 4), classes(8), curvature=curvature, **options)


def flat(posterior: LaplacePosterior, direction: EigenDirection) -> Tensor:
    target = next(target for target in posterior.targets if target.name == direction.layer)
    given = {key: direction.parameters[p][None] for key, p in target.parameters.items()}
    return in_matrix_form(target.modules[0], given).flatten()


def test_factor_spectrum_of_kfac_is_that_of_the_factors() -> None:
    posterior = posterior_of_mlp()
    for name in posterior.layers:
        found = factor_spectrum(posterior, name)
        close(found.gradients[:, :, None] * found.inputs[:, None], posterior.layers[name].eigenvalues)
        values = torch.linalg.eigvalsh(reference.dense(posterior.layers[name])).flip(0)
        close(found.eigenvalues, values)
        close(found.gradients.sum(), found.inputs.sum())
        assert found.quantile(1.0) == float(found.eigenvalues[0])
        assert found.quantile(0.0) == float(found.eigenvalues[-1])


def test_factor_spectrum_of_ekfac_keeps_rows_and_columns() -> None:
    posterior = posterior_of_mlp("ekfac")
    values = posterior.layers["0"].eigenvalues
    found = factor_spectrum(posterior, "0")
    product = found.gradients[:, :, None] * found.inputs[:, None]
    close(product.sum(1), values.sum(1))
    close(product.sum(2), values.sum(2))


def test_a_layer_without_curvature_has_spectrum_zero() -> None:
    model, inputs = reader(), text()
    posterior = fitted(model, inputs, classes(6), curvature="kfac", weight_sharing="reduce")
    found = factor_spectrum(posterior, "key")  # a softmax does not see what all keys have in common
    assert bool(found.gradients.isfinite().all()) and float(found.eigenvalues.max()) < 1e-12


@pytest.mark.parametrize("curvature", ["kfac", "ekfac", "diagonal", "dense"])
@pytest.mark.parametrize("layer", ["0", "2", None])
@pytest.mark.parametrize("direction", [0, 3, -1, 0.0, 0.5, 1.0])
def test_an_eigen_direction_is_an_eigenvector(curvature: str, layer: str | None, direction: float) -> None:
    posterior = posterior_of_mlp(curvature, temperature=0.5)
    found = eigen_direction(posterior, direction, layer)
    f, v = reference.dense(posterior.layers[found.layer]), flat(posterior, found)
    close(v.norm(), torch.ones((), dtype=v.dtype))
    torch.testing.assert_close(f @ v, found.eigenvalue * v, rtol=0, atol=1e-10 * float(f.norm()))
    assert found.variance == pytest.approx(1 / (2 * found.eigenvalue + 1))
    names = list(posterior.layers) if layer is None else [layer]
    rising = torch.cat([posterior.layers[name].eigenvalues.flatten() for name in names]).sort().values
    rank = round(direction * (len(rising) - 1)) if isinstance(direction, float) else direction
    assert found.eigenvalue == pytest.approx(float(rising[rank]), rel=1e-9, abs=1e-14)


def test_ranks_follow_the_variance_where_priors_differ() -> None:
    posterior = posterior_of_mlp().with_prior_precision({"0": 1e4, "2": 1e-3})
    assert eigen_direction(posterior, 0).layer == "2" and eigen_direction(posterior, -1).layer == "0"


@pytest.mark.protects("eigen_draw")
def test_draws_lie_on_the_line_and_have_its_variance() -> None:
    posterior = posterior_of_mlp()
    found = eigen_direction(posterior, 0.7, "2")
    v, steps = flat(posterior, found), []
    before = {p: p.detach().clone() for p in posterior.model.parameters()}
    for index in range(2000):
        with draw_along(posterior, found, index):
            moved = {p: p.detach() - before[p] for p in found.parameters}
            step = flat(posterior, EigenDirection(found.layer, found.index, 0.0, 0.0, moved))
            others = [p for p in before if p not in moved]
            assert all(torch.equal(p, before[p]) for p in others)
        z = step @ v
        torch.testing.assert_close(step, z * v, rtol=0, atol=1e-12)
        steps.append(float(z))
    assert all(torch.equal(p, value) for p, value in before.items())
    # the mean of n squares of N(0, s^2) has relative standard deviation sqrt(2 / n) = .032; five of them
    assert torch.tensor(steps).square().mean().item() == pytest.approx(found.variance, rel=0.16)


def test_draws_are_repeatable_and_differ_by_index_and_seed() -> None:
    posterior, x = posterior_of_mlp(), normal(2, 4)
    found = eigen_direction(posterior, 0)

    def output(index: int, seed: int) -> Tensor:
        with draw_along(posterior, found, index, seed), torch.no_grad():
            return posterior.model(x)

    assert torch.equal(output(1, 2), output(1, 2))
    assert not torch.equal(output(1, 2), output(2, 2)) and not torch.equal(output(1, 2), output(1, 3))


def test_a_draw_comes_back_after_an_error() -> None:
    posterior = posterior_of_mlp()
    before = [p.detach().clone() for p in posterior.model.parameters()]
    with pytest.raises(RuntimeError, match="boom"), draw_along(posterior, eigen_direction(posterior, 0), 0):
        raise RuntimeError("boom")
    assert all(torch.equal(p, q) for p, q in zip(posterior.model.parameters(), before, strict=True))


def test_errors() -> None:
    posterior, other = posterior_of_mlp(), posterior_of_mlp()
    with pytest.raises(ValueError, match=r"`layer` must be one of \['0', '2'\] \(of 2\), got 'x'"):
        factor_spectrum(posterior, "x")
    with pytest.raises(ValueError, match="`direction` must be a rank"):
        eigen_direction(posterior, 43)
    with pytest.raises(ValueError, match="`direction` must be a rank"):
        eigen_direction(posterior, 1.5)
    with pytest.raises(ValueError, match="`q` must lie in"):
        factor_spectrum(posterior, "0").quantile(2)
    with pytest.raises(ValueError, match="of another model"), draw_along(posterior, eigen_direction(other, 0), 0):
        pass
    along = draw_along(posterior, eigen_direction(posterior, 0), 0.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="`index` must be a whole number"), along:
        pass


def test_a_padding_row_is_no_direction() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(4, 2, padding_idx=0), nn.Linear(2, 2)

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.table(ids).mean(1))

    ids = torch.tensor([[1, 2], [3, 1], [2, 2]])
    posterior = fitted(built(Table()), ids, classes(3, outputs=2), curvature="kfac", target_modules=["table"])
    found = [eigen_direction(posterior, rank) for rank in range(6)]
    assert {direction.index[1] for direction in found} == {1, 2, 3}
    assert eigen_direction(posterior, -6).index == found[0].index
    with pytest.raises(ValueError, match=r"rank \(int, 0\.\.5, .*got 6"):
        eigen_direction(posterior, 6)
