"""What a saved posterior takes: no tensor twice, no product of two vectors, and the same bits after a reload."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from bayeformers.laplace import LaplacePosterior
from bayeformers.laplace.posterior import FILE
from bayeformers.storage import read, write
from tests.laplace.networks import classes, fitted, reader, text

NAMES = ["query", "key", "value", "head", "table", "norm"]


def posterior(curvature: str, dtype: torch.dtype = torch.float32) -> LaplacePosterior:
    model = reader(width=16).to(dtype)
    return fitted(model, text(), classes(6), curvature=curvature, target_modules=NAMES)


def same(found: LaplacePosterior, expected: LaplacePosterior) -> None:
    assert list(found.layers) == list(expected.layers)
    for name, eigen in expected.layers.items():
        for part in ("left", "right", "eigenvalues"):
            one, other = getattr(found.layers[name], part), getattr(eigen, part)
            assert (one is None) == (other is None), (name, part)
            assert one is None or torch.equal(one, other) and one.dtype == other.dtype, (name, part)
    assert torch.equal(found.predict(text()).logit_covariance, expected.predict(text()).logit_covariance)
    for (_, one), (_, other) in zip(moved(found), moved(expected), strict=True):
        assert torch.equal(one, other)


def moved(found: LaplacePosterior) -> list[tuple[str, torch.Tensor]]:
    with found.draw(0):
        return [(name, value.detach().clone()) for name, value in found.model.named_parameters()]


@pytest.mark.parametrize("curvature", ["kfac", "ekfac", "diagonal", "dense"])
def test_a_reload_has_the_same_bits(tmp_path: Path, curvature: str) -> None:
    expected = posterior(curvature)
    expected.save(tmp_path / "first")
    found = LaplacePosterior.load(tmp_path / "first", expected.model)
    same(found, expected)
    found.save(tmp_path / "second")
    first, second = (load_file(tmp_path / folder / FILE) for folder in ("first", "second"))
    assert first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def test_what_kfac_takes(tmp_path: Path) -> None:
    """Bases of 16 outputs and 17 inputs, of which query, key and value share one; no matrix of eigenvalues."""
    expected = posterior("kfac")
    expected.save(tmp_path)
    tensors = load_file(tmp_path / FILE)
    assert all(value.dtype == torch.float32 for value in tensors.values())
    numbers = sum(value.numel() for value in tensors.values())
    attention = 3 * (16**2 + 16) + 17**2 + 17
    head, table, norm = 3**2 + 17**2 + 3 + 17, 16**2 + 16 + 7, 2 * 16
    assert numbers == attention + head + table + norm
    wide = sum(
        value.numel() for eigen in expected.layers.values()
        for value in (eigen.left, eigen.right, eigen.eigenvalues) if value is not None
    )  # fmt: skip
    assert numbers < 0.6 * wide
    found = LaplacePosterior.load(tmp_path, expected.model)
    bases = [found.layers[name].right for name in ("query", "key", "value")]
    assert bases[0] is bases[1] is bases[2]  # and so in memory


@pytest.mark.parametrize("curvature", ["kfac", "ekfac"])
def test_files_of_before_load_bit_for_bit(tmp_path: Path, curvature: str) -> None:
    """Which had every layer's matrices."""
    expected = posterior(curvature)
    expected.save(tmp_path)
    _, meta = read(tmp_path / FILE, kind="laplace")
    parts = ("left", "right", "eigenvalues")
    tensors: dict[str, Any] = {
        f"{layer}/{part}": getattr(eigen, part).clone()
        for layer, eigen in expected.layers.items() for part in parts if getattr(eigen, part) is not None
    }  # fmt: skip
    write(tmp_path / FILE, tensors, meta, kind="laplace")
    same(LaplacePosterior.load(tmp_path, expected.model), expected)


@pytest.mark.parametrize(
    "name", ["query/left_eigenvalues", "query/right_eigenvalues", "value/right", "norm/eigenvalues"]
)
def test_missing_and_negative_tensors_are_named(tmp_path: Path, name: str) -> None:
    expected = posterior("kfac")
    expected.save(tmp_path)
    tensors, meta = read(tmp_path / FILE, kind="laplace")
    damaged = {"missing": {k: v for k, v in tensors.items() if k != name}}
    if name.endswith("eigenvalues"):
        damaged["negative"] = {**tensors, name: -tensors[name]}
    for what, given in damaged.items():
        write(tmp_path / what / FILE, given, meta, kind="laplace")
        with pytest.raises(ValueError, match="damaged"):
            LaplacePosterior.load(tmp_path / what, expected.model)


def test_a_reload_into_another_precision(tmp_path: Path) -> None:
    expected = posterior("kfac")
    expected.save(tmp_path)
    found = LaplacePosterior.load(tmp_path, expected.model.double())
    assert all(eigen.eigenvalues.dtype == torch.float64 for eigen in found.layers.values())
    found.save(tmp_path / "again")
    same(LaplacePosterior.load(tmp_path / "again", expected.model), found)


def test_a_module_of_ones_own_is_stored_like_any_other(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 2, groups=2), nn.Flatten(), nn.Linear(16, 3))
    x = torch.randn(6, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    expected = fitted(model.eval(), x, classes(6), curvature="kfac")
    expected.save(tmp_path)
    found = LaplacePosterior.load(tmp_path, model)
    assert torch.equal(found.predict(x).logit_covariance, expected.predict(x).logit_covariance)
