"""Windows, span distributions, official scores and official files of the question-answering example, exactly."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("datasets")

from transformers import PreTrainedTokenizerBase

from examples.squad.answers import Answers, Reader, fit_span_temperature
from examples.squad.arguments import DataArguments
from examples.squad.articles import AMBIGUOUS, GROUPS, SHIFTED, UNANSWERABLE, write_articles
from examples.squad.data import Question, load_data, parse_squad, read_squad, split_articles
from examples.squad.scores import exact_match, f1, normalized
from examples.squad.spans import SpanLogits, joined_scores, span_distribution
from examples.squad.tiny_bert import make_tokenizer
from examples.squad.windows import Reading, Readings, Window, read, token_span

TEXT = "the cat sat on the mat and the dog lay by the old red door near a cold dark sea all day long"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return make_tokenizer([TEXT] * 12)


def question(start: int = 4, text: str = "cat", context: str = TEXT) -> Question:
    return Question("q", "the cat", context, ((start, text),) if text else (), "answerable")


# --- Windows ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("max_length", "stride"), [(64, 8), (20, 4), (16, 6), (14, 1)])
def test_windows_cover_the_text_and_say_where(tokenizer: Any, max_length: int, stride: int) -> None:
    readings = read([question()], tokenizer, max_length=max_length, stride=stride)
    whole = tokenizer(TEXT, add_special_tokens=False, return_offsets_mapping=True)
    (reading,) = readings.rows
    assert list(reading.offsets) == [tuple(pair) for pair in whole["offset_mapping"]]
    assert len(readings.features) == len(reading.windows) and (len(reading.windows) > 1) == (max_length < 64)
    for window, ids in zip(reading.windows, readings.features["input_ids"], strict=True):
        assert len(ids) <= max_length
        assert ids[window.context] == whole["input_ids"][window.first : window.first + window.size]
        assert ids[window.null] == tokenizer.cls_token_id
    for ids, types in zip(readings.features["input_ids"], readings.features["token_type_ids"], strict=True):
        assert types[: ids.index(tokenizer.sep_token_id) + 1] == [0] * (ids.index(tokenizer.sep_token_id) + 1)
        assert set(types[ids.index(tokenizer.sep_token_id) + 1 :]) == {1}
    for before, after in zip(reading.windows, reading.windows[1:], strict=False):
        assert before.first + before.size - after.first == stride
    assert reading.windows[-1].first + reading.windows[-1].size == len(whole["input_ids"])


def test_labels_are_the_answer_or_the_class_token(tokenizer: Any) -> None:
    begin = TEXT.index("old red door")
    readings = read([question(begin, "old red door")], tokenizer, max_length=16, stride=6)
    (reading,) = readings.rows
    said = []
    for row in readings.features:
        said.append(tokenizer.decode(row["input_ids"][row["start_positions"] : row["end_positions"] + 1]))
    assert set(said) == {"old red door", "[CLS]"} and len(said) == len(reading.windows)
    assert [reading.text(*span) for span in reading.gold] == ["old red door"]


def test_unanswerable_questions_are_labelled_with_the_class_token(tokenizer: Any) -> None:
    features = read([question(text="")], tokenizer, max_length=16, stride=6).features
    assert set(features["start_positions"]) == set(features["end_positions"]) == {0}


def test_token_span_takes_every_token_that_overlaps() -> None:
    offsets = [(0, 3), (4, 7), (7, 9), (10, 12)]
    assert token_span(offsets, 5, 8) == (1, 2)
    assert token_span(offsets, 0, 12) == (0, 3)
    with pytest.raises(ValueError, match="no token"):
        token_span(offsets, 3, 4)


def test_a_question_that_leaves_no_room_is_refused(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"`max_seq_length` 10 leaves too little room .* question q"):
        read([question()], tokenizer, max_length=10, stride=6)


# --- One distribution from several windows ---------------------------------------------------------------------------
def reading_of(size: int, windows: list[tuple[int, int]], offset: int = 3) -> Reading:
    """A text of ``size`` tokens "t" in windows [first, last), whose context stands behind ``offset`` positions."""
    places = tuple(Window(slice(offset, offset + last - first), first, 0) for first, last in windows)
    context = " ".join("t" for _ in range(size))
    row = Question("q", "?", context, ((0, "t"),), "answerable")
    return Reading(row, places, tuple((2 * i, 2 * i + 1) for i in range(size)))


def logits_of(reading: Reading, start: torch.Tensor, end: torch.Tensor, null: torch.Tensor) -> SpanLogits:
    """A position-wise model: a token's logits (S, size) are the same in every window; what is no context is large."""
    length = max(window.context.stop for window in reading.windows) + 2
    padded = torch.full((2, len(start), len(reading.windows), length), 50.0, dtype=start.dtype)
    for index, window in enumerate(reading.windows):
        for side, values in enumerate((start, end)):
            padded[side, :, index, window.context] = values[:, window.first : window.first + window.size]
            padded[side, :, index, window.null] = null
    return SpanLogits(*padded)


@pytest.mark.parametrize("has_null", [True, False])
def test_windows_joined_are_the_whole_text(has_null: bool) -> None:
    """Windows that share as many tokens as the longest answer has: exactly the distribution without windows."""
    size, longest = 23, 4
    start, end, null = (torch.randn(*shape, dtype=torch.float64) for shape in ((5, size), (5, size), (5,)))
    whole, split = reading_of(size, [(0, size)]), reading_of(size, [(0, 10), (6, 16), (12, 22), (18, 23)])
    one, other = (
        span_distribution(r, logits_of(r, start, end, null), max_length=longest, has_null=has_null)
        for r in (whole, split)
    )
    torch.testing.assert_close(one.predictive.log_probs, other.predictive.log_probs)
    assert one.answer == other.answer and one.nll == pytest.approx(other.nll)


def test_distribution_is_that_of_all_spans_of_all_windows() -> None:
    """Brute force in float64, with windows that disagree: each span by its best window, no answer by its worst."""
    size, longest, draws = 9, 3, 4
    reading = reading_of(size, [(0, 6), (3, 9)])
    logits = SpanLogits(torch.randn(draws, 2, 12), torch.randn(draws, 2, 12))
    found = span_distribution(reading, logits, max_length=longest, has_null=True, temperature=1.7)
    average: dict[tuple[int, int] | None, float] = {}
    for s in range(draws):
        scores: dict[tuple[int, int] | None, float] = {}
        for w, window in enumerate(reading.windows):
            start, end = logits.start[s, w].double(), logits.end[s, w].double()
            for i in range(window.size):
                for j in range(i, min(i + longest, window.size)):
                    score = float(start[window.context.start + i] + end[window.context.start + j])
                    span = (window.first + i, window.first + j)
                    scores[span] = max(score, scores.get(span, -math.inf))
        scores[None] = min(float(logits.start[s, w, 0].double() + logits.end[s, w, 0].double()) for w in range(2))
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
    two = Question("q", "?", reading.question.context, ((0, "t"), (4, "t")), AMBIGUOUS)
    reading = Reading(two, reading.windows, reading.offsets)
    logits = SpanLogits(torch.zeros(1, 1, 8), torch.zeros(1, 1, 8))
    logits.start[..., 3], logits.end[..., 5] = 2.0, 1.0  # scores (0,0): 2, (1,1): 0, (2,2): 1
    found = span_distribution(reading, logits, max_length=1, has_null=False)
    log_total = math.log(math.exp(2) + math.exp(0) + math.exp(1))
    assert found.nll == pytest.approx(log_total - (2 + 1) / 2)


def test_two_right_answers_out_of_reach_of_each_other_have_an_entropy_of_ln_2() -> None:
    """Start and end are independent: within reach, the span from the first to the second takes its share."""
    size = 12
    reading, sides = reading_of(size, [(0, size)]), torch.full((1, size), -60.0, dtype=torch.float64)
    sides[0, 1] = sides[0, 10] = 0.0
    logits = logits_of(reading, sides, sides, torch.full((1,), -60.0, dtype=torch.float64))
    apart, within = (span_distribution(reading, logits, max_length=n, has_null=True) for n in (8, 12))
    assert float(apart.predictive.predictive_entropy) == pytest.approx(math.log(2))
    assert float(within.predictive.predictive_entropy) == pytest.approx(math.log(3))


def test_joined_scores_of_a_short_text() -> None:
    reading = reading_of(2, [(0, 2)])
    scores = joined_scores(SpanLogits(torch.zeros(1, 1, 7), torch.zeros(1, 1, 7)), reading.windows, 2, 30)
    assert scores.tolist() == [[[0.0, 0.0], [0.0, -math.inf]]]


def test_temperature_minimises_the_validation_nll(tokenizer: Any) -> None:
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
        logits.append(SpanLogits(z, torch.zeros(1, 1, 8)))
    readings, reader = Readings(rows, None), Reader(max_length=1, has_null=False)  # type: ignore[arg-type]
    temperature = fit_span_temperature(reader, readings, logits)

    def nll(value: float) -> float:
        return float(Reader(1, False, value).nll(readings, logits).mean())

    assert nll(temperature) <= min(nll(0.97 * temperature), nll(1.03 * temperature))
    # Fisher information of 1/T is Var_p[z], about .7 per row: 1/T = .25 +- 1/sqrt(600 * .7) = .049; 4 sd is .2
    assert 1 / temperature == pytest.approx(0.25, abs=0.2)


def test_answers_of_a_point_estimate_have_no_epistemic_part() -> None:
    reading = reading_of(4, [(0, 4)])
    readings, reader = Readings([reading], None), Reader(2, True)  # type: ignore[arg-type]
    one = reader.answers(readings, [SpanLogits(torch.randn(1, 1, 8), torch.randn(1, 1, 8))])
    assert isinstance(one, Answers) and one.epistemic.tolist() == [0.0] and one.total == one.aleatoric
    several = reader.answers(readings, [SpanLogits(torch.randn(3, 1, 8), torch.randn(3, 1, 8))])
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
    assert first.group == (UNANSWERABLE if version == "v2.0" else "answerable")


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


def test_files_play_their_parts(tmp_path: Path) -> None:
    one, two, three = (str(tmp_path / name) for name in ("train-v2.0.json", "dev-v2.0.json", "other.json"))
    for path, articles in ((one, 5), (two, 2), (three, 1)):
        Path(path).write_text(json.dumps(official(articles, articles, asks=f"where {articles} ?")))
    data = load_data(DataArguments(split_by_article=one), 0)
    assert [len(part) for part in data.sets.values()] == [15, 5, 5] and data.asks_unanswerable
    data = load_data(DataArguments(data_dir=str(tmp_path)), 0)
    assert [len(part) for part in data.sets.values()] == [20, 5, 4]
    data = load_data(DataArguments(train_file=one, validation_file=two), 0)  # as SQuAD's dev set: reported
    assert [len(part) for part in data.sets.values()] == [20, 5, 4]
    data = load_data(DataArguments(train_file=one, validation_file=two, test_file=three, shifted_file=three), 0)
    assert [len(part) for part in data.sets.values()] == [25, 4, 1, 1]
    assert data.shifted[0].group == SHIFTED
    data = load_data(DataArguments(split_by_article=one, max_train_samples=4, max_eval_samples=3), 0)
    assert [len(part) for part in data.sets.values()] == [4, 3, 3]


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


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"train_file": "a"}, ValueError, "`train_file` 'a' needs a `validation_file` or a `test_file`"),
        ({"validation_file": "a"}, ValueError, "`validation_file` 'a' needs a `train_file`"),
        ({"train_file": "a", "data_dir": "b"}, ValueError, "exclude each other"),
        (
            {"max_answer_length": 40, "doc_stride": 30},
            ValueError,
            "0 < answer <= stride < sequence, got 40, 30 and 384",
        ),
        ({"validation_share": 0.7}, ValueError, "`validation_share` .* got 0.7"),
        ({"max_train_samples": 1}, ValueError, "`max_train_samples` must be at least 2, got 1"),
        ({"split_by_article": "nowhere.json"}, FileNotFoundError, "nowhere.json does not exist"),
        ({"data_dir": "nowhere"}, FileNotFoundError, "has no train-v1.1.json"),
    ],
)
def test_bad_arguments(given: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        load_data(DataArguments(**given), 0)


# --- Written articles ------------------------------------------------------------------------------------------------
def test_written_articles_are_a_function_of_the_seed() -> None:
    small = {"train": 5, "validation": 2, "test": 3, "shifted": 2}
    assert write_articles(3, **small) == write_articles(3, **small) != write_articles(4, **small)


def test_written_questions_are_what_their_group_says() -> None:
    written = write_articles(0, train=80, validation=20, test=60, shifted=20)
    splits = {name: parse_squad(content) for name, content in written.items()}
    rows = {name: [row for found in articles.values() for row in found] for name, articles in splits.items()}
    assert {row.group for row in rows["test"]} == set(GROUPS) and {row.group for row in rows["shifted"]} == {SHIFTED}
    for name, found in rows.items():
        for row in found:
            if row.group == AMBIGUOUS:  # one annotator in training, two elsewhere, who differ
                assert len(set(row.truths)) == (1 if name == "train" else 2)
            elif row.group == UNANSWERABLE:
                assert not row.answers
            elif row.group != SHIFTED:
                assert len(row.answers) == 1
    ids = [row.id for found in rows.values() for row in found]
    assert len(ids) == len(set(ids))


def test_the_two_right_answers_are_out_of_reach_of_each_other() -> None:
    splits = {name: parse_squad(content) for name, content in write_articles(0, train=300, test=60).items()}
    train, test = ([row for found in splits[name].values() for row in found] for name in ("train", "test"))
    tokenizer = make_tokenizer(text for row in train for text in (row.context, row.text))
    readings = read(test, tokenizer, max_length=64, stride=16).rows
    both = [reading.gold for reading in readings if reading.question.group == AMBIGUOUS]
    assert both and all(abs(first[0] - second[0]) >= 8 for first, second in both)
    gold = [span for reading in readings for span in reading.gold]
    assert gold and all(last - first < 8 for first, last in gold)  # every answer is in reach
