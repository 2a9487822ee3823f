"""Models with random weights, and what every check needs to know of the machine."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from bayeformers import to_bayesian

Inputs = dict[str, Tensor]


class Skipped(Exception):
    """A check that cannot run here; the message says why."""


@dataclass(frozen=True)
class Setup:
    """The device, and whether models are tiny: then a check takes a second of one CPU."""

    device: torch.device
    tiny: bool

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    def synchronize(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def seconds(self, run: Callable[[], object]) -> float:
        """Wall clock until the device has done it; processor time on a CPU, which others may share."""
        clock = time.perf_counter if self.is_cuda else time.process_time
        self.synchronize()
        start = clock()
        run()
        self.synchronize()
        return clock() - start

    def medians(self, runs: Mapping[str, Callable[[], object]], limit: float) -> dict[str, float]:
        """Median seconds of each run over as many interleaved rounds as half of ``limit`` has room for, 1 to 20."""
        for run in runs.values():
            run()
        times: dict[str, list[float]] = {name: [] for name in runs}
        end, rounds = time.monotonic() + limit / 2, 1 if self.tiny else 20
        for done in range(rounds):
            if done and time.monotonic() > end:
                break
            for name, run in runs.items():
                times[name].append(self.seconds(run))
        return {name: statistics.median(values) for name, values in times.items()}

    def compiled(self, model: nn.Module) -> Any:
        """By the default compiler; at tiny size by its front alone, which is what decides about graph breaks."""
        return torch.compile(model, fullgraph=True, backend="eager" if self.tiny else "inductor")

    def moved(self, inputs: Inputs) -> Inputs:
        return {name: value.to(self.device) for name, value in inputs.items()}


def bert(setup: Setup, **config: Any) -> tuple[nn.Module, Inputs]:
    """BERT-base with two classes, 32 x 128 tokens; on the CPU, in training as the others."""
    tiny = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    sizes = {"vocab_size": 64, "max_position_embeddings": 16, **tiny} if setup.tiny else {}
    settings = hf.BertConfig(num_labels=2, **{**sizes, **config})
    torch.manual_seed(0)
    model = hf.BertForSequenceClassification(settings)
    shape = (4, 8) if setup.tiny else (32, 128)
    ids = _integers(settings.vocab_size, shape)
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": _integers(2, shape[:1])}


def vit(setup: Setup) -> tuple[nn.Module, Inputs]:
    """ViT-B with 16 x 16 patches and ten classes, 32 images of 224 x 224."""
    tiny = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    sizes = {"image_size": 16, "patch_size": 8, **tiny} if setup.tiny else {}
    settings = hf.ViTConfig(num_labels=10, **sizes)
    torch.manual_seed(0)
    model = hf.ViTForImageClassification(settings)
    batch = 4 if setup.tiny else 32
    pixels = torch.randn(batch, 3, settings.image_size, settings.image_size, generator=_generator())
    return model, {"pixel_values": pixels, "labels": _integers(10, (batch,))}


def llama(setup: Setup) -> tuple[nn.Module, Inputs]:
    """Llama of 1.2 B parameters (Llama 3.2's sizes), in bfloat16, with LoRA r = 16 on q and v; 4 x 512 tokens."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
             "num_key_value_heads": 1, "vocab_size": 64}  # fmt: skip
    if not setup.tiny:
        sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
                 "num_key_value_heads": 8, "vocab_size": 128_256}  # fmt: skip
    settings = hf.LlamaConfig(**sizes, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    torch.manual_seed(0)
    with torch.device("cpu" if setup.tiny else setup.device):  # a billion weights are slow to make on a CPU
        base = hf.LlamaForCausalLM(settings).to(torch.float32 if setup.tiny else torch.bfloat16)
    config = LoraConfig(r=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)  # else the adapter is 0 whatever its draw
    ids = _integers(settings.vocab_size, (2, 8) if setup.tiny else (4, 512))
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


MODELS = {"bert": bert, "vit": vit, "llama": llama}


def compilable(setup: Setup) -> tuple[nn.Module, Inputs]:
    """A Bayesian BERT with one layer, at tiny size with few Bayesian ones: a compiler needs seconds for each."""
    model, inputs = bert(Setup(torch.device("cpu"), tiny=True), num_hidden_layers=1)
    options = {"target_modules": ["word_embeddings", "query", "classifier"]} if setup.tiny else {}
    return bayesian(model, **options).to(setup.device), setup.moved(inputs)


def bayesian(model: nn.Module, delta: float = 0.1, **options: Any) -> nn.Module:
    """Converted: all of its layers, or the adapter's two matrices."""
    if hasattr(model, "peft_config"):
        options = {"target_modules": ["lora_A", "lora_B"], **options}
    return to_bayesian(model, delta=delta, **options)


def twins(setup: Setup, **options: Any) -> tuple[nn.Module, nn.Module, Inputs]:
    """The same small Bayesian model on the CPU and on the device, in float32, and a batch on the CPU."""
    model, inputs = bert(Setup(torch.device("cpu"), tiny=True))
    converted = bayesian(model, **options).eval()
    return converted, copy.deepcopy(converted).to(setup.device), inputs


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _integers(high: int, shape: tuple[int, ...]) -> Tensor:
    return torch.randint(high, shape, generator=_generator())


def optimizer(model: nn.Module) -> torch.optim.AdamW:
    """As the Trainer's default."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)
