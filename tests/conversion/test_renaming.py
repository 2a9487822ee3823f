"""A posterior's tensors whose names, or shapes, do not survive transformers' renaming are kept out, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn
from transformers.core_model_loading import WeightRenaming

import bayeformers
from bayeformers import is_bayesian, summary, to_bayesian
from bayeformers.conversion.persistence import lost_names
from tests.cases import case

SMALL: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 32,
}  # fmt: skip


def renamed(*transforms: Any) -> nn.Module:
    """BERT with renamings of its own, as a key mapping given to `from_pretrained` leaves them."""
    model = case("bert").build()
    model._weight_conversions = list(transforms)
    return model


def nomic() -> nn.Module:
    return hf.NomicBertModel(hf.NomicBertConfig(**SMALL))


def comes_back(model: nn.Module, folder: Path) -> bool:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_rho"):
                parameter.add_(torch.randn_like(parameter))
    model.save_pretrained(folder)
    state = bayeformers.from_pretrained(folder).state_dict()
    return all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_layers_whose_scale_would_be_lost_stay_deterministic(tmp_path: Path) -> None:
    """As Inkling2's: a pattern that ends with the weight's name is applied on one way only."""
    pattern = WeightRenaming(source_patterns=r"pooler.old.kernel_rho$", target_patterns=r"pooler.dense.weight_rho")
    model = to_bayesian(renamed(pattern))
    assert summary(model).skipped["bert.pooler.dense"] == (
        "its scale would not come back from transformers' renaming of weights"
    )
    assert is_bayesian(model) and not is_bayesian(model.bert.pooler)
    model._weight_conversions = []
    assert comes_back(model, tmp_path)
    with pytest.raises(ValueError, match=r"scales of \['bert.pooler.dense'\] \(1\) could not be saved"):
        to_bayesian(renamed(pattern), target_modules=["pooler.dense", "classifier"])


def test_scales_that_are_joined_come_back(tmp_path: Path) -> None:
    """NomicBert's file holds query, key and value as one: so it does their scales."""
    model = to_bayesian(nomic())
    assert "layers.0.self_attn.q_proj" in bayeformers.bayesian_config(model).modules
    assert comes_back(model, tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": "multiplicative"}, r"`scale`=\"multiplicative\" could not be saved.*q_proj|k_proj|v_proj"),
        ({"target_modules": ["q_proj"]}, r"scales of \['layers.0.self_attn.q_proj'\] \(1\) could not be saved"),
        ({"exclude_modules": ["v_proj"]}, r"scales of .*k_proj.* \(2\) could not be saved"),
    ],
)
def test_a_part_of_what_is_joined_is_refused(options: dict[str, Any], message: str) -> None:
    model = nomic()
    with pytest.raises(ValueError, match=message):
        to_bayesian(model, **options)
    assert not is_bayesian(model)
    to_bayesian(model, scale="multiplicative", exclude_modules=["q_proj", "k_proj", "v_proj"])


@pytest.mark.parametrize("name", ["swin", "gpt-neox-lm", "bert", "gpt2-lm"])
def test_names_of_renamed_models_survive(name: str) -> None:
    """Those that come back in the matrix of architectures are let through."""
    model = case(name).build()
    added = {f"{key}_rho": tuple(value.shape) for key, value in model.named_parameters()}
    assert lost_names(model, added) == set()


def test_scales_of_inkling() -> None:
    """The one family of transformers' table whose scales are lost; its other layers become Bayesian."""
    with torch.device("meta"):
        model = hf.Inkling2TextModel(hf.Inkling2TextConfig(num_hidden_layers=12))
    names = {name: tuple(value.shape) for name, value in model.named_parameters() if name.endswith("weight")}
    lost = lost_names(model, {f"{name}_rho": shape for name, shape in names.items()})
    assert lost and all("sconv.weight_proj" in name for name in lost)
