"""How costs grow with layers, width, tokens, classes and draws: python -m benchmarks.scaling

A BERT of random weights (4 layers of width 128, 8 texts of 32 tokens, 4 classes, 8 draws) is changed along one axis
at a time. Each cell is the exponent p of cost ~ size^p, fitted by least squares to the logarithms of the fastest of
some interleaved repeats in processor time; at small sizes costs that do not grow pull it towards 0.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

from bayeformers import VariationalPosterior, laplace, to_bayesian
from bayeformers.laplace import Curvature, CurvatureConfig
from bayeformers.laplace.accumulate import Accumulator
from bayeformers.laplace.data import prepare
from bayeformers.laplace.targets import choose_targets
from bayeformers.likelihoods import logits_of

from .harness import arguments, interleaved, report

BATCH, WORDS, HEAD_WIDTH = 8, 1000, 32
AXES: dict[str, tuple[int, ...]] = {
    "layers": (2, 4, 8, 12),
    "width": (128, 256, 512),
    "tokens": (16, 32, 64, 128),
    "classes": (2, 4, 8, 16),
    "draws": (2, 4, 8, 16),
}


@dataclass(frozen=True)
class Size:
    """What is changed, one axis at a time."""

    layers: int = 4
    width: int = 128
    tokens: int = 32
    classes: int = 4
    draws: int = 8


def bert(size: Size) -> BertForSequenceClassification:
    """Return the model of a size, the same each time."""
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=WORDS,
            hidden_size=size.width,
            num_hidden_layers=size.layers,
            num_attention_heads=size.width // HEAD_WIDTH,
            intermediate_size=4 * size.width,
            num_labels=size.classes,
        )
    ).eval()


def texts(size: Size) -> dict[str, Tensor]:
    """Return random words without padding, with labels."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, WORDS, (BATCH, size.tokens), generator=generator)
    labels = torch.randint(0, size.classes, (BATCH,), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def training_step(size: Size) -> Callable[[], object]:
    """Return forward, backward and AdamW over all parameters."""
    model, batch = bert(size).train(), texts(size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)

    def run() -> None:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()

    return run


def forward(size: Size) -> Callable[[], object]:
    """Return one pass without gradients."""
    model, batch = bert(size), texts(size)
    return torch.no_grad()(lambda: model(**batch))


def kfac_pass(size: Size) -> Callable[[], object]:
    """Return one batch's contribution to the Kronecker factors of all Linear layers."""
    model = bert(size)
    sums = Curvature(CurvatureConfig(fisher="exact"))
    accumulator = Accumulator(sums, model, choose_targets(model)[0], logits_of)
    batch = prepare(model, texts(size), torch.device("cpu"))
    return lambda: accumulator.add(batch)


def eigendecompositions(size: Size) -> Callable[[], object]:
    """Return the eigendecompositions of all factors."""
    model = bert(size)
    targets, sums = choose_targets(model)[0], Curvature(CurvatureConfig(fisher="exact"))
    Accumulator(sums, model, targets, logits_of).add(prepare(model, texts(size), torch.device("cpu")))
    return lambda: sums.decomposed(targets)


def linearised(size: Size, *, contrasts: bool) -> Callable[[], object]:
    """Return the linearised prediction of one batch."""
    batch = texts(size)
    posterior = laplace.fit(bert(size), [batch], curvature="kfac", prior_precision=1.0, progress=False)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    return lambda: posterior.predict(inputs, method="glm", contrasts=contrasts)


def draws(size: Size, target_modules: str) -> Callable[[], object]:
    """Return the prediction of one batch by draws of weights."""
    model = to_bayesian(bert(size), delta=0.05, target_modules=target_modules).eval()
    inputs = {name: value for name, value in texts(size).items() if name != "labels"}
    posterior = VariationalPosterior(model)
    return lambda: posterior.predict(inputs, num_samples=size.draws)


def last_layer(size: Size) -> str:
    """Return the pattern of the last layer, the pooler and the head."""
    return rf".*\.layer\.{size.layers - 1}\..*|.*pooler\.dense|classifier"


QUANTITIES: dict[str, Callable[[Size], Callable[[], object]]] = {
    "forward pass": forward,
    "training step": training_step,
    "KFAC: the pass over a batch": kfac_pass,
    "KFAC: eigendecompositions": eigendecompositions,
    "linearised prediction, covariance": lambda size: linearised(size, contrasts=False),
    "linearised prediction, contrasts": lambda size: linearised(size, contrasts=True),
    "draws of all layers": lambda size: draws(size, "all"),
    "draws of last layer and head": lambda size: draws(size, last_layer(size)),
}


def exponent(sizes: list[int], costs: list[float]) -> float:
    """Return the slope of log cost over log size, by least squares.

    >>> round(exponent([1, 2, 4], [3.0, 12.0, 48.0]), 6)
    2.0
    """
    x, y = [math.log(size) for size in sizes], [math.log(cost) for cost in costs]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    products = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return products / sum((a - mean_x) ** 2 for a in x)


def costs(axis: str, repeats: int) -> dict[str, list[float]]:
    """Return the processor seconds of every quantity along one axis."""
    found: dict[str, list[float]] = {name: [] for name in QUANTITIES}
    for value in AXES[axis]:
        size = replace(Size(), **{axis: value})
        runs = {name: make(size) for name, make in QUANTITIES.items()}
        for name, seconds in interleaved(runs, repeats, warmup=1, clock=time.process_time).items():
            found[name].append(min(seconds))
    return found


def main() -> None:
    """Print the exponents."""
    args = arguments((__doc__ or "").splitlines()[0], repeats=5).parse_args()
    by_axis = {axis: costs(axis, args.repeats) for axis in AXES}
    rows: list[dict[str, str | float]] = [
        {"cost": name, **{axis: exponent(list(AXES[axis]), by_axis[axis][name]) for axis in AXES}}
        for name in QUANTITIES
    ]
    report("Exponents p of cost ~ size^p", rows, args.json, base=asdict(Size()), axes=AXES, repeats=args.repeats)


if __name__ == "__main__":
    main()
