"""Sums over the data: batches, processes, their order, their file, in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bayeformers.laplace import Curvature, CurvatureConfig, fit
from bayeformers.laplace.accumulate import Accumulator
from bayeformers.laplace.data import prepare
from bayeformers.laplace.targets import choose_targets
from bayeformers.likelihoods import logits_of
from tests.laplace.networks import QUIET, Twice, batches, built, classes, mlp, reader, text
from tests.laplace.reference import close, dense, kronecker, normal


def sums_of(model: nn.Module, loader: list[Any], **config: Any) -> Curvature:
    sums = Curvature(CurvatureConfig(**config))
    accumulator = Accumulator(sums, model, choose_targets(model)[0], logits_of)
    for batch in loader:
        accumulator.add(prepare(model, batch, torch.device("cpu")))
    return sums


@pytest.mark.protects("batch_size_one")
@pytest.mark.parametrize("kind", ["kfac", "diagonal", "dense"])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_uneven_batches_and_merged_processes_are_one_batch(kind: str, sharing: str) -> None:
    model, inputs, y = reader(), text(), classes(6)
    config = {"curvature": kind, "weight_sharing": sharing}
    whole = sums_of(model, batches(inputs, y), **config)
    several = batches(inputs, y, 1, 3, 2)
    parts = sums_of(model, several, **config)
    merged = sums_of(model, several[:1], **config).merge(sums_of(model, several[1:], **config))
    backwards = sums_of(model, several[::-1], **config)
    for other in (parts, merged, backwards):
        assert other.num_examples == 6
        assert other.log_likelihood == pytest.approx(whole.log_likelihood, rel=1e-12)
        for layer, sums in whole.sums.items():
            for name, value in sums.items():
                if (layer, name, sharing) != ("key", "gradients", "reduce"):
                    close(other.sums[layer][name], value, 1e-12)
    assert (whole.num_batches, parts.num_batches, merged.num_batches) == (1, 3, 3)


def test_ekfac_over_uneven_batches() -> None:
    model, inputs, y = reader(), text(), classes(6)
    options: dict[str, Any] = {"prior_precision": 1.0, "curvature": "ekfac", **QUIET}
    whole, parts = (fit(model, loader, **options) for loader in (batches(inputs, y), batches(inputs, y, 2, 4)))
    for layer in whole.layers:
        close(dense(parts.layers[layer]), dense(whole.layers[layer]), 1e-10)


def test_merge_refuses_other_sums() -> None:
    model, x, y = mlp(), normal(6, 4), classes(6)
    first = sums_of(model, batches(x, y))
    with pytest.raises(ValueError, match="`other` was measured with"):
        first.merge(sums_of(model, batches(x, y), fisher="mc"))
    with pytest.raises(ValueError, match="sums of other layers, shapes or weights"):
        first.merge(sums_of(mlp(hidden=6), batches(x, y)))
    assert first.num_examples == 6 and first.without(["0"]).sums.keys() == {"2"}
    for call in (first.factors, first.eigen):
        with pytest.raises(ValueError, match="`layer` must be one of"):
            call("none")
    with pytest.raises(ValueError, match="no Kronecker factors"):
        sums_of(model, batches(x, y), curvature="diagonal").factors("0")


def test_sums_come_back_from_their_file(tmp_path: Path) -> None:
    model, x, y = mlp(), normal(6, 4), classes(6)
    sums = sums_of(model, batches(x, y), num_mc_samples=3)
    sums.data_scale = 2.5
    path = str(tmp_path / "sums.safetensors")
    sums.save(path)
    found = Curvature.load(path)
    assert found.config == sums.config
    for name in ("num_examples", "num_batches", "log_likelihood", "squared_error", "num_outputs", "data_scale"):
        assert getattr(found, name) == getattr(sums, name)
    for layer, own in sums.sums.items():
        assert all(torch.equal(found.sums[layer][name], value) for name, value in own.items())


def test_factors_are_scaled_to_the_data() -> None:
    model, x, y = mlp(), normal(6, 4), classes(6)
    sums = sums_of(model, batches(x, y))
    gradients, inputs = sums.factors("0")
    sums.data_scale = 10.0
    close(sums.factors("0")[0], 10 * gradients)
    close(sums.factors("0")[1], inputs)
    close(dense(sums.eigen("0")), 10 * kronecker(gradients, inputs), 1e-12)


def test_expand_concatenates_uses_along_the_positions() -> None:
    model, x, y = built(Twice()), normal(5, 4), classes(5, outputs=4)
    a = torch.cat([x, torch.tanh(model.again(x)).detach()])
    a = torch.cat([a, torch.ones_like(a[:, :1])], -1)
    _, inputs = sums_of(model, batches(x, y)).factors("again")
    close(inputs[0], a.T @ a / 10, 1e-12)


class Attention(nn.Module):
    """Query and key read one tensor, the value another."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.query(x).sigmoid() * self.key(x) + self.value(x.square())


def test_factors_are_released_as_they_are_decomposed() -> None:
    """The same bases and eigenvalues, no factor left, and one basis where layers read the same tensor."""
    model = built(Attention())
    x, y = normal(6, 4), classes(6, outputs=3)
    kept, released = sums_of(model, batches(x, y)), sums_of(model, batches(x, y))
    targets = choose_targets(model)[0]
    expected, found = kept.decomposed(targets), released.decomposed(targets, releases=True)
    for (_, one), (_, other) in zip(expected, found, strict=True):
        close(dense(one), dense(other), 1e-12)
    assert all(own.keys() == {"count"} for own in released.sums.values())
    assert all({"inputs", "gradients"} <= own.keys() for own in kept.sums.values())
    query, key, value = (eigen.right for _, eigen in found)
    assert query is key and value is not query
