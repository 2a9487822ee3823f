"""Wrong use of files, trainers, metrics, losses, model configurations and command lines: one clear error each."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import bayeformers as bf
from bayeformers import losses, metrics, models, quantization, tasks
from tests.cases import case
from tests.wrong_use import INF, NAN, Call, World, check, rows


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


# ------------------------------------------------------------------------------------------------------------ files


def load(damage: Callable[[Path], Any], source: str = "saved") -> Call:
    """`from_pretrained` of a copy that ``damage`` has changed."""

    def call(world: World) -> None:
        folder = world.folder("damaged", source)
        damage(folder)
        bf.from_pretrained(folder)

    return call


def truncate(name: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes(
        (folder / name).read_bytes()[: (folder / name).stat().st_size // 2]
    )


def write(name: str, text: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_text(text)


def drop(name: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).unlink()


def change(edit: Callable[[dict[str, Tensor]], Any], name: str = "model.safetensors") -> Callable[[Path], Any]:
    """Change the tensors of a file."""

    def damage(folder: Path) -> None:
        with safe_open(folder / name, "pt") as file:
            written, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        edit(tensors)
        save_file({key: value.contiguous() for key, value in tensors.items()}, folder / name, written)

    return damage


def config(edit: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Any]:
    """Change the configuration of a folder."""

    def damage(folder: Path) -> None:
        found = json.loads((folder / "config.json").read_text())
        edit(found)
        (folder / "config.json").write_text(json.dumps(found))

    return damage


RHO, MEAN = "classifier.weight_rho", "classifier.weight"


@rows([
    ("no directory", lambda w: bf.from_pretrained(None), ("directory", "None")),
    ("a number", lambda w: bf.from_pretrained(3), ("directory", "3")),
    ("a model", lambda w: bf.from_pretrained(w.plain), ("directory",)),
    ("a folder that is not there", lambda w: bf.from_pretrained(w.root / "nowhere"), ("nowhere",)),
    ("an empty name", lambda w: bf.from_pretrained(""), ("directory",)),
    ("a file", lambda w: bf.from_pretrained(w.saved / "config.json"), ("config.json",)),
    ("no configuration", load(drop("config.json")), ("config.json",)),
    ("no weights", load(drop("model.safetensors")), ("model.safetensors",)),
    ("half a configuration", load(truncate("config.json")), ("config.json",)),
    ("a record that is a list", load(config(lambda c: c.update(bayesian=[]))), ("bayesian",)),
    ("a record that is text", load(config(lambda c: c.update(bayesian="yes"))), ("bayesian",)),
    ("an empty record", load(config(lambda c: c.update(bayesian={}))), ("bayesian",)),
    ("no modules in the record", load(config(lambda c: c["bayesian"].update(modules={}))), ("names no layer",)),
    (
        "modules as a list",
        load(config(lambda c: c["bayesian"].update(modules=["classifier"]))),
        ("names no layer",),
    ),
    ("an unknown scale", load(config(lambda c: c["bayesian"].update(scale="log"))), ("scale", "log")),
    ("a flag that is text", load(config(lambda c: c["bayesian"].update(freeze="no"))), ("freeze", "no")),
    ("norms that are text", load(config(lambda c: c["bayesian"].update(norms="no"))), ("norms", "no")),
    ("a module too few", load(config(lambda c: c["bayesian"]["modules"].pop("classifier"))), ("classifier",)),
    ("a rho of another shape", load(change(lambda t: t.update({RHO: t[RHO][:2]}))), (RHO,)),
    ("a rho that is not a number", load(change(lambda t: t[RHO].fill_(NAN))), (RHO,)),
    ("a rho that is infinite", load(change(lambda t: t[RHO][0].fill_(INF))), (RHO,)),
    ("a mean that is not a number", load(change(lambda t: t[MEAN][0, 0].fill_(NAN))), (MEAN,)),
    ("no mean", load(change(lambda t: t.pop(MEAN))), (MEAN,)),
    ("no rho", load(change(lambda t: t.pop(RHO))), (RHO,)),
    ("a tensor that nothing takes", load(change(lambda t: t.update(stray_rho=torch.zeros(2)))), ("stray_rho",)),
    (
        "two rhos that are swapped",
        load(change(lambda t: t.update({RHO: t["classifier.bias_rho"], "classifier.bias_rho": t[RHO]}))),
        ("classifier",),
    ),
    (
        "a dtype that is not there",
        lambda w: bf.from_pretrained(w.saved, dtype="float33"),
        ("dtype",),
    ),
])
def test_bayesian_files(world: World, call: Call, named: tuple[str, ...]) -> None:
    check(world, call, named)


def posterior_file(folder: Path) -> str:
    """The file of a Laplace posterior."""
    return next(p.name for p in folder.iterdir() if "laplace" in p.name or "posterior" in p.name)


def damaged_posterior(damage: Callable[[dict[str, Tensor]], Any]) -> Call:
    def call(world: World) -> None:
        folder = world.folder("damaged", "laplace")
        change(damage, posterior_file(folder))(folder)
        bf.from_pretrained(folder)

    return call


def first_of(tensors: dict[str, Tensor], ending: str) -> str:
    return next(name for name in tensors if name.endswith(ending))


@rows([
    (
        "half a posterior",
        lambda w: (
            folder := w.folder("damaged", "laplace"),
            truncate(posterior_file(folder))(folder),
            bf.from_pretrained(folder),
        ),
        ("laplace",),
    ),
    ("a tensor missing", damaged_posterior(lambda t: t.pop(next(iter(t)))), ("laplace",)),
    ("no tensor", damaged_posterior(lambda t: t.clear()), ("laplace",)),
    ("not a number", damaged_posterior(lambda t: next(iter(t.values())).fill_(NAN)), ("laplace",)),
    ("below zero", damaged_posterior(lambda t: [v.fill_(-1.0) for v in t.values()]), ("laplace",)),
    (
        "another model's",
        lambda w: laplace_of_another(w),
        ("posterior",),
    ),
    ("no folder", lambda w: bf.LaplacePosterior.load(w.root / "nowhere", w.plain), ("nowhere",)),
    ("no model", lambda w: bf.LaplacePosterior.load(w.laplace, None), ("model",)),
    ("a smaller model", lambda w: bf.LaplacePosterior.load(w.laplace, w.hand), ("posterior",)),
    ("an INT8 folder that is not there", lambda w: quantization.load(w.root / "nowhere"), ("nowhere",)),
    ("an INT8 folder of a float model", lambda w: quantization.load(w.saved), ("quantized",)),
])
def test_laplace_files(world: World, call: Call, named: tuple[str, ...]) -> None:
    check(world, call, named)


def laplace_of_another(world: World) -> None:
    """The weights of the folder are not those that the posterior was fitted to."""
    folder = world.folder("damaged", "laplace")
    change(lambda t: t[MEAN].copy_(t[MEAN].flip(0)))(folder)
    bf.from_pretrained(folder)


# ---------------------------------------------------------------------------------------------------------- trainer


def arguments(**options: Any) -> Call:
    return lambda w: w.trainer(**options)


TRAINING: dict[str, tuple[Any, ...]] = {
    "num_train_samples": (0, -1, 1.5, "two"),
    "kl_weight": (-1.0, NAN, INF, "heavy"),
    "kl_warmup_ratio": (-0.1, 1.5, NAN, "half"),
    "rho_learning_rate": (-1.0, NAN, INF, "fast"),
    "num_eval_samples": (0, -1, 1.5, "many"),
    "num_eval_samples_during_training": (0, -1, 2.5),
    "eval_seed": (0.5, "0"),
    "eval_method": ("laplace", ""),
    "eval_link": ("logit", 3),
    "num_training_items": (0, -3, 1.5, "all"),
    "draw_cache_bytes": (-1, "2GB"),
    "noise_std": (0.0, -1.0, NAN, "wide"),
}


@rows([
    *(
        (f"{name} = {value!r}", arguments(**{name: value}), (name, str(value)))
        for name, values in TRAINING.items()
        for value in values
    ),
    ("a model that is text", lambda w: w.trainer(model="bert"), ("model",)),  # type: ignore[arg-type]
    ("stock arguments", lambda w: stock_arguments(w), ("BayesianTrainingArguments",)),
    ("no rows", lambda w: w.trainer(rows=[]).train(), ("train_dataset",)),
    (
        "rows without labels",
        lambda w: w.trainer(rows=[{"input_ids": torch.ones(3).long()}] * 3).train(),
        ("label",),
    ),
    ("prediction of nothing", lambda w: w.trainer().predict(None), ("test_dataset",)),
    ("evaluation of nothing", lambda w: w.trainer().evaluate(), ("eval_dataset",)),
    ("resume from nowhere", lambda w: w.trainer().train(resume_from_checkpoint=str(w.root / "none")), ("none",)),
    ("resume from a plain folder", lambda w: w.trainer().train(resume_from_checkpoint=str(w.laplace)), ("rho",)),
    ("a fit of a Bayesian model", lambda w: w.trainer().fit_laplace(), ("to_deterministic",)),
])
def test_training(world: World, call: Call, named: tuple[str, ...]) -> None:
    check(world, call, named, seeds=True)


def stock_arguments(world: World) -> None:
    from transformers import TrainingArguments

    bf.BayesianTrainer(
        bf.to_bayesian(case("bert").build()), TrainingArguments(output_dir=str(world.root), use_cpu=True)
    )


# ----------------------------------------------------------------------------------------------- metrics and losses

PROBS = np.full((4, 2), 0.5)
LABELS = np.array([0, 1, 1, 0])
CONFIDENCE, ERROR = np.array([0.9, 0.8, 0.7, 0.6]), np.array([0, 0, 1, 1])
OF_PROBS = (
    "accuracy",
    "brier_score",
    "negative_log_likelihood",
    "expected_calibration_error",
    "maximum_calibration_error",
    "classwise_calibration_error",
    "reliability_bins",
)
OF_CONFIDENCE = ("aurc", "e_aurc", "augrc", "error_auroc", "error_aupr", "prr", "risk_coverage_curve", "refusal_table")


def metric(name: str, *values: Any, **options: Any) -> Call:
    return lambda _: getattr(metrics, name)(*values, **options)


BAD_PROBS: dict[str, tuple[Any, Any]] = {
    "no rows": (PROBS[:0], LABELS[:0]),
    "one axis": (PROBS[:, 0], LABELS),
    "labels of another length": (PROBS, LABELS[:2]),
    "labels out of range": (PROBS, LABELS + 2),
    "labels below zero": (PROBS, LABELS - 1),
    "labels that are floats": (PROBS, LABELS + 0.5),
    "rows that do not add up to one": (PROBS * 3, LABELS),
    "not a number": (PROBS * NAN, LABELS),
    "below zero": (np.array([[1.5, -0.5]] * 4), LABELS),
    "text": ("probs", LABELS),
    "nothing": (None, LABELS),
}
BAD_CONFIDENCE: dict[str, tuple[Any, Any]] = {
    "no rows": (CONFIDENCE[:0], ERROR[:0]),
    "two axes": (CONFIDENCE[:, None], ERROR),
    "errors of another length": (CONFIDENCE, ERROR[:2]),
    "not a number": (CONFIDENCE * NAN, ERROR),
    "text": ("sure", ERROR),
    "nothing": (None, ERROR),
}


@rows([(f"{n} of {k}", metric(n, *v), ("`",)) for n in OF_PROBS for k, v in BAD_PROBS.items()])
def test_metrics_of_probabilities(world: World, call: Call, named: tuple[str, ...]) -> None:
    check(world, call, named)


@rows([(f"{n} of {k}", metric(n, *v), ("`",)) for n in OF_CONFIDENCE for k, v in BAD_CONFIDENCE.items()])
def test_metrics_of_confidence(world: World, call: Call, named: tuple[str, ...]) -> None:
    check(world, call, named)


LOGITS = torch.zeros(4, 2)
TARGETS = torch.tensor([0, 1, 1, 0])


@rows([
    *(
        (f"risk at {value!r}", metric("risk_at_coverage", CONFIDENCE, ERROR, value), ("coverage",))
        for value in (1.5, -0.1, NAN, "a", None)
    ),
    *(
        (f"coverage at {value!r}", metric("coverage_at_risk", CONFIDENCE, ERROR, value), ("risk",))
        for value in (-0.1, NAN, "a", None)
    ),
    *(
        (f"{value!r} bins", metric("expected_calibration_error", PROBS, LABELS, num_bins=value), ("num_bins",))
        for value in (0, -1, 1.5, "ten", None)
    ),
    ("one class out of distribution", metric("ood_auroc", CONFIDENCE, np.zeros(4)), ("is_ood",)),
    ("out of distribution by 2", metric("ood_auroc", CONFIDENCE, np.array([0, 1, 2, 0])), ("is_ood",)),
    ("a temperature of one class", metric("fit_temperature", np.zeros((4, 1)), np.zeros(4, int)), ("logits",)),
    ("a temperature of no rows", metric("fit_temperature", np.zeros((0, 2)), np.zeros(0, int)), ("`",)),
    ("a metric that is not there", metric("load", "nowhere/metric"), ("nowhere",)),
    ("entropy of one axis", metric("predictive_entropy", torch.zeros(3)), ("log_probs",)),
    ("entropy of logits", metric("predictive_entropy", torch.ones(2, 3, 4)), ("log_probs",)),
    ("entropy of text", metric("mutual_information", "log_probs"), ("log_probs",)),
    ("entropy of nothing", metric("mutual_information", None), ("log_probs",)),
    ("a bootstrap of nothing", metric("bootstrap_ci", metrics.accuracy), ("array",)),
    ("a bootstrap of two lengths", metric("bootstrap_ci", metrics.accuracy, PROBS, LABELS[:2]), ("`",)),
    ("a loss of labels out of range", lambda w: losses.avuc_loss(LOGITS, TARGETS + 2, 0.5), ("labels",)),
    ("a loss of labels of another length", lambda w: losses.avuc_loss(LOGITS, TARGETS[:2], 0.5), ("labels",)),
    ("a loss of floats as labels", lambda w: losses.avuc_loss(LOGITS, torch.full((4,), 0.5), 0.5), ("labels",)),
    ("a loss without threshold", lambda w: losses.avuc_loss(LOGITS, TARGETS, None), ("threshold",)),
    (
        "a loss of an unknown uncertainty",
        lambda w: losses.avuc_loss(LOGITS, TARGETS, 0.5, uncertainty="doubt"),
        ("uncertainty", "doubt"),
    ),
    (
        "a loss of no thresholds",
        lambda w: losses.auavu_loss(LOGITS, TARGETS, num_thresholds=0),
        ("num_thresholds",),
    ),
    ("a Gaussian of one column", lambda w: losses.gaussian_nll(torch.zeros(4, 1), torch.zeros(4)), ("output",)),
    ("a Gaussian of two lengths", lambda w: losses.gaussian_nll(torch.zeros(4, 2), torch.zeros(3)), ("target",)),
    (
        "a Gaussian of an unknown reduction",
        lambda w: losses.gaussian_nll(torch.zeros(4, 2), torch.zeros(4), "median"),
        ("reduction", "median"),
    ),
    ("a ResNet of depth 7", lambda w: models.resnet_config(7), ("depth", "7")),
    ("a CIFAR ResNet of depth 21", lambda w: models.CifarResNetConfig(depth=21), ("depth", "21")),
    ("a VGG of depth 12", lambda w: models.VGGConfig(depth=12), ("depth", "12")),
    ("an MLP without width", lambda w: models.MLPConfig(hidden_sizes=(0,)), ("hidden_sizes",)),
    ("an MLP of text", lambda w: models.MLPConfig(hidden_sizes="400"), ("hidden_sizes",)),
    ("a LeNet of tiny images", lambda w: models.LeNetConfig(image_size=2), ("image_size",)),
    ("dropout of two", lambda w: models.MLPConfig(dropout=2.0), ("dropout", "2.0")),
    ("a GLUE task from nowhere", lambda w: tasks.read_task(tasks.GLUE_TASKS["cola"], w.root / "none"), ("none",)),
    (
        "a split that is not there",
        lambda w: tasks.read_split(tasks.GLUE_TASKS["cola"], w.root, "training"),
        ("training",),
    ),
    ("INT8 of no inputs", lambda w: quantization.quantize(w.net, []), ("calibration_inputs",)),
    (
        "INT8 of an unknown arithmetic",
        lambda w: quantization.quantize(w.net, w.x, arithmetic="int4"),
        ("arithmetic", "int4"),
    ),
    (
        "INT8 of an error below zero",
        lambda w: quantization.quantize(w.net, w.x, max_error=-1.0),
        ("max_error", "-1.0"),
    ),
])
def test_parts(world: World, call: Call, named: tuple[str, ...]) -> None:
    check(world, call, named)
