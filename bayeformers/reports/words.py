"""Panels of sentences, word by word, and of events whose probability a model gives, such as its entities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from ..tasks.conll import OUTSIDE, Sentence
from ..tasks.entities import TaggedSentence, calibration_bins
from .plots import GREY, METHOD_COLOURS, legend_below, method_style, panel_title, wilson_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WRONG = "#C00000"
LINE = 100
"""Characters of a strip's line."""


def event_reliability(
    axes: Axes, probability: Mapping[str, ArrayLike], happened: Mapping[str, ArrayLike], *, question: str
) -> None:
    """How often events happen, against the probability (N,) that each method gave them, in bins of equal numbers.

    Args:
        axes: the panel.
        probability: by method, of its events.
        happened: by method, 1 or 0 of each event.
        question: the panel's title.
    """
    axes.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1, label="ideal: right as often as it says")
    for index, (name, values) in enumerate(probability.items()):
        bins = calibration_bins(np.asarray(values), np.asarray(happened[name], dtype=np.float64))
        style = method_style(index)
        axes.plot(bins[:, 0], bins[:, 1], "o", label=name, **style)
        axes.vlines(bins[:, 0], *wilson_interval(bins[:, 1], bins[:, 2]), color=style["color"], linewidth=1, alpha=0.5)
    axes.set(xlim=(0, 1.01), ylim=(0, 1.01))
    caption = "Test set; below the diagonal: too sure of itself. Bars: 95 % intervals."
    panel_title(axes, question, caption)
    legend_below(axes)


def line_width(sentence: Sentence) -> int:
    """Characters of the sentence in a strip, which has `LINE` of them."""
    return sum(max(len(word), 5) + 1 for word in sentence.words)


def word_strip(axes: Axes, sentences: Sequence[tuple[Sentence, TaggedSentence]], method: str) -> None:
    """Sentences as rows of words; above each word its entropy as a bar, aleatoric and epistemic part stacked.

    Args:
        axes: a wide panel.
        sentences: with one method's predictions.
        method: its name.
    """
    highest = max((float(tagged.entropy.max()) for _, tagged in sentences), default=1.0) or 1.0
    for row, (sentence, tagged) in enumerate(sentences):
        _draw_sentence(axes, sentence, tagged, 2.2 * (len(sentences) - row), highest)
    axes.set(xlim=(-12, LINE), ylim=(1.3, 2.2 * len(sentences) + 1.4))
    axes.axis("off")
    title = f"What is each word, and how sure is the model ({method})?\n"
    axes.set_title(title, fontsize=12, fontweight="bold", loc="left")
    axes.text(
        0, 1.01,
        "Bars: entropy of the word's label, its aleatoric part orange, its epistemic part blue.  "
        f"Tallest: {highest:.2f} nats.  Below: the predicted label and its probability; red: wrong.",
        transform=axes.transAxes, fontsize=9.5, color=GREY,
    )  # fmt: skip


def _draw_sentence(axes: Axes, sentence: Sentence, tagged: TaggedSentence, height: float, highest: float) -> None:
    axes.text(-12, height, sentence.group, fontsize=9, color=GREY, va="baseline")
    left, epistemic = 0.0, tagged.epistemic / highest
    aleatoric = np.maximum(tagged.entropy / highest - epistemic, 0.0)
    for place, (word, gold, label) in enumerate(zip(sentence.words, sentence.labels, tagged.labels, strict=True)):
        wide = max(len(word), 5) + 1.0
        centre = left + wide / 2
        bars, bottom = (aleatoric[place], epistemic[place]), height + 0.42
        axes.bar([centre] * 2, bars, width=wide - 1, bottom=[bottom, bottom + bars[0]], color=METHOD_COLOURS[1::-1])
        text: dict[str, Any] = {"ha": "center", "va": "baseline"}
        axes.text(centre, height, word, fontsize=10, **text)
        text |= {"fontsize": 7, "color": "black" if label == gold else WRONG}
        if label != OUTSIDE or label != gold:
            axes.text(centre, height - 0.4, f"{label} {float(tagged.probs[place].max()):.2f}", **text)
        if label != gold:
            axes.text(centre, height - 0.72, f"is {gold}", **text)
        left += wide
