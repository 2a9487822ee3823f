"""What a search of hyperparameters may choose, and how a choice becomes a conversion and training arguments.

A `Setting` holds numbers by name, and the kind of prior. The prior's scale, often written tau, has a name and a unit of
its own for each kind: `prior_std` is a standard deviation, `prior_relative_scale` a factor of the initial scale
delta |w|. Every number is searched on a logarithmic scale around the value that the flags give it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from ..distributions import MopedPrior, NormalPrior, Prior
from .arguments import BestEpochArguments, ConversionArguments, check_least, flag, parse_prior

if TYPE_CHECKING:
    from optuna.trial import BaseTrial

Setting = dict[str, Any]
How = TypeVar("How", bound=ConversionArguments)
SEARCHED = ("delta", "prior", "learning_rate", "rho_learning_rate", "kl_weight")
TRAINING = ("learning_rate", "rho_learning_rate", "kl_weight")
"""Names of a setting that are training arguments."""


@dataclass
class SearchArguments:
    """How long to search, what, and how the result is confirmed."""

    n_trials: int = flag(6, "Trials of the study in all, earlier runs' included; the first is what the flags say.")
    search: list[str] | None = flag(None, f"What to search: all, or some of {' '.join(SEARCHED)}.")
    space: str | None = flag(
        None,
        "JSON of ranges and of the kinds of prior to choose from, in place of those around the flags' "
        'values: {"delta": [0.1, 0.5], "prior": ["normal", "moped"], "prior_std": [0.05, 0.5]}.',
    )
    startup_trials: int = flag(4, "Trials drawn at random, and none pruned, before what was found is used.")
    prune: bool = flag(True, "Stop a trial that is worse than the median before it; --no_prune: none.")
    confirm_seeds: int = flag(
        3, "Fresh seeds on which the best setting and the defaults are trained again, for the test."
    )

    def __post_init__(self) -> None:
        check_least(self, n_trials=2, startup_trials=1, confirm_seeds=0)
        if self.confirm_seeds == 1:
            raise ValueError("`confirm_seeds` must be 0 (no confirmation) or at least 2, got 1: it has no spread.")
        if unknown := sorted(set(self.search or ()) - set(SEARCHED)):
            raise ValueError(f"`search` must name some of {', '.join(SEARCHED)}, got {', '.join(unknown)}.")
        self.read_space()

    @property
    def deciding(self) -> dict[str, Any]:
        """What decides a trial's value: not how many there are."""
        own = {name: getattr(self, name) for name in ("search", "startup_trials", "prune")}
        return {**own, "space": self.read_space()}

    def read_space(self) -> dict[str, list[Any]]:
        """``space`` as an object; empty where it is not given."""
        try:
            space = json.loads(self.space or "{}")
        except json.JSONDecodeError as error:
            raise ValueError(f"`space` {self.space!r} is not JSON: {error}.") from None
        if not isinstance(space, dict) or not all(isinstance(value, list) for value in space.values()):
            raise ValueError(f"`space` must be a JSON object of lists, got {self.space!r}.")
        return space


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


def make_space(search: SearchArguments, how: ConversionArguments, args: BestEpochArguments, delta: float) -> Space:
    """Return the space around the setting of the flags.

    Args:
        search: what is searched, and in which ranges.
        how: the conversion's flags, with the prior of the defaults.
        args: the training's flags, with the rates and the KL's weight of the defaults.
        delta: of the defaults; it may have been calibrated.

    Raises:
        ValueError: something to be searched has no value that it could be searched around, or a range is malformed.
    """
    given = search.read_space()
    names = [name for name in SEARCHED if name in (search.search or SEARCHED)]
    if how.freeze and "learning_rate" in names:
        if search.search is not None or "learning_rate" in given:
            raise ValueError("`learning_rate` moves the means, which are frozen: add --no_freeze, or do not search it.")
        names.remove("learning_rate")
    rate = args.bayesian_learning_rate if args.bayesian_learning_rate is not None else args.learning_rate / 10
    defaults: Setting = {"delta": delta, "learning_rate": rate}
    defaults |= {"rho_learning_rate": args.rho_learning_rate, "kl_weight": args.kl_weight}
    priors: tuple[str, ...] = ()
    if "prior" in names:
        own = name_prior(how.prior)
        defaults |= own
        priors = _kinds(given.pop("prior", None), own["prior"])
        scales = dict.fromkeys(PRIORS[kind].hyperparameter for kind in priors)
        names[names.index("prior") : names.index("prior") + 1] = scales
    if unknown := sorted(set(given) - set(names)):
        raise ValueError(f"`space` has {', '.join(unknown)}, which is not searched; searched are {', '.join(names)}.")
    ranges = {name: _range(name, given.get(name), defaults.get(name)) for name in names}
    return Space(defaults, ranges, priors)


def name_prior(text: str) -> Setting:
    """The setting of a prior in one of the forms that ``--prior`` takes, such as "moped"."""
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


def converted_by(setting: Setting, how: How) -> How:
    """The conversion's flags with the setting's delta and prior."""
    prior = how.prior
    if "prior" in setting:
        choice = PRIORS[setting["prior"]]
        chosen = choice.make(setting[choice.hyperparameter])
        prior = json.dumps({"type": chosen.type, **asdict(chosen)})  # type: ignore[call-overload]
    return replace(how, delta=setting["delta"], prior=prior)
