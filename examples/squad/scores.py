"""SQuAD's exact match and F1, as the official evaluation script (v2.0) computes them."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalized(text: str) -> str:
    """Lower case without punctuation, articles and superfluous spaces.

    >>> normalized("The  Norman's,  a Duke")
    'normans duke'
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, truths: Sequence[str]) -> float:
    """1 if the normalised answer is one of ``truths``, else 0; without truths the right answer is "".

    >>> exact_match("the Denver Broncos", ["Denver Broncos"]), exact_match("", []), exact_match("Denver", [])
    (1.0, 1.0, 0.0)
    """
    return _best(answer, truths, lambda given, truth: float(normalized(given) == normalized(truth)))


def f1(answer: str, truths: Sequence[str]) -> float:
    """2 P R / (P + R) of the normalised words that the answer shares with a truth, the best over ``truths``.

    >>> round(f1("February 7", ["February 7, 2016", "2016"]), 4)
    0.8
    """
    return _best(answer, truths, _f1)


def _best(answer: str, truths: Sequence[str], score: Callable[[str, str], float]) -> float:
    """The official script drops truths that normalise to nothing; where none is left, "" is the truth."""
    kept = [truth for truth in truths if normalized(truth)] or [""]
    return max(score(answer, truth) for truth in kept)


def _f1(answer: str, truth: str) -> float:
    given, wanted = normalized(answer).split(), normalized(truth).split()
    if not given or not wanted:
        return float(given == wanted)
    shared = sum((Counter(given) & Counter(wanted)).values())
    if shared == 0:
        return 0.0
    precision, recall = shared / len(given), shared / len(wanted)
    return 2 * precision * recall / (precision + recall)
