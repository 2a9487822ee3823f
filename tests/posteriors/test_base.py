"""Prediction from draws, for any posterior: mode, labels, random state, problem types."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import BatchEncoding

from bayeformers import to_bayesian
from bayeformers.posteriors import BasePosterior, PointPosterior, Posterior, VariationalPosterior, predict
from bayeformers.sampling.random_state import rng_state
from tests.cases import CASES, Case, case


class Ensemble(BasePosterior):
    """Members that differ in one weight, copied in place: a posterior that knows nothing of Bayesian layers."""

    def __init__(self, model: nn.Module, parameter: nn.Parameter, members: list[Tensor]) -> None:
        self.model, self.parameter, self.members = model, parameter, members
        self.num_draws = len(members)

    def mean(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def draw(self, index: int, seed: int = 0) -> Iterator[None]:
        kept = self.parameter.detach().clone()
        try:
            with torch.no_grad():
                self.parameter.copy_(self.members[index])
            yield
        finally:
            with torch.no_grad():
                self.parameter.copy_(kept)

    def random_parameters(self) -> list[nn.Parameter]:
        return [self.parameter]

    def save(self, directory: Any) -> None:
        raise NotImplementedError


def ensemble(this: Case) -> Ensemble:
    model = this.build()
    weight = this.parameters(model, "head")[0]
    members = [weight + 0.2 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(s)) for s in range(3)]
    return Ensemble(model, weight, [member.detach() for member in members])


@pytest.mark.parametrize("this", CASES, ids=lambda case: case.name)
def test_predict_is_a_loop_over_forwards_without_labels(this: Case) -> None:
    posterior = ensemble(this)
    predictive = posterior.predict({**this.inputs(), **this.labels()}, num_samples=3)
    draws = []
    for member in posterior.members:
        with torch.no_grad():
            posterior.parameter.copy_(member)
            output = posterior.model(**this.inputs())
        if predictive.problem_type == "regression":
            draws.append(output.logits[:, 0])
        elif predictive.problem_type == "multi_label_classification":
            draws.append(torch.stack([(1 - output.logits.sigmoid()).log(), output.logits.sigmoid().log()], -1))
        elif predictive.problem_type == "question_answering":
            mask = this.inputs()["attention_mask"] == 0
            spans = torch.stack([output.start_logits, output.end_logits], 1).masked_fill(mask[:, None], -torch.inf)
            draws.append(spans.log_softmax(-1))
        else:
            draws.append((output.logits_per_image if this.name == "clip" else output.logits).log_softmax(-1))
    result = predictive.values if predictive.log_probs is None else predictive.log_probs
    torch.testing.assert_close(result, torch.stack(draws), rtol=1e-5, atol=1e-6)


def test_no_more_passes_than_draws() -> None:
    posterior = ensemble(case("bert"))
    assert posterior.predict(case("bert").inputs()).num_samples == 3
    assert posterior.predict(case("bert").inputs(), num_samples=2).num_samples == 2
    assert isinstance(posterior, Posterior)


def test_the_mode_of_every_module_is_restored() -> None:
    this = case("bert")
    model = to_bayesian(this.build(), keep_dropout=True)
    model.train()
    model.bert.encoder.layer[1].eval()
    before = {name: module.training for name, module in model.named_modules()}
    posterior = VariationalPosterior(model)
    one = posterior.predict(this.inputs(), num_samples=3)
    assert {name: module.training for name, module in model.named_modules()} == before
    model.eval()
    assert torch.equal(posterior.predict(this.inputs(), num_samples=3).log_probs, one.log_probs)  # no dropout
    for name, module in model.named_modules():
        module.training = before[name]
    for _ in posterior.passes(this.inputs(), num_samples=2):
        assert {name: module.training for name, module in model.named_modules()} == before
    with pytest.raises(ValueError, match="exactly one of input_ids"):
        posterior.predict({"attention_mask": torch.ones(1, 2)})
    assert {name: module.training for name, module in model.named_modules()} == before


def test_the_callers_random_state_is_untouched() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x + torch.randn_like(x))

    models, this = (Noisy(), to_bayesian(Noisy())), case("wav2vec2")
    wav2vec2 = to_bayesian(this.build())
    before = (*rng_state(), random.getstate(), np.random.get_state()[1].tolist())
    for model in models:
        predict(model, torch.ones(2, 3))
    predict(wav2vec2, this.inputs())
    after = (*rng_state(), random.getstate(), np.random.get_state()[1].tolist())
    assert all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(before, after, strict=True))


def test_draws_do_not_depend_on_the_batch() -> None:
    this = case("bert")
    posterior = VariationalPosterior(to_bayesian(this.build(), delta=0.2))
    whole = posterior.predict(this.inputs(), num_samples=4)
    parts = [posterior.predict({k: v[i : i + 1] for k, v in this.inputs().items()}, num_samples=4) for i in range(3)]
    # single rows and batches take different kernels: equal up to float32 rounding
    torch.testing.assert_close(torch.cat([part.log_probs for part in parts], 1), whole.log_probs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["t5", "bart-lm", "whisper"])
def test_labels_give_the_decoder_its_inputs(name: str) -> None:
    this = case(name)
    model = this.build()
    source = {key: value for key, value in this.inputs().items() if not key.startswith("decoder_")}
    predictive = predict(model, {**source, **this.labels()})
    with torch.no_grad():
        expected = model(**source, **this.labels()).logits.log_softmax(-1)
    torch.testing.assert_close(predictive.mean_log_probs, expected)


def test_kinds_of_inputs() -> None:
    this = case("bert")
    model = to_bayesian(this.build())
    expected = predict(model, this.inputs()).log_probs
    assert torch.equal(predict(model, BatchEncoding(this.inputs())).log_probs, expected)
    net = to_bayesian(nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)))
    assert predict(net, torch.ones(4, 3), num_samples=5).log_probs.shape == (5, 4, 2)
    regression = predict(net[2], torch.ones(4, 5), num_samples=5, problem_type="regression", noise_std=0.1)
    assert regression.mean.shape == (4, 2) and (regression.epistemic_variance > 0).all()


def test_noise_of_a_regression_is_the_recorded_one() -> None:
    this = case("bert-regression")
    model = to_bayesian(this.build())
    assert predict(model, this.inputs()).noise_std is None
    model.config.bayesian = {**model.config.bayesian, "noise_std": 0.5}
    predictive = predict(model, this.inputs())
    torch.testing.assert_close(predictive.aleatoric_variance, torch.full((3,), 0.25))
    assert predict(model, this.inputs(), noise_std=2.0).noise_std == 2.0


def test_uncertainty_of_a_point_estimate_is_zero() -> None:
    this = case("bert")
    model = this.build()
    predictive = predict(model, this.inputs())
    assert predictive.num_samples == 1
    torch.testing.assert_close(predictive.mutual_information, torch.zeros(3), rtol=0, atol=1e-6)
    with torch.no_grad():
        assert torch.equal(predictive.log_probs[0], model(**this.inputs()).logits.log_softmax(-1))


def test_a_models_own_posterior_is_used() -> None:
    this = case("bert")
    posterior = ensemble(this)
    posterior.model.posterior = posterior
    assert predict(posterior.model, this.inputs()).num_samples == 3


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"num_samples": 0}, ValueError, "`num_samples` must be a whole number >= 1, got 0"),
    ({"num_samples": 2.0}, ValueError, r"`num_samples` must be a whole number >= 1, got 2\.0"),
    ({"method": "probit"}, ValueError, "`method` must be one of .*got 'probit'"),
    ({"inputs": [1, 2]}, TypeError, "`inputs` must be a mapping of names to tensors, one tensor, or .*got list"),
    ({"inputs": {"past_key_values": ()}}, ValueError, r"`inputs` must not hold \['past_key_values'\]"),
    ({"seed": "a"}, TypeError, "`seed` must be a whole number, got 'a'"),
    ({"seed": -1}, ValueError, "`seed` must be a whole number >= 0, got -1"),
    ({"seed": -1, "method": "glm"}, ValueError, "`seed` must be a whole number >= 0, got -1"),
    ({"model_or_posterior": "bert"}, TypeError, r"must be a torch\.nn\.Module or a Posterior, got str"),
]


@pytest.mark.parametrize(("wrong", "error", "message"), BAD)
def test_errors_say_what_is_wrong(wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    model = to_bayesian(nn.Linear(2, 2))
    with pytest.raises(error, match=message):
        predict(**{"model_or_posterior": model, "inputs": torch.ones(1, 2), **wrong})


def test_the_point_estimate_saves_nothing() -> None:
    with pytest.raises(ValueError, match="no posterior to save"):
        PointPosterior(nn.Linear(2, 2)).save("anywhere")
