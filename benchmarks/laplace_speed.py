"""What fitting a Kronecker-factored Laplace posterior costs, and a linearised prediction, beside other libraries.

    pip install --no-deps -r benchmarks/requirements.txt
    python -m benchmarks.laplace_speed --data_dir GLUE

All Linear layers of MiniLM with a two-class head, on CoLA's training sentences. A training step is forward, backward
and AdamW over all parameters with the model's dropout, once on random batches, as training takes them, and once on the
batches that the fits get, sorted by length as `fit_laplace` sorts them: the order of a sum does not matter, and padding
vanishes. Every ratio is of two times of the same round. "sums" are the factors alone, as curvlinops computes them; the
eigendecompositions in the other rows do not grow with the data.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel

from .dict_model import DictModel
from .harness import arguments, interleaved, median_ratio, minilm, report
from .real_data.data import Batch, batches, by_length, load_training

Fisher = Literal["exact", "mc"]


class Loader(list[Batch]):
    """Ready batches; laplace-torch takes the length of ``dataset`` for the number of examples."""

    @property
    def dataset(self) -> range:
        return range(sum(len(batch["input_ids"]) for batch in self))


def training_epoch(model: PreTrainedModel, loader: Loader) -> Callable[[], None]:
    """One step per batch over all parameters, in `train()` mode."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)  # its cost without its effect: every round is the same
    model.train()

    def run() -> None:
        for batch in loader:
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()

    return run


def ours_fit(model: PreTrainedModel, loader: Loader, fisher: Fisher) -> Callable[[], object]:
    """This package's factors of all Linear layers."""
    from bayeformers import laplace

    return lambda: laplace.fit(model, loader, curvature="kfac", fisher=fisher, prior_precision=1.0, progress=False)


def ours_sums(model: PreTrainedModel, loader: Loader, fisher: Fisher) -> Callable[[], object]:
    """The pass over the data alone."""
    from bayeformers.laplace import Curvature, CurvatureConfig
    from bayeformers.laplace.accumulate import Accumulator
    from bayeformers.laplace.data import prepare
    from bayeformers.laplace.targets import choose_targets
    from bayeformers.likelihoods import logits_of

    targets, device = choose_targets(model)[0], torch.device("cpu")

    def run() -> object:
        sums = Curvature(CurvatureConfig(fisher=fisher))
        accumulator = Accumulator(sums, model, targets, logits_of)
        for batch in loader:
            accumulator.add(prepare(model, batch, device))
        return sums

    return run


def curvlinops_factors(model: PreTrainedModel, loader: Loader, fisher: Fisher) -> Callable[[], object]:
    """curvlinops' factors of the same layers, bias and weight apart as laplace-torch asks for them."""
    from curvlinops import KFACLinearOperator

    wrapped, data = DictModel(model).eval(), [(batch, batch["labels"]) for batch in loader]

    def run() -> object:
        operator = KFACLinearOperator(
            wrapped, nn.CrossEntropyLoss(reduction="sum"), list(linear_parameters(wrapped)), data,
            check_deterministic=False, fisher_type={"exact": "type-2", "mc": "mc"}[fisher], kfac_approx="expand",
            num_data=len(loader.dataset), num_per_example_loss_terms=1, batch_size_fn=lambda x: len(x["input_ids"]),
        )  # fmt: skip
        operator.compute_kronecker_factors()
        return operator

    return run


def laplace_torch(model: PreTrainedModel) -> Any:
    """Theirs over all Linear layers; it raises unless embeddings and LayerNorm are frozen."""
    from laplace import Laplace

    wrapped = DictModel(model).eval()
    wanted = {id(p) for p in linear_parameters(wrapped)}
    for parameter in wrapped.parameters():
        parameter.requires_grad_(id(parameter) in wanted)
    return Laplace(wrapped, "classification", subset_of_weights="all", hessian_structure="kron")


def linear_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    return (p for module in model.modules() if isinstance(module, nn.Linear) for p in module.parameters())


def time_fits(
    loader: Loader, shuffled: Loader, repeats: int, *, with_laplace_torch: bool
) -> list[dict[str, str | float]]:
    """Fits over the batches, to a training epoch over random batches of the same sentences."""
    baseline = "training epoch, random batches"
    runs: dict[str, Callable[[], object]] = {
        baseline: training_epoch(minilm(), shuffled),
        "training epoch, sorted batches": training_epoch(minilm(), loader),
    }
    for fisher in ("exact", "mc"):
        runs[f"ours, {fisher}"] = ours_fit(minilm().eval(), loader, fisher)
        runs[f"ours, {fisher}, sums"] = ours_sums(minilm().eval(), loader, fisher)
        if find_spec("curvlinops") is not None:
            runs[f"curvlinops, {fisher}, sums"] = curvlinops_factors(minilm(), loader, fisher)
    if with_laplace_torch and find_spec("laplace") is not None:
        theirs = laplace_torch(minilm())
        runs["laplace-torch, exact"] = lambda: theirs.fit(loader)
    return _rows(runs, baseline, repeats)


def time_predictions(loader: Loader, batch: Batch, repeats: int) -> list[dict[str, str | float]]:
    """The linearised prediction of one batch with logit covariances, to a forward pass."""
    plain = minilm().eval()
    inputs = {name: value for name, value in batch.items() if name != "labels"}

    def forward() -> Tensor:
        with torch.no_grad():
            logits: Tensor = plain(**inputs).logits
            return logits

    runs: dict[str, Callable[[], object]] = {"forward pass": forward}
    posterior = ours_fit(minilm().eval(), loader, "exact")()
    runs["ours"] = lambda: posterior.predict(inputs, method="glm")
    runs["ours, contrasts"] = lambda: posterior.predict(inputs, method="glm", contrasts=True)
    if find_spec("laplace") is not None:
        model = minilm()
        model.set_attn_implementation("eager")  # the fused attention has no batching rule for their Jacobians
        theirs = laplace_torch(model)
        theirs.fit(loader)
        runs["laplace-torch"] = lambda: theirs(batch)
    return _rows(runs, "forward pass", repeats)


def _rows(runs: dict[str, Callable[[], object]], baseline: str, repeats: int) -> list[dict[str, str | float]]:
    times = interleaved(runs, repeats, warmup=1)
    return [
        {"run": name, "seconds": min(values), f"ratio to {baseline}": median_ratio(values, times[baseline])}
        for name, values in times.items()
    ]


def cola_batches(model: str | Path, data_dir: Path, count: int, size: int) -> tuple[Loader, Loader]:
    """Batches of random training sentences, sorted by length, and the same sentences in random batches."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = load_training("cola", data_dir, tokenizer, seed=0)[0][: count * size]  # in random order
    return (
        Loader(batches([rows[i] for i in by_length(rows)], tokenizer, size)),
        Loader(batches(rows, tokenizer, size)),
    )


def main() -> None:
    """Print both tables."""
    parser = arguments(__doc__ or "", repeats=5)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--data_dir", type=Path, required=True, help="folder that holds CoLA")
    parser.add_argument("--batches", type=int, default=24, help="of the fit")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--predicted", type=int, default=8, help="sentences of the predicted batch")
    parser.add_argument("--laplace_torch", action="store_true", help="time its fit too, which takes minutes")
    args = parser.parse_args()
    folder = Path(minilm().config.name_or_path)
    loader, shuffled = cola_batches(folder, args.data_dir, args.batches, args.batch_size)
    shapes = [list(batch["input_ids"].shape) for batch in loader]
    report(
        "Fit of all Linear layers",
        time_fits(loader, shuffled, args.repeats, with_laplace_torch=args.laplace_torch),
        args.json, batches=shapes,
    )  # fmt: skip
    middle = loader[len(loader) // 2]
    batch = {name: value[: args.predicted] for name, value in middle.items()}
    path = args.json and args.json.with_suffix(".predict.json")
    report(
        "Linearised prediction", time_predictions(loader, batch, args.repeats), path,
        batch=list(batch["input_ids"].shape),
    )  # fmt: skip


if __name__ == "__main__":
    main()
