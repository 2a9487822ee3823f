"""Training an adapter, plain or Bayesian, over the task's steps."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import DataCollatorWithPadding, TrainerCallback

from bayeformers import BayesianTrainer, BayesianTrainingArguments
from benchmarks.real_data.finetune import RECORD

from .context import AdapterContext


def train(
    context: AdapterContext, model: nn.Module, callbacks: Sequence[TrainerCallback] = (), **changes: Any
) -> BayesianTrainer:
    """A trainer at the end of the task's training: AdamW at a rate that falls to 0, rows of similar length together.

    ``changes``: of the training's arguments. A plain model trains on its own loss.
    """
    settings = context.settings
    with tempfile.TemporaryDirectory() as folder:
        options = {
            "max_steps": settings.steps,
            "learning_rate": settings.learning_rate,
            "per_device_train_batch_size": settings.batch_size,
            "warmup_steps": settings.steps // 20,
            "train_sampling_strategy": "group_by_length",
            "save_strategy": "no",
            "logging_steps": 50,
            "report_to": [],
            "seed": context.seed,
            "use_cpu": True,
            "disable_tqdm": True,
        }
        trainer = BayesianTrainer(
            model=model,
            args=BayesianTrainingArguments(folder, **{**options, **changes}),
            train_dataset=context.train,
            data_collator=DataCollatorWithPadding(context.tokenizer),
            callbacks=list(callbacks),
        )
        trainer.train()
    trainer.model.eval()
    return trainer


def train_plain(context: AdapterContext) -> None:
    """Write the plain adapter and the record of its training, which is written last: a folder that has it is whole."""
    model, rows = context.fresh(), len(context.train)
    start = time.process_time()
    trainer = train(context, model)
    seconds = time.process_time() - start
    adapted = model if isinstance(model, PeftModel) else model.model
    adapted.save_pretrained(str(context.folder))
    state = trainer.state
    record = {"cpu_seconds": seconds, "steps": state.global_step, "epoch": state.epoch, "train_rows": rows}
    record["log"] = state.log_history
    (context.folder / RECORD).write_text(json.dumps(record) + "\n", encoding="utf-8")
