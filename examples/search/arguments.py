"""The command line of ``python -m examples.hyperparameter_search``: the flags of bert_glue, and those of the search."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from examples.commands import user_input
from examples.glue.arguments import (
    EMBEDDED,
    DataArguments,
    ExampleTrainingArguments,
    ModelArguments,
    check_model_is_named,
    parse_groups,
)

SEARCHED = ("delta", "prior", "learning_rate", "rho_learning_rate", "kl_weight")

REDUCED: dict[str, Any] = {
    **EMBEDDED, "max_eval_samples": 400, "num_train_epochs": 9, "bayesian_epochs": 3, "num_eval_samples": 8,
}  # fmt: skip
"""Defaults of the embedded task: `EMBEDDED` with shorter trainings and fewer test sentences, for a run of minutes."""


@dataclass
class SearchArguments:
    """How long to search, what, and how the result is confirmed."""

    n_trials: int = field(
        default=6,
        metadata={
            "help": "Trials of the study in all, those of earlier runs included; the first is what the flags say."
        },
    )
    search: list[str] | None = field(
        default=None, metadata={"help": f"What to search: all, or some of {' '.join(SEARCHED)}."}
    )
    space: str | None = field(
        default=None,
        metadata={
            "help": "JSON of ranges and of the kinds of prior to choose from, in place of those around the flags' "
            'values: {"delta": [0.1, 0.5], "prior": ["normal", "moped"], "prior_std": [0.05, 0.5]}.'
        },
    )
    startup_trials: int = field(
        default=4, metadata={"help": "Trials drawn at random, and none pruned, before what was found is used."}
    )
    prune: bool = field(
        default=True,
        metadata={"help": "Stop a trial that is worse than the median of those before it; --no_prune lets all finish."},
    )
    confirm_seeds: int = field(
        default=3,
        metadata={"help": "Fresh seeds on which the best setting and the defaults are trained again, for the test."},
    )

    def __post_init__(self) -> None:
        for name, minimum in (("n_trials", 2), ("startup_trials", 1), ("confirm_seeds", 0)):
            if (value := getattr(self, name)) < minimum:
                raise ValueError(f"`{name}` must be at least {minimum}, got {value}.")
        if self.confirm_seeds == 1:
            raise ValueError("`confirm_seeds` must be 0 (no confirmation) or at least 2, got 1: it has no spread.")
        if unknown := sorted(set(self.search or ()) - set(SEARCHED)):
            raise ValueError(f"`search` must name some of {', '.join(SEARCHED)}, got {', '.join(unknown)}.")
        self.read_space()

    def read_space(self) -> dict[str, list[Any]]:
        """``space`` as an object; empty where it is not given."""
        try:
            space = json.loads(self.space or "{}")
        except json.JSONDecodeError as error:
            raise ValueError(f"`space` {self.space!r} is not JSON: {error}.") from None
        if not isinstance(space, dict) or not all(isinstance(value, list) for value in space.values()):
            raise ValueError(f"`space` must be a JSON object of lists, got {self.space!r}.")
        return space


@dataclass
class SearchTrainingArguments(ExampleTrainingArguments):
    """Those of bert_glue: ``num_train_epochs`` of the deterministic training, ``bayesian_epochs`` of every trial."""

    output_dir: str | None = field(
        default="outputs/hyperparameter_search",
        metadata={"help": "Where the study, the deterministic model and the results go; a study there goes on."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eval_only is not None:
            raise ValueError(f"`eval_only` has no meaning in a search, got {self.eval_only!r}.")
        if self.bayesian_epochs <= 0:
            raise ValueError(f"`bayesian_epochs` must be > 0, got {self.bayesian_epochs}: a trial is a training.")


@dataclass(frozen=True)
class Arguments:
    """All flags, by group."""

    search: SearchArguments
    model: ModelArguments
    data: DataArguments
    training: SearchTrainingArguments

    def recorded(self) -> dict[str, Any]:
        """What decides a trial's value, as JSON: a study goes on under the same alone."""
        training = {name: value for name, value in self.training.to_dict().items() if name not in _FREE_TO_CHANGE}
        search = {"search": self.search.search, "space": self.search.read_space()}
        search |= {"startup_trials": self.search.startup_trials, "prune": self.search.prune}
        groups = {"search": search, "model": vars(self.model), "data": vars(self.data), "training": training}
        flat = {name: value for group in groups.values() for name, value in group.items()}
        return dict(json.loads(json.dumps(flat, default=str)))


_FREE_TO_CHANGE = frozenset(ExampleTrainingArguments.fixed) | frozenset({
    "save_total_limit",
    "output_dir", "disable_tqdm", "report_to", "run_name", "project", "logging_dir", "logging_steps",
    "logging_strategy", "logging_first_step", "log_level", "log_level_replica", "log_on_each_node",
    "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_prefetch_factor",
    "draw_cache_bytes", "push_to_hub", "hub_model_id", "hub_token", "push_to_hub_token", "local_rank",
})  # fmt: skip


def parse_arguments(argv: Sequence[str] | None = None) -> Arguments:
    """The command line's arguments; what it does not say comes from ``--config``, then from the task's defaults.

    Raises:
        FileNotFoundError, ValueError: a wrong value, or a configuration file that is missing or malformed.
        SystemExit: an unknown flag, or a value of the wrong type.
    """
    groups = (SearchArguments, ModelArguments, DataArguments, SearchTrainingArguments)
    parsed = Arguments(*parse_groups(groups, argv, REDUCED))
    with user_input():
        check_model_is_named(parsed.model, parsed.data)
        if parsed.model.method != "variational":
            raise ValueError(
                f"`method` must be variational, got {parsed.model.method!r}: the one number of the other posteriors, a "
                "prior precision or a delta, bert_glue finds by held-out rows without a study."
            )
    return parsed
