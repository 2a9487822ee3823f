"""Layers whose weight is read without a call take no draw: they stay deterministic, and say why."""

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
from bayeformers.registry import is_only_read
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


def test_a_read_layer_stays_deterministic_and_says_why() -> None:
    model = to_bayesian(Reader(), delta=0.5)
    assert summary(model).skipped == dict.fromkeys(
        ("read", "checked", "inner"), "its weight is read by Reader without calling the layer"
    )


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


def test_naming_a_read_layer_is_an_error() -> None:
    model = case("deberta-v2").build()
    with pytest.raises(ValueError, match=r"names 'rel_embeddings', of which nothing .* DebertaV2Encoder without"):
        to_bayesian(model, target_modules=["rel_embeddings", "dense"])
    with pytest.raises(ValueError, match=r"leaves nothing to convert .*its weight is read by DebertaV2Encoder"):
        to_bayesian(model, target_modules=r".*rel_embeddings")
