"""The context of an adapter: a task's rows, the base model, and the base with the plain adapter on it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, set_seed

from bayeformers.adapters import AnswerTokens
from benchmarks.real_data.context import Context
from benchmarks.real_data.data import Row

from .answers import answer_tokens
from .tasks import TASKS, AdapterTask, load_reports, load_rows, some

LORA = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.1}
TARGETS = {"encoder": ["query", "value"], "decoder": ["q_proj", "v_proj"]}


@dataclass(frozen=True)
class AdapterContext(Context):
    """One plain adapter, in PEFT's folder; ``pretrained`` is its base, which every method needs."""

    @property
    def settings(self) -> AdapterTask:
        return TASKS[self.task]

    @cached_property
    def tokenizer(self) -> Any:
        tokenizer = AutoTokenizer.from_pretrained(self.base)
        if self.settings.model == "decoder":
            tokenizer.padding_side = "left"
            tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        return tokenizer

    @cached_property
    def _training(self) -> tuple[list[Row], list[Row]]:
        train, held_out = load_rows(self.task, self.data_dir, self.tokenizer, self.seed)
        return train, some(held_out, self.settings.most_rows)

    @cached_property
    def parts(self) -> dict[str, list[Row]]:
        return {"held_out": self.held_out} | load_reports(self.task, self.data_dir, self.tokenizer)

    @property
    def base(self) -> str:
        """Folder or name of the base model.

        Raises:
            ValueError: none was given.
        """
        if self.pretrained is None:
            raise ValueError(
                f"{self.task} needs the {self.settings.model} under its adapter: give --{self.settings.model}."
            )
        return self.pretrained

    def model(self) -> Any:
        """The base with the plain adapter, loaded afresh, its adapter trainable; a method may change it."""
        return self._classifier(PeftModel.from_pretrained(self._base_model(), self.folder, is_trainable=True)).eval()

    def fresh(self) -> Any:
        """The base with a new adapter, the same for all methods of a seed: B is 0, and A and a head are random."""
        base = self._base_model()
        set_seed(self.seed)
        kind = TaskType.CAUSAL_LM if self.settings.answers else TaskType.SEQ_CLS
        config = LoraConfig(target_modules=TARGETS[self.settings.model], task_type=kind, **LORA)
        return self._classifier(get_peft_model(base, config))

    def _base_model(self) -> Any:
        set_seed(self.seed)  # of a new head
        if self.settings.answers:
            return AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32)
        labels = self.settings.num_labels
        model = AutoModelForSequenceClassification.from_pretrained(self.base, num_labels=labels, dtype=torch.float32)
        model.config.pad_token_id = self.tokenizer.pad_token_id
        return model

    def _classifier(self, model: PeftModel) -> Any:
        return AnswerTokens(model, answer_tokens(self.tokenizer)) if self.settings.answers else model
