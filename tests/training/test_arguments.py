"""BayesianTrainingArguments: the command line, JSON, and values out of range."""

import math
from pathlib import Path
from typing import Any

import pytest
from transformers import HfArgumentParser

from bayeformers.training import BayesianTrainingArguments

OWN = (
    "num_train_samples", "kl_weight", "kl_warmup_ratio", "rho_learning_rate", "num_eval_samples",
    "num_eval_samples_during_training", "eval_seed", "num_training_items", "draw_cache_bytes", "noise_std",
    "eval_method", "eval_link",
)  # fmt: skip


def make(tmp_path: Path, **kwargs: Any) -> BayesianTrainingArguments:
    return BayesianTrainingArguments(str(tmp_path), report_to="none", use_cpu=True, **kwargs)


def test_command_line(tmp_path: Path) -> None:
    flags = ["--output_dir", str(tmp_path), "--kl_weight", "0.5", "--noise_std", "0.3", "--num_eval_samples", "4",
             "--num_training_items", "100", "--rho_learning_rate", "0.1", "--learning_rate", "1e-3"]  # fmt: skip
    (args,) = HfArgumentParser(BayesianTrainingArguments).parse_args_into_dataclasses(flags)
    assert (args.kl_weight, args.noise_std, args.num_eval_samples) == (0.5, 0.3, 4)
    assert (args.num_training_items, args.rho_learning_rate, args.learning_rate) == (100, 0.1, 1e-3)


@pytest.mark.parametrize(("text", "value"), [("residual", "residual"), ("0.5", 0.5), ("2", 2.0)])
def test_noise_std_on_the_command_line(text: str, value: Any, tmp_path: Path) -> None:
    flags = ["--output_dir", str(tmp_path), "--noise_std", text]
    (args,) = HfArgumentParser(BayesianTrainingArguments).parse_args_into_dataclasses(flags)
    assert args.noise_std == value == make(tmp_path, noise_std=value).noise_std


@pytest.mark.parametrize("method", ["sample", "nn", "glm", "mc_glm", "one_glm", "lr_glm", "e_glm"])
def test_prediction_on_the_command_line(method: str, tmp_path: Path) -> None:
    flags = ["--output_dir", str(tmp_path), "--eval_method", method]
    flags += [] if method in ("sample", "nn") else ["--eval_link", "probit"]
    (args,) = HfArgumentParser(BayesianTrainingArguments).parse_args_into_dataclasses(flags)
    assert (args.eval_method, args.eval_link) == (method, "auto" if method in ("sample", "nn") else "probit")


def test_sampling_has_no_link(tmp_path: Path) -> None:
    assert make(tmp_path, eval_link="mc").eval_method is None  # of the posterior's own method, if that has one
    with pytest.raises(ValueError, match="`eval_link` must be \"auto\" with `eval_method`='nn'.*got 'mc'"):
        make(tmp_path, eval_method="nn", eval_link="mc")


def test_json_round_trip(tmp_path: Path) -> None:
    args = make(tmp_path, kl_weight=0.5, noise_std=0.3, eval_method="glm", eval_link="mc")
    file = tmp_path / "args.json"
    file.write_text(args.to_json_string())
    (again,) = HfArgumentParser(BayesianTrainingArguments).parse_json_file(str(file), allow_extra_keys=True)
    assert all(getattr(again, name) == getattr(args, name) for name in OWN)


def test_every_argument_explains_itself() -> None:
    fields = BayesianTrainingArguments.__dataclass_fields__
    assert all(len(fields[name].metadata["help"]) > 20 for name in OWN)


def test_defaults(tmp_path: Path) -> None:
    args = make(tmp_path)
    assert [getattr(args, name) for name in OWN] == [
        1,
        1.0,
        0.0,
        1e-2,
        16,
        None,
        0,
        None,
        2 * 1024**3,
        "residual",
        None,
        "auto",
    ]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_train_samples", 0),
        ("num_train_samples", 1.5),
        ("num_train_samples", True),
        ("kl_weight", -0.1),
        ("kl_weight", math.nan),
        ("kl_weight", "1"),
        ("kl_warmup_ratio", 1.5),
        ("kl_warmup_ratio", -0.5),
        ("rho_learning_rate", 0.0),
        ("rho_learning_rate", math.inf),
        ("num_eval_samples", 0),
        ("num_eval_samples_during_training", 0),
        ("eval_seed", -1),
        ("num_training_items", 0),
        ("num_training_items", 2.5),
        ("draw_cache_bytes", -1),
        ("noise_std", "residuals"),
        ("noise_std", 0.0),
        ("noise_std", math.nan),
        ("noise_std", -1),
        ("eval_method", "laplace"),
        ("eval_method", 1),
        ("eval_link", "softmax"),
        ("eval_link", None),
    ],
)
def test_values_out_of_range_are_named(name: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"`{name}` must be .*got "):
        make(tmp_path, **{name: value})
