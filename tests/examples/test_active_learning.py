"""The active-learning example: a small run of each task, what its flags refuse, and the tables made of its curves."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel

from benchmarks.active_learning import labels_for, paired, read, share_of_labels, table
from examples.active_learning import ActiveArguments, area, label_counts, load_rows, main
from examples.data.tiny_bert import make_tokenizer

SMALL = ["--num_seeds", "1", "--num_labels", "26", "--query_size", "4", "--num_components", "8", "--num_samples", "8"]


def test_digits_are_learned_and_written(tmp_path: Path) -> None:
    results = main([*SMALL, "--pool_size", "60", "--output_dir", str(tmp_path)])
    assert results["num_labels"] == [20, 24, 26]
    assert set(results["accuracy"]) == {"random", "entropy", "bald", "batchbald", "epig"}
    curves = torch.tensor(list(results["accuracy"].values()))
    assert curves.shape == (5, 1, 3) and (curves > 0.3).all()
    assert (curves[:, :, 0] == curves[0, 0, 0]).all(), "all strategies start from the same labels"
    assert json.loads((tmp_path / "results.json").read_text())["accuracy"] == results["accuracy"]
    assert (tmp_path / "active_learning.png").stat().st_size > 10_000


def test_more_labels_than_the_data_have_is_an_error_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`num_labels` must be at most the 1297 rows") as caught:
        main(["--pool_size", "1790", "--start", "1290", "--num_labels", "1400", "--output_dir", str(tmp_path)])
    assert vars(caught.value)["is_about_input"]
    assert not list(tmp_path.iterdir())


def test_rows_are_principal_components_of_a_pool_apart_from_the_test_set() -> None:
    rows = load_rows(ActiveArguments(pool_size=300), 0)
    assert rows.pool.shape == (300, 32) and len(rows.test) == 1797 - 300
    variances = rows.pool.var(0)
    assert (variances.diff() < 0).all() and float(rows.pool.norm(dim=1).mean()) == pytest.approx(1, abs=1e-5)
    correlations = torch.corrcoef(rows.pool.T) - torch.eye(32)
    assert correlations.abs().max() < 1e-3
    assert not torch.equal(rows.labels, load_rows(ActiveArguments(pool_size=300), 1).labels)


def test_trec_takes_a_frozen_encoder(tmp_path: Path) -> None:
    lines = [f"{kind}:x what {word} is this" for kind in ("ABBR", "LOC", "NUM") for word in "abcdefghijkl"]
    for name in ("train.txt", "test.txt"):
        (tmp_path / name).write_text("\n".join(lines) + "\n")
    tokenizer = make_tokenizer(lines, min_count=1)
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=len(tokenizer), **size)).save_pretrained(tmp_path / "encoder")
    tokenizer.save_pretrained(tmp_path / "encoder")
    flags = ["--task", "trec", "--data_dir", str(tmp_path), "--model_name_or_path", str(tmp_path / "encoder")]
    results = main([
        *flags,
        *SMALL,
        "--pool_size",
        "30",
        "--strategies",
        "random",
        "bald",
        "--output_dir",
        str(tmp_path),
    ])
    assert len(results["accuracy"]["bald"][0]) == 3


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--strategies", "badge"], "`strategies` must be of"),
        (["--num_labels", "10"], "`num_labels` must be in"),
        (["--pool_size", "100"], "`num_labels` must be in"),
        (["--query_size", "0"], "`query_size` must be at least 1"),
        (["--prior_precision", "0"], "`prior_precision` must be > 0"),
        (["--task", "trec"], "`data_dir` must be the folder"),
    ],
)
def test_wrong_flags(flags: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        main(flags)


def test_area_is_the_mean_accuracy_on_the_way() -> None:
    assert area([20, 30, 50], [0.5, 0.7, 0.7]) == pytest.approx((10 * 0.6 + 20 * 0.7) / 30)
    assert area([20], [0.5]) == 0.5
    assert label_counts(ActiveArguments(start=20, query_size=15, num_labels=60)) == [20, 35, 50, 60]


def test_tables_by_hand(tmp_path: Path) -> None:
    counts, flat = [20, 30, 40, 50], [0.5, 0.6, 0.7, 0.8]
    better = [0.5, 0.7, 0.8, 0.9]
    assert labels_for(counts, np.array(better), 0.75) == pytest.approx(35)
    assert labels_for(counts, np.array(better), 0.95) == np.inf
    assert share_of_labels(counts, {0: better, 1: better}, {0: flat, 1: flat}) == "0.80 [0.80, 0.80]"
    assert share_of_labels(counts, {0: flat}, {0: better}) == "never [never, never]"
    assert paired(np.array([0.1, 0.2, 0.3])) == "+0.2000 [-0.0484, +0.4484]"  # 4.303 * 0.1 / sqrt(3)
    for name, seeds in {"random": 3, "bald": 2}.items():
        for seed in range(seeds):
            run = {"num_labels": counts, "accuracy": better if name == "bald" else flat}
            (tmp_path / f"trec-{name}-{seed}.json").write_text(json.dumps(run))
    lines = table("trec", *read(tmp_path, "trec", [0, 1, 2])).splitlines()
    cells = ["2", "0.800", "0.900", "0.7333", "+0.0833 [+0.0833, +0.0833]", "+0.1000 [+0.1000, +0.1000]"]
    expected = f"| bald | {' | '.join(cells)} | 0.80 [0.80, 0.80] |"
    assert lines[-1] == expected and lines[-2].startswith("| random | 3 |")
