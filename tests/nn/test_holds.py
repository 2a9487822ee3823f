"""Whose draw is held: the caller's, and that of what it starts; other threads and tasks compute as if alone."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import copy
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from bayeformers import fixed_draw, posterior_mean, to_bayesian
from bayeformers.nn import training_draw
from tests.cases import case

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(2))


def network() -> nn.Module:
    torch.manual_seed(0)
    return to_bayesian(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)), delta=0.3).eval()


@pytest.fixture(autouse=True)
def _switch_often() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def in_threads(*jobs: Callable[[], Any]) -> list[Any]:
    """Results of jobs that run at once, in threads that were all there before the first begins."""
    barrier, results = threading.Barrier(len(jobs)), [None] * len(jobs)

    def run(number: int) -> None:
        barrier.wait()
        try:
            results[number] = jobs[number]()
        except BaseException as error:
            results[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    failed = next((result for result in results if isinstance(result, BaseException)), None)
    if failed is not None:
        raise failed
    return results


def drawn(model: nn.Module, index: int | None) -> Tensor:
    with torch.no_grad(), contextlib.nullcontext() if index is None else fixed_draw(model, index):
        return model(X)


def test_threads_that_hold_different_draws() -> None:
    """Each as alone, the mean among them, bit for bit; afterwards nothing is held."""
    model = network()
    indices: list[int | None] = [0, 1, None, 2]
    alone = [drawn(model, index) for index in indices]

    def job(number: int) -> Callable[[], bool]:
        return lambda: all(torch.equal(drawn(model, indices[number]), alone[number]) for _ in range(100))

    assert in_threads(*map(job, range(4))) == [True] * 4
    assert all("_holds" in vars(layer) and layer.draw is None and not layer._holds for layer in (model[0], model[2]))


def test_what_is_started_inside_sees_the_draw() -> None:
    """Threads, threads of theirs, a pool, and asyncio's tasks and threads; for two callers at once."""
    model = network()
    alone = [drawn(model, index) for index in (0, 1)]

    def started(index: int) -> list[Tensor]:
        found: list[Tensor] = []

        def forward() -> None:
            found.append(model(X))

        def nested() -> None:
            thread = threading.Thread(target=forward)
            thread.start()
            thread.join()

        async def tasks() -> None:
            await asyncio.gather(asyncio.to_thread(forward), asyncio.create_task(asyncio.to_thread(forward)))

        with torch.no_grad(), fixed_draw(model, index):
            for target in (forward, nested):
                thread = threading.Thread(target=target)
                thread.start()
                thread.join()
            with ThreadPoolExecutor(2) as pool:
                found += pool.map(model, [X, X])
            asyncio.run(tasks())
        return [output.detach() for output in found]

    for outputs, expected in zip(in_threads(lambda: started(0), lambda: started(1)), alone, strict=True):
        assert len(outputs) == 6 and all(torch.equal(output, expected) for output in outputs)


def test_a_thread_that_somebody_else_starts_does_not() -> None:
    """A server makes a thread per request: one that begins while another request holds a draw has the mean."""
    model = network()
    mean, found = model(X), []
    begun, done = threading.Event(), threading.Event()

    def request() -> None:
        with fixed_draw(model, 0):
            begun.set()
            done.wait()

    first = threading.Thread(target=request)
    first.start()
    begun.wait()
    second = threading.Thread(target=lambda: found.append(model(X)))
    second.start()
    second.join()
    done.set()
    first.join()
    assert torch.equal(found[0], mean)


def test_a_thread_may_outlive_the_draw() -> None:
    """It sees what is held, not what was; and `copy_context` takes a draw into a pool's old thread."""
    model = network()
    mean, one = model(X), drawn(model, 1)
    with ThreadPoolExecutor(1) as pool:
        with fixed_draw(model, 0):
            inside = pool.submit(model, X).result()
        with fixed_draw(model, 1):
            assert torch.equal(pool.submit(contextvars.copy_context().run, model, X).result(), one)
        assert torch.equal(pool.submit(model, X).result(), mean) and not torch.equal(inside, mean)


def test_tasks_of_one_thread() -> None:
    """Two coroutines that take turns inside their draws."""
    model = network()
    alone = [drawn(model, index) for index in (0, 1, None)]

    async def ask(index: int | None) -> bool:
        with contextlib.nullcontext() if index is None else fixed_draw(model, index):
            same = []
            for _ in range(5):
                await asyncio.sleep(0)
                same.append(torch.equal(model(X).detach(), alone[2 if index is None else index]))
        return all(same)

    async def main() -> list[bool]:
        return await asyncio.gather(ask(0), ask(1), ask(None))

    assert asyncio.run(main()) == [True] * 3


def test_draws_that_end_in_another_order() -> None:
    """Generators that hold a draw and are closed first come, first served."""
    model = network()
    mean, one = model(X), drawn(model, 1)

    def holder(index: int) -> Iterator[None]:
        with fixed_draw(model, index):
            yield

    first, second = holder(0), holder(1)
    next(first), next(second)
    first.close()
    assert torch.equal(model(X), one)
    second.close()
    assert torch.equal(model(X), mean)


def test_starting_threads_is_as_before_when_nothing_is_held() -> None:
    start = threading.Thread.start
    model = network()
    with fixed_draw(model, 0), posterior_mean(model):
        assert threading.Thread.start is not start
    assert threading.Thread.start is start


def test_copies_keep_what_is_held() -> None:
    model = network()
    with fixed_draw(model, 0):
        expected = model(X)
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for copied in copies:
        assert torch.equal(copied(X), expected) and torch.equal(drawn(copied, 0), expected)


def test_training_forwards_of_several_threads() -> None:
    """Each has one draw of its own: two uses of one layer agree, and two threads do not."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.layer(x), self.layer(x)

    twice = to_bayesian(Twice(), delta=0.3).train()

    def job() -> list[tuple[Tensor, Tensor]]:
        return [twice(X) for _ in range(50)]

    pairs = [pair for result in in_threads(job, job, job) for pair in result]
    assert all(torch.equal(a, b) for a, b in pairs)
    assert len({a.sum().item() for a, _ in pairs}) == len(pairs)


def test_checkpointing_in_several_threads() -> None:
    """Recomputation in backward finds its own thread's draw: x W is linear, so its value is x times its gradient."""

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return torch.utils.checkpoint.checkpoint(self.layer, x, use_reentrant=False)

    model, known = to_bayesian(Checkpointed(), delta=0.5).train(), threading.Barrier(3)

    def job() -> bool:
        same = []
        with torch.no_grad():
            model(X)
        known.wait()  # a backward beside another thread's very first forward may still be told a wrong draw
        for _ in range(30):
            x = X.clone().requires_grad_()
            output = model(x).sum()
            (gradient,) = torch.autograd.grad(output, x)
            same.append(torch.allclose((gradient * x).sum(), output, atol=1e-5))
        return all(same)

    assert in_threads(job, job, job) == [True] * 3


# -- interruptions ----------------------------------------------------------------------------------------------------


class Stop(nn.Module):
    """Raises what it is told to."""

    error: type[BaseException] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.error is not None:
            raise self.error
        return x


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit, asyncio.CancelledError, ValueError])
@pytest.mark.parametrize("keeps_traceback", [False, True])
def test_an_interrupted_forward_leaves_no_draw(error: type[BaseException], keeps_traceback: bool) -> None:
    """torch's `always_call` hooks run after an Exception only; a notebook keeps the traceback and so its frames."""
    stop = Stop()
    model = to_bayesian(nn.Sequential(nn.Linear(4, 4), stop, nn.Linear(4, 3)), delta=0.3).train()
    stop.error, kept = error, []
    try:
        model(X)
    except BaseException as caught:
        kept = [caught] if keeps_traceback else []
    stop.error = None
    a, b = model[0](X), model[0](X)  # a part first: it is in no forward
    c, d = model(X), model(X)
    assert not torch.equal(a, b) and not torch.equal(c, d)
    assert len(kept) == keeps_traceback and model[0].scope.running is None


def test_an_interrupt_inside_a_training_draw() -> None:
    stop = Stop()
    model = to_bayesian(nn.Sequential(nn.Linear(4, 4), stop), delta=0.3).train()
    stop.error = KeyboardInterrupt
    with contextlib.suppress(KeyboardInterrupt), training_draw(model):
        model(X)
    stop.error = None
    assert not torch.equal(model(X), model(X))
    with training_draw(model):
        first = model(X)
        stop.error = KeyboardInterrupt
        with contextlib.suppress(KeyboardInterrupt):
            model(X)
        stop.error = None
        assert torch.equal(model(X), first)


def test_an_interrupted_holder_holds_nothing() -> None:
    model = network()
    mean = model(X)
    with contextlib.suppress(KeyboardInterrupt), fixed_draw(model, 0), posterior_mean(model):
        raise KeyboardInterrupt
    assert torch.equal(model(X), mean) and model[0].draw is None


@pytest.mark.parametrize("name", ["t5", "gpt2-lm"])
def test_streaming_from_a_thread(name: str) -> None:
    """`Thread(target=model.generate)` inside a draw, as for a streamer; two requests at once, of different draws."""
    this = case(name)
    model = to_bayesian(this.build(), delta=0.5).eval()
    ids = this.inputs()["input_ids"][:1, :3]

    def generated(index: int) -> Tensor:
        with fixed_draw(model, index):
            return model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)

    expected = [generated(index) for index in (0, 1)]

    def request(index: int) -> Tensor:
        found: list[Tensor] = []

        def generate() -> None:
            found.append(model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0))

        with fixed_draw(model, index):
            thread = threading.Thread(target=generate)
            thread.start()
            thread.join()
        return found[0]

    for output, wanted in zip(in_threads(lambda: request(0), lambda: request(1)), expected, strict=True):
        assert torch.equal(output, wanted)
