"""Generated answers whose tokens are coloured by how uncertain they are: for a terminal, and as a page of HTML.

Blue is what the model does not know (epistemic), orange what the text leaves open (aleatoric): the colours of the
figures. A token's colour is full at ``top`` nats.
"""

from __future__ import annotations

import html
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
from numpy.typing import ArrayLike

from .html.frame import document
from .plots import METHOD_COLOURS

__all__ = ["ScoredAnswer", "coloured", "takes_colours", "token_page", "token_pieces"]

_EPISTEMIC, _ALEATORIC = METHOD_COLOURS[:2]
_BLACK, _WHITE, _RESET = "\x1b[38;2;0;0;0m", "\x1b[38;2;255;255;255m", "\x1b[0m"
_INCOMPLETE = "\ufffd"
_MARKED = 0.5
"""Share of ``top`` from which a token is marked where there are no colours."""
_STYLE = """
body { line-height: 1.9; }
.note, header p { color: var(--muted); font-size: .85rem; } .wrong { color: var(--wrong); }
.question { font-weight: 600; margin-top: 1.2rem; } .refused .token { opacity: .55; }
.token { border-bottom: 3px solid transparent; border-radius: 2px; padding: 1px 0; white-space: pre-wrap; }
"""


@dataclass(frozen=True)
class ScoredAnswer:
    """One answer with uncertainties, in nats.

    Attributes:
        question: what was asked.
        pieces: the answer's tokens as text, (T,), which joined are the answer; see `token_pieces`.
        epistemic: of each token, (T,).
        aleatoric: of each token, (T,).
        note: what else to say of it, such as the right answer.
        refused: whether it is too uncertain to be given.
        wrong: whether it is known to be wrong.
    """

    question: str
    pieces: tuple[str, ...]
    epistemic: ArrayLike
    aleatoric: ArrayLike
    note: str = ""
    refused: bool = False
    wrong: bool = False

    def __post_init__(self) -> None:
        """Raise ValueError unless there is one number of each kind for every token."""
        for name in ("epistemic", "aleatoric"):
            shape = np.shape(getattr(self, name))
            if shape != (len(self.pieces),):
                raise ValueError(f"`{name}` must have the shape ({len(self.pieces)},) of `pieces`, got {shape}.")


def token_pieces(tokenizer: Any, ids: Sequence[int]) -> tuple[str, ...]:
    """Return what each token adds to the decoded text, so that all pieces joined are the text.

    Args:
        tokenizer: of transformers.
        ids: of an answer's tokens, (T,).
    """
    done, pieces = "", []
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if text.endswith(_INCOMPLETE) and end < len(ids):  # a character of several tokens: the last one has it
            pieces.append("")
        else:
            pieces.append(text[len(os.path.commonprefix([done, text])) :])
            done = text
    return tuple(pieces)


def takes_colours(stream: IO[str]) -> bool:
    """Whether a stream is a terminal that shows colours; never where ``NO_COLOR`` is set (https://no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def coloured(pieces: Sequence[str], uncertainty: ArrayLike, *, top: float, colours: bool = True) -> str:
    """Return an answer's text, each token on a blue ground that is the stronger the more uncertain it is.

    Args:
        pieces: the tokens as text, (T,).
        uncertainty: of each, >= 0, (T,), such as the epistemic part.
        top: the uncertainty of the strongest colour, > 0.
        colours: whether to use ANSI's codes (24 bits); else tokens from half of ``top`` on stand in brackets.

    Raises:
        ValueError: ``top`` is not a finite number > 0, or the two are of different lengths.

    >>> coloured(["Ada", " lives", " in", " Lemby"], [0.0, 0.0, 0.1, 0.9], top=1.0, colours=False)
    'Ada lives in [Lemby 0.90]'
    """
    _check_top(top)
    values = np.asarray(uncertainty, dtype=np.float64)
    if values.shape != (len(pieces),):
        raise ValueError(f"`uncertainty` must have the shape ({len(pieces)},) of `pieces`, got {values.shape}.")
    shown = []
    for piece, value in zip(pieces, values, strict=True):
        text = piece.lstrip()
        blank, share = piece[: len(piece) - len(text)], _share(value, top)
        if colours:
            shown.append(f"{blank}{_ground(share)}{text}{_RESET}" if share > 0 and text else piece)
        else:
            shown.append(f"{blank}[{text} {value:.2f}]" if share >= _MARKED and text else piece)
    return "".join(shown)


def token_page(title: str, answers: Iterable[ScoredAnswer], *, top: float, caption: str = "") -> str:
    """Return a page of HTML with all answers; it needs no other file, no script and no network.

    A token's ground is blue by its epistemic and its underline orange by its aleatoric part; the numbers show under the
    pointer.

    Args:
        title: of the page.
        answers: in the order of the page.
        top: nats of the strongest colour, > 0.
        caption: what the page is about, in small letters.

    Raises:
        ValueError: ``top`` is not a finite number > 0.
    """
    _check_top(top)
    legend = (
        f"Blue: epistemic, what the model does not know. Orange underline: aleatoric, what the text leaves open. Full "
        f"colour: {top:.2f} nats. Pale: refused."
    )
    body = "\n".join([
        f"<header><h1>{html.escape(title)}</h1><p>{html.escape(caption)}</p><p>{legend}</p></header>",
        *(_answer(answer, top) for answer in answers),
    ])
    return document(title, body, style=_STYLE)


def _answer(answer: ScoredAnswer, top: float) -> str:
    kinds = np.asarray(answer.epistemic, dtype=np.float64), np.asarray(answer.aleatoric, dtype=np.float64)
    tokens = "".join(_token(*token, top) for token in zip(answer.pieces, *kinds, strict=True) if token[0])
    classes = " ".join(name for name in ("refused", "wrong") if getattr(answer, name))
    note = f'<div class="note">{html.escape(answer.note)}</div>' if answer.note else ""
    return (
        f'<section><div class="question">{html.escape(answer.question)}</div>'
        f'<div class="{classes}">{tokens}</div>{note}</section>'
    )


def _token(piece: str, epistemic: float, aleatoric: float, top: float) -> str:
    ground, line = _rgba(_EPISTEMIC, _share(epistemic, top)), _rgba(_ALEATORIC, _share(aleatoric, top))
    ink = "#fff" if _share(epistemic, top) > 0.6 else "inherit"
    style = f"background: {ground}; border-bottom-color: {line}; color: {ink}"
    told = f"epistemic {epistemic:.3f}, aleatoric {aleatoric:.3f} nats"
    return f'<span class="token" style="{style}" title="{told}">{html.escape(piece)}</span>'


def _check_top(top: float) -> None:
    if not (math.isfinite(top) and top > 0):
        raise ValueError(f"`top` must be a finite number > 0, got {top!r}: the nats of the strongest colour.")


def _share(value: float, top: float) -> float:
    return min(max(float(value), 0.0) / top, 1.0)


def _rgb(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def _rgba(colour: str, alpha: float) -> str:
    return f"rgba{(*_rgb(colour), round(alpha, 3))}"


def _ground(share: float) -> str:
    """ANSI's codes of a ground between white and blue, and of letters that can be read on it."""
    red, green, blue = (round(255 + share * (part - 255)) for part in _rgb(_EPISTEMIC))
    return f"\x1b[48;2;{red};{green};{blue}m{_WHITE if share > 0.6 else _BLACK}"
