"""Is the promise of `fit_abstention` kept, and what does it answer? Cached predictions, split again 1,000 times.

    python -m benchmarks.leaderboard ... --output_dir BOARD                                    # makes the predictions
    python -m benchmarks.guarantees --board BOARD --model DIR --data_dir DATA --output_dir OUT --page PAGE.md

Scores are read once and kept in OUT: of the reported rows of CoLA, MRPC, SST-2 and TREC from BOARD's predictions (seed
0), of CLINC150 from a logistic regression on the features of the encoder DIR, which is not fine-tuned. A split draws n
calibration rows. *Promise*: they are drawn with replacement, and the risk of the policy is that on all rows, so that
the rows are the population and nothing else is random. *Rest*: they are drawn without, and the risk is that of the
other rows, whose own chance adds to it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import beta, binom

from bayeformers.guarantees import certified_threshold, least_examples, smallest_refusal

Array = NDArray[Any]
Rule = Callable[[Array, Array, float, float], float]

TARGETS = {"cola": 0.15, "mrpc": 0.1, "sst2": 0.05, "trec": 0.02, "clinc": 0.03}
"""About half of the model's risk."""
METHODS = {
    "map": "point estimate", "unit_dropout_temperature": "MC dropout of units, temperature",
    "evidence": "Laplace, linearised",
}  # fmt: skip
NUMBERS = (10, 19, 20, 50)
CONFIDENCE = 0.9
TRAINED_ROWS = 7500


HEAD = """# Refusing with a guarantee

Is the promise of [`fit_abstention`](../guides/refuse.md) kept, and what does it answer? all-MiniLM-L6-v2 fine-tuned on
four tasks (seed 0), and a logistic regression on its frozen features for the 150 intents of CLINC150. Calibration rows
are drawn from the reported rows {resplits:,} times, at confidence {confidence:.0%}: with replacement, where the risk is
that on all rows (*above*: exactly the promise), and without, where it is that of the other rows (*rest*: their own
chance comes on top, and no promise is made of it). Shares are per cent of the splits, with exact 95 % intervals. Made
by `python -m benchmarks.guarantees`.
"""
KEPT = """## Is it kept?

By the largest probability of the point estimate; *ties*: rounded to one decimal place. At most 10 % may be above the
target. A set that is too small for any bound (15 % needs 15 rows, 10 % 22, 5 % 45, 3 % 76, 2 % 114) refuses everything,
and a warning says so.
"""
SMALLEST = """The smallest sets at targets that they can certify (confidence 80 %, so that 20 % may be above the target;
TREC and CLINC150 at 15 %, the others at 40 %):
"""
RULE = """## Which rule answers most?

Mean coverage with half of the rows to calibrate on, and in round brackets with 100, by the largest probability of the
point estimate; in square brackets the per cent of splits above the target, of which 10 are allowed.
"""
SCORE = """
## Which score answers most?

Mean coverage at the same promise, half of the rows to calibrate on; in square brackets the per cent of splits that
answer anything.
"""


# -- scores -----------------------------------------------------------------------------------------------------------


def scores_of(probs: Array, labels: Array) -> dict[str, Array]:
    """Scores, higher for the surer, and errors, (N,) each."""
    logs = np.log(probs.clip(np.finfo(float).tiny))
    return {
        "confidence": probs.max(1),
        "entropy": (probs * logs).sum(1),
        "error": (probs.argmax(1) != labels).astype(float),
    }


def of_board(board: Path, task: str, method: str) -> dict[str, Array] | None:
    """Of the rows that the board reports; None where it has none of the method."""
    path = board / f"{task}-0/predictions/{method}.npz"
    if not path.is_file():
        return None
    with np.load(path) as file:
        parts = sorted({name.partition("/")[0] for name in file.files} - {"held_out"})
        probs = np.concatenate([file[f"{part}/probs"] for part in parts])
        labels = np.concatenate([file[f"{part}/labels"] for part in parts])
        draws = [file[name] for name in (f"{part}/draws" for part in parts) if name in file.files]
    found = scores_of(probs, labels)
    if draws:
        values = np.concatenate(draws).clip(np.finfo(float).tiny)
        found["mutual_information"] = -(-found["entropy"] + (values * np.log(values)).sum(-1).mean(1))
    return found


def of_clinc(model: str, data_dir: Path) -> dict[str, Array]:
    """Validation and test rows of CLINC150 under a logistic regression on a frozen encoder's mean features."""
    import torch
    from sklearn.linear_model import LogisticRegression
    from transformers import AutoModel, AutoTokenizer

    data = json.loads((data_dir / "clinc/data_full.json").read_text(encoding="utf-8"))
    names = sorted({intent for _, intent in data["train"]})
    tokenizer, encoder = AutoTokenizer.from_pretrained(model), AutoModel.from_pretrained(model).eval()
    order = np.random.default_rng(0).permutation(len(data["train"]))[:TRAINED_ROWS]
    splits = {"train": [data["train"][i] for i in order], "reported": [*data["val"], *data["test"]]}
    features, labels = {}, {}
    for split, rows in splits.items():
        by_length = np.argsort([len(text) for text, _ in rows], kind="stable")
        parts = []
        for start in range(0, len(rows), 64):
            texts = [rows[i][0] for i in by_length[start : start + 64]]
            batch = tokenizer(texts, padding=True, return_tensors="pt")
            with torch.no_grad():
                states = encoder(**batch).last_hidden_state
            mask = batch["attention_mask"][..., None]
            parts.append(torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1)).numpy())
        features[split] = np.concatenate(parts)
        labels[split] = np.array([names.index(rows[i][1]) for i in by_length])
    head = LogisticRegression(C=30, max_iter=300).fit(features["train"], labels["train"])
    return scores_of(head.predict_proba(features["reported"]), labels["reported"])


def cached(path: Path, make: Callable[[], dict[str, Array] | None]) -> dict[str, Array] | None:
    if not path.is_file():
        found = make()
        if found is None:
            return None
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, **found)
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


# -- rules to compare with --------------------------------------------------------------------------------------------


def ranked(scores: Array, errors: Array) -> tuple[Array, Array, Array]:
    """Distinct thresholds from the surest on, with the rows and the errors that each answers."""
    order = np.argsort(-scores, kind="stable")
    values, counts = scores[order], np.cumsum(errors[order])
    is_last = np.append(values[:-1] > values[1:], True)
    return values[is_last], (np.flatnonzero(is_last) + 1), counts[is_last]


def strictest_first(scores: Array, errors: Array, risk: float, confidence: float) -> float:
    """Fixed-sequence testing from the fewest rows that can be certified; it stops at the first failure."""
    values, rows, wrong = ranked(scores, errors)
    passes = binom.cdf(wrong, rows, risk) <= 1 - confidence
    tested = rows >= least_examples(risk, confidence)
    failed = np.flatnonzero(tested & ~passes)
    last = failed[0] if len(failed) else len(rows)
    return float(values[last - 1]) if last and tested[last - 1] else np.inf


def ten_ranks(scores: Array, errors: Array, risk: float, confidence: float) -> float:
    """Ten ranks in geometric steps, each at a tenth of the level (Bonferroni)."""
    values, rows, wrong = ranked(scores, errors)
    level = (1 - confidence) / 10
    first = min(least_examples(risk, 1 - level), len(scores))
    chosen = np.searchsorted(rows, np.geomspace(first, len(scores), 10).round(), side="right") - 1
    chosen = chosen[chosen >= 0]
    good = chosen[binom.cdf(wrong[chosen], rows[chosen], risk) <= level]
    return float(values[good.max()]) if len(good) else np.inf


def binary_search(scores: Array, errors: Array, risk: float, confidence: float) -> float:
    """SGR of Geifman & El-Yaniv 2017: ceil(log2 n) steps of a binary search, each at its share of the level."""
    values, rows, wrong = ranked(scores, errors)
    steps = max(int(np.ceil(np.log2(len(scores)))), 1)
    low, high, best = 0, len(rows) - 1, np.inf
    for _ in range(steps):
        middle = (low + high + 1) // 2
        if binom.cdf(wrong[middle], rows[middle], risk) <= (1 - confidence) / steps:
            low, best = middle, float(values[middle])
        else:
            high = middle
    return best


def fixed_grid(scores: Array, errors: Array, risk: float, confidence: float) -> float:
    """Learn then Test with the thresholds 0, 0.01 .. 0.99 and Holm's correction, MAPIE's default, by exact p-values."""
    grid = np.linspace(0, 0.99, 100)
    answered = scores >= grid[:, None]
    p = binom.cdf((answered * errors).sum(1), answered.sum(1), risk)
    order = np.argsort(p, kind="stable")
    good = order[np.cumprod(p[order] <= (1 - confidence) / (100 - np.arange(100))).astype(bool)]
    return float(grid[good].min()) if len(good) else np.inf


def in_expectation(scores: Array, errors: Array, risk: float, confidence: float) -> float:
    """The largest rank whose risk, with one error more, is at most the target: no promise of any calibration set."""
    values, rows, wrong = ranked(scores, errors)
    good = np.flatnonzero((wrong + 1) / (rows + 1) <= risk)
    return float(values[good[-1]]) if len(good) else np.inf


RULES: dict[str, Rule] = {
    "**`fit_abstention`**: all thresholds at once": certified_threshold,
    "fixed sequence from the strictest": strictest_first,
    "ten ranks, Bonferroni": ten_ranks,
    "SGR's binary search": binary_search,
    "grid of 100 thresholds, Holm": fixed_grid,
    "(empirical risk, no promise)": in_expectation,
}


# -- splits -----------------------------------------------------------------------------------------------------------


def measured(
    scores: Array, errors: Array, number: int, risk: float, resplits: int, *, rule: Rule = certified_threshold
) -> dict[str, float]:
    """Shares of the splits in which the risk is above the target, and the mean coverage of all rows."""
    generator = np.random.default_rng(number)
    above, rest, coverage, answers = 0, 0, 0.0, 0
    for _ in range(resplits):
        drawn = generator.integers(len(scores), size=number)
        threshold = rule(scores[drawn], errors[drawn], risk, CONFIDENCE)
        answered = scores >= threshold
        above += bool(answered.any()) and errors[answered].mean() > risk
        coverage += answered.mean() / resplits
        answers += np.isfinite(threshold) or threshold < 0
        order = generator.permutation(len(scores))
        drawn, others = order[:number], order[number:]
        answered = scores[others] >= rule(scores[drawn], errors[drawn], risk, CONFIDENCE)
        rest += bool(answered.any()) and errors[others][answered].mean() > risk
    return {"above": above, "rest": rest, "coverage": coverage, "answers": answers / resplits}


def interval(count: float, total: int) -> str:
    """A share with its exact 95 % interval, in per cent."""
    low = beta.ppf(0.025, count, total - count + 1) if count else 0.0
    high = beta.ppf(0.975, count + 1, total - count) if count < total else 1.0
    return f"{100 * count / total:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


# -- the page ---------------------------------------------------------------------------------------------------------


def head(found: dict[str, dict[str, dict[str, Array]]], resplits: int) -> Iterator[str]:
    """What was done, and the feasibility bound of every task."""
    yield HEAD.format(resplits=resplits, confidence=CONFIDENCE)
    yield "| task | rows | model's risk | target | any rule refuses at least |\n| --- | --- | --- | --- | --- |"
    for task, methods in found.items():
        risk, target = float(methods["map"]["error"].mean()), TARGETS[task]
        yield (
            f"| {task} | {len(methods['map']['error']):,} | {risk:.1%} | {target:.0%} | "
            f"{smallest_refusal(risk, target):.1%} |"
        )
    yield ""


def kept(found: dict[str, dict[str, dict[str, Array]]], resplits: int) -> Iterator[str]:
    """The promise for calibration sets of all sizes, and for scores with ties."""
    yield KEPT
    yield (
        "| task | n | above | rest | coverage | ties: above | rest | coverage |\n"
        "| --- | --- | --- | --- | --- | --- | --- | --- |"
    )
    for task, methods in found.items():
        scores, errors = methods["map"]["confidence"], methods["map"]["error"]
        for number in (*NUMBERS, len(scores) // 2):
            row = [task, str(number)]
            for values in (scores, scores.round(1)):
                one = measured(values, errors, number, TARGETS[task], resplits)
                row += [interval(one["above"], resplits), interval(one["rest"], resplits), f"{one['coverage']:.1%}"]
            yield "| " + " | ".join(row) + " |"
    yield ""
    yield SMALLEST
    yield "| task | n | target | above | coverage |\n| --- | --- | --- | --- | --- |"
    for task, methods in found.items():
        scores, errors = methods["map"]["confidence"], methods["map"]["error"]
        target = 0.15 if task in ("trec", "clinc") else 0.4
        for number in NUMBERS[:3]:
            one = measured(scores, errors, number, target, resplits, rule=at_80)
            yield f"| {task} | {number} | {target:.0%} | {interval(one['above'], resplits)} | {one['coverage']:.1%} |"
    yield ""


def at_80(scores: Array, errors: Array, risk: float, confidence: float) -> float:
    """With confidence 80 %, at which 10 rows certify something."""
    return certified_threshold(scores, errors, risk, 0.8)


def compared(found: dict[str, dict[str, dict[str, Array]]], resplits: int) -> Iterator[str]:
    """Rules by coverage, and scores by coverage."""
    yield RULE
    yield "| rule | " + " | ".join(found) + " |\n| --- |" + " --- |" * len(found)
    for name, rule in RULES.items():
        cells = []
        for task, methods in found.items():
            scores, errors = methods["map"]["confidence"], methods["map"]["error"]
            half, few = (
                measured(scores, errors, n, TARGETS[task], max(resplits // 4, 1), rule=rule)
                for n in (len(scores) // 2, 100)
            )
            share = 100 * half["above"] / max(resplits // 4, 1)
            cells.append(f"{half['coverage']:.1%} [{share:.0f}] ({few['coverage']:.1%})")
        yield f"| {name} | " + " | ".join(cells) + " |"
    yield SCORE
    yield "| prediction | score | " + " | ".join(found) + " |\n| --- | --- |" + " --- |" * len(found)
    rows = [(m, s) for m in METHODS for s in ("confidence", "entropy", "mutual_information")]
    for method, score in rows:
        if not any(score in methods.get(method, {}) for methods in found.values()):
            continue
        cells = []
        for task, methods in found.items():
            if score not in methods.get(method, {}):
                cells.append("")
                continue
            scores, errors = methods[method][score], methods[method]["error"]
            one = measured(scores, errors, len(scores) // 2, TARGETS[task], resplits)
            cells.append(f"{one['coverage']:.1%} [{100 * one['answers']:.0f}]")
        yield f"| {METHODS[method]} | {score.replace('_', ' ')} | " + " | ".join(cells) + " |"
    yield ""


def main() -> None:
    """Read or make the scores, split, write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--board", type=Path, required=True, help="output of benchmarks.leaderboard")
    parser.add_argument("--model", required=True, help="folder of the encoder")
    parser.add_argument("--data_dir", type=Path, required=True, help="holds clinc/data_full.json")
    parser.add_argument("--output_dir", type=Path, required=True, help="where scores are kept")
    parser.add_argument("--page", type=Path, required=True)
    parser.add_argument("--resplits", type=int, default=1000)
    args = parser.parse_args()
    found: dict[str, dict[str, dict[str, Array]]] = {}
    for task in TARGETS:
        for method in METHODS if task != "clinc" else ("map",):

            def make(task: str = task, method: str = method) -> dict[str, Array] | None:
                return of_clinc(args.model, args.data_dir) if task == "clinc" else of_board(args.board, task, method)

            scores = cached(args.output_dir / f"scores-{task}-{method}.npz", make)
            if scores is not None:
                found.setdefault(task, {})[method] = scores
    lines = [line for part in (head, kept, compared) for line in part(found, args.resplits)]
    args.page.write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
