"""Answers of several methods to the same questions, side by side: how good, how sure, and what doubts can tell."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..metrics import UndefinedMetricError, aurc, bootstrap_ci, ood_auroc, paired_bootstrap
from ..tasks.answers import Answers
from ..tasks.squad import UNANSWERABLE, Question
from .comparison import Comparison, ReportedSet
from .plots import ALEATORIC, EPISTEMIC, group_histograms, page, risk_coverage
from .report import format_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUREST_FIRST = "% of test questions answered, surest first"


class AnswerComparison(Comparison):
    """Methods are added by their `Answers`; the last one is compared with the others and shown group by group."""

    def __init__(self, questions: Mapping[str, Sequence[Question]]) -> None:
        """Say what results are about: questions by set, of which the first is the test set."""
        self.questions = dict(questions)
        super().__init__(
            {name: _reported(rows) for name, rows in questions.items()},
            report=lambda answers, _: answers.report(),
            columns=lambda answers, *_: answers.columns(),
            whole="all questions",
            noun="questions",
        )

    def report_of(self, predictions: Mapping[str, Any]) -> dict[str, Any]:
        """Return ``groups``, and ``detection``: AUROCs with 95 % bootstrap intervals, by "what, by which score"."""
        test, told = predictions[self.test], {}
        for what, scores, truth in self._told(test, [predictions[name] for name in list(self.sets)[1:]]):
            for name, score in scores.items():
                if ends := _interval("auroc", bootstrap_ci, ood_auroc, score, truth):
                    told[f"{what}, by {name}"] = ends
        return {**super().report_of(predictions), "detection": told}

    def _told(self, test: Answers, others: Sequence[Answers]) -> list[tuple[str, dict[str, Any], Any]]:
        """What doubts are asked to tell: wrong answers, unanswerable questions where these are some, shifted ones."""
        doubts = test.doubts
        told = [("wrong answers", doubts, 1 - test.exact_match)]
        if test.no_answer.any():
            no_answer = {"p(no answer)": test.no_answer, **doubts}
            del no_answer["1 - p(answer)"]
            is_unanswerable = np.array([question.group == UNANSWERABLE for question in self.questions[self.test]])
            told.append(("unanswerable questions", no_answer, is_unanswerable))
        for shifted in others[:1]:
            more = {name: of for name, of in shifted.doubts.items() if name in doubts}
            both = {name: np.concatenate([doubts[name], of]) for name, of in more.items()}
            told.append(("shifted questions", both, np.repeat([0, 1], [len(test), len(shifted)])))
        return told

    def differences(self) -> dict[str, dict[str, dict[str, float]]]:
        """The last method less each of the others on the test questions, with 95 % paired bootstrap intervals."""
        *others, last = self.methods
        test = {name: sets[self.test] for name, sets in self.methods.items()}
        return {f"{last} less {other}": _difference(test[last], test[other]) for other in others}

    def tables(
        self, reports: Mapping[str, Any], *, source: str = "", differences: Mapping[str, Any] | None = None
    ) -> str:
        """Return the tables of `Comparison.tables`, then what doubts can tell, and the methods' differences.

        Args:
            reports: by method, that of `report_of`.
            source: the rows by which the methods' numbers were chosen.
            differences: those of `differences`, which are computed where they are not given.
        """
        parts, methods = [super().tables(reports, source=source)], list(reports)
        told = {
            key: {name: reports[name]["detection"].get(key, {}).get("auroc") for name in methods}
            | {bound: ends[bound] for bound in ("low", "high")}
            for key, ends in reports[methods[-1]]["detection"].items()
        }
        if told:
            parts.append(format_table(told, corner="AUROC of telling (last method's 95 % interval)"))
        for pair, rows in (self.differences() if differences is None else differences).items():
            parts.append(format_table(rows, corner=f"{pair} (95 % interval)"))
        return "\n\n".join(parts)

    def figure(
        self, *, title: str, caption: str = "", aleatoric_reference: tuple[float, str] | None = None, **options: Any
    ) -> Figure:
        """Return two panels of refusing, by exact match and by F1, and two of the last method's uncertainty by group.

        Args:
            title: heading of the page.
            caption: foot of the page.
            aleatoric_reference: a value, in nats, to mark in the aleatoric panel, and its description.
            **options: of `page`, such as ``figsize``.
        """
        figure, panels = page(title, 2, 2, caption=caption, **{"figsize": (12, 10.7), **options})
        left, right, aleatoric, epistemic = panels
        test = {name: sets[self.test] for name, sets in self.methods.items()}
        confidence = {name: answers.confidence for name, answers in test.items()}
        risk_coverage(left, confidence, {name: 1 - answers.exact_match for name, answers in test.items()})
        left.set(xlabel=SUREST_FIRST, ylabel="% of these answers not an exact match")
        risk_coverage(right, confidence, {name: 1 - answers.f1 for name, answers in test.items()})
        right.set(xlabel=SUREST_FIRST, ylabel="100 - F1 of these answers")
        right.set_title("And by F1, which counts shared words?\n", fontsize=12, fontweight="bold", loc="left")
        name, sets = list(self.methods.items())[-1]
        masks = self.masks()
        groups: dict[str, Answers] = {group: sets[masks[group][0]][masks[group][1]] for group in self._disjoint()}
        group_histograms(
            aleatoric, {group: of.aleatoric for group, of in groups.items()}, title=ALEATORIC,
            explanation=f"{name}: mean entropy of the draws over spans and no answer.",
            xlabel="mean span entropy of the draws, in nats", reference=aleatoric_reference,
        )  # fmt: skip
        group_histograms(
            epistemic, {group: of.epistemic for group, of in groups.items()}, title=EPISTEMIC,
            explanation=f"{name}: its draws disagree; more data would help there.",
            xlabel="mutual information of span and weights, in nats",
        )  # fmt: skip
        return figure


def _reported(rows: Sequence[Question]) -> ReportedSet:
    """Questions with the columns that a CSV file has of them."""
    columns = {"id": [row.id for row in rows], "group": [row.group for row in rows]}
    columns["question"] = [row.text for row in rows]
    columns["truths"] = [" | ".join(dict.fromkeys(row.truths)) for row in rows]
    return ReportedSet(len(rows), groups=columns["group"], columns=columns)


def _interval(key: str, bootstrap: Callable[..., Any], *arguments: Any) -> dict[str, float]:
    """An estimate with its 95 % interval; empty where there is nothing to tell apart."""
    try:
        interval = bootstrap(*arguments)
    except UndefinedMetricError:
        return {}
    return {key: interval.estimate, "low": interval.low, "high": interval.high}


def _difference(first: Answers, second: Answers) -> dict[str, dict[str, float]]:
    """``first`` less ``second`` on the same questions; the NLL where both reach the truth."""
    reachable = np.isfinite(first.nll) & np.isfinite(second.nll)
    compared: dict[str, tuple[Callable[..., Any], Callable[[Answers], tuple[Any, ...]]]] = {
        "exact_match": (_mean, lambda answers: (answers.exact_match,)),
        "f1": (_mean, lambda answers: (answers.f1,)),
        "nll": (_mean, lambda answers: (answers.nll[reachable],)),
        "aurc": (aurc, lambda answers: (answers.confidence, 1 - answers.exact_match)),
        "aurc_f1": (aurc, lambda answers: (answers.confidence, 1 - answers.f1)),
        "wrong answers, by span entropy": (ood_auroc, lambda answers: (answers.total, 1 - answers.exact_match)),
    }
    if not reachable.any():
        del compared["nll"]
    found = {
        name: _interval("difference", paired_bootstrap, metric, arrays(first), arrays(second))
        for name, (metric, arrays) in compared.items()
    }
    return {name: ends for name, ends in found.items() if ends}


def _mean(values: Any) -> float:
    return float(np.mean(values))
