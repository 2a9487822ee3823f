"""What the three tasks of ``python -m examples.image_classification`` share: where they start, what they return."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from bayeformers import BayesianTrainer, LaplacePosterior
from examples.images.classifier_arguments import ClassifierArguments, ClassifierTrainingArguments
from examples.images.classifier_training import best_delta, converted, fit_laplace, learning_curve
from examples.images.data import ImageData
from examples.running import Clock, say

DETERMINISTIC = "deterministic"
TITLES = {"variational": "Bayesian (ELBO)", "laplace": "Laplace"}
"""By flag, what tables and pictures call a posterior."""


@dataclass
class Setting:
    """The arguments, the images, the trained deterministic network; and what fitting around it decides."""

    model_args: ClassifierArguments
    args: ClassifierTrainingArguments
    data: ImageData
    trained: BayesianTrainer
    clock: Clock
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """Where the task's files go."""
        return Path(self.args.output_dir or ".")

    @property
    def description(self) -> str:
        """Model and images, for the heading of a picture."""
        made = self.model_args.model_name_or_path is None
        kind = type(self.trained.model).__name__.removesuffix("ForImageClassification")
        channels, height, width = self.data.shape
        size = f"{height} x {width}" if channels == 1 else f"{height} x {width} x {channels}"
        name = self.model_args.model if made else kind
        beware = "; ".join(self.facts.get("beware", ()))
        warning = f"\nLaplace: {beware}; its parts mean nothing" if beware else ""
        return f"{name} on {self.data.name}: {len(self.data.test):,} test images of {size}{warning}"

    def converted(self, name: str, *, freeze: bool) -> BayesianTrainer:
        """A Bayesian copy of the trained network, not trained yet, at the delta of least validation NLL."""
        if "delta" not in self.facts:
            delta = self.model_args.delta
            if delta is None:
                delta = best_delta(self.trained, self.args, self.data, **self.model_args.conversion)
            self.facts["delta"] = delta
            self.clock.lap("delta")
        return converted(self.trained, self.facts["delta"], name, self.model_args, self.args, self.data, freeze=freeze)

    def posteriors(self) -> dict[str, BayesianTrainer]:
        """Title -> trainer of each posterior that ``--method`` asks for, fitted around the trained network."""
        return {TITLES[name]: self._variational() if name != "laplace" else self._laplace() for name in self._names()}

    def _names(self) -> list[str]:
        return list(TITLES) if self.model_args.method == "all" else [self.model_args.method]

    def _variational(self) -> BayesianTrainer:
        say("Bayesian: every weight becomes a Gaussian around the trained one, and the ELBO trains it")
        trainer = self.converted("variational", freeze=self.model_args.freeze)
        trainer.train()
        self.facts["learning_curve"] = learning_curve(trainer)
        self.clock.lap("variational_training")
        return trainer

    def _laplace(self) -> BayesianTrainer:
        say("Laplace: a Gaussian around the trained weights, from the curvature there")
        trainer = fit_laplace(self.trained, self.model_args, self.args, self.data)
        if isinstance(trainer.posterior, LaplacePosterior):
            self.facts["prior_precision"] = trainer.posterior.prior_precision
            self.facts["beware"] = trainer.posterior.caveats
        self.clock.lap("laplace_fit")
        return trainer


@dataclass(frozen=True)
class Outcome:
    """A task's numbers, its tables as text, and its picture."""

    results: dict[str, Any]
    text: str
    figure: Figure
