"""CPU seconds of IVON relative to AdamW: python -m benchmarks.ivon

The optimizer alone (a draw, its end, and the step; AdamW's step) on MiniLM's 22.7 M parameters, and a whole training
step of 32 x 64 tokens. The share of the random numbers is listed by itself. AdamW is fused, the Trainer's default.
"""

import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from bayeformers.optim import IVON
from benchmarks.harness import arguments, batch, interleaved, median_ratio, minilm, report

BASELINE = "AdamW"


def with_gradients(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    return model


def made(model: nn.Module, name: str) -> torch.optim.Optimizer:
    if name == BASELINE:
        return torch.optim.AdamW(model.parameters(), lr=5e-5, fused=True)
    return IVON(model.parameters(), lr=0.1, ess=8551, hess_init=10.0)


def alone(name: str) -> Callable[[], None]:
    model = with_gradients(minilm())
    optimizer, gradients = made(model, name), [p.grad for p in model.parameters()]

    def step() -> None:
        if isinstance(optimizer, IVON):
            optimizer.enter_draw()
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter.grad = gradient
            optimizer.leave_draw()
        optimizer.step()

    return step


def whole(name: str) -> Callable[[], None]:
    model, inputs = minilm().train(), batch()
    optimizer = made(model, name)

    def step() -> None:
        if isinstance(optimizer, IVON):
            with optimizer.sampled_params():
                model(**inputs).loss.backward()
        else:
            model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    args = arguments(__doc__.splitlines()[0], repeats=7).parse_args()
    count = sum(parameter.numel() for parameter in minilm().parameters())
    runs = {
        "AdamW alone": alone(BASELINE),
        "IVON alone": alone("IVON"),
        "its random numbers": lambda: torch.randn(count),
        "AdamW, training step": whole(BASELINE),
        "IVON, training step": whole("IVON"),
    }
    times = interleaved(runs, args.repeats, clock=time.process_time)
    rows = [
        {
            "step": name,
            "median CPU seconds": statistics.median(values),
            "ratio": median_ratio(values, times["AdamW, training step" if "training step" in name else "AdamW alone"]),
        }
        for name, values in times.items()
    ]
    report("IVON / AdamW", rows, args.json, repeats=args.repeats)


if __name__ == "__main__":
    main()
