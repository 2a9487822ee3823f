"""The image classifiers of the literature by name, such as "lenet5", "vgg16" or "resnet20", at any width."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from transformers import PreTrainedModel, ResNetForImageClassification

from .cifar_resnet import CifarResNetConfig, CifarResNetForImageClassification
from .lenet import LeNetConfig, LeNetForImageClassification
from .resnet import resnet_config
from .scnn import SCNNConfig, SCNNForImageClassification
from .vgg import VGGConfig, VGGForImageClassification

__all__ = ["IMAGE_CLASSIFIERS", "ModelKind"]


@dataclass(frozen=True)
class ModelKind:
    """A row of `IMAGE_CLASSIFIERS`.

    Attributes:
        make: a new model, from the factor of every layer's width, and from fields of its configuration such as
            ``num_channels``, ``image_size`` and ``num_labels``.
        image_size: side of the images that it is for.
        learning_rate: of its training from scratch, by Adam.
    """

    make: Callable[[float, Mapping[str, Any]], PreTrainedModel]
    image_size: int = 32
    learning_rate: float = 1e-3


def _scaled(widths: Sequence[int], factor: float) -> list[int]:
    """Layer widths times a factor, at least 1 each."""
    return [max(1, round(factor * width)) for width in widths]


def _lenet(width: float, images: Mapping[str, Any]) -> PreTrainedModel:
    channels, hidden = _scaled((6, 16), width), _scaled((120, 84), width)
    return LeNetForImageClassification(LeNetConfig(conv_channels=channels, hidden_sizes=hidden, **images))


def _scnn(width: float, images: Mapping[str, Any]) -> PreTrainedModel:
    channels, hidden = _scaled((32, 64), width), _scaled((128,), width)[0]
    return SCNNForImageClassification(SCNNConfig(conv_channels=channels, hidden_size=hidden, **images))


def _vgg(depth: int, width: float, images: Mapping[str, Any]) -> PreTrainedModel:
    """With the one hidden layer of 512 that is usual for small images, in place of two of 4096."""
    channels, hidden = _scaled((64, 128, 256, 512, 512), width), _scaled((512,), width)
    return VGGForImageClassification(VGGConfig(depth=depth, conv_channels=channels, hidden_sizes=hidden, **images))


def _cifar_resnet(depth: int, width: float, images: Mapping[str, Any]) -> PreTrainedModel:
    config = CifarResNetConfig(depth=depth, channels=_scaled((16, 32, 64), width), **images)
    return CifarResNetForImageClassification(config)


def _resnet(depth: int, width: float, images: Mapping[str, Any]) -> PreTrainedModel:
    """Its stem divides the side of the images by 4, its stages by 8 more; any size will do."""
    config = resnet_config(depth, **{name: value for name, value in images.items() if name != "image_size"})
    config.embedding_size = _scaled((config.embedding_size,), width)[0]
    config.hidden_sizes = _scaled(config.hidden_sizes or (), width)
    return ResNetForImageClassification(config)


IMAGE_CLASSIFIERS: dict[str, ModelKind] = {
    "lenet5": ModelKind(_lenet, image_size=28),
    "scnn": ModelKind(_scnn, image_size=28),
    **{f"vgg{depth}": ModelKind(partial(_vgg, depth), learning_rate=3e-4) for depth in (11, 13, 16, 19)},
    **{f"resnet{depth}": ModelKind(partial(_cifar_resnet, depth)) for depth in (20, 32, 44, 56, 110)},
    **{f"resnet{depth}": ModelKind(partial(_resnet, depth), image_size=64) for depth in (18, 34, 50, 101, 152)},
}
"""By name: those of small images, and the ResNets of ImageNet."""
