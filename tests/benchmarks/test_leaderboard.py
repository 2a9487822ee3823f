"""A board of a tiny model on a made-up task: rows run once, tables of what they left, and the errors of a user."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel

from bayeformers import metrics
from benchmarks.leaderboard.__main__ import main
from benchmarks.leaderboard.dropout import passes, set_rate, tuned_dropout
from benchmarks.leaderboard.fits import fitted
from benchmarks.leaderboard.members import members
from benchmarks.leaderboard.methods import METHODS, REFERENCES
from benchmarks.leaderboard.recalibrated import averaged
from benchmarks.leaderboard.rows import Board, Row, plan, run_rows
from benchmarks.leaderboard.tables import cells, cost
from benchmarks.real_data import finetune as finetuning
from benchmarks.real_data.context import Context
from examples.data.tiny_bert import make_tokenizer

QUESTIONS = {
    "HUM:ind": "who wrote the book {}",
    "LOC:city": "where is the river {}",
    "NUM:count": "how many {} are there",
}
WORDS = "amber birch cedar delta ember flint grove haven islet jetty knoll larch".split()
METHODS_RUN = "map,temperature,mc_dropout,mc_dropout_temperature,laplace_last_layer"


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Board:
    """TREC's files and a tiny encoder; one checkpoint of seed 0, all rows done."""
    root = tmp_path_factory.mktemp("board")
    lines = [f"{kind} {text.format(word)} ?" for word in WORDS for kind, text in QUESTIONS.items()]
    (root / "trec").mkdir()
    (root / "trec" / "train.txt").write_text("\n".join(lines * 2), encoding="latin-1")
    (root / "trec" / "test.txt").write_text("\n".join(lines[:18]), encoding="latin-1")
    tokenizer = make_tokenizer([line.split(" ", 1)[1] for line in lines], min_count=2)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    BertModel(config).save_pretrained(root / "encoder")
    tokenizer.save_pretrained(root / "encoder")
    board = Board(root, root / "out", str(root / "encoder"))
    assert run_rows(board, plan(["trec"], [0, 1], ["best"], METHODS_RUN.split(",")), processes=0) == {}
    return board


def arguments(board: Board, *more: str) -> list[str]:
    common = ["--tasks", "trec", "--seeds", "0,1", "--kinds", "best", "--methods", METHODS_RUN, "--processes", "0"]
    return [*common, "--data_dir", str(board.data_dir), "--output_dir", str(board.output_dir), *more]


def test_plan_has_trainings_before_methods_and_methods_in_the_tables_order() -> None:
    rows = plan(["trec", "cola"], [0, 1], ["best", "overfit"], ["temperature", "map"])
    assert [row.method for row in rows[:3]] == ["train", "map", "temperature"]
    assert len(rows) == len(set(rows)) == 2 * 2 * 2 * 3 and {row.seed for row in rows[:12]} == {0}


def test_rows_that_are_done_are_not_run_again(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = plan(["trec"], [0, 1], ["best"], METHODS_RUN.split(","))
    assert all(board.is_done(row) for row in rows)
    monkeypatch.setattr(Board, "run", lambda *_: pytest.fail("a row ran again"))
    assert run_rows(board, rows, processes=0) == {}


def test_a_row_that_fails_is_reported_and_the_others_run(board: Board, tmp_path: Path) -> None:
    (tmp_path / "trec-0").symlink_to(board.output_dir / "trec-0")
    other = Board(board.data_dir, tmp_path, None)
    rows = [Row("trec", 0, "best", "unheard_of"), Row("trec", 7, "best", "map")]
    failed = run_rows(other, rows, processes=0)
    assert list(failed) == rows[:1] and "unheard_of" in failed[rows[0]]  # seed 7 has no checkpoint: left out


def test_page_table_and_numbers_are_written(board: Board, tmp_path: Path) -> None:
    page, html = tmp_path / "page.md", tmp_path / "page.html"
    more = ["--page", str(page), "--html", str(html), "--num_resamples", "50"]
    assert main(arguments(board, *more)) == 0
    (cell,) = json.loads((board.output_dir / "leaderboard.json").read_text())
    assert list(cell["methods"]) == METHODS_RUN.split(",") and cell["rows"] == 18
    assert set(cell["methods"]["laplace_last_layer"]["minus"]) == set(REFERENCES)
    assert all(METHODS[name].title in page.read_text() for name in cell["methods"])
    text = html.read_text()
    assert text.count("<tr>") == 6 and "src=" not in text and "http" not in text


def test_differences_are_paired_within_seeds(board: Board) -> None:
    (cell,) = cells(board, ["trec"], [0, 1], ["best"], ["map", "temperature", "mc_dropout"], 30)
    methods = cell["methods"]
    for metric in ("nll", "aurc"):
        by_seed = [
            methods["mc_dropout"]["by_seed"][seed][metric] - methods["map"]["by_seed"][seed][metric] for seed in (0, 1)
        ]
        assert methods["mc_dropout"]["minus"]["map"][metric]["value"] == pytest.approx(np.mean(by_seed))
    assert methods["temperature"]["minus"]["map"]["accuracy"] == pytest.approx(
        {"value": 0, "low": 0, "high": 0, "relative": 0}, abs=1e-12
    )


def test_costs_count_what_other_rows_did(board: Board) -> None:
    base, row = (board.record(Row("trec", 0, "best", name)) for name in ("map", "temperature"))
    training = board.training(Row("trec", 0, "best", "map"))["cpu_seconds"]
    found = cost(board, Row("trec", 0, "best", "temperature"))
    expected = (row["predict_seconds"] + base["predict_seconds"]) / base["predict_seconds"]
    assert found["predict"] == pytest.approx(expected) and found["predict"] >= 1
    assert found["train"] == pytest.approx(1 + (row["fit_seconds"] + base["fit_seconds"]) / training)


def test_costs_reach_through_rows_that_read_rows(board: Board) -> None:
    (board.output_dir / "trec-0" / "predictions" / "mixed.json").write_text(
        json.dumps({
            "fit_seconds": 0.5,
            "predict_seconds": 0.25,
            "predicted_rows": board.record(Row("trec", 0, "best", "map"))["predicted_rows"],
            "chosen": {"reads": ["mc_dropout_temperature", "map"]},
        })
    )
    names = ("map", "mc_dropout", "mc_dropout_temperature")
    records = {name: board.record(Row("trec", 0, "best", name)) for name in names}
    found = cost(board, Row("trec", 0, "best", "mixed"))
    predict = 0.25 + sum(one["predict_seconds"] for one in records.values())
    assert found["predict"] == pytest.approx(predict / records["map"]["predict_seconds"])
    assert found["peak_mib"] == max(one["peak_mib"] for one in records.values())


def test_averaged_predictions_are_the_mean_of_those_read(board: Board) -> None:
    context = board.context(Row("trec", 1, "best", "map"))
    predict, _ = averaged(context, bases=("map", "mc_dropout"))
    both = [context.saved(name, "dev")["probs"] for name in ("map", "mc_dropout")]
    np.testing.assert_allclose(predict("dev")["probs"], (both[0] + both[1]) / 2)


def test_an_ensemble_needs_a_second_seed(board: Board, tmp_path: Path) -> None:
    context = Context("trec", 0, board.data_dir, copied(board, tmp_path))
    with pytest.raises(ValueError, match="needs checkpoints of two seeds of trec, there is 0 alone"):
        members(context)
    assert [one.seed for one in members(board.context(Row("trec", 1, "best", "map")))] == [1, 0]


def test_rows_of_one_curvature_share_it(board: Board, tmp_path: Path) -> None:
    context = board.context(Row("trec", 0, "best", "map"))
    kept, cost_of_another = fitted(context, prior_precision=30.0, subset="last_layer")
    fresh, own = fitted(replace(context, output_dir=copied(board, tmp_path)), prior_precision=30.0, subset="last_layer")
    assert own == {} and cost_of_another["shared_seconds"] > 0  # the fixture's row has paid
    inputs = context.batches(context.held_out)[0]
    torch.testing.assert_close(kept.predict(inputs).logit_covariance, fresh.predict(inputs).logit_covariance)


def copied(board: Board, folder: Path) -> Path:
    """The checkpoint of seed 0 without what rows have left."""
    (folder / "trec-0").mkdir()
    for path in (board.output_dir / "trec-0").iterdir():
        if path.is_file():
            (folder / "trec-0" / path.name).symlink_to(path)
    return folder


def test_dropout_passes_are_a_function_of_the_batch_and_leave_the_generator(board: Board) -> None:
    context = board.context(Row("trec", 0, "best", "map"))
    arrays, batch = passes(context.model(), 4), context.batches(context.held_out)[0]
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, second = arrays(batch), arrays(batch)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first["draws"], second["draws"]) and not torch.equal(first["draws"][:, 0], first["draws"][:, 1])
    torch.testing.assert_close(first["probs"], first["draws"].mean(1))


def test_a_tuned_rate_has_the_least_nll_of_held_out_rows(board: Board) -> None:
    context, nll = board.context(Row("trec", 0, "best", "map")), {}
    predict, chosen = tuned_dropout(context, rates=(0.1, 0.5), num_samples=4)
    for rate in (0.1, 0.5):
        model = context.model()
        set_rate(model, rate)
        probs = context.predict("held_out", passes(model, 4))["probs"]
        nll[rate] = metrics.negative_log_likelihood(probs, [row["labels"] for row in context.held_out])
    assert chosen["rate"] == min(nll, key=nll.__getitem__) and nll[0.1] != nll[0.5]
    found = metrics.negative_log_likelihood(predict("held_out")["probs"], [row["labels"] for row in context.held_out])
    assert found == pytest.approx(min(nll.values()))


def test_members_are_the_complete_checkpoints_of_other_seeds(board: Board, tmp_path: Path) -> None:
    for name in ("trec-0", "trec-1", "trec-2-overfit", "trec-3", "cola-4"):
        (tmp_path / name).mkdir()
        if name != "trec-3":
            (tmp_path / name / finetuning.RECORD).write_text("{}")
    context = Context("trec", 1, board.data_dir, tmp_path)
    assert [member.seed for member in context.members] == [1, 0]
    assert [member.seed for member in Context("trec", 2, board.data_dir, tmp_path, kind="overfit").members] == [2]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tasks", "cola,colla"], "'colla' not among cola, mrpc"),
        (["--methods", "maps"], "'maps' not among map, temperature"),
        (["--kinds", "worst"], "'worst' not among best, overfit"),
        (["--seeds", "0,x"], "seeds are whole numbers between commas, got 'x'"),
        (["--processes", "-1"], "expected a whole number"),
    ],
)
def test_wrong_flags_are_named(
    board: Board, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([*arguments(board), *flags])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("method", ["snapshots", "sghmc", "ivon", "vbll", "sngp"])
def test_methods_that_train_from_the_pretrained_encoder(
    board: Board, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In small batches, for a cycle has to have steps enough: probabilities of every test row."""
    monkeypatch.setattr("benchmarks.leaderboard.trained.BATCH_SIZE", 8)
    context = board.context(Row("trec", 0, "best", method))
    predictor, _ = METHODS[method].run(context)
    probs = predictor("dev")["probs"]
    assert probs.shape == (18, 6) and np.allclose(probs.sum(1), 1)
    with pytest.raises(ValueError, match="give --model"):
        METHODS[method].run(replace(context, pretrained=None))


def test_swag_trains_on_from_the_checkpoint(board: Board) -> None:
    context = board.context(Row("trec", 0, "best", "swag"))
    predictor, chosen = METHODS["swag"].run(context)
    assert np.allclose(predictor("dev")["probs"].sum(1), 1) and chosen == {"lr": 2e-5, "every": 1}
