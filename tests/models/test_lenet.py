"""LeNet5: the count of its parameters, and the forward written out."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bayeformers.models import LeNetConfig, LeNetForImageClassification
from tests.models import tiny


@pytest.mark.parametrize(
    ("config", "count"),
    [
        ({}, 61_706),
        ({"image_size": 32, "padding": 0}, 61_706),
        ({"image_size": 32, "padding": 0, "num_channels": 3}, 62_006),
    ],
)
def test_number_of_parameters(config: dict[str, int], count: int) -> None:
    with torch.device("meta"):
        model = LeNetForImageClassification(LeNetConfig(**config))
    assert model.num_parameters() == count
    by_hand = (25 * config.get("num_channels", 1) + 1) * 6 + (25 * 6 + 1) * 16 + 401 * 120 + 121 * 84 + 85 * 10
    assert count == by_hand


def pool(x: Tensor) -> Tensor:
    """The maxima of 2 x 2 squares; an odd last row or column is left out."""
    rows, columns = x.shape[2] // 2 * 2, x.shape[3] // 2 * 2
    x = x[:, :, :rows, :columns]
    return torch.stack([x[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)]).amax(0)


def test_forward() -> None:
    model = tiny.build("lenet").double()
    pixel_values = tiny.images(model.config).double()
    w = model.state_dict()
    x = F.conv2d(F.pad(pixel_values, (2, 2, 2, 2)), w["features.conv1.weight"], w["features.conv1.bias"])
    x = pool(x.clamp_min(0))
    x = pool(F.conv2d(x, w["features.conv2.weight"], w["features.conv2.bias"]).clamp_min(0))
    x = x.reshape(4, -1)
    for name in ("features.linear1", "features.linear2"):
        x = (x @ w[f"{name}.weight"].T + w[f"{name}.bias"]).clamp_min(0)
    expected = x @ w["classifier.weight"].T + w["classifier.bias"]
    torch.testing.assert_close(model(pixel_values).logits, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("image_size", "padding"),
    [(size, padding) for padding in (0, 2, 4) for size in range(16 - 2 * padding, 24)],
)
def test_feature_size(image_size: int, padding: int) -> None:
    config = LeNetConfig(image_size=image_size, padding=padding, conv_channels=[1, 1], hidden_sizes=[1, 1])
    shape = pool(F.conv2d(pool(torch.zeros(1, 1, *[image_size + 2 * padding - 4] * 2)), torch.zeros(1, 1, 5, 5))).shape
    assert shape[2:] == (config.feature_size, config.feature_size)
