#!/usr/bin/env bash
# accelerate 1.15.0, transformers 5.23.0, torch 2.13.0: every Trainer.train() runs one full garbage
# collection (Accelerator.free_memory), also on a CPU, where there is no device memory to free. It walks
# every object that the imports made, so in a search or a test suite with hundreds of tiny
# trainings this can be half of the time. gc.freeze() after the imports leaves next to nothing to walk.
# A good guess would have been that a training on a CPU collects nothing but what Python collects by itself.
# Seen: automatic collection switched off, 1 full collection per training, over 350,000 objects;
# after gc.freeze() still 1 per training, over 600 of them.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export HF_HUB_OFFLINE=1
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check transformers==5.23.0 accelerate==1.15.0
cd "$work"
"$work/venv/bin/python" - <<'PY'
import gc

import accelerate
import torch
import transformers
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

print("accelerate", accelerate.__version__, "transformers", transformers.__version__, "torch", torch.__version__)
config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
rows = [{"input_ids": torch.randint(50, (6,)), "labels": i % 2} for i in range(8)]
walked = []


def watch(phase, info):
    if phase == "start" and info["generation"] == 2:
        walked.append(len(gc.get_objects()))


def train():
    arguments = TrainingArguments("out", max_steps=1, report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no")
    before = len(walked)
    Trainer(BertForSequenceClassification(config), arguments, train_dataset=rows).train()
    return walked[before:]


train()  # what is imported late
gc.disable()
gc.callbacks.append(watch)
plain = train()
gc.freeze()
frozen = train()
print("full collections of one training:", len(plain), "over", plain, "objects; after gc.freeze():", frozen)
assert len(plain) == 1 and len(frozen) == 1
assert plain[0] > 100_000 and frozen[0] < 0.1 * plain[0]
PY
