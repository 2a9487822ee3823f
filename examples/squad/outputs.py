"""What a run leaves behind: tables on the screen, results.json, predictions.csv and one figure."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bayeformers.reports import GREY, format_table, group_histograms, risk_coverage, save_figure
from examples.squad.articles import GROUPS, SHIFTED
from examples.squad.data import SquadData
from examples.squad.reports import ALL, BySet

FIGURE = "answers.png"
SCORES = ("questions", "exact_match", "f1", "confidence", "nll", "in_reach", "aurc", "aurc_f1")
ENTROPIES = ("entropy", "aleatoric", "epistemic")


def format_results(results: Mapping[str, Any]) -> str:
    """The tables: scores by group, what the uncertainty is made of, what it can tell, and what is better."""
    methods = results["methods"]
    groups = list(next(iter(methods.values()))["groups"])
    parts = [format_table(_rows(methods, group, SCORES), corner=group) for group in groups]
    shown = groups[1:] or groups
    entropies = {
        f"{method}: {group}": row for method in methods for group, row in _by_group(methods[method], shown).items()
    }
    parts.append(format_table(entropies, corner="uncertainty (means per group, in nats)"))
    if detection := _detection(methods):
        parts.append(format_table(detection, corner="AUROC of telling (last method's 95 % interval)"))
    for pair, differences in results["differences"].items():
        parts.append(format_table(differences, corner=f"{pair} (95 % interval)"))
    return "\n\n".join(parts)


def _rows(methods: Mapping[str, Any], group: str, names: tuple[str, ...]) -> dict[str, dict[str, float]]:
    return {method: {name: report["groups"][group][name] for name in names} for method, report in methods.items()}


def _detection(methods: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Score by score, a column per method; the other methods' intervals stand in results.json."""
    last = next(reversed(methods.values()))["detection"]
    return {
        name: {
            **{
                method: report["detection"][name]["auroc"]
                for method, report in methods.items()
                if name in report["detection"]
            },
            **{bound: interval[bound] for bound in ("low", "high")},
        }
        for name, interval in last.items()
    }


def _by_group(report: Mapping[str, Any], groups: list[str]) -> dict[str, dict[str, float]]:
    return {group: {name: report["groups"][group][name] for name in ENTROPIES} for group in groups}


def write_predictions(path: Path, data: SquadData, methods: Mapping[str, BySet]) -> None:
    """One row per reported question: its set, group, text and truths, then each method's answer and uncertainties."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer: csv.DictWriter[str] | None = None
        for name, questions in data.reported.items():
            for index, question in enumerate(questions):
                row: dict[str, Any] = {"set": name, "id": question.id, "group": question.group}
                row |= {"question": question.text, "truths": " | ".join(dict.fromkeys(question.truths))}
                for method, answers in methods.items():
                    row |= _columns(method, answers[name], index)
                if writer is None:
                    writer = csv.DictWriter(file, fieldnames=list(row))
                    writer.writeheader()
                writer.writerow(row)


def _columns(method: str, answers: Any, index: int) -> dict[str, Any]:
    prefix = method.replace(" + ", "+").replace(" ", "_")
    numbers = {name: values[index] for name, values in vars(answers).items() if name != "texts"}
    values = {"answer": answers.texts[index], **{name: f"{value:.6g}" for name, value in numbers.items()}}
    return {f"{prefix}:{name}": value for name, value in values.items()}


def write_figure(
    path: Path, data: SquadData, methods: Mapping[str, BySet], groups: Mapping[str, NDArray[np.str_]]
) -> None:
    """Two panels of refusing, by exact match and by F1; two of the last method's uncertainty by group."""
    from matplotlib.figure import Figure  # not pyplot: no global state, no display needed

    test = {name: answers["test"] for name, answers in methods.items()}
    figure = Figure(figsize=(12, 10.7), layout="constrained")
    (left, right), (aleatoric, epistemic) = figure.subplots(2, 2)
    confidence = {name: answers.confidence for name, answers in test.items()}
    risk_coverage(left, confidence, {name: 1 - answers.exact_match for name, answers in test.items()})
    left.set(xlabel="% of test questions answered, surest first", ylabel="% of these answers not an exact match")
    risk_coverage(right, confidence, {name: 1 - answers.f1 for name, answers in test.items()})
    right.set(xlabel="% of test questions answered, surest first", ylabel="100 - F1 of these answers")
    right.set_title("And by F1, which counts shared words?\n", fontsize=12, fontweight="bold", loc="left")
    name, parts = next(reversed(methods)), _groups(next(reversed(methods.values())), groups)
    group_histograms(
        aleatoric,
        {group: answers.aleatoric for group, answers in parts.items()},
        title="What cannot be known: aleatoric uncertainty",
        explanation=f"{name}: mean entropy of the draws over spans and no answer.",
        xlabel="mean span entropy of the draws, in nats",
        reference=_reference(data),
    )
    group_histograms(
        epistemic,
        {group: answers.epistemic for group, answers in parts.items()},
        title="What it has not learned: epistemic uncertainty",
        explanation=f"{name}: its draws disagree; should be large on unfamiliar questions.",
        xlabel="mutual information of span and weights, in nats",
    )
    figure.suptitle(f"When is an answer worth giving? {_describe(data)}", fontsize=14)
    figure.supxlabel(_caption(data), fontsize=9.5, color=GREY)
    save_figure(figure, path)


def _groups(answers: BySet, groups: Mapping[str, NDArray[np.str_]]) -> BySet:
    names = groups["test"]
    parts = {group: answers["test"][names == group] for group in GROUPS if group in names}
    if len(parts) == 1:
        parts = {ALL: answers["test"]}
    return {**parts, **{name: answers[name] for name in answers if name == SHIFTED}}


def _reference(data: SquadData) -> tuple[float, str] | None:
    if data.ambiguity is None:
        return None
    entropy = float(np.log(data.ambiguity))
    return entropy, f"truth for ambiguous questions (ln {data.ambiguity:g} = {entropy:.3f})"


def _describe(data: SquadData) -> str:
    shifted = f", {len(data.shifted)} shifted ones" if data.shifted else ""
    return f"{data.name}: {len(data.test)} test questions{shifted}"


def _caption(data: SquadData) -> str:
    if data.ambiguity is None:
        return "Surest first: by the probability of the answer given, which may be that there is none."
    return (
        "Surest first: by the probability of the answer given, which may be that there is none.\n"
        "answerable: one span is right.  ambiguous: two are.  unanswerable: stated of somebody else only.  "
        "shifted: other words, people and towns than in training."
    )
