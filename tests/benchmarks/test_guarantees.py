"""The experiment's rules on made-up scores: what they certify, and the page that they make."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks import guarantees


def rows(count: int = 400, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    scores = generator.random(count)
    return scores, (generator.random(count) < 0.5 * (1 - scores) ** 2).astype(float)


@pytest.mark.parametrize("name", guarantees.RULES)
def test_a_rule_answers_all_of_a_perfect_model_and_nothing_of_a_bad_one(name: str) -> None:
    scores, errors = rows()
    rule = guarantees.RULES[name]
    assert rule(scores, np.zeros(400), 0.1, 0.9) <= scores.min()
    assert rule(scores, np.ones(400), 0.1, 0.9) == np.inf
    assert rule(scores, errors, 0.1, 0.9) <= rule(scores, errors, 0.05, 0.9)


def test_a_page_is_made_of_cached_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for task in guarantees.TARGETS:
        scores, errors = rows()
        np.savez(tmp_path / f"scores-{task}-map.npz", confidence=scores, entropy=scores, error=errors)
    page = tmp_path / "page.md"
    arguments = ["--board", str(tmp_path), "--model", "none", "--data_dir", str(tmp_path), "--resplits", "2"]
    monkeypatch.setattr("sys.argv", ["guarantees", *arguments, "--output_dir", str(tmp_path), "--page", str(page)])
    guarantees.main()
    text = page.read_text()
    assert all(title in text for title in ("## Is it kept?", "## Which rule answers most?", "| clinc | 400 |"))
