"""INF as a posterior: its draws against the dense inverse of V lam V^T + D + tau, in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bayeformers.laplace import InfPosterior, LaplacePosterior, inf_posterior
from tests.laplace import reference
from tests.laplace.networks import built, classes, fitted, mlp, reader, regression_data, text
from tests.laplace.reference import close, error, in_matrix_form, normal


class Groups(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.line, self.head = nn.Conv1d(4, 4, 2, groups=2), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.line(x)).mean(-1))


def fits(model: nn.Module, x: Any, y: Tensor, **options: Any) -> tuple[LaplacePosterior, LaplacePosterior]:
    """EKFAC and the exact diagonal, at one prior and temperature."""
    ekfac, diagonal = (fitted(model, x, y, curvature=kind, **options) for kind in ("ekfac", "diagonal"))
    return ekfac, diagonal


def dense_precision(posterior: LaplacePosterior, layer: str, rank: int, diagonal: Tensor | None) -> Tensor:
    """Group by group: the ``rank`` largest eigenpairs, the rest of the diagonal clamped, tau."""
    eigen, blocks = posterior.layers[layer], []
    groups, rows, columns = eigen.eigenvalues.shape
    u = reference.basis(eigen)
    size = rows * columns
    for k in range(groups):
        own, values = u[k * size : (k + 1) * size, k * size : (k + 1) * size], eigen.eigenvalues[k].flatten()
        top, order = values.topk(min(rank, size))
        low_rank = own[:, order] @ top.diag() @ own[:, order].T
        exact = (own @ values.diag() @ own.T).diag() if diagonal is None else diagonal[k].flatten()
        rest = (exact - low_rank.diag()).clamp_min(0)
        blocks.append(posterior.likelihood_precision * (low_rank + rest.diag()) + torch.eye(size, dtype=u.dtype))
    return torch.block_diag(*blocks)


def deviations(posterior: InfPosterior, layer: str, count: int) -> Tensor:
    """What ``count`` draws add to a layer's weights, (count, p)."""
    target = next(target for target, _ in posterior.layers if target.name == layer)
    found = []
    for index in range(count):
        moved = posterior._deviation(index, 0)
        given = {key: moved[p][None] for key, p in target.parameters.items()}
        found.append(in_matrix_form(target.modules[0], given).flatten())
    return torch.stack(found)


@pytest.mark.parametrize("has_diagonal", [True, False])
@pytest.mark.parametrize("kind", ["mlp", "groups"])
def test_draws_have_the_dense_covariance(kind: str, has_diagonal: bool) -> None:
    model, x = (mlp(), normal(9, 4)) if kind == "mlp" else (built(Groups()), normal(9, 4, 5))
    ekfac, diagonal = fits(model, x, classes(9), temperature=0.2)
    layer, count = ("0" if kind == "mlp" else "line"), 2000
    found = inf_posterior(ekfac, 3, diagonal if has_diagonal else None)
    exact = diagonal.layers[layer].eigenvalues if has_diagonal else None
    expected = torch.linalg.inv(dense_precision(ekfac, layer, 3, exact))
    drawn = deviations(found, layer, count)
    # E |S - Sigma|_F^2 = (tr(Sigma)^2 + tr(Sigma^2)) / n; half as much again is many standard deviations of it
    bound = 1.5 * float((expected.trace() ** 2 + expected.square().sum()) / count) ** 0.5
    assert error(drawn.T @ drawn / count, expected) < bound / float(expected.norm())


@pytest.mark.parametrize("has_diagonal", [True, False])
def test_log_determinant_is_dense(has_diagonal: bool) -> None:
    ekfac, diagonal = fits(mlp(), normal(9, 4), classes(9))
    found = inf_posterior(ekfac, 4, diagonal if has_diagonal else None)
    expected = sum(
        torch.logdet(dense_precision(ekfac, name, 4, eigen.eigenvalues if has_diagonal else None))
        for name, eigen in diagonal.layers.items()
    )
    close(found.log_determinant(), expected)


def test_at_full_rank_it_is_the_ekfac_posterior() -> None:
    ekfac = fitted(mlp(), normal(9, 4), classes(9), curvature="ekfac")
    found = inf_posterior(ekfac, 1000)
    expected = sum(eigen.log_determinant(1.0) for eigen in ekfac.layers.values())
    close(found.log_determinant(), expected)


def test_every_kind_of_layer_is_drawn() -> None:
    model, inputs = reader(), text()
    names = ["table", "query", "norm", "head"]
    ekfac, diagonal = fits(model, inputs, classes(6), target_modules=names)
    before = {p: p.detach().clone() for p in model.parameters()}
    found = inf_posterior(ekfac, 2, diagonal)
    with found.draw(0):
        moved = {p for p in model.parameters() if not torch.equal(p, before[p])}
    assert moved == set(found.random_parameters()) == set(ekfac.random_parameters())
    assert all(torch.equal(p, value) for p, value in before.items())
    assert found.predict(inputs, num_samples=4).probs.shape == (6, 3)


def test_the_weights_come_back_after_an_error() -> None:
    model = mlp()
    found = inf_posterior(fitted(model, normal(9, 4), classes(9), curvature="ekfac"), 2)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="boom"), found.draw(1):
        raise RuntimeError("boom")
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_a_dense_last_layer() -> None:
    model, x, y = mlp(), normal(9, 4), classes(9)
    full = fitted(model, x, y, subset="last_layer", curvature="dense")
    close(inf_posterior(full, 18).log_determinant(), full.layers["2"].log_determinant(1.0))


def test_it_keeps_fewer_numbers() -> None:
    model = built(nn.Sequential(nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 3)))
    found = inf_posterior(fitted(model, normal(9, 40), classes(9), curvature="ekfac"), 5)
    for target, (block,) in found.layers:
        _, rows, columns = target.matrix_shape
        kept = sum(getattr(block, name).numel() for name in ("left", "right", "rows", "columns", "eigenvalues"))
        assert kept <= 5 * (rows + columns + 3)
        assert block.unclamped_diagonal.numel() == target.num_weights
    assert found.num_stored < sum(
        v.numel() for e in fitted(model, normal(9, 40), classes(9), curvature="ekfac").layers.values()
        for v in (e.left, e.right, e.eigenvalues) if v is not None
    )  # fmt: skip


def test_save_and_load(tmp_path: Path) -> None:
    model, (x, y) = built(nn.Linear(3, 2)), regression_data()
    found = inf_posterior(fitted(model, x, y, likelihood="regression", noise_std=0.3, curvature="ekfac"), 2)
    found.save(tmp_path)
    loaded = InfPosterior.load(tmp_path, model)
    first, second = (each.predict(x, num_samples=3) for each in (found, loaded))
    assert first.values is not None and torch.equal(first.values, second.values)
    assert loaded.noise_std == 0.3
    with torch.no_grad():
        model.weight.mul_(2)
    with pytest.raises(ValueError, match="fitted to other weights"):
        InfPosterior.load(tmp_path, model)


def test_errors() -> None:
    model, x, y = mlp(), normal(9, 4), classes(9)
    ekfac, diagonal = fits(model, x, y)
    with pytest.raises(ValueError, match="`rank` must be a whole number >= 1, got 0"):
        inf_posterior(ekfac, 0)
    with pytest.raises(ValueError, match="`diagonal` must be of curvature=\"diagonal\", got 'ekfac'"):
        inf_posterior(ekfac, 1, ekfac)
    with pytest.raises(ValueError, match="of the same layers"):
        inf_posterior(fitted(model, x, y, curvature="ekfac", target_modules=["0"]), 1, diagonal)
    with pytest.raises(ValueError, match="needs a Gaussian posterior, got InfPosterior"):
        inf_posterior(ekfac, 1).predict(x, method="glm")
