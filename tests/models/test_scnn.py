"""SCNN: the count of its parameters, and the forward written out."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bayeformers.models import SCNNConfig, SCNNForImageClassification
from tests.models import tiny
from tests.models.test_lenet import pool


def test_number_of_parameters() -> None:
    with torch.device("meta"):
        model = SCNNForImageClassification(SCNNConfig())
    assert model.num_parameters() == 1_199_882 == 10 * 32 + (9 * 32 + 1) * 64 + 9217 * 128 + 129 * 10


def test_forward() -> None:
    model = tiny.build("scnn").double()
    pixel_values = tiny.images(model.config).double()
    w = model.state_dict()
    x = F.conv2d(pixel_values, w["features.conv1.weight"], w["features.conv1.bias"]).clamp_min(0)
    x = pool(F.conv2d(x, w["features.conv2.weight"], w["features.conv2.bias"]).clamp_min(0)).reshape(4, -1)
    x = (x @ w["features.linear.weight"].T + w["features.linear.bias"]).clamp_min(0)
    expected = x @ w["classifier.weight"].T + w["classifier.bias"]
    torch.testing.assert_close(model(pixel_values).logits, expected, rtol=1e-12, atol=1e-12)


def test_dropout() -> None:
    """Whole channels after the pool, then units of the hidden layer."""
    model = SCNNForImageClassification(SCNNConfig(conv_channels=[1, 40], hidden_size=4, conv_dropout=0.4, dropout=0.3))
    assert type(model.features.dropout2) is nn.Dropout and model.features.dropout2.p == 0.3
    channels = model.features.dropout1.train()(torch.ones(1, 40, 3, 3))
    assert (channels == channels[:, :, :1, :1]).all()
    assert channels.unique().tolist() == pytest.approx([0, 1 / 0.6])
