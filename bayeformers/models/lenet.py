"""LeNet5 (LeCun et al. 1998), with the ReLU, the max pools and the full connections that are usual today."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from torch import nn

from ..checks import is_whole
from .base import ImageClassifier, ImageClassifierConfig, check_sizes

__all__ = ["LeNetConfig", "LeNetForImageClassification"]

_KERNEL = 5


class LeNetConfig(ImageClassifierConfig):
    """Configuration of :class:`LeNetForImageClassification`; by default for MNIST's 28 x 28.

    LeCun et al. 1998, "Gradient-based learning applied to document recognition", section II-B, pad digits of 28 to 32,
    which ``padding`` does here.

    Args:
        conv_channels: channels of the two 5 x 5 convolutions.
        hidden_sizes: widths of the two hidden linear layers.
        padding: zeros around the image, 0 to 4; 0 for images of 32.
        num_channels, image_size: of the images; an odd size loses its last row and column in a pool.
        num_labels: number of classes.

    Raises:
        TypeError, ValueError: a wrong argument, by name; an image that is too small for both convolutions and pools.

    >>> LeNetConfig(image_size=32, padding=0, num_channels=3).feature_size    # as often on CIFAR10
    5
    """

    model_type = "bayeformers_lenet"

    def __init__(
        self,
        *,
        conv_channels: Sequence[int] = (6, 16),
        hidden_sizes: Sequence[int] = (120, 84),
        padding: int = 2,
        num_channels: int = 1,
        image_size: int = 28,
        **kwargs: Any,
    ) -> None:
        self.conv_channels = conv_channels
        self.hidden_sizes = hidden_sizes
        self.padding = padding
        super().__init__(num_channels=num_channels, image_size=image_size, **kwargs)

    @property
    def feature_size(self) -> int:
        """Height and width after the second pool."""
        return ((self.image_size + 2 * self.padding - _KERNEL + 1) // 2 - _KERNEL + 1) // 2

    def check(self) -> None:
        """Raise TypeError or ValueError, naming the argument."""
        super().check()
        self.conv_channels = check_sizes("conv_channels", self.conv_channels, 2)
        self.hidden_sizes = check_sizes("hidden_sizes", self.hidden_sizes, 2)
        if not is_whole(self.padding) or not 0 <= self.padding < _KERNEL:
            raise ValueError(f"`padding` must be an integer from 0 to {_KERNEL - 1}, got {self.padding!r}.")
        if self.feature_size < 1:
            least = 16 - 2 * self.padding
            raise ValueError(
                f"`image_size` must be >= {least} with `padding` {self.padding}, got {self.image_size}: two 5 x 5 "
                "convolutions and two pools leave nothing of it. Enlarge the images, or raise `padding`."
            )


class LeNetForImageClassification(ImageClassifier):
    """Two convolutions, each with a pool, and three linear layers; 61,706 parameters by default.

    Shape: pixel_values (B, C, H, W) -> logits (B, K).

    >>> import torch
    >>> model = LeNetForImageClassification(LeNetConfig())
    >>> model.num_parameters(), model(torch.zeros(2, 1, 28, 28)).logits.shape
    (61706, torch.Size([2, 10]))
    """

    config_class = LeNetConfig
    config: LeNetConfig
    base_model_prefix = "lenet"

    def __init__(self, config: LeNetConfig) -> None:
        super().__init__(config)
        first, second = config.conv_channels
        wide, narrow = config.hidden_sizes
        features = nn.Sequential(
            OrderedDict(
                conv1=nn.Conv2d(config.num_channels, first, _KERNEL, padding=config.padding),
                relu1=nn.ReLU(),
                pool1=nn.MaxPool2d(2),
                conv2=nn.Conv2d(first, second, _KERNEL),
                relu2=nn.ReLU(),
                pool2=nn.MaxPool2d(2),
                flatten=nn.Flatten(),
                linear1=nn.Linear(second * config.feature_size**2, wide),
                relu3=nn.ReLU(),
                linear2=nn.Linear(wide, narrow),
                relu4=nn.ReLU(),
            )
        )
        self.assemble(features, nn.Linear(narrow, self.num_labels))
