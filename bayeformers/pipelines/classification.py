"""Pipelines of heads over whole examples: texts, images, audio; classes, labels and regressions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers.models.auto import modeling_auto as auto
from transformers.pipelines.audio_classification import AudioClassificationPipeline
from transformers.pipelines.image_classification import ImageClassificationPipeline
from transformers.pipelines.text_classification import TextClassificationPipeline
from transformers.utils.generic import ModelOutput

from ..likelihoods import get_likelihood
from ..predictive import Predictive
from .base import BayesianPipelineMixin, heads_of, result_of, uncertainties

__all__ = [
    "BayesianAudioClassificationPipeline", "BayesianImageClassificationPipeline", "BayesianTextClassificationPipeline",
    "scores_as_logits",
]  # fmt: skip

_FUNCTIONS = ("softmax", "sigmoid", "none")
_PROBLEMS = {"softmax": "single_label_classification", "sigmoid": "multi_label_classification"}


class _Classification(BayesianPipelineMixin):
    """What the three kinds share: one prediction per example."""

    def _sanitize_parameters(self, **kwargs: Any) -> Any:
        function = kwargs.get("function_to_apply")
        name = None if function is None else str(getattr(function, "value", function)).lower()
        if name is not None and name not in _FUNCTIONS:
            raise ValueError(f"`function_to_apply` must be one of {_FUNCTIONS}, got {function!r}.")
        inputs, forward, results = super()._sanitize_parameters(**kwargs)
        return inputs, forward if name is None else {**forward, "function": name}, results

    def _forward(self, model_inputs: Mapping[str, Any], function: str | None = None, **how: Any) -> ModelOutput:
        """Logits (B, C) of the averaged scores, their uncertainty (B, 3), per label (B, L, 3), and refusals (B,)."""
        problem = self.posterior.problem_type() if hasattr(self.posterior, "problem_type") else None
        asked = _PROBLEMS.get(function or "")
        options = {} if asked is None or function == _function(problem) else {"problem_type": asked}
        if options and self.abstention is not None:
            raise ValueError(
                f"`function_to_apply`={function!r} makes other scores than the head's own {_function(problem)!r}, for "
                "which the policy was fitted: leave it out, or pass `abstention=False`."
            )
        predictive = self.predict_batch(model_inputs, how, **options)
        logits = raw_scores(predictive) if function == "none" else scores_as_logits(predictive)
        applied = function or _function(predictive.problem_type)
        return ModelOutput({
            "logits": logits,
            "uncertainty": uncertainties(predictive),
            "function": [applied] * len(logits),
            **self.refusals(predictive),
        })

    def postprocess(self, model_outputs: Any, **kwargs: Any) -> Any:
        """Transformers' results, each with its uncertainty."""
        outputs = ModelOutput({"logits": model_outputs["logits"]})
        kwargs["function_to_apply"] = self._named(_first(model_outputs["function"]))
        result = super().postprocess(outputs, **kwargs)  # type: ignore[misc]
        uncertainty = model_outputs["uncertainty"][0]
        refused = {"abstain": bool(model_outputs["abstain"][0])} if "abstain" in model_outputs else {}
        left = model_outputs["logits"][0].argsort(descending=True).tolist()  # entries go from the highest score down
        names = self.model.config.id2label
        for entry in result if isinstance(result, list) else [result]:
            index = next(index for index in left if names[index] == entry["label"])  # two labels may share a name
            left.remove(index)
            of_entry = uncertainty if uncertainty.dim() == 1 else uncertainty[index]
            entry.update(uncertainty=result_of(of_entry), **refused)
        return result

    def _named(self, function: str) -> Any:
        """As the kind's own `postprocess` takes it."""
        return function


def _first(values: Any) -> Any:
    return values[0] if isinstance(values, list) else values


def _function(problem: str | None) -> str:
    """What transformers applies to the logits of a head."""
    likelihood = get_likelihood(problem or "single_label_classification")
    return "none" if likelihood.has_noise else "sigmoid" if likelihood.is_bernoulli else "softmax"


def scores_as_logits(predictive: Predictive) -> Tensor:
    """Logits whose softmax, or sigmoid, are the averaged probabilities; of a regression the mean. (B, C) or (B, L)."""
    likelihood = get_likelihood(predictive.problem_type)
    if likelihood.has_noise:
        mean = predictive.mean
        return mean[:, None] if mean.dim() == 1 else mean
    log_probs = predictive.mean_log_probs
    return log_probs[..., 1] - log_probs[..., 0] if likelihood.is_bernoulli else log_probs


def raw_scores(predictive: Predictive) -> Tensor:
    """The averaged logits, or a regression's mean, (B, C)."""
    has_noise = get_likelihood(predictive.problem_type).has_noise
    return scores_as_logits(predictive) if has_noise else predictive.mean_logits


class BayesianTextClassificationPipeline(_Classification, TextClassificationPipeline):
    """Of texts, or pairs of texts: one class, several labels, or a number."""

    heads = heads_of(auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES)

    def _named(self, function: str) -> Any:
        from transformers.pipelines.text_classification import ClassificationFunction

        return ClassificationFunction(function)


class BayesianImageClassificationPipeline(_Classification, ImageClassificationPipeline):
    """Of images."""

    heads = heads_of(auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES)

    def _named(self, function: str) -> Any:
        from transformers.pipelines.image_classification import ClassificationFunction

        return ClassificationFunction(function)


class BayesianAudioClassificationPipeline(_Classification, AudioClassificationPipeline):
    """Of sounds."""

    heads = heads_of(auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES)
