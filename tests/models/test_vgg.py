"""VGG: the published counts of parameters, torchvision's names, and the forward written out."""

import pytest
import torch
import torch.nn.functional as F

from bayeformers.models import VGGConfig, VGGForImageClassification
from tests.models import tiny
from tests.models.test_lenet import pool

# Simonyan and Zisserman 2015, table 1: channels of the convolutions and "M" for a pool
TABLE = {
    11: "64 M 128 M 256 256 M 512 512 M 512 512 M",
    13: "64 64 M 128 128 M 256 256 M 512 512 M 512 512 M",
    16: "64 64 M 128 128 M 256 256 256 M 512 512 512 M 512 512 512 M",
    19: "64 64 M 128 128 M 256 256 256 256 M 512 512 512 512 M 512 512 512 512 M",
}


@pytest.mark.parametrize(
    ("depth", "count"), [(11, 132_863_336), (13, 133_047_848), (16, 138_357_544), (19, 143_667_240)]
)
def test_number_of_parameters(depth: int, count: int) -> None:
    with torch.device("meta"):
        model = VGGForImageClassification(VGGConfig(depth=depth))
        normalised = VGGForImageClassification(VGGConfig(depth=depth, batch_norm=True))
    assert model.num_parameters() == count
    channels = [int(word) for word in TABLE[depth].split() if word != "M"]
    assert len(channels) + 3 == depth
    convolutions = sum((9 * a + 1) * b for a, b in zip([3, *channels], channels, strict=False))
    assert count == convolutions + (512 * 49 + 1) * 4096 + 4097 * 4096 + 4097 * 1000
    assert normalised.num_parameters() == count + 2 * sum(channels)


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("depth", TABLE)
def test_names_are_torchvisions(depth: int, batch_norm: bool) -> None:
    """`features` counts convolution, normalisation, ReLU and pool; `classifier` linear layer, ReLU and dropout."""
    expected, index, before = {}, 0, 3
    for word in TABLE[depth].split():
        if word != "M":
            expected[f"features.{index}.weight"] = (int(word), before, 3, 3)
            before = int(word)
            if batch_norm:
                expected[f"features.{index + 1}.running_mean"] = (before,)
        index += 1 if word == "M" else 2 + batch_norm
    expected |= {
        "classifier.0.weight": (4096, 25088),
        "classifier.3.weight": (4096, 4096),
        "classifier.6.bias": (1000,),
    }
    with torch.device("meta"):
        state = VGGForImageClassification(VGGConfig(depth=depth, batch_norm=batch_norm)).state_dict()
    assert {name: tuple(state[name].shape) for name in expected} == expected
    assert len(state) == (7 if batch_norm else 2) * (depth - 3) + 6


def test_forward() -> None:
    """Size 65: pools leave out the odd last row; dropout is off."""
    model = tiny.build("vgg").double()
    pixel_values = x = tiny.images(model.config).double()
    w = list(model.parameters())
    for word in TABLE[11].split():
        x = pool(x) if word == "M" else F.conv2d(F.pad(x, (1, 1, 1, 1)), w.pop(0), w.pop(0)).clamp_min(0)
    x = (x.reshape(4, 6 * 2 * 2) @ w.pop(0).T + w.pop(0)).clamp_min(0)
    expected = x @ w.pop(0).T + w.pop(0)
    assert not w
    torch.testing.assert_close(model(pixel_values).logits, expected, rtol=1e-12, atol=1e-12)


def test_forward_with_batch_norm() -> None:
    model = tiny.build("vgg_bn").double()
    pixel_values = x = tiny.images(model.config).double()
    w = [value for name, value in model.state_dict().items() if not name.endswith("num_batches_tracked")]
    for word in TABLE[13].split():
        if word == "M":
            x = pool(x)
        else:
            x = F.conv2d(F.pad(x, (1, 1, 1, 1)), w.pop(0), w.pop(0))
            gain, bias, mean, variance = (w.pop(0)[:, None, None] for _ in range(4))
            x = ((x - mean) / (variance + 1e-5).sqrt() * gain + bias).clamp_min(0)
    expected = x.reshape(4, 2) @ w.pop(0).T + w.pop(0)
    assert not w
    torch.testing.assert_close(model(pixel_values).logits, expected, rtol=1e-12, atol=1e-12)


def test_dropout_follows_each_hidden_layer() -> None:
    with torch.device("meta"):
        model = VGGForImageClassification(VGGConfig(dropout=0.3))
    assert [type(layer).__name__ for layer in model.classifier] == ["Linear", "ReLU", "Dropout"] * 2 + ["Linear"]
    assert [layer.p for layer in model.classifier if isinstance(layer, torch.nn.Dropout)] == [0.3, 0.3]
