"""CIFAR's residual networks: the counts of the paper's table 6, and the forward written out."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bayeformers.models import CifarResNetConfig, CifarResNetForImageClassification
from tests.models import tiny


@pytest.mark.parametrize(
    ("depth", "count", "millions"),
    [
        (20, 269_722, "0.27"),
        (32, 464_154, "0.46"),
        (44, 658_586, "0.66"),
        (56, 853_018, "0.85"),
        (110, 1_727_962, "1.7"),
    ],
)
def test_number_of_parameters(depth: int, count: int, millions: str) -> None:
    with torch.device("meta"):
        model = CifarResNetForImageClassification(CifarResNetConfig(depth=depth))
    assert model.num_parameters() == count
    assert f"{count / 1e6:.{len(millions) - 2}f}" == millions
    layers = [module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    assert len(layers) == depth  # shortcuts have none
    n = (depth - 2) // 6
    convolutions = 9 * (3 * 16 + 2 * n * 16**2 + 16 * 32 + (2 * n - 1) * 32**2 + 32 * 64 + (2 * n - 1) * 64**2)
    norms = 2 * (16 + 2 * n * (16 + 32 + 64))
    assert count == convolutions + norms + 65 * 10


def norm(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    mean, variance = w[f"{name}.running_mean"], w[f"{name}.running_var"]
    scaled = (x - mean[:, None, None]) / (variance[:, None, None] + 1e-5).sqrt()
    return scaled * w[f"{name}.weight"][:, None, None] + w[f"{name}.bias"][:, None, None]


def test_forward() -> None:
    """Channels 2, 4, 7 with two blocks each at size 9: strides over odd sizes, and three new channels, one in front."""
    model = tiny.build("cifar_resnet").double()
    pixel_values = tiny.images(model.config).double()
    w = model.state_dict()
    x = norm(F.conv2d(pixel_values, w["features.conv.weight"], padding=1), w, "features.norm").clamp_min(0)
    for stage, (channels, size) in enumerate([(2, 9), (4, 5), (7, 3)], start=1):
        for block in range(2):
            name = f"features.stage{stage}.{block}"
            stride = 2 if stage > 1 and block == 0 else 1
            y = F.conv2d(F.pad(x, (1, 1, 1, 1)), w[f"{name}.conv1.weight"])[:, :, ::stride, ::stride]
            y = norm(y, w, f"{name}.norm1").clamp_min(0)
            y = norm(F.conv2d(F.pad(y, (1, 1, 1, 1)), w[f"{name}.conv2.weight"]), w, f"{name}.norm2")
            shortcut, front = torch.zeros_like(y), (channels - x.shape[1]) // 2
            for channel in range(x.shape[1]):
                shortcut[:, front + channel] = x[:, channel, ::stride, ::stride]
            x = (y + shortcut).clamp_min(0)
        assert x.shape == (4, channels, size, size)
    expected = x.mean((2, 3)) @ w["classifier.weight"].T + w["classifier.bias"]
    torch.testing.assert_close(model(pixel_values).logits, expected, rtol=1e-12, atol=1e-12)
