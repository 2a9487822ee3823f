"""The network of the regression example: numbers in, a mean (and a log variance) out, as a transformers model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput


class CurveConfig(PretrainedConfig):
    """`num_labels` is 1 (a mean), or 2 (a mean and a log variance: `noise_std="head"`)."""

    model_type = "curve"

    def __init__(self, hidden_sizes: tuple[int, ...] = (50,), **kwargs: Any) -> None:
        super().__init__(**{"num_labels": 1, "problem_type": "regression", **kwargs})
        self.hidden_sizes = list(hidden_sizes)


class CurveNetwork(PreTrainedModel):
    """x (B,) -> tanh layers -> logits (B, num_labels). With labels (B,) it returns the squared error as its loss."""

    config_class = CurveConfig

    def __init__(self, config: CurveConfig) -> None:
        super().__init__(config)
        sizes = [1, *config.hidden_sizes, config.num_labels]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes[:-1], sizes[1:], strict=True))
        self.post_init()

    def features(self, x: Tensor) -> Tensor:
        """What the last layer reads: (B, hidden_sizes[-1])."""
        hidden = x.reshape(-1, 1)
        for layer in list(self.layers)[:-1]:
            hidden = layer(hidden).tanh()
        return hidden

    def forward(self, x: Tensor, labels: Tensor | None = None, **_: Any) -> SequenceClassifierOutput:
        logits = self.layers[-1](self.features(x))
        loss = None if labels is None else (logits[:, 0] - labels).square().mean()
        return SequenceClassifierOutput(loss=loss, logits=logits)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.xavier_normal_(module.weight)
            nn.init.zeros_(module.bias)


def stacked_forward(network: CurveNetwork, weights: Tensor, x: Tensor) -> Tensor:
    """The logits (S, B, num_labels) of S networks at once; ``weights`` (S, P) as `parameters_to_vector` orders them."""
    hidden, start = x.reshape(1, -1, 1).expand(len(weights), -1, 1), 0
    for index, layer in enumerate(network.layers):
        rows, columns = layer.weight.shape
        middle, stop = start + rows * columns, start + rows * columns + rows
        weight = weights[:, start:middle].reshape(-1, rows, columns)
        hidden = torch.baddbmm(weights[:, None, middle:stop], hidden if index == 0 else hidden.tanh(), weight.mT)
        start = stop
    return hidden
