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
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from transformers import default_data_collator, set_seed
from transformers.utils import logging

from bayeformers import BayesianConfig, BayesianTrainer, experiments, kl_divergence, prune, signal_to_noise, to_bayesian
from bayeformers.experiments import Experiment, flag, image_classification, parse_prior, predict_sets, say
from bayeformers.experiments.image_classification import ImageArguments, ImageData
from bayeformers.models import MLPConfig, MLPForImageClassification
from bayeformers.nn import variational_tensors
from bayeformers.reports import comparison_figure, format_table, recalibrate
from bayeformers.reports.conversion import pruning_figure
from bayeformers.reports.writing import write_results

DETERMINISTIC, TEMPERED = "deterministic", "deterministic + temperature"
SCRATCH, MOPED = "Bayes by Backprop", "MOPED"
FOLDERS = {DETERMINISTIC: "deterministic", SCRATCH: "scratch", MOPED: "moped"}
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.9, 0.95, 0.98)

# ---------------------------------------------------------------------------------------------------------- arguments

DEFAULTS: dict[str, dict[str, Any]] = {
    "scikit-learn's digits": {  # a fifth of the images, and easier ones
        "num_train_epochs": 30, "per_device_train_batch_size": 32, "bayesian_epochs": 40, "moped_epochs": 5,
        "bayesian_learning_rate": 3e-3, "kl_weight": 0.01, "num_eval_samples_during_training": 4,
    },
    # chosen on 1,000 held-out images of MNIST's t10k files, of which the other 7,000 trained. Held-out accuracy after
    # 40 epochs: 95.2 % with these, 90.5 % with the ELBO itself (--kl_weight 1), 94.5 % without noise
    "other images": {
        "num_train_epochs": 20, "per_device_train_batch_size": 128, "bayesian_epochs": 40, "moped_epochs": 10,
        "bayesian_learning_rate": 3e-3, "kl_weight": 0.1, "num_eval_samples_during_training": 4,
    },
}  # fmt: skip


@dataclass
class MlpArguments:
    """The network, how it becomes Bayesian, and how much of it is removed."""

    hidden_sizes: list[int] = flag([400, 400], "Widths of hidden layers.")
    prior: str = flag(
        '{"type": "normal", "std": 0.1, "centre": 0.0}',
        'Prior of the training from scratch: scale_mixture, normal, ... or JSON: {"type": "scale_mixture", '
        '"pi": 0.25, "std1": 1.0, "std2": 0.0025}.',
    )
    moped_prior: str = flag("moped", "MOPED's prior; its own is around the trained weights.")
    initial_scale: float = flag(0.02, "Every sigma at the start of that training.")
    delta: float | None = flag(
        None, "MOPED's initial sigma relative to |weight|; if not given, that of least validation NLL."
    )
    estimator: Literal["reparameterization", "flipout", "local_reparameterization"] = flag(
        "local_reparameterization", "How weight noise enters in training."
    )
    removed: list[float] = flag(
        [0.0, 0.25, 0.5, 0.75, 0.9, 0.95, 0.98], "Shares of the weights to remove, each in [0, 1)."
    )

    def __post_init__(self) -> None:
        if not self.hidden_sizes or min(self.hidden_sizes) < 1:
            raise ValueError(f"`hidden_sizes` must be one or more widths >= 1, got {self.hidden_sizes}.")
        if not 0 < self.initial_scale < math.inf:
            raise ValueError(f"`initial_scale` must be a finite number > 0, got {self.initial_scale}.")
        if not self.removed or not all(0 <= share < 1 for share in self.removed):
            raise ValueError(f"`removed` must be shares in [0, 1), got {self.removed}.")
        self.removed = sorted({0.0, *self.removed})
        for prior in (self.prior, self.moped_prior):
            BayesianConfig(delta=0.05 if self.delta is None else self.delta, prior=parse_prior(prior))


@dataclass
class MlpTrainingArguments(image_classification.ImageTrainingArguments):
    """Every TrainingArguments flag, for each training, and what differs between them."""

    output_dir: str | None = flag("outputs/mlp_mnist", "Where models, results.json and the two PNG go.")
    bayesian_epochs: float = flag(60.0, "Epochs of the training from scratch.")
    bayesian_learning_rate: float | None = flag(None, "Learning rate of its means; --learning_rate if not given.")
    moped_epochs: float = flag(10.0, "Epochs of the training from the trained weights.")
    moped_learning_rate: float | None = flag(
        None, "Learning rate of its means; 0.3 times --learning_rate if not given."
    )
    moped_kl_weight: float = flag(1.0, "--kl_weight of that training.")

    def __post_init__(self) -> None:
        super().__post_init__()
        experiments.check_least(self, moped_epochs=1)
        if not 0 <= self.moped_kl_weight < math.inf:
            raise ValueError(f"`moped_kl_weight` must be a finite number >= 0, got {self.moped_kl_weight}.")


Arguments = tuple[MlpArguments, ImageArguments, MlpTrainingArguments]


def parse_arguments(argv: Sequence[str] | None = None) -> Arguments:
    """The command line's arguments; what it does not say comes from the images' defaults."""
    known = experiments.look_ahead(argv, "data_dir", "dataset_name")
    kind = list(DEFAULTS)[bool(known.data_dir or known.dataset_name)]
    groups = (MlpArguments, ImageArguments, MlpTrainingArguments)
    return experiments.ExperimentParser(groups, DEFAULTS, kind).parse(argv)


# --------------------------------------------------------------------------------------------------------------- train


def new_network(mlp: MlpArguments, data: ImageData) -> MLPForImageClassification:
    """An untrained network for these images."""
    return MLPForImageClassification(MLPConfig(hidden_sizes=mlp.hidden_sizes, **data.model_fields))


def train(
    experiment: Experiment, mlp: MlpArguments, data: ImageData, clock: experiments.Clock, facts: dict[str, Any]
) -> dict[str, BayesianTrainer]:
    """The three networks, saved to their folders; the first two start from the same random weights."""
    args = experiment.args
    model = new_network(mlp, data)
    start = copy.deepcopy(model)

    say(f"1. Without noise: {len(data.train):,} training images of {data.name}")
    trained = experiment.fit(model, FOLDERS[DETERMINISTIC])
    clock.lap("deterministic_training")

    say("2. Bayes by Backprop: every weight a Gaussian from the start, with a prior around zero")
    model = to_bayesian(start, freeze=False, prior=parse_prior(mlp.prior), estimator=mlp.estimator)
    for tensor in variational_tensors(model):
        tensor.module.set_scale(tensor.parameter_name, torch.full_like(tensor.loc, mlp.initial_scale))
    rate = args.learning_rate if args.bayesian_learning_rate is None else args.bayesian_learning_rate
    how = {"num_train_epochs": args.bayesian_epochs, "learning_rate": rate}
    scratch = experiment.fit(model, FOLDERS[SCRATCH], stop_early=False, **how)
    clock.lap("scratch_training")

    say("3. MOPED: Gaussians around the trained weights, which are also the prior's centres (Krishnan et al. 2020)")
    facts["delta"] = experiment.best_delta(trained, {}) if mlp.delta is None else mlp.delta
    prior, weights = parse_prior(mlp.moped_prior), copy.deepcopy(trained.model)
    model = to_bayesian(weights, facts["delta"], freeze=False, prior=prior, estimator=mlp.estimator)
    rate = 0.3 * args.learning_rate if args.moped_learning_rate is None else args.moped_learning_rate
    how = {"num_train_epochs": args.moped_epochs, "learning_rate": rate, "kl_weight": args.moped_kl_weight}
    moped = experiment.fit(model, FOLDERS[MOPED], stop_early=False, **how)
    clock.lap("moped_training")

    trainers = {DETERMINISTIC: trained, SCRATCH: scratch, MOPED: moped}
    with torch.no_grad():  # the ELBO's second part, in nats, before --kl_weight
        facts["kl_per_image"] = {
            name: float(kl_divergence(trainers[name].model)) / len(data.train) for name in (SCRATCH, MOPED)
        }
    for name, trainer in trainers.items():
        experiment.save(trainer, FOLDERS[name])
    return trainers


# -------------------------------------------------------------------------------------------------------------- remove


@torch.no_grad()
def remove_smallest(model: nn.Module, share: float) -> nn.Module:
    """Magnitude pruning, in place: that share of all weights in matrices together, the smallest, becomes 0."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    sizes = torch.cat([matrix.abs().flatten() for matrix in matrices])
    gone = torch.zeros_like(sizes, dtype=torch.bool)
    gone[sizes.argsort(stable=True)[: round(share * len(sizes))]] = True
    for matrix, part in zip(matrices, torch.split(gone, [matrix.numel() for matrix in matrices]), strict=True):
        matrix.masked_fill_(part.view_as(matrix), 0.0)
    return model


def removal_curve(
    experiment: Experiment, trainer: BayesianTrainer, shares: Sequence[float], data: ImageData
) -> list[dict[str, Any]]:
    """Test scores of a copy that loses more and more weights; averaged over draws where there is a posterior.

    By share: its accuracy, NLL and ECE, and "layers", the share that is gone from each matrix.
    """
    remove = remove_smallest if trainer.posterior is None else prune
    losing, curve = experiment.trainer(copy.deepcopy(trainer.model), "removal", stop_early=False), []
    for share in shares:
        model = remove(losing.model, share)
        report = data.scores(predict_sets(losing, {"test": data.test})["test"])
        means = {name: value for name, value in model.named_parameters() if not name.endswith("_rho")}
        gone = {name: float((value == 0).float().mean()) for name, value in means.items() if value.dim() > 1}
        curve.append({"share": share, **{key: report[key] for key in ("accuracy", "nll", "ece")}, "layers": gone})
    return curve


def decibels(model: nn.Module) -> np.ndarray:
    """20 log10(|mu| / sigma) of all random weights in matrices: the axis of figure 4 of Blundell et al. 2015."""
    ratios = [ratio.flatten() for ratio in signal_to_noise(model).values() if ratio.dim() > 1]
    return 20 * torch.cat(ratios).double().clamp_min(1e-12).log10().cpu().numpy()


# -------------------------------------------------------------------------------------------------------------- report


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the example; the results are returned and, by the main process, printed and written to ``--output_dir``."""
    arguments = parse_arguments(argv)
    mlp, image_args, args = arguments
    logging.disable_progress_bar()  # of loading and saving weights; the trainings keep theirs
    set_seed(args.seed)
    clock = experiments.Clock()
    facts: dict[str, Any] = {}
    with experiments.user_input():
        # black stays 0: a weight on a pixel that is always black costs nothing
        data = image_classification.load_image_data(image_args, args.seed, centre=False)
    clock.lap("loading")
    experiment = Experiment(args, data.train, data.validation, default_data_collator, rows=data.rows)
    trainers = train(experiment, mlp, data, clock, facts)

    sets = {"validation": data.validation, "test": data.test}
    found = {name: predict_sets(trainer, sets) for name, trainer in trainers.items()}
    scaled = recalibrate(found[DETERMINISTIC], data.validation.labels.numpy())
    found = {DETERMINISTIC: found.pop(DETERMINISTIC), TEMPERED: scaled.predictions, **found}
    clock.lap("prediction")
    orders = {name: "smallest |w| first" if name == DETERMINISTIC else "lowest |μ| / σ first" for name in trainers}
    curves = {
        f"{name}, {orders[name]}": removal_curve(experiment, of, mlp.removed, data) for name, of in trainers.items()
    }
    ratios = {name: decibels(trainers[name].model) for name in (SCRATCH, MOPED)}
    clock.lap("removal")

    results = {
        "seconds": clock.seconds, **facts, "temperature": scaled.value,
        "weights": sum(parameter.numel() for parameter in trainers[DETERMINISTIC].model.parameters()),
        "decibels": {name: {str(q): np.quantile(of, q) for q in QUANTILES} for name, of in ratios.items()},
        "images": data.facts, "seed": args.seed, "processes": args.world_size,
        "arguments": {**asdict(mlp), **asdict(image_args), "training": args.to_sanitized_dict()},
        "methods": {name: data.scores(of["test"]) for name, of in found.items()},
        "validation": {name: data.scores(of["validation"], "validation") for name, of in found.items()},
        "removal": curves,
    }  # fmt: skip
    if args.process_index == 0:
        write(experiment.folder, data, {name: of["test"] for name, of in found.items()}, ratios, results)
    return results


def write(
    folder: Path, data: ImageData, found: dict[str, Any], ratios: dict[str, Any], results: dict[str, Any]
) -> None:
    """Print the tables and write the three files."""
    sizes = f"A multilayer perceptron of {results['weights']:,} weights on {data.name}, {len(data.test):,} test images"
    labels = data.test.labels.numpy()
    sure = comparison_figure(found, labels, {}, title=f"How sure is it? {sizes}")
    caption = "Of all weights in matrices together; biases stay. Bayesian: averaged over draws of what is left."
    title = f"How many weights does it need? {sizes}"
    pruned = pruning_figure(ratios, results["removal"], title=title, caption=caption)
    shown = ("accuracy", "nll", "ece", "aurc", "epistemic")
    rows = {name: {key: row[key] for key in shown} for name, row in results["methods"].items()}
    removed = {
        name: {f"{100 * point['share']:g} %": 100 * point["accuracy"] for point in curve}
        for name, curve in results["removal"].items()
    }
    tables = [
        format_table(rows, corner="test images", digits=4),
        format_table(removed, corner="accuracy in %, weights removed", digits=2),
    ]
    write_results(folder, results, {"uncertainty.png": sure, "pruning.png": pruned}, *tables)


if __name__ == "__main__":
    experiments.run_command(main)
