"""The board of adapters on tiny models and made-up tasks: an encoder with a sequence head, a decoder that answers."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from bayeformers.adapters import AnswerTokens
from examples.data.tiny_bert import make_tokenizer

pytest.importorskip("peft")

from benchmarks.adapters import errors, tasks
from benchmarks.adapters.__main__ import main
from benchmarks.adapters.answers import answer_tokens, digit_token
from benchmarks.adapters.board import KIND, AdapterBoard
from benchmarks.adapters.page import MARK
from benchmarks.leaderboard.rows import Row
from benchmarks.leaderboard.tables import cost

WORDS = "amber birch cedar delta ember flint grove haven islet jetty knoll larch".split()
SENTENCES = [f"the {word} is {kind}" for word in WORDS for kind in ("here", "gone")]
METHODS_RUN = "map,temperature,mc_dropout,ensemble,tfb,laplace,blob,scalabl,default"


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AdapterBoard]:
    """CoLA's and ARC-Easy's layouts, three adapters each of two steps, all rows done."""
    root = tmp_path_factory.mktemp("adapters")
    write_data(root)
    encoder, tokenizer = tiny_bert(), make_tokenizer(SENTENCES, min_count=2)
    encoder.save_pretrained(root / "encoder")
    tokenizer.save_pretrained(root / "encoder")
    decoder, tokenizer = tiny_llama()
    decoder.save_pretrained(root / "decoder")
    tokenizer.save_pretrained(root / "decoder")
    board = AdapterBoard(root, root / "out", str(root / "encoder"), str(root / "decoder"))
    short = {
        "cola": tasks.AdapterTask("encoder", 2, 4, 1e-3, 2),
        "arc_easy": tasks.AdapterTask("decoder", 2, 4, 1e-3, 4, answers=True, most_rows=9),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, task in short.items():
            patch.setitem(tasks.TASKS, name, task)
        yield board


def write_data(root: Path) -> None:
    (root / "glue" / "CoLA").mkdir(parents=True)
    lines = [f"x\t{index % 2}\t\t{sentence}" for index, sentence in enumerate(SENTENCES)]
    for name, some in (("train", lines), ("dev", lines[:8]), ("out_of_domain_dev", lines[:3])):
        (root / "glue" / "CoLA" / f"{name}.tsv").write_text("\n".join(some) + "\n", encoding="utf-8")
    (root / "choice" / "ARC-Easy").mkdir(parents=True)
    questions = [
        {"instruction": f"{tasks.BEGIN}{sentence}{tasks.END}", "answer": f"answer{index % 5 + 1}"}
        for index, sentence in enumerate(SENTENCES)
    ]
    for name in ("train", "test"):
        (root / "choice" / "ARC-Easy" / f"{name}.json").write_text(json.dumps(questions), encoding="utf-8")


def tiny_bert() -> BertModel:
    torch.manual_seed(0)
    return BertModel(
        BertConfig(vocab_size=100, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    )


def tiny_llama() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """With a tokenizer of bytes, which has digits of their own."""
    bytewise = Tokenizer(models.BPE())
    bytewise.pre_tokenizer, bytewise.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    bytewise.train_from_iterator([*SENTENCES, tasks.CLOSING], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytewise, eos_token="<end>", pad_token="<end>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval(), tokenizer


def arguments(board: AdapterBoard, *more: str) -> list[str]:
    folders = ["--data_dir", str(board.data_dir), "--output_dir", str(board.output_dir)]
    models = ["--encoder", str(board.model), "--decoder", str(board.decoder)]
    return [*folders, *models, "--tasks", "cola,arc_easy", "--methods", METHODS_RUN, "--processes", "0", *more]


def test_board_runs_rows_once_and_writes_its_page(
    board: AdapterBoard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"# By hand\n\n{MARK}\n\nold tables", encoding="utf-8")
    assert main(arguments(board, "--seeds", "1,2", "--methods", "map")) == 0
    assert main(arguments(board, "--seeds", "0", "--page", str(page), "--num_resamples", "20")) == 0
    cells = json.loads((board.output_dir / "adapters.json").read_text())
    assert [(cell["task"], cell["rows"]) for cell in cells] == [("cola", 8), ("arc_easy", 9)]
    assert all(list(cell["methods"]) == METHODS_RUN.split(",") for cell in cells)
    text = page.read_text(encoding="utf-8")
    assert text.startswith("# By hand") and "| cola, seed 0 | encoder | 2 |" in text and "old tables" not in text
    assert all(method["title"] in text for method in cells[0]["methods"].values())
    monkeypatch.setattr(AdapterBoard, "run", lambda *_: pytest.fail("a row ran again"))
    assert main(arguments(board, "--seeds", "0")) == 0


def test_ensemble_is_the_mean_of_its_members_and_pays_for_them(board: AdapterBoard) -> None:
    rows = [Row("cola", seed, KIND, "map") for seed in (0, 1, 2)]
    members = [board.context(row).saved("map", "in_domain")["probs"] for row in rows]
    assert not np.allclose(members[0], members[1])
    found = board.context(rows[0]).saved("ensemble", "in_domain")["probs"]
    np.testing.assert_allclose(found, np.mean(members, axis=0))
    records = [board.record(row) for row in (*rows, Row("cola", 0, KIND, "ensemble"))]
    seconds = [record["predict_seconds"] / record["predicted_rows"] for record in records]
    assert records[0]["predicted_rows"] > records[-1]["predicted_rows"]  # held-out rows, which a temperature reads
    assert cost(board, Row("cola", 0, KIND, "ensemble"))["predict"] == pytest.approx(sum(seconds) / seconds[0])


def test_methods_of_a_seed_start_from_one_adapter(board: AdapterBoard) -> None:
    context = board.context(Row("cola", 0, KIND, "map"))
    first, second = context.fresh().eval(), context.fresh().eval()
    batch = context.batches(context.held_out)[0]
    assert torch.equal(first(**batch).logits, second(**batch).logits)
    with first.disable_adapter():
        assert torch.equal(first(**batch).logits, second(**batch).logits)
    other = board.context(Row("cola", 1, KIND, "map")).fresh().eval()
    assert not torch.equal(first(**batch).logits, other(**batch).logits)


def test_answer_digits_are_next_token_logits_and_padding_changes_nothing() -> None:
    model, tokenizer = tiny_llama()
    prompt = tasks.prompt(f"{tasks.BEGIN}is the larch here{tasks.END}")
    assert prompt == "is the larch here\n\nthe correct answer is answer"
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    full = model(ids).logits[0, -1]
    expected = torch.stack([full[tokenizer.convert_tokens_to_ids(digit)] for digit in "1234"])
    padded = torch.cat([torch.full((1, 5), tokenizer.pad_token_id), ids], 1)
    mask = torch.cat([torch.zeros(1, 5, dtype=torch.long), torch.ones_like(ids)], 1)
    found = AnswerTokens(model, answer_tokens(tokenizer))(padded, mask, torch.tensor([2]))
    torch.testing.assert_close(found.logits[0], expected)
    torch.testing.assert_close(found.loss, -expected.log_softmax(0)[2])


def test_scores_of_wrong_answers() -> None:
    draws = np.array([[[1.0, 0.0], [0.0, 1.0]], [[0.5, 0.5], [0.5, 0.5]], [[0.9, 0.1], [0.9, 0.1]]])
    found = errors.scores({"probs": draws.mean(1), "draws": draws})
    np.testing.assert_allclose(found["mutual information"], [np.log(2), 0, 0], atol=1e-12)
    np.testing.assert_allclose(found["entropy"][:2], np.log(2))
    certain, even = errors.disagreement(np.array([[1.0, 0.0, 0.0], [0.0, 0.5, 0.5]]), 4000, seed=0)
    # of 4000 answers of two equal kinds, the rarer one has 2000 - |N(0, 1000)|: 4 standard deviations are 127
    assert certain == 0 and 0.5 - 127 / 4000 < even <= 0.5


def test_a_tokenizer_that_joins_digits_to_words_is_refused() -> None:
    class Joined(PreTrainedTokenizerBase):
        def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
            return {"input_ids": [len(text)]}

    with pytest.raises(ValueError, match="no token of its own for '1' behind a word"):
        digit_token(Joined(), "1")


def test_a_missing_base_is_named(board: AdapterBoard) -> None:
    other = AdapterBoard(board.data_dir, board.output_dir, board.model)
    with pytest.raises(ValueError, match="arc_easy needs the decoder under its adapter: give --decoder"):
        other.context(Row("arc_easy", 0, KIND, "map")).fresh()
