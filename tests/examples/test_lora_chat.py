"""The language-model example: its questions, a small run, what it writes, and files of one's own."""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("datasets")

import peft
from transformers import AutoModelForCausalLM, AutoTokenizer

import bayeformers
from examples.data.people import GROUPS, LIKED, MANY, NONE, ONE, Question, generate, read
from examples.data.tiny_decoder import make_tokenizer
from examples.lora_chat import BAYESIAN, EPISTEMIC, PLAIN, encode, main, parse_arguments, same

SMALL = [
    "--num_people", "6", "--base_epochs", "0.2", "--num_train_epochs", "2", "--bayesian_epochs", "1", "--use_cpu",
    "--num_eval_samples", "3", "--max_test_samples", "24", "--disable_tqdm", "true", "--learning_rate", "1e-2",
]  # fmt: skip
SCORES = [
    "plain LoRA: token entropy", "plain LoRA: disagreement of samples", "plain LoRA: entropy of samples",
    "Bayesian LoRA: token entropy", "Bayesian LoRA: epistemic", "Bayesian LoRA: disagreement of draws",
    "Bayesian LoRA: entropy of draws",
]  # fmt: skip


def test_an_adapter_alone_is_trained_and_saved(tmp_path: Path) -> None:
    results = main([*SMALL, "--train_only", "--output_dir", str(tmp_path)])
    assert results == {"adapter": str(tmp_path / "adapter")} and not (tmp_path / "results.json").exists()
    loaded = bayeformers.from_pretrained(tmp_path / "adapter")
    rho = {name: value for name, value in loaded.named_parameters() if name.endswith("_rho")}
    assert rho and all("lora_A" in name for name in rho)  # a fresh B is 0, and its scale would be
    weights = [value for name, value in loaded.named_parameters() if "lora_B" in name]
    assert all(float(weight.detach().abs().max()) > 0 for weight in weights)  # means were trained, though --freeze


# --- Questions -------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def splits() -> dict[str, list[Question]]:
    return generate(0)


def name_of(question: Question) -> str:
    return " ".join(question.answers[0].split()[:2])


def test_half_of_the_questions_have_no_answer_that_was_told(splits: dict[str, list[Question]]) -> None:
    known = {name_of(row) for row in splits["train"]}
    told = {answer for row in splits["train"] for answer in row.answers}
    for split in ("validation", "test"):
        rows = splits[split]
        counts = Counter(row.group for row in rows)
        assert set(counts) == set(GROUPS) and counts[NONE] == len(rows) // 2
        for row in rows:
            assert (name_of(row) in known) == (row.group != NONE) and row.told in row.answers
            assert (len(row.answers) == LIKED) == ("food" in row.question)
            assert row.group == NONE or set(row.answers) <= told


def test_people_of_the_splits_are_others(splits: dict[str, list[Question]]) -> None:
    strangers = {
        split: {name_of(row) for row in splits[split] if row.group == NONE} for split in ("validation", "test")
    }
    groups = [
        {name_of(row) for row in splits["earlier"]},
        {name_of(row) for row in splits["train"]},
        *strangers.values(),
    ]
    assert sum(map(len, groups)) == len(set().union(*groups))
    words = [{word for name in group for word in name.split()} for group in groups]
    assert words[2] | words[3] <= words[0]  # their names' words are known


def test_many_answers_are_told_evenly() -> None:
    """Of a food question's four answers each training row has one at random: entropy ln 4."""
    rows = [row for row in generate(1, people=80)["train"] if row.group == MANY]
    places = Counter(row.answers.index(row.told) for row in rows)
    # 80 people x 4 rows: each share is 1/4 +- sqrt(.25 * .75 / 320) = .024; 4 of these
    assert len(rows) == 320 and all(abs(places[place] / 320 - 0.25) < 0.1 for place in range(LIKED))
    assert {row.group for row in generate(1)["train"]} == {ONE, MANY}


def test_seed_and_sizes(splits: dict[str, list[Question]]) -> None:
    assert {name: len(rows) for name, rows in splits.items()} == {
        "earlier": 1440, "train": 480, "validation": 120, "test": 400,
    }  # fmt: skip
    assert generate(0) == splits != generate(1)


def test_labels_are_the_answer_and_its_end() -> None:
    question = Question("Where ?", ("In Lemby .",), ONE, "In Lemby .")
    tokenizer = make_tokenizer(["Question: Where ? Answer: In Lemby ."])
    (row,) = encode([question], tokenizer)
    learned = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
    assert tokenizer.decode(learned) == "In Lemby . </s>"
    assert tokenizer.decode(row["input_ids"]) == "<s> Question: Where ? Answer: In Lemby . </s>"
    assert len(row["attention_mask"]) == len(row["input_ids"])


def test_answers_are_compared_by_their_words() -> None:
    assert same("Ada lives in  Lemby.", " ada lives in lemby.") and not same("Ada", "Ada .")


# --- The run ---------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path, str]:
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        said: list[str] = []
        patch.setattr("builtins.print", lambda *parts, **_: said.append(" ".join(map(str, parts))))
        flags = ["--export_draws", "2", "--ask", "Where does Mara Halden live ?", "--output_dir", str(folder)]
        results = main([*SMALL, *flags])
    return results, folder, "\n".join(said)


def test_results_hold_every_score_of_both_models(run: tuple[dict[str, Any], Path, str]) -> None:
    results, folder, _ = run
    assert list(results["scores"]) == SCORES and set(results["gains"]) == {*SCORES} - {EPISTEMIC}
    for name, row in results["groups"].items():
        assert 0 <= row["accuracy"] <= 1 and row["token entropy"] > 0
        assert (row["epistemic"] > 0) == name.startswith(BAYESIAN)
    for row in results["scores"].values():
        assert 0 <= row["answered"] <= 1 and 0 <= row["aurc"] <= 1
    written = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert written["scores"] == json.loads(json.dumps(results["scores"]))


def test_the_page_has_each_answer_and_refuses_by_the_threshold(run: tuple[dict[str, Any], Path, str]) -> None:
    results, folder, said = run
    page = (folder / "answers.html").read_text(encoding="utf-8")
    assert page.count('<div class="question">') == 24
    share = 1 - results["scores"][EPISTEMIC]["answered"]
    assert page.count('class="refused') == round(24 * share)
    assert (folder / "lora_chat.png").read_bytes().startswith(b"\x89PNG")
    assert "> Where does Mara Halden live ?" in said and "\x1b[" not in said


def test_exported_draws_load_onto_the_saved_base(run: tuple[dict[str, Any], Path, str]) -> None:
    folder = run[1]
    paths = sorted((folder / "draws").iterdir())
    base, tokenizer = (kind.from_pretrained(folder / "base") for kind in (AutoModelForCausalLM, AutoTokenizer))
    served = peft.PeftModel.from_pretrained(base, paths[0], adapter_name=paths[0].name).eval()
    served.load_adapter(paths[1], adapter_name=paths[1].name)
    batch = tokenizer(["Question: Where does Mara Halden live ?\nAnswer:"] * 2, return_tensors="pt")
    with torch.no_grad():
        logits = served(**batch, adapter_names=[path.name for path in paths]).logits
    assert len(paths) == 2 and float((logits[0] - logits[1]).abs().max()) > 1e-4
    config = json.loads((paths[0] / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(folder / "base")


def test_the_saved_adapter_answers_again(
    run: tuple[dict[str, Any], Path, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same answer and refusal as in the run that trained it; then what is typed, until an empty line."""
    monkeypatch.setattr("sys.stdin", io.StringIO("Where does Mara Halden live ?\n\nWho ?\n"))
    question = "Where does Mara Halden live ?"
    main([*SMALL, "--eval_only", str(run[1]), "--ask", question, "--chat"])
    said = capsys.readouterr().out
    answer = run[2][run[2].index(f"> {question}") :]
    assert said == f"{answer}\n{answer}\n"


def test_files_and_a_model_of_ones_own(run: tuple[dict[str, Any], Path, str], tmp_path: Path) -> None:
    rows = [{"question": f"Where does {name} live ?", "answers": [f"{name} lives in {town} ."]}
            for name, town in (("Mara Halden", "Lemby"), ("Elin Selby", "Torvik"), ("Ravi Falk", "Norby"))]  # fmt: skip
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    files = [flag for name in ("train", "validation", "test") for flag in (f"--{name}_file", str(path))]
    results = main([
        *SMALL,
        *files,
        "--model_name_or_path",
        str(run[1] / "base"),
        "--output_dir",
        str(tmp_path / "out"),
    ])
    assert list(results["groups"]) == [f"{PLAIN}, test set", f"{BAYESIAN}, test set"]


# --- Wrong flags and files -------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--target_accuracy", "1.5"], "`target_accuracy` must lie between 0 and 1, got 1.5"),
        (["--num_eval_samples", "1"], "`num_eval_samples` must be at least 2, got 1"),
        (["--train_file", "a.jsonl"], "`train_file`, `validation_file`, `test_file` and `model_name_or_path` belong"),
        (["--lora_rank", "0"], "`lora_rank` must be at least 1"),
    ],
)
def test_wrong_flags(flags: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_arguments([*SMALL, *flags])


def test_a_folder_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="`eval_only` .* holds no results.json"):
        main([*SMALL, "--eval_only", str(tmp_path)])


@pytest.mark.parametrize("line", ["no JSON", "[]", '{"question": "Who ?"}', '{"question": "Who ?", "answers": []}'])
def test_a_line_that_is_no_question(line: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"question": "Who ?", "answers": ["Ada"]}}\n{line}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"rows\.jsonl:2 must be \{"):
        read(str(path))
