"""The options of a fit: one set, by configuration, by keyword, from JSON and from a shell."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import torch
from transformers import HfArgumentParser

from bayeformers import BayesianTrainingArguments
from bayeformers.laplace import CurvatureConfig, LaplaceConfig, LaplaceOptions, LaplacePosterior, fit
from bayeformers.laplace.config import CurvatureKind
from tests.laplace.networks import QUIET, batches, mlp
from tests.laplace.reference import integers, normal
from tests.training import tiny

X, Y = normal(12, 4, seed=0), integers(3, 12, seed=1)
OPTIONS: dict[str, Any] = {
    "curvature": "ekfac",
    "exclude_modules": ["0"],
    "fisher": "exact",
    "prior_precision": 2.5,
    "temperature": 0.5,
    "num_batches": 2,
    "num_data": 40,
}


def assert_same(one: LaplacePosterior, other: LaplacePosterior) -> None:
    assert one.record == other.record
    assert (one.prior_precision, one.temperature, one.choice) == (
        other.prior_precision,
        other.temperature,
        other.choice,
    )
    for name, eigen in one.layers.items():
        assert torch.equal(eigen.eigenvalues, other.layers[name].eigenvalues)


def test_a_configuration_and_keywords_agree() -> None:
    """And of both, the keywords win."""
    model, data = mlp(), batches(X, Y, 4, 4, 4)
    by_keyword = fit(model, data, **QUIET, **OPTIONS)
    assert by_keyword.record.num_data == 40 and list(by_keyword.layers) == ["2"]
    assert_same(by_keyword, fit(model, data, LaplaceConfig(**QUIET, **OPTIONS)))
    other = LaplaceConfig(**QUIET, **{**OPTIONS, "temperature": 3.0, "curvature": "kfac"})
    assert_same(by_keyword, fit(model, data, other, temperature=0.5, curvature="ekfac"))


def test_the_trainer_takes_the_same(tmp_path: Path) -> None:
    options = {"curvature": "diagonal", "subset": "last_layer", "prior_precision": 3.0}
    trainer = tiny.trainer(tmp_path, tiny.plain("single").double(), "single")
    assert_same(trainer.fit_laplace(config=LaplaceConfig(**options)), trainer.fit_laplace(**options))
    assert trainer.fit_laplace(config=LaplaceConfig(**options), prior_precision=4.0).prior_precision == 4.0


def test_keywords_are_typed_as_the_fields() -> None:
    names = {field.name for field in fields(LaplaceConfig)}
    assert LaplaceOptions.__optional_keys__ == names and not LaplaceOptions.__required_keys__
    for name in ("likelihood", "subset", "curvature", "fisher", "weight_sharing", "link", "num_batches", "temperature"):
        assert get_type_hints(LaplaceOptions)[name] == get_type_hints(LaplaceConfig)[name]


def test_json_round_trip(tmp_path: Path) -> None:
    config = LaplaceConfig(
        target_modules=("query", "key"),
        prior_precision={"a": np.float32(0.5), "b": 2},  # type: ignore[dict-item]
        num_data=np.int64(7),  # type: ignore[arg-type]
        device=torch.device("cpu"),
        checkpoint=tmp_path / "sums",
        progress=False,
    )
    written = json.loads(json.dumps(config.to_dict()))
    assert written["checkpoint"] == str(tmp_path / "sums") and written["device"] == "cpu"
    read = LaplaceConfig.from_dict({**written, "an_option_of_later": 1})
    assert read.to_dict() == written
    assert LaplaceConfig.from_dict(json.loads(json.dumps(LaplaceConfig().to_dict()))) == LaplaceConfig()


def test_the_command_line_has_the_same_names() -> None:
    """Beside the Trainer's, whose ``seed`` and ``noise_std`` a fit shares."""
    parser = HfArgumentParser([BayesianTrainingArguments, LaplaceConfig])
    line = "--output_dir x --noise_std 0.5 --curvature full --target_modules query key --prior_precision 0.5 "
    line += "--temperature 2 --num_batches 3 --progress false --device cpu"
    args, config = parser.parse_args_into_dataclasses(line.split())
    assert args.noise_std == 0.5
    assert config == LaplaceConfig(
        curvature="dense",
        target_modules=["query", "key"],
        prior_precision=0.5,
        temperature=2.0,
        num_batches=3,
        progress=False,
        device="cpu",
    )
    assert parser.parse_args_into_dataclasses(["--output_dir", "x"])[1] == LaplaceConfig()
    (config,) = HfArgumentParser(LaplaceConfig).parse_args_into_dataclasses(["--prior_precision", "marglik_per_layer"])
    assert config.prior_precision == "marglik_per_layer"
    assert all(field.metadata["help"] for field in fields(LaplaceConfig))


def test_full_is_the_older_name_of_dense(tmp_path: Path) -> None:
    """As an option, of sums, and in files."""
    dense, full = (fit(mlp(), batches(X, Y), curvature=kind, **QUIET) for kind in ("dense", "full"))
    assert_same(dense, full)
    assert full.record.config == CurvatureConfig(curvature="full", **{"fisher": "exact"})  # type: ignore[arg-type]
    assert full.record.config.curvature == "dense" and "full" not in get_args(CurvatureKind)


def test_scale_is_the_older_name_of_likelihood_precision() -> None:
    posterior = fit(mlp(), batches(X, Y), temperature=0.25, **QUIET)
    with pytest.warns(DeprecationWarning, match="posterior.likelihood_precision"):
        assert posterior.scale == posterior.likelihood_precision == 4.0


def test_what_is_no_option() -> None:
    with pytest.raises(TypeError, match="`curvatur` is no option of a Laplace fit; there are likelihood, subset"):
        fit(mlp(), batches(X, Y), curvatur="kfac")  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="`config` must be a LaplaceConfig, got dict"):
        fit(mlp(), batches(X, Y), OPTIONS)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`device` must be a torch device"):
        LaplaceConfig(device="gpu")
    with pytest.raises(ValueError, match=r"`prior_precision\['a'\]` must be a finite number > 0, got -1"):
        LaplaceConfig(prior_precision={"a": -1.0})
    with pytest.raises(TypeError, match="`checkpoint` must be a path"):
        LaplaceConfig(checkpoint=3)  # type: ignore[arg-type]
