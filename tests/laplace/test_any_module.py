"""`fit` for modules of any kind, in any state, and for arguments and data of any kind."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from bayeformers import to_bayesian
from bayeformers.laplace import LaplacePosterior, fit
from tests.laplace.networks import QUIET, batches, built, classes, fitted, mlp, state
from tests.laplace.reference import close, dense, integers, normal

X, Y = normal(12, 4), classes(12)
FIXED: dict[str, Any] = {"prior_precision": 1.0, **QUIET}


@dataclass
class Answer:
    """What no library knows."""

    scores: Tensor


class Custom(nn.Module):
    """Returns an object of its own, or a tuple with the logits second, or one number per example."""

    def __init__(self, kind: str, outputs: int) -> None:
        super().__init__()
        self.body, self.kind = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, outputs)), kind

    def forward(self, x: Tensor) -> Any:
        f = self.body(x)
        return {"object": Answer(f), "tuple": (x, f), "flat": (f[:, 0],)}[self.kind]


ACCESSORS: dict[str, Any] = {"object": lambda o: o.scores, "tuple": lambda o: o[1], "flat": lambda o: o[0]}


@pytest.mark.parametrize(
    ("kind", "likelihood", "outputs"),
    [
        ("object", "classification", 3), ("tuple", "classification", 3), ("object", "multilabel", 3),
        ("tuple", "multilabel", 1), ("object", "regression", 2), ("flat", "regression", 1),
    ],
)  # fmt: skip
def test_any_module_with_an_accessor(kind: str, likelihood: Any, outputs: int, tmp_path: Path) -> None:
    """As the same network that returns a tensor."""
    model = built(Custom(kind, outputs))
    y = {"classification": Y, "multilabel": integers(2, 12, outputs).double(), "regression": normal(12, outputs)}
    labels = y[likelihood][:, 0] if kind == "flat" else y[likelihood]
    accessor = ACCESSORS[kind]
    found = fitted(model, X, labels, likelihood=likelihood, logits=accessor, prior_precision="marglik")
    plain = fitted(model.body, X, y[likelihood], likelihood=likelihood, prior_precision="marglik")
    assert found.log_marginal_likelihood == pytest.approx(plain.log_marginal_likelihood)
    assert found.prior_precision == pytest.approx(plain.prior_precision)
    assert found.noise_std == pytest.approx(plain.noise_std)
    for one, two in zip(found.linearize(X), plain.linearize(X), strict=True):
        torch.testing.assert_close(one, two)
    found.save(tmp_path)
    again = LaplacePosterior.load(tmp_path, model, outputs_of=accessor)
    assert torch.equal(found.predict(X).log_prob(labels), again.predict(X).log_prob(labels))


@pytest.mark.protects("eval_mode")
def test_dropout_is_off_and_training_flags_come_back() -> None:
    noisy = nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.Tanh(), nn.Linear(5, 3)).double()
    noisy.load_state_dict({k.replace("2.", "3."): v for k, v in mlp().state_dict().items()})
    noisy.train()
    noisy[2].eval()
    expected, before, random = fitted(mlp(), X, Y), state(noisy), torch.get_rng_state()
    found = fitted(noisy, X, Y)
    assert state(noisy) == before and torch.equal(torch.get_rng_state(), random)
    for one, two in zip(found.layers.values(), expected.layers.values(), strict=True):
        close(dense(one), dense(two), 1e-14)


def test_a_batch_that_goes_around_the_layers() -> None:
    """An expert that no example of a batch is sent to."""

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            expert = self.first if float(x[0, 0].detach()) > 0 else self.second
            return self.head(torch.tanh(expert(x)))  # type: ignore[no-any-return]

    model = built(Experts())
    positive, negative = X.abs(), -X.abs()
    for kind in ("kfac", "ekfac", "diagonal"):
        options: dict[str, Any] = {"target_modules": ["first"], "curvature": kind, **FIXED}
        found = fit(model, [(positive, Y), (negative, Y)], **options)
        expected = fit(model, [(positive, Y)], **options)
        close(dense(found.layers["first"]), dense(expected.layers["first"]), 1e-12)


def test_last_layer_takes_its_dense_curvature() -> None:
    posterior = fitted(mlp(), X, Y, subset="last_layer")
    assert list(posterior.layers) == ["2"] and posterior.record.config.curvature == "dense"
    assert posterior.record.skipped == {"0": "not the last layer"}


# --------------------------------------------------------------------------------------------------------- bad input


def with_nan() -> nn.Module:
    model = mlp()
    with torch.no_grad():
        model[0].weight[0, 0] = math.nan
    return model


def frozen() -> nn.Module:
    return mlp().requires_grad_(False)


class Odd(nn.Module):
    """Logits (B, T, H, C)."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[:, None, None]  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        (with_nan(), {}, ValueError, "outputs are not finite"),
        (frozen(), {}, ValueError, r"leaves no layer for the posterior \(frozen"),
        (built(Odd()), {}, ValueError, r"`logits` must give \(B, C\) or \(B, T, C\) for 12 examples"),
        (mlp(), {"target_modules": ["none"]}, ValueError, r"`target_modules` names \['none'\], which match no module"),
        (mlp(), {"target_modules": "none.*"}, ValueError, "`target_modules`='none.*' matches no module"),
        (mlp(), {"target_modules": "("}, ValueError, "no valid regular expression"),
        (mlp(), {"target_modules": 3}, TypeError, "`target_modules` must be a string or a list of strings, got 3"),
        (mlp(), {"exclude_modules": ["none"]}, ValueError, r"`exclude_modules` names \['none'\]"),
        (mlp(), {"exclude_modules": ["0", "2"]}, ValueError, r"leaves no layer .*in exclude_modules"),
        (mlp(), {"likelihood": "poisson"}, ValueError, r"`likelihood` must be one of \('classification'.*'poisson'"),
        (mlp(), {"subset": "first"}, ValueError, "`subset` must be one of"),
        (mlp(), {"curvature": "hessian"}, ValueError, "`curvature` must be one of"),
        (mlp(), {"fisher": "true"}, ValueError, "`fisher` must be one of"),
        (mlp(), {"weight_sharing": "sum"}, ValueError, "`weight_sharing` must be one of"),
        (mlp(), {"prior_precision": "best"}, ValueError, "`prior_precision` must be one of"),
        (mlp(), {"prior_precision": -1.0}, ValueError, "`prior_precision` must be a finite number > 0, got -1.0"),
        (mlp(), {"prior_precision": {"0": 1.0}}, ValueError, r"must name each of the 2 layers once"),
        (mlp(), {"prior_precision": "holdout"}, ValueError, "needs `validation`"),
        (mlp(), {"temperature": 0}, ValueError, "`temperature` must be a finite number > 0, got 0"),
        (mlp(), {"noise_std": 0.0, "likelihood": "regression"}, ValueError, "`noise_std` must be .* > 0, got 0.0"),
        (mlp(), {"noise_std": -1.0, "likelihood": "regression"}, ValueError, "`noise_std` must be .* > 0, got -1.0"),
        (mlp(), {"num_batches": 0, "num_data": 5}, ValueError, "`num_batches` must be a whole number >= 1, got 0"),
        (mlp(), {"num_data": 0}, ValueError, "`num_data` must be a whole number >= 1, got 0"),
        (mlp(), {"num_mc_samples": 1.5}, ValueError, "`num_mc_samples` must be a whole number >= 1, got 1.5"),
        (mlp(), {"checkpoint_steps": 0}, ValueError, "`checkpoint_steps` must be a whole number >= 1, got 0"),
        (mlp(), {"seed": 0.5}, TypeError, "`seed` must be a whole number, got 0.5"),
        (mlp(), {"link": "logit"}, ValueError, "`link` must be one of"),
        (mlp(), {"logits": lambda output: output[:, :1]}, ValueError, "one sigmoid logit|at least 2"),
        (mlp(), {"logits": lambda output: output[:3]}, ValueError, r"`logits` must give"),
    ],
)
def test_wrong_arguments(model: nn.Module, options: dict[str, Any], error: type[Exception], message: str) -> None:
    """The reason, and a model as it was."""
    model.train()
    before = str(state(model))  # nan != nan
    with pytest.raises(error, match=message):
        fit(model, batches(X, Y), **{**QUIET, **options})
    assert str(state(model)) == before


@pytest.mark.parametrize(
    ("loader", "error", "message"),
    [
        ([], ValueError, "`dataloader` is empty"),
        (iter([(X, Y), (X, Y)]), TypeError, "`dataloader` is read more than once"),
        ([3], TypeError, "`dataloader` must give mappings"),
        ([{"x": [1, 2], "labels": 0}], TypeError, "must give batches of tensors, got dict without any: wrap a dataset"),
        ([(X, Y.double())], ValueError, "must be integer classes"),
        ([(X, Y + 1)], ValueError, r"in \[0, 3\) or be -100 \(ignored\), got 3"),
        ([(X, Y[:5])], ValueError, r"shape \(12,\)"),
        ([(X, Y), (torch.full_like(X, math.nan), Y)], ValueError, "outputs are not finite"),
    ],
)
def test_wrong_data(loader: list[Any], error: type[Exception], message: str) -> None:
    model = mlp()
    before = state(model)
    with pytest.raises(error, match=message):
        fit(model, loader, **QUIET)
    assert state(model) == before


def test_a_bayesian_model_is_told_apart() -> None:
    with pytest.raises(ValueError, match=r"layers are Bayesian already: call `to_deterministic\(model\)` first"):
        fit(to_bayesian(mlp().float()), batches(X, Y), **QUIET)


def test_heads_over_positions_are_refused() -> None:
    config = hf.BertConfig(vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4)
    model = hf.BertForQuestionAnswering(config)
    before = state(model)
    with pytest.raises(ValueError, match="no Laplace posterior for a 'question_answering' head"):
        fit(model, [{"input_ids": torch.ones(2, 3).long()}], **QUIET)
    assert state(model) == before
