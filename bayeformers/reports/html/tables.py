"""Tables of a page, each with its rows as a CSV file inside the page."""

from __future__ import annotations

import base64
import csv
import io
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from html import escape
from typing import Any

__all__ = ["CSV_BYTES", "Cell", "csv_link", "interval", "number", "percent", "table", "text"]

CSV_BYTES = 3_000_000
"""Bytes of a CSV file in a page; of more rows it holds the first."""
_ARROWS = {
    "higher": ' <abbr title="higher is better">↑</abbr>', "lower": ' <abbr title="lower is better">↓</abbr>', "": "",
}  # fmt: skip
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


@dataclass(frozen=True)
class Cell:
    """What a table shows, as HTML, and the values that the CSV file holds, by the end of their column's name."""

    shown: str
    values: Mapping[str, Any] = field(default_factory=dict)
    is_text: bool = False


def text(value: Any) -> Cell:
    """A cell of plain text, which may break after an underscore."""
    return Cell(escape(str(value)).replace("_", "_<wbr>"), {"": value}, is_text=True)


def number(value: float | None, digits: int = 3) -> Cell:
    """A number, or a dash where there is no value."""
    if value is None or not math.isfinite(value):
        return Cell("–", {"": ""})
    return Cell(_signed(f"{value:,.{digits}f}"), {"": f"{value:.6g}"})


def percent(value: float | None, digits: int = 1) -> Cell:
    """A share in percent; the CSV file holds the share."""
    if value is None or not math.isfinite(value):
        return Cell("–", {"": ""})
    return Cell(_signed(f"{100 * value:.{digits}f}") + "&#8239;%", {"": f"{value:.6g}"})


def interval(
    value: float | None,
    low: float | None,
    high: float | None,
    *,
    digits: int = 3,
    is_share: bool = False,
    sign: str = "",
) -> Cell:
    """Show an estimate and below it the ends of its interval.

    Args:
        value: the estimate.
        low: end of the interval; None where there is none.
        high: the other end.
        digits: decimals, of a share those of its percents.
        is_share: whether it is shown in percent.
        sign: HTML before it; of a difference, whose shares are shown in percentage points.

    Returns:
        The cell; the CSV file has a column for each of the three.
    """
    cell = percent(value, digits) if is_share else number(value, digits)
    shown = cell.shown.replace("&#8239;%", "") if sign else cell.shown
    if low is None or high is None or not cell.values[""]:
        return Cell(shown, {**cell.values, "_low": "", "_high": ""})
    factor = 100 if is_share else 1
    ends = ", ".join(_signed(f"{factor * end:.{digits}f}") for end in (low, high))
    values = {**cell.values, "_low": f"{low:.6g}", "_high": f"{high:.6g}"}
    return Cell(f"{sign}{shown}<small>[{ends}]</small>", values)


def table(
    name: str,
    caption: str,
    corner: str,
    rows: Mapping[str, Mapping[str, Cell]],
    *,
    arrows: Mapping[str, str] | None = None,
) -> str:
    """Return a table that scrolls within itself on a narrow screen, and below it the link to its CSV file.

    Args:
        name: of the CSV file, without its ending; an id of the page.
        caption: HTML above the table.
        corner: heading of the rows' names.
        rows: by name, cells by column; the first row names the columns.
        arrows: by column, "higher" or "lower" where that is better: an arrow beside its name.
    """
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    head = "".join(
        f'<th scope="col"{_kind(rows, column)}>{escape(column)}{_ARROWS[(arrows or {}).get(column, "")]}</th>'
        for column in columns
    )
    lines = []
    for label, row in rows.items():
        cells = "".join(_cell(row.get(column, Cell("–"))) for column in columns)
        lines.append(f'<tr><th scope="row">{escape(label)}</th>{cells}</tr>')
    flat = [{corner: label, **_flat(row)} for label, row in rows.items()]
    names = list(dict.fromkeys(key for row in flat for key in row))
    link = csv_link(name, ({key: row.get(key, "") for key in names} for row in flat))
    return (
        f'<div class="scroll" role="region" aria-labelledby="{name}-caption" tabindex="0"><table>'
        f'<caption id="{name}-caption"><span>{caption}</span></caption>'
        f'<thead><tr><th scope="col" class="text">{escape(corner)}</th>'
        f"{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
        f'<p class="under">{link}</p>'
    )


def csv_link(name: str, records: Iterable[Mapping[str, Any]], *, limit: int = CSV_BYTES) -> str:
    """Return a link that saves records as a CSV file, which is a part of the page.

    A spreadsheet takes a text that begins with one of ``= + - @`` for a formula: such a text gets a ``'`` before it.

    Args:
        name: of the file, without its ending.
        records: the rows; the first one names the columns.
        limit: of the file's bytes; rows beyond it are left out, and the link says so.
    """
    file, size, held, total = io.StringIO(newline=""), 0, 0, 0
    writer: Any = None
    for record in records:
        total += 1
        if held < total - 1:
            continue
        line = io.StringIO(newline="")
        writer = csv.DictWriter(line, fieldnames=list(record))
        if total == 1:
            writer.writeheader()
        writer.writerow({key: _harmless(value) for key, value in record.items()})
        size += len(line.getvalue().encode())
        if size <= limit:
            file.write(line.getvalue())
            held += 1
    data = base64.b64encode(file.getvalue().encode()).decode()
    kept = "" if held == total else f" <small>the first {held:,} of {total:,} rows</small>"
    return f'<a class="csv" download="{name}.csv" href="data:text/csv;charset=utf-8;base64,{data}">{name}.csv</a>{kept}'


def _cell(cell: Cell) -> str:
    kind = ' class="text"' if cell.is_text else ""
    return f"<td{kind}>{cell.shown}</td>"


def _kind(rows: Mapping[str, Mapping[str, Cell]], column: str) -> str:
    return ' class="text"' if any(row[column].is_text for row in rows.values() if column in row) else ""


def _flat(row: Mapping[str, Cell]) -> dict[str, Any]:
    return {f"{column}{end}": value for column, cell in row.items() for end, value in cell.values.items()}


def _harmless(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) and not _is_number(value) else value


def _is_number(value: str) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True


def _signed(shown: str) -> str:
    """A minus sign instead of a hyphen, and none before a zero."""
    is_zero = not shown.strip("-0.,")
    return shown.lstrip("-") if is_zero else shown.replace("-", "&#8722;")
