"""Wrong use of models, draws, predictions and Laplace posteriors: one clear error that names the argument.

Each row is a call and what its message must name; the models that the calls share are compared before and after, bit
for bit, with modes, hooks, held draws and the generator. `tests/test_bad_input.py` has the arguments of a conversion.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import bayeformers as bf
from bayeformers import laplace
from tests.cases import case
from tests.wrong_use import INF, NAN, Call, Row, World, check, enter, rows


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


# ---------------------------------------------------------------------------------------------- models and draws

NOT_A_MODEL = (None, 3, "bert", torch.zeros(2), {}, nn.Linear)
OF_A_MODEL: dict[str, Callable[[Any], Any]] = {
    "summary": bf.summary,
    "kl_divergence": bf.kl_divergence,
    "log_prior": bf.log_prior,
    "log_variational_posterior": bf.log_variational_posterior,
    "bayesian_config": bf.bayesian_config,
    "to_deterministic": bf.to_deterministic,
    "unfreeze": bf.unfreeze,
    "is_bayesian": bf.is_bayesian,
    "signal_to_noise": bf.signal_to_noise,
    "prune": lambda model: bf.prune(model, 0.5),
    "fixed_draw": lambda model: enter(bf.fixed_draw(model, 0)),
    "posterior_mean": lambda model: enter(bf.posterior_mean(model)),
    "predict": lambda model: bf.predict(model, torch.zeros(1, 3)),
    "fit": lambda model: laplace.fit(model, [], progress=False),
    "calibrate_delta": lambda model: bf.calibrate_delta(model, torch.zeros(1, 3), torch.zeros(1).long()),
    "posterior_as_prior": bf.posterior_as_prior,
    "VariationalPosterior": bf.VariationalPosterior,
}


@pytest.mark.parametrize("value", NOT_A_MODEL, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("name", OF_A_MODEL)
def test_not_a_model(world: World, name: str, value: Any) -> None:
    check(world, lambda _: OF_A_MODEL[name](value), ("`model",))


@rows([
    ("prune a plain model", lambda w: bf.prune(w.plain, 0.5), ("to_bayesian",)),
    ("signal to noise of a plain model", lambda w: bf.signal_to_noise(w.plain), ("to_bayesian",)),
    ("log_prior of a plain model", lambda w: bf.log_prior(w.plain), ("to_bayesian",)),
    ("log_q of a plain model", lambda w: bf.log_variational_posterior(w.plain), ("to_bayesian",)),
    ("prior from a plain model", lambda w: bf.posterior_as_prior(w.plain), ("to_bayesian",)),
    ("unfreeze a plain model", lambda w: bf.unfreeze(w.plain), ("to_bayesian",)),
    ("undo twice", lambda w: bf.to_deterministic(w.plain), ("to_bayesian",)),
    ("convert twice", lambda w: bf.to_bayesian(w.model), ("twice",)),
    ("convert a part of a converted model", lambda w: bf.to_bayesian(w.model.bert.encoder), ("already",)),
    *(
        (f"prune {value!r}", lambda w, value=value: bf.prune(w.model, value), ("`share`", repr(value)))
        for value in (-0.1, 1.5, NAN, INF, "half", None, True, [0.5])
    ),
    *(
        (f"draw {value!r}", lambda w, value=value: enter(bf.fixed_draw(w.model, value)), ("`index`",))
        for value in (-3, 0.5, NAN, "0", None, [0], 1 + 0j)
    ),
    *(
        (f"seed {value!r}", lambda w, value=value: enter(bf.fixed_draw(w.model, 0, value)), ("`seed`",))
        for value in (0.5, NAN, "0", None, [0])
    ),
    ("summary of text", lambda w: bf.summary("bert"), ("`model`",)),
    ("a scale that is unknown", lambda w: bf.to_bayesian(w.plain, scale="log"), ("`scale`", "log", "additive")),
    ("norms by name", lambda w: bf.to_bayesian(w.plain, norms="yes"), ("`norms`", "yes")),
    (
        "an estimator for no layer",
        lambda w: bf.to_bayesian(w.plain, estimator={"nothing_like_it": "flipout"}),
        ("`estimator`", "nothing_like_it"),
    ),
    (
        "an unknown estimator for a layer",
        lambda w: bf.to_bayesian(w.plain, estimator={"classifier": "flipot"}),
        ("`estimator`", "flipot"),
    ),
    ("the prior of a plain model", lambda w: bf.to_bayesian(w.hand, prior=w.plain), ("prior", "to_bayesian")),
    (
        "fresh layers that are not there",
        lambda w: bf.to_bayesian(
            case("bert").build(), prior=bf.posterior_as_prior(w.model, exclude=["nothing_like_it"])
        ),
        ("nothing_like_it",),
    ),
    (
        "a relative scale of zero",
        lambda w: bf.posterior_as_prior(w.model, relative_scale=0.0),
        ("`relative_scale`", "0.0"),
    ),
    ("excluded by number", lambda w: bf.posterior_as_prior(w.model, exclude=[3]), ("`exclude`", "3")),
    ("a register of no class", lambda w: bf.register_layer("Linear"), ("Linear",)),
])
def test_models_and_draws(world: World, call: Call, named: tuple[str, ...]) -> None:
    check(world, call, named)


# ------------------------------------------------------------------------------------------------------- prediction


def with_problem(problem: Any) -> Call:
    return lambda w: bf.predict(w.net, w.x, problem_type=problem)


@rows([
    *(
        (f"{value!r} samples", lambda w, value=value: bf.predict(w.net, w.x, num_samples=value), ("`num_samples`",))
        for value in (0, -1, 1.5, NAN, "16", None, True, [4])
    ),
    *(
        (f"seed {value!r}", lambda w, value=value: bf.predict(w.net, w.x, seed=value), ("`seed`",))
        for value in (0.5, "0", None)
    ),
    *(
        (f"problem {value!r}", with_problem(value), ("problem_type", repr(value)))
        for value in ("multilabel", "regresion", "softmax", "", 3, ["regression"])
    ),
    *(
        (f"method {value!r}", lambda w, value=value: bf.predict(w.net, w.x, method=value), ("method", repr(value)))
        for value in ("samples", "laplace", "", 3)
    ),
    *(
        (
            f"method {value!r} of a Laplace posterior",
            lambda w, value=value: bf.predict(w.posterior, w.x, method=value),
            ("method", repr(value)),
        )
        for value in ("samples", "linear", 3)
    ),
    *(
        (
            f"link {value!r}",
            lambda w, value=value: bf.predict(w.posterior, w.x, method="glm", link=value),
            ("link", repr(value)),
        )
        for value in ("logit", "", 3)
    ),
    *(
        (
            f"noise {value!r}",
            lambda w, value=value: bf.predict(w.net, w.x, problem_type="regression", noise_std=value),
            ("`noise_std`", repr(value)),
        )
        for value in (0, -1.0, NAN, INF, "wide", True)
    ),
    ("no inputs", lambda w: bf.predict(w.net, None), ("`inputs`",)),
    ("inputs by name of a file", lambda w: bf.predict(w.net, "data.csv"), ("`inputs`",)),
    ("a number as inputs", lambda w: bf.predict(w.net, 3.0), ("`inputs`",)),
    ("a text as inputs of BERT", lambda w: bf.predict(w.model, "a text"), ("`inputs`",)),
    ("a list of texts as inputs of BERT", lambda w: bf.predict(w.model, ["a text", "another"]), ("`inputs`",)),
    ("an array as inputs", lambda w: bf.predict(w.net, np.zeros((2, 3), np.float32)), ("`inputs`",)),
    ("labels of another length", lambda w: bf.predict(w.net, w.x).log_prob(torch.zeros(4).long()), ("`labels`",)),
    ("labels that are floats", lambda w: bf.predict(w.net, w.x).log_prob(torch.full((5,), 0.5)), ("`labels`",)),
    ("labels out of range", lambda w: bf.predict(w.net, w.x).log_prob(torch.full((5,), 2)), ("`labels`", "2")),
    ("labels below zero", lambda w: bf.predict(w.net, w.x).log_prob(torch.full((5,), -1)), ("`labels`", "-1")),
    ("labels as a list", lambda w: bf.predict(w.net, w.x).log_prob([0, 1, 0, 1, 0]), ("`labels`",)),
    ("no labels", lambda w: bf.predict(w.net, w.x).log_prob(None), ("`labels`",)),
    (
        "labels of two columns",
        lambda w: bf.predict(w.net, w.x).log_prob(torch.zeros(5, 2).long()),
        ("`labels`",),
    ),
    (
        "a spread of classes",
        lambda w: bf.predict(w.net, w.x).epistemic_variance,
        ("no values",),
    ),
    (
        "a draw cache below zero",
        lambda w: bf.VariationalPosterior(w.net, draw_cache_bytes=-1),
        ("draw_cache_bytes",),
    ),
    (
        "a draw cache by name",
        lambda w: bf.VariationalPosterior(w.net, draw_cache_bytes="2GB"),
        ("draw_cache_bytes",),
    ),
])
def test_prediction(world: World, call: Call, named: tuple[str, ...]) -> None:
    check(world, call, named)


@rows([
    *(
        (f"{name} = {value!r}", lambda w, n=name, v=value: bf.calibrate_delta(w.net, w.x, w.y, **{n: v}), (name,))
        for name, values in {
            "num_samples": (0, -1, 1.5, "16", None, True),
            "seed": (0.5, "0", None),
            "method": ("laplace", "", 3, None),
            "bounds": ((1.0, 0.1), (0.0, 1.0), (-1.0, 1.0), (NAN, 1.0), (0.1,), "wide", 0.1),
            "tolerance": (0, -1.0, NAN, "fine"),
        }.items()
        for value in values
    ),
    ("labels of another length", lambda w: bf.calibrate_delta(w.net, w.x, w.y[:2]), ("labels",)),
    ("labels that are floats", lambda w: bf.calibrate_delta(w.net, w.x, torch.full((5,), 0.5)), ("labels",)),
    ("labels out of range", lambda w: bf.calibrate_delta(w.net, w.x, torch.full((5,), 7)), ("labels", "7")),
    ("no batches", lambda w: bf.calibrate_delta(w.net, [], []), ("inputs",)),
    ("more labels than batches", lambda w: bf.calibrate_delta(w.net, [w.x], [w.y, w.y]), ("labels",)),
])
def test_calibrate_delta(world: World, call: Call, named: tuple[str, ...]) -> None:
    check(world, call, named)


# ------------------------------------------------------------------------------------------------------------ Laplace


def fit(**options: Any) -> Call:
    return lambda w: laplace.fit(w.hand, options.pop("batches", [(w.x, w.y)]), progress=False, **options)


def fitted(**values: tuple[Any, ...]) -> list[Row]:
    return [(f"{n} = {v!r}", fit(**{n: v}), (n,)) for n, choices in values.items() for v in choices]


@rows([
    *fitted(
        likelihood=("softmax", "", 3),
        subset=("head", "", None),
        curvature=("hessian", "", None),
        fisher=("true", None),
        weight_sharing=("share", None),
        prior_precision=(0.0, -1.0, NAN, INF, "evidence", True, {"0": -1.0}, {"nowhere": 1.0}, {}),
        temperature=(0.0, -1.0, NAN, "hot", None),
        noise_std=(0.0, -1.0, NAN, "wide"),
        num_batches=(0, -1, 1.5, "one"),
        num_data=(0, -5, 2.5, "many"),
        num_mc_samples=(0, -1, 0.5, None),
        seed=(0.5, "0", None),
        target_modules=(["nothing_like_it"], [], 3, "["),
        exclude_modules=(["nothing_like_it"], 3),
        link=("logit", 3),
    ),
    ("no batch", fit(batches=[]), ("batch",)),
    ("batches that are no batches", fit(batches=["a", "b"]), ("`dataloader`", "str")),
    ("a number instead of a loader", fit(batches=3), ("dataloader",)),
    ("labels out of range", lambda w: laplace.fit(w.hand, [(w.x, w.y + 5)], progress=False), ("label",)),
    ("labels of another length", lambda w: laplace.fit(w.hand, [(w.x, w.y[:2])], progress=False), ("label",)),
    ("labels that are floats", lambda w: laplace.fit(w.hand, [(w.x, w.y / 2)], progress=False), ("label",)),
    (
        "inputs that are not finite",
        lambda w: laplace.fit(w.hand, [(w.x * NAN, w.y)], progress=False),
        ("finite",),
    ),
    (
        "held-out rows that are not there",
        lambda w: laplace.fit(w.hand, [(w.x, w.y)], prior_precision="holdout", progress=False),
        ("validation",),
    ),
    (
        "held-out rows without labels",
        lambda w: laplace.fit(w.hand, [(w.x, w.y)], validation=[w.x], progress=False),
        ("validation",),
    ),
    ("a Bayesian model", lambda w: laplace.fit(w.net, [(w.x, w.y)], progress=False), ("Bayesian", "to_deterministic")),
    ("a model of no layer", lambda w: laplace.fit(nn.Tanh(), [(w.x, w.y)], progress=False), ("layer",)),
    ("a temperature of zero", lambda w: w.posterior.with_temperature(0.0), ("temperature", "0.0")),
    ("a precision below zero", lambda w: w.posterior.with_prior_precision(-1.0), ("prior_precision", "-1")),
    ("a precision by name", lambda w: w.posterior.with_prior_precision("high"), ("prior_precision", "high")),
    ("noise of classes", lambda w: w.posterior.with_noise_std(0.0), ("noise_std", "0.0")),
    ("a draw below zero", lambda w: enter(w.posterior.draw(-1)), ("index", "-1")),
    ("half a draw", lambda w: enter(w.posterior.draw(0.5)), ("index", "0.5")),
    ("a draw by name", lambda w: enter(w.posterior.draw("0")), ("index",)),
    ("a seed by name", lambda w: enter(w.posterior.draw(0, "1")), ("seed",)),
    ("no samples", lambda w: w.posterior.predict(w.x, method="sample", num_samples=0), ("num_samples",)),
    ("a direction that is not there", lambda w: laplace.eigen_direction(w.posterior, 10**6), ("direction",)),
    ("a direction by name", lambda w: laplace.eigen_direction(w.posterior, "largest"), ("direction",)),
    ("a layer that is not there", lambda w: laplace.eigen_direction(w.posterior, 0, "nowhere"), ("nowhere",)),
    ("the spectrum of no layer", lambda w: laplace.factor_spectrum(w.posterior, "nowhere"), ("nowhere",)),
    ("a rank of zero", lambda w: laplace.inf_posterior(w.posterior, 0), ("rank",)),
    ("a rank by name", lambda w: laplace.inf_posterior(w.posterior, "full"), ("rank",)),
    ("tuned to nothing", lambda w: laplace.tune(w.posterior, "evidence"), ("prior_precision", "evidence")),
    ("tuned on no rows", lambda w: laplace.tune(w.posterior, "holdout"), ("validation",)),
    ("gradients of no inputs", lambda w: laplace.example_gradients(w.posterior, None), ("inputs",)),
    (
        "gradients of labels out of range",
        lambda w: laplace.example_gradients(w.posterior, w.x, w.y + 9),
        ("label",),
    ),
    ("a natural gradient of nothing", lambda w: laplace.natural_gradient(w.posterior, {}), ("gradients",)),
    ("saved to a file", lambda w: w.posterior.save(w.laplace / "config.json"), ("config.json",)),
])
def test_laplace(world: World, call: Call, named: tuple[str, ...]) -> None:
    check(world, call, named)
