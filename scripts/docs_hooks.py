"""Parts of the site's builder: a hook of mkdocs, and an extension of griffe, which reads the docstrings."""

import html
import re
from typing import Any

import griffe
from latex2mathml.converter import convert

# what `pymdownx.arithmatex` makes of $...$ and $$...$$
INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', flags=re.DOTALL)
DISPLAY = re.compile(r'<div class="arithmatex">\\\[(.*?)\\\]</div>', flags=re.DOTALL)
# "no-run" speaks to the tests
NOT_RUN = re.compile(r"^```python no-run$", flags=re.MULTILINE)
BAR = re.compile(r'<mo(?: stretchy="false")?>&#x0007C;</mo>')
ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):`~?([^`]+)`")
DOCTEST = re.compile(r"^(?P<indent> *)>>> .*?(?=\n\s*\n|\Z)", flags=re.DOTALL | re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    return NOT_RUN.sub("```python", markdown)


def on_page_content(content: str, **_: Any) -> str:
    """Formulas become MathML, which browsers render without a script."""
    content = DISPLAY.sub(lambda formula: math(formula[1], "block"), content)
    return INLINE.sub(lambda formula: math(formula[1], "inline"), content)


def math(formula: str, display: str) -> str:
    # a bar is an operator to MathML, with space around it; here it is an absolute value
    return BAR.sub(
        '<mo lspace="0" rspace="0" stretchy="false">|</mo>', convert(html.unescape(formula), display=display)
    )


class Docstrings(griffe.Extension):
    """Sphinx's roles become code, and doctests outside an Examples section become blocks."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            text = ROLE.sub(r"`\1`", obj.docstring.value)
            obj.docstring.value = DOCTEST.sub(
                lambda test: f"{test['indent']}```pycon\n{test[0]}\n{test['indent']}```", text
            )
