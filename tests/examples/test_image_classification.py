"""The three tasks end to end at a reduced size, rotation against exact turns, and what the example refuses."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("datasets")
pytest.importorskip("matplotlib")

import bayeformers
from bayeformers.experiments.image_classification import ImageData, load_classifier, load_image_data
from bayeformers.models.catalogue import IMAGE_CLASSIFIERS
from examples.image_classification import angles, main, parse_arguments

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
    return main([*SMALL, "--output_dir", str(folder), "--report", str(folder / "page.html")]), folder


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
    assert (folder / "page.html").read_text(encoding="utf-8").count("<figcaption><strong>Laplace</strong>") == 2
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
    test = load_image_data(*data_arguments(SMALL)).test
    _, _, args = parse_arguments([*SMALL, "--output_dir", str(tmp_path)])
    for name, title in (("variational", "Bayesian (ELBO)"), ("laplace", "Laplace")):
        trainer = bayeformers.BayesianTrainer(bayeformers.from_pretrained(folder / name), args, eval_dataset=test)
        metrics = trainer.predict(test).metrics
        assert metrics["test_nll"] == pytest.approx(results["methods"][title]["nll"], rel=1e-6)


def data_arguments(argv: list[str]) -> tuple[Any, int, int]:
    model_args, data_args, args = parse_arguments(argv)
    return data_args, args.seed, IMAGE_CLASSIFIERS[model_args.model].image_size


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


def test_what_is_turned_in_is_black() -> None:
    split = load_image_data(*data_arguments(SMALL)).test
    turned = split.rotated(45)
    black = split.preprocessing.normalize(torch.zeros(1, 1, 1))
    assert torch.equal(turned.pixel_values[:, :, 0, 0], black[0].expand(len(split), 1))
    torch.testing.assert_close(split.rotated(0).pixel_values, split.pixel_values)


def test_angles_reach_180() -> None:
    assert angles(15)[-1] == 180 and len(angles(15)) == 13
    assert angles(70) == [0, 70, 140]


# --- models ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "name", ["lenet5", "scnn", "vgg11", "vgg13", "vgg16", "vgg19", "resnet20", "resnet18", "resnet50"]
)
def test_models_fit_the_images(name: str) -> None:
    data = images_like(IMAGE_CLASSIFIERS[name].image_size, classes=4)
    model = load_classifier(name, None, 0.125, data)
    logits = model(pixel_values=torch.zeros(2, *data.shape)).logits
    assert logits.shape == (2, 4) and model.config.id2label[3] == "3"
    assert model.config.problem_type == "single_label_classification"


def test_names_reach_the_papers_depths() -> None:
    depths = {"vgg": (11, 13, 16, 19), "resnet": (18, 20, 32, 34, 44, 50, 56, 101, 110, 152)}
    expected = {f"{family}{depth}" for family, of in depths.items() for depth in of}
    assert set(IMAGE_CLASSIFIERS) == expected | {"lenet5", "scnn"}


def images_like(size: int, classes: int) -> ImageData:
    """The digits below `classes`, at another size."""
    _, data_args, args = parse_arguments([*SMALL, "--image_size", str(size)])
    data = load_image_data(data_args, args.seed)
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
        (["--task", "init", "--report", "page.html"], "`report` is of --task acc"),
        (["--report", "."], "`report` must be a file to write"),
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
        load_classifier("lenet5", str(acc[1] / "deterministic"), 1.0, images_like(28, classes=4))


def test_missing_data_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        main([*SMALL, "--data_dir", str(tmp_path / "nowhere"), "--output_dir", str(tmp_path)])
