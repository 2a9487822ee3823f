"""Passes with a shared prefix are a plain loop: same numbers, and the model is left alone."""

from __future__ import annotations

import copy
import functools
import gc
import logging
import pickle
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import BaseModelOutput

from bayeformers.sampling import passes as module_under_test
from bayeformers.sampling.passes import monte_carlo
from bayeformers.sampling.snapshot import flatten
from tests.cases import CASES, Case, Part, case

PARTS: dict[str, tuple[Part, ...]] = {
    "head": ("head",),
    "last+head": ("last", "head"),
    "middle": ("middle",),
    "all": (),
    "embeddings": ("embeddings",),
}
Draw = Callable[[int, int], AbstractContextManager[None]]


def in_place(parameters: Sequence[nn.Parameter]) -> Draw:
    """Draws that copy perturbed weights into the model, as a posterior over arbitrary Parameters does."""

    @contextmanager
    def draw(index: int, seed: int) -> Iterator[None]:
        generator = torch.Generator().manual_seed(1000 * seed + index)
        kept = [parameter.detach().clone() for parameter in parameters]
        try:
            with torch.no_grad():
                for parameter in parameters:
                    parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
            yield
        finally:
            with torch.no_grad():
                for parameter, before in zip(parameters, kept, strict=True):
                    parameter.copy_(before)

    return draw


def passes(
    model: nn.Module, random: Sequence[nn.Parameter], inputs: Any, *, share: bool = True, **options: Any
) -> list[Any]:
    """Outputs of S passes; plain ones run on the untouched model."""
    draw = options.pop("draw", None) or in_place(random)
    options = {"num_samples": 4, **options}
    return list(monte_carlo(model, draw, random, inputs, share=share, **options))


def max_difference(outputs: list[Any], others: list[Any]) -> float:
    difference = 0.0
    for output, other in zip(outputs, others, strict=True):
        for a, b in zip(flatten(output), flatten(other), strict=True):
            if isinstance(a, Tensor):
                difference = max(difference, (a.double() - b.double()).abs().nan_to_num(0.0).max().item())
    return difference


def verdict(model: nn.Module) -> str | None:
    """What the last first batch concluded: None is sharing."""
    return list(module_under_test._verdicts[model].values())[-1]


def layer_of(parameter: str) -> str:
    return parameter.rpartition(".")[0]


class Counter:
    """Calls of each module that really compute, counted inside ``forward``."""

    def __init__(self, model: nn.Module) -> None:
        self.calls: dict[str, int] = {}
        for name, module in model.named_modules():
            vars(module)["forward"] = self._counting(name, module.forward)

    def _counting(self, name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.calls[name] = self.calls.get(name, 0) + 1
            return forward(*args, **kwargs)

        return counted


# ------------------------------------------------------------------------------------------------------- exactness


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equal_to_the_plain_loop(case: Case, parts: tuple[Part, ...]) -> None:
    model = case.build()
    random = case.parameters(model, *parts)
    plain = passes(model, random, case.inputs(), share=False)
    first, later = (passes(model, random, case.inputs()) for _ in range(2))
    assert max_difference(plain, plain[1:] + plain[:1]) > 0  # the draws differ at all
    assert max_difference(first, plain) == 0.0
    assert max_difference(later, plain) == 0.0


UNTIED = [case for case in CASES if not any(set(case.matching("head")) & set(map(layer_of, t)) for t in case.tied)]
EDITED_IN_PLACE = {"wav2vec2": {"wav2vec2.feature_projection.projection", "projector"}}  # padding is set to 0


@pytest.mark.parametrize("case", UNTIED, ids=lambda case: case.name)
def test_with_a_random_head_nothing_below_it_runs_again(case: Case) -> None:
    model = case.build()
    random = case.parameters(model, "head")
    passes(model, random, case.inputs())
    assert verdict(model) is None
    counter = Counter(model)
    passes(model, random, case.inputs(), num_samples=5)
    below = [name for name in case.layers if name not in case.uncalled and name not in case.matching("head")]
    once = {name: counter.calls[name] for name in below}
    counter.calls.clear()
    passes(model, random, case.inputs(), num_samples=1)
    expected = {name: counter.calls[name] for name in below}  # a reused layer is called several times in one pass
    assert {name for name in below if once[name] != expected[name]} == EDITED_IN_PLACE.get(case.name, set())


def test_with_the_last_layer_and_head_random_the_rest_runs_once() -> None:
    bert = case("bert")
    model = bert.build()
    random = bert.parameters(model, "last", "head")
    passes(model, random, bert.inputs())
    counter = Counter(model)
    passes(model, random, bert.inputs(), num_samples=6)
    assert counter.calls["bert.encoder.layer.0.attention.self.query"] == 1
    assert counter.calls["bert.embeddings"] == 1
    assert counter.calls["bert.encoder.layer.1.attention.self.query"] == 6
    assert counter.calls["classifier"] == 6


@pytest.mark.parametrize("name", ["bert-mlm", "gpt2-lm", "t5", "bart-lm"])
def test_a_tied_head_makes_the_embeddings_random_too(name: str) -> None:
    tied = case(name)
    model = tied.build()
    random = tied.parameters(model, "head")
    assert max_difference(passes(model, random, tied.inputs()), passes(model, random, tied.inputs(), share=False)) == 0


@pytest.mark.parametrize("name", ["bert", "wav2vec2", "gpt2", "t5", "bart", "vit", "clip"])
def test_hidden_states_and_attentions(name: str) -> None:
    this = case(name)
    model = this.build()
    inputs = {**this.inputs(), "output_hidden_states": True, "output_attentions": True}
    random = this.parameters(model, "middle")
    assert max_difference(passes(model, random, inputs), passes(model, random, inputs, share=False)) == 0


@pytest.mark.parametrize("name", ["t5", "bart-lm"])
def test_given_encoder_outputs(name: str) -> None:
    this = case(name)
    model, inputs = this.build(), this.inputs()
    ids = inputs.pop("input_ids")
    with torch.no_grad():
        states = model.get_encoder()(input_ids=ids, attention_mask=inputs["attention_mask"]).last_hidden_state
    inputs["encoder_outputs"] = BaseModelOutput(last_hidden_state=states)
    random = this.parameters(model, "last")
    plain = passes(model, random, inputs, share=False)
    assert max_difference(passes(model, random, inputs), plain) == 0
    assert max_difference(passes(model, random, inputs), plain) == 0
    assert verdict(model) is None


@pytest.mark.parametrize("options", [{"use_cache": True}, {"return_dict": False}])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_other_options_of_forward(name: str, options: dict[str, Any]) -> None:
    this = case(name)
    model = this.build()
    if name == "bert" and "use_cache" in options:
        pytest.skip("the classifier has no such argument")
    random, inputs = this.parameters(model, "last"), {**this.inputs(), **options}
    plain = passes(model, random, inputs, share=False)
    for outputs in (passes(model, random, inputs), passes(model, random, inputs)):
        for output, other in zip(outputs, plain, strict=True):
            assert torch.equal(output[0], other[0])


def test_no_cache_is_filled_unless_asked_for() -> None:
    llama = case("llama-lm")
    model = llama.build()
    (output,) = passes(model, [], llama.inputs(), num_samples=1)
    assert output.past_key_values is None
    (output,) = passes(model, [], {**llama.inputs(), "use_cache": True}, num_samples=1)
    assert isinstance(output.past_key_values, DynamicCache)


def test_autocast_and_half_precision() -> None:
    bert = case("bert")
    model = bert.build()
    random = bert.parameters(model, "last")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = passes(model, random, bert.inputs(), share=False)
        assert max_difference(passes(model, random, bert.inputs()), plain) == 0
    model = bert.build().bfloat16()
    random = bert.parameters(model, "last")
    plain = passes(model, random, bert.inputs(), share=False)
    assert max_difference(passes(model, random, bert.inputs()), plain) == 0


def test_one_autocast_around_all_passes_shows_every_draw() -> None:
    """Autocast keeps the low-precision copy of a trainable weight until its context ends, also of the last draw's."""
    bert = case("bert")
    model = bert.build()
    random = bert.parameters(model, "last")
    fresh = []
    for index in range(4):
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16), in_place(random)(index, 0):
            fresh.append(model(**bert.inputs()).logits)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for share in (False, True, True):
            outputs = passes(model, random, bert.inputs(), share=share)
            assert all(torch.equal(output.logits, expected) for output, expected in zip(outputs, fresh, strict=True))
        with torch.no_grad():
            after = model(**bert.inputs()).logits
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(after, model(**bert.inputs()).logits)


def test_batches_of_other_values_and_shapes_share_nothing_with_each_other() -> None:
    bert = case("bert")
    model = bert.build()
    random = bert.parameters(model, "head")
    inputs = bert.inputs()
    flipped = {name: value.flip(0)[:2] for name, value in inputs.items()}
    for batch in (inputs, flipped, inputs):
        assert max_difference(passes(model, random, batch), passes(model, random, batch, share=False)) == 0


# ----------------------------------------------------------------------------------------------------------- traps


class Net(nn.Module):
    """A body, something in between, and a random head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 4)
        self.between: nn.Module = nn.Identity()
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.between(self.body(x)))


def net(between: nn.Module | None = None) -> Net:
    torch.manual_seed(3)
    model = Net()
    model.between = between or model.between
    return model.eval()


X = torch.linspace(-1, 1, 8).reshape(2, 4)


def assert_exact(model: nn.Module, random: Sequence[nn.Parameter]) -> None:
    plain = passes(model, random, X, share=False)
    for _ in range(2):
        assert max_difference(passes(model, random, X), plain) == 0


class InPlace(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(2)


class InPlaceView(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x[:, :2].add_(1)
        return x


class Stateful(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return x + self.count


class Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x)


class Closure(nn.Module):
    """State that no attribute shows."""

    def __init__(self) -> None:
        super().__init__()
        state = iter(range(1000))
        self.shift = lambda: next(state)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift()


class Behind(nn.Module):
    """Reaches a module that is not its child."""

    def __init__(self, reference: Any) -> None:
        super().__init__()
        self.reference = reference

    def forward(self, x: Tensor) -> Tensor:
        reference = self.reference
        return reference[0](x) if isinstance(reference, list) else reference(x)


@pytest.mark.parametrize("between", [InPlace(), InPlaceView()])
def test_in_place_edits_of_what_is_shared(between: nn.Module) -> None:
    model = net(between)
    assert_exact(model, [model.head.weight])


def test_edits_of_the_caller_between_passes() -> None:
    bert = case("bert-mlm")
    model, inputs = bert.build(), {**bert.inputs(), "output_hidden_states": True}
    random = bert.parameters(model, "last")
    plain = [output.logits for output in passes(model, random, inputs, share=False)]
    passes(model, random, inputs)
    iterator = monte_carlo(model, in_place(random), random, inputs, num_samples=4)
    for output, expected in zip(iterator, plain, strict=True):
        assert torch.equal(output.logits, expected)
        for states in output.hidden_states:
            states.zero_()
    with torch.no_grad():
        for index, output in enumerate(monte_carlo(model, in_place(random), random, inputs, num_samples=4)):
            assert index == 0 or not torch.equal(output.logits, plain[index])
            model.bert.embeddings.word_embeddings.weight.mul_(0.5)  # a weight that is not random, changed half-way


@pytest.mark.parametrize("between", [Stateful, Noisy, Closure])
def test_stateful_and_random_modules_are_not_reused(between: type[nn.Module]) -> None:
    """Their outputs differ from pass to pass; a state that no check sees fails the first batch's test."""
    torch.manual_seed(0)
    model = net(between())
    draws = [output for _ in range(2) for output in passes(model, [model.head.weight], X, draw=nothing)]
    assert len({tuple(output.flatten().tolist()) for output in draws}) == len(draws)


@contextmanager
def _nothing(index: int, seed: int) -> Iterator[None]:
    yield


nothing: Draw = _nothing


@pytest.mark.parametrize("kind", ["list", "bound method", "dict in a list"])
def test_a_random_module_behind_a_plain_reference(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    model = net()
    model.other = nn.Linear(4, 4).eval()
    reference = {"list": [model.other], "bound method": model.other.forward, "dict in a list": [model.other, {}]}[kind]
    model.between = Behind(reference).eval()
    with caplog.at_level(logging.INFO, logger="bayeformers"):
        assert_exact(model, list(model.other.parameters()))
    assert caplog.text.count("'between' reaches a random module") == 1  # said once, though it holds for every batch


def test_a_random_parameter_outside_the_model() -> None:
    model, hidden = net(), nn.Linear(4, 4)
    model.between = Behind(lambda x: hidden(x)).eval()
    assert_exact(model, list(hidden.parameters()))


def test_weights_written_through_data_fail_the_first_batch() -> None:
    """Invisible to version counters and undeclared: only the comparison with the plain loop can tell."""
    model = net()

    @contextmanager
    def draw(index: int, seed: int) -> Iterator[None]:
        kept = model.body.weight.data.clone()
        model.body.weight.data.mul_(index + 1)
        yield
        model.body.weight.data.copy_(kept)

    plain = list(monte_carlo(model, draw, [model.head.weight], X, num_samples=4, share=False))
    for _ in range(2):
        assert max_difference(list(monte_carlo(model, draw, [model.head.weight], X, num_samples=4)), plain) == 0
    assert "differed from the plain loop" in str(verdict(model))


def test_an_undeclared_weight_changed_in_place_is_noticed() -> None:
    model = net()
    both = [model.body.weight, model.head.weight]
    plain = passes(model, both, X, share=False)
    for _ in range(2):
        assert max_difference(passes(model, both[1:], X, draw=in_place(both)), plain) == 0


def test_hooks_run_in_every_pass() -> None:
    bert = case("bert")
    model = bert.build()
    seen: list[int] = []
    for name in ("bert.encoder.layer.0", "bert.embeddings.word_embeddings"):
        model.get_submodule(name).register_forward_hook(lambda *_: seen.append(1))
    random = bert.parameters(model, "head")
    plain = passes(model, random, bert.inputs(), share=False)
    passes(model, random, bert.inputs())
    seen.clear()
    assert max_difference(passes(model, random, bert.inputs()), plain) == 0
    assert len(seen) == 2 * 4


def test_a_global_hook_gives_the_plain_loop() -> None:
    model, calls = net(), []
    passes(model, [model.head.weight], X)
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: calls.append(1))
    try:
        passes(model, [model.head.weight], X)
    finally:
        handle.remove()
    assert len(calls) == 4 * 4


def test_monte_carlo_dropout_draws_anew() -> None:
    bert = case("bert")
    model = bert.build()
    for module in model.modules():
        module.train(isinstance(module, nn.Dropout) and module.p > 0)

    @contextmanager
    def draw(index: int, seed: int) -> Iterator[None]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(index)
            yield

    plain = list(monte_carlo(model, draw, [], bert.inputs(), num_samples=4, share=False))
    for _ in range(2):
        assert max_difference(list(monte_carlo(model, draw, [], bert.inputs(), num_samples=4)), plain) == 0
    assert max_difference(plain[:-1], plain[1:]) > 0


def test_inference_mode_gives_the_plain_loop() -> None:
    model = net()
    plain = passes(model, [model.head.weight], X, share=False)
    with torch.inference_mode():
        outputs = list(monte_carlo(model, in_place([model.head.weight]), [model.head.weight], X, num_samples=4))
    assert max_difference([output.clone() for output in outputs], plain) == 0


def test_inputs_made_in_inference_mode() -> None:
    model = net()
    with torch.inference_mode():
        x = X * 1
    plain = passes(model, [model.head.weight], X, share=False)
    assert max_difference(passes(model, [model.head.weight], x), plain) == 0


def test_a_compiled_model_gives_the_plain_loop() -> None:
    model = net()
    compiled = torch.compile(model, backend="eager")
    plain = passes(model, [model.head.weight], X, share=False)
    assert max_difference(passes(compiled, [model.head.weight], X), plain) == 0


def test_a_module_called_several_times_in_a_pass() -> None:
    class Twice(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(self.body(x).relu()))

    model = Twice().eval()
    counter = Counter(model)
    assert_exact(model, [model.head.weight])
    counter.calls.clear()
    passes(model, [model.head.weight], X)
    assert counter.calls["body"] == 2


def test_outputs_in_fresh_containers() -> None:
    class Listing(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Any]:
            return {"states": [x * 2], "tuple": (x, 1)}

    class Popping(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.between(self.body(x))["states"].pop())

    model = Popping().eval()
    model.between = Listing().eval()
    assert_exact(model, [model.head.weight])


def test_nan_is_never_reused() -> None:
    model = net()
    with torch.no_grad():
        model.body.bias.fill_(torch.nan)
    outputs = passes(model, [model.head.weight], X)
    assert all(output.isnan().all() for output in outputs)


def test_the_memory_cap_is_kept() -> None:
    bert = case("bert")
    model = bert.build()
    random = bert.parameters(model, "head")
    plain = passes(model, random, bert.inputs(), share=False)
    for cap in (0, 3000, 10_000):
        assert max_difference(passes(model, random, bert.inputs(), max_prefix_bytes=cap), plain) == 0


# ----------------------------------------------------------------------------------------- the model is left alone


def test_between_passes_the_model_and_the_gradient_mode_are_the_callers() -> None:
    bert = case("bert")
    model = bert.build()
    random = bert.parameters(model, "last")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for _ in monte_carlo(model, in_place(random), random, bert.inputs(), num_samples=3):
        assert torch.is_grad_enabled()
        assert not any("forward" in vars(module) for module in model.modules())
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        copy.deepcopy(model)
        pickle.dumps(model)


def test_forward_attributes_of_an_instance_survive() -> None:
    model = net()
    forward = model.body.forward
    model.body.forward = lambda x: forward(x) + 1  # as accelerate's hooks do
    own = vars(model.body)["forward"]
    assert_exact(model, [model.head.weight])
    assert vars(model.body)["forward"] is own
    assert "forward" not in vars(model.head)


def test_exceptions_restore_the_model() -> None:
    class Failing(Net):
        fail = False

        def forward(self, x: Tensor) -> Tensor:
            y = self.body(x)
            if self.fail:
                raise RuntimeError("on purpose")
            return self.head(y)

    model = Failing().eval()
    passes(model, [model.head.weight], X)
    weight = model.head.weight.detach().clone()
    model.fail = True
    with pytest.raises(RuntimeError, match="on purpose"):
        passes(model, [model.head.weight], X)
    assert not any("forward" in vars(module) for module in model.modules())
    assert torch.equal(model.head.weight, weight)
    model.fail = False
    assert_exact(model, [model.head.weight])


def test_abandoned_and_interleaved_iterators() -> None:
    model = net()
    random = [model.head.weight]
    plain = passes(model, random, X, share=False)
    iterator = monte_carlo(model, in_place(random), random, X, num_samples=4)
    next(iterator)
    del iterator
    pairs = zip(*(monte_carlo(model, in_place(random), random, X, num_samples=4) for _ in range(2)), strict=True)
    for (a, b), expected in zip(pairs, plain, strict=True):
        assert torch.equal(a, expected) and torch.equal(b, expected)


def test_the_random_state_advances_as_in_a_plain_loop() -> None:
    model = net(Noisy())
    states = []
    for share in (False, True, True):
        torch.manual_seed(5)
        passes(model, [model.head.weight], X, share=share, draw=nothing)
        states.append(torch.get_rng_state())
    assert torch.equal(states[0], states[1]) and torch.equal(states[0], states[2])


def test_memory_is_released_after_the_batch() -> None:
    model, kept = net(), []

    class Watching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x + 1
            kept.append(weakref.ref(y))
            return y

    model.between = Watching().eval()
    gc.disable()
    try:
        passes(model, [model.head.weight], X)
        passes(model, [model.head.weight], X)
        assert all(reference() is None for reference in kept)
    finally:
        gc.enable()


@pytest.mark.parametrize("num_samples", [0, -1])
def test_num_samples_is_checked_before_the_first_pass(num_samples: int) -> None:
    with pytest.raises(ValueError, match=r"`num_samples` must be at least 1"):
        monte_carlo(net(), nothing, [], X, num_samples=num_samples)
