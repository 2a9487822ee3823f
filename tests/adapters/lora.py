"""Tiny models with a LoRA adapter, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

LENGTHS = (6, 4, 3, 5)
CLASSES = 3


def _config(kind: type[Any], **options: Any) -> Any:
    return kind(
        vocab_size=40,
        hidden_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=16,
        pad_token_id=0,
        **options,
    )


def bert(*, trained: bool = True, seed: int = 0, **options: Any) -> nn.Module:
    """A classifier of 3 classes whose query and value are adapted; ``trained``: B is not 0, and no weight is small."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = hf.BertForSequenceClassification(_config(hf.BertConfig, num_labels=CLASSES))
        return _adapted(model, trained=trained, target_modules=["query", "value"], task_type="SEQ_CLS", **options)


def llama(*, trained: bool = True, seed: int = 0, **options: Any) -> nn.Module:
    """A language model over 40 tokens, likewise."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = hf.LlamaForCausalLM(_config(hf.LlamaConfig, num_key_value_heads=2))
        return _adapted(model, trained=trained, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **options)


def gpt2(*, trained: bool = True, seed: int = 0, **options: Any) -> nn.Module:
    """A language model that is float64 throughout, which Llama's norms and rotations are not."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = hf.GPT2LMHeadModel(
            hf.GPT2Config(vocab_size=40, n_embd=12, n_layer=2, n_head=2, n_positions=16, bos_token_id=1, eos_token_id=1)
        )
        own = {"target_modules": ["c_attn"], "fan_in_fan_out": True, "task_type": "CAUSAL_LM"}
        return _adapted(model, trained=trained, **own, **options)


def _adapted(model: Any, *, trained: bool, **options: Any) -> nn.Module:
    peft = pytest.importorskip("peft")
    adapted: nn.Module = peft.get_peft_model(model, peft.LoraConfig(**{"r": 2, "lora_alpha": 6, **options}))
    if trained:
        with torch.no_grad():
            for parameter in adapted.parameters():  # a fresh model hardly attends to anything
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return adapted.double().eval()


def inputs(*, left: bool = False, seed: int = 1) -> dict[str, Tensor]:
    """Ids and attention mask of rows of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    width = max(LENGTHS)
    ids, mask = torch.zeros(len(LENGTHS), width, dtype=torch.long), torch.zeros(len(LENGTHS), width, dtype=torch.long)
    for row, length in enumerate(LENGTHS):
        place = slice(width - length, width) if left else slice(0, length)
        ids[row, place] = torch.randint(1, 40, (length,), generator=generator)
        mask[row, place] = 1
    return {"input_ids": ids, "attention_mask": mask}


def labels(count: int = CLASSES) -> Tensor:
    """One class per row."""
    return torch.arange(len(LENGTHS)) % count


def dense_normal(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """An orthonormal basis (n, k) of a covariance's range, and the covariance there (k, k)."""
    values, vectors = torch.linalg.eigh(covariance)
    basis = vectors[:, values > 1e-9 * values.max()]
    return basis, basis.mT @ covariance @ basis
