"""What pages share: the head of a self-contained document, its letters, and colours for light and dark screens.

Colours are CSS variables: a page names `var(--epistemic)`, and the reader's system decides which of the two palettes
it stands for. Every text colour has a contrast of 4.5 or more on both grounds, every mark one of 3 (WCAG 2.2, AA).
"""

from __future__ import annotations

from html import escape

__all__ = ["DARK", "LIGHT", "METHOD_VARIABLES", "WORD_SHARE", "document"]

LIGHT = {
    "ground": "#fcfcfa", "surface": "#ffffff", "soft": "#f3f4f1", "ink": "#1c2430", "muted": "#586273",
    "line": "#dcdfe3", "axis": "#868f9b", "epistemic": "#0b62a8", "aleatoric": "#a8540c", "wrong": "#b3261e",
    "right": "#566f8c", "good": "#14713f", "m0": "#0b62a8", "m1": "#a8540c", "m2": "#0b7257", "m3": "#8a3fa0",
    "m4": "#a3324f", "m5": "#4a5160",
}  # fmt: skip
"""Colours by variable, on paper."""
DARK = {
    "ground": "#14181e", "surface": "#1a1f27", "soft": "#222933", "ink": "#e7eaee", "muted": "#a6b0be",
    "line": "#343c48", "axis": "#77818f", "epistemic": "#6cb4f5", "aleatoric": "#f0a35e", "wrong": "#ff9086",
    "right": "#8fa9c8", "good": "#6fd39b", "m0": "#6cb4f5", "m1": "#f0a35e", "m2": "#5fd0a8", "m3": "#d59bea",
    "m4": "#ff92a6", "m5": "#b8c0cc",
}  # fmt: skip
"""The same variables on a dark screen."""
METHOD_VARIABLES = ("m0", "m1", "m2", "m3", "m4", "m5")
WORD_SHARE = 42
"""Percent of the epistemic colour in the ground of the strongest word: its letters stay readable on it."""


def _variables(palette: dict[str, str]) -> str:
    return " ".join(f"--{name}: {colour};" for name, colour in palette.items())


_STYLE = f"""
:root {{ color-scheme: light dark; {_variables(LIGHT)} }}
@media (prefers-color-scheme: dark) {{ :root {{ {_variables(DARK)} }} }}
* {{ box-sizing: border-box; }}
html {{ -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }}
body {{ background: var(--ground); color: var(--ink); font: 16px/1.6 system-ui, -apple-system, "Segoe UI", sans-serif;
  margin: 0 auto; max-width: 64rem; padding: 2rem 1.25rem 4rem; }}
h1 {{ font-size: 1.7rem; line-height: 1.25; letter-spacing: -.01em; margin: 0 0 .5rem; text-wrap: balance; }}
p {{ margin: .5rem 0; max-width: 44rem; }}
a {{ color: var(--epistemic); text-underline-offset: .15em; }}
:focus-visible {{ outline: 2px solid var(--epistemic); outline-offset: 2px; }}
"""


def document(title: str, body: str, *, style: str = "") -> str:
    """Return a whole document of HTML, which needs no other file and no network.

    Args:
        title: of the window, as plain text.
        body: HTML between the tags of the body.
        style: CSS after that of the frame.
    """
    head = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title>"
    )
    return f"{head}\n<style>{_STYLE}{style}</style></head>\n<body>\n{body}\n</body></html>\n"
