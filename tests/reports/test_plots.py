"""The figures can be drawn without a display, from any number of classes, and hold what they say."""

from pathlib import Path

import numpy as np
import pytest

from bayeformers.reports import ClassPredictions, comparison_figure, save_figure, uncertainty_figure, wilson_interval

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


@pytest.mark.parametrize("size", [40, 600])
def test_reliability_has_intervals_and_no_legend_over_data(size: int) -> None:
    """Bars by the bins' own counts; few bins of few examples; each legend under its panel."""
    methods = {"deterministic": predictions(size, 2, draws=False), "deterministic + temperature": predictions(size, 2)}
    figure = comparison_figure(methods, np.arange(size) % 2, {"Bayesian": {"all": methods["deterministic"]}}, title="")
    reliability = figure.axes[0]
    bars = reliability.collections
    assert len(bars) == len(methods)
    num_bins = 3 if size == 40 else 10
    for collection, line in zip(bars, reliability.get_lines()[1:], strict=True):
        assert len(collection.get_segments()) == num_bins == len(line.get_xdata())
        for segment, x, y in zip(collection.get_segments(), *line.get_data(), strict=True):
            assert segment[0, 0] == x and segment[0, 1] <= y <= segment[1, 1] and segment[1, 1] > segment[0, 1]
    figure.canvas.draw()
    for axes in figure.axes:
        legend = axes.get_legend().get_window_extent()
        assert legend.y1 <= axes.get_window_extent().y0
        assert legend.x1 <= figure.bbox.width


def test_wilson_interval_is_the_roots_of_the_score_test() -> None:
    """Both ends p solve (share - p)^2 = z^2 p (1 - p) / n."""
    share, counts = np.array([0.0, 0.3, 1.0]), np.array([4, 10, 25])
    for end in wilson_interval(share, counts):
        np.testing.assert_allclose((share - end) ** 2, 1.96**2 * end * (1 - end) / counts, atol=1e-12)


def test_a_posterior_that_means_nothing_says_so() -> None:
    groups = {"clean": predictions(40, 2)}
    caveats = {"Laplace": ["tau lies at the smallest end of the range that was searched"]}
    figure = comparison_figure(
        {"Laplace": groups["clean"]}, np.arange(40) % 2, {"Laplace": groups, "other": groups}, title="", caveats=caveats
    )
    said = [axes.texts[0].get_text().replace("\n", " ") for axes in figure.axes[2:]]
    assert "no meaning here" in said[0] and caveats["Laplace"][0] in said[1]
    assert not any("no meaning" in text or "smallest end" in text for text in said[2:])
