"""The regression example: its sampler, its closed forms, its linearised draws and its data exactly; a small run."""

import csv
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bayeformers.experiments import run_command
from bayeformers.reports.bands import Bands
from examples.data.curves import DATA, GAP, OUTSIDE, SUPPORT, generate, noise_of_neighbours, read_points, true_noise_std
from examples.data.true_posterior import TanhMLP
from examples.regression import HMC, HMC_HEAD, CurveArguments, Methods, main, parse_arguments

SMALL = [
    "--map_steps", "200", "--variational_steps", "20", "--hmc_samples", "8", "--hmc_warmup", "4", "--hmc_steps", "5",
    "--hmc_chains", "3", "--num_eval_samples", "8", "--hidden_sizes", "8", "6", "--num_points", "40", "--use_cpu",
    "--disable_tqdm", "true",
]  # fmt: skip


# --- Closed forms ----------------------------------------------------------------------------------------------------
def test_last_layer_laplace_is_the_exact_posterior() -> None:
    """Mean, variance and evidence of the last layer's Laplace posterior are those of the closed form, to rounding."""
    x = torch.linspace(-2, 2, 30, dtype=torch.float64)
    batch = {"x": x, "labels": (2 * x).sin() + 0.2 * torch.randn(30, dtype=torch.float64)}
    network = TanhMLP((5, 4)).double().eval()
    fitted = Methods(batch, *parse_arguments(SMALL)).last_layer(network)
    difference = fitted.facts["difference_from_closed_form"]
    assert set(difference) == {"mean", "epistemic_std", "log_marginal_likelihood"}
    assert all(abs(value) < 1e-9 for value in difference.values()), difference


# --- Data and scores -------------------------------------------------------------------------------------------------
def test_generated_points_lie_where_their_region_says() -> None:
    data = generate(0)
    (a, b), (c, d) = SUPPORT
    inside = {
        DATA: lambda x: ((a <= x) & (x <= b)) | ((c <= x) & (x <= d)),
        GAP: lambda x: (b <= x) & (x <= c),
        OUTSIDE: lambda x: (x <= a) | (x >= d),
    }
    for region, holds in inside.items():
        of_region = data.test.x[data.test.region == region]
        assert len(of_region) == 1000 and holds(of_region).all()
    assert inside[DATA](data.train.x).all() and inside[DATA](data.validation.x).all()
    assert (len(data.train.x), len(data.validation.x)) == (160, 80)
    np.testing.assert_array_equal(data.train.y, generate(0).train.y)
    assert not np.array_equal(data.train.y, generate(1).train.y)


def test_generated_noise_is_the_truth() -> None:
    data = generate(0)
    truth = data.truth(data.test.x)
    assert truth is not None
    z = (data.test.y - truth[0]) / truth[1]
    assert abs(z.mean()) < 4 / math.sqrt(len(z)) and abs(z.var() - 1) < 4 * math.sqrt(2 / len(z))
    assert true_noise_std(np.array([-3.0, 3.0])) == pytest.approx([0.05, 0.35])


def test_noise_of_neighbours_finds_the_noise_of_a_slow_curve() -> None:
    rng, size = np.random.default_rng(0), 4000
    x = rng.random(size)
    estimate = noise_of_neighbours(x, np.sin(x) + 0.3 * rng.standard_normal(size))
    # Rice's variance estimate has the relative variance 3 / n
    assert estimate**2 / 0.09 == pytest.approx(1, abs=4 * math.sqrt(3 / size))


def test_scores_of_the_truth() -> None:
    data = generate(0)
    moments = data.truth(data.test.x)
    assert moments is not None
    truth = Bands.of_truth(*moments, data.test.y)
    report = truth.report(data.test.y, np.full(3000, "all"), noise_std=moments[1])["all"]
    assert report["noise_error"] == 0 == report["epistemic_std"]
    assert report["coverage"] == pytest.approx(0.95, abs=4 * math.sqrt(0.95 * 0.05 / 3000))
    expected = torch.distributions.Normal(torch.tensor(truth.mean), torch.tensor(truth.aleatoric))
    assert report["nll"] == pytest.approx(-expected.log_prob(torch.tensor(data.test.y)).mean().item())


def write(path: Path, *lines: str) -> str:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return str(path)


def test_a_file_is_split_and_keeps_its_points(tmp_path: Path) -> None:
    rows = [f"{i},{i % 7},note" for i in range(50)]
    data = read_points(write(tmp_path / "points.csv", "x,y,comment", *rows), seed=0)
    assert [len(part.x) for part in (data.train, data.validation, data.test)] == [30, 10, 10]
    every = np.concatenate([part.x for part in (data.train, data.validation, data.test)])
    np.testing.assert_array_equal(np.sort(every), np.arange(50))
    assert all(y == x % 7 for part in (data.train, data.test) for x, y in zip(part.x, part.y, strict=True))
    assert data.truth(data.test.x) is None and data.limits[0] < 0 and data.limits[1] > 49


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="`data_file` .* does not exist"):
        read_points(str(tmp_path / "none.csv"), 0)
    good = [f"{i},{i % 3}" for i in range(30)]
    for lines, message in [
        (["a,b", *good], "must have a header with the columns x,y, got \\['a', 'b'\\]"),
        (["x,y", *good[:10]], "at least 20 points, got 10"),
        (["x,y", *good, "3,nan"], "line 32: x and y must be finite"),
        (["x,y", *good, "3"], "line 32: x and y must be finite"),
        (["x,y", *(f"1,{i}" for i in range(30))], "all x, or all y, are equal"),
    ]:
        with pytest.raises(ValueError, match=message):
            read_points(write(tmp_path / "points.csv", *lines), 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_points": 5}, "`num_points` must be at least 20, got 5"),
        ({"hidden_sizes": []}, "`hidden_sizes` must be one or more widths"),
        ({"prior_std": 0.0}, "`prior_std` must be > 0, got 0"),
        ({"hmc_samples": 2}, "`hmc_samples` must be 0 or at least 4, got 2"),
        ({"hmc_warmup": -1}, "`hmc_warmup` must not be negative"),
        ({"map_steps": 0}, "`map_steps` must be at least 1"),
    ],
)
def test_wrong_arguments(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CurveArguments(**changes)


# --- The run ---------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("run")
    return main([*SMALL, "--output_dir", str(folder)]), folder


METHODS = [
    "deterministic", HMC, "variational", "Laplace, linearised", "Laplace, local draws", "last layer, exact",
    "deterministic, noise head", HMC_HEAD, "variational, noise head",
]  # fmt: skip


def test_results_hold_every_method_and_region(run: tuple[dict[str, Any], Path]) -> None:
    results, folder = run
    assert list(results["methods"]) == [*METHODS, "the truth"]
    written = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    for name, report in results["methods"].items():
        assert list(report["regions"]) == [DATA, GAP, OUTSIDE]
        for region, numbers in report["regions"].items():
            assert math.isfinite(numbers["nll"]) and 0 <= numbers["coverage"] <= 1
            assert written["methods"][name]["regions"][region] == pytest.approx(numbers)
            no_weights = name.startswith("deterministic") or name == "the truth"
            assert (numbers["epistemic_std"] == 0) == no_weights
    for name in (HMC, HMC_HEAD):
        for numbers in results["methods"][name]["regions"].values():
            assert numbers["epistemic_ratio"] == 1 and numbers["mean_gap"] == 0
        assert results["methods"][name]["r_hat"] > 0 and 0 <= results["methods"][name]["acceptance"] <= 1


def test_one_noise_is_constant_and_the_two_laplace_share_a_posterior(run: tuple[dict[str, Any], Path]) -> None:
    methods = run[0]["methods"]
    linear, sampled = methods["Laplace, linearised"], methods["Laplace, local draws"]
    for fact in ("prior_precision", "noise_std", "log_marginal_likelihood"):
        assert linear[fact] == sampled[fact]
    for report in (linear, methods["variational"], methods[HMC]):
        spread = [numbers["aleatoric_std"] for numbers in report["regions"].values()]
        assert spread == pytest.approx([spread[0]] * 3, rel=1e-6)
    assert methods["variational"]["noise_std"] == methods[HMC]["noise_std"]
    difference = methods["last layer, exact"]["difference_from_closed_form"]
    assert abs(difference["mean"]) < 1e-3 and abs(difference["epistemic_std"]) < 1e-3  # float32


def test_predictions_and_figure_are_written(run: tuple[dict[str, Any], Path]) -> None:
    _, folder = run
    rows = list(csv.DictReader((folder / "predictions.csv").open(encoding="utf-8")))
    assert len(rows) == 241 and len(rows[0]) == 1 + 3 * len(METHODS)
    assert all(float(row["variational:epistemic_std"]) > 0 for row in rows)
    assert (folder / "bands.png").read_bytes().startswith(b"\x89PNG")


def test_a_file_without_a_reference(tmp_path: Path) -> None:
    rows = [f"{i / 10},{math.sin(i / 5) + 0.1 * (i % 3)}" for i in range(60)]
    path = write(tmp_path / "points.csv", "x,y", *rows)
    results = main([*SMALL, "--hmc_samples", "0", "--data_file", path, "--output_dir", str(tmp_path / "out")])
    assert list(results["methods"]) == [name for name in METHODS if not name.startswith("HMC")]
    for report in results["methods"].values():
        assert list(report["regions"]) == [DATA]
        assert not {"noise_error", "epistemic_ratio"} & set(report["regions"][DATA])
    assert (tmp_path / "out" / "bands.png").is_file()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x,y\n", "must hold at least 20 points, got 0"),
        ("", "must have a header with the columns x,y, got None"),
        ("x,y\n" + "1,1\n" * 30, "all x, or all y, are equal"),
        ("x,y\n0,nan\n", "line 2: x and y must be finite numbers"),
    ],
)
def test_a_wrong_file_is_told_in_one_line(
    text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "points.csv").write_text(text)
    monkeypatch.setattr(sys, "argv", ["regression", "--use_cpu", "--data_file", str(tmp_path / "points.csv")])
    with pytest.raises(SystemExit) as stopped:
        run_command(main)
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and message in line
