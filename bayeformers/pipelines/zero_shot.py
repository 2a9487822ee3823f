"""Zero-shot classification: which label a model of entailment finds in a text."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.models.auto import modeling_auto as auto
from transformers.pipelines.zero_shot_classification import ZeroShotClassificationPipeline

from ..linearized.methods import SAMPLING
from ..predictive import Predictive
from .base import PARTS, BayesianPipelineMixin, heads_of, result_of, uncertainties

__all__ = ["BayesianZeroShotClassificationPipeline"]


class BayesianZeroShotClassificationPipeline(BayesianPipelineMixin, ZeroShotClassificationPipeline):
    """Of texts, by labels that are named in the call.

    The uncertainty is about which of the candidate labels is right, not about entailment: the draws' entailment logits
    of all labels go through one softmax per draw, and then are averaged. With ``multi_label`` it is a list, about each
    label by itself: entailed or contradicted. One draw must read all labels' hypotheses, so draws are of networks;
    linearised methods, which predict each hypothesis by itself, are refused.
    """

    heads = heads_of(auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES)
    scores_are_of = "the candidate labels"

    def _forward(self, inputs: Any, **how: Any) -> dict[str, Any]:
        """The draws' logits of a text and one hypothesis, (B, S, C)."""
        method = how.get("method", self.method)
        if method is not None and method not in SAMPLING:
            raise ValueError(
                f"`method` of zero-shot-classification must be one of {SAMPLING}, got {method!r}: one draw must read "
                "the hypotheses of all labels."
            )
        model_inputs = {name: inputs[name] for name in self.tokenizer.model_input_names if name in inputs}
        predictive = self.predict_batch(model_inputs, {**how, "method": "sample"})
        beside = {name: inputs[name] for name in ("candidate_label", "sequence", "is_last")}
        return {"logits": predictive.logits.transpose(0, 1), **beside}

    def postprocess(self, model_outputs: Any, multi_label: bool = False) -> dict[str, Any]:
        """The labels and scores, with the uncertainty about the label, or about each."""
        draws = torch.cat([outputs["logits"] for outputs in model_outputs]).double().transpose(0, 1)
        of_each = multi_label or draws.shape[1] == 1
        predictive = self._about_each(draws) if of_each else self._about_one(draws)
        averaged = self._as_logits(predictive, draws.shape[-1])
        rows = [outputs | {"logits": row[None]} for outputs, row in zip(model_outputs, averaged, strict=True)]
        result: dict[str, Any] = super().postprocess(rows, multi_label=multi_label)
        uncertainty = uncertainties(predictive)[0]
        if of_each:
            places = {outputs["candidate_label"]: index for index, outputs in enumerate(model_outputs)}
            ordered = uncertainty[[places[label] for label in result["labels"]]]
            result["uncertainty"] = {name: ordered[:, part].tolist() for part, name in enumerate(PARTS)}
        else:
            result["uncertainty"] = result_of(uncertainty)
        refused = self.refusals(predictive)
        return result | {name: bool(value[0]) for name, value in refused.items()}

    def _about_one(self, draws: Tensor) -> Predictive:
        """Of one softmax over the labels per draw, from (S, labels, C)."""
        log_probs = draws[..., self.entailment_id].log_softmax(-1)
        return Predictive(problem_type="single_label_classification", log_probs=log_probs[:, None])

    def _about_each(self, draws: Tensor) -> Predictive:
        """Of each label, contradicted or entailed, from (S, labels, C)."""
        log_probs = draws[..., self._two_ways].log_softmax(-1)
        return Predictive(problem_type="multi_label_classification", log_probs=log_probs[:, None])

    @property
    def _two_ways(self) -> list[int]:
        """Contradiction and entailment, as transformers finds them."""
        return [-1 if self.entailment_id == 0 else 0, self.entailment_id]

    def _as_logits(self, predictive: Predictive, num_classes: int) -> Tensor:
        """Logits (labels, C) of which transformers' arithmetic makes the averaged scores."""
        averaged = predictive.mean_log_probs[0]
        logits = averaged.new_zeros((len(averaged), num_classes))
        logits[:, self.entailment_id if averaged.dim() == 1 else self._two_ways] = averaged
        return logits
