"""Predictions of several methods on the same sentences, side by side: of their words, and of the entities in them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .. import metrics
from ..tasks.conll import Sentence
from ..tasks.entities import TaggedSentence, entity_report, tag_sentence
from .comparison import Comparison, ReportedSet, csv_prefix
from .html.results import HtmlResults
from .plots import page, risk_coverage
from .report import ClassPredictions, classification_report, format_table
from .words import LINE, event_reliability, line_width, word_strip

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN_PER_GROUP = 2
"""Sentences of the figure."""


class TaggingComparison(Comparison):
    """Methods are added one by one; reports, tables and files then hold all of them.

    >>> sentence = Sentence(("Ada", "left"), ("B-PER", "O"))
    >>> comparison = TaggingComparison({"test": [sentence]}, ["O", "B-PER", "I-PER"])
    >>> draws = np.log([[[0.1, 0.8, 0.1], [0.9, 0.05, 0.05]]])
    >>> comparison.add_draws("point", {"test": [draws]})
    >>> comparison.reports()["point"]["groups"]["in-domain"]["entities"]["probability"]
    0.76
    """

    def __init__(
        self,
        sentences: Mapping[str, Sequence[Sentence]],
        names: Sequence[str],
        *,
        ambiguous_share: float | None = None,
    ) -> None:
        """Say what results are about.

        Args:
            sentences: by set; the first is the test set, which is also reported group by group.
            names: of the labels.
            ambiguous_share: the true probability of the more frequent of the two types that the words in
                `Sentence.ambiguous` have at random; None where it is not known.
        """
        self.sentences, self.names, self.ambiguous_share = dict(sentences), list(names), ambiguous_share
        sets = {
            name: ReportedSet(len(rows), _objects(row.labels for row in rows), [row.group for row in rows])
            for name, rows in sentences.items()
        }
        super().__init__(sets, report=self._numbers, noun="sentences")

    def add_draws(self, method: str, draws: Mapping[str, Sequence[NDArray[Any]]], **options: Any) -> None:
        """Add a method by log-probabilities (S draws, n words, C labels) of each sentence of each set.

        Args:
            method: its name.
            draws: by set, of each sentence.
            options: of `Comparison.add`.
        """
        tagged = {
            name: _objects(
                tag_sentence(log_probs, row.labels, self.names)
                for log_probs, row in zip(draws[name], rows, strict=True)
            )
            for name, rows in self.sentences.items()
        }
        self.add(method, tagged, **options)

    # -- numbers ------------------------------------------------------------------------------------------------------

    def _numbers(self, tagged: Sequence[TaggedSentence], gold: Any) -> dict[str, Any]:
        probs, epistemic = (np.concatenate([getattr(one, key) for one in tagged]) for key in ("probs", "epistemic"))
        labels = np.array([self.names.index(label) for labels in gold for label in labels])
        words = classification_report(ClassPredictions(probs, epistemic), labels)
        del words["matthews"]
        return {"words": words, "entities": entity_report(tagged, gold)}

    def report_of(self, predictions: Mapping[str, Any]) -> dict[str, Any]:
        """Return numbers of words and entities by group, and of what is known of them.

        ``ambiguous`` are those of the words whose label is drawn at random, next to the truth. ``shift_auroc`` is of
        telling the second set's sentences by their most uncertain word.
        """
        report: dict[str, Any] = {"groups": super().report_of(predictions)["groups"]}
        pairs = list(zip(predictions[self.test], self.sentences[self.test], strict=True))
        if self.ambiguous_share is not None and any(sentence.ambiguous for _, sentence in pairs):
            report["ambiguous"] = self._ambiguous([(one, list(row.ambiguous)) for one, row in pairs if row.ambiguous])
        if len(self.sets) > 1:
            both = [predictions[name] for name in list(self.sets)[:2]]
            is_shifted = np.repeat([0, 1], [len(tagged) for tagged in both])
            report["shift_auroc"] = {
                key: metrics.ood_auroc(np.array(most), is_shifted)
                for key in ("epistemic", "entropy")
                if any(most := [float(getattr(one, key).max()) for tagged in both for one in tagged])
            }
        return report

    def _ambiguous(self, picked: Sequence[tuple[TaggedSentence, list[int]]]) -> dict[str, float]:
        parts = [np.stack([one.entropy, one.epistemic, one.probs.max(-1)])[:, words] for one, words in picked]
        entropy, epistemic, largest = np.concatenate(parts, axis=1).mean(1)
        share = self.ambiguous_share or 0.0
        parts_of_it = {"entropy": entropy, "aleatoric": entropy - epistemic, "epistemic": epistemic}
        return {
            **{"probability": float(largest), "true_probability": share},
            **{name: float(value) for name, value in parts_of_it.items()},
            "true_aleatoric": -sum(p * float(np.log(p)) for p in (share, 1 - share)),
        }

    def tables(self, reports: Mapping[str, Any], *, source: str = "") -> str:
        """Words and entities by group, the ambiguous words next to the truth, and telling shifted sentences."""
        parts = [self._chosen_table(source)] if source and self.chosen else self.warnings()
        for kind in ("words", "entities"):
            for group, (name, _) in self.masks().items():
                if kind == "entities" or group in (self.whole, name):  # words of whole sets alone
                    rows = {method: report["groups"][group][kind] for method, report in reports.items()}
                    heading = "test set" if group == self.whole else f"{group} {self.noun}"
                    parts.append(format_table(rows, corner=f"{kind}, {heading}"))
        for key, corner in (("ambiguous", "words of random type"), ("shift_auroc", "AUROC of telling shifted, by")):
            if all(key in report for report in reports.values()):
                parts.append(format_table({method: report[key] for method, report in reports.items()}, corner=corner))
        return "\n\n".join(parts)

    def page(self, *, title: str, about: str = "", texts: Sequence[str] = ()) -> HtmlResults:
        """Return what `html` makes a page of: every word of every set, with its sentence around it.

        Args:
            title: of the page.
            about: a sentence on the inputs.
            texts: none: the words are known.

        Raises:
            ValueError: columns of texts are named.
        """
        if texts:
            raise ValueError(f"`texts` must be empty, got {list(texts)}: an input is a word in its sentence.")
        found = {
            method: ClassPredictions(*_of_words([one for name in self.sets for one in sets[name]]))
            for method, sets in self.methods.items()
        }
        rows = [(name, sentence) for name, sentences in self.sentences.items() for sentence in sentences]
        groups = [(row.group if name == self.test else name, row) for name, row in rows]
        return HtmlResults(
            found,
            labels=[self.names.index(label) for _, row in rows for label in row.labels],
            texts=[_in_sentence(row.words, place) for _, row in rows for place in range(len(row.words))],
            class_names=self.names,
            groups=[group for group, row in groups for _ in row.words],
            apart=[name for name in self.sets if name != self.test],
            caveats={name: "; ".join(reasons) for name, reasons in self.caveats.items()},
            title=title,
            about=about,
        )

    # -- files --------------------------------------------------------------------------------------------------------

    def rows(self) -> Iterable[dict[str, Any]]:
        """A row for each word: set, sentence, word, label, then each method's label, probability and uncertainties."""
        for name, sentences in self.sentences.items():
            for number, sentence in enumerate(sentences):
                for place, (word, label) in enumerate(zip(sentence.words, sentence.labels, strict=True)):
                    row = {"set": name, "group": sentence.group, "sentence": number, "word": word, "label": label}
                    for method, sets in self.methods.items():
                        tagged, prefix = sets[name][number], csv_prefix(method)
                        numbers = {"p": tagged.probs[place].max(), "entropy": tagged.entropy[place]}
                        numbers["epistemic"] = tagged.epistemic[place]
                        row[f"{prefix}:label"] = tagged.labels[place]
                        row |= {f"{prefix}:{key}": f"{value:.6g}" for key, value in numbers.items()}
                    yield row

    def entity_rows(self) -> Iterable[dict[str, Any]]:
        """A row for each predicted entity and method: where, what, how probable, and whether it is right."""
        for method, sets in self.methods.items():
            for name, sentences in self.sentences.items():
                for number, (sentence, tagged) in enumerate(zip(sentences, sets[name], strict=True)):
                    for one in tagged.entities:
                        start, end, kind = one.entity
                        row = {"method": method, "set": name, "sentence": number, "start": start, "end": end}
                        row |= {"type": kind, "text": " ".join(sentence.words[start:end]), "right": int(one.is_right)}
                        keys = ("probability", "weakest", "epistemic", "entropy")
                        yield row | {key: f"{getattr(one, key):.6g}" for key in keys}

    def figure(self, *, title: str, shown: str | None = None, **options: Any) -> Figure:
        """Sentences as the method ``shown`` tells them, by default the first posterior; calibration of entities."""
        methods = self.methods
        posteriors = [name for name, sets in methods.items() if any(one.epistemic.any() for one in sets[self.test])]
        shown = shown or (posteriors or list(methods))[0]
        figure, _ = page(title, **{"figsize": (13, 11.5), **options})
        strip, panels = np.asarray(figure.subfigures(2, 1, height_ratios=(1.15, 1)))
        word_strip(strip.subplots(), self._shown(methods[shown]), shown)
        reliability, risk = panels.subplots(1, 2)
        test = {name: [item for one in sets[self.test] for item in one.entities] for name, sets in methods.items()}
        right = {
            name: np.array([item.is_right for item in items], dtype=float) for name, items in test.items() if items
        }
        if right:
            probability = {name: np.array([item.probability for item in test[name]]) for name in right}
            event_reliability(reliability, probability, right, question="Is an entity right as often as it says?")
            reliability.set(xlabel="probability of span and type", ylabel="share of entities right")
            risk_coverage(risk, probability, {name: 1 - value for name, value in right.items()})
            risk.set(xlabel="% of predicted entities kept, most probable first", ylabel="% of these wrong")
        return figure

    def _shown(self, sets: Mapping[str, Any]) -> list[tuple[Sentence, TaggedSentence]]:
        """The first sentences with an entity of every group."""
        pairs = [pair for name, rows in self.sentences.items() for pair in zip(rows, sets[name], strict=True)]
        pairs = [(row, one) for row, one in pairs if one.entities and line_width(row) <= LINE]
        groups = dict.fromkeys(row.group for rows in self.sentences.values() for row in rows)
        return [pair for group in groups for pair in [p for p in pairs if p[0].group == group][:SHOWN_PER_GROUP]]

    def csv_tables(self) -> dict[str, Iterable[Mapping[str, Any]]]:
        """A row for each word, and for each entity."""
        return {**super().csv_tables(), "entities.csv": self.entity_rows()}


def _objects(values: Iterable[Any]) -> NDArray[Any]:
    """An array of things, which a mask takes apart."""
    return np.fromiter(values, dtype=object)


def _of_words(tagged: Sequence[TaggedSentence]) -> tuple[NDArray[Any], NDArray[Any] | None]:
    """Probabilities (n words, C) of all sentences, and the epistemic part (n words,), None of a point estimate."""
    epistemic = np.concatenate([one.epistemic for one in tagged])
    return np.concatenate([one.probs for one in tagged]), epistemic if epistemic.any() else None


def _in_sentence(words: Sequence[str], place: int) -> str:
    """A word in guillemets, and its sentence around it."""
    return " ".join([*words[:place], f"«{words[place]}»", *words[place + 1 :]])
