"""The page of `benchmarks.guarantees_sets`, made of its numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.guarantees_sets import METHODS, NAMES, PARTS, SCORES, TINY

Found = Mapping[str, Any]

HEAD = """# Prediction sets on real predictions

Do the [sets](../guides/prediction_sets.md) hold the truth as often as they say? Checkpoints of all-MiniLM-L6-v2 (seed
0), fine-tuned as for the [leaderboard](leaderboard.md), on the reported part of each task, which nothing was fitted to
({parts}). It is split at random into n calibration rows and the rest, {splits:,} times. Of such splits the number of
covered rows has an exact law, the beta-binomial with (N − n, k, n + 1 − k), whatever the model, as long as no scores
are equal. *law*: its mean; in brackets the p-value of the Kolmogorov-Smirnov distance of the {splits:,} coverages from
it, simulated, as coverages are counts.

{summary}

Without chance (u = 1) the least likely class always has the score 1: where a model of two classes is wrong on more than
α of the rows, so is the threshold, and every class is in. These are ties, which only add coverage; take LAC, or chance.

Made by `python -m benchmarks.guarantees_sets` from cached predictions; n is half of the pool unless it is said. RAPS
has λ = 0.1 and k = 1, fixed beforehand. Tasks have the rows whose predictions were at hand. The posteriors change the
sizes of LAC's sets little; they are no reason to prefer one.
"""

BELOW = """*worst class*: the least mean coverage of a class, with a threshold for each class, and with one for all;
*below*: classes whose mean coverage lies more than three standard errors below k/(n_c + 1), n_c their calibration rows
in the split.
"""
LABELS = {"lac": "LAC", "aps": "APS", "aps, u = 1": "APS, u = 1", "raps": "RAPS"}
_SIZES = ("task", "predictions", "LAC", "empty", "APS", "APS, u = 1", "RAPS", "LAC, α = 0.05", "LAC by class")
_TINY = ("task", "n", "law", "LAC", "its deviation (law's)", "APS", "its deviation (law's)")
_CLASSES = ("task", "predictions", "classes", "worst class: by class, for all", "below")


def page(found: Sequence[Found], splits: int) -> str:
    """All tables."""
    pools = {each["setting"]["task"]: each["pool"] for each in found}
    parts = ", ".join(f"{NAMES[task]} {pools[task]:,} rows" for task in PARTS if task in pools)
    return "\n".join([
        HEAD.format(parts=parts, splits=splits, summary=_summary(found)),
        "## Coverage, α = 0.1\n",
        _table(["task", "predictions", *LABELS.values(), "law"], _coverages(found)),
        "## Sizes, α = 0.1\n",
        _table(_SIZES, _sizes(found)),
        "Mean number of classes in a set; *empty*: the share of LAC's sets without any.\n",
        "## Tiny calibration sets, α = 0.1, fine-tuned (MAP)\n",
        _table(_TINY, _tiny(found)),
        "## Class by class, LAC, α = 0.1\n",
        _table(_CLASSES, _by_class(found)),
        BELOW,
    ])


def _pick(found: Iterable[Found], **wanted: Any) -> Found | None:
    for each in found:
        if all(each["setting"][name] == value for name, value in wanted.items()):
            return each
    return None


def _halves(found: Sequence[Found]) -> list[tuple[str, str, int]]:
    """Task, method and half of the pool, of those that were measured."""
    own = {
        (e["setting"]["task"], e["setting"]["method"]): e["pool"] // 2 for e in found if not e["setting"]["by_class"]
    }
    return [(task, method, own[task, method]) for task in PARTS for method in METHODS if (task, method) in own]


def _coverages(found: Sequence[Found]) -> list[list[str]]:
    rows = []
    for task, method, half in _halves(found):
        own = [
            _pick(found, task=task, method=method, num_rows=half, score=score, alpha=0.1, by_class=False)
            for score in SCORES
        ]
        cells = ["" if each is None else f"{each['coverage']:.4f} ({each['ks_p']:.2f})" for each in own]
        law = next((f"{each['expected']:.4f}" for each in own if each), "")
        rows.append([NAMES[task], METHODS[method], *cells, law])
    return rows


def _sizes(found: Sequence[Found]) -> list[list[str]]:
    rows = []
    for task, method, half in _halves(found):
        base = {"task": task, "method": method, "num_rows": half}
        own = {s: _pick(found, **base, score=s, alpha=0.1, by_class=False) for s in SCORES}
        wide = _pick(found, **base, score="lac", alpha=0.05, by_class=False)
        each_class = _pick(found, **base, score="lac", alpha=0.1, by_class=True)
        sizes = {name: "" if one is None else f"{one['size']:.2f}" for name, one in own.items()}
        lac = own["lac"]
        rows.append([
            NAMES[task],
            METHODS[method],
            sizes["lac"],
            "" if lac is None else f"{lac['empty']:.1%}",
            sizes["aps"],
            sizes["aps, u = 1"],
            sizes["raps"],
            "" if wide is None else f"{wide['size']:.2f}",
            "" if each_class is None else f"{each_class['size']:.2f}",
        ])
    return rows


def _tiny(found: Sequence[Found]) -> list[list[str]]:
    rows = []
    for task in PARTS:
        for n in TINY:
            own = [
                _pick(found, task=task, method="map", num_rows=n, score=score, alpha=0.1, by_class=False)
                for score in ("lac", "aps")
            ]
            if None in own:
                continue
            cells = []
            for each in own:
                assert each is not None
                cells += [
                    f"{each['coverage']:.4f} ({each['ks_p']:.2f})",
                    f"{each['deviation']:.4f} ({each['expected_deviation']:.4f})",
                ]
            assert own[0] is not None
            rows.append([NAMES[task], str(n), f"{own[0]['expected']:.4f}", *cells])
    return rows


def _by_class(found: Sequence[Found]) -> list[list[str]]:
    rows = []
    for task, method, half in _halves(found):
        each = _pick(found, task=task, method=method, num_rows=half, score="lac", alpha=0.1, by_class=True)
        if each is not None:
            rows.append([
                NAMES[task],
                METHODS[method],
                str(each.get("num_classes", "")),
                f"{each['worst_class']:.3f}, {each['worst_class_marginal']:.3f}",
                str(each["classes_below"]),
            ])
    return rows


def _summary(found: Sequence[Found]) -> str:
    """In words; scores without chance, of which many are equal, are left to the table."""
    own = [each for each in found if not each["setting"]["by_class"] and each["setting"]["score"] != "aps, u = 1"]
    low = sum(each["ks_p"] < 0.05 for each in own)
    furthest = max(abs(each["coverage"] - each["expected"]) for each in own)
    classes = [each for each in found if each["setting"]["by_class"]]
    below, all_classes = sum(each["classes_below"] for each in classes), sum(each["num_classes"] for each in classes)
    return (
        f"**Of {len(own)} settings {low} have p < 0.05 ({0.05 * len(own):.1f} would by chance), and the mean\n"
        f"coverage is never further than {furthest:.4f} from the law's mean. With thresholds by class, {below} of\n"
        f"{all_classes} classes (all tasks and predictions) lie below their law by three standard errors.**"
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines) + "\n"
