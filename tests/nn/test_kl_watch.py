"""A training without a KL is named once; one that has it, wherever it adds it, never."""

import copy
import gc
import logging
import pickle
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from bayeformers import (
    kl_divergence,
    log_prior,
    log_variational_posterior,
    posterior_mean,
    to_bayesian,
    to_deterministic,
)
from bayeformers import nn as bnn
from bayeformers.nn import kl_watch
from tests.training import tiny

X, Y = torch.ones(4, 3), torch.zeros(4, 2)


def converted() -> nn.Module:
    torch.manual_seed(0)
    return to_bayesian(nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)), freeze=False).train()


def by_hand() -> nn.Module:
    return nn.Sequential(bnn.Linear(3, 3), nn.Tanh(), bnn.Linear(3, 2)).train()


def nll(model: nn.Module) -> Tensor:
    return (model(X) - Y).square().mean()


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "without its KL" in record.getMessage()]


def loop(model: nn.Module, loss: Callable[[nn.Module], Tensor], steps: int = 6) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()


@pytest.mark.parametrize("build", [converted, by_hand])
@pytest.mark.parametrize("copied", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_loop_without_a_kl_is_named_once(
    build: Callable[[], nn.Module], copied: Callable[[nn.Module], nn.Module], caplog: pytest.LogCaptureFixture
) -> None:
    loop(copied(build()), nll, steps=12)
    (message,) = said(caplog)
    assert "This loop" in message and "BayesianTrainer" in message and "kl_divergence(model) / N" in message


def kl_once_per_accumulation(model: nn.Module) -> Tensor:
    for _ in range(5):
        nll(model).backward()
    return nll(model) + kl_divergence(model) / 10


LOSSES: dict[str, Callable[[nn.Module], Tensor]] = {
    "kl after": lambda m: nll(m) + kl_divergence(m) / 10,
    "kl before": lambda m: kl_divergence(m) / 10 + nll(m),
    "two densities": lambda m: nll(m) + (log_variational_posterior(m) - log_prior(m)) / 10,
    "weight 0": lambda m: nll(m) + 0.0 * kl_divergence(m),
    "once per accumulation": kl_once_per_accumulation,
    "of each layer": lambda m: nll(m) + sum(kl_divergence(layer) for layer in m if not isinstance(layer, nn.Tanh)),
}


@pytest.mark.parametrize("build", [converted, by_hand])
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_a_loop_with_a_kl_is_never_named(
    build: Callable[[], nn.Module], loss: Callable[[nn.Module], Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    loop(build(), loss)
    assert not said(caplog)


def test_turns_and_closures_are_no_training_without_a_kl(caplog: pytest.LogCaptureFixture) -> None:
    model, turn = converted(), iter(range(100))
    loop(model, lambda m: nll(m) if next(turn) % 2 else kl_divergence(m), steps=12)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=2)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nll(model) + kl_divergence(model)
        loss.backward()
        return loss

    for _ in range(5):
        optimizer.step(closure)
    assert not said(caplog)


def test_what_no_noise_reached_is_no_variational_training(caplog: pytest.LogCaptureFixture) -> None:
    model = converted()
    with posterior_mean(model):
        loop(model, nll)
    loop(model.eval(), nll)
    loop(to_deterministic(model).train(), nll)
    loop(nn.Sequential(nn.Linear(3, 2)), nll)
    assert not said(caplog)


def test_a_kl_that_is_only_logged_is_none(caplog: pytest.LogCaptureFixture) -> None:
    model = converted()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(5):
        nll(model).backward()
        with torch.no_grad():
            kl_divergence(model)
        optimizer.step()
    assert len(said(caplog)) == 1


class WithKL(Trainer):
    def compute_loss(self, model: nn.Module, inputs: dict, *args: object, **kwargs: object) -> Tensor:
        return super().compute_loss(model, inputs) + kl_divergence(model) / 20


def stock(kind: type[Trainer], folder: Path, **kwargs: object) -> Trainer:
    args = TrainingArguments(
        str(folder), max_steps=2, per_device_train_batch_size=2, report_to="none", use_cpu=True, disable_tqdm=True,
        save_strategy="no", **kwargs,
    )  # fmt: skip
    model = tiny.bayesian()
    kl_divergence(model)  # a look at it beforehand changes nothing
    return kind(model, args, train_dataset=tiny.dataset())


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"gradient_accumulation_steps": 2},
        pytest.param({"torch_compile": True, "torch_compile_backend": "eager"}, marks=pytest.mark.slow),
    ],
)
def test_the_stock_trainer_is_named_at_its_first_step(
    kwargs: dict[str, object], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stock(Trainer, tmp_path, **kwargs).train()
    (message,) = said(caplog)
    assert message.startswith("`Trainer` trains a Bayesian model without its KL")


def test_trainers_with_a_kl_are_not_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stock(WithKL, tmp_path).train()
    tiny.trainer(tmp_path, gradient_accumulation_steps=2, max_steps=4).train()
    tiny.trainer(tmp_path, kl_weight=0.0, max_steps=4).train()
    assert not said(caplog)


def test_nothing_is_kept_alive_and_a_step_costs_nothing() -> None:
    model = converted()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    loop(model, LOSSES["kl after"], steps=1)
    (nll(model) + kl_divergence(model)).backward()
    optimizer.step()
    loop(model, nll, steps=4)  # named: it stays so
    start = time.perf_counter()
    for _ in range(1000):
        kl_watch._before_step(optimizer, (), {})
    assert (time.perf_counter() - start) / 1000 < 1e-4
    reference = weakref.ref(model[0])
    del model, optimizer
    gc.collect()
    assert reference() is None


def test_logger(caplog: pytest.LogCaptureFixture) -> None:
    assert kl_watch.logger.name == "bayeformers.nn.kl_watch"
    assert caplog.handler.level <= logging.WARNING
