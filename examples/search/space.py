"""What a search may choose, and how a choice becomes a conversion and training arguments.

A `Setting` holds numbers by name, and the kind of prior. The prior's scale, often written tau, has a name and a unit of
its own for each kind: `prior_std` is a standard deviation, `prior_relative_scale` a factor of the initial scale
delta |w|. Every number is searched on a logarithmic scale around the value that the flags give it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

from optuna.trial import BaseTrial

from bayeformers.distributions import MopedPrior, NormalPrior, Prior
from examples.glue.arguments import ModelArguments, parse_prior
from examples.search.arguments import SEARCHED, Arguments

Setting = dict[str, Any]


class PriorChoice(NamedTuple):
    """A kind of prior with one scale: that scale's name in the prior and in a setting, and how the prior is made."""

    field: str
    hyperparameter: str
    make: Callable[[float], Prior]
    usual: float


PRIORS: dict[str, PriorChoice] = {
    "normal": PriorChoice("std", "prior_std", lambda std: NormalPrior(std, centre=0.0), 0.1),
    "normal_pretrained": PriorChoice("std", "prior_std", NormalPrior, 0.1),
    "moped": PriorChoice("relative_scale", "prior_relative_scale", MopedPrior, 1.0),
}
"""N(0, std^2); N(w0, std^2); N(w0, (relative_scale * delta |w0|)^2), with w0 the trained weight."""

TRAINING = ("learning_rate", "rho_learning_rate", "kl_weight")
"""Names of a setting that are training arguments."""

FACTORS = {
    "delta": 4.0, "prior_std": 10.0, "prior_relative_scale": 10.0, "learning_rate": 5.0, "rho_learning_rate": 10.0,
    "kl_weight": 30.0,
}  # fmt: skip
"""How far from the flags' value a number is searched, either way."""


@dataclass(frozen=True)
class Space:
    """``defaults``: the flags' setting; ``ranges``: of the numbers searched; ``priors``: the kinds to choose from."""

    defaults: Setting
    ranges: Mapping[str, tuple[float, float]]
    priors: tuple[str, ...] = ()

    def suggest(self, trial: BaseTrial) -> Setting:
        """The trial's setting, what is not searched included; asked again, a trial says the same."""
        setting = dict(self.defaults)
        if self.priors:
            kind = trial.suggest_categorical("prior", self.priors)
            setting = {name: value for name, value in setting.items() if not name.startswith("prior")}
            setting |= {"prior": kind, PRIORS[kind].hyperparameter: PRIORS[kind].usual}
        for name in [name for name in setting if name in self.ranges]:
            setting[name] = trial.suggest_float(name, *self.ranges[name], log=True)
        return setting

    @property
    def searched_defaults(self) -> dict[str, Any]:
        """What makes a trial of the defaults."""
        searched = {*self.ranges, *(["prior"] if self.priors else [])}
        return {name: value for name, value in self.defaults.items() if name in searched}


def make_space(arguments: Arguments, delta: float) -> Space:
    """The space around the flags' setting, whose ``delta`` may have been calibrated.

    Raises:
        ValueError: something to be searched has no value that it could be searched around, or a range is malformed.
    """
    given = arguments.search.read_space()
    names = [name for name in SEARCHED if name in (arguments.search.search or SEARCHED)]
    if arguments.model.freeze and "learning_rate" in names:
        if arguments.search.search is not None or "learning_rate" in given:
            raise ValueError("`learning_rate` moves the means, which are frozen: add --no_freeze, or do not search it.")
        names.remove("learning_rate")
    defaults: Setting = {"delta": delta, **_training_defaults(arguments)}
    priors: tuple[str, ...] = ()
    if "prior" in names:
        own = name_prior(arguments.model.prior)
        defaults |= own
        priors = _kinds(given.pop("prior", None), own["prior"])
        scales = dict.fromkeys(PRIORS[kind].hyperparameter for kind in priors)
        names[names.index("prior") : names.index("prior") + 1] = scales
    if unknown := sorted(set(given) - set(names)):
        raise ValueError(f"`space` has {', '.join(unknown)}, which is not searched; searched are {', '.join(names)}.")
    ranges = {name: _range(name, given.get(name), defaults.get(name)) for name in names}
    return Space(defaults, ranges, priors)


def _training_defaults(arguments: Arguments) -> Setting:
    args = arguments.training
    rate = args.bayesian_learning_rate if args.bayesian_learning_rate is not None else args.learning_rate / 10
    return {"learning_rate": rate, "rho_learning_rate": args.rho_learning_rate, "kl_weight": args.kl_weight}


def name_prior(text: str) -> Setting:
    """The setting of a prior in one of the forms that ``--prior`` takes.

    >>> name_prior("moped")
    {'prior': 'moped', 'prior_relative_scale': 1.0}
    """
    prior = parse_prior(text)
    for name, choice in PRIORS.items():
        value = getattr(prior, choice.field, None)
        if value is not None and choice.make(value) == prior:
            return {"prior": name, choice.hyperparameter: value}
    raise ValueError(
        f"`prior` {text!r} is none of those that can be searched ({', '.join(PRIORS)}; normal is centred at 0): "
        "give one of them, or leave prior out of --search."
    )


def _kinds(given: list[Any] | None, own: str) -> tuple[str, ...]:
    kinds = tuple(dict.fromkeys([own, *(given or ("normal", "moped"))]))
    if unknown := [kind for kind in kinds if kind not in PRIORS]:
        raise ValueError(f"`space` has unknown kinds of prior {unknown}; allowed: {', '.join(PRIORS)}.")
    return kinds


def _range(name: str, given: list[Any] | None, own: float | None) -> tuple[float, float]:
    """The given range, widened so that the flags' value, if there is one, lies in it; else by `FACTORS` around it."""
    if own is not None and own <= 0:
        raise ValueError(f"`{name}` is {own:g}, which a logarithmic scale does not hold: leave it out of --search.")
    if given is None:
        usual = {choice.hyperparameter: choice.usual for choice in PRIORS.values()}
        centre = usual[name] if own is None else own
        return centre / FACTORS[name], centre * FACTORS[name]
    numbers = [value for value in given if isinstance(value, int | float) and 0 < value < math.inf]
    if len(numbers) != 2 or len(given) != 2 or numbers[0] >= numbers[1]:
        raise ValueError(f"`space` must give {name} as [low, high] with 0 < low < high, got {given}.")
    return min(numbers if own is None else [*numbers, own]), max(numbers if own is None else [*numbers, own])


def converted_by(setting: Setting, model_args: ModelArguments) -> ModelArguments:
    """``model_args`` with the setting's delta and prior."""
    prior = model_args.prior
    if "prior" in setting:
        choice = PRIORS[setting["prior"]]
        chosen = choice.make(setting[choice.hyperparameter])
        prior = json.dumps({"type": chosen.type, **asdict(chosen)})  # type: ignore[call-overload]
    return replace(model_args, delta=setting["delta"], prior=prior)
