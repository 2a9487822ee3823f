"""An image classifier, deterministic and Bayesian: which is better, where it starts, and what rotated images show.

    python -m examples.image_classification                                # LeNet5, scikit-learn's digits, --task acc
    python -m examples.image_classification --task init                    # a pretrained net converted, then trained on
    python -m examples.image_classification --task uncert --data_dir MNIST # rotated images; MNIST's IDX files
    python -m examples.image_classification --model resnet20 --dataset_name uoft-cs/cifar10

Every flag: ``--help``.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from matplotlib.figure import Figure
from transformers import default_data_collator, set_seed
from transformers.utils import logging

from bayeformers import BayesianConfig, BayesianTrainer, LaplacePosterior, experiments, to_bayesian
from bayeformers.experiments import Experiment, flag, image_classification, predict_sets, say
from bayeformers.experiments.image_classification import ImageArguments, ImageData, ImageTrainingArguments
from bayeformers.models.catalogue import IMAGE_CLASSIFIERS
from bayeformers.reports import HtmlResults, format_table, html, recalibrate
from bayeformers.reports.conversion import Sizes, size_figure, size_table, start_figure
from bayeformers.reports.shift import ShiftCurve, shift_figure, shift_tables
from bayeformers.reports.writing import write_results

OUTPUT_DIR = "outputs/image_classification"  # the models, and the numbers and the picture as TASK.json and TASK.png
POINT, TRAINED_ON = "deterministic", "deterministic, trained on"
TITLES = {"variational": "Bayesian (ELBO)", "laplace": "Laplace"}
FOLDERS = {POINT: "deterministic", TRAINED_ON: "trained_on", **{title: name for name, title in TITLES.items()}}

# ---------------------------------------------------------------------------------------------------------- arguments

DEFAULTS: dict[str, dict[str, Any]] = {
    "scikit-learn's digits": {  # few images, hence more epochs; easy ones, hence many held out to choose by
        "num_train_epochs": 40, "per_device_train_batch_size": 32, "bayesian_epochs": 10, "validation_share": 0.5,
    },
    "other images": {"num_train_epochs": 15, "per_device_train_batch_size": 64, "bayesian_epochs": 4},
}  # fmt: skip


@dataclass
class ClassifierArguments(experiments.ConversionArguments, experiments.LaplaceArguments, experiments.ReportArguments):
    """Which model, which question, and how the model becomes Bayesian."""

    model: str = flag("lenet5", f"One of {', '.join(IMAGE_CLASSIFIERS)}.")
    task: Literal["acc", "init", "uncert"] = flag(
        "acc", "acc: scores and sizes; init: where a converted net starts; uncert: rotated images."
    )
    width: float = flag(1.0, "Factor of every layer's width.")
    model_name_or_path: str | None = flag(
        None, "A trained deterministic image classifier, a folder or a hub name, in place of --model."
    )
    method: Literal["variational", "laplace", "all"] = flag(
        "all", "Posteriors of acc and uncert: the ELBO's, Laplace, or both."
    )
    freeze: bool = flag(False, "Train the scales only, in acc and uncert; init does both.")
    estimator: Literal["reparameterization", "flipout", "local_reparameterization"] = flag(
        "flipout", "How weight noise enters in training."
    )
    angle_step: float = flag(15.0, "Degrees between the angles of uncert, from 0 to 180.")
    strip_image: int = flag(0, "Position of the test image that uncert shows turned.")

    def __post_init__(self) -> None:
        if self.model not in IMAGE_CLASSIFIERS:
            raise ValueError(f"`model` must be one of {', '.join(IMAGE_CLASSIFIERS)}, got {self.model!r}.")
        if not 0 < self.width < math.inf:
            raise ValueError(f"`width` must be a finite number > 0, got {self.width}.")
        prior = experiments.parse_prior(self.prior)
        BayesianConfig(delta=0.05 if self.delta is None else self.delta, prior=prior)  # refuses what is wrong
        if not 0 < self.angle_step <= 180:
            raise ValueError(f"`angle_step` must lie in (0, 180] degrees, got {self.angle_step}.")
        if self.report is not None and self.task != "acc":
            raise ValueError(f"`report` is of --task acc, whose methods have the same images, got --task {self.task}.")
        if self.strip_image < 0:
            raise ValueError(f"`strip_image` must be a position from 0, got {self.strip_image}.")
        super().__post_init__()


def parse_arguments(argv: Sequence[str] | None = None) -> tuple[ClassifierArguments, ImageArguments, Any]:
    """The command line's arguments; what it does not say comes from the model's defaults, then from the images'."""
    known = experiments.look_ahead(argv, "data_dir", "dataset_name", "model")
    kind = list(DEFAULTS)[bool(known.data_dir or known.dataset_name)]
    parser = experiments.ExperimentParser((ClassifierArguments, ImageArguments, ImageTrainingArguments), DEFAULTS, kind)
    rates = {f"--model {name}": {"learning_rate": of.learning_rate} for name, of in IMAGE_CLASSIFIERS.items()}
    parser.show_defaults(rates)
    parser.set_defaults(output_dir=OUTPUT_DIR, **rates.get(f"--model {known.model or 'lenet5'}", {}))
    return parser.parse(argv)


@dataclass
class Run:
    """Where the tasks start, the trained deterministic network; and what fitting around it decides."""

    how: ClassifierArguments
    data: ImageData
    experiment: Experiment
    trained: BayesianTrainer
    clock: experiments.Clock
    facts: dict[str, Any] = field(default_factory=dict)

    def converted(self, name: str, *, freeze: bool) -> BayesianTrainer:
        """A Bayesian copy of the trained network, not trained yet, at the delta of least validation NLL."""
        how, facts = {**self.how.conversion, "freeze": freeze}, self.facts
        if "delta" not in facts:
            given = self.how.delta
            facts["delta"] = self.experiment.best_delta(self.trained, how) if given is None else given
            self.clock.lap("delta")
        model = to_bayesian(copy.deepcopy(self.trained.model), facts["delta"], **how)
        return image_classification.further(self.experiment, model, name)

    def posteriors(self) -> dict[str, BayesianTrainer]:
        """Title -> trainer of each posterior that ``--method`` asks for, fitted around the trained network."""
        found, names = {}, [self.how.method] if self.how.method in TITLES else list(TITLES)
        if "variational" in names:
            say("Bayesian: every weight becomes a Gaussian around the trained one, and the ELBO trains it")
            found[TITLES["variational"]] = trainer = self.converted("variational", freeze=self.how.freeze)
            trainer.train()
            self.facts["learning_curve"] = image_classification.learning_curve(trainer)
            self.clock.lap("variational_training")
        if "laplace" in names:
            say("Laplace: a Gaussian around the trained weights, from the curvature there")
            trainer = self.experiment.fit_laplace(self.trained, "laplace", **self.how.laplace)
            found[TITLES["laplace"]] = trainer
            if isinstance(trainer.posterior, LaplacePosterior):
                self.facts["prior_precision"] = trainer.posterior.prior_precision
                self.facts["beware"] = trainer.posterior.caveats
            self.clock.lap("laplace_fit")
        return found

    def described(self) -> str:
        """Model and images, for the heading of a picture."""
        kind = type(self.trained.model).__name__.removesuffix("ForImageClassification")
        beware = "; ".join(self.facts.get("beware", ()))
        warning = f"\nLaplace: {beware}; its parts mean nothing" if beware else ""
        return self.data.described(kind if self.how.model_name_or_path else self.how.model) + warning


# --------------------------------------------------------------------------------------------------------------- tasks

Outcome = tuple[dict[str, Any], list[str], Figure]  # a task's numbers, its tables, and its picture


def compare(run: Run) -> Outcome:
    """``--task acc``: scores, true sizes and seconds of the network, with a temperature, trained on, and posteriors."""
    data, experiment = run.data, run.experiment
    say("Deterministic, trained on: as many further epochs as the ELBO will have")
    longer = image_classification.further(experiment, copy.deepcopy(run.trained.model), "trained_on")
    longer.train()
    run.clock.lap("trained_on_training")
    trainers = {POINT: run.trained, TRAINED_ON: longer, **run.posteriors()}
    found, seconds, sizes = {}, {}, {}
    for name, trainer in trainers.items():
        validation, start = image_classification.predict_images(trainer, data.validation), time.perf_counter()
        found[name] = {"validation": validation, "test": image_classification.predict_images(trainer, data.test)}
        seconds[name] = time.perf_counter() - start
    run.clock.lap("prediction")
    for name, trainer in trainers.items():
        experiment.save(trainer, FOLDERS[name])
        trainer.accelerator.wait_for_everyone()
        sizes[name] = Sizes.of(trainer.model, experiment.folder / FOLDERS[name])

    scaled, tempered = recalibrate(found[POINT], data.validation.labels.numpy()), f"{POINT} + temperature"
    run.facts["temperature"] = scaled.value
    found = {POINT: found.pop(POINT), tempered: scaled.predictions, **found}
    sizes = {name: sizes.get(name, sizes[POINT]) for name in found}
    costs = {name: 1000 * seconds.get(name, seconds[POINT]) / len(data.test) for name in found}
    reports = {name: data.scores(of["test"]) for name, of in found.items()}
    results = {
        "methods": reports,
        "validation": {name: data.scores(of["validation"], "validation") for name, of in found.items()},
        "costs": {name: {**asdict(of), "ms_per_image": costs[name]} for name, of in sizes.items()},
    }
    tests, labels = {name: of["test"] for name, of in found.items()}, data.test.labels.numpy()
    if run.how.report and experiment.args.process_index == 0:
        page = HtmlResults(
            tests, labels, class_names=data.class_names, title=f"What does a posterior add? {run.described()}"
        )
        html(page, run.how.report)
    figure = size_figure(tests, labels, sizes, title=f"What does a posterior add? {run.described()}")
    return results, [format_table(reports, corner="test images", digits=4), size_table(sizes, costs)], figure


def start(run: Run) -> Outcome:
    """``--task init``: the converted network, and what the ELBO adds to it, its means frozen or not."""
    data = run.data
    point = predict_sets(run.trained, {"validation": data.validation, "test": data.test})
    scaled = recalibrate(point, data.validation.labels.numpy())
    run.facts["temperature"] = scaled.value
    tests = {"pretrained": point["test"], "pretrained + temperature": scaled.predictions["test"]}
    mean, draws = "converted, mean network", "converted, averaged draws"
    curves: dict[str, list[float]] = {}
    for name, freeze in {"ELBO, means frozen": True, "ELBO, means trained": False}.items():
        folder = "frozen" if freeze else "free"
        trainer = run.converted(folder, freeze=freeze)
        if mean not in tests:
            tests[mean] = image_classification.predict_by_mean(trainer, data.test)
            tests[draws] = image_classification.predict_images(trainer, data.test)
        say(f"{name}: from the converted network on")
        args, all_draws = trainer.args, trainer.args.num_eval_samples
        args.num_eval_samples = args.num_eval_samples_during_training or all_draws  # as after each epoch
        first = trainer.evaluate()["eval_nll"]
        args.num_eval_samples = all_draws
        trainer.train()
        curves[name] = [first, *image_classification.learning_curve(trainer)]
        tests[name] = image_classification.predict_images(trainer, data.test)
        run.clock.lap(f"{folder}_training")

    reports = {name: data.scores(predictions) for name, predictions in tests.items()}
    accuracies = {name: float(of["accuracy"] or 0.0) for name, of in reports.items() if "temperature" not in name}
    lost = {name: 100 * (accuracies["pretrained"] - accuracies[name]) for name in (mean, draws)}
    nll = data.scores(point["validation"], "validation")["nll"] or 0.0
    rows = {name: {f"epoch {epoch}": nll for epoch, nll in enumerate(curve)} for name, curve in curves.items()}
    tables = [
        format_table(reports, corner="test images", digits=4),
        format_table(rows, corner="validation NLL", digits=4),
        f"points of accuracy lost at the start: {lost[mean]:.2f} by the mean network, {lost[draws]:.2f} by the draws",
    ]
    results = {"methods": reports, "points_lost_at_start": lost, "validation_nll": curves, "pretrained_nll": nll}
    title = f"A pretrained net converted. {run.described()}"
    return results, tables, start_figure(curves, nll, accuracies, len(data.test), title=title)


def angles(step: float) -> list[float]:
    """From 0 to at most 180 degrees."""
    return [step * index for index in range(int(180 / step + 1e-9) + 1)]


def turn(run: Run) -> Outcome:
    """``--task uncert``: error and uncertainties of every method on test images rotated further and further."""
    data, degrees, image = run.data, angles(run.how.angle_step), run.how.strip_image
    trainers = {POINT: run.trained, **run.posteriors()}
    show = not run.experiment.args.disable_tqdm
    found = image_classification.predict_rotated(trainers, data.test, degrees, progress=show)
    run.clock.lap("prediction")

    labels = data.test.labels.numpy()
    curves = {name: ShiftCurve.from_predictions(predictions, labels) for name, predictions in found.items()}
    shown = next(name for name in found if name != POINT)
    probs = np.stack([one.probs[image] for one in found[shown]])
    results = {"degrees": degrees, "methods": {name: asdict(curve) for name, curve in curves.items()}}
    results["strip"] = {"method": shown, "image": image, "probabilities": probs}
    chosen = data.test.select([image])
    strip = torch.cat([chosen.rotated(angle).images for angle in degrees]).movedim(1, -1).squeeze(-1).clamp(0, 1)
    figure = shift_figure(
        degrees, curves, strip.numpy(), probs, data.class_names,
        title=f"Does it know that it errs? {run.described()}, rotated",
        strip_title=f"{shown}: one test image (label {data.class_names[int(chosen.labels)]}) at each angle",
    )  # fmt: skip
    return results, shift_tables(degrees, curves), figure


TASKS = {"acc": compare, "init": start, "uncert": turn}

# ---------------------------------------------------------------------------------------------------------------- main


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run one task; the results are returned and, by the main process, printed and written to ``--output_dir``."""
    how, image_args, args = parse_arguments(argv)
    logging.disable_progress_bar()  # of loading and saving weights; the trainings keep theirs
    set_seed(args.seed)
    clock, path = experiments.Clock(), how.model_name_or_path
    with experiments.user_input():
        past = experiments.past_of(path, trains=False)
        size = image_classification.image_size_of(how.model, path)
        data = image_classification.load_image_data(image_args, args.seed, size, history=past)
        if how.task == "uncert" and how.strip_image >= len(data.test):
            count = f"{len(data.test)}, the number of test images"
            raise ValueError(f"`strip_image` must be below {count}, got {how.strip_image}.")
        model = image_classification.load_classifier(how.model, path, how.width, data)
    clock.lap("loading")
    experiment = Experiment(args, data.train, data.validation, default_data_collator, rows=data.rows)
    say(f"Deterministic: {type(model).__name__}, {len(data.train):,} training images of {data.name}")
    trained = experiment.fit(model) if path is None else experiment.trainer(model, FOLDERS[POINT])
    if path is None:
        experiment.save(trained, FOLDERS[POINT])
    clock.lap("deterministic_training")
    run = Run(how, data, experiment, trained, clock)
    results, tables, figure = TASKS[how.task](run)
    results = {
        "task": how.task, "model": path or how.model, "images": data.facts, "seed": args.seed,
        "parameters": sum(parameter.numel() for parameter in trained.model.parameters()),
        "processes": args.world_size, "seconds": clock.seconds, **run.facts, **results,
        "arguments": {**asdict(how), **asdict(image_args), "training": args.to_sanitized_dict()},
    }  # fmt: skip
    if args.process_index == 0:
        if beware := "; ".join(results.get("beware", ())):
            tables.append(f"Laplace: {beware}.\n  Its aleatoric and epistemic parts mean nothing.")
        write_results(experiment.folder, results, {f"{how.task}.png": figure}, *tables, name=f"{how.task}.json")
    return results


if __name__ == "__main__":
    experiments.run_command(main)
