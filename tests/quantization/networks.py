"""Small models for INT8, and how two posteriors' draws are compared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from bayeformers.posteriors import Posterior

SIZES: dict[str, Any] = {
    "vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
    "max_position_embeddings": 16,
}  # fmt: skip


def mlp(width: int = 12) -> nn.Module:
    return nn.Sequential(nn.Linear(8, width), nn.Tanh(), nn.Linear(width, 3)).eval()


def bert(**changes: Any) -> nn.Module:
    return BertForSequenceClassification(BertConfig(**{**SIZES, "num_labels": 3, **changes})).eval()


def masked_lm() -> nn.Module:
    return BertForMaskedLM(BertConfig(**SIZES)).eval()


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(vocab_size=60, n_positions=16, n_embd=16, n_layer=2, n_head=2)).eval()


def sentences(batch: int = 4) -> dict[str, Tensor]:
    ids = torch.randint(1, 60, (batch, 7), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def images(*sizes: int) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(2))


class Named(nn.Module):
    """One layer, so that it has a name."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


LAYERS: dict[str, tuple[Callable[[bool], nn.Module], Callable[[], Tensor]]] = {
    "Linear": (lambda bias: nn.Linear(7, 5, bias=bias), lambda: images(3, 2, 7)),
    "Linear, one output": (lambda bias: nn.Linear(1, 1, bias=bias), lambda: images(4, 1)),
    "Conv1d": (lambda bias: nn.Conv1d(4, 6, 3, stride=2, groups=2, bias=bias), lambda: images(2, 4, 9)),
    "Conv2d": (lambda bias: nn.Conv2d(2, 3, (3, 2), padding=1, dilation=2, bias=bias), lambda: images(2, 2, 7, 6)),
    "Conv2d, reflected": (
        lambda bias: nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=bias, padding_mode="reflect"),
        lambda: images(1, 4, 5, 5),
    ),
    "Conv3d": (lambda bias: nn.Conv3d(1, 2, 2, bias=bias), lambda: images(2, 1, 3, 4, 3)),
    "ConvTranspose1d": (
        lambda bias: nn.ConvTranspose1d(4, 6, 3, stride=2, groups=2, bias=bias),
        lambda: images(2, 4, 5),
    ),
    "ConvTranspose2d": (
        lambda bias: nn.ConvTranspose2d(3, 2, 3, stride=2, padding=1, output_padding=1, bias=bias),
        lambda: images(2, 3, 4, 3),
    ),
    "ConvTranspose3d": (lambda bias: nn.ConvTranspose3d(2, 1, 2, bias=bias), lambda: images(1, 2, 2, 3, 2)),
}


def conv1d(bias: bool = True) -> nn.Module:
    """transformers' layer always has a bias; without one it is zero."""
    layer = Conv1D(5, 7)
    nn.init.normal_(layer.bias if bias else layer.weight)
    return layer


def probs(posterior: Posterior, inputs: Any, num_samples: int = 32) -> Tensor:
    """Of each draw, (S, B, C)."""
    return posterior.predict(inputs, num_samples=num_samples, method="sample").log_probs.exp()


def spread(values: Tensor) -> float:
    """Root mean square over all but the draws of the standard deviation over draws."""
    return float(values.var(0).mean().sqrt())
