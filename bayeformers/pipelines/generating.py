"""Pipelines that write texts: transformers' own, whose tokens come from the networks of a posterior.

transformers prepares the inputs, calls its model's ``generate`` and makes the results. What it calls here is
`bayeformers.generate`, which says how sure the posterior is of what it wrote.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sized
from typing import Any, get_args

import torch
from torch import Tensor, nn
from transformers.models.auto import modeling_auto as auto
from transformers.pipelines.any_to_any import AnyToAnyPipeline
from transformers.pipelines.image_text_to_text import ImageTextToTextPipeline
from transformers.pipelines.text_generation import TextGenerationPipeline

from ..checks import check_choice
from ..generation import SEQUENCE_SCORES, Generation, generate
from ..generation.generate import Mixing
from ..generation.networks import rows_of
from ..generation.resolve import posterior_of
from ..posteriors import Posterior
from .base import BayesianPipelineMixin, heads_of, result_of
from .text2text import Text2TextGenerationPipeline

__all__ = [
    "BayesianAnyToAnyPipeline", "BayesianGenerationMixin", "BayesianImageTextToTextPipeline",
    "BayesianText2TextGenerationPipeline", "BayesianTextGenerationPipeline",
]  # fmt: skip

NUM_SAMPLES = 8
"""Draws of a text, as of `generate`: each writes, or reads, every token."""
_DETAILS = ("uncertainty", "sequence_score", "agreement", "abstain", "token_ids", "token_mask", "token_parts")


class BayesianGenerationMixin(BayesianPipelineMixin):
    """A pipeline that writes, beside transformers' class of the task.

    Each result gains ``uncertainty``, the means over its tokens of ``total``, ``aleatoric`` and ``epistemic`` in nats;
    ``sequence_score``, the log-probability of the text by what wrote it; ``agreement`` where an input has several
    answers; ``abstain`` where a policy is set; and ``token_uncertainty`` where it is asked for.

    Calls, and the pipeline itself, take what transformers' takes and

    * ``mixing``: "average" (the default): one answer, each token from the mean of the networks; "draws": S answers, the
      draws' own, one after the other in an input's results;
    * ``token_uncertainty``: True: the same three numbers and ``log_prob`` token by token.
    """

    scores_are_of = "texts"

    def __init__(
        self,
        *,
        posterior: Posterior,
        num_samples: int | None = None,
        method: str | None = None,
        abstention: Any = None,
        **kwargs: Any,
    ) -> None:
        if kwargs.get("assistant_model") is not None:
            raise ValueError("`assistant_model` cannot be given: its drafts are of no draw of the posterior.")
        _check_method(method)
        _check_policy(abstention)
        if num_samples is None and getattr(abstention, "num_samples", None) is None:
            num_samples = NUM_SAMPLES
        super().__init__(
            posterior=posterior, num_samples=num_samples, method=None, abstention=abstention, **kwargs
        )  # fmt: skip
        posterior_of(posterior)  # it generates, or says why not

    def _sanitize_parameters(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        own = {name: kwargs.pop(name, None) for name in ("mixing", "token_uncertainty")}
        own = {name: value for name, value in own.items() if value is not None}
        _check_method(kwargs.pop("method", None))
        check_choice("mixing", own.get("mixing", "average"), get_args(Mixing))
        if not isinstance(own.get("token_uncertainty", False), bool):
            raise TypeError(f"`token_uncertainty` must be True or False, got {own['token_uncertainty']!r}.")
        inputs, forward, results = super()._sanitize_parameters(**kwargs)
        return inputs, {**forward, **own}, results

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers' pipeline of the task.

        Args:
            args: as there.
            kwargs: as there, and ``num_samples``, ``seed``, ``mixing`` and ``token_uncertainty``.

        Returns:
            What transformers' pipeline returns, one list of results for each input.

        Raises:
            ValueError: there is no input.
        """
        for value in (*args, kwargs.get("text_inputs"), kwargs.get("text"), kwargs.get("images")):
            if isinstance(value, Sized) and not isinstance(value, (str, Mapping)) and len(value) == 0:
                raise ValueError(f"`inputs` must hold at least one input, got {type(value).__name__} of 0.")
        return super(BayesianPipelineMixin, self).__call__(*args, **kwargs)  # type: ignore[misc]

    def _forward(
        self,
        model_inputs: Any,
        num_samples: int | None = None,
        seed: int | None = None,
        mixing: Mixing = "average",
        token_uncertainty: bool = False,
        **options: Any,
    ) -> dict[str, Any]:
        """Transformers' outputs of B inputs with k answers each, and of each answer the details, (B, k, ...)."""
        writer = _Writer(
            self.model, frozenset(model_inputs), self.posterior, mixing=mixing,
            num_samples=self.num_samples if num_samples is None else num_samples,
            seed=self.seed if seed is None else seed,
        )  # fmt: skip
        writing: Any = copy.copy(self)  # another thread's call has a writer of its own
        writing.model = writer
        outputs: dict[str, Any] = super(BayesianGenerationMixin, writing)._forward(model_inputs, **options)  # type: ignore[misc]
        return {**outputs, **self._details(writer, token_uncertainty)}

    def _details(self, writer: _Writer, with_tokens: bool) -> dict[str, Tensor]:
        found, per_input = writer.found, writer.per_input
        lengths = found.mask.sum(-1, keepdim=True).clamp_min(1)
        parts = torch.stack([found.total, found.aleatoric, found.epistemic], -1) * found.mask[..., None]
        details = {
            "uncertainty": per_input(parts.sum(-2) / lengths),
            "sequence_score": per_input(found.sequence_log_prob),
        }
        if found.agreement is not None:
            details["agreement"] = per_input(found.score("agreement"))
        if self.abstention is not None:
            details["abstain"] = self.abstention.abstain(per_input(found.score(self.abstention.score)))
        if with_tokens:
            details["token_ids"] = per_input(found.sequences[..., found.prompt_length :])
            details["token_mask"] = per_input(found.mask)
            details["token_parts"] = per_input(torch.cat([parts, found.token_scores.own[..., None]], -1))
        return details

    def postprocess(self, model_outputs: Any, **kwargs: Any) -> Any:
        """Transformers' results, one for each answer, with what is known of it."""
        outputs = dict(model_outputs)
        details = {name: outputs.pop(name).flatten(0, 1) for name in _DETAILS if name in outputs}
        records = super().postprocess(outputs, **kwargs)  # type: ignore[misc]
        for place, record in enumerate(records):
            record.update(self._described({name: values[place] for name, values in details.items()}))
        return records

    def _described(self, details: Mapping[str, Tensor]) -> dict[str, Any]:
        found: dict[str, Any] = {"uncertainty": result_of(details["uncertainty"])}
        found |= {name: float(details[name]) for name in ("sequence_score", "agreement") if name in details}
        if "abstain" in details:
            found["abstain"] = bool(details["abstain"])
        if "token_ids" in details:
            is_text = details["token_mask"].bool()
            total, aleatoric, epistemic, log_prob = details["token_parts"][is_text].T.tolist()
            found["token_uncertainty"] = {
                "tokens": self.tokenizer.convert_ids_to_tokens(details["token_ids"][is_text].tolist()),
                "total": total, "aleatoric": aleatoric, "epistemic": epistemic, "log_prob": log_prob,
            }  # fmt: skip
        return found


class _Writer:
    """Stands in for the model of a pipeline during one batch: what it generates is the posterior's.

    Args:
        model: for which it stands in, in all but its ``generate``.
        names: of the model's inputs among the arguments.
        posterior: who writes.
        options: of `bayeformers.generate`.
    """

    def __init__(self, model: nn.Module, names: frozenset[str], posterior: Posterior, **options: Any) -> None:
        self._model, self._names, self._posterior, self._options = model, names, posterior, options
        self.found: Generation

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def generate(self, **arguments: Any) -> Tensor:
        """Return sequences (B * k, T), those of an input together, and keep what is known of them in ``found``."""
        inputs = {name: value for name, value in arguments.items() if name in self._names and value is not None}
        options = {name: value for name, value in arguments.items() if name not in self._names}
        if options.get("return_dict_in_generate") is False:  # which is what `generate` gives
            del options["return_dict_in_generate"]
        if not inputs:
            inputs = self._of_nothing(options)
        self._size = rows_of(inputs)
        self.found = generate(self._posterior, inputs, **self._options, **options)
        return self.per_input(self.found.sequences).flatten(0, 1)

    def per_input(self, values: Tensor) -> Tensor:
        """What stands in the leading axes (S, R) or (R,) of a generation, by input: (B, k, ...)."""
        if self.found.mixing == "average":
            return values.reshape(self._size, -1, *values.shape[1:])
        draws, size, rest = len(values), self._size, values.shape[2:]
        return values.reshape(draws, size, -1, *rest).movedim(1, 0).flatten(1, 2)

    def _of_nothing(self, options: Mapping[str, Any]) -> dict[str, Tensor]:
        """An empty prompt: the token that begins a text, as transformers takes it."""
        settings = (options.get("generation_config"), self._model.generation_config)
        known = [options.get("bos_token_id"), *(getattr(one, "bos_token_id", None) for one in settings)]
        first = next((token for token in known if token is not None), None)
        if first is None:
            raise ValueError("The prompt is empty, and the model has no `bos_token_id` to begin with: give it a text.")
        ids = torch.full((1, 1), int(first), device=getattr(self._model, "device", None))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _check_method(method: str | None) -> None:
    if method not in (None, "sample"):
        raise ValueError(
            f"`method` of a pipeline that writes must be 'sample' or None, got {method!r}: its tokens come from drawn "
            "networks."
        )


def _check_policy(policy: Any) -> None:
    if policy is None:
        return
    if policy.score not in SEQUENCE_SCORES:
        raise ValueError(
            f"`abstention` of a pipeline that writes must go by one of {SEQUENCE_SCORES}, got a policy by "
            f"{policy.score!r}: fit one to such scores of texts, or pass `abstention=False`."
        )
    if getattr(policy, "groups", None) is not None:
        raise ValueError("`abstention` must be a policy without groups: a pipeline is not told its inputs' groups.")


class BayesianTextGenerationPipeline(BayesianGenerationMixin, TextGenerationPipeline):
    """Of prompts and chats: a decoder goes on with them."""

    heads = heads_of(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


class BayesianText2TextGenerationPipeline(BayesianGenerationMixin, Text2TextGenerationPipeline):
    """Of texts: an encoder reads one, a decoder writes another, as transformers 4 had it."""

    stands_for = "text-generation"
    heads = heads_of(auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES)


class BayesianImageTextToTextPipeline(BayesianGenerationMixin, ImageTextToTextPipeline):
    """Of images with a text, or chats about them."""

    stands_for = "image-text-to-text"
    heads = heads_of(auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)


class BayesianAnyToAnyPipeline(BayesianGenerationMixin, AnyToAnyPipeline):
    """Of texts, images, sounds and videos: what is written is text."""

    heads = heads_of(auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES)

    def _sanitize_parameters(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        if kwargs.get("generation_mode") not in (None, "text"):
            raise ValueError(
                f"`generation_mode` must be 'text', got {kwargs['generation_mode']!r}: the uncertainty is a text's."
            )
        return super()._sanitize_parameters(**kwargs)
