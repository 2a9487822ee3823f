"""Pipelines of heads over tokens: entities, and masked words."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.models.auto import modeling_auto as auto
from transformers.pipelines.fill_mask import FillMaskPipeline
from transformers.pipelines.token_classification import AggregationStrategy, TokenClassificationPipeline
from transformers.utils.generic import ModelOutput

from ..forward import logits_of
from ..predictive import Predictive
from .base import BayesianPipelineMixin, heads_of, result_of, uncertainties

__all__ = ["BayesianFillMaskPipeline", "BayesianTokenClassificationPipeline"]

_NO_INPUTS = ("special_tokens_mask", "offset_mapping", "sentence", "is_last", "word_ids", "word_to_chars_map")
_UNGROUPED = (AggregationStrategy.NONE, AggregationStrategy.SIMPLE)


class BayesianTokenClassificationPipeline(BayesianPipelineMixin, TokenClassificationPipeline):
    """Of tokens, and of the entities that they make.

    An entity's uncertainty is made of its tokens' as its score is: of a word that of its first token ("first"), of its
    surest token ("max"), or the mean ("average"); of an entity the mean of its tokens or words. An entity is refused if
    the policy refuses any of its tokens.
    """

    heads = heads_of(auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES)
    _chunks: Any = None  # of the copy that makes one text's results

    def _forward(self, model_inputs: Any, **how: Any) -> dict[str, Any]:
        """Log-probabilities (B, T, C), uncertainty (B, T, 3) and refusals (B, T)."""
        beside = {name: model_inputs.pop(name, None) for name in _NO_INPUTS}
        predictive = self.predict_batch(model_inputs, how)
        return {
            "logits": predictive.mean_log_probs,
            "uncertainty": uncertainties(predictive),
            **self.refusals(predictive),
            **beside,
            **model_inputs,
        }

    def postprocess(self, all_outputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Make transformers' entities, each with its uncertainty, from all windows of a text."""
        worker = copy.copy(self)  # threads share the pipeline
        worker._chunks = iter(all_outputs)
        entities = TokenClassificationPipeline.postprocess(worker, all_outputs, *args, **kwargs)
        for entity in entities:
            entity["uncertainty"] = result_of(entity["uncertainty"])
        return entities

    def gather_pre_entities(self, *args: Any, **kwargs: Any) -> list[dict[str, Any]]:
        """The record of each token of a window, with its uncertainty."""
        tokens: list[dict[str, Any]] = super().gather_pre_entities(*args, **kwargs)
        outputs = next(self._chunks)
        uncertainty = outputs["uncertainty"][0].double().numpy()
        for token in tokens:
            token["uncertainty"] = uncertainty[token["index"]]
            if "abstain" in outputs:
                token["abstain"] = bool(outputs["abstain"][0, token["index"]])
        return tokens

    def aggregate(self, pre_entities: list[dict[str, Any]], aggregation_strategy: Any) -> list[dict[str, Any]]:
        """Make entities of tokens.

        Args:
            pre_entities: the records of a window's tokens.
            aggregation_strategy: one of transformers'.

        Returns:
            The entities, each with its uncertainty.
        """
        if aggregation_strategy not in _UNGROUPED:
            words: list[dict[str, Any]] = super().aggregate(pre_entities, aggregation_strategy)
            return words
        entities: list[dict[str, Any]] = super().aggregate(pre_entities, AggregationStrategy.NONE)
        for entity, token in zip(entities, pre_entities, strict=True):
            entity.update(_doubt(token["uncertainty"], [token]))
        if aggregation_strategy is not AggregationStrategy.NONE:
            entities = self.group_entities(entities)
        return entities

    def aggregate_word(self, entities: list[dict[str, Any]], aggregation_strategy: Any) -> dict[str, Any]:
        """Make one word of its tokens.

        Args:
            entities: the records of the word's tokens.
            aggregation_strategy: one of transformers' that keep words whole.

        Returns:
            The word, with the uncertainty of the tokens that its score is of.
        """
        word: dict[str, Any] = super().aggregate_word(entities, aggregation_strategy)
        if aggregation_strategy is AggregationStrategy.FIRST:
            uncertainty = entities[0]["uncertainty"]
        elif aggregation_strategy is AggregationStrategy.MAX:
            uncertainty = max(entities, key=lambda token: token["scores"].max())["uncertainty"]
        else:
            uncertainty = np.mean([token["uncertainty"] for token in entities], axis=0)
        return word | _doubt(uncertainty, entities)

    def group_sub_entities(self, entities: list[dict[str, Any]]) -> dict[str, Any]:
        """The entity of several tokens or words, with their mean uncertainty."""
        group: dict[str, Any] = super().group_sub_entities(entities)
        return group | _doubt(np.mean([entity["uncertainty"] for entity in entities], axis=0), entities)


def _doubt(uncertainty: Any, parts: list[dict[str, Any]]) -> dict[str, Any]:
    """The uncertainty, and with a policy whether any part is refused."""
    refused = {"abstain": any(part["abstain"] for part in parts)} if "abstain" in parts[0] else {}
    return {"uncertainty": uncertainty, **refused}


class BayesianFillMaskPipeline(BayesianPipelineMixin, FillMaskPipeline):
    """Of masked words: the uncertainty is about the word at the mask, over the whole vocabulary.

    Draws are of networks: a vocabulary's logits have no covariance that could be held.
    """

    heads = heads_of(auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES)

    def _forward(self, model_inputs: Any, **how: Any) -> ModelOutput:
        """Log-probabilities at the masks (B, T, V), 0 elsewhere, uncertainty (B, T, 3) and refusals (B, T)."""
        ids = model_inputs["input_ids"]
        masks = ids == self.tokenizer.mask_token_id
        predictive = self._at(masks, model_inputs, how)
        log_probs = predictive.mean_log_probs
        fields = {"logits": log_probs, "uncertainty": uncertainties(predictive), **self.refusals(predictive)}
        return ModelOutput({**{name: _placed(value, masks) for name, value in fields.items()}, "input_ids": ids})

    def _at(self, masks: Tensor, inputs: Mapping[str, Any], how: Mapping[str, Any]) -> Predictive:
        """Of the M masks of a batch alone: all tokens of all draws would take S times the plain pipeline's memory."""
        if not self.is_average_of_passes:
            every = self.predict_batch(inputs, {"method": "sample", **how}).log_probs
            log_probs = every[:, masks]  # type: ignore[index]
        else:
            outputs = self.drawn_outputs(inputs, how)
            log_probs = torch.stack([logits_of(output)[masks].log_softmax(-1) for output in outputs])
        return Predictive(problem_type="single_label_classification", log_probs=log_probs)

    def postprocess(self, model_outputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The words, each with the uncertainty of its mask."""
        results = super().postprocess(model_outputs, *args, **kwargs)
        at = model_outputs["input_ids"][0] == self.tokenizer.mask_token_id
        uncertainty = model_outputs["uncertainty"][0][at]
        refused = model_outputs["abstain"][0][at] if "abstain" in model_outputs else None
        for index, words in enumerate([results] if len(uncertainty) == 1 else results):
            for word in words:
                word["uncertainty"] = result_of(uncertainty[index])
                word |= {} if refused is None else {"abstain": bool(refused[index])}
        return results


def _placed(values: Tensor, masks: Tensor) -> Tensor:
    """Values (M, ...) of the masks at their places in (B, T, ...)."""
    placed = values.new_zeros((*masks.shape, *values.shape[1:]))
    placed[masks] = values
    return placed
