"""One answer by all draws: the mean of next-token probabilities, against an enumeration of every text."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from bayeformers import fixed_draw, generate
from tests.generation.models import VOCABULARY, bayesian_lora, prompt

NEW, DRAWS = 3, 3
NO_END = {"max_new_tokens": NEW, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(scope="module")
def enumerated() -> tuple[Any, dict[str, Tensor], Tensor]:
    """A model, a prompt, and log P(y) of all 13^3 texts: the product over t of mean_s p_s(y_t | y_<t), uncached."""
    model, inputs = bayesian_lora("llama"), prompt(rows=1)
    texts = torch.tensor(list(itertools.product(range(VOCABULARY), repeat=NEW)))
    rows = torch.cat([inputs["input_ids"].expand(len(texts), -1), texts], 1)
    each = []
    for index in range(DRAWS):
        with fixed_draw(model, index), torch.no_grad():
            log_probs = model(input_ids=rows[:, :-1]).logits[:, -NEW:].log_softmax(-1)
        each.append(log_probs.gather(-1, texts[..., None])[..., 0])
    by_token = torch.stack(each).exp().mean(0).log()
    return model, inputs, by_token.sum(-1).view([VOCABULARY] * NEW)


def average(model: Any, inputs: dict[str, Tensor], **options: Any) -> Any:
    return generate(model, inputs, num_samples=DRAWS, mixing="average", **NO_END | options)


def test_probabilities_sum_to_one(enumerated: tuple[Any, dict[str, Tensor], Tensor]) -> None:
    assert float(enumerated[2].exp().sum()) == pytest.approx(1.0, abs=1e-12)


def test_greedy_is_the_greedy_path_of_the_mixture(enumerated: tuple[Any, dict[str, Tensor], Tensor]) -> None:
    model, inputs, log_probs = enumerated
    path: list[int] = []
    for _ in range(NEW):
        rest = log_probs[tuple(path)]
        path.append(int(rest.reshape(VOCABULARY, -1).logsumexp(-1).argmax()))
    found = average(model, inputs, do_sample=False)
    assert found.sequences[0, 5:].tolist() == path
    assert float(found.sequence_scores.log_prob[0]) == pytest.approx(float(log_probs[tuple(path)]), abs=1e-9)


def test_enough_beams_find_the_most_probable_text(enumerated: tuple[Any, dict[str, Tensor], Tensor]) -> None:
    """With 13^2 beams no prefix is dropped; the four best texts come in order."""
    model, inputs, log_probs = enumerated
    found = average(
        model, inputs, do_sample=False, num_beams=VOCABULARY**2, num_return_sequences=4, length_penalty=0.0
    )  # fmt: skip
    best = log_probs.flatten().topk(4)
    expected = torch.stack(torch.unravel_index(best.indices, log_probs.shape), 1)
    assert torch.equal(found.sequences[:, 5:], expected)
    torch.testing.assert_close(found.sequence_scores.log_prob, best.values, atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_few_beams_are_those_of_the_loop(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache moves with the beams in the rows of every draw: with it as without, in a batch as in a loop."""
    model, inputs = bayesian_lora(name), prompt()
    options = {"num_samples": 3, "mixing": "average", "num_beams": 3, "do_sample": False, "max_new_tokens": 5}
    cached = generate(model, inputs, **options)
    monkeypatch.setattr("bayeformers.generation.networks.MAX_BYTES", 0)
    looped = generate(model, inputs, **options)
    uncached = generate(model, inputs, **options, use_cache=False)
    assert torch.equal(cached.sequences, looped.sequences)
    assert torch.equal(looped.sequences, uncached.sequences)
    torch.testing.assert_close(cached.total, uncached.total, atol=1e-9, rtol=0)


def test_sampled_texts_have_the_mixtures_probabilities(enumerated: tuple[Any, dict[str, Tensor], Tensor]) -> None:
    model, inputs, log_probs = enumerated
    torch.manual_seed(0)
    count = 4000
    found = average(model, inputs, do_sample=True, num_return_sequences=count, top_k=0, max_new_tokens=2)
    expected = log_probs.logsumexp(-1).exp().flatten()
    texts = found.sequences[:, 5] * VOCABULARY + found.sequences[:, 6]
    seen = torch.bincount(texts, minlength=len(expected)).double()
    likely = expected * count >= 5
    statistic = float(((seen - count * expected).square() / (count * expected))[likely].sum())
    degrees = int(likely.sum())
    assert statistic < degrees + 4 * (2 * degrees) ** 0.5  # chi^2 has mean k and variance 2 k; the seed is fixed
    assert found.agreement.shape == (1,)


class _Bans(LogitsProcessor):
    def __init__(self, token: int) -> None:
        self.token, self.seen = token, list[Tensor]()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.seen.append(scores.clone())
        return scores.index_fill(-1, torch.tensor([self.token]), -torch.inf)


class _Streamer:
    def __init__(self) -> None:
        self.tokens: list[int] = []

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.tokens.append(-1)


def test_processors_and_streamers_see_the_mean(enumerated: tuple[Any, dict[str, Tensor], Tensor]) -> None:
    model, inputs, log_probs = enumerated
    first = log_probs.reshape(VOCABULARY, -1).logsumexp(-1)
    bans, streamer = _Bans(int(first.argmax())), _Streamer()
    found = average(model, inputs, do_sample=False, logits_processor=LogitsProcessorList([bans]), streamer=streamer)
    torch.testing.assert_close(bans.seen[0][0].double(), first, atol=1e-6, rtol=0)  # transformers casts to float32
    assert int(found.sequences[0, 5]) == int(first.topk(2).indices[1])
    assert streamer.tokens == [*found.sequences[0].tolist(), -1]


def test_a_text_that_ends_is_masked() -> None:
    model, inputs = bayesian_lora("llama"), prompt()
    free = generate(model, inputs, num_samples=3, mixing="average", **NO_END, do_sample=False)
    end = int(free.sequences[0, 6])
    found = generate(
        model, inputs, num_samples=3, mixing="average", max_new_tokens=NEW, eos_token_id=end, do_sample=False
    )
    expected = [True] * (free.sequences[0, 5:].tolist().index(end) + 1)
    assert found.mask[0].tolist() == expected + [False] * (found.mask.shape[1] - len(expected))
    assert bool((found.total[~found.mask] == 0).all()) and bool((found.total[found.mask] > 0).all())
