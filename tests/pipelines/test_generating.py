"""Pipelines that write: transformers' texts by one network, and the mean of several, whose doubts are `generate`'s."""

from __future__ import annotations

import math
import threading
from typing import Any

import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import BPE
from torch import Tensor

import bayeformers
from bayeformers import fixed_draw, generate, to_bayesian
from bayeformers.posteriors import PointPosterior, VariationalPosterior
from tests.pipelines.writers import GREEDY, TEXTS, VOCABULARY, drawn, gpt2, ids_of, lora, t5, writer
from tests.training.trainers import WORDS, llama, tokenizer


def chat_tokenizer() -> Any:
    found = tokenizer()
    found.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    return found


# -- one network is transformers' ------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [
    {}, {"num_return_sequences": 2, "num_beams": 3}, {"repetition_penalty": 1.8}, {"return_full_text": False},
    {"return_tensors": True}, {"do_sample": True, "temperature": 0.8, "top_k": 5},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("build", [llama, gpt2])
def test_one_network_writes_as_transformers_does(build: Any, options: dict[str, Any]) -> None:
    """Token by token, one text and several, in a batch and alone, whatever is asked of ``generate``."""
    plain = hf.pipeline("text-generation", model=build(), tokenizer=tokenizer(), device="cpu", **GREEDY)
    ours = writer(build(), num_samples=None)
    for inputs, more in ((TEXTS[0], {}), (TEXTS, {}), (TEXTS, {"batch_size": 2})):
        torch.manual_seed(0)
        expected = plain(inputs, **options, **more)
        torch.manual_seed(0)
        found = ours(inputs, **options, **more)
        flat = [record for one in found for record in one] if isinstance(inputs, list) else found
        wanted = [record for one in expected for record in one] if isinstance(inputs, list) else expected
        assert [{name: record[name] for name in known} for record, known in zip(flat, wanted, strict=True)] == wanted
        assert all(record["uncertainty"]["epistemic"] == 0.0 for record in flat)


def test_the_mean_of_a_bayesian_model_writes_as_it_did() -> None:
    """A point posterior of a converted model is its mean: transformers' text of the model before."""
    model = to_bayesian(llama(), delta=0.5).eval()
    found = bayeformers.pipeline(
        "text-generation", posterior=PointPosterior(model), tokenizer=tokenizer(), device="cpu", **GREEDY
    )  # fmt: skip
    expected = hf.pipeline("text-generation", model=llama(), tokenizer=tokenizer(), device="cpu", **GREEDY)
    assert [r[0]["generated_text"] for r in found(TEXTS)] == [r[0]["generated_text"] for r in expected(TEXTS)]


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}], ids=str)
def test_an_encoder_decoder_writes_as_its_generate(options: dict[str, Any]) -> None:
    """transformers 5 has no pipeline for it: against the model's own ``generate``."""
    model, batch = t5(), tokenizer()(TEXTS, return_tensors="pt", padding=True)
    ids = model.generate(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **GREEDY | options
    )  # fmt: skip
    expected = tokenizer().batch_decode(ids, skip_special_tokens=True)
    found = writer(model, "text2text-generation")(TEXTS, batch_size=2, **options)
    assert [record["generated_text"] for one in found for record in one] == expected
    assert writer(model, "text2text-generation")(TEXTS[0], return_tensors=True)[0]["generated_token_ids"][0] == 0


def letters() -> Any:
    """One token per letter "a" ... "u"; <pad> is 0, and <eos> is 1."""
    inner = Tokenizer(BPE({"<pad>": 0, "<eos>": 1, **{chr(95 + n): n for n in range(2, WORDS)}}, []))
    inner.decoder = Fuse()
    return hf.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")


@pytest.mark.parametrize("padding", [0, 1])
def test_stop_strings(padding: int) -> None:
    """As transformers stops; in a batch with texts that go on too, also where the padding is the end's token."""
    texts, options = ["abc", "bdf", "kba", "uaf"], {"max_new_tokens": 8, "do_sample": False, "pad_token_id": padding}
    model = to_bayesian(llama().double(), delta=0.5).eval()
    plain = hf.pipeline("text-generation", model=model, tokenizer=letters(), device="cpu", **options)
    stops = sorted({one[0]["generated_text"][4:5] for one in plain(texts)} - {""})[:2]
    point = bayeformers.pipeline(
        "text-generation", posterior=PointPosterior(model), tokenizer=letters(), device="cpu", **options
    )  # fmt: skip
    expected = plain(texts, stop_sequence=stops)
    for batch_size in (1, 4):
        found = point(texts, stop_sequence=stops, batch_size=batch_size)
        assert [one[0]["generated_text"] for one in found] == [one[0]["generated_text"] for one in expected]
    pipe = bayeformers.pipeline(
        "text-generation", model, tokenizer=letters(), device="cpu", num_samples=3, stop_sequence=stops,
        token_uncertainty=True, **options,
    )  # fmt: skip
    for mixing in ("average", "draws"):
        alone = [record for text in texts for record in pipe(text, mixing=mixing)]
        batch = [record for one in pipe(texts, mixing=mixing, batch_size=4) for record in one]
        lengths = {len(record["token_uncertainty"]["tokens"]) for record in alone}
        assert min(lengths) < 8 == max(lengths)
        for record, wanted in zip(batch, alone, strict=True):
            assert record["token_uncertainty"]["tokens"] == wanted["token_uncertainty"]["tokens"]
            assert record["uncertainty"] == pytest.approx(wanted["uncertainty"], abs=1e-9)
            assert record["sequence_score"] == pytest.approx(wanted["sequence_score"], abs=1e-9)


# -- several networks ------------------------------------------------------------------------------------------------


def by_hand(model: Any, text: str, count: int, new: int = 5) -> tuple[list[int], Tensor]:
    """The greedy path of log 1/S sum_s p_s, and per token total, aleatoric, epistemic and log-probability (T, 4).

    Each draw reads the whole text anew at each step, without a cache.
    """
    ids, rows = ids_of(text)["input_ids"], []
    for _ in range(new):
        each = []
        for index in range(count):
            with fixed_draw(model, index), torch.no_grad():
                each.append(model(input_ids=ids).logits[0, -1].softmax(-1))
        probs = torch.stack(each)
        mean = probs.mean(0)
        total, aleatoric = -(mean * mean.log()).sum(), -(probs * probs.log()).sum(-1).mean()
        token = int(mean.argmax())
        rows.append(torch.stack([total, aleatoric, total - aleatoric, mean[token].log()]))
        ids = torch.cat([ids, torch.tensor([[token]])], 1)
        if token == VOCABULARY["eos_token_id"]:
            break
    return ids[0, ids_of(text)["input_ids"].shape[1] :].tolist(), torch.stack(rows)


@pytest.mark.parametrize("build", [drawn, lambda: drawn("gpt2"), lora], ids=["llama", "gpt2", "lora"])
def test_averaged_texts_against_a_brute_force(build: Any) -> None:
    """Text, uncertainty, score, and each token's, in float64: from draws that are held one by one."""
    model = build()
    expected = [by_hand(model, text, 4) for text in TEXTS[:2]]
    for batch_size in (1, 2):
        found = writer(model, token_uncertainty=True, return_full_text=False)(TEXTS[:2], batch_size=batch_size)
        for (record,), (tokens, rows) in zip(found, expected, strict=True):
            assert record["generated_text"] == tokenizer().decode(tokens, skip_special_tokens=True)
            parts = record["token_uncertainty"]
            assert parts["tokens"] == tokenizer().convert_ids_to_tokens(tokens)
            for name, column in zip(("total", "aleatoric", "epistemic", "log_prob"), rows.T, strict=True):
                assert parts[name] == pytest.approx(column.tolist(), abs=1e-9)
            means = dict(zip(("total", "aleatoric", "epistemic"), rows.mean(0).tolist(), strict=False))
            assert record["uncertainty"] == pytest.approx(means, abs=1e-9)
            assert record["sequence_score"] == pytest.approx(float(rows[:, 3].sum()), abs=1e-9)
            assert "agreement" not in record and "abstain" not in record


@pytest.mark.parametrize("options", [{}, {"num_beams": 2, "num_return_sequences": 2}], ids=str)
@pytest.mark.parametrize(("name", "task"), [("llama", "text-generation"), ("t5", "text2text-generation")])
def test_drawn_answers_are_the_draws_own(name: str, task: str, options: dict[str, Any]) -> None:
    """With ``mixing="draws"`` an input's results are each network's, draw by draw; agreement is their largest share."""
    model = drawn(name)
    pipe = writer(model, task, mixing="draws", return_tensors=True)
    for text, records in zip(TEXTS, pipe(TEXTS, batch_size=2, **options), strict=True):
        ends, expected = {0, 1}, []
        for index in range(4):
            with fixed_draw(model, index):
                ids = model.generate(**ids_of(text), **GREEDY | options)
            expected += [[token for token in row if token not in ends] for row in ids.tolist()]
        found = [[int(t) for t in record["generated_token_ids"] if int(t) not in ends] for record in records]
        assert found == expected
        shares = {record["agreement"] for record in records}
        assert shares == {max(map(expected.count, expected)) / len(expected)}


def test_a_drawn_answers_score_is_its_probability_under_a_random_network() -> None:
    model = drawn()
    for record in writer(model, mixing="draws", return_tensors=True)(TEXTS[0]):
        start = ids_of(TEXTS[0])["input_ids"].shape[1]
        ids = torch.tensor([record["generated_token_ids"]])
        length = ids.shape[1] - start - int((ids[0, start:] == 0).sum())
        each = []
        for index in range(4):
            with fixed_draw(model, index), torch.no_grad():
                log_probs = model(input_ids=ids).logits[0, start - 1 : -1].log_softmax(-1)
            each.append(log_probs.gather(-1, ids[0, start:, None])[:length, 0].sum())
        expected = float(torch.stack(each).logsumexp(0) - math.log(4))
        assert record["sequence_score"] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("mixing", ["average", "draws"])
@pytest.mark.parametrize(("name", "task"), [
    ("llama", "text-generation"), ("gpt2", "text-generation"), ("t5", "text2text-generation"),
])  # fmt: skip
def test_batching_and_padding_change_nothing(name: str, task: str, mixing: str) -> None:
    pipe = writer(drawn(name), task, mixing=mixing, token_uncertainty=True, num_samples=3, max_new_tokens=3)
    alone = pipe(TEXTS)
    for found in (pipe(TEXTS, batch_size=2), list(pipe((text for text in TEXTS), batch_size=3))):
        for one, wanted in zip(found, alone, strict=True):
            for record, expected in zip(one, wanted, strict=True):
                parts, others = record["token_uncertainty"], expected["token_uncertainty"]
                assert record["generated_text"] == expected["generated_text"] and parts["tokens"] == others["tokens"]
                assert record["uncertainty"] == pytest.approx(expected["uncertainty"], abs=1e-6)
                assert record["sequence_score"] == pytest.approx(expected["sequence_score"], abs=1e-6)
                assert parts["epistemic"] == pytest.approx(others["epistemic"], abs=1e-6)


@pytest.mark.parametrize(("build", "count"), [(drawn, 2), (drawn, 4), (lora, 4)], ids=["llama-2", "llama-4", "lora-4"])
def test_threads_get_one_threads_answers(build: Any, count: int) -> None:
    """Greedy texts, bit for bit, while every thread asks in both ways; the model is left in `train()`."""
    model = build().train()
    pipe = writer(model, num_samples=3, max_new_tokens=3)
    asked = [(text, mixing) for text in TEXTS[:2] for mixing in ("average", "draws")]
    expected = [pipe(text, mixing=mixing) for text, mixing in asked]
    found: dict[int, Any] = {}
    barrier = threading.Barrier(count)

    def run(number: int) -> None:
        barrier.wait()
        order = [(number + place) % len(asked) for place in range(len(asked))]
        answers = {place: pipe(asked[place][0], mixing=asked[place][1]) for place in order}
        found[number] = [answers[place] for place in range(len(asked))]

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[number] for number in range(count)] == [expected] * count
    assert all(module.training for module in model.modules())


def test_chats() -> None:
    """Several too, and one whose last message is to be continued, as transformers makes their results."""
    chats = [[{"role": "user", "content": text}] for text in TEXTS[:2]]
    begun = [*chats[0], {"role": "assistant", "content": "w5"}]
    plain = hf.pipeline("text-generation", model=llama(), tokenizer=chat_tokenizer(), device="cpu", **GREEDY)
    ours = bayeformers.pipeline(
        "text-generation", model=llama(), tokenizer=chat_tokenizer(), device="cpu", **GREEDY
    )  # fmt: skip
    for inputs in (chats[0], begun):
        (record,) = ours(inputs)
        assert record["generated_text"] == plain(inputs)[0]["generated_text"]
        assert record["generated_text"][-1]["role"] == "assistant" and set(record["uncertainty"]) == {
            "total", "aleatoric", "epistemic",
        }  # fmt: skip
    assert [one[0]["generated_text"] for one in ours(chats)] == [one[0]["generated_text"] for one in plain(chats)]


def test_an_empty_prompt_begins_as_transformers_has_it() -> None:
    plain = hf.pipeline("text-generation", model=llama(), tokenizer=tokenizer(), device="cpu", **GREEDY)
    assert writer(llama())("")[0]["generated_text"] == plain("")[0]["generated_text"]


def test_a_call_may_have_its_own_draws() -> None:
    model = drawn()
    pipe = writer(model)
    posterior = VariationalPosterior(model)
    for count, seed in ((2, 0), (4, 7)):
        wanted = generate(posterior, ids_of(TEXTS[0]), num_samples=count, seed=seed, mixing="average", **GREEDY)
        record = pipe(TEXTS[0], num_samples=count, seed=seed)[0]
        assert record["sequence_score"] == pytest.approx(float(wanted.sequence_scores.log_prob[0]), abs=1e-9)
