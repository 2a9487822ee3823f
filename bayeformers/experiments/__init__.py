"""What the commands of experiments share: flags, the record of training rows, trainings, saved models, predictions."""

from ..laplace.linear_draws import linearized_draws
from .arguments import (
    BestEpochArguments,
    ConversionArguments,
    ExperimentArguments,
    HoldOutArguments,
    LaplaceArguments,
    ReportArguments,
    check_least,
    flag,
    parse_prior,
    parse_prior_precision,
)
from .command import Clock, ExperimentParser, look_ahead, run_command, say, user_input
from .draws import drawn_logits
from .evaluation import predict_sets, training_rmse
from .pages import write_page
from .phases import Experiment
from .question_answering import SOURCES as SQUAD_SOURCES
from .question_answering import SquadArguments, SquadData, load_squad_data
from .rows import FRESH, History, Split, TrainingRows, check_known, fingerprint, history_of, past_of, row_hashes
from .saved import (
    BAYESIAN,
    DETERMINISTIC,
    LAPLACE,
    LAPLACE_LAST_LAYER,
    LINEARIZED,
    chosen_by_fit,
    load_saved,
    posterior_facts,
    saved_models,
    titles,
)
from .splits import RowKind, hold_out
from .text_classification import GlueArguments, GlueData, load_glue_data
from .token_classification import ConllArguments, ConllData, load_conll_data

__all__ = [
    "BAYESIAN", "DETERMINISTIC", "FRESH", "LAPLACE", "LAPLACE_LAST_LAYER", "LINEARIZED", "SQUAD_SOURCES",
    "BestEpochArguments", "Clock", "ConllArguments", "ConllData", "ConversionArguments", "Experiment",
    "ExperimentArguments", "ExperimentParser", "GlueArguments", "GlueData", "History", "HoldOutArguments",
    "LaplaceArguments", "ReportArguments", "RowKind", "Split", "SquadArguments", "SquadData", "TrainingRows",
    "check_known", "check_least", "chosen_by_fit",
    "drawn_logits", "fingerprint", "flag", "history_of", "hold_out", "linearized_draws", "load_conll_data",
    "load_glue_data", "load_saved", "load_squad_data", "look_ahead", "parse_prior", "parse_prior_precision", "past_of",
    "posterior_facts", "predict_sets", "row_hashes", "run_command", "saved_models", "say", "titles",
    "training_rmse", "user_input", "write_page",
]  # fmt: skip
