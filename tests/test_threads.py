"""One model, several threads: each answer is that of one thread, bit for bit, and the model is untouched."""

from __future__ import annotations

import contextlib
import logging
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from bayeformers import fixed_draw, predict, to_bayesian
from bayeformers.delta import calibrate_delta
from bayeformers.laplace import example_gradients, fit
from bayeformers.posteriors import BasePosterior, PointPosterior, VariationalPosterior
from bayeformers.quantization import quantize
from bayeformers.sampling.random_state import is_drawing, left_alone, preserved
from bayeformers.sampling.views import private_view
from tests.cases import case

COUNT = 2


@pytest.fixture(autouse=True)
def _switch_often() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def at_once(jobs: list[Callable[[], Any]], rounds: int = COUNT, threads: int = 4) -> list[list[Any]]:
    """Every job's answers, by threads that each run all jobs in an order of their own."""
    barrier, found, errors = threading.Barrier(threads), [[] for _ in jobs], list[BaseException]()

    def run(number: int) -> None:
        order = random.Random(number)
        barrier.wait()
        try:
            for _ in range(rounds):
                for index in order.sample(range(len(jobs)), len(jobs)):
                    found[index].append(jobs[index]())
        except BaseException as error:
            errors.append(error)

    runners = [threading.Thread(target=run, args=(number,)) for number in range(threads)]
    for runner in runners:
        runner.start()
    for runner in runners:
        runner.join()
    if errors:
        raise errors[0]
    return found


def everything(model: nn.Module) -> dict[str, Any]:
    """State, modes, flags, hooks and attributes of every module, and the default generator."""
    found: dict[str, Any] = {"generator": torch.get_rng_state().tolist()}
    for name, value in model.state_dict().items():
        found[f"state {name}"] = (value.double().sum().item(), value.data_ptr())
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found[f"flag {name}"] = (parameter.requires_grad, id(parameter), parameter.grad)
    for name, module in model.named_modules():
        hooks = (*module._forward_hooks.items(), *module._forward_pre_hooks.items())
        found[f"module {name}"] = (type(module), module.training, sorted(vars(module)), hooks)
    return found


def assert_same(found: Any, expected: Any) -> None:
    if isinstance(expected, Tensor):
        assert torch.equal(found, expected)
    else:
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            assert_same(a, b)


def text() -> tuple[nn.Module, dict[str, Tensor]]:
    this = case("bert")
    return this.build(), {name: value for name, value in this.inputs().items() if isinstance(value, Tensor)}


def probabilities(posterior: Any, inputs: Any, **options: Any) -> Tensor:
    return predict(posterior, inputs, **options).mean_log_probs


@pytest.mark.parametrize("training", [False, True])
def test_predictions_of_a_converted_model(training: bool) -> None:
    """Samples of several seeds, the linearised network, a plain forward and a held draw."""
    model, inputs = text()
    model = to_bayesian(model, delta=0.3).train(training)
    kept = VariationalPosterior(model)
    jobs: list[Callable[[], Any]] = [
        lambda: probabilities(model, inputs, num_samples=4),
        lambda: probabilities(kept, inputs, num_samples=4),
        lambda: probabilities(kept, inputs, num_samples=4, seed=1),
        lambda: kept.linearize(inputs),
        lambda: held(model, inputs, 0),
        lambda: held(model, inputs, 1),
    ]
    if not training:
        jobs.append(lambda: model(**inputs).logits.detach())
    expected, before = [job() for job in jobs], everything(model)
    for answers, wanted in zip(at_once(jobs), expected, strict=True):
        for answer in answers:
            assert_same(answer, wanted)
    assert everything(model) == before


def held(model: nn.Module, inputs: dict[str, Tensor], index: int) -> Tensor:
    with torch.no_grad(), fixed_draw(model, index):
        logits: Tensor = model(**inputs).logits
        return logits


def test_a_laplace_posterior() -> None:
    """Samples, the linearised network, gradients and plain forwards; fits of the same model meanwhile."""
    model, inputs = text()
    model.train()
    labels = torch.tensor([0, 1, 2])
    batches = [{**inputs, "labels": labels}]
    posterior = fit(model, batches, progress=False)
    jobs: list[Callable[[], Any]] = [
        lambda: probabilities(posterior, inputs, num_samples=3, method="sample"),
        lambda: probabilities(posterior, inputs, num_samples=3, method="sample", seed=1),
        lambda: probabilities(posterior, inputs),
        lambda: probabilities(posterior, inputs, method="mc_glm", num_samples=3),
        lambda: probabilities(posterior, inputs, method="lr_glm", num_samples=3),
        lambda: example_gradients(posterior, inputs, labels).matrix("classifier"),
        lambda: torch.tensor(fit(model, batches, subset="last_layer", progress=False).log_marginal_likelihood),
        lambda: probabilities(PointPosterior(model), inputs),
    ]
    expected, before = [job() for job in jobs], everything(model)
    for answers, wanted in zip(at_once(jobs, rounds=1), expected, strict=True):
        for answer in answers:
            assert_same(answer, wanted)
    assert everything(model) == before


def test_int8_and_the_search_for_delta() -> None:
    model, inputs = text()
    quantized = quantize(to_bayesian(text()[0], delta=0.2), inputs)
    jobs: list[Callable[[], Any]] = [
        lambda: probabilities(quantized, inputs, num_samples=3),
        lambda: torch.tensor(calibrate_delta(model, inputs, torch.tensor([0, 1, 2]), num_samples=2, progress=False)),
        lambda: model(**inputs).logits.detach(),
    ]
    expected, before = [job() for job in jobs], everything(model)
    for answers, wanted in zip(at_once(jobs, rounds=1, threads=3), expected, strict=True):
        for answer in answers:
            assert_same(answer, wanted)
    assert everything(model) == before


def test_two_threads_inside_a_laplace_draw() -> None:
    """It moves the model's own weights: one caller at a time, nested as one likes, and they come back bit by bit."""
    model, inputs = text()
    posterior = fit(model, [{**inputs, "labels": torch.tensor([0, 1, 2])}], progress=False)

    def drawn(index: int) -> Tensor:
        with torch.no_grad(), posterior.draw(index):
            first = model(**inputs).logits
            with posterior.draw(index + 5):
                pass
            assert torch.equal(first, model(**inputs).logits)
            return first

    expected, before = [drawn(0), drawn(1)], everything(model)
    for answers, wanted in zip(at_once([lambda: drawn(0), lambda: drawn(1)]), expected, strict=True):
        assert all(torch.equal(answer, wanted) for answer in answers)
    assert everything(model) == before


class Noisy(nn.Module):
    """Draws from the default generator in `eval()` too."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x + torch.randn_like(x))


def test_the_random_state_is_put_back_for_a_model_that_draws() -> None:
    """And for no other: a thread that draws meanwhile is not wound back."""
    x = torch.randn(3, 4)
    noisy, quiet = to_bayesian(Noisy()), to_bayesian(nn.Sequential(nn.Linear(4, 3)))
    stop = threading.Event()
    idle = threading.Thread(target=stop.wait)
    idle.start()
    try:
        torch.manual_seed(3)
        state = torch.get_rng_state()
        predict(noisy, x, num_samples=3)
        predict(noisy, x, method="glm")
        assert torch.equal(torch.get_rng_state(), state)
    finally:
        stop.set()
        idle.join()
    drawn = list[float]()
    drawing = threading.Thread(target=lambda: drawn.extend(torch.rand(()).item() for _ in range(20_000)))
    drawing.start()
    while drawing.is_alive():
        predict(quiet, x, num_samples=4)
    torch.manual_seed(3)
    assert len(set(drawn)) > 19_900  # float32 has few numbers: some come twice


def elsewhere(job: Callable[[], Any]) -> Any:
    """Its answer, from another thread."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(job()))
    thread.start()
    thread.join()
    return found[0]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_without_dropout_draws_nothing(attention: str) -> None:
    """Its kernels could draw: told from their default, for a caller seldom names a dropout of 0."""
    config = hf.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        attn_implementation=attention,
    )  # fmt: skip
    model, ids = hf.BertModel(config), torch.tensor([[1, 2, 3]])
    stop = threading.Event()
    idle = threading.Thread(target=stop.wait)
    idle.start()
    try:
        assert not is_drawing(model.eval(), lambda: model(ids))
        dropping = hf.BertModel(config).train()
        assert is_drawing(dropping, lambda: dropping(ids))
    finally:
        stop.set()
        idle.join()


def test_the_random_state_is_not_put_back_under_a_thread_that_trains() -> None:
    """Neither by a fit nor by a prediction: training would meet the same noise again."""
    x, noisy = torch.randn(3, 4), to_bayesian(Noisy())
    training = to_bayesian(nn.Sequential(nn.Linear(4, 3))).train()
    torch.manual_seed(3)
    with preserved():
        first = elsewhere(lambda: training(x))
        torch.rand(())
    assert not torch.equal(first, elsewhere(lambda: training(x)))
    state = torch.get_rng_state()
    with preserved():
        torch.rand(())
        elsewhere(lambda: noisy.eval()(x))  # draws, but no training: nobody can tell
    assert torch.equal(torch.get_rng_state(), state)
    with left_alone(noisy, lambda: noisy(x)):
        second = elsewhere(lambda: training(x))
    assert not torch.equal(second, elsewhere(lambda: training(x)))


@pytest.mark.parametrize("platform", [sys.platform, "win32"])
@pytest.mark.parametrize("computes", [True, False])
def test_nor_under_a_thread_that_computes(platform: str, computes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plain model's training cannot be counted, but be seen: by its processor time, where the system tells it."""
    monkeypatch.setattr(sys, "platform", platform)
    go, done, leave = threading.Event(), threading.Event(), threading.Event()

    def run() -> None:
        go.wait()
        while computes and time.thread_time() < 0.05:
            sum(range(1000))
        done.set()
        leave.wait()

    thread = threading.Thread(target=run, daemon=not computes)
    thread.start()
    state = torch.get_rng_state()
    with preserved():
        torch.rand(())
        go.set()
        done.wait()
    leave.set()
    thread.join()
    assert torch.equal(torch.get_rng_state(), state) != computes


def test_what_another_thread_computes_inside_counts_for_nobody() -> None:
    """It puts its own numbers back, and the last one out puts back what the first one found."""
    go, done, leave = threading.Event(), threading.Event(), threading.Event()

    def run() -> None:
        go.wait()
        with preserved():
            torch.rand(())
            while time.thread_time() < 0.05:
                sum(range(1000))
        done.set()
        leave.wait()

    thread = threading.Thread(target=run)
    thread.start()
    state = torch.get_rng_state()
    with preserved():
        torch.rand(())
        go.set()
        done.wait()
    leave.set()
    thread.join()
    assert torch.equal(torch.get_rng_state(), state)


class Closed(nn.Module):
    """Holds on to a module in a closure: no view can be made of it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)
        first = self.first
        self.run = lambda x: self.second(torch.tanh(first(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)


def test_a_model_without_a_view(caplog: pytest.LogCaptureFixture) -> None:
    """One prediction at a time, on the model itself."""
    torch.manual_seed(0)
    x, model = torch.randn(3, 4), Closed().train()
    assert private_view(model) is None
    posterior = fit(model, [(x, torch.tensor([0, 1, 2]))], progress=False)
    bayesian = to_bayesian(Closed(), delta=0.3).train()
    jobs: list[Callable[[], Any]] = [
        lambda: probabilities(posterior, x, num_samples=3, method="sample"),
        lambda: probabilities(posterior, x),
        lambda: probabilities(bayesian, x, num_samples=3),
        lambda: probabilities(bayesian, x, method="glm"),
    ]
    expected, before = [job() for job in jobs], (everything(model), everything(bayesian))
    for answers, wanted in zip(at_once(jobs), expected, strict=True):
        assert all(torch.equal(answer, wanted) for answer in answers)
    assert (everything(model), everything(bayesian)) == before


def test_a_posterior_that_knows_no_views() -> None:
    """Of somebody else: it draws in the model itself, one prediction after the other."""

    class Scaled(BasePosterior):
        def __init__(self, model: nn.Linear) -> None:
            self.model = model

        def mean(self) -> Any:
            return self.draw(-1)

        def draw(self, index: int, seed: int = 0) -> Any:
            @contextlib.contextmanager
            def held() -> Iterator[None]:
                kept = self.model.weight.detach().clone()
                with torch.no_grad():
                    self.model.weight.mul_(index + 2)
                    try:
                        yield
                    finally:
                        self.model.weight.copy_(kept)

            return held()

        def random_parameters(self) -> list[nn.Parameter]:
            return [self.model.weight]

        def save(self, directory: Any) -> None: ...

    posterior, x = Scaled(nn.Linear(4, 3)), torch.randn(2, 4)
    expected = probabilities(posterior, x, num_samples=3)
    (answers,) = at_once([lambda: probabilities(posterior, x, num_samples=3)])
    assert all(torch.equal(answer, expected) for answer in answers)


@pytest.mark.slow
def test_mixed_calls(caplog: pytest.LogCaptureFixture) -> None:
    """8 threads, 200 calls each: predictions, generation and plain forwards of the same models."""
    caplog.set_level(logging.ERROR)
    model, inputs = text()
    posterior = fit(model, [{**inputs, "labels": torch.tensor([0, 1, 2])}], progress=False)
    converted = to_bayesian(text()[0], delta=0.3)
    writer = to_bayesian(case("gpt2-lm").build(), delta=0.3).eval()
    ids = case("gpt2-lm").inputs()["input_ids"][:, :3]

    def written(index: int) -> Tensor:
        with fixed_draw(writer, index):
            found: Tensor = writer.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)  # type: ignore[operator]
            return found

    jobs: list[Callable[[], Any]] = [
        lambda: probabilities(converted, inputs, num_samples=3),
        lambda: probabilities(converted, inputs, method="glm"),
        lambda: probabilities(posterior, inputs),
        lambda: probabilities(posterior, inputs, num_samples=3, method="sample"),
        lambda: written(0),
        lambda: written(1),
        lambda: model(**inputs).logits.detach(),
        lambda: converted(**inputs).logits.detach(),
    ]
    models = (model, converted, writer)
    expected, before = [job() for job in jobs], [everything(one) for one in models]
    wrong = sum(
        not torch.equal(answer, wanted)
        for answers, wanted in zip(at_once(jobs, rounds=25, threads=8), expected, strict=True)
        for answer in answers
    )
    assert wrong == 0 and [everything(one) for one in models] == before


def test_a_subclass_with_a_draw_of_its_own_is_asked_for_it() -> None:
    """It says what a draw is, though its parent knows views."""

    class Twice(PointPosterior):
        def draw(self, index: int, seed: int = 0) -> Any:
            return fixed_draw(self.model, 0)

    model, x = to_bayesian(nn.Linear(4, 3), delta=0.5), torch.randn(2, 4)
    expected = predict(model, x, num_samples=1).log_probs
    assert not Twice(model).draws_in_views and PointPosterior(model).draws_in_views
    assert torch.equal(Twice(model).predict(x).log_probs, expected)
