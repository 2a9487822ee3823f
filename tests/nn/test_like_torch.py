"""At the posterior mean a layer is its torch layer: 200 random argument combinations of each of the small layers.

Convolutions, attention and recurrent layers have the same test in files of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import bayeformers.nn as bnn
from bayeformers import posterior_mean
from bayeformers.nn.estimators import ESTIMATORS

SIZE = st.integers(1, 5)
DTYPE = st.sampled_from([torch.float32, torch.float64, torch.bfloat16])
LEADING = st.lists(st.integers(0, 3), max_size=3)

Made = tuple[type[nn.Module], type[nn.Module], tuple[Any, ...], dict[str, Any], tuple[Tensor, ...]]
"""Torch's class, ours, arguments, keywords, inputs."""


def values(draw: Callable[..., Any], *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return torch.randn(*shape, generator=generator).to(dtype)


def ids(draw: Callable[..., Any], rows: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return torch.randint(rows, shape, generator=generator)


def linear(draw: Callable[..., Any]) -> Made:
    wide, high, dtype = draw(SIZE), draw(SIZE), draw(DTYPE)
    keywords = {"bias": draw(st.booleans()), "dtype": dtype}
    return nn.Linear, bnn.Linear, (wide, high), keywords, (values(draw, *draw(LEADING), wide, dtype=dtype),)


def conv1d(draw: Callable[..., Any]) -> Made:
    wide, high = draw(SIZE), draw(SIZE)
    return Conv1D, bnn.Conv1D, (high, wide), {}, (values(draw, *draw(LEADING), wide),)


def embedding(draw: Callable[..., Any]) -> Made:
    rows, dtype = draw(SIZE), draw(DTYPE)
    padding = draw(st.one_of(st.none(), st.integers(-rows, rows - 1)))
    keywords = {"padding_idx": padding, "dtype": dtype}
    return nn.Embedding, bnn.Embedding, (rows, draw(SIZE)), keywords, (ids(draw, rows, *draw(LEADING)),)


def bilinear(draw: Callable[..., Any]) -> Made:
    first, second, high, dtype = draw(SIZE), draw(SIZE), draw(SIZE), draw(DTYPE)
    keywords, leading = {"bias": draw(st.booleans()), "dtype": dtype}, draw(LEADING)
    inputs = tuple(values(draw, *leading, wide, dtype=dtype) for wide in (first, second))
    return nn.Bilinear, bnn.Bilinear, (first, second, high), keywords, inputs


def embedding_bag(draw: Callable[..., Any]) -> Made:
    rows, bags, length = draw(SIZE), draw(SIZE), draw(SIZE)
    mode = draw(st.sampled_from(["sum", "mean", "max"]))
    keywords = {"mode": mode, "padding_idx": draw(st.one_of(st.none(), st.integers(-rows, rows - 1)))}
    if draw(st.booleans()):
        found, offsets = ids(draw, rows, bags, length), None
    else:
        keywords["include_last_offset"] = draw(st.booleans())
        starts = sorted(draw(st.lists(st.integers(0, length), min_size=bags - 1, max_size=bags - 1)))
        offsets = torch.tensor([0, *starts] + [length] * keywords["include_last_offset"])
        found = ids(draw, rows, length)
    weights = values(draw, *found.shape) if mode == "sum" and draw(st.booleans()) else None
    return nn.EmbeddingBag, bnn.EmbeddingBag, (rows, draw(SIZE)), keywords, (found, offsets, weights)


def layer_norm(draw: Callable[..., Any]) -> Made:
    shape, dtype = draw(st.lists(SIZE, min_size=1, max_size=3)), draw(DTYPE)
    keywords = {"eps": draw(st.sampled_from([1e-5, 0.1])), "bias": draw(st.booleans()), "dtype": dtype}
    return nn.LayerNorm, bnn.LayerNorm, (shape,), keywords, (values(draw, *draw(LEADING), *shape, dtype=dtype),)


def rms_norm(draw: Callable[..., Any]) -> Made:
    shape, dtype = draw(st.lists(SIZE, min_size=1, max_size=3)), draw(DTYPE)
    keywords = {"eps": draw(st.sampled_from([None, 1e-5, 0.1])), "dtype": dtype}
    return nn.RMSNorm, bnn.RMSNorm, (shape,), keywords, (values(draw, *draw(LEADING), *shape, dtype=dtype),)


MAKERS = [linear, conv1d, embedding, bilinear, embedding_bag, layer_norm, rms_norm]


@pytest.mark.parametrize("maker", MAKERS, ids=lambda maker: maker.__name__)
def test_at_the_posterior_mean(maker: Callable[..., Made]) -> None:
    """Same output, same error, one state dict; in `eval()`, and in `train()` with the mean held."""

    @settings(max_examples=200, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.data(), st.sampled_from(sorted(ESTIMATORS)))
    def check(data: Any, estimator: str) -> None:
        torch_class, ours, arguments, keywords, inputs = maker(data.draw)
        plain, layer = torch_class(*arguments, **keywords), ours(*arguments, **keywords, estimator=estimator)
        rhos = {name: value for name, value in layer.state_dict().items() if name.endswith("_rho")}
        layer.load_state_dict(plain.state_dict() | rhos)
        try:
            expected = plain(*inputs)
        except (RuntimeError, ValueError, IndexError) as error:
            with pytest.raises(type(error)):
                layer.eval()(*inputs)
            return
        assert torch.equal(layer.eval()(*inputs), expected)
        with posterior_mean(layer.train()):
            assert torch.equal(layer(*inputs), expected)
        drawn = layer(*inputs)
        assert drawn.shape == expected.shape and drawn.dtype == expected.dtype

    check()


@pytest.mark.parametrize("estimator", sorted(ESTIMATORS))
@pytest.mark.parametrize("kind", ["conv1d", "embedding"])
def test_compiles_in_one_graph(kind: str, estimator: str) -> None:
    layer: Any = bnn.Conv1D(3, 4, estimator=estimator)
    x = torch.randn(2, 5, 4)
    if kind == "embedding":
        layer, x = bnn.Embedding(6, 4, estimator=estimator), torch.randint(6, (2, 5))
    compiled = torch.compile(layer.train(), fullgraph=True, backend="aot_eager")
    compiled(x).sum().backward()
    assert layer.weight_rho.grad is not None
    assert torch.equal(torch.compile(layer.eval(), fullgraph=True, backend="aot_eager")(x), layer(x))
