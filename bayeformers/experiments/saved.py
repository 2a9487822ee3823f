"""The models that an experiment leaves in its output folder, by name: what they are called, and how they come back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..checkpoint import from_pretrained
from ..conversion import bayesian_config, is_bayesian
from ..delta import BOUNDS, delta_end
from ..laplace import LaplacePosterior
from ..training import BayesianTrainer

DETERMINISTIC, BAYESIAN, LINEARIZED = "deterministic", "bayesian", "linearized"
LAPLACE, LAPLACE_LAST_LAYER = "laplace", "laplace_last_layer"
TITLES = {
    DETERMINISTIC: "deterministic",
    LINEARIZED: "Bayesian, linearised",
    BAYESIAN: "Bayesian",
    LAPLACE_LAST_LAYER: "Laplace last layer",
    LAPLACE: "Laplace all layers",
}
"""By folder, what tables call each model, in their order."""
_LAPLACE_FILE = "laplace.safetensors"


def titles(names: Iterable[str]) -> dict[str, str]:
    """Return what tables call each model of an output folder, in their order; the ELBO's beside others by its method.

    >>> titles(["bayesian", "deterministic"])
    {'deterministic': 'deterministic', 'bayesian': 'Bayesian'}
    >>> titles(["laplace", "bayesian"])
    {'bayesian': 'variational', 'laplace': 'Laplace all layers'}
    """
    found = set(names)
    shown = {**TITLES, BAYESIAN: "variational"} if len(found - {DETERMINISTIC}) > 1 else TITLES
    return {name: title for name, title in shown.items() if name in found}


def saved_models(folder: str | Path) -> dict[str, Path]:
    """Return the folders by name of the models that an earlier run saved; one where ``folder`` itself is a checkpoint.

    Raises:
        FileNotFoundError: there is none.
    """
    root = Path(folder)
    found = {name: root / name for name in TITLES if (root / name / "config.json").is_file()}
    if not found and (root / "config.json").is_file():
        known = LAPLACE if (root / _LAPLACE_FILE).is_file() else BAYESIAN
        found = {root.name if root.name in TITLES else known: root}
    if not found:
        raise FileNotFoundError(
            f"`eval_only` {folder} holds no saved model: it must be an earlier run's --output_dir, with folders such "
            f"as {DETERMINISTIC!r} and {BAYESIAN!r}, or a checkpoint with a posterior."
        )
    return found


def load_saved(name: str, folder: str | Path, auto_class: Any) -> Any:
    """Return the model in a folder of `saved_models`; with its posterior, unless it is the deterministic one.

    Args:
        name: its name.
        folder: its folder.
        auto_class: transformers' class of deterministic models, such as ``AutoModelForSequenceClassification``.
    """
    return auto_class.from_pretrained(folder) if name == DETERMINISTIC else from_pretrained(folder)


def chosen_by_fit(name: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What a table says of a posterior's facts: delta or tau, and as ``beware`` why it should not be believed."""
    if "delta" in facts:
        end = delta_end(facts["delta"], *BOUNDS["glm" if name == LINEARIZED else "sample"])
        beware = [f"delta lies at the {end} end of the range that was searched"] if end else []
        return {"delta": facts["delta"], "beware": beware}
    if "prior_precision" not in facts:
        return {}
    told = {"tau": facts["prior_precision"], "by": facts["chosen_by"], "gamma": facts["effective_parameters"]}
    return {**told, "N C": facts["num_outputs"], "beware": facts["beware"]}


def posterior_facts(trainer: BayesianTrainer) -> dict[str, Any]:
    """What fitting decided: delta of variational layers; prior and evidence of a Laplace posterior; else nothing."""
    if is_bayesian(trainer.model):
        return {"delta": bayesian_config(trainer.model).delta}
    posterior = trainer.posterior
    if not isinstance(posterior, LaplacePosterior):
        return {}
    numbers = {name: getattr(posterior, name) for name in ("prior_precision", "noise_std", "log_marginal_likelihood")}
    return {
        **numbers,
        "chosen_by": posterior.choice.method,
        "at_grid_end": posterior.choice.at_grid_end,
        "effective_parameters": sum(posterior.effective_parameters.values()),
        "num_outputs": posterior.record.num_outputs,
        "exceeds_data": posterior.exceeds_data,
        "beware": posterior.caveats,
        "num_parameters": sum(target.num_weights for target in posterior.targets),
        "curvature": posterior.record.config.curvature,
        "fisher": posterior.record.config.fisher,
    }
