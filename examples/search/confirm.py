"""Confirmation: the best setting and the defaults, trained again on fresh seeds and judged on test data, in pairs.

The best of many trials is in part the luckiest: on the validation data that chose it, it looks better than it is. Fresh
seeds bring other sentences (embedded task) or another held-out share (GLUE), another initialisation and other noise.
"""

from __future__ import annotations

import copy
import json
import math
import shutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import PreTrainedTokenizerBase, set_seed

from bayeformers.reports import write_json
from examples.glue.data import GlueData, load_data
from examples.glue.evaluation import ALL, BySet, method_report, predict_sets, recalibrate
from examples.glue.models import DETERMINISTIC, load_model, load_tokenizer
from examples.glue.training import fit_deterministic, fit_variational, save, saved_trainer
from examples.held_out import FRESH, History, history_of
from examples.running import say
from examples.search.arguments import Arguments
from examples.search.space import Setting, converted_by

DEFAULTS, BEST = "defaults", "best found"
TEMPERED = "deterministic + temperature"
FIRST = 1000
"""Of the fresh seeds, above ``--seed``."""

Report = dict[str, float | None]


def confirm(settings: Mapping[str, tuple[int, Setting]], arguments: Arguments) -> dict[str, Any]:
    """Reports by method, a list over the seeds each, and the difference best - defaults.

    ``settings``: (trial number, setting) of `DEFAULTS` and `BEST`. What an earlier run left is taken as it is.
    """
    seeds = [arguments.training.seed + FIRST + index for index in range(arguments.search.confirm_seeds)]
    runs = [confirm_seed(seed, settings, arguments) for seed in seeds]
    methods = {name: [run[name] for run in runs] for name in runs[0]}
    return {"seeds": seeds, "methods": methods, "difference": paired_difference(methods[BEST], methods[DEFAULTS])}


def start_history(arguments: Arguments) -> History:
    """What is known of the rows that ``--model_name_or_path`` was trained on: they decide the split, not the seed."""
    named, untrained = arguments.model.model_name_or_path, arguments.training.num_train_epochs == 0
    return history_of("model_name_or_path", [named], must_know=untrained) if named else FRESH


@dataclass(frozen=True)
class FreshSeed:
    """The arguments of one seed, with a folder of its own, and its data."""

    arguments: Arguments
    data: GlueData
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def make(cls, seed: int, arguments: Arguments) -> FreshSeed:
        args = copy.deepcopy(arguments.training)
        args.seed, args.output_dir = seed, str(Path(args.output_dir or ".") / "confirm" / f"seed-{seed}")
        set_seed(seed)
        data = replace(load_data(arguments.data, seed, start_history(arguments)), shifted=None)
        tokenizer = load_tokenizer(arguments.model.model_name_or_path, data)
        data = data.tokenized(tokenizer, arguments.data.max_seq_length)
        return cls(replace(arguments, training=args), data, tokenizer)

    @property
    def folder(self) -> Path:
        return Path(self.arguments.training.output_dir or ".")


def confirm_seed(seed: int, settings: Mapping[str, tuple[int, Setting]], arguments: Arguments) -> dict[str, Report]:
    """A deterministic model of this seed, and one posterior around it for each setting."""
    fresh = FreshSeed.make(seed, arguments)
    reports: dict[str, Report] = kept(fresh.folder / f"{DETERMINISTIC}.json", partial(point_reports, fresh))
    for name, (number, setting) in settings.items():
        file = fresh.folder / f"trial-{number}.json"
        if not file.is_file():
            say(f"Confirmation, seed {seed}: {name} (trial {number})")
        reports[name] = kept(file, partial(setting_report, fresh, setting))
    return reports


def kept(file: Path, make: Callable[[], Any]) -> Any:
    """What an earlier run wrote to the file; else what is made now, written there by the main process."""
    state = PartialState()
    exists = file.is_file()
    state.wait_for_everyone()  # all have looked before one writes
    if not exists:
        made = make()
        if state.is_main_process:
            write_json(file, made)
        state.wait_for_everyone()
    return json.loads(file.read_text(encoding="utf-8"))


def point_reports(fresh: FreshSeed) -> dict[str, Report]:
    """Train and save the deterministic model; reports of it, as it is and with a temperature."""
    arguments, data = fresh.arguments, fresh.data
    say(f"Confirmation, seed {arguments.training.seed}: the deterministic model")
    model = load_model(arguments.model.model_name_or_path, data.task, fresh.tokenizer)
    trained = fit_deterministic(model, arguments.training, data, fresh.tokenizer)
    save(trained, fresh.data, fresh.folder / DETERMINISTIC)
    predictions = predict_sets(trained, data)
    tempered = recalibrate(predictions, data.validation)
    return {DETERMINISTIC: test_report(predictions, data), TEMPERED: test_report(tempered.predictions, data)}


def setting_report(fresh: FreshSeed, setting: Setting) -> Report:
    """Train the setting from the seed's deterministic model, as a trial does; nothing but the report is kept."""
    args, data = copy.deepcopy(fresh.arguments.training), fresh.data
    args.bayesian_learning_rate = setting["learning_rate"]
    args.rho_learning_rate, args.kl_weight = setting["rho_learning_rate"], setting["kl_weight"]
    start = saved_trainer(DETERMINISTIC, fresh.folder / DETERMINISTIC, args, data, fresh.tokenizer)
    trainer = fit_variational(start, converted_by(setting, fresh.arguments.model), args, data, fresh.tokenizer)
    report = test_report(predict_sets(trainer, data), data)
    if args.process_index == 0:
        shutil.rmtree(fresh.folder / "checkpoints", ignore_errors=True)
    return report


def test_report(predictions: BySet, data: GlueData) -> Report:
    """Scores on the test set, and the NLL on the validation set that the search judges by."""
    held_out = data.validation
    if "group" not in held_out.column_names:
        held_out = held_out.add_column("group", ["validation"] * len(held_out))
    as_test = method_report({"test": predictions["validation"]}, replace(data, test=held_out))
    return {**method_report(predictions, data)["groups"][ALL], "validation_nll": as_test["groups"][ALL]["nll"]}


def paired_difference(first: Sequence[Report], second: Sequence[Report]) -> dict[str, dict[str, float]]:
    """first - second per metric: mean over the seeds, and its standard error, sample standard deviation / sqrt(n).

    >>> paired_difference([{"nll": 0.5}, {"nll": 0.75}], [{"nll": 0.25}, {"nll": 0.25}])
    {'nll': {'mean': 0.375, 'standard_error': 0.125}}
    """
    differences = {}
    for name in first[0]:
        pairs = [(one[name], other[name]) for one, other in zip(first, second, strict=True)]
        values = [one - other for one, other in pairs if one is not None and other is not None]
        if len(values) == len(pairs):
            error = statistics.stdev(values) / math.sqrt(len(values))
            differences[name] = {"mean": statistics.fmean(values), "standard_error": error}
    return differences


def verdict(difference: Mapping[str, float]) -> str:
    """What a difference in NLL, best - defaults, says at two standard errors.

    >>> verdict({"mean": -0.02, "standard_error": 0.004}), verdict({"mean": -0.02, "standard_error": 0.02})
    ('the setting found is better', 'the defaults hold: no difference beyond two standard errors')
    """
    mean, error = difference["mean"], difference["standard_error"]
    if abs(mean) <= 2 * error:
        return "the defaults hold: no difference beyond two standard errors"
    return "the setting found is better" if mean < 0 else "the setting found is worse"
