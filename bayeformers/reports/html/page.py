"""`html`: results as one page that needs no other file, no network and no script."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from ...checks import check_count
from .context import Context, section
from .frame import METHOD_VARIABLES, document
from .groups import classes, groups
from .headline import comparison, headline, summary
from .inputs import everything, mistaken_rows, mistakes, strange, strange_rows
from .parts import parts
from .refusing import refusing
from .reliability import reliability
from .results import HtmlResults

__all__ = ["html", "rows_with_words"]

_METHODS = " ".join(f".{name} {{ color: var(--{name}); }}" for name in METHOD_VARIABLES)
_STYLE = f"""
h2 {{ border-top: 1px solid var(--line); font-size: 1.2rem; line-height: 1.3; margin: 3rem 0 .6rem;
  padding-top: 1rem; }}
.facts {{ color: var(--muted); margin-top: 0; }} .finding {{ font-size: 1.1rem; margin-top: 1rem; }}
.note, .under, footer {{ color: var(--muted); font-size: .85rem; }} .under {{ margin: .35rem 0 1.5rem; }}
.caveat {{ background: var(--soft); border-left: 3px solid var(--wrong); border-radius: 4px; padding: .7rem 1rem; }}
.policy {{ background: var(--soft); border-left: 3px solid var(--good); border-radius: 4px; padding: .7rem 1rem; }}
.grid {{ display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(18rem, 100%), 1fr)); }}
@media (min-width: 60rem) {{ .grid.of-2 {{ grid-template-columns: 1fr 1fr; }} }}
figure {{ background: var(--surface); border: 1px solid var(--line); border-radius: 8px; margin: 0; padding: .75rem; }}
figcaption strong {{ display: block; }} figcaption small {{ color: var(--muted); }}
svg {{ display: block; height: auto; width: 100%; max-width: 23rem; margin: .35rem auto 0; overflow: visible; }}
svg text {{ fill: var(--muted); font-size: 12.5px; font-variant-numeric: tabular-nums; }}
.g {{ stroke: var(--line); }} .a {{ stroke: var(--axis); }} {_METHODS}
abbr {{ text-decoration: none; }} .right, .k-right {{ color: var(--right); }}
.wrong, .k-wrong {{ color: var(--wrong); }}
.ideal {{ color: var(--axis); stroke-dasharray: 4 4; }}
.l, .d, .x, .w {{ fill: none; stroke: currentColor; }} .l {{ stroke-width: 1.8; stroke-linejoin: round; }}
.l.thin {{ stroke-width: 1; opacity: .55; }} .l.ideal {{ stroke-width: 1.2; }}
.b {{ fill: currentColor; opacity: .17; }}
.d {{ stroke-linecap: round; stroke-width: 6.5; }} .d.right {{ stroke-width: 4; opacity: .5; }}
.x {{ opacity: .8; stroke-width: 1.3; }} .w {{ stroke-width: 1.3; opacity: .8; }}
.h {{ fill: currentColor; fill-opacity: .13; stroke: currentColor; stroke-width: 1.5; }}
.h.wrong {{ stroke-dasharray: 5 2.5; }} .h.n {{ color: var(--axis); fill-opacity: .3; stroke: none; }}
.scroll {{ overflow-x: auto; background: var(--surface); border: 1px solid var(--line); border-radius: 8px;
  margin-top: 1rem; }}
details .scroll {{ max-height: 40rem; overflow-y: auto; }}
table {{ border-collapse: separate; border-spacing: 0; font-size: .9rem; font-variant-numeric: tabular-nums;
  width: 100%; }}
caption {{ font-weight: 600; padding: .65rem .8rem .5rem; text-align: left; }}
caption span {{ display: inline-block; left: .8rem; max-width: calc(100vw - 4rem); position: sticky; }}
th, td {{ border-top: 1px solid var(--line); padding: .42rem .8rem; text-align: right; vertical-align: baseline;
  white-space: nowrap; }}
thead th {{ background: var(--soft); color: var(--muted); font-weight: 600; position: sticky; top: 0; z-index: 1; }}
th[scope=row] {{ background: var(--surface); font-weight: 500; left: 0; min-width: 5rem; position: sticky;
  text-align: left; white-space: normal; }}
th.text, td.text {{ text-align: left; }} td.text {{ min-width: 5.5rem; white-space: normal; }}
td small {{ color: var(--muted); display: block; font-size: .8em; }}
.words {{ display: block; line-height: 1.75; min-width: 15rem; overflow-wrap: anywhere; white-space: normal; }}
mark {{ background: color-mix(in srgb, var(--epistemic) var(--a), transparent); border-radius: 3px; color: var(--ink);
  padding: .08em .12em; }}
.good {{ color: var(--good); }} .bad {{ color: var(--wrong); }}
summary {{ cursor: pointer; font-weight: 600; padding: .5rem 0; }} a.csv {{ white-space: nowrap; }}
footer {{ border-top: 1px solid var(--line); margin-top: 3rem; padding-top: 1rem; }}
@media (max-width: 34rem) {{ body {{ padding: 1.25rem .9rem 3rem; }} th, td {{ padding: .42rem .55rem; }} }}
@media print {{ body {{ max-width: none; }} .scroll {{ max-height: none; overflow: visible; }} }}
"""


def html(results: HtmlResults, path: str | PathLike[str], *, num_resamples: int = 300, seed: int = 0) -> Path:
    """Write a page that says how sure methods are, and whether they are right to be.

    It has its pictures and its tables as CSV files inside; it follows the reader's light or dark screen, and contains
    no script. Its size is bounded whatever N is: a picture has at most 1,200 points, a list 20 inputs of 400 letters, a
    CSV file 3 MB (of more rows the first, and the page says so).

    Args:
        results: what is known.
        path: of the file; its folder is made if it does not exist.
        num_resamples: of every bootstrap over inputs, >= 1.
        seed: of the bootstraps, and of the points that a picture of more inputs shows.

    Returns:
        The path.

    Raises:
        TypeError: the results are none, or the number of resamples is no integer.
        ValueError: the path is a folder, or there are no resamples.

    >>> import tempfile, numpy as np
    >>> from bayeformers.reports import ClassPredictions
    >>> predictions = ClassPredictions(np.array([[0.9, 0.1], [0.3, 0.7], [0.6, 0.4]]))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     page = html(HtmlResults({"point": predictions}, [0, 1, 1]), f"{folder}/page.html").read_text()
    >>> page.count("<svg"), "<script" in page
    (2, False)
    """
    if not isinstance(results, HtmlResults):
        raise TypeError(f"`results` must be HtmlResults, got {type(results).__name__}.")
    check_count("num_resamples", num_resamples, 1)
    file = Path(path)
    if file.is_dir():
        raise ValueError(f"`path` must be a file, got the folder {str(path)!r}.")
    context = Context(results, num_resamples, seed)
    found = [make(context) for make in _SECTIONS]
    page = document(results.title, "\n".join(part for part in [*found, _footer(context)] if part), style=_STYLE)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(page, encoding="utf-8")
    return file


def rows_with_words(results: HtmlResults) -> list[int]:
    """The inputs, by their rows, whose words a page shows: at most 40, so that attributions of these are enough."""
    context = Context(results, 1, 0)
    return list(dict.fromkeys([*mistaken_rows(context), *strange_rows(context)]))


def _unlabelled(context: Context) -> str:
    if context.test is not None:
        return ""
    said = (
        "<p>Whether it is right as often as it says, what refusing buys, its mistakes and what one method adds to "
        "another: all of these need labels.</p>"
    )
    return section("unlabelled", "What labels would show", said)


def _footer(context: Context) -> str:
    return (
        f"<footer>Intervals are of 95&#8239;%: exact (Clopper and Pearson) of shares of inputs, else percentiles of "
        f"{context.num_resamples:,} resamples of the inputs, seed {context.seed}. Entropies are in nats. They speak of "
        "inputs like these, and of one training of each method.</footer>"
    )


_SECTIONS = (
    summary, headline, _unlabelled, reliability, refusing, parts, mistakes, strange, classes, groups, comparison,
    everything,
)  # fmt: skip
