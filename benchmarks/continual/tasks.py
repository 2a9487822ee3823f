"""The rows of both tasks as the part of the network that trains sees them, and how a network scores on both."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from bayeformers import metrics
from benchmarks.real_data.context import Context
from benchmarks.real_data.data import Batch, Row, batches, by_length, labels, load_reported, load_training

TRAINED_LAYERS = 2
DROPOUT_OFF = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
"""Arguments of the first layer that trains: the hidden states and the mask."""


class Top(nn.Module):
    """The last layers, the pooler and the head of a BERT classifier. Inputs -> (B, 2)."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(model.bert.encoder.layer[-TRAINED_LAYERS:])
        self.pooler = model.bert.pooler
        self.classifier = model.classifier

    def forward(self, inputs: Inputs) -> Tensor:
        (hidden, *rest), options = inputs
        for layer in self.layers:
            found = layer(hidden, *rest, **options)
            hidden = found if isinstance(found, Tensor) else found[0]
        logits: Tensor = self.classifier(self.pooler(hidden))
        return logits


class Tasks:
    """CoLA's checkpoint, and the rows of CoLA (A) and MRPC (B) after its lower layers, which stay as they are."""

    def __init__(self, checkpoints: Path, data_dir: Path, seed: int) -> None:
        self.seed = seed
        cola = Context("cola", seed, data_dir, checkpoints)
        self._model = AutoModelForSequenceClassification.from_pretrained(cola.folder, **DROPOUT_OFF).eval()
        self.tokenizer = cola.tokenizer
        self.train = {"A": cola.train}
        self.train["B"], held_out = load_training("mrpc", data_dir, self.tokenizer, seed)
        self.parts = {f"A {part}": cola.parts[part] for part in ("held_out", "in_domain")}
        self.parts |= {"B held_out": held_out, "B dev": load_reported("mrpc", data_dir, self.tokenizer)["dev"]}

    def top(self) -> Top:
        """What trains, a copy, at the checkpoint."""
        return copy.deepcopy(Top(self._model))

    @torch.no_grad()
    def inputs(self, batch: Batch) -> Inputs:
        """The lower layers' output: a hook reads what the first upper layer is called with."""
        seen: list[Inputs] = []

        def keep(_: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
            seen.append((args, options))
            raise StopIteration  # the layers above would compute for nothing

        hook = self._model.bert.encoder.layer[-TRAINED_LAYERS].register_forward_pre_hook(keep, with_kwargs=True)
        with contextlib.suppress(StopIteration):
            self._model(**{name: value for name, value in batch.items() if name != "labels"})
        hook.remove()
        return seen[0]

    @cached_property
    def _evaluated(self) -> dict[str, list[Inputs]]:
        """Batches of every part, from short rows to long."""
        return {
            part: [self.inputs(batch) for batch in batches([rows[i] for i in by_length(rows)], self.tokenizer)]
            for part, rows in self.parts.items()
        }

    @torch.no_grad()
    def logits(self, top: nn.Module, part: str) -> np.ndarray:
        """Of the network, or the mean network of a converted one, in the order of the rows. Shape: (N, 2)."""
        top.eval()
        found = torch.cat([top(inputs) for inputs in self._evaluated[part]]).double()
        return np.asarray(found)[np.argsort(by_length(self.parts[part]))]

    @cached_property
    def temperature(self) -> float:
        """Of the checkpoint, fitted on CoLA's held-out tenth."""
        return metrics.fit_temperature(self.logits(self.top(), "A held_out"), labels(self.parts["A held_out"]))

    def scores(self, top: Top) -> dict[str, float]:
        """Of all parts; CoLA's by the checkpoint's head, at the checkpoint's temperature."""
        new_head, found = top.classifier, {}
        for part, rows in self.parts.items():
            top.classifier = self._model.classifier if part.startswith("A") else new_head
            logits = self.logits(top, part) / (self.temperature if part.startswith("A") else 1.0)
            found |= {f"{part} {name}": value for name, value in scored(logits, rows).items()}
        top.classifier = new_head
        return found


def scored(logits: np.ndarray, rows: Sequence[Row]) -> dict[str, float]:
    """NLL, accuracy and Matthews correlation."""
    truth, guess = labels(rows), logits.argmax(-1)
    log_probs = torch.from_numpy(logits).log_softmax(-1).numpy()
    correlation = float(np.corrcoef(truth, guess)[0, 1]) if guess.min() < guess.max() else 0.0
    accuracy = float((truth == guess).mean())
    return {"NLL": float(-log_probs[np.arange(len(rows)), truth].mean()), "accuracy": accuracy, "MCC": correlation}
