"""Weight uncertainty in a multilayer perceptron, and how many weights it needs (Blundell et al. 2015, 1505.05424).

    python -m examples.mlp_mnist                                         # scikit-learn's digits: no download
    python -m examples.mlp_mnist --data_dir MNIST                        # MNIST's IDX files, or Fashion-MNIST's
    python -m examples.mlp_mnist --dataset_name ylecun/mnist             # the hub's copy
    python -m examples.mlp_mnist --prior '{"type": "scale_mixture", "pi": 0.5, "std1": 1.0, "std2": 0.0025}'

The network is trained without noise (and gets a temperature), by Bayes by Backprop from random weights, and by Bayes by
Backprop from the trained ones (MOPED). Then its weights are removed, those of the lowest signal-to-noise ratio first.
Every flag: ``--help``.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from transformers import set_seed
from transformers.utils import logging

from bayeformers import BayesianTrainer
from bayeformers.reports import save_figure, write_json
from examples.commands import run as run_command
from examples.commands import user_input
from examples.images.classifier_evaluation import BySet, predict_sets, scores, tempered
from examples.images.classifier_training import best_delta, fit_deterministic, save
from examples.images.data import ImageData, load_images
from examples.mlp.arguments import Arguments, MlpArguments, MlpTrainingArguments, parse_arguments
from examples.mlp.outputs import FIGURES, pruning_figure, removal_table, scores_table, uncertainty_figure
from examples.mlp.removal import Curve, decibels, removal_curve
from examples.mlp.training import fit_from_scratch, fit_moped, kl_per_image, new_network
from examples.running import Clock, say

DETERMINISTIC, TEMPERED = "deterministic", "deterministic + temperature"
SCRATCH, MOPED = "Bayes by Backprop", "MOPED"
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.9, 0.95, 0.98)
BY_SIZE, BY_RATIO = "smallest |w| first", "lowest |μ| / σ first"


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the example; the results are returned and, by the main process, printed and written to ``--output_dir``."""
    arguments = parse_arguments(argv)
    mlp_args, data_args, args = arguments
    logging.disable_progress_bar()  # of loading and saving weights; the trainings keep theirs
    set_seed(args.seed)
    clock = Clock()
    facts: dict[str, Any] = {}
    with user_input():
        data = load_images(data_args, args.seed, centre=False)  # black stays 0: a weight on a black pixel costs nothing
    clock.lap("loading")
    trainers = train(mlp_args, args, data, clock, facts)
    found = {name: predict_sets(trainer, data) for name, trainer in trainers.items()}
    facts["temperature"], scaled = tempered(found[DETERMINISTIC], data)
    found = {DETERMINISTIC: found.pop(DETERMINISTIC), TEMPERED: scaled, **found}
    clock.lap("prediction")
    curves = {
        f"{name}, {BY_SIZE if name == DETERMINISTIC else BY_RATIO}": removal_curve(trainer, mlp_args.removed, data)
        for name, trainer in trainers.items()
    }
    ratios = {name: decibels(trainers[name].model) for name in (SCRATCH, MOPED)}
    clock.lap("removal")
    facts["weights"] = sum(parameter.numel() for parameter in trainers[DETERMINISTIC].model.parameters())
    facts["decibels"] = {name: {str(q): np.quantile(of, q) for q in QUANTILES} for name, of in ratios.items()}
    results = {"seconds": clock.seconds, **facts, **numbers(arguments, data, found), "removal": curves}
    if args.process_index == 0:
        report(Path(args.output_dir or "."), data, found, curves, ratios, results)
    return results


def numbers(arguments: Arguments, data: ImageData, found: dict[str, BySet]) -> dict[str, Any]:
    """What was run on which images, and every method's scores."""
    mlp_args, data_args, args = arguments
    return {
        "images": {"name": data.name, **{part: len(getattr(data, part)) for part in ("train", "validation", "test")}},
        "seed": args.seed,
        "processes": args.world_size,
        "arguments": {**asdict(mlp_args), **asdict(data_args), "training": args.to_sanitized_dict()},
        "methods": {name: scores(sets.test, data.test) for name, sets in found.items()},
        "validation": {name: scores(sets.validation, data.validation) for name, sets in found.items()},
    }


def train(
    mlp_args: MlpArguments, args: MlpTrainingArguments, data: ImageData, clock: Clock, facts: dict[str, Any]
) -> dict[str, BayesianTrainer]:
    """The three networks, saved to their folders; the first two start from the same random weights."""
    model = new_network(mlp_args, data)
    start = copy.deepcopy(model)
    say(f"1. Without noise: {len(data.train):,} training images of {data.name}")
    trained = fit_deterministic(model, args, data)
    clock.lap("deterministic_training")
    say("2. Bayes by Backprop: every weight a Gaussian from the start, with a prior around zero")
    scratch = fit_from_scratch(start, mlp_args, args, data)
    clock.lap("scratch_training")
    say("3. MOPED: Gaussians around the trained weights, which are also the prior's centres")
    facts["delta"] = best_delta(trained, args, data) if mlp_args.delta is None else mlp_args.delta
    moped = fit_moped(trained, facts["delta"], mlp_args, args, data)
    clock.lap("moped_training")
    trainers = {DETERMINISTIC: trained, SCRATCH: scratch, MOPED: moped}
    facts["kl_per_image"] = {name: kl_per_image(trainers[name], data) for name in (SCRATCH, MOPED)}
    for name, trainer in zip(("deterministic", "scratch", "moped"), trainers.values(), strict=True):
        save(trainer, data, Path(args.output_dir or ".") / name)
    return trainers


def report(
    folder: Path,
    data: ImageData,
    found: dict[str, BySet],
    curves: dict[str, Curve],
    ratios: dict[str, np.ndarray],
    results: dict[str, Any],
) -> None:
    """Print the tables and write the three files."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "results.json", results)
    sizes = f"{results['weights']:,} weights on {data.name}, {len(data.test):,} test images"
    figures = [
        uncertainty_figure(
            {name: sets.test for name, sets in found.items()},
            data.test.labels.numpy(),
            title=f"How sure is it? A multilayer perceptron of {sizes}",
        ),
        pruning_figure(
            ratios,
            curves,
            title=f"How many weights does it need? A multilayer perceptron of {sizes}",
            caption="Of all weights in matrices together; biases stay. Bayesian: averaged over draws of what is left.",
        ),
    ]
    for figure, name in zip(figures, FIGURES, strict=True):
        save_figure(figure, folder / name)
    print(f"\n{scores_table(results['methods'])}\n\n{removal_table(curves)}\n")
    print("seconds: " + "  ".join(f"{name} {value}" for name, value in results["seconds"].items()))
    print(f"Written to {folder}: results.json, {', '.join(FIGURES)}")


if __name__ == "__main__":
    run_command(main)
