"""Flags of the Trainer that an example cannot honour: one line and exit status 2, before any data are read."""

import importlib
import sys
from pathlib import Path

import pytest

pytest.importorskip("datasets")

from bayeformers.experiments import BestEpochArguments, run_command
from examples.bert_glue import parse_arguments

TWO_TRAININGS = ("bert_glue", "token_classification", "bert_squad", "image_classification", "mlp_mnist")
ALL = (*TWO_TRAININGS, "hyperparameter_search", "regression", "lora_chat")
EVERYWHERE = [
    ("--prediction_loss_only", "`prediction_loss_only` must be False"),
    ("--no_eval_do_concat_batches", "`eval_do_concat_batches` must be True"),
    ("--dataloader_drop_last", "`dataloader_drop_last` must be False"),
    ("--label_smoothing_factor 0.1", "`label_smoothing_factor` must be 0"),
    ("--seed -1", "`seed` must lie between 0 and 4294967295, got -1"),
]
OF_A_CONVERSION = [
    ("--delta -1", "`delta` must be finite and > 0, got -1.0"),
    ("--prior nomral", "`prior` has unknown type 'nomral'"),
    ("--estimator gaussian", "`estimator` must be one of"),
    ("--num_train_epochs -1", "`num_train_epochs` must be at least 0, got -1.0"),
]
OF_THE_BEST_EPOCH = [
    ("--metric_for_best_model eval_ece", "`metric_for_best_model` must be eval_"),
    ("--no_load_best_model_at_end", "`load_best_model_at_end` must be True"),
    ("--eval_strategy no", "`eval_strategy` must be epoch in this example, got no"),
    ("--save_strategy steps", "`save_strategy` must be epoch in this example, got steps"),
    ("--greater_is_better true", "`greater_is_better` must be False"),
]


def line_of(example: str, flags: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """What the example, run with these flags, says instead of beginning."""
    pytest.importorskip({"hyperparameter_search": "optuna", "lora_chat": "peft"}.get(example, "torch"))
    main = importlib.import_module(f"examples.{example}").main
    monkeypatch.setattr(sys, "argv", [example, "--use_cpu", *flags.split()])
    with pytest.raises(SystemExit) as stopped:
        run_command(main)
    said = capsys.readouterr()
    assert stopped.value.code == 2 and said.out == ""
    (line,) = said.err.splitlines()
    return line


@pytest.mark.parametrize(
    ("example", "flags", "message"),
    [(example, *case) for example in ALL for case in EVERYWHERE]
    + [(example, *case) for example in TWO_TRAININGS for case in OF_THE_BEST_EPOCH]
    + [("bert_glue", *case) for case in OF_A_CONVERSION],
)
def test_flags_that_an_example_cannot_honour_or_sets_itself(
    example: str, flags: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert f"error: {message}" in line_of(example, flags, monkeypatch, capsys)


def test_the_regression_evaluates_when_a_training_is_over(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "`eval_strategy` must be no" in line_of("regression", "--eval_strategy epoch", monkeypatch, capsys)


def test_what_is_given_as_it_is_used_is_taken() -> None:
    args = parse_arguments([
        "--use_cpu", "--eval_strategy", "epoch", "--save_total_limit", "3", "--metric_for_best_model", "eval_loss",
    ])[2]  # fmt: skip
    recorded = args.to_sanitized_dict()
    assert recorded["save_total_limit"] == 3
    for name in BestEpochArguments.fixed:
        assert recorded[name] == BestEpochArguments.fixed[name][0]


def test_a_choice_in_a_config_file_is_checked_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.json").write_text('{"method": "lapalce"}')
    said = line_of("bert_glue", f"--config {tmp_path / 'c.json'}", monkeypatch, capsys)
    assert "`method` must be one of variational, linearized, laplace, all, got 'lapalce'" in said


def test_smoothed_labels_with_laplace_alone() -> None:
    flags = ["--use_cpu", "--label_smoothing_factor", "0.1", "--method"]
    assert parse_arguments([*flags, "laplace"])[2].label_smoothing_factor == 0.1
    with pytest.raises(ValueError, match="`label_smoothing_factor` must be 0"):
        parse_arguments([*flags, "all"])
