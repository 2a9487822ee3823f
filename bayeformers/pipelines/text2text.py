"""The pipeline of encoder-decoders, "text2text-generation" of transformers 4, which transformers 5 has no more."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import GenerationConfig
from transformers.pipelines.base import Pipeline

__all__ = ["Text2TextGenerationPipeline"]


class Text2TextGenerationPipeline(Pipeline):
    """An encoder reads a text, a decoder writes another; up to 256 tokens unless more or fewer are asked for."""

    _pipeline_calls_generate = True
    _load_processor = False
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = True
    _default_generation_config = GenerationConfig(max_new_tokens=256)

    def _sanitize_parameters(
        self,
        *,
        truncation: bool | str | None = None,
        return_tensors: bool | None = None,
        clean_up_tokenization_spaces: bool | None = None,
        stop_sequence: str | list[str] | None = None,
        **generate_kwargs: Any,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        if stop_sequence is not None:
            stops = [stop_sequence] if isinstance(stop_sequence, str) else stop_sequence
            generate_kwargs.update(stop_strings=stops, tokenizer=self.tokenizer)
        results = {"return_tensors": return_tensors, "clean_up_tokenization_spaces": clean_up_tokenization_spaces}
        inputs = {} if truncation is None else {"truncation": truncation}
        return inputs, generate_kwargs, {name: value for name, value in results.items() if value is not None}

    def preprocess(self, text: str, **options: Any) -> Any:
        """Token ids of one text."""
        if not isinstance(text, str):
            raise TypeError(f"`inputs` must be a text, or several, got {type(text).__name__}.")
        return self.tokenizer(text, return_tensors="pt", **options)

    def _forward(self, model_inputs: Any, **options: Any) -> dict[str, Any]:
        named = {name: value for name, value in model_inputs.items() if name in ("input_ids", "attention_mask")}
        sequences: Tensor = self.model.generate(**named, **self._prepare_generate_kwargs(options))
        return {"generated_sequence": sequences.view(len(named["input_ids"]), -1, sequences.shape[-1])}

    def postprocess(
        self,
        model_outputs: Any,
        *,
        return_tensors: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
    ) -> list[dict[str, Any]]:
        """A list with a ``generated_text``, or ``generated_token_ids``, of each answer."""
        sequences = model_outputs["generated_sequence"][0]
        if return_tensors:
            return [{"generated_token_ids": sequence.tolist()} for sequence in sequences]
        texts = self.tokenizer.batch_decode(
            sequences, skip_special_tokens=True, clean_up_tokenization_spaces=clean_up_tokenization_spaces
        )
        return [{"generated_text": text} for text in texts]
