"""A language model as a classifier of four classes: the logits of the digits that may follow its prompt."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import SequenceClassifierOutput

from .tasks import NUM_ANSWERS


class AnswerDigits(nn.Module):
    """Of a decoder's next-token logits behind the prompt only those of "1" ... "4"; prompts are padded on the left.

    Shape: ``input_ids``, ``attention_mask`` (B, T); ``labels`` (B,); the output's ``logits`` (B, 4).
    """

    def __init__(self, model: nn.Module, tokenizer: Any) -> None:
        super().__init__()
        self.model, self.config = model, model.config
        self.config.num_labels, self.config.problem_type = NUM_ANSWERS, "single_label_classification"
        self.token_ids = [digit_token(tokenizer, str(i + 1)) for i in range(NUM_ANSWERS)]

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None
    ) -> SequenceClassifierOutput:
        """The output has a loss where labels are given."""
        output = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, logits_to_keep=1)
        logits = output.logits[:, -1, self.token_ids].float()
        return SequenceClassifierOutput(loss=None if labels is None else F.cross_entropy(logits, labels), logits=logits)


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
