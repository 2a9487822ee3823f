"""Coloured tokens: the text stays the text, colours follow the numbers, and nothing of an answer becomes HTML."""

from __future__ import annotations

import html
import io
import re

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from bayeformers.reports import ScoredAnswer, coloured, takes_colours, token_page, token_pieces
from examples.data.tiny_decoder import make_tokenizer

PIECES = ("Ada", " lives", " in", " Lemby")


def test_colours_leave_the_text_as_it_is() -> None:
    shown = coloured(PIECES, [0.0, 0.1, 0.5, 2.0], top=1.0)
    assert re.sub(r"\x1b\[[0-9;]*m", "", shown) == "Ada lives in Lemby"
    grounds = [tuple(map(int, found)) for found in re.findall(r"\x1b\[48;2;(\d+);(\d+);(\d+)m", shown)]
    # none at 0; then from white to the figures' blue, 0x0072B2, which is full from `top` on
    assert grounds == [(230, 241, 247), (128, 184, 216), (0, 114, 178)]


def test_without_colours_tokens_from_half_of_top_on_are_marked() -> None:
    assert coloured(PIECES, [0.0, 0.1, 0.5, 2.0], top=1.0, colours=False) == "Ada lives [in 0.50] [Lemby 2.00]"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_colours_are_for_terminals_that_want_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert takes_colours(Terminal()) and not takes_colours(io.StringIO())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not takes_colours(Terminal())
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert not takes_colours(Terminal())


def test_a_page_escapes_what_models_write() -> None:
    pieces = ("<script>", " &", ' "quoted"')
    answers = [
        ScoredAnswer("1 < 2?", pieces, np.array([0.0, 0.2, 0.4]), np.zeros(3), note="<b>", refused=True, wrong=True),
        ScoredAnswer("And?", ("yes",), [0.1], [0.7]),
    ]
    page = token_page("Of <models>", answers, top=0.2, caption="a & b")
    assert "<script>" not in page and "<b>" not in page and "Of <models>" not in page
    spans = re.findall(r'<span class="token" style="([^"]*)" title="([^"]*)">([^<]*)</span>', page)
    assert tuple(html.unescape(text) for *_, text in spans) == (*pieces, "yes")
    assert [title for _, title, _ in spans][-1] == "epistemic 0.100, aleatoric 0.700 nats"
    assert "rgba(0, 114, 178, 0.5)" in spans[-1][0] and "rgba(230, 159, 0, 1.0)" in spans[-1][0]
    assert page.count('<div class="refused wrong">') == 1


@pytest.mark.parametrize("top", [0.0, -1.0, float("nan"), float("inf")])
def test_wrong_top(top: float) -> None:
    for call in (lambda: coloured(PIECES, [0.0] * 4, top=top), lambda: token_page("", [], top=top)):
        with pytest.raises(ValueError, match="`top` must be a finite number > 0"):
            call()


def test_numbers_of_other_tokens() -> None:
    with pytest.raises(ValueError, match=r"`uncertainty` must have the shape \(4,\)"):
        coloured(PIECES, [0.0], top=1.0)
    with pytest.raises(ValueError, match=r"`aleatoric` must have the shape \(4,\) of `pieces`, got \(3,\)"):
        ScoredAnswer("?", PIECES, [0.0] * 4, [0.0] * 3)


# --- Pieces ----------------------------------------------------------------------------------------------------------
def test_pieces_of_words() -> None:
    tokenizer = make_tokenizer(["Ada lives in Lemby ."])
    ids = tokenizer("Ada lives in Lemby", add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    assert token_pieces(tokenizer, ids) == (*PIECES, "")


def test_pieces_of_bytes_join_to_the_text() -> None:
    """A letter of several bytes is no text until its last one: until then nothing is lost, and nothing stands twice."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    text = "é is 2 bytes, 語 is 3"
    ids = fast(text)["input_ids"]
    pieces = token_pieces(fast, ids)
    assert len(pieces) == len(ids) == len(text.encode()) and "".join(pieces) == text


def test_no_tokens() -> None:
    assert token_pieces(make_tokenizer(["Ada"]), []) == ()
