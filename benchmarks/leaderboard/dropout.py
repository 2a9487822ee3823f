"""MC dropout: the network as it is trained, averaged over masks (Gal & Ghahramani 2016, arXiv 1506.02142)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bayeformers import metrics
from benchmarks.real_data.context import Context, Predictor
from benchmarks.real_data.data import Batch

NUM_SAMPLES = 16
RATES = (0.1, 0.2, 0.3)
RATE_ROWS = 320
"""Held-out rows that choose a rate: as many as a delta's search by samples takes, in passes."""
MOST_CLASSES = 10
"""Up to so many the draws are kept, for scores that the mean does not know."""


def mc_dropout(context: Context, *, num_samples: int = NUM_SAMPLES) -> tuple[Predictor, dict[str, Any]]:
    """Passes with the network's own dropout on."""
    arrays = passes(context.model(), num_samples)
    return lambda part: context.predict(part, arrays), {"num_samples": num_samples}


def tuned_dropout(
    context: Context, *, rates: Sequence[float] = RATES, num_samples: int = NUM_SAMPLES
) -> tuple[Predictor, dict[str, Any]]:
    """The same at the rate of least held-out NLL, one for all dropouts of the network."""
    model, batches = context.model(), context.batches(context.held_out[:RATE_ROWS])
    arrays = passes(model, num_samples)
    truth = np.concatenate([batch["labels"].numpy() for batch in batches])
    nll = {}
    for rate in rates:
        set_rate(model, rate)
        probs = torch.cat([arrays(batch)["probs"] for batch in batches]).numpy()
        nll[rate] = metrics.negative_log_likelihood(probs, truth)
    best = min(nll, key=lambda rate: nll[rate])
    set_rate(model, best)
    return lambda part: context.predict(part, arrays), {"rate": best, "num_samples": num_samples}


def passes(model: nn.Module, num_samples: int) -> Callable[[Batch], dict[str, Tensor]]:
    """From a batch to the mean probabilities, and of few classes the draws (B, S, C).

    Masks are drawn for each batch from the number of the pass; torch's generator is left as it was.
    """
    model.train()

    def arrays(batch: Batch) -> dict[str, Tensor]:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        draws = []
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            for seed in range(num_samples):
                torch.manual_seed(seed)
                draws.append(model(**inputs).logits.double().softmax(-1))
        probs = torch.stack(draws, dim=1)
        kept = {"draws": probs} if probs.shape[-1] <= MOST_CLASSES else {}
        return {"probs": probs.mean(1), **kept}

    return arrays


def set_rate(model: nn.Module, rate: float) -> None:
    """Of every dropout of the network."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = rate
