"""Tiny language models, and pipelines over them, for tests of pipelines that write."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import bayeformers
from bayeformers import to_bayesian
from tests.generation import models
from tests.training.trainers import WORDS, llama, tokenizer

TEXTS = ["w1 w2 w3", "w4", "w7 w8 w2 w9 w1"]
GREEDY = {"max_new_tokens": 5, "do_sample": False}
VOCABULARY = {"vocab_size": WORDS, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}


def gpt2() -> Any:
    return models.plain("gpt2", **VOCABULARY)


def t5() -> Any:
    return models.plain("t5", **VOCABULARY)


def drawn(name: str = "llama", delta: float = 0.5) -> Any:
    """A model whose draws write different texts, in float64."""
    build = {"llama": llama, "gpt2": gpt2, "t5": t5}[name]
    return to_bayesian(build().double(), delta=delta).eval()


def lora() -> Any:
    import peft

    settings = peft.LoraConfig(r=3, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = peft.get_peft_model(llama().double(), settings).double()
    return to_bayesian(model, delta=0.9, target_modules=models.LORA).eval()


def writer(model: Any, task: str = "text-generation", **options: Any) -> Any:
    return bayeformers.pipeline(
        task, model=model, tokenizer=tokenizer(), device="cpu", **GREEDY | {"num_samples": 4} | options
    )  # fmt: skip


def ids_of(text: str) -> dict[str, Tensor]:
    found: dict[str, Tensor] = tokenizer()(text, return_tensors="pt")
    return {name: found[name] for name in ("input_ids", "attention_mask")}
