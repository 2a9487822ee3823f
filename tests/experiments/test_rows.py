"""The record of training rows: it comes back as it was saved, and a damaged one is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bayeformers.experiments import FRESH, Split, TrainingRows, check_known, fingerprint, history_of, row_hashes
from bayeformers.experiments.rows import FILE


def test_white_space_and_type_of_a_row_do_not_count() -> None:
    assert row_hashes(["a  b", "a b"]).tolist() == 2 * row_hashes([b"a b"]).tolist()


def test_a_record_comes_back(tmp_path: Path) -> None:
    hashes = row_hashes(["a", "b", b"c"])
    record = TrainingRows("cola", fingerprint(hashes), Split(3, {"validation_share": 0.1}), "x", np.sort(hashes))
    record.save(tmp_path)
    found = TrainingRows.load(tmp_path)
    assert found is not None and found.split == record.split and (found.seen == record.seen).all()
    assert (found.task, found.source, found.train) == (record.task, record.source, record.train)
    assert (
        TrainingRows.load(tmp_path / "none") is None and history_of("x", [tmp_path / "none"], must_know=False) == FRESH
    )
    check_known(FRESH)


@pytest.mark.parametrize("damage", [{"seen": "?"}, {"num_seen": 2}, {"version": 9}, {"seed": None}])
def test_a_damaged_record_is_refused(damage: dict[str, Any], tmp_path: Path) -> None:
    TrainingRows("cola", "s", Split(3), "x", row_hashes(["a"])).save(tmp_path)
    content = json.loads((tmp_path / FILE).read_text())
    (tmp_path / FILE).write_text(json.dumps({**content, **damage}))
    with pytest.raises(ValueError, match=r"training_rows.json is damaged"):
        TrainingRows.load(tmp_path)
