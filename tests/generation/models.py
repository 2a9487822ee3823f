"""Tiny language models with Bayesian adapters, in float64, whose draws differ enough to tell them apart."""

from __future__ import annotations

import copy
from typing import Any

import peft
import torch
import transformers as hf
from torch import Tensor, nn

from bayeformers import to_bayesian

VOCABULARY = 13
LORA = r".*\.lora_[AB]\..*"
_COMMON = {"vocab_size": VOCABULARY, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}


def plain(name: str, **options: Any) -> Any:
    """A model with random weights, the same at every call."""
    torch.manual_seed(0)
    if name == "llama":
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
        model: Any = hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, num_key_value_heads=2, **_COMMON | options))
    elif name == "gpt2":
        model = hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=16, n_layer=2, n_head=4, n_positions=64, **_COMMON | options))
    else:
        sizes = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
        model = hf.T5ForConditionalGeneration(hf.T5Config(**sizes, **_COMMON | options))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    return model.double().eval()


TARGETS = {"llama": ["q_proj", "v_proj"], "gpt2": ["c_attn"], "t5": ["q", "v"]}


def with_lora(name: str, **options: Any) -> Any:
    """The model with adapters that do something."""
    kind = "SEQ_2_SEQ_LM" if name == "t5" else "CAUSAL_LM"
    settings = peft.LoraConfig(r=3, target_modules=TARGETS[name], task_type=kind, **options)
    model = peft.get_peft_model(plain(name), settings).double()
    torch.manual_seed(1)
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            nn.init.normal_(parameter, std=0.4)
    return model.eval()


def bayesian_lora(name: str, delta: float = 0.5, **options: Any) -> Any:
    """The same, whose adapters are drawn."""
    return to_bayesian(with_lora(name, **options), delta=delta, target_modules=LORA).eval()


def prompt(rows: int = 2, length: int = 5, *, padded: bool = True) -> dict[str, Tensor]:
    """Token ids, the second row padded on the left."""
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    if padded and rows > 1:
        ids[1, :2], mask[1, :2] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def copied(model: Any) -> Any:
    return copy.deepcopy(model)
