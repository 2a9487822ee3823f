"""Ordinary fine-tuning: the checkpoint that every method starts from."""

from __future__ import annotations

from pathlib import Path

from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

from .data import BATCH_SIZE, load_training

EPOCHS = {"cola": 4, "mrpc": 4, "sst2": 2}


def finetune(model_name: str, task_name: str, seed: int, data_dir: Path, folder: Path) -> None:
    """Train on nine tenths of the training file and save model and tokenizer to ``folder``."""
    set_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    train, _ = load_training(task_name, data_dir, tokenizer, seed)
    model = AutoModelForSequenceClassification.from_pretrained(model_name, num_labels=2)
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=BATCH_SIZE,
        learning_rate=5e-5,
        num_train_epochs=EPOCHS[task_name],
        train_sampling_strategy="group_by_length",
        save_strategy="no",
        report_to=[],
        seed=seed,
        use_cpu=True,
    )
    trainer = Trainer(model, arguments, train_dataset=train, data_collator=DataCollatorWithPadding(tokenizer))
    print(trainer.train().metrics)
    trainer.save_model(str(folder))
    tokenizer.save_pretrained(str(folder))
