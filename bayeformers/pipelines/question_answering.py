"""Question answering by spans of a text, which transformers 5 has no pipeline for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers.models.auto import modeling_auto as auto
from transformers.pipelines.base import ChunkPipeline

from ..checks import check_count
from ..forward import logits_of
from ..tasks.answers import SpanDistribution, SpanReader
from ..tasks.squad import Question
from ..tasks.windows import read_windows
from .base import BayesianPipelineMixin, heads_of, result_of, uncertainties

__all__ = ["BayesianQuestionAnsweringPipeline"]

_PREPROCESS = ("doc_stride", "max_seq_len")
_POSTPROCESS = ("top_k", "max_answer_len", "handle_impossible_answer")
_FIELDS = ("question", "context")


class BayesianQuestionAnsweringPipeline(BayesianPipelineMixin, ChunkPipeline):
    """Of a question and a text that holds the answer, with the inputs and results of transformers 4's pipeline.

    A long text is read in windows. Of each draw all spans of at most ``max_answer_len`` tokens, in all windows, share
    one softmax; the score is the span's probability, averaged over the draws, and the uncertainty is about the span.
    """

    heads = heads_of(auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES)
    scores_are_of = "spans of the whole text"
    stands_for = "token-classification"  # transformers' factory builds no task that it does not know
    _load_processor = False
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = True

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{**kwargs, "task": "question-answering"})
        if not self.is_average_of_passes:
            raise ValueError(
                f"`posterior` of question-answering must give the logits of its draws, got a "
                f"{type(self.posterior).__name__}, which gives calibrated or weighted probabilities: use its base."
            )
        if not getattr(self.tokenizer, "is_fast", False):
            raise ValueError(
                f"`tokenizer` of question-answering must be a fast one, which knows where in the text its tokens are, "
                f"got {type(self.tokenizer).__name__}."
            )

    def _sanitize_parameters(self, **kwargs: Any) -> Any:
        inputs = {name: kwargs.pop(name) for name in _PREPROCESS if name in kwargs}
        results = {name: kwargs.pop(name) for name in _POSTPROCESS if name in kwargs}
        for name, value in (inputs | results).items():
            if name != "handle_impossible_answer":
                check_count(name, value, 1)
        how: dict[str, Any] = {name: kwargs.pop(name) for name in ("num_samples", "method", "seed") if name in kwargs}
        if kwargs:
            raise TypeError(f"question-answering takes {(*_PREPROCESS, *_POSTPROCESS)}, got {sorted(kwargs)}.")
        return inputs, self.checked(how), results

    def __call__(self, inputs: Any = None, *, question: Any = None, context: Any = None, **kwargs: Any) -> Any:
        """Answer questions.

        Args:
            inputs: a mapping with a ``question`` and a ``context``, a list of such, or a dataset or generator.
            question: in place of ``inputs``: a text, or a list of them.
            context: the text of the question, of each question, or of all of them.
            kwargs: ``top_k``: number of answers, 1; ``max_answer_len``: of an answer in tokens, 15;
                ``handle_impossible_answer``: whether "" may be an answer, no; ``max_seq_len``: of a window in tokens,
                384; ``doc_stride``: tokens that windows share, 128; ``batch_size`` and others of all pipelines.

        Returns:
            A dict with ``answer``, ``start``, ``end`` (characters of the text), ``score`` and ``uncertainty``; a list
            of such of several questions, or with ``top_k`` > 1.

        Raises:
            ValueError: no question, or one without its text.
        """
        if inputs is None:
            inputs = _paired(question, context)
        elif question is not None or context is not None:
            raise ValueError("`inputs` hold the question and the context: give them, or `question` and `context`.")
        elif hasattr(inputs, "column_names"):  # a `datasets.Dataset`, which transformers takes for one input
            inputs = (row for row in inputs)
        return super().__call__(inputs, **kwargs)

    def preprocess(self, inputs: Any, max_seq_len: int | None = None, doc_stride: int | None = None) -> Any:
        """One item per window.

        Args:
            inputs: a mapping with ``question`` and ``context``.
            max_seq_len: of a window, in tokens.
            doc_stride: tokens of the text that windows share.

        Yields:
            The inputs of a window, (1, T).
        """
        question, context = _checked(inputs)
        length = min(self.tokenizer.model_max_length, 384) if max_seq_len is None else max_seq_len
        stride = min(length // 4, 128) if doc_stride is None else doc_stride
        asked = Question("question", question, context, (), "")
        readings, columns = read_windows([asked], self.tokenizer, max_length=length, stride=stride)
        names = self.tokenizer.model_input_names
        for index in range(len(readings[0].windows)):
            tensors = {name: torch.tensor([columns[name][index]]) for name in names}
            yield {"is_last": index == len(readings[0].windows) - 1, "reading": readings[0], **tensors}

    def _forward(self, model_inputs: Any, **how: Any) -> dict[str, Any]:
        """The draws' logits of start and end, (B, S, T, 2)."""
        beside = {name: model_inputs.pop(name) for name in ("is_last", "reading")}
        outputs = self.drawn_outputs(model_inputs, how)
        draws = [torch.stack([logits_of(each, f"{side}_logits") for side in ("start", "end")], -1) for each in outputs]
        return {"logits": torch.stack(draws, dim=1), **beside}

    def postprocess(
        self, model_outputs: Any, top_k: int = 1, max_answer_len: int = 15, handle_impossible_answer: bool = False
    ) -> Any:
        """The most probable answers of a question's windows.

        Args:
            model_outputs: of all windows.
            top_k: how many answers.
            max_answer_len: of an answer, in tokens.
            handle_impossible_answer: whether "" may be one.

        Returns:
            An answer, or with ``top_k`` > 1 a list of them.
        """
        reading = model_outputs[0]["reading"]
        length = max(outputs["logits"].shape[2] for outputs in model_outputs)
        windows = [_lengthened(outputs["logits"][0], length) for outputs in model_outputs]
        reader = SpanReader(max_answer_len, bool(handle_impossible_answer))
        distribution = reader.distribution(reading, torch.stack(windows, dim=1))
        beside: dict[str, Any] = {"uncertainty": result_of(uncertainties(distribution.predictive)[0])}
        beside |= {name: bool(value[0]) for name, value in self.refusals(distribution.predictive).items()}
        probabilities = distribution.log_probs.exp()
        best = probabilities.topk(min(top_k, int((probabilities > 0).sum()))).indices.tolist()
        answers = [_answer(distribution, outcome) | beside for outcome in best]
        return answers if top_k > 1 else answers[0]


def _answer(distribution: SpanDistribution, outcome: int) -> dict[str, Any]:
    """One outcome of a distribution over spans, as transformers words it."""
    score = float(distribution.log_probs[outcome].exp())
    if outcome == distribution.null:
        return {"score": score, "start": 0, "end": 0, "answer": ""}
    first, more = divmod(outcome, distribution.length)
    offsets = distribution.reading.offsets
    start, end = offsets[first][0], offsets[first + more][1]
    return {"score": score, "start": start, "end": end, "answer": distribution.reading.question.context[start:end]}


def _lengthened(logits: Any, length: int) -> Any:
    """(S, T, 2) of a window, to the longest window's; what is added is no token of the text, and never read."""
    return torch.nn.functional.pad(logits, (0, 0, 0, length - logits.shape[1]))


def _paired(question: Any, context: Any) -> Any:
    """A mapping of one question, or a list of them."""
    if question is None or context is None:
        raise ValueError("`question` and `context` must be given, or `inputs` that hold both.")
    if isinstance(question, str):
        return {"question": question, "context": context}
    contexts = [context] * len(question) if isinstance(context, str) else context
    if not isinstance(question, Sequence) or len(contexts) != len(question):
        raise ValueError(
            f"`context` must be one text or one for each of {len(question)} questions, got {len(contexts)}."
        )
    return [{"question": one, "context": its} for one, its in zip(question, contexts, strict=True)]


def _checked(inputs: Any) -> tuple[str, str]:
    texts: list[Any] = [inputs.get(name) for name in _FIELDS] if isinstance(inputs, Mapping) else [None, None]
    for name, text in zip(_FIELDS, texts, strict=True):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"`{name}` must be a text that is not empty, got {text!r}.")
    return texts[0], texts[1]
