"""What a run leaves behind: tables, results.json, predictions.csv, entities.csv and one picture."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bayeformers.reports import (
    GREY,
    METHOD_COLOURS,
    METHOD_LINES,
    format_table,
    legend_below,
    risk_coverage,
    save_figure,
    wilson_interval,
)
from examples.conll.data import TokenData
from examples.conll.entities import split_label
from examples.conll.evaluation import ALL, SentencePrediction, calibration_bins
from examples.conll.reader import Sentence

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BySet = dict[str, list[SentencePrediction]]
FIGURE = "entities.png"
SHOWN_PER_GROUP = 2
WRONG = "#C00000"
WIDTH = 100
"""Characters of the strip's lines."""


def format_results(results: Mapping[str, Any]) -> str:
    """Tables: words and entities by group, the ambiguous words next to the truth, telling shifted sentences."""
    methods = results["methods"]
    groups = list(next(iter(methods.values()))["groups"])
    parts = []
    for kind in ("words", "entities"):
        for group in (group for group in groups if kind == "entities" or group in (ALL, "shifted")):
            rows = {name: report["groups"][group][kind] for name, report in methods.items()}
            heading = "test set" if group == ALL else f"{group} sentences"
            parts.append(format_table(rows, corner=f"{kind}, {heading}"))
    for key, corner in (("ambiguous", "words of random type"), ("shift_auroc", "AUROC of telling shifted, by")):
        if all(key in report for report in methods.values()):
            parts.append(format_table({name: report[key] for name, report in methods.items()}, corner=corner))
    for name, of in results["facts"].items():
        if of.get("beware"):
            parts.append(f"{name}: {'; '.join(of['beware'])}.\n  Its aleatoric and epistemic parts mean nothing.")
    return "\n\n".join(parts)


def write_predictions(path: Path, data: TokenData, methods: Mapping[str, BySet]) -> None:
    """One row per word: set, sentence, word, label, then each method's label, probability and uncertainties."""

    def rows() -> Iterable[dict[str, Any]]:
        for name, sentences in data.reported.items():
            for number, one in enumerate(sentences):
                said = {method: sets[name][number] for method, sets in methods.items()}
                for place, (word, label) in enumerate(zip(one.words, one.labels, strict=True)):
                    row = {"set": name, "group": one.group, "sentence": number, "word": word, "label": label}
                    for method, found in said.items():
                        row |= _word_columns(_prefix(method), found, place)
                    yield row

    _write_rows(path, rows())


def _word_columns(prefix: str, found: SentencePrediction, place: int) -> dict[str, Any]:
    total, epistemic = float(found.entropy[place]), float(found.epistemic[place])
    numbers = {"p": float(found.probs[place].max()), "entropy": total, "epistemic": epistemic}
    return {
        f"{prefix}:label": found.labels[place],
        **{f"{prefix}:{name}": f"{value:.6g}" for name, value in numbers.items()},
    }


def write_entities(path: Path, data: TokenData, methods: Mapping[str, BySet]) -> None:
    """One row per predicted entity and method: where, what, how probable, and whether it is right."""

    def rows() -> Iterable[dict[str, Any]]:
        for method, sets in methods.items():
            for name, sentences in data.reported.items():
                for number, (one, found) in enumerate(zip(sentences, sets[name], strict=True)):
                    for item in found.entities:
                        start, end, kind = item.entity
                        yield {
                            "method": method, "set": name, "sentence": number, "start": start, "end": end,
                            "type": kind, "text": " ".join(one.words[start:end]), "right": int(item.is_right),
                            "probability": f"{item.probability:.6g}", "weakest": f"{item.weakest:.6g}",
                            "epistemic": f"{item.epistemic:.6g}", "entropy": f"{item.entropy:.6g}",
                        }  # fmt: skip

    _write_rows(path, rows())


def _prefix(method: str) -> str:
    return method.replace(" + ", "+").replace(" ", "_")


def _write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer: csv.DictWriter[str] | None = None
        for row in rows:
            if writer is None:
                writer = csv.DictWriter(file, fieldnames=list(row))
                writer.writeheader()
            writer.writerow(row)


# -- the picture ------------------------------------------------------------------------------------------------------


def write_figure(path: Path, data: TokenData, methods: Mapping[str, BySet], shown: str) -> None:
    """Sentences with each word's uncertainties as told by the method ``shown``; calibration and refusal of entities."""
    from matplotlib.figure import Figure  # not pyplot: no global state, no display needed

    figure = Figure(figsize=(13, 11.5), layout="constrained")
    strip, panels = figure.subfigures(2, 1, height_ratios=(1.15, 1))
    draw_strip(strip.subplots(), _examples(data, methods[shown]), shown)
    reliability, risk = panels.subplots(1, 2)
    test = {name: [item for one in sets["test"] for item in one.entities] for name, sets in methods.items()}
    test = {name: found for name, found in test.items() if found}
    right = {name: np.array([item.is_right for item in found], dtype=float) for name, found in test.items()}
    probability = {name: np.array([item.probability for item in found]) for name, found in test.items()}
    if test:
        draw_reliability(reliability, probability, right)
        risk_coverage(risk, probability, {name: 1 - value for name, value in right.items()})
        risk.set(xlabel="% of predicted entities kept, most probable first", ylabel="% of these wrong")
    figure.suptitle("Which word, and which entity, is the model unsure of?", fontsize=14)
    save_figure(figure, path, dpi=90)


def draw_reliability(axes: Axes, probability: Mapping[str, Any], right: Mapping[str, Any]) -> None:
    """Share of right entities against the probability that the method gave them, in bins of equal numbers."""
    axes.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1, label="ideal: right as often as it says")
    for index, (name, values) in enumerate(probability.items()):
        bins = calibration_bins(values, right[name])
        style = {"color": METHOD_COLOURS[index % 6], "linestyle": METHOD_LINES[index % 6], "markersize": 4}
        axes.plot(bins[:, 0], bins[:, 1], "o", label=name, **style)
        axes.vlines(bins[:, 0], *wilson_interval(bins[:, 1], bins[:, 2]), color=style["color"], linewidth=1, alpha=0.5)
    axes.set(xlim=(0, 1.01), ylim=(0, 1.01), xlabel="probability of span and type", ylabel="share of entities right")
    axes.set_title("Is an entity right as often as it says?\n", fontsize=12, fontweight="bold", loc="left")
    caption = "Test set; below the diagonal: too sure of itself. Bars: 95 % intervals."
    axes.text(0, 1.02, caption, transform=axes.transAxes, fontsize=9.5, color=GREY)
    axes.grid(alpha=0.25)
    legend_below(axes)


def _examples(data: TokenData, found: BySet) -> list[tuple[Sentence, SentencePrediction]]:
    """The first sentences with an entity of every group."""
    chosen: list[tuple[Sentence, SentencePrediction]] = []
    every = [pair for name, part in data.reported.items() for pair in zip(part, found[name], strict=True)]
    for group in dict.fromkeys(one.group for one, _ in every):
        own = [pair for pair in every if pair[0].group == group and pair[1].entities and _width(pair[0]) <= WIDTH]
        chosen += own[:SHOWN_PER_GROUP]
    return chosen


def _width(sentence: Sentence) -> int:
    return sum(max(len(word), 5) + 1 for word in sentence.words)


def draw_strip(axes: Axes, pairs: Sequence[tuple[Sentence, SentencePrediction]], method: str) -> None:
    """Sentences as rows of words; above each word its entropy as a bar, aleatoric and epistemic part stacked."""
    highest = max((float(found.entropy.max()) for _, found in pairs), default=1.0) or 1.0
    for row, (sentence, found) in enumerate(pairs):
        _draw_sentence(axes, sentence, found, 2.2 * (len(pairs) - row), highest)
    axes.set(xlim=(-12, WIDTH), ylim=(1.3, 2.2 * len(pairs) + 1.4))
    axes.axis("off")
    axes.set_title(
        f"What is each word, and how sure is the model ({method})?\n", fontsize=12, fontweight="bold", loc="left"
    )
    axes.text(
        0, 1.01,
        "Bars: entropy of the word's label, its aleatoric part orange, its epistemic part blue.  "
        f"Tallest: {highest:.2f} nats.  Below: the predicted label and its probability; red: wrong.",
        transform=axes.transAxes, fontsize=9.5, color=GREY,
    )  # fmt: skip


def _draw_sentence(axes: Axes, sentence: Sentence, found: SentencePrediction, height: float, highest: float) -> None:
    axes.text(-12, height, sentence.group, fontsize=9, color=GREY, va="baseline")
    left, entropy = 0.0, found.entropy
    for place, (word, gold) in enumerate(zip(sentence.words, sentence.labels, strict=True)):
        wide = max(len(word), 5) + 1.0
        epistemic = float(found.epistemic[place]) / highest
        aleatoric = max(float(entropy[place]) / highest - epistemic, 0.0)
        centre = left + wide / 2
        axes.bar(centre, aleatoric, width=wide - 1, bottom=height + 0.42, color=METHOD_COLOURS[1])
        axes.bar(centre, epistemic, width=wide - 1, bottom=height + 0.42 + aleatoric, color=METHOD_COLOURS[0])
        axes.text(centre, height, word, fontsize=10, ha="center", va="baseline")
        label = found.labels[place]
        if split_label(label)[1] or label != gold:
            colour = "black" if label == gold else WRONG
            text = f"{label} {float(found.probs[place].max()):.2f}"
            axes.text(centre, height - 0.4, text, fontsize=7, ha="center", va="baseline", color=colour)
        if label != gold:
            axes.text(centre, height - 0.72, f"is {gold}", fontsize=7, ha="center", va="baseline", color=WRONG)
        left += wide
