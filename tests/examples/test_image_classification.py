"""The three tasks end to end at a reduced size, rotation against exact turns, and what the example refuses."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("datasets")
pytest.importorskip("matplotlib")

import bayeformers
from bayeformers.reports import ClassPredictions
from examples.image_classification import main
from examples.images.classifier_arguments import parse_arguments
from examples.images.data import ImageData, load_images
from examples.images.models import MODELS, load_model
from examples.images.rotation import agreement, rotate, rotation_curve
from examples.images.turned import Turned, angles

SMALL = [
    "--max_train_samples", "96", "--max_eval_samples", "48", "--num_train_epochs", "6", "--bayesian_epochs", "2",
    "--num_eval_samples", "3", "--delta", "0.1", "--prior_precision", "marglik", "--use_cpu", "--disable_tqdm", "true",
    "--angle_step", "90",
]  # fmt: skip
LENET_WEIGHTS = 61_706
LENET_LAYERS = [(26, 6), (151, 16), (401, 120), (121, 84), (85, 10)]  # inputs with the bias's 1, outputs

Run = tuple[dict[str, Any], Path]


@pytest.fixture(scope="module")
def acc(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("acc")
    return main([*SMALL, "--output_dir", str(folder)]), folder


@pytest.fixture(scope="module")
def trained(acc: Run) -> list[str]:
    """The arguments that take the deterministic network of `acc` in place of a new one."""
    return [*SMALL, "--model_name_or_path", str(acc[1] / "deterministic")]


def is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG")


# --- acc -------------------------------------------------------------------------------------------------------------
def test_every_method_has_consistent_scores(acc: Run) -> None:
    results, folder = acc
    methods = results["methods"]
    point, tempered = "deterministic", "deterministic + temperature"
    assert list(methods) == [point, tempered, "deterministic, trained on", "Bayesian (ELBO)", "Laplace"]
    for report in methods.values():
        assert report["entropy"] == pytest.approx(report["aleatoric"] + report["epistemic"], abs=1e-6)
    assert methods[tempered]["accuracy"] == methods[point]["accuracy"]
    assert results["validation"][tempered]["nll"] <= results["validation"][point]["nll"] + 1e-9
    assert methods["Bayesian (ELBO)"]["epistemic"] > 0 < methods["Laplace"]["epistemic"]
    assert json.loads((folder / "acc.json").read_text())["methods"].keys() == methods.keys()
    assert is_png(folder / "acc.png")


def test_sizes_are_those_of_the_tensors_and_files(acc: Run) -> None:
    results, folder = acc
    costs = results["costs"]
    counted = {name: (cost["weights"], cost["scales"], cost["other"]) for name, cost in costs.items()}
    # Kronecker factors' eigenvectors and eigenvalues, of which each weight's is a product
    curvature = sum(fan_in**2 + fan_out**2 + fan_in + fan_out for fan_in, fan_out in LENET_LAYERS)
    assert counted["deterministic"] == (LENET_WEIGHTS, 0, 0)
    assert counted["Bayesian (ELBO)"] == (LENET_WEIGHTS, LENET_WEIGHTS, LENET_WEIGHTS)  # the prior's centres
    assert counted["Laplace"] == (LENET_WEIGHTS, 0, curvature)
    for name, cost in costs.items():
        numbers = sum(counted[name])
        assert 4 * numbers < cost["bytes"] < 4 * numbers + 20_000  # float32, and the headers
    assert costs["deterministic"]["bytes"] == (folder / "deterministic" / "model.safetensors").stat().st_size


def test_saved_posteriors_predict_the_same(acc: Run, tmp_path: Path) -> None:
    results, folder = acc
    test = load_images(*data_arguments(SMALL)).test
    _, _, args = parse_arguments([*SMALL, "--output_dir", str(tmp_path)])
    for name, title in (("variational", "Bayesian (ELBO)"), ("laplace", "Laplace")):
        trainer = bayeformers.BayesianTrainer(bayeformers.from_pretrained(folder / name), args, eval_dataset=test)
        metrics = trainer.predict(test).metrics
        assert metrics["test_nll"] == pytest.approx(results["methods"][title]["nll"], rel=1e-6)


def data_arguments(argv: list[str]) -> tuple[Any, int, int]:
    model_args, data_args, args = parse_arguments(argv)
    return data_args, args.seed, MODELS[model_args.model].image_size


# --- init ------------------------------------------------------------------------------------------------------------
def test_the_converted_network_starts_where_training_ended(acc: Run, trained: list[str], tmp_path: Path) -> None:
    results = main([*trained, "--task", "init", "--output_dir", str(tmp_path)])
    methods = results["methods"]
    assert methods["pretrained"] == pytest.approx(acc[0]["methods"]["deterministic"])
    mean = dict(methods["converted, mean network"])
    assert mean == pytest.approx(methods["pretrained"], abs=1e-6)  # the same weights in the same network
    lost = results["points_lost_at_start"]
    assert lost["converted, mean network"] == 0
    drawn = methods["converted, averaged draws"]
    expected = 100 * (methods["pretrained"]["accuracy"] - drawn["accuracy"])
    assert lost["converted, averaged draws"] == pytest.approx(expected)
    assert drawn["epistemic"] > 0
    for curve in results["validation_nll"].values():
        assert len(curve) == 1 + 2 and all(map(math.isfinite, curve))
    frozen, free = results["validation_nll"].values()
    assert frozen[0] == free[0] and frozen[1] != free[1]
    assert is_png(tmp_path / "init.png")


def test_frozen_means_stay(trained: list[str], tmp_path: Path) -> None:
    main([*trained, "--freeze", "--method", "variational", "--output_dir", str(tmp_path)])
    before = bayeformers.models.LeNetForImageClassification.from_pretrained(tmp_path / "deterministic").state_dict()
    after = bayeformers.from_pretrained(tmp_path / "variational").state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


# --- uncert ----------------------------------------------------------------------------------------------------------
def test_curves_of_rotated_images(acc: Run, trained: list[str], tmp_path: Path) -> None:
    results = main([*trained, "--task", "uncert", "--output_dir", str(tmp_path)])
    assert results["degrees"] == [0, 90, 180]
    assert list(results["methods"]) == ["deterministic", "Bayesian (ELBO)", "Laplace"]
    for name, curve in results["methods"].items():
        unturned = acc[0]["methods"][name]
        assert 1 - curve["error"][0] == pytest.approx(unturned["accuracy"])
        assert curve["entropy"][0] == pytest.approx(unturned["entropy"], abs=1e-5)
        assert curve["entropy"] == pytest.approx(curve["epistemic"] + curve["aleatoric"], abs=1e-6)
        assert curve["error"][1] > curve["error"][0]  # digits on their side
        assert list(curve["agreement"]) == (
            ["entropy"] if name == "deterministic" else ["entropy", "epistemic", "aleatoric"]
        )
    assert is_png(tmp_path / "uncert.png")


@pytest.mark.parametrize("quarter", range(-1, 5))
def test_quarter_turns_are_exact(quarter: int) -> None:
    images = torch.rand(2, 3, 7, 7, dtype=torch.float64)
    torch.testing.assert_close(rotate(images, 90 * quarter), torch.rot90(images, quarter, (2, 3)))


@pytest.mark.parametrize("shape", [(6, 6), (5, 8)])
def test_rotation_matches_bilinear_interpolation_pixel_by_pixel(shape: tuple[int, int]) -> None:
    image = torch.rand(shape, dtype=torch.float64)
    turned = rotate(image[None, None], 25)[0, 0]
    torch.testing.assert_close(turned, turned_by_hand(image, math.radians(25)))


def turned_by_hand(image: Tensor, angle: float) -> Tensor:
    """Each pixel's value is read where a counter-clockwise turn about the centre took it from; y points down."""
    height, width = image.shape
    out = torch.zeros_like(image)
    for row in range(height):
        for column in range(width):
            x, y = column - (width - 1) / 2, row - (height - 1) / 2
            from_x = x * math.cos(angle) - y * math.sin(angle) + (width - 1) / 2
            from_y = x * math.sin(angle) + y * math.cos(angle) + (height - 1) / 2
            for j in (math.floor(from_x), math.floor(from_x) + 1):
                for i in (math.floor(from_y), math.floor(from_y) + 1):
                    if 0 <= i < height and 0 <= j < width:
                        out[row, column] += (1 - abs(from_x - j)) * (1 - abs(from_y - i)) * image[i, j]
    return out


def test_what_is_turned_in_is_black() -> None:
    split = load_images(*data_arguments(SMALL)).test
    turned = Turned.by(split, 45)
    black = split.preprocessing.normalize(torch.zeros(1, 1, 1))
    assert torch.equal(turned.pixel_values[:, :, 0, 0], black[0].expand(len(split), 1))
    torch.testing.assert_close(Turned.by(split, 0).pixel_values, split.pixel_values)


def test_angles_reach_180() -> None:
    assert angles(15)[-1] == 180 and len(angles(15)) == 13
    assert angles(70) == [0, 70, 140]


def test_agreement_of_known_orders() -> None:
    error = np.array([[0.0, 0, 0, 1], [0, 0, 1, 1], [1, 1, 1, 0]])
    rising = np.array([[0.1, 0.1, 0.1, 0.2], [0.1, 0.1, 0.3, 0.3], [0.9, 0.9, 0.9, 0.1]])
    found = agreement(rising, error)
    assert found["angles"] == pytest.approx(1) and found["auroc"] == 1
    assert agreement(-rising, error)["angles"] == pytest.approx(-1)
    # Pearson's correlation of average ranks: tied uncertainties share a rank, as do all right and all wrong images
    ranks = np.array([3.5, 3.5, 3.5, 7, 3.5, 3.5, 8.5, 8.5, 11, 11, 11, 3.5])
    wrong = np.where(error.ravel() == 1, 9.5, 3.5)
    assert found["images"] == pytest.approx(np.corrcoef(ranks, wrong)[0, 1])


def test_agreement_is_nan_where_nothing_varies() -> None:
    found = agreement(np.full((3, 4), 0.5), np.eye(3, 4))
    assert math.isnan(found["angles"]) and math.isnan(found["images"]) and found["auroc"] == 0.5
    assert math.isnan(agreement(np.random.rand(2, 3), np.zeros((2, 3)))["auroc"])


def test_a_curve_holds_means_over_images() -> None:
    sure, unsure = np.array([[0.9, 0.1], [0.2, 0.8]]), np.array([[0.6, 0.4], [0.6, 0.4]])
    curve = rotation_curve(
        [ClassPredictions(sure, np.zeros(2)), ClassPredictions(unsure, np.full(2, 0.1))], np.array([0, 1])
    )
    assert curve.error.tolist() == [0, 0.5] and curve.epistemic.tolist() == pytest.approx([0, 0.1])
    entropy = -(0.6 * math.log(0.6) + 0.4 * math.log(0.4))
    assert curve.entropy[1] == pytest.approx(entropy) and curve.aleatoric[1] == pytest.approx(entropy - 0.1)


# --- models ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "name", ["lenet5", "scnn", "vgg11", "vgg13", "vgg16", "vgg19", "resnet20", "resnet18", "resnet50"]
)
def test_models_fit_the_images(name: str) -> None:
    data = images_like(MODELS[name].image_size, classes=4)
    model = load_model(name, None, 0.125, data)
    logits = model(pixel_values=torch.zeros(2, *data.shape)).logits
    assert logits.shape == (2, 4) and model.config.id2label[3] == "3"
    assert model.config.problem_type == "single_label_classification"


def test_names_reach_the_papers_depths() -> None:
    depths = {"vgg": (11, 13, 16, 19), "resnet": (18, 20, 32, 34, 44, 50, 56, 101, 110, 152)}
    expected = {f"{family}{depth}" for family, of in depths.items() for depth in of}
    assert set(MODELS) == expected | {"lenet5", "scnn"}


def images_like(size: int, classes: int) -> ImageData:
    """The digits below `classes`, at another size."""
    _, data_args, args = parse_arguments([*SMALL, "--image_size", str(size)])
    data = load_images(data_args, args.seed)
    return ImageData(data.name, data.train, data.validation, data.test, data.class_names[:classes])


# --- bad input -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model", "lenet"], "`model` must be one of lenet5"),
        (["--width", "0"], "`width`"),
        (["--delta", "-1"], "`delta`"),
        (["--prior", "flat"], "flat"),
        (["--prior_precision", "-3"], "`prior_precision`"),
        (["--angle_step", "200"], "`angle_step`"),
        (["--strip_image", "-1"], "`strip_image`"),
        (["--task", "uncert", "--strip_image", "48"], "`strip_image` must be below 48"),
        (["--patience", "0"], "`patience`"),
        (["--bayesian_epochs", "0"], "`bayesian_epochs`"),
        (["--model", "vgg11", "--image_size", "16"], "`image_size` must be >= 32"),
    ],
)
def test_bad_values_are_refused_before_any_work(flags: list[str], words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        main([*SMALL, "--output_dir", str(tmp_path), *flags])
    assert not list(tmp_path.iterdir())


def test_unknown_choices_are_refused() -> None:
    for flags in (["--task", "rotate"], ["--estimator", "dropout"], ["--rotations", "3"]):
        with pytest.raises(SystemExit):
            parse_arguments(flags)


def test_a_checkpoint_for_other_images_is_refused(acc: Run) -> None:
    with pytest.raises(ValueError, match="'num_labels': 10"):
        load_model("lenet5", str(acc[1] / "deterministic"), 1.0, images_like(28, classes=4))


def test_missing_data_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        main([*SMALL, "--data_dir", str(tmp_path / "nowhere"), "--output_dir", str(tmp_path)])
