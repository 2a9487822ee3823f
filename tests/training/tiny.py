"""Tiny models, datasets and trainers of the training tests: seconds on one core."""

from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn
from torch.utils.data import Dataset

from bayeformers import to_bayesian
from bayeformers.training import BayesianTrainer, BayesianTrainingArguments

VOCABULARY = 30
LENGTH = 6


class Rows(Dataset):
    """A map-style dataset over dictionaries of tensors with one row per example."""

    def __init__(self, **columns: Tensor) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: column[index] for name, column in self.columns.items()}


def tokens(num_examples: int, seed: int = 0) -> dict[str, Tensor]:
    """Token ids with attention masks of different lengths (3 to 6)."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, VOCABULARY, (num_examples, LENGTH), generator=generator)
    lengths = torch.randint(3, LENGTH + 1, (num_examples,), generator=generator)
    mask = (torch.arange(LENGTH) < lengths[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def labels(kind: str, inputs: dict[str, Tensor], num_labels: int = 3, seed: int = 1) -> dict[str, Tensor]:
    """Labels of one problem type for ``tokens``; token-level ones ignore padding, at uneven counts per row."""
    generator = torch.Generator().manual_seed(seed)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    shape = (len(ids),)
    if kind == "single":
        return {"labels": (ids[:, 0] * num_labels // VOCABULARY).clamp(0, num_labels - 1)}
    if kind == "multi":
        return {"labels": torch.randint(0, 2, (*shape, num_labels), generator=generator).float()}
    if kind == "regression":
        return {"labels": ids[:, 0].float() / VOCABULARY * 3 + 0.3 * torch.randn(shape, generator=generator)}
    if kind == "token":
        values = torch.randint(0, num_labels, ids.shape, generator=generator)
        return {"labels": values.masked_fill(mask == 0, -100)}
    if kind in ("causal", "seq2seq", "masked"):
        return {"labels": ids.masked_fill(mask == 0, -100)}
    starts = torch.randint(0, 2, shape, generator=generator)  # the shortest example has 3 tokens
    return {"start_positions": starts, "end_positions": starts + 1}


def dataset(kind: str = "single", num_examples: int = 20, seed: int = 0, **kwargs: Any) -> Rows:
    inputs = tokens(num_examples, seed)
    return Rows(**inputs, **labels(kind, inputs, **kwargs))


def _sizes() -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "max_position_embeddings": 16,
        "initializer_range": 0.3,  # predictions that differ between examples and between draws
    }


def plain(kind: str = "single", seed: int = 0, **config: Any) -> nn.Module:
    """An unconverted model of one layer with the head of ``kind``, the same at every call."""
    bert = hf.BertConfig(**{**_sizes(), "num_labels": 1 if kind == "regression" else 3, **config})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "multi":
            bert.problem_type = "multi_label_classification"
        if kind in ("single", "multi", "regression"):
            return hf.BertForSequenceClassification(bert)
        if kind == "token":
            return hf.BertForTokenClassification(bert)
        if kind == "masked":
            return hf.BertForMaskedLM(bert)
        if kind == "question":
            bert.num_labels = 2
            return hf.BertForQuestionAnswering(bert)
        if kind == "causal":
            gpt2 = hf.GPT2Config(
                vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2, n_positions=16, initializer_range=0.3,
                bos_token_id=1, eos_token_id=1,
            )  # fmt: skip
            return hf.GPT2LMHeadModel(gpt2)
        if kind == "llama":
            return hf.LlamaForCausalLM(hf.LlamaConfig(**_sizes(), num_key_value_heads=2))
        t5 = hf.T5Config(
            vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0
        )
        return hf.T5ForConditionalGeneration(t5)


def bayesian(kind: str = "single", *, delta: float = 0.2, freeze: bool = False, **kwargs: Any) -> nn.Module:
    """``plain`` after `to_bayesian`."""
    conversion = {name: kwargs.pop(name) for name in ("prior", "exclude_modules", "modules_to_save") if name in kwargs}
    return to_bayesian(plain(kind, **kwargs), delta, freeze, **conversion)


def arguments(folder: Path | str, **kwargs: Any) -> BayesianTrainingArguments:
    """Silent CPU arguments: two steps of four examples, a log at each."""
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "max_steps": 2,
        "num_eval_samples": 3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "learning_rate": 1e-3,
    }
    return BayesianTrainingArguments(str(folder), **{**defaults, **kwargs})


def trainer(folder: Path | str, model: nn.Module | None = None, kind: str = "single", **kwargs: Any) -> BayesianTrainer:
    """A trainer of ``model`` (default: a converted one) on the data of ``kind``; unknown keywords are arguments."""
    own = (
        "compute_metrics", "callbacks", "model_init", "compute_loss_func", "preprocess_logits_for_metrics",
        "optimizers", "data_collator", "train_dataset", "eval_dataset",
    )  # fmt: skip
    given = {name: kwargs.pop(name) for name in own if name in kwargs}
    if model is None and "model_init" not in given:
        model = bayesian(kind)
    given = {"train_dataset": dataset(kind), "eval_dataset": dataset(kind, 9, seed=5), **given}
    return BayesianTrainer(model=model, args=arguments(folder, **kwargs), **given)
