"""ImageNet's residual networks are transformers' own `ResNetForImageClassification`; here are their sizes."""

from __future__ import annotations

from typing import Any

from transformers import ResNetConfig

__all__ = ["resnet_config"]

# depth -> kind of block, blocks per stage: He et al. 2016, table 1
_DEPTHS: dict[int, tuple[str, list[int]]] = {
    18: ("basic", [2, 2, 2, 2]),
    34: ("basic", [3, 4, 6, 3]),
    50: ("bottleneck", [3, 4, 6, 3]),
    101: ("bottleneck", [3, 4, 23, 3]),
    152: ("bottleneck", [3, 8, 36, 3]),
}
_BASIC_CHANNELS = [64, 128, 256, 512]


def resnet_config(depth: int, **kwargs: Any) -> ResNetConfig:
    """Return the configuration of transformers' `ResNetForImageClassification` with 18, 34, 50, 101 or 152 layers.

    He et al. 2016 (arXiv 1512.03385), table 1. With 1,000 classes: 11,689,512, 21,797,672, 25,557,032, 44,549,160 and
    60,192,808 parameters. In bottlenecks the 3 x 3 convolution has the stride, as is usual;
    ``downsample_in_bottleneck=True`` gives it to the 1 x 1 convolution, as in the paper.

    Args:
        depth: number of layers with weights.
        kwargs: other arguments of `ResNetConfig`; ``num_labels`` is 1000 and ``problem_type``
            "single_label_classification" unless they say otherwise.

    Raises:
        ValueError: ``depth`` is none of the five.

    >>> config = resnet_config(18, num_labels=10)
    >>> config.depths, config.layer_type, config.num_labels
    ([2, 2, 2, 2], 'basic', 10)
    """
    if depth not in _DEPTHS:
        raise ValueError(
            f"`depth` must be one of {list(_DEPTHS)}, got {depth!r}. For CIFAR's 20 to 110 layers take "
            "`CifarResNetConfig`; for others, transformers' `ResNetConfig` with `depths`."
        )
    layer_type, depths = _DEPTHS[depth]
    expansion = 1 if layer_type == "basic" else 4
    own: dict[str, Any] = {
        "layer_type": layer_type,
        "depths": list(depths),
        "hidden_sizes": [expansion * channels for channels in _BASIC_CHANNELS],
        "problem_type": "single_label_classification",
    }
    if kwargs.get("id2label") is None:
        own["num_labels"] = 1000
    return ResNetConfig(**{**own, **kwargs})
