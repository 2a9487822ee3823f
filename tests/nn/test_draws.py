"""Which draw a layer takes: one per forward, held draws, exceptions, copies, recomputation, compilation."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils.checkpoint as torch_checkpoint
from torch import Tensor, nn

import bayeformers.nn as bnn
from bayeformers import fixed_draw, posterior_mean, to_bayesian
from bayeformers.nn import one_draw_per_forward, training_draw, variational_tensors
from tests.cases import case

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(2))


def network(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return to_bayesian(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)), delta=0.3, **options)


def test_train_and_eval() -> None:
    """Random in `train()`, the mean in `eval()`; a held draw or mean decides in both."""
    model = network()
    mean = model.eval()(X)
    with torch.no_grad():
        expected = model[2](torch.tanh(model[0](X)))
    assert torch.equal(mean, expected)
    assert not torch.equal(model.train()(X), model(X))
    for mode in (True, False):
        model.train(mode)
        with posterior_mean(model):
            assert torch.equal(model(X), mean)
        with fixed_draw(model, 4):
            first = model(X)
            assert torch.equal(first, model(X)) and not torch.equal(first, mean)


def test_nesting_and_exceptions() -> None:
    """The innermost holder decides; what was held before is back after an exception."""
    model = network().eval()
    mean = model(X)
    with fixed_draw(model, 0):
        zero = model(X)
        with contextlib.suppress(KeyError), posterior_mean(model):
            assert torch.equal(model(X), mean)
            with fixed_draw(model, 1, seed=3):
                assert not torch.equal(model(X), zero)
                raise KeyError
        assert torch.equal(model(X), zero)
    assert torch.equal(model(X), mean)


def test_draws_of_one_layer_at_a_time() -> None:
    """Holding a part of a model holds that part only."""
    model = network().eval()
    with fixed_draw(model[0], 0):
        partly = model(X)
        assert model[2].draw is None
    with fixed_draw(model, 0):
        assert not torch.equal(model(X), partly)


def test_weights_may_move_inside_a_held_draw() -> None:
    """The draw is eps: after a step w = new mu + new sigma * eps, with and without gradients."""
    model = network().eval()
    with fixed_draw(model, 0), torch.no_grad():
        before = model(X)
        model[0].weight.add_(1.0)
        model[0].weight_rho.sub_(0.5)
        after = model(X)
        with torch.enable_grad():
            assert torch.equal(after, model(X).detach())
    with fixed_draw(model, 0), torch.no_grad():
        assert torch.equal(model(X), after) and not torch.equal(after, before)


def test_state_is_per_model() -> None:
    """A held draw of one model does not touch another; a copy starts with a life of its own."""
    model = network().eval()
    other = copy.deepcopy(model)
    with fixed_draw(model, 0):
        assert torch.equal(other(X), other(X)) and not torch.equal(model(X), other(X))
    model.train(), other.train()
    assert model[0].scope is model[2].scope is not other[0].scope is other[2].scope
    torch.manual_seed(1)
    a = model(X)
    torch.manual_seed(1)
    assert torch.equal(a, other(X))


def test_failed_forward_leaves_no_draw_behind() -> None:
    """After an exception inside a forward the next one draws anew."""
    model = network().train()
    with pytest.raises(RuntimeError):
        model(torch.zeros(5, 7))
    first, second = model(X), model(X)
    assert not torch.equal(first, second)
    assert model[0].scope.running is None


def test_ranks_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal seeds on two processes give other training noise but the same fixed draws."""
    outputs, held = [], []
    for rank in (0, 1):
        monkeypatch.setattr("bayeformers.nn.scope._rank", lambda rank=rank: rank)
        model = network().train()
        torch.manual_seed(3)
        outputs.append(model(X))
        with fixed_draw(model, 0):
            held.append(model(X))
    assert not torch.equal(*outputs) and torch.equal(*held)


def test_hand_built_model_has_one_draw() -> None:
    """Without `to_bayesian`: a layer alone draws at each call, `one_draw_per_forward` and `training_draw` hold it."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = bnn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) - self.layer(x)

    model = Twice().train()
    assert model(X).abs().max() > 0
    with training_draw(model):
        assert model(X).abs().max() == 0
    one_draw_per_forward(model)
    assert model(X).abs().max() == 0
    assert [t.name for t in variational_tensors(model)] == ["layer.weight", "layer.bias"]


def test_hand_built_layers_have_their_own_noise() -> None:
    """Two layers of one shape do not share a draw; tied ones do."""
    model = nn.Sequential(bnn.Linear(4, 4, bias=False), bnn.Linear(4, 4, bias=False))
    with torch.no_grad():
        model[1].weight.copy_(model[0].weight)
        model[1].weight_rho.copy_(model[0].weight_rho)
    with fixed_draw(model, 0):
        assert not torch.equal(model[0](X), model[1](X))
    model[1].weight, model[1].weight_rho = model[0].weight, model[0].weight_rho
    tied = nn.Sequential(*(copy.copy(layer) for layer in model))
    for layer in tied:
        layer.specs = {"weight": type(layer.specs["weight"])("weight")}
    with fixed_draw(tied, 0):
        assert torch.equal(tied[0](X), tied[1](X))


def test_wrapped_model_keeps_its_draws() -> None:
    """Names are those of the unwrapped model: a wrapper does not change a fixed draw."""
    model = network().eval()
    with fixed_draw(model, 3):
        expected = model(X)
    with fixed_draw(nn.Sequential(model), 3):
        assert torch.equal(model(X), expected)


def test_draws_do_not_move_the_random_state() -> None:
    """A fixed draw leaves torch's generator alone."""
    model = network().eval()
    state = torch.get_rng_state()
    with fixed_draw(model, 0), posterior_mean(model), fixed_draw(model, 1):
        model(X)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("hold", [lambda model: fixed_draw(model, 0), posterior_mean], ids=["draw", "mean"])
def test_a_held_model_in_training_takes_no_seed(hold: Any) -> None:
    """Every layer holds a draw or the mean: `train()` leaves the generator alone too, and with it dropout's noise."""
    model = network().train()
    state = torch.get_rng_state()
    with hold(model):
        model(X)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_seed_is_taken_when_a_forward_begins() -> None:
    """In ordinary training, and where any layer is free: before the first layer, thus outside checkpointed regions."""
    model = network().train()
    states: list[Tensor] = []
    model[0].register_forward_pre_hook(lambda *_: states.append(torch.get_rng_state()))
    with contextlib.ExitStack() as stack:
        for _ in range(2):
            before = torch.get_rng_state()
            model(X)
            assert not torch.equal(states[-1], before)
            assert torch.equal(states[-1], torch.get_rng_state())  # one seed per forward
            stack.enter_context(fixed_draw(model[0], 0))  # the other layer is free


# --------------------------------------------------------------------------------------------- activation checkpointing


class Blocks(nn.Module):
    """Blocks that may be recomputed, one of them used twice; dropout between them."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Dropout(dropout), nn.Linear(4, 4))
        self.second = nn.Sequential(nn.Linear(4, 4), nn.Dropout(dropout), nn.Tanh())
        self.recompute: bool | None = None

    def run(self, block: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if self.recompute is None:
            return block(x)
        return torch_checkpoint.checkpoint(block, x, use_reentrant=self.recompute)  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self.second, self.run(self.first, self.run(self.second, x)))


@pytest.mark.parametrize("forwards", [1, 2, 3])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("whole", [True, False])
def test_checkpointing_keeps_the_draw(forwards: int, dropout: float, whole: bool) -> None:
    """Recomputed layers find their own draw, in both modes, with live dropout, several forwards before one backward."""
    torch.manual_seed(0)
    model = to_bayesian(Blocks(dropout), delta=0.5, freeze=False, keep_dropout=True).train()
    x = X.clone().requires_grad_()
    results = []
    for recompute in (None, True, False):
        model.recompute = recompute
        model.zero_grad()
        torch.manual_seed(4)
        run = model if whole else lambda value: model.run(model.second, model.run(model.first, value))
        outputs = [run(x * (i + 1)) for i in range(forwards)]
        torch.stack([o.square().sum() for o in outputs]).sum().backward()
        results.append(([o.detach() for o in outputs], {n: p.grad.clone() for n, p in model.named_parameters()}))
    for outputs, gradients in results[1:]:
        for a, b in zip(outputs, results[0][0], strict=True):
            assert torch.equal(a, b)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, results[0][1][name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("keep_dropout", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["bert", "gpt2-lm", "t5"])
def test_gradient_checkpointing_of_transformers(name: str, reentrant: bool, keep_dropout: bool) -> None:
    """`gradient_checkpointing_enable` gives the gradients of the plain run, two forwards before one backward."""
    inputs = {**case(name).inputs(), "use_cache": False} if name != "bert" else case(name).inputs()
    results = []
    for enabled in (False, True):
        torch.manual_seed(0)
        model = to_bayesian(case(name).build(), delta=0.3, freeze=False, keep_dropout=keep_dropout).train()
        if enabled:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(5)
        loss = sum(model(**inputs).logits.tanh().sum() for _ in range(2))
        loss.backward()
        results.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert results[0].keys() == results[1].keys()
    for key, gradient in results[0].items():
        torch.testing.assert_close(
            results[1][key], gradient, rtol=1e-4, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}"
        )


def test_checkpointing_without_the_random_state() -> None:
    """`preserve_rng_state=False`: right with one forward per backward, refused where the draw cannot be told."""

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return torch_checkpoint.checkpoint(self.inner, x, use_reentrant=False, preserve_rng_state=False)  # type: ignore[no-any-return]

    model = to_bayesian(Outer(), delta=0.5).train()
    first = model(X)
    first.sum().backward()
    with torch.no_grad(), fixed_draw(model, 0):
        model(X)
    one, two = model(X), model(X)
    torch.randn(3)  # the state has moved on: nothing tells the two draws apart
    with pytest.raises(RuntimeError, match="preserve_rng_state=True"):
        (one + two).sum().backward()


# -------------------------------------------------------------------------------------------------------- torch.compile


@pytest.fixture
def _fresh_compiler() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("make", [lambda: bnn.Linear(4, 3), lambda: bnn.Embedding(9, 4, 1), lambda: bnn.Conv1D(3, 4)])
def test_compiles_a_layer_in_one_graph(make: Callable[[], nn.Module]) -> None:
    """No graph break; fresh noise at each call; rho gets its gradient; eval is the mean."""
    layer = make().train()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.tensor([[1, 2], [3, 3]]) if isinstance(layer, nn.Embedding) else X
    a, b = compiled(x), compiled(x)
    assert a.shape == layer(x).shape and not torch.equal(a, b)
    a.square().sum().backward()
    assert layer.weight_rho.grad is not None and layer.weight_rho.grad.abs().max() > 0
    if isinstance(layer, nn.Embedding):
        assert torch.equal(a[1, 0], a[1, 1]) and torch.equal(a[0, 0], layer.weight[1])
    layer.eval()
    torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("name", ["bert", "albert"])
def test_compiles_a_model(name: str) -> None:
    """Training under `torch.compile`: fresh noise per forward, gradient in rho, the mean in eval, eager afterwards."""
    model = to_bayesian(case(name).build(), delta=0.3).train()
    compiled = torch.compile(model, backend="aot_eager")
    inputs = case(name).inputs()
    a, b = compiled(**inputs).logits, compiled(**inputs).logits
    assert not torch.equal(a, b)
    a.tanh().sum().backward()
    grads = {t.name: t.rho.grad for t in variational_tensors(model)}
    assert sum(g is not None and bool(g.abs().max() > 0) for g in grads.values()) > 0.9 * len(grads)
    model.eval()
    torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits, rtol=1e-4, atol=1e-5)
    c, d = (model.train()(**inputs).logits for _ in range(2))
    assert not torch.equal(c, d)


@pytest.mark.usefixtures("_fresh_compiler")
def test_compiled_reused_layer_has_one_draw() -> None:
    """The same layer twice in a compiled forward cancels exactly."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) - self.layer(x)

    model = to_bayesian(Twice(), delta=0.5).train()
    compiled = torch.compile(model, backend="aot_eager")
    assert compiled(X).abs().max() == 0
    assert compiled(X).abs().max() == 0
