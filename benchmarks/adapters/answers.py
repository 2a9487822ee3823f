"""The tokens of the digits "1" ... "4", which answer a question of four answers."""

from __future__ import annotations

from typing import Any

from .tasks import NUM_ANSWERS


def answer_tokens(tokenizer: Any) -> list[int]:
    """In the order of the answers."""
    return [digit_token(tokenizer, str(index + 1)) for index in range(NUM_ANSWERS)]


def digit_token(tokenizer: Any, digit: str) -> int:
    """The token of a digit behind a word.

    Raises:
        ValueError: the tokenizer joins digits to the word before them.
    """
    word = tokenizer(" answer", add_special_tokens=False)["input_ids"]
    both = tokenizer(f" answer{digit}", add_special_tokens=False)["input_ids"]
    if both[:-1] != word:
        raise ValueError(f"the tokenizer has no token of its own for {digit!r} behind a word, got {both} after {word}.")
    return int(both[-1])
