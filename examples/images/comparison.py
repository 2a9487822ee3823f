"""``--task acc``: the deterministic network, with a temperature and trained on, against each posterior around it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from bayeformers import BayesianTrainer
from bayeformers.reports import format_table
from examples.images.classifier_evaluation import BySet, Sizes, predict_sets, scores, sizes, tempered
from examples.images.classifier_training import fit_further, save
from examples.images.pictures import accuracy_figure
from examples.images.setting import DETERMINISTIC, TITLES, Outcome, Setting
from examples.running import say

TEMPERED, TRAINED_ON = "deterministic + temperature", "deterministic, trained on"
FOLDERS = {DETERMINISTIC: "deterministic", TRAINED_ON: "trained_on", **{title: name for name, title in TITLES.items()}}


def compare(setting: Setting) -> Outcome:
    """Scores, true sizes and seconds of every method."""
    say("Deterministic, trained on: as many further epochs as the ELBO will have")
    further = fit_further(setting.trained, setting.args, setting.data)
    setting.clock.lap("trained_on_training")
    trainers = {DETERMINISTIC: setting.trained, TRAINED_ON: further, **setting.posteriors()}
    found = {title: predict_sets(trainer, setting.data) for title, trainer in trainers.items()}
    setting.clock.lap("prediction")
    weights = {title: _saved(setting, FOLDERS[title], trainer) for title, trainer in trainers.items()}

    point = found.pop(DETERMINISTIC)
    setting.facts["temperature"], scaled = tempered(point, setting.data)
    found = {DETERMINISTIC: point, TEMPERED: scaled, **found}
    return _outcome(setting, found, {**weights, TEMPERED: weights[DETERMINISTIC]})


def _saved(setting: Setting, folder: str, trainer: BayesianTrainer) -> Sizes:
    save(trainer, setting.data, setting.folder / folder)
    trainer.accelerator.wait_for_everyone()
    return sizes(trainer, setting.folder / folder)


def _outcome(setting: Setting, found: dict[str, BySet], weights: dict[str, Sizes]) -> Outcome:
    data = setting.data
    reports = {name: scores(sets.test, data.test) for name, sets in found.items()}
    costs = {
        name: {**asdict(weights[name]), "ms_per_image": 1000 * sets.seconds / len(data.test)}
        for name, sets in found.items()
    }
    results = {
        "methods": reports,
        "validation": {name: scores(sets.validation, data.validation) for name, sets in found.items()},
        "costs": costs,
    }
    figure = accuracy_figure(
        {name: sets.test for name, sets in found.items()},
        data.test.labels.numpy(),
        {name: one.bytes / 1000 for name, one in weights.items()},
        {name: float(report["nll"] or 0.0) for name, report in reports.items()},
        title=f"What does a posterior add? {setting.description}",
    )
    text = f"{format_table(reports, corner='test images', digits=4)}\n\n{_cost_table(costs)}"
    return Outcome(results, text, figure)


def _cost_table(costs: dict[str, dict[str, Any]]) -> str:
    titles = {
        "weights": "weights", "scales": "scales", "other": "other numbers", "bytes": "bytes of files",
        "ms_per_image": "ms per image",
    }  # fmt: skip
    width = max(map(len, costs))
    lines = ["  ".join([f"{'size and speed':<{width}}", *titles.values()])]
    for name, cost in costs.items():
        cells = [f"{cost[key]:{len(title)},{'.3f' if key == 'ms_per_image' else 'd'}}" for key, title in titles.items()]
        lines.append("  ".join([f"{name:<{width}}", *cells]))
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
