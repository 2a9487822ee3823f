"""A converted convolutional network starts where its training ended: nothing but weight noise is new."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from bayeformers import predict, to_bayesian

TEST = 597
DRAWS = 16


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    """1,797 images of 8 x 8 pixels, in the data's own order."""
    data = load_digits()
    return torch.tensor(data.images, dtype=torch.float32)[:, None] / 16, torch.tensor(data.target)


@pytest.fixture(scope="module")
def trained(digits: tuple[Tensor, Tensor]) -> nn.Module:
    images, labels = (part[:-TEST] for part in digits)
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU()]
    net = nn.Sequential(*layers, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(15):
        for rows in torch.randperm(len(labels)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(net(images[rows]), labels[rows]).backward()
            optimizer.step()
    return net.eval()


def accuracy(log_probs: Tensor, labels: Tensor) -> float:
    return float(np.mean(log_probs.argmax(-1).numpy() == labels.numpy()))


@pytest.mark.parametrize("freeze", [True, False])
def test_conversion_starts_at_the_trained_accuracy(
    trained: nn.Module, digits: tuple[Tensor, Tensor], freeze: bool
) -> None:
    images, labels = (part[-TEST:] for part in digits)
    with torch.no_grad():
        logits = trained(images)
    before = accuracy(logits, labels)
    assert before > 0.9  # there is something to lose

    model = to_bayesian(copy.deepcopy(trained), delta=0.05, freeze=freeze, estimator="flipout")
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(images), logits)
    found = predict(model, images, num_samples=DRAWS).mean_log_probs
    assert accuracy(found, labels) == pytest.approx(before, abs=0.005)
