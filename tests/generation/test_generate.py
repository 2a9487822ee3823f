"""S answers: each is what `generate` writes under that draw, and its scores are those of plain forwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from bayeformers import VariationalPosterior, fixed_draw, generate, to_bayesian
from bayeformers.generation import networks as networks_module
from bayeformers.generation import score_sequences
from bayeformers.posteriors import DropoutPosterior, EnsemblePosterior, PointPosterior
from bayeformers.sampling.batched import BatchedDraws, CannotBatch
from tests.generation.models import bayesian_lora, copied, plain, prompt, with_lora

GREEDY = {"max_new_tokens": 5, "do_sample": False}


def one_by_one(model: Any, inputs: dict[str, Tensor], count: int, **options: Any) -> list[Tensor]:
    found = []
    for index in range(count):
        with fixed_draw(model, index):
            found.append(model.generate(**inputs, **options))
    return found


def assert_same_answers(sequences: Tensor, expected: list[Tensor]) -> None:
    assert len(sequences) == len(expected)
    for ours, theirs in zip(sequences, expected, strict=True):
        assert torch.equal(ours[:, : theirs.shape[1]], theirs)
        assert bool((ours[:, theirs.shape[1] :] == 0).all())


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_each_answer_is_that_of_its_draw(name: str) -> None:
    """In one batch, with padding on the left; greedy and beams."""
    model, inputs = bayesian_lora(name), prompt()
    for options in (GREEDY, GREEDY | {"num_beams": 3}, GREEDY | {"num_beams": 3, "num_return_sequences": 2}):
        found = generate(model, inputs, num_samples=3, **options)
        expected = one_by_one(model, inputs, 3, **options)
        assert_same_answers(found.sequences, expected)
        assert len({tuple(answer.flatten().tolist()) for answer in expected}) > 1  # else nothing is tested
        assert found.mask.shape == (*found.sequences.shape[:2], found.sequences.shape[2] - found.prompt_length)
        assert found.prompt_length == (1 if name == "t5" else 5)


def test_the_batch_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """One forward for each token, of S * B rows."""
    rows: list[int] = []
    model, inputs = bayesian_lora("llama"), prompt()
    inner = type(model.get_base_model())
    own = inner.forward

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        rows.append(len(kwargs["input_ids"]))
        return own(self, *args, **kwargs)

    generate(model, inputs, num_samples=3, **GREEDY)  # the first compares with the loop
    monkeypatch.setattr(inner, "forward", counted)
    generate(model, inputs, num_samples=3, **GREEDY, min_new_tokens=5)
    assert rows == [6] * 5


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_whole_models_that_do_not_batch(name: str) -> None:
    """A table of positions or of distances is read for all rows at once: draws run one after the other."""
    model, inputs = to_bayesian(plain(name), delta=0.5).eval(), prompt()
    found = generate(model, inputs, num_samples=3, **GREEDY)
    assert_same_answers(found.sequences, one_by_one(model, inputs, 3, **GREEDY))
    again = generate(model, inputs, num_samples=3, mixing="average", **GREEDY)
    cached = generate(model, inputs, num_samples=3, mixing="average", **GREEDY, use_cache=False)
    assert torch.equal(again.sequences, cached.sequences)
    torch.testing.assert_close(again.epistemic, cached.epistemic, atol=1e-9, rtol=0)


def test_a_weight_that_is_read_is_not_batched() -> None:
    """DoRA computes the norm of W + BA: a batch would give NaN, the loop gives the draws."""
    model, inputs = bayesian_lora("llama", use_dora=True), prompt()
    found = generate(model, inputs, num_samples=3, **GREEDY)
    assert_same_answers(found.sequences, one_by_one(model, inputs, 3, **GREEDY))
    assert all(reason is not None for reason in networks_module._verdicts[model].values())


@pytest.mark.parametrize("mixing", ["draws", "average"])
def test_a_batch_that_fails_later_is_a_loop(mixing: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a step meets what the comparison did not: the draws run again, one after the other, and from then on."""
    model, inputs = bayesian_lora("llama"), prompt()
    expected = generate(copied(model), inputs, num_samples=2, mixing=mixing, **GREEDY)

    def fails(self: Any, rows: Any) -> Any:
        raise CannotBatch("a late surprise")

    monkeypatch.setattr(networks_module.Networks, "_compared", lambda self, batched, given: None)
    monkeypatch.setattr(BatchedDraws, "installed", fails)
    found = generate(model, inputs, num_samples=2, mixing=mixing, **GREEDY)
    assert torch.equal(found.sequences, expected.sequences)
    assert list(networks_module._verdicts[model].values()) == ["a late surprise"]


def test_posteriors_of_other_kinds() -> None:
    """Members of an ensemble of adapters in one batch, and dropout one after the other."""
    base, inputs = with_lora("llama"), prompt()
    members = []
    for scale in (1.0, -1.0, 2.0):
        members.append({k: v * scale for k, v in base.state_dict().items() if "lora_A" in k})
    posterior = EnsemblePosterior(base, members)
    found = generate(posterior, inputs, num_samples=8, **GREEDY)
    assert len(found.sequences) == 3
    for index, answer in enumerate(found.sequences):
        with posterior.draw(index):
            assert_same_answers(answer[None], [base.generate(**inputs, **GREEDY)])
    average = generate(posterior, inputs, mixing="average", **GREEDY)
    assert bool((average.epistemic[average.mask] > 0).any())
    dropout = DropoutPosterior(with_lora("llama", lora_dropout=0.5), rate=0.5)
    found = generate(dropout, inputs, num_samples=2, **GREEDY)
    for index, answer in enumerate(found.sequences):
        with dropout.draw(index):
            assert_same_answers(answer[None], [dropout.model.generate(**inputs, **GREEDY)])  # type: ignore[operator]


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("mixing", ["draws", "average"])
def test_one_network_at_the_mean_is_the_model(name: str, mixing: Any) -> None:
    """S = 1 at the mean, greedy: token by token what the model's own `generate` writes."""
    model, inputs = bayesian_lora(name), prompt()
    found = generate(PointPosterior(model), inputs, mixing=mixing, **GREEDY)
    expected = model.generate(**inputs, **GREEDY)
    assert torch.equal(found.sequences.view(expected.shape), expected)
    assert float(found.epistemic.abs().max()) < 1e-12


def brute_force(model: Any, sequences: Tensor, inputs: dict[str, Tensor], start: int, count: int) -> Tensor:
    """log p_s of every next token, (S, R, T, V): uncached forwards under each draw, one row at a time, unpadded."""
    found = []
    for index in range(count):
        rows = []
        for row, mask in zip(sequences, inputs["attention_mask"], strict=True):
            with fixed_draw(model, index), torch.no_grad():
                logits = model(input_ids=row[None, int((mask == 0).sum()) :]).logits[0]
            rows.append(logits[-(len(row) - start) - 1 : -1].log_softmax(-1))
        found.append(torch.stack(rows))
    return torch.stack(found)


@pytest.mark.parametrize("batched", [True, False])
def test_scores_are_those_of_uncached_forwards(batched: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not batched:
        monkeypatch.setattr("bayeformers.generation.networks.MAX_BYTES", 0)
    model, inputs = bayesian_lora("llama"), prompt()
    found = generate(model, inputs, num_samples=3, **GREEDY)
    average = generate(model, inputs, num_samples=3, mixing="average", **GREEDY)
    answers = [*found.sequences, average.sequences]
    for place, sequences in enumerate(answers):
        mask = found.mask[place] if place < 3 else average.mask
        log_probs = brute_force(model, sequences, inputs, 5, 3)
        mean = log_probs.exp().mean(0)
        total = -(mean * mean.log()).sum(-1) * mask
        aleatoric = -(log_probs.exp() * log_probs).sum(-1).mean(0) * mask
        scores = found.token_scores if place < 3 else average.token_scores
        pick = (lambda x, place=place: x[place]) if place < 3 else (lambda x: x)
        torch.testing.assert_close(pick(scores.total), total, atol=1e-9, rtol=0)
        torch.testing.assert_close(pick(scores.aleatoric), aleatoric, atol=1e-9, rtol=0)
        torch.testing.assert_close(pick(scores.epistemic), (total - aleatoric).clamp_min(0), atol=1e-9, rtol=0)
        tokens = log_probs.gather(-1, sequences[None, :, 5:, None].expand(3, -1, -1, 1))[..., 0] * mask
        own = tokens[place] if place < 3 else tokens.exp().mean(0).log() * mask
        given = found.token_log_probs[place] if place < 3 else average.token_log_probs  # type: ignore[index]
        torch.testing.assert_close(given, own, atol=1e-9, rtol=0)  # of the cached steps
        whole = found.sequence_scores if place < 3 else average.sequence_scores
        torch.testing.assert_close(pick(whole.log_prob), own.sum(-1), atol=1e-9, rtol=0)
        mixture = tokens.sum(-1).exp().mean(0).log()
        torch.testing.assert_close(pick(whole.mixture_log_prob), mixture, atol=1e-9, rtol=0)
        lengths = mask.sum(-1)
        torch.testing.assert_close(pick(whole.per_token), own.sum(-1) / lengths, atol=1e-9, rtol=0)


def test_scores_of_padded_ids_without_a_mask() -> None:
    """transformers tells the padding by its id, and so do the scores."""
    model, inputs = bayesian_lora("llama"), prompt()
    ids = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, 0)
    found, expected = generate(model, ids, num_samples=2, **GREEDY), generate(model, inputs, num_samples=2, **GREEDY)
    assert torch.equal(found.sequences[..., 5:], expected.sequences[..., 5:])
    torch.testing.assert_close(found.token_scores.total, expected.token_scores.total, atol=1e-9, rtol=0)
    torch.testing.assert_close(found.token_scores.own, found.token_log_probs, atol=1e-9, rtol=0)
    scores = score_sequences(model, found.sequences[0], {"input_ids": ids}, prompt_length=5, num_samples=2)
    torch.testing.assert_close(scores.total * found.mask[0], found.token_scores.total[0], atol=1e-9, rtol=0)
    assert score_sequences(model, inputs["input_ids"], inputs, prompt_length=5).total.shape == (2, 0)


@pytest.mark.parametrize(("name", "given"), [("llama", "position_ids"), ("gpt2", "token_type_ids")])
def test_scores_with_other_inputs_of_tokens(name: str, given: str) -> None:
    """They go on over the generated tokens, as in the cached steps."""
    model, inputs = bayesian_lora(name), prompt(padded=False)
    inputs[given] = torch.arange(4, 9).expand(2, 5) if given == "position_ids" else torch.full((2, 5), 7)
    found = generate(model, inputs, num_samples=2, **GREEDY)
    torch.testing.assert_close(found.token_scores.own, found.token_log_probs, atol=1e-9, rtol=0)


@pytest.mark.parametrize("mixing", ["draws", "average"])
def test_beams_are_scored_afterwards(mixing: Any) -> None:
    model, inputs = bayesian_lora("llama"), prompt()
    found = generate(model, inputs, num_samples=3, mixing=mixing, num_beams=2, num_return_sequences=2, **GREEDY)
    rows = found.sequences if mixing == "average" else found.sequences[1]
    doubled = {name: value.repeat_interleave(2, 0) for name, value in inputs.items()}
    log_probs = brute_force(model, rows, doubled, 5, 3)
    mask = found.mask if mixing == "average" else found.mask[1]
    mean = log_probs.exp().mean(0)
    total = found.total if mixing == "average" else found.total[1]
    torch.testing.assert_close(total, -(mean * mean.log()).sum(-1) * mask, atol=1e-9, rtol=0)
    assert found.token_log_probs is None
    given = score_sequences(model, rows, inputs, prompt_length=5, num_samples=3)
    torch.testing.assert_close(given.total * mask, total, atol=1e-9, rtol=0)


def test_an_encoder_decoder_is_scored() -> None:
    model, inputs = bayesian_lora("t5"), prompt()
    average = generate(model, inputs, num_samples=3, mixing="average", suppress_tokens=[0], **GREEDY)
    again = score_sequences(model, average.sequences, inputs, prompt_length=1, num_samples=3)
    torch.testing.assert_close(again.total * average.mask, average.total, atol=1e-9, rtol=0)
    torch.testing.assert_close(again.epistemic * average.mask, average.epistemic, atol=1e-9, rtol=0)
    assert bool((average.epistemic[average.mask] > 1e-4).any())


def test_the_model_is_left_as_it_is() -> None:
    model, inputs = bayesian_lora("llama").train(), prompt()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    own = {name: set(vars(module)) for name, module in model.named_modules()}
    state = torch.get_rng_state()
    first = generate(model, inputs, num_samples=2, **GREEDY)
    generate(model, inputs, num_samples=2, mixing="average", **GREEDY)
    assert torch.equal(state, torch.get_rng_state())
    assert model.training
    assert own == {name: set(vars(module)) for name, module in model.named_modules()}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    other = generate(copied(model), inputs, num_samples=2, **GREEDY)
    assert torch.equal(first.sequences, other.sequences)


def test_scores_of_weights_that_have_changed_are_refused() -> None:
    model, inputs = bayesian_lora("llama"), prompt()
    found = generate(model, inputs, num_samples=2, **GREEDY)
    asked = generate(model, inputs, num_samples=2, **GREEDY)
    kept = asked.epistemic
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_A" in n and "rho" not in n).add_(1.0)
    with pytest.raises(RuntimeError, match="weights have changed"):
        _ = found.epistemic
    assert asked.epistemic is not None and torch.equal(asked.epistemic, kept)


class _StopsAfter(StoppingCriteria):
    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


@pytest.mark.parametrize("mixing", ["draws", "average"])
def test_the_users_criteria_and_configuration_count(mixing: Any) -> None:
    model, inputs = bayesian_lora("llama"), prompt()
    found = generate(
        model, inputs, num_samples=2, mixing=mixing, max_new_tokens=9, do_sample=False, min_new_tokens=9,
        stopping_criteria=StoppingCriteriaList([_StopsAfter(8)]),
    )  # fmt: skip
    assert found.sequences.shape[-1] == 8
    posterior = VariationalPosterior(model)
    fewer = generate(posterior, inputs["input_ids"][:1], num_samples=2, mixing=mixing, **GREEDY)
    assert fewer.sequences.shape[-2] == 1
