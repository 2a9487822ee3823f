"""``--task init``: a pretrained network converted; where it starts, and what the ELBO adds, its means frozen or not."""

from __future__ import annotations

from bayeformers import BayesianTrainer
from bayeformers.reports import ClassPredictions, format_table
from examples.images.classifier_evaluation import predict_sets, predicted, predicted_by_mean, scores, tempered
from examples.images.classifier_training import learning_curve
from examples.images.pictures import start_figure
from examples.images.setting import Outcome, Setting
from examples.running import say

PRETRAINED, TEMPERED = "pretrained", "pretrained + temperature"
MEAN, DRAWS = "converted, mean network", "converted, averaged draws"
TRAININGS = {"ELBO, means frozen": True, "ELBO, means trained": False}


def start(setting: Setting) -> Outcome:
    """Scores of the pretrained and of the converted network, and of the converted one after each training."""
    data = setting.data
    point = predict_sets(setting.trained, data)
    setting.facts["temperature"], scaled = tempered(point, data)
    tests = {PRETRAINED: point.test, TEMPERED: scaled.test}
    curves: dict[str, list[float]] = {}
    for name, freeze in TRAININGS.items():
        trainer = setting.converted("frozen" if freeze else "free", freeze=freeze)
        if MEAN not in tests:
            tests |= {MEAN: predicted_by_mean(trainer, data.test), DRAWS: predicted(trainer, data.test)}
        say(f"{name}: from the converted network on")
        curves[name] = _train(trainer)
        tests[name] = predicted(trainer, data.test)
        setting.clock.lap(f"{'frozen' if freeze else 'free'}_training")
    return _outcome(setting, tests, curves, float(scores(point.validation, data.validation)["nll"] or 0.0))


def _train(trainer: BayesianTrainer) -> list[float]:
    """Validation NLL before the training and after each of its epochs, all of as many draws."""
    args = trainer.args
    draws, args.num_eval_samples = args.num_eval_samples, args.num_eval_samples_during_training or args.num_eval_samples
    first = trainer.evaluate()["eval_nll"]
    args.num_eval_samples = draws
    trainer.train()
    return [first, *learning_curve(trainer)]


def _outcome(
    setting: Setting, tests: dict[str, ClassPredictions], curves: dict[str, list[float]], point_nll: float
) -> Outcome:
    reports = {name: scores(predictions, setting.data.test) for name, predictions in tests.items()}
    accuracies = {name: float(report["accuracy"] or 0.0) for name, report in reports.items() if name != TEMPERED}
    lost = {name: 100 * (accuracies[PRETRAINED] - accuracies[name]) for name in (MEAN, DRAWS)}
    rows = {name: {f"epoch {epoch}": nll for epoch, nll in enumerate(curve)} for name, curve in curves.items()}
    text = "\n\n".join([
        format_table(reports, corner="test images", digits=4),
        format_table(rows, corner="validation NLL", digits=4),
        f"points of accuracy lost at the start: {lost[MEAN]:.2f} by the mean network, {lost[DRAWS]:.2f} by the draws",
    ])  # fmt: skip
    results = {"methods": reports, "points_lost_at_start": lost, "validation_nll": curves, "pretrained_nll": point_nll}
    title = f"A pretrained net converted. {setting.description}"
    figure = start_figure(curves, point_nll, accuracies, len(setting.data.test), title=title)
    return Outcome(results, text, figure)
