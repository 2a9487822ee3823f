"""The image classifiers by the names of ``--model``: made for the images at hand, or loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedModel, ResNetForImageClassification

from bayeformers import models
from examples.images.data import ImageData

Make = Callable[[float, dict[str, Any]], PreTrainedModel]
"""From the factor of the widths, and the images' fields of a configuration, to a model."""


@dataclass(frozen=True)
class ModelKind:
    """A row of `MODELS`.

    Attributes:
        make: the model.
        image_size: side of the images unless ``--image_size`` says otherwise.
        learning_rate: of its training from scratch, by Adam.
    """

    make: Make
    image_size: int = 32
    learning_rate: float = 1e-3


def scaled(widths: Sequence[int], factor: float) -> list[int]:
    """Layer widths times a factor, at least 1 each.

    >>> scaled((64, 128), 0.25)
    [16, 32]
    """
    return [max(1, round(factor * width)) for width in widths]


def _lenet(width: float, images: dict[str, Any]) -> PreTrainedModel:
    channels, hidden = scaled((6, 16), width), scaled((120, 84), width)
    config = models.LeNetConfig(conv_channels=channels, hidden_sizes=hidden, **images)
    return models.LeNetForImageClassification(config)


def _scnn(width: float, images: dict[str, Any]) -> PreTrainedModel:
    channels, hidden = scaled((32, 64), width), scaled((128,), width)[0]
    return models.SCNNForImageClassification(models.SCNNConfig(conv_channels=channels, hidden_size=hidden, **images))


def _vgg(depth: int, width: float, images: dict[str, Any]) -> PreTrainedModel:
    """With the one hidden layer of 512 that is usual for small images, in place of two of 4096."""
    channels, hidden = scaled((64, 128, 256, 512, 512), width), scaled((512,), width)
    config = models.VGGConfig(depth=depth, conv_channels=channels, hidden_sizes=hidden, **images)
    return models.VGGForImageClassification(config)


def _cifar_resnet(depth: int, width: float, images: dict[str, Any]) -> PreTrainedModel:
    config = models.CifarResNetConfig(depth=depth, channels=scaled((16, 32, 64), width), **images)
    return models.CifarResNetForImageClassification(config)


def _resnet(depth: int, width: float, images: dict[str, Any]) -> PreTrainedModel:
    """Its stem divides the side of the images by 4, its stages by 8 more; any size will do."""
    fields = {name: value for name, value in images.items() if name != "image_size"}
    config = models.resnet_config(depth, **fields)
    config.embedding_size = scaled((config.embedding_size,), width)[0]
    config.hidden_sizes = scaled(config.hidden_sizes or (), width)
    return ResNetForImageClassification(config)


MODELS: dict[str, ModelKind] = {
    "lenet5": ModelKind(_lenet, image_size=28),
    "scnn": ModelKind(_scnn, image_size=28),
    **{f"vgg{depth}": ModelKind(partial(_vgg, depth), learning_rate=3e-4) for depth in (11, 13, 16, 19)},
    **{f"resnet{depth}": ModelKind(partial(_cifar_resnet, depth)) for depth in (20, 32, 44, 56, 110)},
    **{f"resnet{depth}": ModelKind(partial(_resnet, depth), image_size=64) for depth in (18, 34, 50, 101, 152)},
}
"""By the value of ``--model``."""


def model_size(name: str, name_or_path: str | None) -> int | None:
    """Side of the images that the model is for; None where a loaded model's configuration does not say."""
    if name_or_path is None:
        return MODELS[name].image_size
    size = getattr(AutoConfig.from_pretrained(name_or_path), "image_size", None)
    return size if isinstance(size, int) else None


def load_model(name: str, name_or_path: str | None, width: float, data: ImageData) -> PreTrainedModel:
    """A new model of a name of `MODELS`, or the trained one in a folder or on the hub.

    Raises:
        ValueError: the trained model is for another number of channels or of classes.
    """
    channels, height, _ = data.shape
    if name_or_path is None:
        numbers = {label: number for number, label in enumerate(data.class_names)}
        labels = {"num_labels": len(numbers), "id2label": dict(enumerate(data.class_names)), "label2id": numbers}
        return MODELS[name].make(width, {"num_channels": channels, "image_size": height, **labels})
    model: PreTrainedModel = AutoModelForImageClassification.from_pretrained(name_or_path)
    own = {"num_channels": getattr(model.config, "num_channels", channels), "num_labels": model.config.num_labels}
    needed = {"num_channels": channels, "num_labels": len(data.class_names)}
    if own != needed:
        raise ValueError(f"`model_name_or_path` {name_or_path} has {own}; the images of {data.name} need {needed}.")
    return model
