"""Small members of every family, with images and labels for them; nothing in them is 0 or 1 by initialization."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel, ResNetConfig, ResNetForImageClassification

from bayeformers import models

CLASSES = 3

FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "mlp": lambda: models.MLPForImageClassification(
        models.MLPConfig(hidden_sizes=[7, 5], dropout=0.2, image_size=6, num_channels=2, num_labels=CLASSES)
    ),
    "lenet": lambda: models.LeNetForImageClassification(
        models.LeNetConfig(conv_channels=[2, 3], hidden_sizes=[8, 6], image_size=13, num_labels=CLASSES)
    ),
    "vgg": lambda: models.VGGForImageClassification(
        models.VGGConfig(
            depth=11, conv_channels=[2, 3, 4, 5, 6], hidden_sizes=[7], image_size=65, num_channels=1, num_labels=CLASSES
        )
    ),
    "vgg_bn": lambda: models.VGGForImageClassification(
        models.VGGConfig(
            depth=13, conv_channels=[2, 3, 2, 3, 2], hidden_sizes=[], batch_norm=True, image_size=32, num_labels=CLASSES
        )
    ),
    "scnn": lambda: models.SCNNForImageClassification(
        models.SCNNConfig(conv_channels=[2, 3], hidden_size=6, image_size=9, num_labels=CLASSES)
    ),
    "cifar_resnet": lambda: models.CifarResNetForImageClassification(
        models.CifarResNetConfig(depth=14, channels=[2, 4, 7], image_size=9, num_labels=CLASSES)
    ),
    "resnet": lambda: ResNetForImageClassification(
        models.resnet_config(18, embedding_size=4, hidden_sizes=[4, 6, 6, 8], num_labels=CLASSES)
    ),
}
OWN = [family for family in FAMILIES if family != "resnet"]


def build(family: str) -> Any:
    """The same model at every call, in `eval()` mode; also biases, gains and running statistics are random."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = FAMILIES[family]()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
            for module in model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.running_mean.normal_(std=0.3)
                    module.running_var.uniform_(0.5, 2.0)
    return model.eval()


def images(config: Any, count: int = 4, seed: int = 0) -> Tensor:
    """(count, C, H, W), standard normal."""
    size = 33 if isinstance(config, ResNetConfig) else config.image_size
    return torch.randn(count, config.num_channels, size, size, generator=torch.Generator().manual_seed(seed))


class Rows(Dataset[dict[str, Tensor]]):
    """Images with labels."""

    def __init__(self, config: Any, count: int = 8) -> None:
        self.pixel_values = images(config, count, seed=1)
        self.labels = torch.arange(count) % CLASSES

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixel_values": self.pixel_values[index], "labels": self.labels[index]}
