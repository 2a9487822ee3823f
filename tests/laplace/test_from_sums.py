"""A posterior from sums that were saved, merged and reloaded equals that of one fit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bayeformers.laplace import Curvature, CurvatureConfig, LaplacePosterior, fit, posterior_of
from tests.laplace.networks import QUIET, batches, classes, mlp, reader, regression_data, text
from tests.laplace.reference import close, normal, part

HALF = """
import sys
from bayeformers.laplace import fit
from tests.laplace.networks import batches, classes, mlp
from tests.laplace.reference import normal
rows = slice(5, 12)
data = batches(normal(12, 4)[rows], classes(12)[rows])
fit(mlp(), data, curvature="kfac", fisher="exact", checkpoint=sys.argv[1], progress=False)
"""


def same(found: LaplacePosterior, expected: LaplacePosterior) -> None:
    assert list(found.layers) == list(expected.layers)
    assert found.record.num_data == expected.record.num_data
    assert found.record.log_likelihood == pytest.approx(expected.record.log_likelihood, rel=1e-12)
    for name, variance in expected.variances().items():
        close(found.variances()[name], variance, 1e-9)
    assert found.log_marginal_likelihood == pytest.approx(expected.log_marginal_likelihood, rel=1e-9)


@pytest.mark.parametrize("curvature", ["kfac", "diagonal", "dense"])
def test_two_passes_and_a_merge_equal_one_fit(curvature: Any, tmp_path: Path) -> None:
    model, x, y = mlp(), normal(12, 4), classes(12)
    options = {"curvature": curvature, "fisher": "exact", **QUIET}
    for number, rows in enumerate((slice(5), slice(5, 12))):
        path = tmp_path / f"{number}.safetensors"
        fit(model, batches(x[rows], y[rows]), checkpoint=path, **options)
    merged = Curvature.load(tmp_path / "0.safetensors").merge(Curvature.load(tmp_path / "1.safetensors"))
    found = posterior_of(model, merged, training=batches(x, y), progress=False)
    same(found, fit(model, batches(x, y), **options))


def test_the_other_half_in_another_process(tmp_path: Path) -> None:
    model, x, y = mlp(), normal(12, 4), classes(12)
    paths = [tmp_path / "first.safetensors", tmp_path / "second.safetensors"]
    options = {"curvature": "kfac", "fisher": "exact", **QUIET}
    fit(model, batches(x[:5], y[:5], 2, 3), checkpoint=paths[0], **options)
    subprocess.run([sys.executable, "-c", HALF, str(paths[1])], check=True, timeout=300)
    merged = Curvature.load(paths[0]).merge(Curvature.load(paths[1]))
    same(posterior_of(model, merged, training=batches(x, y)), fit(model, batches(x, y), **options))


def test_every_kind_of_layer(tmp_path: Path) -> None:
    model, inputs, labels = reader(), text(), classes(6)
    options = {"target_modules": ["table", "query", "value", "norm", "head"], "curvature": "kfac", **QUIET}
    for number, rows in enumerate((slice(4), slice(4, 6))):
        path = tmp_path / f"{number}.safetensors"
        fit(model, batches(part(inputs, rows), labels[rows]), checkpoint=path, **options)
    merged = Curvature.load(tmp_path / "0.safetensors").merge(Curvature.load(tmp_path / "1.safetensors"))
    expected = fit(model, batches(inputs, labels), prior_precision=3.0, temperature=0.5, **options)
    same(posterior_of(model, merged, prior_precision=3.0, temperature=0.5), expected)


def test_regression_finds_its_noise(tmp_path: Path) -> None:
    x, y = regression_data()
    model = nn.Linear(3, 2).double()
    options = {"likelihood": "regression", "curvature": "kfac", **QUIET}
    expected = fit(model, batches(x, y), checkpoint=tmp_path / "sums.safetensors", **options)
    found = posterior_of(model, Curvature.load(tmp_path / "sums.safetensors"))
    assert found.noise_std == pytest.approx(expected.noise_std)
    same(found, expected)


def test_sums_stand_for_more_data(tmp_path: Path) -> None:
    model, x, y = mlp(), normal(6, 4), classes(6)
    options = {"curvature": "kfac", "num_data": 60, "prior_precision": "marglik", **QUIET}
    expected = fit(model, batches(x, y), checkpoint=tmp_path / "sums.safetensors", num_batches=1, **options)
    found = posterior_of(model, Curvature.load(tmp_path / "sums.safetensors"), num_data=60, prior_precision="marglik")
    same(found, expected)


def test_validation_data_choose_the_prior(tmp_path: Path) -> None:
    """As in `fit`: where nothing is said, the held-out data decide if they are given, else the evidence."""
    model, x, y = mlp(), normal(12, 4), classes(12)
    held_out = batches(normal(12, 4) + 1, classes(12))
    fit(model, batches(x, y), checkpoint=tmp_path / "sums.safetensors", progress=False)
    sums = Curvature.load(tmp_path / "sums.safetensors")
    found = posterior_of(model, sums, validation=held_out, progress=False)
    expected = fit(model, batches(x, y), validation=held_out, progress=False)
    assert found.prior_precision == pytest.approx(expected.prior_precision, rel=1e-9)
    assert found.prior_precision != pytest.approx(posterior_of(model, sums).prior_precision, rel=1e-3)


def test_ekfac_needs_its_second_pass_alone(tmp_path: Path) -> None:
    model, x, y = mlp(), normal(12, 4), classes(12)
    options = {"curvature": "ekfac", "prior_precision": 1.0, **QUIET}
    path = tmp_path / "merged.safetensors"
    for number, rows in enumerate((slice(5), slice(5, 12))):
        fit(model, batches(x[rows], y[rows]), checkpoint=tmp_path / f"{number}.safetensors", **options)
    merged = Curvature.load(tmp_path / "0.safetensors").merge(Curvature.load(tmp_path / "1.safetensors"))
    with pytest.raises(ValueError, match='lacks the squares of "ekfac" for'):
        posterior_of(model, merged)
    merged.save(path)
    data = batches(x, y, 5, 7)
    same(fit(model, data, checkpoint=path, **options), fit(model, data, **options))


def test_squares_of_different_bases_do_not_add() -> None:
    one = torch.ones(1, 2, 2)
    sums = {"head": {"gradients": one, "inputs": one, "count": one.sum(), "squares": one}}
    curvature = Curvature(CurvatureConfig(curvature="ekfac"), sums, num_examples=1)
    with pytest.raises(ValueError, match="a basis of their own"):
        curvature.merge(curvature)


def test_errors(tmp_path: Path) -> None:
    model, x, y = mlp(), normal(6, 4), classes(6)
    fit(model, batches(x, y), curvature="kfac", checkpoint=tmp_path / "sums.safetensors", **QUIET)
    sums = Curvature.load(tmp_path / "sums.safetensors")
    with pytest.raises(ValueError, match="no sums"):
        posterior_of(model, Curvature(sums.config))
    with pytest.raises(ValueError, match=r"does not have: \['0', '2'\]"):
        posterior_of(nn.Linear(4, 3), sums)
    with torch.no_grad():
        model[0].weight.mul_(2)
    with pytest.raises(ValueError, match="of other weights than those of '0'"):
        posterior_of(model, sums)
    with pytest.raises(ValueError, match="'0', which is frozen in the model"):
        posterior_of(mlp().requires_grad_(False), sums)
    fit(model, batches(x, y), curvature="kfac", checkpoint=tmp_path / "other.safetensors", **QUIET)
    with pytest.raises(ValueError, match="other layers, shapes or weights"):
        sums.merge(Curvature.load(tmp_path / "other.safetensors"))


def test_other_form_of_the_same_name(tmp_path: Path) -> None:
    model, x, y = mlp(), normal(6, 4), classes(6)
    model[0].bias.requires_grad_(False)
    fit(model, batches(x, y), curvature="kfac", checkpoint=tmp_path / "sums.safetensors", **QUIET)
    sums = Curvature.load(tmp_path / "sums.safetensors")
    sums.weights.clear()
    sums.digests.clear()
    model[0].bias.requires_grad_(True)
    with pytest.raises(ValueError, match=r"the form \(1, 5, 4\) for '0', whose trained weights have \(1, 5, 5\)"):
        posterior_of(model, sums)
