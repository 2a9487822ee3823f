"""Layers whose weight is read without a call: found in the code of their owner, and drawn where they are read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from transformers.models.clip.modeling_clip import CLIPVisionEmbeddings
from transformers.models.deberta.modeling_deberta import DebertaEncoder
from transformers.models.detr.modeling_detr import DetrModel
from transformers.models.sew_d.modeling_sew_d import SEWDTransformerEncoder
from transformers.models.t5.modeling_t5 import T5DenseActDense
from transformers.models.wavlm.modeling_wavlm import TDNNLayer, WavLMAttention

from bayeformers import fixed_draw, summary, to_bayesian
from bayeformers.conversion.registry import is_only_read, takes_past_names
from bayeformers.nn.parameters import RandomParameters
from tests.cases import case


class Reader(nn.Module):
    """Children in every use that a forward can make of one."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.read, self.both, self.described, self.handed, self.checked, self.inner = (
            nn.Linear(4, 4) for _ in range(7)
        )

    @property
    def table(self) -> Tensor:
        return self.read.weight

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        x = self.called(x.to(self.described.weight.dtype)) @ self.table
        x = self.both(x) @ self.both.weight + apply(self.handed, x)
        if isinstance(self.checked, nn.Linear):
            x = x @ self.checked.weight
        return self.described(x) + sum(row @ self.inner.weight for row in x)


def apply(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x)


def test_uses_of_a_child() -> None:
    names = dict(Reader().named_children())
    assert {name for name in names if is_only_read(Reader(), name)} == {"read", "checked", "inner"}


def test_a_read_layer_draws_where_it_is_read() -> None:
    """All its tensors are random, and the rest of the model is converted as ever."""
    model = to_bayesian(Reader(), delta=0.5)
    assert summary(model).skipped == {} and summary(model).coverage == 1.0
    kinds = {name: isinstance(module, RandomParameters) for name, module in model.named_children()}
    assert kinds == {name: name in ("read", "checked", "inner") for name in kinds}


@pytest.mark.parametrize(
    ("owner", "attribute", "expected"),
    [
        (DebertaEncoder, "rel_embeddings", True),
        (SEWDTransformerEncoder, "rel_embeddings", True),
        (WavLMAttention, "q_proj", True),
        (WavLMAttention, "out_proj", True),
        (WavLMAttention, "gru_rel_pos_linear", False),
        (TDNNLayer, "kernel", True),
        (DetrModel, "query_position_embeddings", True),
        (T5DenseActDense, "wo", False),  # reads its dtype, then calls it
        (CLIPVisionEmbeddings, "position_embedding", False),  # read only to interpolate
    ],
)
def test_architectures(owner: type[nn.Module], attribute: str, expected: bool) -> None:
    assert is_only_read(owner.__new__(owner), attribute) is expected


@pytest.mark.parametrize("name", ["deberta", "wavlm"])
def test_every_scale_acts_on_the_output(name: str) -> None:
    """What the KL counts is drawn: each rho has a gradient of the outputs."""
    model, inputs = MODELS[name]()
    to_bayesian(model, delta=0.2)
    with fixed_draw(model, 0):
        model(**inputs).logits.square().sum().backward()
    assert [n for n, p in model.named_parameters() if n.endswith("_rho") and p.grad is None] == []


def _deberta() -> tuple[nn.Module, dict[str, Any]]:
    config = hf.DebertaConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=32, relative_attention=True, pos_att_type=["c2p", "p2c"], position_biased_input=False,
    )  # fmt: skip
    return hf.DebertaForSequenceClassification(config).eval(), case("deberta-v2").inputs()


def _wavlm() -> tuple[nn.Module, dict[str, Any]]:
    config = hf.WavLMConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        conv_dim=(8, 8), conv_kernel=(4, 3), conv_stride=(2, 2), num_feat_extract_layers=2, num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2, classifier_proj_size=8, num_labels=3,
    )  # fmt: skip
    return hf.WavLMForSequenceClassification(config).eval(), {"input_values": torch.randn(2, 48)}


MODELS = {"deberta": _deberta, "wavlm": _wavlm}


def test_a_read_layer_can_be_named() -> None:
    """By itself, like any other; a layer that cannot convert is still an error."""
    model = to_bayesian(case("deberta-v2").build(), target_modules=["rel_embeddings"])
    assert [tensor.name for tensor in summary(model).tensors] == ["deberta.encoder.rel_embeddings.weight"]
    with pytest.raises(ValueError, match=r"names 'rel_embeddings.LayerNorm'|match no module"):
        to_bayesian(case("deberta-v2").build(), target_modules=["rel_embeddings.LayerNorm"])


class Base(nn.Module):
    def helper(self) -> list[Tensor]:
        return list(self.parameters())

    @property
    def first(self) -> Tensor:
        return next(self.parameters())


class ByHelper(Base):
    def forward(self) -> Tensor:
        return self.helper()[0]


class ByProperty(Base):
    def forward(self) -> Tensor:
        return self.first


class ByDict(nn.Module):
    def forward(self) -> Tensor:
        return [self._parameters[name] for name in "a"][0]  # type: ignore[return-value]


class ForItsDtype(Base):
    def forward(self) -> Tensor:
        return torch.zeros((), dtype=next(self.parameters()).dtype)


class Overridden(ByHelper):
    def helper(self) -> list[Tensor]:
        return [self.weight]


@pytest.mark.parametrize(
    ("source", "expected"),
    [(ByHelper, True), (ByProperty, True), (ByDict, True), (ForItsDtype, False), (Overridden, False), (Reader, False)],
)
def test_forwards_that_take_parameters_past_their_names(source: type[nn.Module], expected: bool) -> None:
    assert takes_past_names(source) is expected
