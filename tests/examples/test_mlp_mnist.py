"""The example of a Bayesian multilayer perceptron: its numbers against each other, its files, removal, arguments."""

import copy
import gzip
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from bayeformers import VariationalPosterior, from_pretrained, kl_divergence, signal_to_noise
from bayeformers.experiments.image_classification import ImageArguments, load_image_data
from bayeformers.nn import variational_tensors
from examples.mlp_mnist import MlpArguments, decibels, main, new_network, parse_arguments, remove_smallest

SMALL = [
    "--use_cpu", "--report_to", "none", "--disable_tqdm", "true", "--num_eval_samples", "4", "--seed", "3",
    "--hidden_sizes", "24", "--num_train_epochs", "4", "--bayesian_epochs", "3", "--moped_epochs", "2",
    "--learning_rate", "5e-3", "--delta", "0.1", "--max_train_samples", "400", "--max_eval_samples", "150",
    "--removed", "0.5", "0.9",
]  # fmt: skip
METHODS = ["deterministic", "deterministic + temperature", "Bayes by Backprop", "MOPED"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("mlp")
    return main([*SMALL, "--output_dir", str(folder)]), folder


def test_scores_of_the_four_methods(run: tuple[dict[str, Any], Path]) -> None:
    results, _ = run
    assert list(results["methods"]) == list(results["validation"]) == METHODS
    assert results["images"] == {"name": "digits", "train": 400, "validation": 150, "test": 150}
    assert results["weights"] == 64 * 24 + 24 + 24 * 10 + 10
    point, tempered = (results["methods"][name] for name in METHODS[:2])
    assert point["accuracy"] == tempered["accuracy"] > 0.5
    assert results["validation"][METHODS[1]]["nll"] <= results["validation"][METHODS[0]]["nll"] + 1e-9
    assert point["epistemic"] == 0 < results["methods"]["MOPED"]["epistemic"]
    assert abs(results["methods"]["MOPED"]["accuracy"] - point["accuracy"]) < 0.1
    assert results["delta"] == 0.1


def test_curves_start_at_the_whole_network_and_count_what_is_gone(run: tuple[dict[str, Any], Path]) -> None:
    results, _ = run
    whole = {"deterministic": "smallest |w|", "Bayes by Backprop": "lowest |μ| / σ", "MOPED": "lowest |μ| / σ"}
    assert list(results["removal"]) == [f"{name}, {order} first" for name, order in whole.items()]
    for (name, curve), method in zip(results["removal"].items(), whole, strict=True):
        assert [point["share"] for point in curve] == [0.0, 0.5, 0.9]
        assert {key: curve[0][key] for key in ("accuracy", "nll", "ece")} == pytest.approx(
            {key: results["methods"][method][key] for key in ("accuracy", "nll", "ece")}, rel=1e-6
        )
        for point in curve:
            first, last = point["layers"].values()
            gone = first * 64 * 24 + last * 24 * 10
            assert gone == pytest.approx(round(point["share"] * (64 * 24 + 24 * 10)), abs=0.01), name


def test_files_and_models(run: tuple[dict[str, Any], Path]) -> None:
    results, folder = run
    written = json.loads((folder / "results.json").read_text())
    assert written["methods"] == results["methods"] and written["removal"] == results["removal"]
    for name in ("uncertainty.png", "pruning.png"):
        assert (folder / name).read_bytes()[:4] == b"\x89PNG" and (folder / name).stat().st_size > 20_000
    data = load_image_data(ImageArguments(max_eval_samples=150), 3, centre=False)
    for name, title in (("scratch", "Bayes by Backprop"), ("moped", "MOPED")):
        model = from_pretrained(folder / name).eval()
        predictive = VariationalPosterior(model).predict({"pixel_values": data.test.pixel_values}, num_samples=4)
        nll = float(-predictive.mean_log_probs.gather(1, data.test.labels[:, None]).mean())
        assert nll == pytest.approx(results["methods"][title]["nll"], rel=1e-4)
        expected = np.quantile(decibels(model), 0.5)
        assert results["decibels"][title]["0.5"] == pytest.approx(expected, abs=1e-3)
    assert model.features.linear1.weight_prior_centre.shape == (24, 64)  # MOPED's prior: the trained weights


def test_the_prior_of_the_training_from_scratch(run: tuple[dict[str, Any], Path]) -> None:
    results, folder = run
    prior = json.loads(results["arguments"]["prior"])
    model = from_pretrained(folder / "scratch").double()
    tensors = list(variational_tensors(model))
    assert (
        prior["type"] == "normal" and prior["centre"] == 0 and {t.module.prior.std for t in tensors} == {prior["std"]}
    )
    total = sum(
        (torch.log(prior["std"] / t.scale()) + (t.scale() ** 2 + t.loc**2) / (2 * prior["std"] ** 2) - 0.5).sum()
        for t in tensors
    )
    torch.testing.assert_close(kl_divergence(model), total)
    assert results["kl_per_image"]["Bayes by Backprop"] == pytest.approx(total.item() / 400, rel=1e-4)


def test_mnist_files(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(100) % 3
    images = (rng.random((100, 6, 6)) * 60 + 60 * labels[:, None, None]).astype(np.uint8)
    for kind, axes, array in (("images", 3, images), ("labels", 1, labels.astype(np.uint8))):
        sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
        content = gzip.compress(bytes([0, 0, 8, axes]) + sizes + array.tobytes())
        (tmp_path / f"t10k-{kind}-idx{axes}-ubyte.gz").write_bytes(content)
    argv = [*SMALL, "--data_dir", str(tmp_path), "--output_dir", str(tmp_path / "out"), "--per_device_train_batch_size"]
    results = main([*argv, "8", "--prior", '{"type": "scale_mixture", "std1": 0.3, "std2": 0.01}'])
    assert results["images"] == {"name": tmp_path.name, "train": 70, "validation": 10, "test": 20}
    assert results["weights"] == 36 * 24 + 24 + 24 * 3 + 3
    assert all(math.isfinite(row["nll"]) for row in results["methods"].values())


# --- Removal ---------------------------------------------------------------------------------------------------------
def test_removal_by_size() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    before = copy.deepcopy(model)
    sizes = sorted(abs(w) for layer in (model[0], model[2]) for w in layer.weight.flatten().tolist())
    remove_smallest(model, 0.5)
    for layer, old in ((model[0], before[0]), (model[2], before[2])):
        for w, was in zip(layer.weight.flatten().tolist(), old.weight.flatten().tolist(), strict=True):
            assert w == (0.0 if abs(was) in sizes[: 32 // 2] else was)
        assert torch.equal(layer.bias, old.bias)


def test_decibels_are_of_matrices_and_of_powers(run: tuple[dict[str, Any], Path]) -> None:
    model = from_pretrained(run[1] / "scratch")
    ratios = signal_to_noise(model)
    expected = [20 * math.log10(r) for name in ratios if "bias" not in name for r in ratios[name].flatten().tolist()]
    np.testing.assert_allclose(decibels(model), expected, rtol=1e-5)


# --- Arguments -------------------------------------------------------------------------------------------------------
def test_the_network_fits_the_images_and_knows_their_classes() -> None:
    data = load_image_data(ImageArguments(image_size=10), 0)
    config = new_network(MlpArguments(hidden_sizes=[7, 5]), data).config
    assert (config.image_size, config.hidden_sizes, config.num_labels, config.id2label[3]) == (10, [7, 5], 10, "3")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--hidden_sizes", "0"], r"`hidden_sizes` must be one or more widths >= 1, got \[0\]"),
        (["--initial_scale", "0"], "`initial_scale` must be a finite number > 0, got 0.0"),
        (["--removed", "0.5", "1"], r"`removed` must be shares in \[0, 1\), got \[0.5, 1.0\]"),
        (["--delta", "-1"], "`delta` must be finite and > 0, got -1.0"),
        (["--prior", "flat"], "unknown type 'flat'"),
        (["--prior", "{std}"], "is not JSON"),
        (["--moped_epochs", "0"], "`moped_epochs` must be at least 1, got 0"),
        (["--moped_kl_weight", "-1"], "`moped_kl_weight` must be a finite number >= 0, got -1.0"),
    ],
)
def test_wrong_arguments(flags: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        parse_arguments([*flags, "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_defaults_depend_on_the_images() -> None:
    own, files = (parse_arguments(argv)[2].per_device_train_batch_size for argv in ([], ["--data_dir", "x"]))
    assert own < files
