"""MC dropout: the network as it is trained, averaged over masks (Gal & Ghahramani 2016, arXiv 1506.02142)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.real_data.context import Context, Predictor
from benchmarks.real_data.data import Batch

NUM_SAMPLES = 16
MOST_CLASSES = 10
"""Up to so many the draws are kept, for scores that the mean does not know."""


def mc_dropout(
    context: Context, *, num_samples: int = NUM_SAMPLES, rate: float | None = None
) -> tuple[Predictor, dict[str, Any]]:
    """Passes with dropout on; masks are drawn for each batch from the number of the pass."""
    model = context.model().train()
    if rate is not None:
        set_rate(model, rate)

    def arrays(batch: Batch) -> dict[str, Tensor]:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            passes = []
            for seed in range(num_samples):
                torch.manual_seed(seed)
                passes.append(model(**inputs).logits.double().softmax(-1))
        draws = torch.stack(passes, dim=1)
        kept = {"draws": draws} if draws.shape[-1] <= MOST_CLASSES else {}
        return {"probs": draws.mean(1), **kept}

    return lambda part: context.predict(part, arrays), {"num_samples": num_samples, "rate": rate}


def set_rate(model: torch.nn.Module, rate: float) -> None:
    """Of every dropout of the network."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = rate
