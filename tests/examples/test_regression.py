"""The regression example: its sampler, its closed forms, its linearised draws and its data exactly; a small run."""

import copy
import csv
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from examples.commands import run as run_command
from examples.linearized import linearized_draws
from torch import Tensor
from torch.distributions import MultivariateNormal, Normal
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from bayeformers import laplace
from examples.curves import bayesian_linear, fitting
from examples.curves.arguments import CurveArguments, parse_arguments
from examples.curves.data import DATA, GAP, OUTSIDE, SUPPORT, generate, noise_of_neighbours, read_points, true_noise_std
from examples.curves.evaluation import Bands, region_report, truth_bands
from examples.curves.hmc import hmc, leapfrog, split_r_hat
from examples.curves.network import CurveConfig, CurveNetwork, stacked_forward
from examples.regression import HMC, HMC_HEAD, main

SMALL = [
    "--map_steps", "200", "--variational_steps", "20", "--hmc_samples", "8", "--hmc_warmup", "4", "--hmc_steps", "5",
    "--hmc_chains", "3", "--num_eval_samples", "8", "--hidden_sizes", "8", "6", "--num_points", "40", "--use_cpu",
    "--disable_tqdm", "true",
]  # fmt: skip


def network_of(num_labels: int = 1) -> CurveNetwork:
    return CurveNetwork(CurveConfig(hidden_sizes=(5, 4), num_labels=num_labels)).double().eval()


def points_of(size: int = 30) -> fitting.TrainingPoints:
    x = torch.linspace(-2, 2, size, dtype=torch.float64)
    return fitting.TrainingPoints(x, (2 * x).sin() + 0.2 * torch.randn(size, dtype=torch.float64))


# --- The sampler -----------------------------------------------------------------------------------------------------
def test_hmc_draws_a_known_gaussian() -> None:
    mean = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    root = torch.tensor([[1.0, 0, 0], [0.8, 0.5, 0], [-0.3, 0.2, 2.0]], dtype=torch.float64)
    target = MultivariateNormal(mean, scale_tril=root)
    chains = hmc(
        target.log_prob, torch.zeros(64, 3, dtype=torch.float64), num_samples=80, num_warmup=60, num_steps=8,
        step_size=0.3, generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert chains.draws.shape == (80, 64, 3) and 0.6 < chains.acceptance < 0.95
    for moments, expected in (
        (chains.draws, mean),
        ((chains.draws - mean)[..., None] * (chains.draws - mean)[..., None, :], root @ root.mT),
    ):
        of_chains = moments.mean(0)  # independent between chains, whatever their autocorrelation
        error = of_chains.std(0) / math.sqrt(len(of_chains))
        assert ((of_chains.mean(0) - expected).abs() < 4.5 * error).all()


def test_leapfrog_leads_back_with_the_momentum_negated() -> None:
    def log_density(w: Tensor) -> Tensor:
        return -(w**4).sum(1) - w.prod(1)

    start, momentum = torch.randn(2, 5, 3, dtype=torch.float64).unbind()
    slope = -4 * start**3 - start.prod(1, keepdim=True) / start
    position, value, end_slope, end = leapfrog(log_density, start, slope, momentum, 0.05, 20)
    torch.testing.assert_close(value, log_density(position))
    torch.testing.assert_close(end_slope, -4 * position**3 - position.prod(1, keepdim=True) / position)
    assert (position - start).abs().max() > 0.1
    back, _, _, reverse = leapfrog(log_density, position, end_slope, -end, 0.05, 20)
    torch.testing.assert_close(back, start)
    torch.testing.assert_close(reverse, -momentum)

    errors = []  # of the energy, after the same time: of second order in the step
    for step, steps in ((0.01, 20), (0.005, 40)):
        moved, _, _, fast = leapfrog(log_density, start, slope, momentum, step, steps)
        change = 0.5 * (fast.square() - momentum.square()).sum(1) - log_density(moved) + log_density(start)
        errors.append(change.abs().sum().item())
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.1)


def test_r_hat_is_one_for_equal_chains_and_large_for_two_modes() -> None:
    mixed = torch.randn(4000, 4, generator=torch.Generator().manual_seed(0))
    assert split_r_hat(mixed).item() == pytest.approx(1.0, abs=0.01)
    apart = mixed + torch.tensor([0.0, 0.0, 10.0, 10.0])
    # halves: variance 1 within, of their eight means (0, 0, 0, 0, 10, 10, 10, 10) 200 / 7 between
    assert split_r_hat(apart).item() == pytest.approx(math.sqrt(1 + 200 / 7), rel=0.01)


def test_many_networks_at_once_are_each_of_them() -> None:
    network, x = network_of(2), torch.randn(7, dtype=torch.float64)
    weights = torch.randn(3, len(parameters_to_vector(network.parameters())), dtype=torch.float64)
    stacked = stacked_forward(network, weights, x)
    for vector, logits in zip(weights, stacked, strict=True):
        vector_to_parameters(vector, network.parameters())
        torch.testing.assert_close(network(x).logits, logits)


@pytest.mark.parametrize("noise", [0.3, "head"])
def test_log_posterior_is_likelihood_and_prior(noise: Any) -> None:
    network, points = network_of(2 if noise == "head" else 1), points_of(9)
    weights = torch.randn(2, len(parameters_to_vector(network.parameters())), dtype=torch.float64)
    expected = []
    for vector in weights:
        vector_to_parameters(vector, network.parameters())
        logits = network(points.x).logits
        scale = (0.5 * logits[:, 1]).exp() if noise == "head" else torch.tensor(noise)
        likelihood = Normal(logits[:, 0], scale).log_prob(points.y).sum()
        expected.append(likelihood + Normal(0.0, 0.7).log_prob(vector).sum())
    found = fitting.log_posterior(network, weights, points, noise, 0.7)
    torch.testing.assert_close(found[0] - found[1], expected[0] - expected[1], rtol=1e-5, atol=1e-6)


# --- Closed forms ----------------------------------------------------------------------------------------------------
def features_and_targets() -> tuple[Tensor, Tensor]:
    features = bayesian_linear.with_bias(torch.randn(25, 4, dtype=torch.float64))
    return features, features @ torch.randn(5, dtype=torch.float64) + 0.3 * torch.randn(25, dtype=torch.float64)


def test_linear_posterior_is_the_gaussian_process_of_its_features() -> None:
    """The same model in function space: k(x, x') = x^T x' / tau, conditioned on N points."""
    (features, targets), other = features_and_targets(), torch.randn(6, 5, dtype=torch.float64)
    tau, noise_std = 0.7, 0.4
    kernel = features @ features.mT / tau + noise_std**2 * torch.eye(25, dtype=torch.float64)
    cross = other @ features.mT / tau
    mean = cross @ torch.linalg.solve(kernel, targets)
    covariance = other @ other.mT / tau - cross @ torch.linalg.solve(kernel, cross.mT)
    found = bayesian_linear.posterior(features, targets, tau, noise_std).predict(other)
    torch.testing.assert_close(found[0], mean)
    torch.testing.assert_close(found[1], covariance.diagonal())
    evidence = MultivariateNormal(torch.zeros(25, dtype=torch.float64), kernel).log_prob(targets)
    assert bayesian_linear.log_evidence(features, targets, tau, noise_std) == pytest.approx(evidence.item())


def test_tuned_prior_and_noise_maximise_the_evidence() -> None:
    features, targets = features_and_targets()
    found = bayesian_linear.tuned_posterior(features, targets)
    best = bayesian_linear.log_evidence(features, targets, found.prior_precision, found.noise_std)
    for factor in (0.99, 1.01):
        worse = (found.prior_precision * factor, found.noise_std), (found.prior_precision, found.noise_std * factor)
        assert all(bayesian_linear.log_evidence(features, targets, *pair) < best for pair in worse)


def test_last_layer_laplace_is_the_exact_posterior() -> None:
    """Mean, variance and evidence of the last layer's Laplace posterior are those of the closed form, to rounding."""
    fitted = fitting.last_layer(network_of(), points_of(), parse_arguments(SMALL))
    difference = fitted.facts["difference_from_closed_form"]
    assert set(difference) == {"mean", "epistemic_std", "log_marginal_likelihood"}
    assert all(abs(value) < 1e-9 for value in difference.values()), difference


# --- Linearised draws ------------------------------------------------------------------------------------------------
def test_linearised_draws_are_the_tangent_at_the_trained_weights() -> None:
    """Against a central difference of the network along the same draw."""
    network, points = network_of(), points_of()
    posterior = fitting.laplace_posterior(network, points, parse_arguments(SMALL))
    mean = parameters_to_vector(network.parameters()).detach().clone()
    found, step = linearized_draws(posterior, {"x": points.x}, num_samples=2, seed=3), 1e-4
    with torch.no_grad():
        for index in range(2):
            with posterior.draw(index, seed=3):
                change = parameters_to_vector(network.parameters()) - mean
            ends, twin = [], copy.deepcopy(network)
            for sign in (1, -1):
                vector_to_parameters(mean + sign * step * change, twin.parameters())
                ends.append(twin(points.x).logits)
            expected = network(points.x).logits + (ends[0] - ends[1]) / (2 * step)
            torch.testing.assert_close(found[index], expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(parameters_to_vector(network.parameters()), mean, rtol=0, atol=0)


def test_linearised_draws_have_the_linearised_variance() -> None:
    network, points, size = network_of(), points_of(8), 600
    posterior = fitting.laplace_posterior(network, points, parse_arguments(SMALL))
    draws = linearized_draws(posterior, {"x": points.x}, num_samples=size)[..., 0]
    predictive = posterior.predict({"x": points.x})
    ratio = draws.var(0) / predictive.epistemic_variance
    assert (ratio - 1).abs().max() < 4.5 * math.sqrt(2 / size)  # of a chi-square variable
    error = (predictive.epistemic_variance / size).sqrt()
    assert ((draws.mean(0) - predictive.mean).abs() < 4.5 * error).all()


def test_linearised_draws_of_a_last_layer_are_the_network_itself() -> None:
    network, points = network_of(), points_of()
    posterior = laplace.fit(
        network, [points.batch], likelihood="regression", subset="last_layer",
        prior_precision=1.0, progress=False,
    )  # fmt: skip
    draws = linearized_draws(posterior, {"x": points.x}, num_samples=3, seed=1)[..., 0]
    sampled = posterior.predict({"x": points.x}, method="sample", num_samples=3, seed=1).values
    torch.testing.assert_close(draws, sampled)


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
    assert data.truth is not None
    z = (data.test.y - data.truth.mean(data.test.x)) / data.truth.noise_std(data.test.x)
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
    truth = truth_bands(data)
    assert truth is not None and truth.log_prob is not None
    report = region_report(truth, data.test, data.truth, None)
    assert report["noise_error"] == 0 == report["epistemic_std"]
    assert report["coverage"] == pytest.approx(0.95, abs=4 * math.sqrt(0.95 * 0.05 / 3000))
    expected = torch.distributions.Normal(torch.tensor(truth.mean), torch.tensor(truth.aleatoric))
    assert report["nll"] == pytest.approx(-expected.log_prob(torch.tensor(data.test.y)).mean().item())


def test_coverage_counts_the_band_of_both_uncertainties() -> None:
    found = Bands(np.zeros(3), np.full(3, 3.0), np.full(3, 4.0))  # total 5: the band is -+ 9.8
    np.testing.assert_array_equal(found.covers(np.array([9.7, -9.7, 9.9])), [1, 1, 0])


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
    assert data.truth is None and data.limits[0] < 0 and data.limits[1] > 49


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
