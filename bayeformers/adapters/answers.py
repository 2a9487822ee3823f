"""`AnswerTokens`: a language model as a classifier over a few named tokens, such as the letters of multiple choice."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from ..checks import is_whole
from ..forward import logits_of
from ..likelihoods import unwrapped

__all__ = ["AnswerTokens"]

_KEEP = "logits_to_keep"
_POSITIONS = "position_ids"


class AnswerTokens(nn.Module):
    """A decoder whose logits are those of K answer tokens, at the last token of the prompt: (B, K), and nothing else.

    With them a language model is a classifier: `fit_laplace`, the linearised predictive (a covariance of K logits
    instead of a vocabulary's), `BayesianTrainer`, the metrics and every posterior take it as they take a head of K
    classes. The probabilities are those of the vocabulary given that the answer is one of the tokens. Laplace-LoRA
    (Yang et al. 2024, arXiv 2308.13111, section 4) is `laplace.fit(AnswerTokens(peft_model, letters), ...)`.

    The answer is read where the attention mask has its last 1, so that batches may be padded on either side: where it
    is on the left, positions are counted from the first token, as `generate` does. Labels are numbers 0 ... K - 1 of
    the tokens, one per row.

    Args:
        model: a causal language model, or a PEFT model of one; it is not copied.
        token_ids: the K >= 2 tokens, in the order of the classes. Mind the tokenizer's spaces: " A" and "A" are two
            tokens as a rule.

    Raises:
        TypeError: ``model`` is not a module, or ``token_ids`` no sequence of whole numbers.
        ValueError: fewer than 2 tokens, one twice, one beyond the vocabulary, or a model that is no decoder.
    """

    token_ids: Tensor

    def __init__(self, model: nn.Module, token_ids: Sequence[int]) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"`model` must be a torch.nn.Module, got {type(model).__name__}.")
        ids = _checked_ids(token_ids, _vocabulary(model))
        config = getattr(model, "config", None)
        if getattr(config, "is_encoder_decoder", False):
            raise ValueError(f"`model` ({type(model).__name__}) is no decoder: its answer does not follow the prompt.")
        self.model = model
        self.register_buffer("token_ids", torch.tensor(ids), persistent=False)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None, **inputs: Any
    ) -> SequenceClassifierOutput:
        """Return the logits of the answer tokens, and with labels the cross-entropy.

        Args:
            input_ids: prompts, (B, T).
            attention_mask: 1 where there is a token, (B, T); None: everywhere.
            labels: which answer is right, (B,); -100: unknown.
            **inputs: what else the model's forward takes.

        Returns:
            The loss, or None, and logits (B, K).
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        behind = mask.flip(1).long().argmax(1)  # how many tokens of padding are on the right
        if self._takes(_KEEP) and not bool(behind.any()):  # padded on the left: one position is made
            inputs = {**inputs, _KEEP: 1}
        if _POSITIONS not in inputs and self._takes(_POSITIONS) and not bool(mask[:, 0].all()):
            inputs = {**inputs, _POSITIONS: (mask.long().cumsum(1) - 1).clamp_min(0)}  # as `generate` numbers them
        whole = logits_of(self.model(input_ids=input_ids, attention_mask=attention_mask, **inputs))
        rows = torch.arange(len(whole), device=whole.device)
        place = whole.shape[1] - 1 - behind.to(whole.device)  # from the end: PEFT puts virtual tokens in front
        logits = whole[rows, place].index_select(-1, self.token_ids.to(whole.device))
        loss = None if labels is None else F.cross_entropy(logits, labels.reshape(-1).to(logits.device))
        return SequenceClassifierOutput(loss=loss, logits=logits)

    def _takes(self, name: str) -> bool:
        return name in inspect.signature(unwrapped(self.model).forward).parameters

    def extra_repr(self) -> str:
        """The tokens."""
        return f"token_ids={self.token_ids.tolist()}"


def _vocabulary(model: nn.Module) -> int:
    output = getattr(model, "get_output_embeddings", lambda: None)()
    weight = getattr(output, "weight", None)
    if not isinstance(weight, Tensor):
        raise ValueError(f"`model` ({type(model).__name__}) has no head over a vocabulary: give a language model.")
    config = getattr(model, "config", None)
    return int(getattr(config, "vocab_size", None) or weight.shape[0])


def _checked_ids(token_ids: Any, vocabulary: int) -> list[int]:
    if isinstance(token_ids, str) or not isinstance(token_ids, (Sequence, Tensor)):
        raise TypeError(f"`token_ids` must be a sequence of whole numbers, got {token_ids!r}.")
    ids = token_ids.tolist() if isinstance(token_ids, Tensor) else list(token_ids)
    if not all(map(is_whole, ids)):
        raise TypeError(f"`token_ids` must be whole numbers, got {ids}: `tokenizer.convert_tokens_to_ids` has them.")
    if len(ids) < 2 or len(set(ids)) < len(ids):
        raise ValueError(f"`token_ids` must be at least 2 different tokens, got {ids}.")
    if beyond := [each for each in ids if not 0 <= each < vocabulary]:
        raise ValueError(f"`token_ids` must lie in 0 ... {vocabulary - 1}, the vocabulary, got {beyond}.")
    return [int(each) for each in ids]
