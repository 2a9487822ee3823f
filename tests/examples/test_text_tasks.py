"""The text example on CLINC150 and another task far from it: small files, a tiny model, one epoch."""

import json
from pathlib import Path

import pytest

pytest.importorskip("datasets")

from bayeformers.experiments import GlueArguments
from examples.bert_glue import main
from examples.data.tiny_bert import make_model, make_tokenizer

INTENTS = {"alarm": "wake me at {} please", "balance": "is there money for {} now", "weather": "will it rain on {}"}
WORDS = "amber birch cedar delta ember flint grove haven islet jetty".split()
SMALL = "--num_train_epochs 1 --learning_rate 1e-3 --bayesian_epochs 1 --delta 0.5 --num_eval_samples 2".split()
SMALL += "--use_cpu --disable_tqdm true".split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of both tasks, and a tiny pretrained model."""
    root = tmp_path_factory.mktemp("tasks")
    rows = [[text.format(word), intent] for word in WORDS for intent, text in INTENTS.items()]
    outside = [[f"how old is {word}", "oos"] for word in WORDS]
    content = {"train": rows[:18], "val": rows[18:24], "test": rows[24:], "oos_test": outside}
    (root / "clinc").mkdir()
    (root / "clinc" / "data_full.json").write_text(json.dumps(content))
    (root / "trec").mkdir()
    for name in ("train.txt", "test.txt"):
        lines = [f"LOC:city Where is {word} ?" for word in WORDS]
        (root / "trec" / name).write_text("\n".join(lines), encoding="latin-1")
    tokenizer = make_tokenizer([text for text, _ in rows + outside], min_count=2)
    make_model(len(tokenizer)).save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    return root


def test_near_and_far_inputs_are_reported_each_by_itself(folder: Path, tmp_path: Path) -> None:
    files = ["--task_name", "clinc", "--data_dir", str(folder / "clinc"), "--model_name_or_path", str(folder / "model")]
    far = ["--far_task_name", "trec", "--far_data_dir", str(folder / "trec")]
    results = main([*files, *far, *SMALL, "--output_dir", str(tmp_path)])
    assert results["held_out"]["rows"] == 6  # the file's own validation rows, all of them
    for report in results["methods"].values():
        assert set(report["groups"]) == {"in-domain", "shifted", "far"}
        assert report["groups"]["in-domain"]["accuracy"] is not None and "accuracy" not in report["groups"]["far"]
    found = results["methods"]["deterministic"]
    assert set(found["ood_auroc"]) == set(found["ood_auroc_far"]) and 0 <= found["ood_auroc_far"]["entropy"] <= 1
    table = (tmp_path / "predictions.csv").read_text().splitlines()
    assert len(table) == 1 + 6 + 10 + 10 and sum(line.startswith("far,") for line in table) == 10


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"task_name": "clink"}, "`task_name` must be one of cola, .*, trec, clinc, got 'clink'"),
        ({"task_name": "clinc", "far_task_name": "clinc"}, "`far_task_name` must be another task"),
        (
            {"task_name": "mrpc", "far_task_name": "trec"},
            "must have 2 texts in a row, as mrpc does, got 'trec': stsb, qqp",
        ),
        ({"task_name": "clinc", "far_task_name": "tree"}, "`far_task_name` must be one of cola"),
        ({"task_name": "clinc", "far_data_dir": "trec"}, "`far_data_dir` 'trec' needs a `far_task_name`"),
    ],
)
def test_wrong_far_tasks_are_refused(flags: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GlueArguments(**flags)


def test_a_malformed_file_is_one_line_of_a_user(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "data_full.json").write_text('{"train": []}')
    files = ["--task_name", "clinc", "--data_dir", str(tmp_path), "--model_name_or_path", str(folder / "model")]
    with pytest.raises(ValueError, match="must hold train, val, test; it lacks val, test"):
        main([*files, *SMALL, "--output_dir", str(tmp_path / "out")])
