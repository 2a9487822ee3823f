"""The page: valid HTML whatever is missing, numbers that are right, texts that stay texts, colours to read."""

from __future__ import annotations

import base64
import csv
import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, norm
from sklearn.metrics import matthews_corrcoef

from bayeformers import metrics
from bayeformers.reports import (
    ClassPredictions,
    Comparison,
    HtmlResults,
    RegressionPredictions,
    ReportedSet,
    TaggingComparison,
    html,
    rows_with_words,
)
from bayeformers.reports.html.context import Context
from bayeformers.reports.html.frame import DARK, LIGHT, METHOD_VARIABLES, WORD_SHARE
from bayeformers.reports.html.headline import headline
from bayeformers.reports.html.inputs import mistaken_rows, strange_rows
from bayeformers.reports.html.refusing import _curve
from bayeformers.reports.html.reliability import _bins, _intervals
from bayeformers.reports.html.scores import by_input, clopper_pearson, scores_of
from bayeformers.reports.html.svg import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Panel, ticks
from bayeformers.reports.html.tables import csv_link
from bayeformers.tasks.conll import Sentence

VOID = {"meta", "br", "wbr", "hr", "img", "link", "input"}
EMPTY = {"path", "rect"}


class Page(HTMLParser):
    """What a page consists of; its tags must be closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        assert len(dict(attrs)) == len(attrs), f"an attribute twice in <{tag}>"
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and data.strip():
            self.words.setdefault(self.open[-1], []).append(data.strip())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def files(self) -> dict[str, list[dict[str, str]]]:
        """The rows of each CSV file in the page."""
        found = {}
        for link in self.all("a"):
            head, _, data = str(link["href"]).partition(",")
            assert head == "data:text/csv;charset=utf-8;base64"
            text = base64.b64decode(data, validate=True).decode()
            found[str(link["download"])] = list(csv.DictReader(io.StringIO(text)))
        return found


def classes(rows: int = 60, columns: int = 3, seed: int = 0, *, epistemic: bool = True) -> ClassPredictions:
    generator = np.random.default_rng(seed)
    probs = generator.dirichlet(np.full(columns, 0.6), rows)
    return ClassPredictions(probs, 0.3 * generator.random(rows) if epistemic else None)


def numbers(rows: int = 60, seed: int = 0, *, epistemic: bool = True) -> RegressionPredictions:
    generator = np.random.default_rng(seed)
    part = generator.random(rows) + 0.01 if epistemic else None
    return RegressionPredictions(generator.normal(size=rows), np.full(rows, 0.5), part)


def labels(rows: int = 60, columns: int = 3, seed: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).integers(columns, size=rows)


FULL = HtmlResults(
    {"point": classes(seed=1, epistemic=False), "posterior": classes()},
    labels(),
    texts=[f"sentence number {row}" for row in range(60)],
    class_names=("red", "green", "blue"),
    groups=["clean"] * 20 + ["noisy"] * 20 + ["far"] * 20,
    apart=("far",),
    unfamiliarity=np.arange(60.0),
    words={59: [("sentence ", 0.1), ("number ", -0.2), ("59", 0.3)]},
    policy="Answers where it is at least 90 % sure.",
    caveats={"posterior": "its draws are few"},
    about="Made for a test.",
)
CASES = {
    "everything": FULL,
    "no texts": replace(FULL, texts=None, words={}),
    "no labels": replace(FULL, labels=None),
    "only labels of the far group": replace(FULL, labels=np.r_[np.full(40, -100), labels(20)]),
    "one method": HtmlResults({"only": classes()}, labels()),
    "point estimates": HtmlResults(
        {"one": classes(epistemic=False), "two": classes(seed=2, epistemic=False)}, labels()
    ),
    "nothing but one point estimate": HtmlResults({"one": classes(epistemic=False)}),
    "one class": HtmlResults({"sure": ClassPredictions(np.ones((9, 1)), np.zeros(9))}, np.zeros(9, dtype=int)),
    "one input": HtmlResults({"one": classes(1)}, [0], texts=["alone"]),
    "two classes": HtmlResults({"a": classes(columns=2), "b": classes(columns=2, seed=3)}, labels(columns=2)),
    "all right": HtmlResults({"a": classes(), "b": classes()}, classes().probs.argmax(1)),
    "all wrong": HtmlResults({"a": classes()}, (classes().probs.argmax(1) + 1) % 3),
    "all alike": HtmlResults({"a": ClassPredictions(np.full((20, 4), 0.25), np.zeros(20))}, labels(20, 4)),
    "150 classes": HtmlResults({"a": classes(200, 150), "b": classes(200, 150, 1)}, labels(200, 150)),
    "nine methods": HtmlResults({f"method {i}": classes(seed=i) for i in range(9)}, labels()),
    "numbers": HtmlResults({"a": numbers(epistemic=False), "b": numbers(seed=1)}, np.zeros(60), texts=["x"] * 60),
    "numbers without labels": HtmlResults({"b": numbers()}),
    "numbers, some without a label": HtmlResults({"b": numbers()}, np.where(np.arange(60) % 2, np.nan, 1.0)),
    "one number": HtmlResults({"b": numbers(1)}, [0.0]),
}


def write(results: HtmlResults, folder: Path, **options: Any) -> str:
    return html(results, folder / "page.html", **{"num_resamples": 4, **options}).read_text(encoding="utf-8")


# --- The page as a document ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", CASES)
def test_a_page_is_whole(name: str, tmp_path: Path) -> None:
    text = write(CASES[name], tmp_path)
    page = Page(text)
    assert page.all("html") == [{"lang": "en"}] and len(page.all("h1")) == 1
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    named = [attributes["aria-labelledby"] for _, attributes in page.tags if "aria-labelledby" in attributes]
    assert {one for of in named for one in str(of).split()} <= set(ids)
    # no other file, no network, no script
    assert not {"script", "link", "img", "iframe", "object", "base", "form"} & {tag for tag, _ in page.tags}
    assert not re.search(r"https?://|@import|url\((?!#)|\ssrc=|\son\w+=", re.sub(r"base64,[\w+/=]*", "", text))
    # for those who do not see it
    assert all(attributes.get("scope") in ("col", "row") for attributes in page.all("th"))
    assert len(page.all("table")) == len(page.all("caption")) == len(page.all("tbody"))
    pictures = page.all("svg")
    assert all(picture["role"] == "img" for picture in pictures)
    assert len(page.words.get("desc", [])) == len(pictures) and len(page.words["title"]) == len(pictures) + 1
    assert len(page.files()) == len(page.all("a"))  # no two of a name
    body = re.sub(r"base64,[\w+/=]*", "", text).partition("<body>")[2]
    assert not re.search(r"\bnan\b|\binf\b|None", body)


def test_what_is_known_has_a_section(tmp_path: Path) -> None:
    def headings(results: HtmlResults) -> list[str]:
        return [str(found["id"]) for found in Page(write(results, tmp_path)).all("h2")]

    everything = "numbers reliability refusing parts mistakes strange classes groups comparison everything"
    assert headings(FULL) == everything.split()
    assert headings(CASES["no labels"]) == "numbers unlabelled refusing parts strange groups everything".split()
    assert headings(CASES["numbers"]) == (
        "numbers reliability refusing parts mistakes strange comparison everything".split()
    )


def test_texts_stay_texts(tmp_path: Path) -> None:
    """Whatever stands in names and inputs is shown as it is, and becomes no element."""
    bad = '<b>"bold"</b> & <script>alert(1)</script>'
    results = HtmlResults(
        {bad: classes(), f"{bad}2": classes(seed=1)}, labels(), texts=[bad] * 60, class_names=(bad, bad, "c"),
        groups=[bad] * 30 + ["other"] * 30, apart=[bad], words={row: [(bad, 1.0), (bad, 0.0)] for row in range(60)},
        policy=bad, caveats={f"{bad}2": bad}, title=bad, about=bad,
    )  # fmt: skip
    text = write(results, tmp_path)
    page = Page(text)
    assert not {"b", "script"} & {tag for tag, _ in page.tags}
    assert page.words["h1"] == [bad] and bad in page.words["mark"]
    assert page.files()["predictions.csv"][0]["text"] == bad


def _luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(first: str, second: str) -> float:
    """WCAG 2.2's ratio, between 1 and 21."""
    low, high = sorted((_luminance(first), _luminance(second)))
    return (high + 0.05) / (low + 0.05)


def mixed(colour: str, ground: str, share: float) -> str:
    pairs = [(int(colour[i : i + 2], 16), int(ground[i : i + 2], 16)) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(share * a + (1 - share) * b):02x}" for a, b in pairs)


def test_contrast_is_measured_rightly() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.005)  # as WebAIM's checker gives it


@pytest.mark.parametrize("palette", [LIGHT, DARK], ids=["light", "dark"])
def test_letters_and_marks_can_be_told_from_their_ground(palette: dict[str, str]) -> None:
    assert set(palette) == set(LIGHT)
    grounds = [palette[name] for name in ("ground", "surface", "soft")]
    for name in ("ink", "muted", "epistemic", "good", "wrong"):
        assert min(contrast(palette[name], ground) for ground in grounds) >= 4.5, name
    for name in ("axis", "right", "wrong", *METHOD_VARIABLES):
        assert contrast(palette[name], palette["surface"]) >= 3, name
    for ground in grounds:  # a word of full colour
        assert contrast(palette["ink"], mixed(palette["epistemic"], ground, WORD_SHARE / 100)) >= 4.5


# --- Numbers ---------------------------------------------------------------------------------------------------------
def test_scores_are_those_of_the_metrics() -> None:
    predictions, truth = classes(columns=2), labels(columns=2)
    found = {
        name: score.function(*(by_input(predictions, truth)[key] for key in score.arrays))
        for name, score in scores_of(2).items()
    }
    probs = predictions.probs
    assert found == pytest.approx({
        "accuracy": metrics.accuracy(probs, truth),
        "Matthews": matthews_corrcoef(truth, probs.argmax(1)),
        "NLL": metrics.negative_log_likelihood(probs, truth),
        "ECE": metrics.expected_calibration_error(probs, truth),
        "Brier": metrics.brier_score(probs, truth),
        "AUROC of errors": metrics.error_auroc(predictions.confidence, predictions.errors(truth)),
    })  # fmt: skip


def test_scores_of_numbers() -> None:
    predictions, truth = numbers(), np.random.default_rng(9).normal(size=60)
    found = by_input(predictions, truth)
    std = np.sqrt(predictions.total)
    np.testing.assert_allclose(found["nll"], -norm.logpdf(truth, predictions.mean, std))
    low, high = norm.interval(0.95, predictions.mean, std)
    np.testing.assert_array_equal(found["covered"], (low <= truth) & (truth <= high))


@pytest.mark.parametrize(("hits", "trials"), [(0, 1), (1, 1), (0, 40), (40, 40), (3, 17), (999, 1000)])
def test_intervals_of_shares_are_exact(hits: int, trials: int) -> None:
    exact = binomtest(hits, trials).proportion_ci(0.95, "exact")
    np.testing.assert_allclose(clopper_pearson(hits, trials), (exact.low, exact.high), atol=1e-7)


def test_the_bins_of_reliability() -> None:
    context = Context(HtmlResults({"a": classes(250)}, labels(250)), 1, 0)
    says, right, low, high, counts = _bins(context, "a")
    order = np.argsort(classes(250).confidence)
    hits = (classes(250).probs.argmax(1) == labels(250))[order].reshape(10, 25).sum(1)  # no ties: 25 in each bin
    assert counts.tolist() == [25] * 10
    np.testing.assert_allclose(right, hits / 25)
    np.testing.assert_allclose(says, classes(250).confidence[order].reshape(10, 25).mean(1))
    exact = [binomtest(int(k), 25).proportion_ci(0.95, "exact") for k in hits]
    np.testing.assert_allclose(low, [one.low for one in exact], atol=1e-7)
    np.testing.assert_allclose(high, [one.high for one in exact], atol=1e-7)


def test_the_intervals_of_a_regression() -> None:
    truth = np.random.default_rng(3).normal(size=60)
    of = numbers()
    levels, share, *_ = _intervals(Context(HtmlResults({"a": of}, truth), 1, 0), "a")
    for level, held in zip(levels, share, strict=True):
        low, high = norm.interval(level, of.mean, np.sqrt(of.total))
        assert held == np.mean((low <= truth) & (truth <= high))


def test_the_curve_of_refusing_and_its_band() -> None:
    context = Context(HtmlResults({"a": classes()}, labels()), 1, 0)
    curve = _curve(context, "a")
    errors = classes().errors(labels())[np.argsort(-classes().confidence)]
    for place, k in enumerate(range(1, 61)):
        wrong = int(errors[:k].sum())
        exact = binomtest(wrong, k).proportion_ci(0.95, "exact")
        point = curve.coverage[place], curve.risk[place], curve.low[place], curve.high[place]
        assert point == pytest.approx((k / 60, wrong / k, exact.low, exact.high), abs=1e-7)


def test_the_headline_is_of_the_test_inputs() -> None:
    """Its epistemic part too: a group that stands apart has one of its own."""
    epistemic = FULL.methods["posterior"].epistemic
    assert epistemic is not None
    page = headline(Context(FULL, 20, 0))
    assert f"{epistemic[:40].mean():.4f}" in page and f"{epistemic.mean():.4f}" not in page


def test_which_inputs_are_shown() -> None:
    context = Context(FULL, 1, 0)
    wrong = FULL.methods["posterior"].errors(labels())[:40] > 0  # type: ignore[union-attr]
    sure = classes().confidence[:40]
    rows = mistaken_rows(context)
    assert rows == [row for row in np.argsort(-sure).tolist() if wrong[row]][:20] and len(rows) == 20
    assert strange_rows(context) == list(range(59, 39, -1))  # the group that stands apart is among these
    assert rows_with_words(FULL) == [*rows, *range(59, 39, -1)]
    # without a score of its own the epistemic part counts, of a point estimate the entropy
    assert strange_rows(Context(CASES["one method"], 1, 0))[0] == classes().epistemic.argmax()  # type: ignore[union-attr]
    point = CASES["nothing but one point estimate"]
    assert strange_rows(Context(point, 1, 0))[0] == classes().total.argmax() and rows_with_words(point)


def test_a_better_method_gets_an_arrow(tmp_path: Path) -> None:
    truth = labels(200)
    good = 0.8 * np.eye(3)[truth] + 0.2 / 3
    methods = {"blind": ClassPredictions(np.full((200, 3), 1 / 3)), "seeing": ClassPredictions(good)}
    text = write(HtmlResults(methods, truth), tmp_path, num_resamples=50)
    row = Page(text).files()["comparison.csv"][0]
    assert float(row["NLL"]) == pytest.approx(-np.log(0.8 + 0.2 / 3) - np.log(3), rel=1e-4)
    assert float(row["NLL_high"]) < 0 and text.count("▲</span>") >= 3


def test_words_take_their_colour_from_what_they_add(tmp_path: Path) -> None:
    page = Page(write(FULL, tmp_path))
    shares = {}
    for attributes in page.all("mark"):
        if "title" in attributes:
            shares[attributes["title"]] = attributes["style"]
    top = np.quantile([0.1, 0.3], 0.95)  # full from there on; a word without which it rises has none
    assert shares == {"+0.1000": f"--a:{WORD_SHARE * 0.1 / top:.0f}%", "+0.3000": f"--a:{WORD_SHARE}%"}


# --- Files -----------------------------------------------------------------------------------------------------------
def test_all_predictions_are_a_file(tmp_path: Path) -> None:
    rows = Page(write(FULL, tmp_path)).files()["predictions.csv"]
    assert len(rows) == 60 and rows[3]["input"] == "3" and rows[3]["text"] == "sentence number 3"
    assert rows[3]["label"] == FULL.names[labels()[3]] and rows[59]["group"] == "far"
    assert float(rows[7]["posterior: p(green)"]) == pytest.approx(classes().probs[7, 1], rel=1e-4)
    assert float(rows[7]["posterior: epistemic"]) == pytest.approx(classes().epistemic[7], rel=1e-4)  # type: ignore[index]


def test_a_file_is_bounded_and_says_so() -> None:
    link = csv_link("x", ({"number": number} for number in range(1000)), limit=100)
    rows = Page(link).files()["x.csv"]
    assert "the first" in link and f"{len(rows)} of 1,000 rows" in link and 20 < len(rows) < 40


def test_a_text_is_no_formula() -> None:
    rows = Page(csv_link("x", [{"text": "=HYPERLINK(1)", "number": "-1.5"}])).files()["x.csv"]
    assert rows == [{"text": "'=HYPERLINK(1)", "number": "-1.5"}]


def test_many_long_inputs_make_no_large_page(tmp_path: Path) -> None:
    size = 10_000
    methods = {name: classes(size, 5, seed) for seed, name in enumerate("abc")}
    results = HtmlResults(methods, labels(size, 5), texts=["word " * 400] * size, groups=["g", "h"] * (size // 2))
    text = write(results, tmp_path, num_resamples=2)
    assert len(text) < 4.6e6  # base64 of 3 MB of predictions, and 0.6 MB of all else
    assert re.search(r"the first [\d,]+ of 10,000 rows", text) and "1,200 of 10,000 inputs" in text
    Page(text)


# --- Pictures --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 3e-7), (-2, 5), (0.31, 0.97), (0, 1e6)])
def test_ticks_are_round_and_inside(low: float, high: float) -> None:
    found = ticks(low, high)
    assert 3 <= len(found) <= 11 and low <= found[0] and found[-1] <= high * (1 + 1e-9)
    np.testing.assert_allclose(np.diff(found), found[1] - found[0])


def test_marks_lie_where_their_values_are() -> None:
    panel = Panel("p", "t", "d", (0, 10), (0, 2), ("x", "y"))
    panel.line([0, 5, np.nan, 10], [0, 1, 1, 2], "k")
    right, floor = WIDTH - RIGHT, HEIGHT - BOTTOM
    middle = f"{(LEFT + right) / 2:.1f} {(TOP + floor) / 2:.1f}"
    assert f'd="M{LEFT:.1f} {floor:.1f}L{middle}M{right:.1f} {TOP:.1f}"' in panel.render()


# --- From comparisons ------------------------------------------------------------------------------------------------
def test_a_comparison_becomes_a_page(tmp_path: Path) -> None:
    sets = {
        "test": ReportedSet(40, labels(40), ["clean", "noisy"] * 20, {"text": [f"t{i}" for i in range(40)]}),
        "shifted": ReportedSet(10, None, None, {"text": [f"s{i}" for i in range(10)]}),
    }
    comparison = Comparison(sets, label_names=("a", "b", "c"))
    comparison.add("frequencies", {"test": classes(40), "shifted": classes(10)}, baseline=True)
    comparison.add("point", {"test": classes(40, epistemic=False), "shifted": classes(10, epistemic=False)})
    comparison.add("Laplace", {"test": classes(40), "shifted": classes(10)}, chosen={"beware": ["tau is tiny"]})
    results = comparison.page(title="T", texts=["text"])
    assert list(results.methods) == ["point", "Laplace"] and results.focus == "Laplace" and results.size == 50
    assert results.apart == ["shifted"] and results.texts == [
        *sets["test"].columns["text"],
        *(f"s{i}" for i in range(10)),
    ]
    assert np.asarray(results.labels)[40:].tolist() == [-100] * 10
    assert "tau is tiny" in write(results, tmp_path)


def test_words_of_sentences_become_a_page(tmp_path: Path) -> None:
    comparison = TaggingComparison({"test": [Sentence(("Ada", "left"), ("B-PER", "O"))]}, ["O", "B-PER", "I-PER"])
    comparison.add_draws("point", {"test": [np.log([[[0.1, 0.8, 0.1], [0.9, 0.05, 0.05]]])]})
    results = comparison.page(title="T")
    assert results.texts == ["«Ada» left", "Ada «left»"] and results.methods["point"].epistemic is None
    assert "right on 100.0" in write(results, tmp_path)


# --- Bad input -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": {}}, "`methods` must hold the predictions of at least one"),
        ({"methods": {"a": classes(), "b": classes(59)}}, "'b' must be about 60 inputs as the first, got 59"),
        ({"methods": {"a": classes(), "b": ClassPredictions(np.full((60, 2), 0.5))}}, "'b' must be about 3 classes"),
        ({"methods": {"a": ClassPredictions(2 * classes().probs)}}, "must be >= 0 and sum to 1"),
        ({"methods": {"a": ClassPredictions(np.full((60, 3), np.nan))}}, "must be >= 0 and sum to 1"),
        ({"methods": {"a": ClassPredictions(classes().probs, -np.ones(60))}}, "part of 'a' must be finite and"),
        ({"methods": {"a": ClassPredictions(classes().probs, np.ones(3))}}, r"part of 'a' must be \(60,\), got \(3,\)"),
        ({"labels": labels(59)}, "`labels` must have one entry for each of the 60"),
        ({"labels": labels() + 1}, "`labels` must be classes 0 to 2, or -100"),
        ({"labels": labels().astype(float)}, "`labels` must be class numbers"),
        ({"texts": "one text"}, "`texts` must have one entry for each of the 60 inputs, got a text"),
        ({"texts": ["x"]}, "`texts` must have one entry"),
        ({"class_names": ("red",)}, "`class_names` must name 3 classes, got 1"),
        ({"apart": ("near",)}, r"`apart` must name groups, got \['near'\]"),
        ({"unfamiliarity": np.full(60, np.nan)}, "`unfamiliarity` must be finite"),
        ({"shown": "ensemble"}, "`shown` must be one of"),
        ({"words": {60: []}}, r"`words` must be of rows 0 to 59, got \[60\]"),
        ({"caveats": {"ensemble": "no"}}, r"`caveats` must be of methods, got \['ensemble'\]"),
    ],
)  # fmt: skip
def test_wrong_results(changes: dict[str, Any], message: str) -> None:
    rest = {"methods": FULL.methods, "labels": labels(), **({} if "apart" in changes else {})}
    with pytest.raises(ValueError, match=message):
        HtmlResults(**{**rest, **changes})


def test_wrong_numbers() -> None:
    with pytest.raises(ValueError, match="variances of 'a' must be finite and > 0"):
        HtmlResults({"a": RegressionPredictions(np.zeros(3), np.zeros(3))})
    with pytest.raises(TypeError, match="must all be ClassPredictions, or all RegressionPredictions"):
        HtmlResults({"a": classes(), "b": numbers()})
    for probs in (classes().probs.tolist(), torch.tensor(classes().probs)):
        with pytest.raises(TypeError, match="`probs` of 'a' must be a NumPy array, got (list|Tensor)"):
            HtmlResults({"a": ClassPredictions(probs)})  # type: ignore[arg-type]


def test_wrong_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`path` must be a file, got the folder"):
        html(FULL, tmp_path)
    with pytest.raises(ValueError, match="`num_resamples` must be"):
        html(FULL, tmp_path / "x.html", num_resamples=0)
    with pytest.raises(TypeError, match="`results` must be HtmlResults, got dict"):
        html({"a": classes()}, tmp_path / "x.html")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
    assert html(FULL, tmp_path / "new" / "x.html", num_resamples=1).is_file()
