"""SQuAD: windows, span distributions, official scores and official files, exactly."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("datasets")

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from bayeformers.tasks.answers import Answers, SpanReader
from bayeformers.tasks.squad import Question, exact_match, f1, normalized, parse_squad, read_squad, split_articles
from bayeformers.tasks.windows import Reading, Window, read_windows, token_span
from examples.data.tiny_reader import make_tokenizer

TEXT = "the cat sat on the mat and the dog lay by the old red door near a cold dark sea all day long"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return make_tokenizer([TEXT] * 12)


def question(start: int = 4, text: str = "cat", context: str = TEXT) -> Question:
    return Question("q", "the cat", context, ((start, text),) if text else (), "answerable")


# --- Windows ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("max_length", "stride"), [(64, 8), (20, 4), (16, 6), (14, 1)])
def test_windows_cover_the_text_and_say_where(tokenizer: Any, max_length: int, stride: int) -> None:
    (reading,), columns = read_windows([question()], tokenizer, max_length=max_length, stride=stride)
    whole = tokenizer(TEXT, add_special_tokens=False, return_offsets_mapping=True)
    assert list(reading.offsets) == [tuple(pair) for pair in whole["offset_mapping"]]
    assert {len(column) for column in columns.values()} == {len(reading.windows)}
    assert (len(reading.windows) > 1) == (max_length < 64)
    for window, ids in zip(reading.windows, columns["input_ids"], strict=True):
        assert len(ids) <= max_length
        assert ids[window.context] == whole["input_ids"][window.first : window.first + window.size]
        assert ids[window.null] == tokenizer.cls_token_id
    for ids, types in zip(columns["input_ids"], columns["token_type_ids"], strict=True):
        assert types[: ids.index(tokenizer.sep_token_id) + 1] == [0] * (ids.index(tokenizer.sep_token_id) + 1)
        assert set(types[ids.index(tokenizer.sep_token_id) + 1 :]) == {1}
    for before, after in zip(reading.windows, reading.windows[1:], strict=False):
        assert before.first + before.size - after.first == stride
    assert reading.windows[-1].first + reading.windows[-1].size == len(whole["input_ids"])


def test_labels_are_the_answer_or_the_class_token(tokenizer: Any) -> None:
    begin = TEXT.index("old red door")
    (reading,), columns = read_windows([question(begin, "old red door")], tokenizer, max_length=16, stride=6)
    said = []
    for row in Dataset.from_dict(columns):
        said.append(tokenizer.decode(row["input_ids"][row["start_positions"] : row["end_positions"] + 1]))
    assert set(said) == {"old red door", "[CLS]"} and len(said) == len(reading.windows)
    assert [reading.text(*span) for span in reading.gold] == ["old red door"]


def test_unanswerable_questions_are_labelled_with_the_class_token(tokenizer: Any) -> None:
    _, columns = read_windows([question(text="")], tokenizer, max_length=16, stride=6)
    assert set(columns["start_positions"]) == set(columns["end_positions"]) == {0}


def test_token_span_takes_every_token_that_overlaps() -> None:
    offsets = [(0, 3), (4, 7), (7, 9), (10, 12)]
    assert token_span(offsets, 5, 8) == (1, 2)
    assert token_span(offsets, 0, 12) == (0, 3)
    with pytest.raises(ValueError, match="no token"):
        token_span(offsets, 3, 4)


def test_a_question_that_leaves_no_room_is_refused(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"`max_seq_length` 10 leaves too little room .* question q"):
        read_windows([question()], tokenizer, max_length=10, stride=6)


# --- One distribution from several windows ---------------------------------------------------------------------------
def reading_of(size: int, windows: list[tuple[int, int]], offset: int = 3) -> Reading:
    """A text of ``size`` tokens "t" in windows [first, last), whose context stands behind ``offset`` positions."""
    places = tuple(Window(slice(offset, offset + last - first), first, 0) for first, last in windows)
    context = " ".join("t" for _ in range(size))
    row = Question("q", "?", context, ((0, "t"),), "answerable")
    return Reading(row, places, tuple((2 * i, 2 * i + 1) for i in range(size)))


def logits_of(reading: Reading, start: torch.Tensor, end: torch.Tensor, null: torch.Tensor) -> torch.Tensor:
    """A position-wise model: a token's logits (S, size) are the same in every window; what is no context is large."""
    length = max(window.context.stop for window in reading.windows) + 2
    padded = torch.full((len(start), len(reading.windows), length, 2), 50.0, dtype=start.dtype)
    for index, window in enumerate(reading.windows):
        for side, values in enumerate((start, end)):
            padded[:, index, window.context, side] = values[:, window.first : window.first + window.size]
            padded[:, index, window.null, side] = null
    return padded


@pytest.mark.parametrize("has_null", [True, False])
def test_windows_joined_are_the_whole_text(has_null: bool) -> None:
    """Windows that share as many tokens as the longest answer has: exactly the distribution without windows."""
    size, longest = 23, 4
    start, end, null = (torch.randn(*shape, dtype=torch.float64) for shape in ((5, size), (5, size), (5,)))
    whole, split = reading_of(size, [(0, size)]), reading_of(size, [(0, 10), (6, 16), (12, 22), (18, 23)])
    reader = SpanReader(longest, has_null)
    one, other = (reader.distribution(r, logits_of(r, start, end, null)) for r in (whole, split))
    torch.testing.assert_close(one.predictive.log_probs, other.predictive.log_probs)
    assert one.answer == other.answer and one.nll == pytest.approx(other.nll)


def test_distribution_is_that_of_all_spans_of_all_windows() -> None:
    """Brute force in float64, with windows that disagree: each span by its best window, no answer by its worst."""
    size, longest, draws = 9, 3, 4
    reading = reading_of(size, [(0, 6), (3, 9)])
    logits = torch.randn(draws, 2, 12, 2)
    found = SpanReader(longest, True, temperature=1.7).distribution(reading, logits)
    average: dict[tuple[int, int] | None, float] = {}
    for s in range(draws):
        scores: dict[tuple[int, int] | None, float] = {}
        for w, window in enumerate(reading.windows):
            start, end = logits[s, w].double().unbind(-1)
            for i in range(window.size):
                for j in range(i, min(i + longest, window.size)):
                    score = float(start[window.context.start + i] + end[window.context.start + j])
                    span = (window.first + i, window.first + j)
                    scores[span] = max(score, scores.get(span, -math.inf))
        scores[None] = min(float(logits[s, w, 0].double().sum()) for w in range(2))
        total = sum(math.exp(score / 1.7) for score in scores.values())
        for span, score in scores.items():
            average[span] = average.get(span, 0.0) + math.exp(score / 1.7) / total / draws
    assert sum(average.values()) == pytest.approx(1.0)
    assert float(found.log_probs.exp().sum()) == pytest.approx(1.0)
    for span, p in average.items():
        value = float(found.log_probs[found.null]) if span is None else found.log_prob(*span)
        assert math.exp(value) == pytest.approx(p, rel=1e-9)
    best = max(average, key=average.__getitem__)
    assert found.answer == ("" if best is None else reading.text(*best))
    entropy = -sum(p * math.log(p) for p in average.values())
    assert float(found.predictive.predictive_entropy) == pytest.approx(entropy)
    parts = found.predictive.expected_entropy + found.predictive.mutual_information
    assert float(parts) == pytest.approx(entropy) and float(found.predictive.mutual_information) > 0
    assert found.log_prob(0, 3) == -math.inf  # four tokens


def test_nll_is_the_annotators_mean() -> None:
    reading = reading_of(3, [(0, 3)])
    two = Question("q", "?", reading.question.context, ((0, "t"), (4, "t")), "ambiguous")
    reading = Reading(two, reading.windows, reading.offsets)
    logits = torch.zeros(1, 1, 8, 2)
    logits[..., 3, 0], logits[..., 5, 1] = 2.0, 1.0  # scores (0,0): 2, (1,1): 0, (2,2): 1
    found = SpanReader(1, has_null=False).distribution(reading, logits)
    log_total = math.log(math.exp(2) + math.exp(0) + math.exp(1))
    assert found.nll == pytest.approx(log_total - (2 + 1) / 2)


def test_two_right_answers_out_of_reach_of_each_other_have_an_entropy_of_ln_2() -> None:
    """Start and end are independent: within reach, the span from the first to the second takes its share."""
    size = 12
    reading, sides = reading_of(size, [(0, size)]), torch.full((1, size), -60.0, dtype=torch.float64)
    sides[0, 1] = sides[0, 10] = 0.0
    logits = logits_of(reading, sides, sides, torch.full((1,), -60.0, dtype=torch.float64))
    apart, within = (SpanReader(n, has_null=True).distribution(reading, logits) for n in (8, 12))
    assert float(apart.predictive.predictive_entropy) == pytest.approx(math.log(2))
    assert float(within.predictive.predictive_entropy) == pytest.approx(math.log(3))


def test_spans_of_a_short_text() -> None:
    """Shorter than answers may be: two tokens have three spans."""
    found = SpanReader(30, has_null=False).distribution(reading_of(2, [(0, 2)]), torch.zeros(1, 1, 7, 2))
    assert found.predictive.log_probs.exp().flatten().tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0.0])


def test_temperature_minimises_the_validation_nll() -> None:
    """Logits four times too large are brought back: scores z / 4 are calibrated where labels are drawn from them."""
    torch.manual_seed(0)
    rows, logits = [], []
    for _ in range(600):
        z = torch.randn(1, 1, 8)
        scores = z[0, 0, 3:7] / 4  # one-token spans; ends are flat
        drawn = int(torch.multinomial(scores.softmax(0), 1))
        reading = reading_of(4, [(0, 4)])
        row = Question("q", "?", reading.question.context, ((2 * drawn, "t"),), "answerable")
        rows.append(Reading(row, reading.windows, reading.offsets))
        logits.append(torch.stack([z, torch.zeros(1, 1, 8)], dim=-1))
    temperature = SpanReader(max_length=1, has_null=False).tempered(rows, logits).temperature

    def nll(value: float) -> float:
        return float(SpanReader(1, False, value).nll(rows, logits).mean())

    assert nll(temperature) <= min(nll(0.97 * temperature), nll(1.03 * temperature))
    # Fisher information of 1/T is Var_p[z], about .7 per row: 1/T = .25 +- 1/sqrt(600 * .7) = .049; 4 sd is .2
    assert 1 / temperature == pytest.approx(0.25, abs=0.2)


def test_answers_of_a_point_estimate_have_no_epistemic_part() -> None:
    readings, reader = [reading_of(4, [(0, 4)])], SpanReader(2, True)
    one = reader.answers(readings, [torch.randn(1, 1, 8, 2)])
    assert isinstance(one, Answers) and one.epistemic.tolist() == [0.0] and one.total == one.aleatoric
    several = reader.answers(readings, [torch.randn(3, 1, 8, 2)])
    assert several.epistemic[0] > 0
    assert several.total == pytest.approx(several.aleatoric + several.epistemic)


# --- Official scores -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("answer", "truths", "em", "f"),
    [
        ("Denver Broncos", ["Denver Broncos"], 1, 1),
        ("the Denver Broncos!", ["denver broncos"], 1, 1),
        ("Broncos", ["Denver Broncos", "The Broncos"], 1, 1),  # the best of several
        ("Denver Broncos", ["Carolina Panthers"], 0, 0),
        ("February 7", ["February 7, 2016"], 0, 2 * 1 * (2 / 3) / (1 + 2 / 3)),
        ("7 February 2016", ["February 7, 2016"], 0, 1),  # F1 knows no order
        ("a b a b", ["a b"], 0, 2 * 0.5 * 1 / 1.5),  # "a" is an article: b b against b
        ("dog dog cat", ["dog cat cat"], 0, 2 / 3),  # counted as often as both have it
        ("10–24", ["1024"], 0, 0),  # an en dash is not ASCII punctuation
        ("10-24", ["1024"], 1, 1),
        ("anthem", ["an them"], 0, 0),  # articles are whole words
        ("", [], 1, 1),  # unanswerable, and said so
        ("Denver", [], 0, 0),
        ("", ["Denver"], 0, 0),
        ("the", ["an"], 1, 1),  # no truth is left: "" is, and "the" normalises to it
        ("the", ["Denver"], 0, 0),
        ("Denver", ["the", "Denver"], 1, 1),
    ],
)
def test_official_scores(answer: str, truths: list[str], em: float, f: float) -> None:
    assert exact_match(answer, truths) == em
    assert f1(answer, truths) == pytest.approx(f)


def test_normalisation() -> None:
    assert normalized("  The U.S.A.,\n an\tisland ") == "usa island"


# --- Official files --------------------------------------------------------------------------------------------------
def official(articles: int = 4, each: int = 5, version: str = "v2.0", asks: str = "where ?") -> dict[str, Any]:
    answer = {"text": "cat", "answer_start": 4}
    rows: list[list[dict[str, Any]]] = [
        [{"id": f"{a}-{q}", "question": asks, "answers": [answer]} for q in range(each)] for a in range(articles)
    ]
    if version == "v2.0":
        for found in rows:
            found[0] |= {"answers": [], "is_impossible": True, "plausible_answers": [answer]}
    data = [{"title": f"T{a}", "paragraphs": [{"context": TEXT, "qas": found}]} for a, found in enumerate(rows)]
    return {"version": version, "data": data}


@pytest.mark.parametrize("version", ["1.1", "v2.0"])
def test_both_versions_are_read(tmp_path: Path, version: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps(official(version=version)))
    found = read_squad(path)
    assert list(found) == ["T0", "T1", "T2", "T3"] and [len(rows) for rows in found.values()] == [5] * 4
    first = found["T0"][0]
    assert first.truths == ([] if version == "v2.0" else ["cat"])
    assert first.group == ("unanswerable" if version == "v2.0" else "answerable")


def test_articles_are_never_divided() -> None:
    found = parse_squad(official(10, 3))
    for seed in range(3):
        parts = split_articles(found, (0.2, 0.3), seed)
        owners = [{row.id.split("-")[0] for row in part} for part in parts]
        assert sum(map(len, owners)) == 10 == len(set.union(*owners))
        assert [len(part) for part in parts] == [15, 6, 9]
        assert parts == split_articles(found, (0.2, 0.3), seed)
    assert split_articles(found, (0.2, 0.3), 0) != split_articles(found, (0.2, 0.3), 1)
    assert all(split_articles(parse_squad(official(3, 3)), (0.01, 0.01), 0))  # one each, however small the share
    with pytest.raises(ValueError, match="2 article"):
        split_articles(parse_squad(official(2)), (0.2, 0.2), 0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]", "not in SQuAD's format"),
        ('{"data": [{"title": "T", "paragraphs": [{"qas": [{"id": "1"}]}]}]}', "not in SQuAD's format.*'context'"),
        ('{"data": []}', "no question"),
        ("{", "x.json: Expecting"),
        (json.dumps(official()).replace('"answer_start": 4', '"answer_start": 5'), "`answer_start` 5 of question 0-1"),
    ],
)
def test_malformed_files(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_squad(path)
