"""Laplace posteriors in INT8: every curvature, the same noise, the same spread."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from bayeformers import laplace, predict
from bayeformers.linearized.blocks import block_draw
from bayeformers.quantization import quantize
from tests.quantization.networks import bert, images, mlp, probs, sentences, spread

pytestmark = pytest.mark.filterwarnings("error")
CURVATURES: list[dict[str, Any]] = [
    {"curvature": "kfac"},
    {"curvature": "ekfac"},
    {"curvature": "diagonal"},
    {"curvature": "kfac", "subset": "last_layer"},
    {"curvature": "dense", "subset": "last_layer"},
]


def loader(x: torch.Tensor, classes: int = 3) -> DataLoader[Any]:
    return DataLoader(TensorDataset(x, torch.arange(len(x)) % classes), batch_size=20)


@pytest.mark.parametrize("options", CURVATURES, ids=lambda options: "-".join(options.values()))
def test_probabilities_and_spread(options: dict[str, Any]) -> None:
    model, x = mlp(24), images(40, 8)
    posterior = laplace.fit(model, loader(x), progress=False, prior_precision=30.0, **options)
    small = quantize(posterior, x)
    p, q = probs(posterior, x), probs(small, x)
    assert (q.mean(0) - p.mean(0)).abs().mean() * 3 < 0.05
    assert abs(spread(q) / spread(p) - 1) < 0.05
    assert spread((q - q.mean(0)) - (p - p.mean(0))) < 0.3 * spread(p)


@pytest.mark.parametrize("options", CURVATURES, ids=lambda options: "-".join(options.values()))
def test_deviation_is_the_float_one(options: dict[str, Any]) -> None:
    """The same Z through coded factors: a relative error of about one step of the codes."""
    model, x = mlp(24), images(40, 8)
    posterior = laplace.fit(model, loader(x), progress=False, **options)
    small = quantize(posterior, x)
    for block in posterior.blocks():
        expected = block_draw(block, 2, 5)[0]
        found = small.noise.deviation(f"{block.name}.weight", 2, 5)
        bias = small.noise.deviation(f"{block.name}.bias", 2, 5)
        error = (torch.cat([found, bias[:, None]], dim=1) - expected).norm() / expected.norm()
        assert error < 0.05


def test_convolution_and_padding_row() -> None:
    """A grouped convolution has a block per group; the padding row of a table is not random."""
    model = nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.Flatten(), nn.Linear(16, 3)).eval()
    x = images(40, 2, 4, 4)
    posterior = laplace.fit(model, loader(x), progress=False, prior_precision=30.0)
    small = quantize(posterior, x)
    assert abs(spread(probs(small, x)) / spread(probs(posterior, x)) - 1) < 0.05
    table = nn.Sequential(nn.Embedding(12, 6, padding_idx=0), nn.Flatten(), nn.Linear(18, 3)).eval()
    ids = torch.randint(12, (40, 3))
    fitted = laplace.fit(table, loader(ids), progress=False, target_modules=["0", "2"], prior_precision=30.0)
    tabled = quantize(fitted, ids)
    with tabled.draw(0):
        drawn = tabled.model[0](torch.arange(12))
    moved = (drawn - tabled.model[0](torch.arange(12))).norm(dim=-1)
    assert moved[0] == 0 and (moved[1:] > 0).all()
    assert abs(spread(probs(tabled, ids)) / spread(probs(fitted, ids)) - 1) < 0.05


def test_transformer_carrying_its_posterior() -> None:
    model = bert()
    batch = {**sentences(12), "labels": torch.arange(12) % 3}
    posterior = laplace.fit(model, [batch], progress=False, prior_precision=50.0)
    model.posterior = posterior
    small = quantize(model, batch)
    assert model.posterior is posterior and not hasattr(small.model, "posterior")
    assert abs(spread(probs(small, sentences(12))) / spread(probs(posterior, sentences(12))) - 1) < 0.05
    assert predict(small, sentences()).log_probs.shape == (16, 4, 3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with small.draw(0):
        pass
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_linearised_methods_are_refused() -> None:
    small = quantize(laplace.fit(mlp(), loader(images(20, 8)), progress=False), images(20, 8))
    with pytest.raises(ValueError, match="'sample'"):
        small.predict(images(2, 8), method="glm")
    assert small.default_method == "sample"
