"""Results as one self-contained page: is it right as often as it says, what refusing buys, which inputs to look at."""

from .page import html, rows_with_words
from .results import HtmlResults

__all__ = ["HtmlResults", "html", "rows_with_words"]
