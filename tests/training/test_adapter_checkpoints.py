"""Checkpoints of PEFT models: every Bayesian tensor comes back, by resuming and as the best model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from bayeformers import to_bayesian
from bayeformers.training import BayesianTrainer, BayesianTrainingArguments
from bayeformers.training.adapter_checkpoints import BESIDE
from tests.training.test_renamed_weights import BEST, OPTIONS, Kept

peft = pytest.importorskip("peft")
CLASSIFIER: dict[str, Any] = {"task_type": "SEQ_CLS"}
QUERY = {"target_modules": ["query"], **CLASSIFIER}
CONFIGS: dict[str, Any] = {
    "lora": lambda: peft.LoraConfig(r=2, **QUERY),
    "lora, base too": lambda: peft.LoraConfig(r=2, **QUERY),
    "tokens": lambda: peft.LoraConfig(r=2, trainable_token_indices={"word_embeddings": [5, 6]}, **QUERY),
    "vblora": lambda: peft.VBLoRAConfig(r=2, num_vectors=16, vector_length=4, topk=2, **QUERY),
    "loha": lambda: peft.LoHaConfig(r=2, **QUERY),
    "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=3, **CLASSIFIER),
    "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, **CLASSIFIER),
}


def model(kind: str, names: tuple[str, ...] = ("default",)) -> Any:
    torch.manual_seed(0)
    config = hf.BertConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    adapted = peft.get_peft_model(hf.BertForSequenceClassification(config), CONFIGS[kind](), adapter_name=names[0])
    for name in names[1:]:
        adapted.add_adapter(name, CONFIGS[kind]())
    matrices = {n.rpartition(".")[0] for n, p in adapted.named_parameters() if p.requires_grad and p.dim() > 1}
    target = "all" if "base" in kind else "|".join(re.escape(name) for name in sorted(matrices))
    return to_bayesian(adapted, delta=0.3, target_modules=target)


def trainer(model: nn.Module, folder: Path, **options: Any) -> BayesianTrainer:
    data = [{"input_ids": torch.tensor([5, 6, 7, 8 + i]), "labels": i % 2} for i in range(8)]
    args = BayesianTrainingArguments(str(folder), rho_learning_rate=0.1, **OPTIONS, **options)
    return BayesianTrainer(model=model, args=args, train_dataset=data, eval_dataset=data)


def moved(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("kind", CONFIGS)
def test_best_model_and_resume(kind: str, tmp_path: Path) -> None:
    """The first evaluation is the best: what is left of the last step shows."""
    scores = iter([3.0, 2.0, 1.0])
    first, kept = trainer(model(kind), tmp_path / "a", metric_for_best_model="eval_score", **BEST), Kept()
    first.compute_metrics = lambda _: {"score": next(scores)}
    first.add_callback(kept)
    first.train()
    assert str(first.state.best_model_checkpoint).endswith("-1")
    assert any(name.endswith("_rho") for name in moved(kept.at[1], kept.at[3]))
    assert not moved(state(first.model), kept.at[1])
    second, resumed = trainer(model(kind), tmp_path / "b"), Kept()
    second.add_callback(resumed)
    second.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert not moved(resumed.at[-1], kept.at[2]) and not moved(state(second.model), kept.at[3])


def test_another_active_adapter_is_not_given_the_first_ones_weights(tmp_path: Path) -> None:
    first, kept = trainer(model("lora", ("default", "b")), tmp_path / "a"), Kept()
    first.add_callback(kept)
    first.model.set_adapter("b")
    first.train()
    first.state.best_model_checkpoint = str(tmp_path / "a" / "checkpoint-1")
    first._load_best_model()
    assert not moved(state(first.model), kept.at[1])


def test_a_checkpoint_without_the_scales_of_the_base_is_refused(tmp_path: Path) -> None:
    trainer(model("lora, base too"), tmp_path).train()
    (tmp_path / "checkpoint-3" / BESIDE).unlink()
    again = trainer(model("lora, base too"), tmp_path / "b")
    with pytest.raises(ValueError, match=r"does not fit the model's conversion: it lacks .*rho"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    again.state.best_model_checkpoint = str(tmp_path / "checkpoint-3")
    with pytest.raises(ValueError, match=r"The best checkpoint .* it lacks .*rho"):
        again._load_best_model()


@pytest.mark.parametrize("kind", ["lora", "tokens", "vblora", "loha", "lora, base too"])
def test_what_is_read_is_not_called_silent(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """PEFT's copy of the head from before is neither called nor read: that alone is told."""
    trainer(model(kind), tmp_path).train()
    told = [record.getMessage() for record in caplog.records if "in the first forward" in record.getMessage()]
    assert len(told) == ("base" in kind)
    assert all("1 Bayesian layers" in text and "original_module" in text for text in told)
