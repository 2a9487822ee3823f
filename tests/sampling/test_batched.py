"""Draws in one batch are those of the loop: adapters, heads, tables; what cannot be batched runs one by one."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from bayeformers import VariationalPosterior, to_bayesian
from bayeformers.posteriors import DiagonalPosterior, EnsemblePosterior
from bayeformers.sampling import batched_passes
from bayeformers.sampling.batched import BatchedDraws, CannotBatch, repeated
from bayeformers.sampling.passes import monte_carlo
from bayeformers.sampling.views import private_view

X = torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4)
LORA = r".*\.lora_[AB]\..*"
COUNT = 5


@pytest.fixture(autouse=True)
def _any_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny models have large adapters."""
    monkeypatch.setattr(batched_passes, "_thinness", lambda model, random: (0.0, 0.0))


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many draws went into each batch."""
    seen: list[int] = []
    own = batched_passes.BatchedPasses._several

    def several(self: Any, indices: range) -> list[Any]:
        seen.append(len(indices))
        return own(self, indices)

    monkeypatch.setattr(batched_passes.BatchedPasses, "_several", several)
    return seen


def bert(**options: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = hf.BertConfig(vocab_size=20, max_position_embeddings=16, num_labels=3, **sizes)
    model = hf.BertForSequenceClassification(config).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    return (
        peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", r=2, **options)).double() if options else model
    )


def adapters(**options: Any) -> Any:
    model = bert(target_modules=["query", "value"], **options)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.5)
    return to_bayesian(model, delta=0.5, target_modules=LORA).eval()


def inputs(rows: int = 3) -> dict[str, Tensor]:
    ids = torch.randint(1, 20, (rows, 6), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[-1, 4:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def looped(posterior: Any, batch: Any, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    with monkeypatch.context() as patch:
        patch.setattr(batched_passes, "MIN_DRAWS", 10**9)
        return list(posterior.passes(batch, num_samples=COUNT))


def assert_equal_passes(posterior: Any, batch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = looped(posterior, batch, monkeypatch)
    for _ in range(2):  # the first one compares with the loop
        found = list(posterior.passes(batch, num_samples=COUNT))
        assert [type(output) for output in found] == [type(output) for output in expected]
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one.logits, other.logits, atol=1e-12, rtol=0)
    assert float((expected[0].logits - expected[1].logits).abs().max()) > 1e-3


def test_adapters(batches: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    assert_equal_passes(VariationalPosterior(adapters()), inputs(), monkeypatch)
    assert batches == [COUNT, COUNT]


def test_batches_of_draws_are_bounded(batches: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """2 rows of 6 tokens: 3 draws fill 40 tokens, so that five draws are two batches."""
    monkeypatch.setitem(batched_passes.MAX_TOKENS, "cpu", 40)
    assert_equal_passes(VariationalPosterior(adapters()), inputs(2), monkeypatch)
    assert batches == [3, 2] * 2


@pytest.mark.parametrize("target", ["classifier", "word_embeddings", r".*layer\.0\..*"])
def test_layers_of_a_plain_model(target: str, batches: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A head with its bias, a table, and all Linear layers of a block."""
    names = target if target.startswith(".*") else [target]
    model = to_bayesian(bert(), delta=0.5, target_modules=names).eval()
    assert_equal_passes(VariationalPosterior(model), inputs(), monkeypatch)
    assert batches == [COUNT, COUNT]


def test_conv1d(batches: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    config = hf.GPT2Config(vocab_size=20, n_embd=16, n_layer=2, n_head=4, n_positions=16)
    model = hf.GPT2LMHeadModel(config).double()
    model = to_bayesian(model, delta=0.5, target_modules=["c_attn"]).eval()
    assert_equal_passes(VariationalPosterior(model), inputs(), monkeypatch)
    assert batches == [COUNT, COUNT]


def test_draws_that_are_copied_into_parameters(batches: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model = bert(target_modules=["query"]).eval()
    chosen = {name: p for name, p in model.named_parameters() if "lora_" in name}
    posterior = DiagonalPosterior(model, {name: torch.full_like(p, 0.1) for name, p in chosen.items()})
    before = [p.clone() for p in model.parameters()]
    assert_equal_passes(posterior, inputs(), monkeypatch)
    assert batches == [COUNT, COUNT]
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_a_weight_that_is_read_runs_in_the_loop(batches: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """DoRA reads its weights: NaN stands there, the first batch differs from the loop, and none is tried again."""
    assert_equal_passes(VariationalPosterior(adapters(use_dora=True)), inputs(), monkeypatch)
    assert batches == [COUNT]


class _Mixes(nn.Module):
    """Rows that see each other have no place of their own in a batch of draws."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4).double()

    def forward(self, x: Tensor) -> Tensor:
        found = self.inner(x)
        return found - found.mean(0)


class _Turns(nn.Module):
    """Its layer sees as many rows as there are features."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.mT).mT


@pytest.mark.parametrize("kind", [_Mixes, _Turns])
def test_models_that_mix_rows_run_in_the_loop(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    posterior = VariationalPosterior(to_bayesian(kind(), delta=0.5).eval())
    batch = torch.randn(3, 4, dtype=torch.float64)
    expected = looped(posterior, batch, monkeypatch)
    found = list(posterior.passes(batch, num_samples=COUNT))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_where_draws_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither where most weights are random, nor for long inputs; where the rest lies ahead, if it fits in memory."""
    monkeypatch.undo()
    small = to_bayesian(bert(), target_modules=["layer.0.attention.self.query"])
    cases: Iterator[tuple[Any, int, bool]] = iter(
        [(small, 3, True), (small, 40, False), (to_bayesian(bert()), 3, False),
         (to_bayesian(bert(), target_modules=["classifier"]), 40, True),
         (to_bayesian(bert(), target_modules=["classifier"]), 10**5, False)]
    )  # fmt: skip
    for model, rows, pays in cases:
        posterior = VariationalPosterior(model.eval())
        arguments = model, private_view(model), list(posterior.random_parameters()), posterior.draw, inputs(rows)
        if pays:
            assert batched_passes.BatchedPasses(*arguments).at_once >= COUNT
        else:
            with pytest.raises(CannotBatch):
                batched_passes.BatchedPasses(*arguments)


def test_a_failed_batch_leaves_the_view_as_it_was() -> None:
    model = adapters()
    posterior = VariationalPosterior(model)
    view = private_view(model)
    assert view is not None
    batched = BatchedDraws(view, list(posterior.random_parameters()))
    assert batched.read((posterior.draw_in(view, index, 0) for index in range(2)), in_view=True) == 2
    kept = {name: dict(module._parameters) for name, module in view.model.named_modules()}
    with pytest.raises(CannotBatch, match="rows"), batched.installed([4]):
        view.model(**inputs(3))
    assert kept == {name: dict(module._parameters) for name, module in view.model.named_modules()}
    assert not any("forward" in vars(module) for module in view.model.modules())
    with torch.no_grad(), batched.installed([6]):
        both = view.model(**repeated(inputs(3), 3, 2)).logits
    for index in range(2):
        with torch.no_grad(), posterior.draw(index):
            torch.testing.assert_close(both[3 * index : 3 * index + 3], model(**inputs(3)).logits, atol=1e-12, rtol=0)


def _unshared(*args: Any, share: bool, **options: Any) -> Any:
    return monte_carlo(*args, share=False, **options)


def late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny models have large heads: whatever is random, the rest counts as ahead of it."""
    monkeypatch.setattr(batched_passes, "_thinness", lambda model, random: (0.0, 1.0))


def laplace_head(model: Any, name: str = "classifier") -> DiagonalPosterior:
    chosen = {f"{name}.{key}": p for key, p in model.get_submodule(name).named_parameters()}
    return DiagonalPosterior(model, {key: torch.full_like(p, 0.1) for key, p in chosen.items()})


class _Counted(nn.Module):
    """A body that counts its runs, then whatever ``head`` is."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.body, self.head, self.runs = nn.Linear(4, 3), head, 0

    def forward(self, x: Tensor) -> Any:
        self.body(x)
        return self.head(torch.tanh(self.body(x)))


def counted(head: nn.Module | None = None, **kinds: Any) -> Any:
    torch.manual_seed(0)
    model = kinds.get("kind", _Counted)(nn.Linear(3, 2) if head is None else head)
    return to_bayesian(model.double(), delta=0.5, target_modules=["head"]).eval()


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", ["classifier", r"bert.pooler.dense|classifier"])
def test_what_lies_ahead_of_a_head_runs_once(
    name: str, rows: int, batches: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One pass for all draws, of B rows up to the first random layer; a dropout and a tanh between two of them."""
    late(monkeypatch)
    model = to_bayesian(bert(), delta=0.5, target_modules=name).eval()
    seen: list[int] = []
    own = batched_passes.call

    def noted(model: nn.Module, batch: Any, **options: Any) -> Any:
        seen.append(len(batch["input_ids"]))
        return own(model, batch, **options)

    monkeypatch.setattr(batched_passes, "call", noted)
    assert_equal_passes(VariationalPosterior(model), inputs(rows), monkeypatch)
    assert batches == [COUNT, COUNT]
    assert seen == [rows] * 4  # the first batch runs two draws plainly too


@pytest.mark.parametrize("rows", [1, 3])
def test_a_head_that_is_copied_into_its_parameters(
    rows: int, batches: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    late(monkeypatch)
    model = bert().eval()
    assert_equal_passes(laplace_head(model), inputs(rows), monkeypatch)
    assert batches == [COUNT, COUNT]


class _Residual(_Counted):
    """B rows are added to S * B rows: of one example that is right, of several an error."""

    def forward(self, x: Tensor) -> Any:
        return self.head(self.body(x)) + x[:, :2]


class _First(_Counted):
    """Takes as many rows as there are examples, whichever draw they are of."""

    def forward(self, x: Tensor) -> Any:
        return self.head(self.body(x))[: len(x)]


class _Both(_Counted):
    """Returns its hidden state too, which has B rows."""

    def forward(self, x: Tensor) -> Any:
        hidden = self.body(x)
        return self.head(hidden), hidden


class _Counts(_Counted):
    """Its output depends on how often it ran."""

    def forward(self, x: Tensor) -> Any:
        self.runs += 1
        return self.head(self.body(x)) * self.runs


class _Noisy(_Counted):
    """Draws numbers in `eval()`."""

    def forward(self, x: Tensor) -> Any:
        return self.head(torch.nn.functional.dropout(self.body(x), training=True))


class _Edits(_Counted):
    """Changes its input."""

    def forward(self, x: Tensor) -> Any:
        return self.head(self.body(x.clamp_(-1, 1)))


class _Reads(_Counted):
    """Reads the head's weight elsewhere."""

    def forward(self, x: Tensor) -> Any:
        return self.head(self.body(x)) + self.head.weight.sum()


class _Mixing(_Counted):
    """Its draws would mix."""

    def forward(self, x: Tensor) -> Any:
        found = self.head(self.body(x))
        return found - found.mean(0)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("kind", [_Residual, _First, _Both, _Counts, _Noisy, _Edits, _Reads, _Mixing])
def test_what_one_pass_cannot_give_runs_in_the_loop(kind: Any, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each model gives what the loop of its own copy gives, twice; told of three rows after one row too."""
    late(monkeypatch)
    found, expected = [], []
    batches = [torch.randn(count, 4, dtype=torch.float64) for count in (1, rows, rows)]
    for one, is_loop in ((found, False), (expected, True)):
        posterior = VariationalPosterior(counted(kind=kind))
        for batch in batches:
            torch.manual_seed(1)
            x = batch.clone()
            with monkeypatch.context() as patch:
                if is_loop:
                    patch.setattr(batched_passes, "MIN_DRAWS", 10**9)
                    patch.setattr("bayeformers.posteriors.base.monte_carlo", _unshared)
                outputs = posterior.passes(x, num_samples=COUNT)
                one += [output[0] if kind is _Both else output for output in outputs]
    if kind is _Counts:  # what came before counts too: only the draws of one call can be compared
        found, expected = ([y / y.norm() for y in values] for values in (found, expected))
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-12, rtol=0)


@pytest.mark.parametrize("where", ["body", "head", ""])
def test_hooks_run_for_every_draw(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    late(monkeypatch)
    model = counted()
    ran: list[int] = []
    model.get_submodule(where).register_forward_hook(lambda *_: ran.append(1))
    posterior = VariationalPosterior(model)
    list(monte_carlo(model, posterior.draw, [], X, num_samples=COUNT, share=False))
    expected = len(ran)
    list(posterior.passes(X, num_samples=COUNT))  # the first batch is tried in the plain way too
    ran.clear()
    list(posterior.passes(X, num_samples=COUNT))
    assert len(ran) == expected


def test_a_table_of_one_row_says_nothing_of_several(batches: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A residual fits S rows to one: what was learned there is not believed of three, nor the other way round."""
    late(monkeypatch)
    posterior = VariationalPosterior(counted(kind=_Residual))
    for count in (1, 3, 1, 3, 1):
        list(posterior.passes(torch.ones(count, 4, dtype=torch.float64), num_samples=COUNT))
    assert batches == [COUNT] * 4  # three of one row, one try of three rows


class _Normalised(_Counted):
    """With statistics between its body and its head."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__(head)
        self.body = nn.Sequential(self.body, nn.BatchNorm1d(3))


def test_members_whose_buffers_differ_run_in_the_loop(batches: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """After a posterior of the same model, whose draws change the head alone, was found to run in one pass."""
    late(monkeypatch)
    torch.manual_seed(0)
    model = _Normalised(nn.Linear(3, 2)).double().eval()
    list(laplace_head(model, "head").passes(X, num_samples=COUNT))
    assert batches == [COUNT]
    members = [copy.deepcopy(model) for _ in range(3)]
    for number, member in enumerate(members):
        nn.init.constant_(member.head.weight, number)
        member.body[1].running_mean += number
    expected = [member(X).detach() for member in members]
    found = list(EnsemblePosterior(model, members).passes(X, num_samples=3))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
