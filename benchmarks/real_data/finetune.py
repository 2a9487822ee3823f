"""Ordinary fine-tuning: the checkpoint that every method starts from."""

from __future__ import annotations

import json
import time
from pathlib import Path

from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

from bayeformers.tasks import TEXT_TASKS

from .data import BATCH_SIZE, load_training

EPOCHS = {"cola": 4, "mrpc": 4, "sst2": 2, "trec": 4, "clinc": 6}
LEARNING_RATES = {"clinc": 2e-4}
RECORD = "training.json"


def finetune(
    model_name: str, task_name: str, seed: int, data_dir: Path, folder: Path, epochs: float | None = None
) -> None:
    """Train on nine tenths of the training file; model, tokenizer and a record of the training go to ``folder``.

    The record is written last: a folder that has it is complete.
    """
    set_seed(seed)
    start = time.process_time()
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    train, _ = load_training(task_name, data_dir, tokenizer, seed)
    model = AutoModelForSequenceClassification.from_pretrained(model_name, num_labels=TEXT_TASKS[task_name].num_labels)
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=BATCH_SIZE,
        learning_rate=LEARNING_RATES.get(task_name, 5e-5),
        num_train_epochs=EPOCHS[task_name] if epochs is None else epochs,
        train_sampling_strategy="group_by_length",
        save_strategy="no",
        report_to=[],
        seed=seed,
        use_cpu=True,
    )
    trainer = Trainer(model, arguments, train_dataset=train, data_collator=DataCollatorWithPadding(tokenizer))
    measured = trainer.train().metrics
    print(measured)
    trainer.save_model(str(folder))
    tokenizer.save_pretrained(str(folder))
    record = {"cpu_seconds": time.process_time() - start, **measured, "log": trainer.state.log_history}
    (folder / RECORD).write_text(json.dumps(record) + "\n", encoding="utf-8")
