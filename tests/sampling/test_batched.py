"""Draws in one batch are those of the loop: adapters, heads, tables; what cannot be batched runs one by one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from bayeformers import VariationalPosterior, to_bayesian
from bayeformers.posteriors import DiagonalPosterior
from bayeformers.sampling import batched_passes
from bayeformers.sampling.batched import BatchedDraws, CannotBatch, repeated
from bayeformers.sampling.views import private_view

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
    """Neither where most weights are random, nor where most of the model lies ahead of them, nor for long inputs."""
    monkeypatch.undo()
    small = to_bayesian(bert(), target_modules=["layer.0.attention.self.query"])
    cases: Iterator[tuple[Any, int, bool]] = iter(
        [(small, 3, True), (small, 40, False), (to_bayesian(bert()), 3, False),
         (to_bayesian(bert(), target_modules=["classifier"]), 3, False)]
    )  # fmt: skip
    for model, rows, pays in cases:
        posterior = VariationalPosterior(model.eval())
        arguments = model, None, list(posterior.random_parameters()), posterior.draw, inputs(rows)
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
