"""Wrong configurations: errors at construction that name the argument, also for attributes set later."""

from pathlib import Path
from typing import Any

import pytest

from bayeformers import models

CONFIGS = [models.CifarResNetConfig, models.LeNetConfig, models.MLPConfig, models.SCNNConfig, models.VGGConfig]


@pytest.mark.parametrize("config_class", CONFIGS)
@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"num_channels": 0}, ValueError),
        ({"num_channels": 1.5}, TypeError),
        ({"image_size": 0}, ValueError),
        ({"image_size": (28, 28)}, TypeError),
        ({"num_labels": 1}, ValueError),
        ({"num_labels": 0}, ValueError),
        ({"num_labels": True}, TypeError),
        ({"problem_type": "regression"}, ValueError),
    ],
)
def test_every_family(config_class: Any, wrong: dict[str, Any], error: type[Exception]) -> None:
    (name,) = wrong
    with pytest.raises(error, match=f"`{name}`"):
        config_class(**wrong)


@pytest.mark.parametrize(
    ("config_class", "wrong", "message"),
    [
        (models.MLPConfig, {"hidden_sizes": [4, 0]}, r"`hidden_sizes\[1\]` must be >= 1, got 0"),
        (models.MLPConfig, {"hidden_sizes": 400}, "`hidden_sizes` must be a list of integers >= 1, got 400"),
        (models.MLPConfig, {"hidden_sizes": "400"}, "`hidden_sizes` must be a list of integers"),
        (models.MLPConfig, {"dropout": 1.0}, r"`dropout` must lie in \[0, 1\), got 1.0"),
        (models.MLPConfig, {"dropout": "0.1"}, "`dropout` must be a number"),
        (models.LeNetConfig, {"image_size": 11}, "`image_size` must be >= 12 with `padding` 2, got 11"),
        (models.LeNetConfig, {"image_size": 15, "padding": 0}, "`image_size` must be >= 16 with `padding` 0, got 15"),
        (models.LeNetConfig, {"padding": 5}, "`padding` must be an integer from 0 to 4, got 5"),
        (models.LeNetConfig, {"conv_channels": [6]}, r"`conv_channels` must have 2 numbers, got \[6\]"),
        (models.LeNetConfig, {"hidden_sizes": [6, 2.0]}, r"`hidden_sizes\[1\]` must be an integer >= 1, got 2.0"),
        (models.VGGConfig, {"depth": 12}, r"`depth` must be one of \[11, 13, 16, 19\], got 12"),
        (models.VGGConfig, {"image_size": 28}, "`image_size` must be >= 32, got 28.*Pad"),
        (models.VGGConfig, {"conv_channels": [64] * 4}, "`conv_channels` must have 5 numbers"),
        (models.VGGConfig, {"batch_norm": 1}, "`batch_norm` must be True or False, got 1"),
        (models.VGGConfig, {"dropout": -0.1}, "`dropout` must lie in"),
        (models.SCNNConfig, {"image_size": 5}, "`image_size` must be >= 6, got 5"),
        (models.SCNNConfig, {"hidden_size": 0}, "`hidden_size` must be >= 1, got 0"),
        (models.SCNNConfig, {"conv_dropout": 2}, "`conv_dropout` must lie in"),
        (models.CifarResNetConfig, {"depth": 18}, "`depth` must be 6 n . 2, such as 20, 32, 44, 56 or 110, got 18"),
        (models.CifarResNetConfig, {"depth": 2}, "`depth` must be 6 n"),
        (models.CifarResNetConfig, {"channels": [16, 32, 16]}, "`channels` must not fall"),
        (models.CifarResNetConfig, {"image_size": 3}, "`image_size` must be >= 4"),
    ],
)
def test_one_family(config_class: Any, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        config_class(**wrong)


def test_smallest_images() -> None:
    """One pixel less is refused above."""
    assert models.LeNetConfig(image_size=12).feature_size == 1
    assert models.LeNetConfig(image_size=16, padding=0).feature_size == 1
    assert models.VGGConfig(image_size=32).feature_size == 1
    assert models.SCNNConfig(image_size=6).feature_size == 1


@pytest.mark.parametrize("depth", [20, 0, "50", None])
def test_resnet_depth(depth: Any) -> None:
    with pytest.raises(ValueError, match=r"`depth` must be one of \[18, 34, 50, 101, 152\].*CifarResNetConfig"):
        models.resnet_config(depth)


def test_attribute_set_later(tmp_path: Path) -> None:
    """`from_pretrained(..., image_size=...)` and plain assignment pass by the configuration's construction."""
    config = models.VGGConfig(depth=11, image_size=32, conv_channels=[2] * 5, hidden_sizes=[])
    models.VGGForImageClassification(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`image_size` must be >= 32, got 8"):
        models.VGGForImageClassification.from_pretrained(tmp_path, image_size=8)
    config.depth = 12
    with pytest.raises(ValueError, match="`depth` must be one of"):
        models.VGGForImageClassification(config)
