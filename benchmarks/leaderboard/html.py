"""The board as one HTML file without a framework or a network: a click on a column's head sorts by it."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from typing import Any

from .page import KIND_TITLES, TITLES
from .scores import HIGHER_IS_BETTER, METRICS
from .tables import Cell

STYLE = """
:root { color-scheme: light dark; --line: #d4d4d8; --head: #f4f4f5; --good: #15803d; --bad: #b91c1c; }
@media (prefers-color-scheme: dark) {
  :root { --line: #3f3f46; --head: #27272a; --good: #4ade80; --bad: #f87171; }
}
body { font: 14px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 100rem; padding: 0 1rem; }
div { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap; width: 100%; }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .6rem; text-align: right; }
th.text, td.text { text-align: left; }
th { background: var(--head); cursor: pointer; position: sticky; top: 0; user-select: none; }
th[aria-sort=ascending]::after { content: " \\2191"; }
th[aria-sort=descending]::after { content: " \\2193"; }
th:focus-visible { outline: 2px solid; }
.better { color: var(--good); font-weight: 600; }
.worse { color: var(--bad); }
small { opacity: .7; }
input { font: inherit; margin: .5rem 0 1rem; padding: .3rem .5rem; width: 20rem; max-width: 100%; }
"""

SCRIPT = """
const body = document.querySelector("tbody"), heads = [...document.querySelectorAll("th")];
const key = (row, index) => row.cells[index].dataset.value;
function sort(head) {
  const index = heads.indexOf(head), text = head.classList.contains("text");
  const up = head.getAttribute("aria-sort") !== "ascending";
  heads.forEach(other => other.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  const order = [...body.rows].sort((a, b) => {
    const x = key(a, index), y = key(b, index);
    if (text) return (up ? 1 : -1) * x.localeCompare(y);
    if (x === "" || y === "") return (x === "") - (y === "");  // what is missing stays below
    return (up ? 1 : -1) * (Number(x) - Number(y));
  });
  body.append(...order);
}
heads.forEach(head => {
  head.addEventListener("click", () => sort(head));
  head.addEventListener("keydown", event => { if (event.key === "Enter") sort(head); });
});
document.querySelector("input").addEventListener("input", event => {
  const words = event.target.value.toLowerCase().split(/\\s+/);
  for (const row of body.rows) row.hidden = !words.every(word => row.textContent.toLowerCase().includes(word));
});
"""

TEXT = ("task", "checkpoint", "method")
COLUMNS = (
    *TEXT, "seeds", *(TITLES[metric] for metric in METRICS), "AURC − MAP, %", "AURC − MC dropout, %",
    "train ÷ MAP", "predict ÷ MAP", "peak MiB",
)  # fmt: skip


def table(cells: Sequence[Cell], title: str = "Leaderboard") -> str:
    """The file's text."""
    heads = "".join(
        f"<th{' class=text' if name in TEXT else ''} tabindex=0 scope=col>{html.escape(name)}</th>" for name in COLUMNS
    )
    rows = "\n".join(_row(cell, method) for cell in cells for method in cell["methods"].values())
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{html.escape(title)}</h1>
<p>Means over seeds. Green: better than the fine-tuned model beyond the paired 95 % interval; red: worse. A click on a
head sorts; words in the box filter.</p>
<input type="search" placeholder="filter, such as: cola laplace" aria-label="filter rows">
<div><table><thead><tr>{heads}</tr></thead><tbody>
{rows}
</tbody></table></div>
<script>{SCRIPT}</script>
</body>
</html>
"""


def _row(cell: Cell, method: dict[str, Any]) -> str:
    kind = KIND_TITLES.get(cell["kind"], cell["kind"]).split(" ")[0]
    found = [_text(cell["task"]), _text(kind), _text(method["title"])]
    found.append(_number(len(method["seeds"]), "{:.0f}"))
    for metric in METRICS:
        difference = method["minus"].get("map", {}).get(metric)
        found.append(_number(method["values"][metric]["value"], "{:.4f}", _verdict(metric, difference)))
    for reference in ("map", "mc_dropout"):
        difference = method["minus"].get(reference, {}).get("aurc")
        percent = None if difference is None else 100 * difference["relative"]
        found.append(_number(percent, "{:+.1f}", _verdict("aurc", difference)))
    costs = method["cost"]
    found += [_number(costs.get("train"), "{:.2f}"), _number(costs.get("predict"), "{:.1f}")]
    found.append(_number(costs.get("peak_mib"), "{:.0f}"))
    return f"<tr>{''.join(found)}</tr>"


def _verdict(metric: str, difference: dict[str, float] | None) -> str:
    if difference is None or difference["low"] <= 0 <= difference["high"]:
        return ""
    return "better" if (difference["value"] > 0) == (metric in HIGHER_IS_BETTER) else "worse"


def _text(value: str) -> str:
    shown = html.escape(value)
    return f'<td class=text data-value="{shown}">{shown}</td>'


def _number(value: float | None, form: str, verdict: str = "") -> str:
    if value is None or value != value:
        return '<td data-value="">–</td>'
    kind = f" class={verdict}" if verdict else ""
    return f"<td{kind} data-value={json.dumps(float(value))}>{form.format(value)}</td>"
