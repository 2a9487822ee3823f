"""The command line of ``python -m examples.regression``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from examples.commands import example_parser, parse
from examples.training_flags import ExampleArguments

_WHOLE = "a training is one epoch of --map_steps or --variational_steps, evaluated when it is over"


@dataclass
class CurveArguments:
    """Which data, which network, which prior, and how long the reference samples."""

    data_file: str | None = field(
        default=None,
        metadata={"help": "CSV file with a header and the columns x,y. Left out: data with a known truth."},
    )
    num_points: int = field(default=160, metadata={"help": "Training points of the generated data."})
    hidden_sizes: list[int] = field(default_factory=lambda: [50], metadata={"help": "Widths of the tanh layers."})
    prior_std: float = field(
        default=1.5,
        metadata={"help": "Standard deviation of every weight's prior N(0, std^2); Laplace finds its own by evidence."},
    )
    delta: float = field(default=0.1, metadata={"help": "Initial posterior scale relative to |weight|, of the ELBO."})
    map_steps: int = field(default=1000, metadata={"help": "Steps of the deterministic networks' training."})
    variational_steps: int = field(default=2000, metadata={"help": "Steps of the ELBO's training."})
    laplace_curvature: Literal["kfac", "ekfac", "diagonal", "full"] = field(
        default="full", metadata={"help": "Form of each layer's curvature; full is exact and cheap for a tiny network."}
    )
    hmc_samples: int = field(default=200, metadata={"help": "Draws per chain of the reference; 0 leaves it out."})
    hmc_warmup: int = field(default=120, metadata={"help": "Proposals per chain that are thrown away."})
    hmc_steps: int = field(default=45, metadata={"help": "Leapfrog steps per proposal."})
    hmc_chains: int = field(default=4, metadata={"help": "Chains, run at once."})

    def __post_init__(self) -> None:
        for name in ("num_points", "map_steps", "variational_steps", "hmc_steps", "hmc_chains"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        for name in ("hmc_samples", "hmc_warmup"):
            if (value := getattr(self, name)) < 0:
                raise ValueError(f"`{name}` must not be negative, got {value}.")
        if 0 < self.hmc_samples < 4:
            raise ValueError(f"`hmc_samples` must be 0 or at least 4, got {self.hmc_samples}.")
        if self.num_points < 20:
            raise ValueError(f"`num_points` must be at least 20, got {self.num_points}.")
        if not self.hidden_sizes or min(self.hidden_sizes) < 1:
            raise ValueError(f"`hidden_sizes` must be one or more widths >= 1, got {self.hidden_sizes}.")
        if not self.prior_std > 0:
            raise ValueError(f"`prior_std` must be > 0, got {self.prior_std}.")


@dataclass
class CurveTrainingArguments(ExampleArguments):
    """Every TrainingArguments flag; draws enough for smooth bands. Batches are full, and counted by ``--map_steps``."""

    output_dir: str | None = field(
        default="outputs/regression", metadata={"help": "Where results.json, predictions.csv and the PNG go."}
    )
    learning_rate: float = field(default=1e-2, metadata={"help": "Of the deterministic networks and the means."})
    rho_learning_rate: float = field(default=2e-2, metadata={"help": "Of the scales."})
    num_eval_samples: int = field(default=256, metadata={"help": "Draws of every sampled prediction."})
    logging_strategy: str = field(default="no", metadata={"help": "When to log: no, steps or epoch."})
    save_strategy: str = field(default="no", metadata={"help": "When to save checkpoints: no, steps or epoch."})

    fixed: ClassVar[Mapping[str, tuple[Any, str]]] = {
        **ExampleArguments.fixed,
        "eval_strategy": ("no", _WHOLE),
        "load_best_model_at_end": (False, _WHOLE),
    }


Arguments = tuple[CurveArguments, CurveTrainingArguments]


def parse_arguments(argv: Sequence[str] | None = None) -> Arguments:
    """The command line's arguments.

    Raises:
        SystemExit: an unknown flag, or a value of the wrong type.
        ValueError: a value out of range.
    """
    kind = "curves"
    curve, training = parse(example_parser((CurveArguments, CurveTrainingArguments), {kind: {}}, kind), argv)
    return curve, training
