"""SCNN, the simple convolutional network on MNIST of Intel's bayesian-torch and of PyTorch's MNIST example."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from torch import nn

from .base import ImageClassifier, ImageClassifierConfig, check_positive, check_rate, check_sizes

__all__ = ["SCNNConfig", "SCNNForImageClassification"]

_LEAST_SIZE = 6  # two 3 x 3 convolutions and a pool leave one pixel


class SCNNConfig(ImageClassifierConfig):
    """Configuration of :class:`SCNNForImageClassification`.

    The `SCNN` of github.com/IntelLabs/bayesian-torch, bayesian_torch/models/deterministic/simple_cnn.py.

    Args:
        conv_channels: channels of the two 3 x 3 convolutions.
        hidden_size: width of the hidden linear layer.
        conv_dropout: rate of whole channels after the pool, in [0, 1).
        dropout: rate after the hidden linear layer, in [0, 1).
        num_channels, image_size: of the images; a size >= 6.
        num_labels: number of classes.

    Raises:
        TypeError, ValueError: a wrong argument, by name.

    >>> SCNNConfig(image_size=8, num_labels=3).feature_size
    2
    """

    model_type = "bayeformers_scnn"

    def __init__(
        self,
        *,
        conv_channels: Sequence[int] = (32, 64),
        hidden_size: int = 128,
        conv_dropout: float = 0.25,
        dropout: float = 0.5,
        num_channels: int = 1,
        image_size: int = 28,
        **kwargs: Any,
    ) -> None:
        self.conv_channels = conv_channels
        self.hidden_size = hidden_size
        self.conv_dropout = conv_dropout
        self.dropout = dropout
        super().__init__(num_channels=num_channels, image_size=image_size, **kwargs)

    @property
    def feature_size(self) -> int:
        """Height and width after the pool."""
        return (self.image_size - 4) // 2

    def check(self) -> None:
        """Raise TypeError or ValueError, naming the argument."""
        super().check()
        self.conv_channels = check_sizes("conv_channels", self.conv_channels, 2)
        check_positive("hidden_size", self.hidden_size)
        self.conv_dropout = check_rate("conv_dropout", self.conv_dropout)
        self.dropout = check_rate("dropout", self.dropout)
        if self.image_size < _LEAST_SIZE:
            raise ValueError(
                f"`image_size` must be >= {_LEAST_SIZE}, got {self.image_size}: two 3 x 3 convolutions and a pool "
                "leave nothing of it. Pad or enlarge the images."
            )


class SCNNForImageClassification(ImageClassifier):
    """Two convolutions, one pool, two linear layers; 1,199,882 parameters by default.

    Shape: pixel_values (B, C, H, W) -> logits (B, K); the original returns their log-softmax.

    >>> import torch
    >>> model = SCNNForImageClassification(SCNNConfig(conv_channels=[4, 8], hidden_size=16))
    >>> model(torch.zeros(2, 1, 28, 28)).logits.shape
    torch.Size([2, 10])
    """

    config_class = SCNNConfig
    config: SCNNConfig
    base_model_prefix = "scnn"

    def __init__(self, config: SCNNConfig) -> None:
        super().__init__(config)
        first, second = config.conv_channels
        features = nn.Sequential(
            OrderedDict(
                conv1=nn.Conv2d(config.num_channels, first, 3),
                relu1=nn.ReLU(),
                conv2=nn.Conv2d(first, second, 3),
                relu2=nn.ReLU(),
                pool=nn.MaxPool2d(2),
                dropout1=nn.Dropout2d(config.conv_dropout),
                flatten=nn.Flatten(),
                linear=nn.Linear(second * config.feature_size**2, config.hidden_size),
                relu3=nn.ReLU(),
                dropout2=nn.Dropout(config.dropout),
            )
        )
        self.assemble(features, nn.Linear(config.hidden_size, self.num_labels))
