"""The figures can be drawn without a display, from any number of classes, and hold what they say."""

from pathlib import Path

import numpy as np
import pytest

from bayeformers.plots import comparison_figure, save_figure, uncertainty_figure
from bayeformers.report import ClassPredictions

pytest.importorskip("matplotlib")


def predictions(size: int, num_classes: int, seed: int = 0, *, draws: bool = True) -> ClassPredictions:
    rng = np.random.default_rng(seed)
    probs = rng.dirichlet(np.ones(num_classes), size)
    return ClassPredictions(probs, 0.1 * rng.random(size) if draws else None)


@pytest.mark.parametrize("num_classes", [2, 3])
def test_uncertainty_figure_is_written(tmp_path: Path, num_classes: int) -> None:
    methods = {
        "deterministic": predictions(60, num_classes, draws=False),
        "Bayesian": predictions(60, num_classes, seed=1),
    }
    labels = np.random.default_rng(2).integers(num_classes, size=60)
    groups = {"clean": predictions(40, num_classes), "shifted": predictions(20, num_classes, seed=3)}
    figure = uncertainty_figure(methods, labels, groups, title="title", aleatoric_reference=(0.56, "truth"))
    save_figure(figure, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert len(figure.axes) == 4
    for axes in figure.axes:
        assert axes.get_xlabel() and axes.get_ylabel() and axes.get_title(loc="left") and axes.get_legend()


def test_each_posterior_has_its_row_and_the_methods_their_own_styles() -> None:
    methods = {str(number): predictions(60, 2, seed=number) for number in range(6)}
    posteriors = {name: {"clean": predictions(40, 2), "shifted": methods[name]} for name in ("0", "3", "5")}
    figure = comparison_figure(methods, np.arange(60) % 2, posteriors, title="title")
    assert len(figure.axes) == 2 * (1 + len(posteriors))
    curves = figure.axes[1].get_lines()
    assert len({(line.get_color(), line.get_linestyle()) for line in curves}) == len(methods)
    epistemic = figure.axes[3::2]
    assert len({axes.get_xlim() for axes in epistemic}) == 1  # comparable
    shown = {text.get_text().split(":")[0] for axes in epistemic for text in axes.texts}
    assert shown == set(posteriors)


def test_constant_predictions_can_be_drawn(tmp_path: Path) -> None:
    same = ClassPredictions(np.tile([0.5, 0.5], (10, 1)), np.zeros(10))
    save_figure(
        uncertainty_figure({"a": same}, np.zeros(10, dtype=int), {"g": same}, title=""), tmp_path / "figure.png"
    )
    assert (tmp_path / "figure.png").stat().st_size > 0
