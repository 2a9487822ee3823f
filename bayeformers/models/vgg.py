"""VGG 11, 13, 16 and 19 (Simonyan and Zisserman 2015), with or without batch normalisation, at any image size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import nn

from .base import ImageClassifier, ImageClassifierConfig, check_positive, check_rate, check_sizes

__all__ = ["VGGConfig", "VGGForImageClassification"]

# depth -> convolutions before each of the five pools: table 1, columns A, B, D, E
_CONVOLUTIONS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
_STRIDE = 32  # of five pools


class VGGConfig(ImageClassifierConfig):
    """Configuration of :class:`VGGForImageClassification`; by default as published, for ImageNet.

    Simonyan and Zisserman 2015 (arXiv 1409.1556), table 1.

    Args:
        depth: 11, 13, 16 or 19 layers with weights, when there are two hidden linear ones.
        conv_channels: channels of the convolutions before each of the five pools.
        hidden_sizes: widths of the hidden linear layers; [512] or none is usual for small images.
        batch_norm: normalise after each convolution.
        dropout: rate after each hidden linear layer, in [0, 1).
        num_channels, image_size: of the images; a size >= 32, of which the pools use whole multiples of 32.
        num_labels: number of classes.

    Raises:
        TypeError, ValueError: a wrong argument, by name.

    >>> VGGConfig(depth=11, image_size=32, hidden_sizes=[512], num_labels=10).feature_size
    1
    """

    model_type = "bayeformers_vgg"
    default_num_labels: ClassVar[int] = 1000

    def __init__(
        self,
        *,
        depth: int = 16,
        conv_channels: Sequence[int] = (64, 128, 256, 512, 512),
        hidden_sizes: Sequence[int] = (4096, 4096),
        batch_norm: bool = False,
        dropout: float = 0.5,
        num_channels: int = 3,
        image_size: int = 224,
        **kwargs: Any,
    ) -> None:
        self.depth = depth
        self.conv_channels = conv_channels
        self.hidden_sizes = hidden_sizes
        self.batch_norm = batch_norm
        self.dropout = dropout
        super().__init__(num_channels=num_channels, image_size=image_size, **kwargs)

    @property
    def feature_size(self) -> int:
        """Height and width after the fifth pool."""
        return self.image_size // _STRIDE

    def check(self) -> None:
        """Raise TypeError or ValueError, naming the argument."""
        super().check()
        if check_positive("depth", self.depth) not in _CONVOLUTIONS:
            raise ValueError(f"`depth` must be one of {list(_CONVOLUTIONS)}, got {self.depth}.")
        self.conv_channels = check_sizes("conv_channels", self.conv_channels, 5)
        self.hidden_sizes = check_sizes("hidden_sizes", self.hidden_sizes)
        if not isinstance(self.batch_norm, bool):
            raise TypeError(f"`batch_norm` must be True or False, got {self.batch_norm!r}.")
        self.dropout = check_rate("dropout", self.dropout)
        if self.feature_size < 1:
            raise ValueError(
                f"`image_size` must be >= {_STRIDE}, got {self.image_size}: five pools leave nothing of it. Pad or "
                "enlarge the images, such as MNIST's 28 x 28 to 32 x 32."
            )


class VGGForImageClassification(ImageClassifier):
    """3 x 3 convolutions in five stages with a pool each, then linear layers; VGG16 has 138,357,544 parameters.

    Entries of the state dict have torchvision's names.

    Shape: pixel_values (B, C, H, W) -> logits (B, K).

    >>> import torch
    >>> config = VGGConfig(depth=11, conv_channels=[4, 4, 8, 8, 8], hidden_sizes=[16], image_size=32, num_labels=10)
    >>> VGGForImageClassification(config)(torch.zeros(2, 3, 32, 32)).logits.shape
    torch.Size([2, 10])
    """

    config_class = VGGConfig
    config: VGGConfig
    base_model_prefix = "vgg"

    def __init__(self, config: VGGConfig) -> None:
        super().__init__(config)
        features = nn.Sequential(*_stages(config))
        sizes = [config.conv_channels[-1] * config.feature_size**2, *config.hidden_sizes]
        layers: list[nn.Module] = []
        for fan_in, fan_out in zip(sizes[:-1], sizes[1:], strict=True):
            layers += [nn.Linear(fan_in, fan_out), nn.ReLU(), nn.Dropout(config.dropout)]
        self.assemble(features, nn.Sequential(*layers, nn.Linear(sizes[-1], self.num_labels)))


def _stages(config: VGGConfig) -> list[nn.Module]:
    layers: list[nn.Module] = []
    channels = config.num_channels
    for count, width in zip(_CONVOLUTIONS[config.depth], config.conv_channels, strict=True):
        for _ in range(count):
            layers.append(nn.Conv2d(channels, width, kernel_size=3, padding=1))
            layers += [nn.BatchNorm2d(width), nn.ReLU()] if config.batch_norm else [nn.ReLU()]
            channels = width
        layers.append(nn.MaxPool2d(2))
    return layers
