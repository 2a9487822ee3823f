"""The residual networks for CIFAR of 20, 32, 44, 56 and 110 layers (He et al. 2016, section 4.2)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .base import ImageClassifier, ImageClassifierConfig, check_positive, check_sizes

__all__ = ["CifarResNetConfig", "CifarResNetForImageClassification"]

_STAGES = 3


class CifarResNetConfig(ImageClassifierConfig):
    """Configuration of :class:`CifarResNetForImageClassification`.

    He et al. 2016 (arXiv 1512.03385), section 4.2 and table 6.

    Args:
        depth: layers with weights, 6 n + 2 for n residual blocks in each of three stages: 20, 32, 44, 56, 110, ...
        channels: of the three stages, none smaller than the one before.
        num_channels, image_size: of the images; a size >= 4, of which each later stage keeps half.
        num_labels: number of classes.

    Raises:
        TypeError, ValueError: a wrong argument, by name.

    >>> CifarResNetConfig(depth=56).blocks_per_stage
    9
    """

    model_type = "bayeformers_cifar_resnet"

    def __init__(
        self,
        *,
        depth: int = 20,
        channels: Sequence[int] = (16, 32, 64),
        num_channels: int = 3,
        image_size: int = 32,
        **kwargs: Any,
    ) -> None:
        self.depth = depth
        self.channels = channels
        super().__init__(num_channels=num_channels, image_size=image_size, **kwargs)

    @property
    def blocks_per_stage(self) -> int:
        """n, of two convolutions each."""
        return (self.depth - 2) // (2 * _STAGES)

    def check(self) -> None:
        """Raise TypeError or ValueError, naming the argument."""
        super().check()
        if check_positive("depth", self.depth) < 8 or (self.depth - 2) % (2 * _STAGES):
            raise ValueError(f"`depth` must be 6 n + 2, such as 20, 32, 44, 56 or 110, got {self.depth}.")
        self.channels = check_sizes("channels", self.channels, _STAGES)
        if list(self.channels) != sorted(self.channels):
            raise ValueError(f"`channels` must not fall: shortcuts pad them with zeros, got {self.channels}.")
        if self.image_size < 4:
            raise ValueError(f"`image_size` must be >= 4, which two stages halve, got {self.image_size}.")


class CifarResNetForImageClassification(ImageClassifier):
    """One convolution, three stages of residual blocks, the mean over positions, one linear layer.

    Parameters at the default widths: 269,722 (20), 464,154 (32), 658,586 (44), 853,018 (56), 1,727,962 (110).

    Shape: pixel_values (B, C, H, W) -> logits (B, K).

    >>> import torch
    >>> model = CifarResNetForImageClassification(CifarResNetConfig(depth=20))
    >>> model.num_parameters(), model(torch.zeros(2, 3, 32, 32)).logits.shape
    (269722, torch.Size([2, 10]))
    """

    config_class = CifarResNetConfig
    config: CifarResNetConfig
    base_model_prefix = "cifar_resnet"

    def __init__(self, config: CifarResNetConfig) -> None:
        super().__init__(config)
        width = config.channels[0]
        layers: OrderedDict[str, nn.Module] = OrderedDict(
            conv=nn.Conv2d(config.num_channels, width, 3, padding=1, bias=False),
            norm=nn.BatchNorm2d(width),
            relu=nn.ReLU(),
        )
        for stage, channels in enumerate(config.channels, start=1):
            strides = [1 if stage == 1 else 2] + [1] * (config.blocks_per_stage - 1)
            widths = [width] + [channels] * (config.blocks_per_stage - 1)
            blocks = [Block(fan_in, channels, stride) for fan_in, stride in zip(widths, strides, strict=True)]
            layers[f"stage{stage}"] = nn.Sequential(*blocks)
            width = channels
        layers["pool"] = nn.AdaptiveAvgPool2d(1)
        features = nn.Sequential(layers)
        self.assemble(features, nn.Linear(width, self.num_labels))


class Block(nn.Module):
    """y = relu(shortcut(x) + norm2(conv2(relu(norm1(conv1(x)))))).

    Option A: the shortcut has no parameters; with a stride it takes every other pixel and pads channels with zeros.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.stride = stride
        self.new_channels = channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        residual = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        shortcut = x[:, :, :: self.stride, :: self.stride]
        before = self.new_channels // 2
        shortcut = F.pad(shortcut, (0, 0, 0, 0, before, self.new_channels - before))
        return F.relu(shortcut + residual)
