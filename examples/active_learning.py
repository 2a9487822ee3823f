"""What to label next? Rounds of labelling by several strategies, and what accuracy each label buys.

    python -m examples.active_learning                                              # data that are at hand
    python -m examples.active_learning --task trec --data_dir trec --num_components 64 --pool_size 2000
    python -m examples.active_learning --strategies random bald epig --num_seeds 10 --num_labels 200

Each row is a vector: pixels of handwritten digits, or a frozen encoder's mean-pooled features of a TREC question. The
model is logistic regression on its principal components, which are found without labels, and its posterior Laplace's
with the exact Hessian: rounds take a second, and the posterior is right enough to ask what a strategy is worth.
Every flag: ``--help``.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, Literal, cast

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, HfArgumentParser

from bayeformers import LaplacePosterior, acquire, experiments, laplace
from bayeformers.acquisition import STRATEGIES
from bayeformers.experiments import flag
from bayeformers.reports import format_table
from bayeformers.reports.writing import write_results
from bayeformers.tasks.trec import KINDS, read_trec

NUM_TARGETS = 64
"""Rows of the pool, labelled or not, whose labels "epig" wants to know."""

# ---------------------------------------------------------------------------------------------------------- arguments


@dataclass
class ActiveArguments:
    """Which rows, which strategies, and how many labels."""

    task: Literal["embedded", "trec"] = flag("embedded", "embedded: scikit-learn's digits; trec: kinds of questions.")
    data_dir: str | None = flag(None, "Folder of TREC's train.txt and test.txt.")
    model_name_or_path: str = flag("sentence-transformers/all-MiniLM-L6-v2", "Encoder of TREC's questions.")
    strategies: list[str] = flag(
        ["random", "entropy", "bald", "batchbald", "epig"], f"Of {', '.join(STRATEGIES)}; the first is compared with."
    )
    num_seeds: int = flag(3, "Repetitions; each has a pool, a test set and first labels of its own.")
    start: int = flag(20, "Labels before the first round, of random rows.")
    query_size: int = flag(10, "Labels per round.")
    num_labels: int = flag(130, "Labels after the last round.")
    pool_size: int = flag(1200, "Rows to choose from; fewer where there are not so many.")
    num_components: int = flag(32, "Principal components of the rows that the model reads.")
    prior_precision: float = flag(0.1, "1 / variance of every weight's prior.")
    num_samples: int = flag(50, "Draws of the posterior.")
    seed: int = flag(0, "Of the first repetition; the others count on.")
    output_dir: str = flag("outputs/active_learning", "Where results.json and the picture go.")

    def __post_init__(self) -> None:
        unknown = [name for name in self.strategies if name not in STRATEGIES]
        if unknown or not self.strategies:
            raise ValueError(f"`strategies` must be of {', '.join(STRATEGIES)}, got {self.strategies}.")
        experiments.check_least(
            self, num_seeds=1, start=1, query_size=1, pool_size=2, num_components=1, num_samples=2, seed=0
        )
        if not self.start <= self.num_labels <= self.pool_size:
            raise ValueError(
                f"`num_labels` must be in `start`={self.start} .. `pool_size`={self.pool_size}, got {self.num_labels}."
            )
        if not self.prior_precision > 0:
            raise ValueError(f"`prior_precision` must be > 0, got {self.prior_precision}.")
        if self.task == "trec" and self.data_dir is None:
            raise ValueError("`data_dir` must be the folder of TREC's files for `task`='trec', got None.")


# --------------------------------------------------------------------------------------------------------------- rows


@dataclass(frozen=True)
class Rows:
    """Vectors (N, D) and classes (N,) of a pool, whose labels are seen where they are asked for, and of a test set."""

    pool: Tensor
    labels: Tensor
    test: Tensor
    test_labels: Tensor
    num_classes: int


def load_rows(args: ActiveArguments, seed: int) -> Rows:
    """The task's rows in an order of this seed, as principal components of the pool, of mean length 1.

    What lies outside of the pool is test data, besides TREC's own test questions.
    """
    generator = torch.Generator().manual_seed(seed)
    if args.task == "trec":
        x, y, test, test_y = trec_features(str(args.data_dir), args.model_name_or_path)
        order = torch.randperm(len(x), generator=generator)
        inside, outside, num_classes = order[: args.pool_size], order[args.pool_size :], len(KINDS)
        test, test_y = torch.cat([test, x[outside]]), torch.cat([test_y, y[outside]])
        x, y = x[inside], y[inside]
    else:
        digits = load_digits()
        pixels, numbers = torch.tensor(digits.data, dtype=torch.float32), torch.tensor(digits.target)
        order = torch.randperm(len(pixels), generator=generator)
        pixels, numbers, num_classes = pixels[order], numbers[order], 10
        size = min(args.pool_size, len(pixels) - 500)
        x, y, test, test_y = pixels[:size], numbers[:size], pixels[size:], numbers[size:]
    centre, spread = x.mean(0), x.std(0) if args.task == "trec" else torch.tensor(1.0)
    x, test = (x - centre) / spread, (test - centre) / spread
    components = torch.linalg.svd(x, full_matrices=False)[2][: args.num_components].T
    x, test = x @ components, test @ components
    scale = x.norm(dim=1).mean()
    return Rows(x / scale, y, test / scale, test_y, num_classes)


def check_enough(rows: Rows, args: ActiveArguments) -> None:
    """Raise ValueError where the data have fewer rows for the pool than are to be labelled."""
    if args.num_labels > len(rows.pool):
        raise ValueError(
            f"`num_labels` must be at most the {len(rows.pool)} rows that --task {args.task} has for the pool, got "
            f"{args.num_labels}."
        )


@cache
def trec_features(data_dir: str, encoder: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features and labels of the training and the test questions."""
    with experiments.user_input():
        splits = read_trec(data_dir)
        tokenizer, model = AutoTokenizer.from_pretrained(encoder), AutoModel.from_pretrained(encoder).eval()
    found = []
    for split in ("train", "validation"):
        texts = splits[split]["text"]
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # batches of one length need little padding
        features = torch.empty(len(texts), model.config.hidden_size)
        for start in range(0, len(order), 64):
            part = order[start : start + 64]
            batch = tokenizer([texts[i] for i in part], padding=True, truncation=True, return_tensors="pt")
            with torch.no_grad():
                states = model(**batch).last_hidden_state
            mask = batch["attention_mask"].unsqueeze(-1)
            features[part] = (states * mask).sum(1) / mask.sum(1)
        found += [features, torch.tensor(splits[split]["label"])]
    return cast(tuple[Tensor, Tensor, Tensor, Tensor], tuple(found))


# ------------------------------------------------------------------------------------------------------------- rounds


def fit(x: Tensor, y: Tensor, num_classes: int, prior_precision: float) -> LaplacePosterior:
    """Logistic regression at its most probable weights, and Laplace's posterior around them."""
    model = nn.Linear(x.shape[1], num_classes)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=60, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        penalty = 0.5 * prior_precision * sum(weight.square().sum() for weight in model.parameters())
        value = nn.functional.cross_entropy(model(x), y, reduction="sum") + penalty
        value.backward()
        return value

    optimizer.step(loss)  # type: ignore[arg-type]
    options: dict[str, Any] = {"subset": "last_layer", "curvature": "full", "progress": False}
    return laplace.fit(model.eval(), [(x, y)], prior_precision=prior_precision, **options)


def learn(rows: Rows, strategy: str, seed: int, args: ActiveArguments) -> list[float]:
    """Test accuracies after every round. The first labels are of the same rows for all strategies of a seed."""
    order = torch.randperm(len(rows.pool), generator=torch.Generator().manual_seed(1000 + seed))
    labelled, accuracies = order[: args.start].tolist(), []
    while True:
        seen = torch.tensor(labelled)
        posterior = fit(rows.pool[seen], rows.labels[seen], rows.num_classes, args.prior_precision)
        accuracies.append(accuracy(posterior, rows, args.num_samples))
        query_size = min(args.query_size, args.num_labels - len(labelled))
        if not query_size:
            return accuracies
        is_left = torch.ones(len(rows.pool), dtype=torch.bool)
        is_left[seen] = False
        left = is_left.nonzero().squeeze(1)
        chosen = acquire(
            posterior, rows.pool[left], query_size, strategy, num_samples=args.num_samples, batch_size=4096,
            targets=rows.pool[:NUM_TARGETS] if strategy == "epig" else None, num_configurations=128, seed=seed,
            progress=False,
        )  # fmt: skip
        labelled += left[chosen.indices].tolist()


def accuracy(posterior: LaplacePosterior, rows: Rows, num_samples: int) -> float:
    """Share of the test rows whose likeliest class, by the averaged prediction, is right."""
    says = posterior.predict(rows.test, method="sample", num_samples=num_samples)
    return float((says.probs.argmax(-1) == rows.test_labels).float().mean())


def label_counts(args: ActiveArguments) -> list[int]:
    """Numbers of labels at which `learn` gives accuracies."""
    return sorted({*range(args.start, args.num_labels, args.query_size), args.num_labels})


# ------------------------------------------------------------------------------------------------------------- report


def area(counts: Sequence[int], accuracies: Sequence[float]) -> float:
    """Area under the curve over its width: the mean accuracy on the way from the first to the last label."""
    if len(counts) == 1:
        return accuracies[0]
    points = torch.tensor(accuracies, dtype=torch.float64)
    return float(torch.trapezoid(points, torch.tensor(counts, dtype=torch.float64)) / (counts[-1] - counts[0]))


def tables(counts: Sequence[int], curves: Mapping[str, list[list[float]]]) -> list[str]:
    """Mean accuracy by the number of labels; area under the curve, less that of the first strategy in pairs."""
    shown = counts[:: max(1, len(counts) // 6)]
    means = {name: [statistics.fmean(at) for at in zip(*own, strict=True)] for name, own in curves.items()}
    by_labels = {name: {str(n): own[counts.index(n)] for n in shown} for name, own in means.items()}
    areas = {name: [area(counts, curve) for curve in own] for name, own in curves.items()}
    first = next(iter(areas))
    by_area: dict[str, dict[str, float | str]] = {}
    for name, own in areas.items():
        by_area[name] = {"area": statistics.fmean(own)}
        if name != first:
            pairs = zip(own, areas[first], strict=True)
            by_area[name][f"less {first}"] = statistics.fmean(area - other for area, other in pairs)
    return [format_table(by_labels, corner="accuracy at labels"), format_table(by_area, corner="area", digits=4)]


def figure(counts: Sequence[int], curves: Mapping[str, list[list[float]]], title: str) -> Any:
    """Mean curves, with a band of one standard error over the seeds."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(7, 4.5), layout="constrained")
    axes = drawn.subplots()
    for name, own in curves.items():
        points = torch.tensor(own, dtype=torch.float64)
        mean, error = points.mean(0), points.std(0, correction=min(1, len(own) - 1)) / len(own) ** 0.5
        axes.plot(counts, mean, label=name, linewidth=2 if name == next(iter(curves)) else 1.3)
        axes.fill_between(counts, mean - error, mean + error, alpha=0.15)
    axes.set(xlabel="labels", ylabel="test accuracy", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    return drawn


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the example; the results are returned, printed and written to ``--output_dir``."""
    with experiments.user_input():
        args = cast(ActiveArguments, HfArgumentParser(ActiveArguments).parse_args_into_dataclasses(argv)[0])  # type: ignore[arg-type]
    clock, counts = experiments.Clock(), label_counts(args)
    curves: dict[str, list[list[float]]] = {name: [] for name in args.strategies}
    for seed in range(args.seed, args.seed + args.num_seeds):
        rows = load_rows(args, seed)
        with experiments.user_input():
            check_enough(rows, args)
        clock.lap("rows")
        for strategy in args.strategies:
            experiments.say(f"seed {seed}, {strategy}")
            curves[strategy].append(learn(rows, strategy, seed, args))
            clock.lap(strategy)
    results = {"arguments": asdict(args), "num_labels": counts, "accuracy": curves, "seconds": clock.seconds}
    title = f"What a label buys: {args.task}, {args.num_seeds} seeds, {args.query_size} labels a round"
    drawn = {"active_learning.png": figure(counts, curves, title)}
    write_results(args.output_dir, results, drawn, *tables(counts, curves))
    return results


if __name__ == "__main__":
    experiments.run_command(main)
