"""The best model by a metric of ours is the one of its smallest value, whatever transformers makes of the name."""

import copy
import dataclasses
import logging
from pathlib import Path
from typing import Any

import pytest

from bayeformers.training.arguments import LOWER_IS_BETTER
from tests.training import tiny

EACH_STEP = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}


@pytest.mark.parametrize("metric", sorted(LOWER_IS_BETTER))
@pytest.mark.parametrize("prefix", ["", "eval_"])
def test_smaller_is_better_where_nothing_is_given(prefix: str, metric: str, tmp_path: Path) -> None:
    args = tiny.arguments(tmp_path, metric_for_best_model=prefix + metric)
    assert args.greater_is_better is False
    again = dataclasses.replace(args, learning_rate=0.1)
    args.__post_init__()
    assert args.greater_is_better is again.greater_is_better is copy.deepcopy(args).greater_is_better is False
    assert tiny.arguments(tmp_path, metric_for_best_model=prefix + metric, greater_is_better=True).greater_is_better


def test_other_names_are_as_transformers_takes_them(tmp_path: Path) -> None:
    """The names of evaluation datasets are not known here, and what only ends like one of ours may be anything."""
    names = ("accuracy", "eval_f1", "loss", "eval_loss", "eval_normalized_mutual_information", "neg_rmse", None)
    found = [tiny.arguments(tmp_path, metric_for_best_model=name).greater_is_better for name in names]
    assert found == [True, True, False, False, True, True, None]


@pytest.mark.parametrize("kind", ["single", "regression"])
def test_every_metric_of_an_evaluation_has_a_direction(kind: str, tmp_path: Path) -> None:
    found = {name.removeprefix("eval_") for name in tiny.trainer(tmp_path, kind=kind).evaluate()}
    others = {name for name in found if name.endswith(("runtime", "_per_second", "_time"))} | {"loss", "epoch"}
    assert len(found - others) >= 4 and found - others <= LOWER_IS_BETTER


@pytest.mark.parametrize("name", ["nll", "eval_dev_nll", "dev_brier"])
def test_the_best_checkpoint_is_that_of_the_smallest_value(name: str, tmp_path: Path) -> None:
    """At a learning rate this large the last step is the worst of them."""
    data: Any = tiny.dataset("single", 9, seed=5)
    trainer = tiny.trainer(
        tmp_path, max_steps=4, learning_rate=3.0, load_best_model_at_end=True, metric_for_best_model=name,
        eval_dataset={"dev": data, "test": data} if "dev" in name else data, **EACH_STEP,
    )  # fmt: skip
    trainer.train()
    key = f"eval_{name.removeprefix('eval_')}"
    found = [entry[key] for entry in trainer.state.log_history if key in entry]
    assert len(found) == 4 and max(found) > 1.5 * min(found)
    assert trainer.state.best_metric == min(found)
    assert trainer.evaluate()[key] == pytest.approx(min(found), rel=1e-5)


@pytest.mark.parametrize(
    ("metric", "greater", "times"), [("nll", True, 1), ("nll", False, 0), ("nll", None, 0), ("accuracy", True, 0)]
)
def test_a_direction_that_contradicts_the_metric_is_kept_and_said_once(
    metric: str, greater: bool | None, times: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = tiny.trainer(tmp_path, metric_for_best_model=metric, greater_is_better=greater, max_steps=1)
    with caplog.at_level(logging.WARNING):
        trainer.train()
        trainer.train()
    assert sum("`greater_is_better` is True, but" in record.message for record in caplog.records) == times
    assert trainer.args.greater_is_better is (greater if greater is not None else False)
