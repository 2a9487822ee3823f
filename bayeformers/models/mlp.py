"""Multilayer perceptron on pixels; by default the one of Bayes by Backprop (Blundell et al. 2015)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from torch import nn

from .base import ImageClassifier, ImageClassifierConfig, check_rate, check_sizes

__all__ = ["MLPConfig", "MLPForImageClassification"]


class MLPConfig(ImageClassifierConfig):
    """Configuration of :class:`MLPForImageClassification`.

    Blundell et al. 2015 (arXiv 1505.05424), section 5.1, have two hidden layers of 400, 800 or 1200 on MNIST.

    Args:
        hidden_sizes: widths of the hidden layers; none makes logistic regression.
        dropout: rate after each hidden layer, in [0, 1).
        num_channels, image_size: of the images; every pixel is an input.
        num_labels: number of classes.

    Raises:
        TypeError, ValueError: a wrong argument, by name.

    >>> MLPConfig(hidden_sizes=[1200, 1200]).num_labels
    10
    """

    model_type = "bayeformers_mlp"

    def __init__(
        self,
        *,
        hidden_sizes: Sequence[int] = (400, 400),
        dropout: float = 0.0,
        num_channels: int = 1,
        image_size: int = 28,
        **kwargs: Any,
    ) -> None:
        self.hidden_sizes = hidden_sizes
        self.dropout = dropout
        super().__init__(num_channels=num_channels, image_size=image_size, **kwargs)

    def check(self) -> None:
        """Raise TypeError or ValueError, naming the argument."""
        super().check()
        self.hidden_sizes = check_sizes("hidden_sizes", self.hidden_sizes)
        self.dropout = check_rate("dropout", self.dropout)


class MLPForImageClassification(ImageClassifier):
    """Linear layers with ReLU between: 784-400-400-10 by default, 478,410 parameters.

    Shape: pixel_values (B, C, H, W) -> logits (B, K).

    >>> import torch
    >>> model = MLPForImageClassification(MLPConfig(image_size=8, hidden_sizes=[16]))
    >>> model(torch.zeros(2, 1, 8, 8)).logits.shape
    torch.Size([2, 10])
    """

    config_class = MLPConfig
    config: MLPConfig
    base_model_prefix = "mlp"

    def __init__(self, config: MLPConfig) -> None:
        super().__init__(config)
        sizes = [config.num_channels * config.image_size**2, *config.hidden_sizes]
        layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
        for i, (fan_in, fan_out) in enumerate(zip(sizes[:-1], sizes[1:], strict=True), start=1):
            layers[f"linear{i}"] = nn.Linear(fan_in, fan_out)
            layers[f"relu{i}"] = nn.ReLU()
            layers[f"dropout{i}"] = nn.Dropout(config.dropout)
        features = nn.Sequential(layers)
        self.assemble(features, nn.Linear(sizes[-1], self.num_labels))
