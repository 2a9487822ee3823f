"""Recorded optimizer steps: the gradient that a trainer accumulates, and the same gradient without any Trainer."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import TrainerCallback

from bayeformers import fixed_draw, kl_divergence
from bayeformers.training import BayesianTrainer
from tests.training import tiny

EXAMPLES = 42  # 32 and a partial group of 10
DRAW = 3


class Recorder(BayesianTrainer):
    """Keeps, for every optimizer step, this process's batches."""

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.__dict__.setdefault("fed", []).append([{k: v.clone() for k, v in batch.items()} for batch in batches])
        return batches, count


class Gradients(TrainerCallback):
    """Keeps the parameters and gradients that the optimizer is about to use."""

    def __init__(self) -> None:
        self.steps: list[dict[str, dict[str, Tensor]]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        named = dict(kwargs["model"].named_parameters())
        grads = {name: p.grad.detach().clone() for name, p in named.items() if p.grad is not None}
        self.steps.append({"state": {name: p.detach().clone() for name, p in named.items()}, "grads": grads})


def recorded(
    folder: Path | str, kind: str, *, batch: int, accumulation: int = 1, hold: bool = True, **kwargs: Any
) -> list[dict[str, Any]]:
    """One epoch over 42 examples in order; per step the parameters, gradients and the batches of this process."""
    gradients = Gradients()
    data = "causal" if kind == "llama" else kind
    trainer = Recorder(
        model=kwargs.pop("model", None) or tiny.bayesian(kind),
        args=tiny.arguments(
            folder,
            max_steps=-1,
            num_train_epochs=1,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            train_sampling_strategy="sequential",
            max_grad_norm=0.0,
            **{"noise_std": 0.7, **kwargs},
        ),
        train_dataset=tiny.dataset(data, EXAMPLES),
        callbacks=[gradients],
    )
    if hold:
        with fixed_draw(trainer.model, DRAW):
            trainer.train()
    else:
        trainer.train()
    return [{**step, "fed": fed} for step, fed in zip(gradients.steps, trainer.fed, strict=True)]


def summed_nll(model: nn.Module, kind: str, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
    """(summed NLL, number of items) of a batch, written again from the definitions."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    labels = batch.get("labels")
    if kind == "question":
        outputs, total = model(**inputs), 0.0
        for logits, position in ((outputs.start_logits, "start"), (outputs.end_logits, "end")):
            for row, mask, index in zip(logits, inputs["attention_mask"], batch[f"{position}_positions"], strict=True):
                total = total + row[mask.bool()].logsumexp(0) - row[index]
        return total, len(logits)
    if kind == "seq2seq":
        shifted = torch.cat([torch.zeros_like(labels[:, :1]), labels[:, :-1]], 1).clamp_min(0)
        inputs["decoder_input_ids"] = shifted
    logits = model(**inputs).logits
    if kind == "multi":
        return F.binary_cross_entropy_with_logits(logits, labels, reduction="sum"), len(labels)
    if kind == "regression":
        normal = torch.distributions.Normal(logits.squeeze(-1), 0.7)
        return -normal.log_prob(labels).sum(), len(labels)
    if kind in ("causal", "llama"):
        logits, labels = logits[:, :-1], labels[:, 1:]
    rows, targets = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
    kept = targets != -100
    return F.cross_entropy(rows[kept], targets[kept], reduction="sum"), int(kept.sum())


def direct_gradient(
    kind: str, state: dict[str, Tensor], batches: list[dict[str, Tensor]], num_items: int, draw: int = DRAW
) -> dict[str, Tensor]:
    """Gradient of mean NLL + KL / N over ``batches`` at once, at the parameters ``state`` and one held draw."""
    model = tiny.bayesian(kind)
    model.load_state_dict(state, strict=False)
    batch = {name: torch.cat([b[name] for b in batches]) for name in batches[0]}
    return gradient(model.train(), kind, batch, num_items, draw)


def gradient(model: nn.Module, kind: str, batch: dict[str, Tensor], num_items: int, draw: int) -> dict[str, Tensor]:
    """The same for a model that is there already."""
    model.zero_grad()
    with fixed_draw(model, draw):
        total, count = summed_nll(model, kind, batch)
    (total / count + kl_divergence(model) / num_items).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


class LiveGradients(TrainerCallback):
    """Every optimizer step's gradient, of the means and of the scales, each as one vector."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        named = {name.removeprefix("module."): p.grad for name, p in kwargs["model"].named_parameters()}
        self.steps.append(split({name: grad for name, grad in named.items() if grad is not None}))


def split(grads: dict[str, Tensor]) -> dict[str, Tensor]:
    scales = {name for name in grads if name.endswith("rho")}
    parts = {"scales": scales, "means": set(grads) - scales}
    return {part: torch.cat([grads[name].flatten() for name in sorted(names)]) for part, names in parts.items()}


def live(folder: Path | str, repeats: int, **kwargs: Any) -> list[dict[str, Tensor]]:
    """Gradients of as many steps over the same 32 examples with live noise; no parameter moves."""
    model, record = tiny.bayesian("single", delta=0.5), LiveGradients()
    still = torch.optim.SGD(model.parameters(), lr=0.0)
    tiny.trainer(
        folder, model, train_dataset=tiny.dataset("single", 32), callbacks=[record], optimizers=(still, None),
        max_steps=repeats, max_grad_norm=0.0, logging_steps=1000, **kwargs,
    ).train()  # fmt: skip
    return record.steps


class Expectation:
    """What :func:`live` estimates, by independent held draws and without a Trainer.

    Gradients are compared along their own mean direction, found from draws of its own: there a wrong scale would show
    most (the mean is about 20 standard errors from 0 for the means, 6 for the scales).
    """

    def __init__(self, repeats: int = 120) -> None:
        model, batch = tiny.bayesian("single", delta=0.5).train(), tiny.dataset("single", 32).columns
        drawn = [split(gradient(model, "single", batch, 32, draw)) for draw in range(repeats + repeats // 2)]
        self.direction = {part: torch.stack([g[part] for g in drawn[repeats:]]).mean(0) for part in drawn[0]}
        self.values = self.along(drawn[:repeats])

    def along(self, gradients: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {
            part: torch.stack([g[part] @ direction for g in gradients]).double()
            for part, direction in self.direction.items()
        }

    def equals(self, gradients: list[dict[str, Tensor]]) -> bool:
        """The difference of two independent means has variance s1^2/n1 + s2^2/n2. Within 4 standard errors."""
        return all(
            (a.mean() - b.mean()).abs() < 4 * (a.var() / len(a) + b.var() / len(b)).sqrt()
            for a, b in zip(self.along(gradients).values(), self.values.values(), strict=True)
        )


def relative_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """|found - expected| / |expected| over all parameters as one vector."""
    assert set(found) == set(expected)
    difference = torch.cat([(found[name] - expected[name]).flatten() for name in expected])
    size = torch.cat([value.flatten() for value in expected.values()])
    return float(difference.norm() / size.norm())


def num_items(kind: str) -> int:
    """N of the 42 examples, counted by hand."""
    data = tiny.dataset("causal" if kind == "llama" else kind, EXAMPLES)
    if kind in ("causal", "llama"):
        return int((data.columns["labels"][:, 1:] != -100).sum())
    if kind in ("token", "seq2seq", "masked"):
        return int((data.columns["labels"] != -100).sum())
    return EXAMPLES
