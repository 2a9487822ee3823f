"""Small float64 networks and data of the Laplace tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from bayeformers.laplace import LaplacePosterior, fit
from tests.laplace.reference import Inputs, integers, normal, part

QUIET: dict[str, Any] = {"progress": False}


def built(model: nn.Module, seed: int = 0) -> nn.Module:
    """In float64 and `eval()`, with weights of one seed; normalisations get gains that differ."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.6 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model.eval()


def mlp(d_in: int = 4, hidden: int = 5, outputs: int = 3) -> nn.Module:
    """Two Linears."""
    return built(nn.Sequential(nn.Linear(d_in, hidden), nn.Tanh(), nn.Linear(hidden, outputs)))


class Reader(nn.Module):
    """An encoder in small: ids and mask as keywords, masked attention, pooled or per-token logits in an object."""

    def __init__(self, *, pooled: bool = True, vocabulary: int = 7, width: int = 4, outputs: int = 3) -> None:
        super().__init__()
        self.table = nn.Embedding(vocabulary, width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, outputs)
        self.pooled = pooled

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        x = self.table(input_ids)
        scores = self.query(x) @ self.key(x).mT
        scores = scores.masked_fill(attention_mask[:, None, :] == 0, -torch.inf)
        x = self.norm(x + torch.tanh(scores.softmax(-1) @ self.value(x)))
        if self.pooled:
            weight = attention_mask[..., None].to(x.dtype)
            x = (x * weight).sum(1) / weight.sum(1)
        return SequenceClassifierOutput(logits=self.head(x))


class Twice(nn.Module):
    """One Linear called twice, and two Linears with one weight and bias."""

    def __init__(self) -> None:
        super().__init__()
        self.again, self.first, self.second, self.head = (nn.Linear(4, 4) for _ in range(4))
        self.second.weight, self.second.bias = self.first.weight, self.first.bias

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.again(torch.tanh(self.again(x))))
        return self.head(torch.tanh(self.second(torch.tanh(self.first(h)))))  # type: ignore[no-any-return]


def reader(**options: Any) -> nn.Module:
    """A `Reader` in float64."""
    return built(Reader(**options))


def text(count: int = 6, length: int = 4, vocabulary: int = 7) -> dict[str, Tensor]:
    """Ids with masks of 1 to ``length`` tokens."""
    lengths = integers(length, count, seed=3) + 1
    lengths[0] = length
    mask = (torch.arange(length) < lengths[:, None]).long()
    return {"input_ids": integers(vocabulary, count, length, seed=2), "attention_mask": mask}


def classes(*shape: int, outputs: int = 3) -> Tensor:
    """Labels."""
    return integers(outputs, *shape, seed=9)


def batches(inputs: Inputs, labels: Tensor | None = None, *sizes: int) -> list[Any]:
    """Batches of the given sizes (by default one of all), as (tensor, labels) or as mappings with the labels inside."""
    count = len(inputs if isinstance(inputs, Tensor) else next(iter(inputs.values())))
    found: list[Any] = []
    start = 0
    for size in sizes or (count,):
        rows = slice(start, start + size)
        given, start = part(inputs, rows), start + size
        if isinstance(given, Mapping):
            found.append(dict(given) if labels is None else {**given, "labels": labels[rows]})
        else:
            found.append(given if labels is None else (given, labels[rows]))
    assert start == count
    return found


def fitted(model: nn.Module, inputs: Inputs, labels: Tensor | None = None, **options: Any) -> LaplacePosterior:
    """`fit` to one batch, at prior precision 1 unless told."""
    return fit(model, batches(inputs, labels), **{"prior_precision": 1.0, **QUIET, **options})


def regression_data(count: int = 12, d_in: int = 3, outputs: int = 2, noise: float = 0.3) -> tuple[Tensor, Tensor]:
    """Inputs and noisy linear targets."""
    x = normal(count, d_in, seed=1)
    return x, x @ normal(d_in, outputs, seed=2) + 0.5 + noise * normal(count, outputs, seed=3)


def state(model: nn.Module) -> list[Any]:
    """Everything of a model that a fit could leave behind."""
    found: list[Any] = []
    for name, module in model.named_modules():
        found.append((name, module.training, len(module._forward_hooks), len(module._backward_hooks)))
    for name, parameter in model.named_parameters():
        found.append((name, parameter.requires_grad, parameter.grad is None, parameter.detach().clone().tolist()))
    return found
