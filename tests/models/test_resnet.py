"""Configurations of transformers' ResNet: the usual counts of parameters, and which arguments go through."""

import pytest
import torch
from torch import nn
from transformers import ResNetForImageClassification

from bayeformers.models import resnet_config


@pytest.mark.parametrize(
    ("depth", "count"),
    [(18, 11_689_512), (34, 21_797_672), (50, 25_557_032), (101, 44_549_160), (152, 60_192_808)],
)
def test_number_of_parameters(depth: int, count: int) -> None:
    with torch.device("meta"):
        model = ResNetForImageClassification(resnet_config(depth))
    assert model.num_parameters() == count
    shortcuts = [name for name, module in model.named_modules() if name.endswith("shortcut.convolution")]
    layers = [module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    assert len(layers) - len(shortcuts) == depth


def test_arguments_go_through() -> None:
    config = resnet_config(50, num_channels=1, num_labels=7, downsample_in_bottleneck=True)
    assert (config.num_channels, config.num_labels, config.downsample_in_bottleneck) == (1, 7, True)
    assert resnet_config(18, id2label={0: "cat", 1: "dog"}).id2label == {0: "cat", 1: "dog"}
    assert resnet_config(18).problem_type == "single_label_classification"
    assert resnet_config(18, problem_type="multi_label_classification").problem_type == "multi_label_classification"
