"""INT8 layers: the bias is mean plus noise, may be absent, and no architecture is special."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bayeformers import to_bayesian
from bayeformers.quantization import quantize
from bayeformers.sampling.philox import signs
from tests.quantization.networks import LAYERS, Named, bert, images, probs, sentences

pytestmark = pytest.mark.filterwarnings("error")


@pytest.mark.protects("int8_bias")
def test_bias_of_five_stays_five() -> None:
    """A draw of the bias is 5 + sigma eps with sigma = 0.25; sigma eps alone, which took its place, averages 0."""
    layer = nn.Linear(6, 4)
    nn.init.constant_(layer.bias, 5.0)
    small = quantize(to_bayesian(Named(layer), delta=0.05), images(9, 6))
    x, drawn = torch.zeros(1, 6), []
    for index in range(16):
        with small.draw(index):
            drawn.append(small.model(x))
    values = torch.cat(drawn)

    def check(biases: Tensor) -> None:
        # 64 draws: the standard error of the mean is 0.25 / 8
        assert abs(float(biases.mean()) - 5) < 5 * 0.25 / 8
        assert 0.5 < float(biases.std()) / 0.25 < 1.5

    assert torch.equal(small.model(x), torch.full((1, 4), 5.0))
    check(values)
    with pytest.raises(AssertionError):
        check(values - 5)


@pytest.mark.protects("int8_bias")
@pytest.mark.parametrize("name", [*LAYERS, "LSTM"])
def test_every_layer_runs_without_bias(name: str) -> None:
    """One dimension or three, transposed, grouped, recurrent: none of them needs a bias."""
    if name == "LSTM":
        model: nn.Module = _Recurrent()
        x = images(3, 4, 5)
    else:
        make, inputs = LAYERS[name]
        model, x = Named(make(False)), inputs()
    small = quantize(to_bayesian(model, delta=0.1), x, max_error=1.0)
    outputs = []
    for index in range(2):
        with small.draw(index):
            outputs.append(small.model(x))
    assert outputs[0].isfinite().all() and not torch.equal(*outputs)


class _Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(5, 4, bias=False, batch_first=True), nn.Linear(4, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0])


@pytest.mark.protects("int8_bias")
def test_signs_are_both() -> None:
    """`randint(0, 1)` is 0 always: every sign was -1."""

    def check(found: Tensor) -> None:
        assert set(found.unique().tolist()) == {-1.0, 1.0}

    check(signs(1, (8, 16), torch.device("cpu")))
    with pytest.raises(AssertionError):
        check(torch.randint(0, 1, (8, 16)).float() * 2 - 1)


@pytest.mark.protects("int8_bias")
@pytest.mark.parametrize("name", ["transformer", "convolutions", "mixture"])
def test_any_architecture(name: str) -> None:
    """Not one network, known by the names of its parts: any."""
    convolutions = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(18, 3))
    mixture = nn.Sequential(nn.Unflatten(1, (1, 5)), nn.ConvTranspose1d(1, 2, 2), nn.Flatten(), nn.Linear(12, 3))
    model, x = {
        "transformer": (bert(), sentences()),
        "convolutions": (convolutions, images(6, 1, 5, 5)),
        "mixture": (mixture, images(6, 5)),
    }[name]
    small = quantize(to_bayesian(model, delta=0.1), x)
    assert small.weights and probs(small, x, 2).isfinite().all()
