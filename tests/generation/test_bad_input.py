"""Bad input of `generate`: one clear error each, and the model left as it is."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
import transformers as hf
from torch import nn

from bayeformers import VariationalPosterior, fixed_draw, generate, to_bayesian
from bayeformers.generation import score_sequences, semantic_entropy
from bayeformers.posteriors import MixturePosterior, PointPosterior, TemperaturePosterior
from tests.cases import case
from tests.generation.models import bayesian_lora, plain, prompt
from tests.generation.test_agreement import Letters

MODEL = bayesian_lora("llama")
CASES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no mixing of that name": ({"mixing": "mean"}, ValueError, "`mixing` must be one of .*, got 'mean'"),
    "mixing of another kind": ({"mixing": None}, ValueError, "`mixing` must be one of"),
    "no draws": ({"num_samples": 0}, ValueError, "`num_samples` must be a whole number >= 1, got 0"),
    "a half draw": ({"num_samples": 2.5}, ValueError, "`num_samples` must be a whole number >= 1, got 2.5"),
    "more draws than memory": ({"num_samples": 10**12}, ValueError, "`num_samples`"),
    "negative seed": ({"seed": -1}, ValueError, "`seed` must be a whole number >= 0, got -1"),
    "seed of another kind": ({"seed": "a"}, TypeError, "`seed` must be a whole number, got 'a'"),
    "no tokenizer for texts": ({"inputs": "hello"}, ValueError, "need a `tokenizer`"),
    "no inputs": ({"inputs": {}}, ValueError, "`inputs`"),
    "inputs of another kind": ({"inputs": 3}, TypeError, "`inputs` must be a mapping"),
    "a tuple of tensors": ({"inputs": (torch.ones(1, 2).long(),)}, TypeError, "`inputs` must be a mapping"),
    "ids that are no whole numbers": ({"inputs": torch.ones(1, 3)}, TypeError, "whole numbers"),
    "ids of one axis": ({"inputs": torch.ones(3).long()}, ValueError, r"shape \(B, T\), got \(3,\)"),
    "an id beyond the vocabulary": ({"inputs": torch.full((1, 3), 99)}, ValueError, "vocabulary of 13"),
    "an empty batch": ({"inputs": torch.ones(0, 3).long()}, ValueError, "the batch is empty"),
    "a list of ids": ({"inputs": {"input_ids": [[3, 4]]}}, TypeError, "must be a tensor"),
    "padding at the end": (
        {"inputs": {"input_ids": torch.ones(1, 3).long(), "attention_mask": torch.tensor([[1, 1, 0]])}},
        ValueError, "padding on the left",
    ),
    "a mask of another shape": (
        {"inputs": {"input_ids": torch.ones(1, 3).long(), "attention_mask": torch.ones(1, 4).long()}},
        ValueError, r"shape of `input_ids` \(1, 3\), got \(1, 4\)",
    ),
    "a cache": ({"inputs": prompt() | {"past_key_values": hf.DynamicCache()}}, ValueError, "past_key_values"),
    "an argument of the model": ({"input_ids": torch.ones(1, 3).long()}, ValueError, "`input_ids`.* in `inputs`"),
    "a mask among the options": ({"attention_mask": torch.ones(1, 3)}, ValueError, "`attention_mask`.* in `inputs`"),
    "transformers' result": ({"return_dict_in_generate": True}, ValueError, "fields of its own"),
    "transformers' scores": ({"output_scores": True}, ValueError, "fields of its own"),
    "an assistant": ({"assistant_model": MODEL}, ValueError, "`assistant_model`"),
    "prompt lookup": ({"prompt_lookup_num_tokens": 3}, ValueError, "`prompt_lookup_num_tokens`"),
    "another decoding": ({"custom_generate": "repo"}, ValueError, "`custom_generate`"),
    "a cache among the options": ({"past_key_values": hf.DynamicCache()}, ValueError, "cache of its own"),
    "a cache that is paged": ({"cache_implementation": "paged"}, ValueError, "`cache_implementation`"),
    "prefill in chunks": ({"prefill_chunk_size": 2}, ValueError, "`prefill_chunk_size`"),
    "a streamer of several answers": ({"streamer": hf.TextStreamer(Letters())}, ValueError, "`streamer` .* one answer"),  # type: ignore[arg-type]
    "an option that is none": ({"max_new_token": 3}, ValueError, "max_new_token"),
    "no new tokens": ({"max_new_tokens": 0}, ValueError, "max_new_tokens"),
    "more sequences than beams": ({"num_beams": 2, "num_return_sequences": 3}, ValueError, "num_return_sequences"),
    "equal greedy sequences": ({"num_return_sequences": 2, "do_sample": False}, ValueError, "num_return_sequences"),
    "equivalence without texts": ({"equivalent": lambda a, b: True}, ValueError, "`equivalent` .* `tokenizer`"),
    "equivalence that cannot be asked": ({"equivalent": 3, "tokenizer": Letters()}, TypeError, "`equivalent`"),
    "equivalence of one answer": (
        {"equivalent": lambda a, b: True, "tokenizer": Letters(), "mixing": "average"}, ValueError, "several answers",
    ),
    "a tokenizer that is none": ({"tokenizer": "bert"}, TypeError, "`tokenizer`"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_bad_input(name: str) -> None:
    changed, error, message = CASES[name]
    before = [parameter._version for parameter in MODEL.parameters()]
    options = {"inputs": prompt(), "max_new_tokens": 3} | changed
    with pytest.raises(error, match=message):
        generate(MODEL, options.pop("inputs"), **options)
    assert before == [parameter._version for parameter in MODEL.parameters()]
    assert not any("forward" in vars(module) for module in MODEL.modules())


def classifier() -> Any:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    return hf.BertForSequenceClassification(hf.BertConfig(vocab_size=9, **sizes))


def test_models_that_cannot_generate() -> None:
    batch = {"input_ids": torch.ones(1, 3).long()}
    for model in (classifier(), nn.Linear(2, 2), PointPosterior(classifier())):
        with pytest.raises(ValueError, match="language-model head"):
            generate(model, batch)
    with pytest.raises(ValueError, match="WhisperForConditionalGeneration has a `generate` of its own"):
        generate(case("whisper").build(), batch)
    with pytest.raises(TypeError, match="must be a torch.nn.Module or a Posterior"):
        generate("gpt2", batch)  # type: ignore[arg-type]


def test_posteriors_that_change_predictions() -> None:
    model = plain("llama")
    for posterior in (
        TemperaturePosterior(PointPosterior(model), "scalar", weight=2.0),
        MixturePosterior([PointPosterior(model), PointPosterior(model)]),
    ):
        with pytest.raises(ValueError, match="changes predictions, not weights"):
            generate(posterior, prompt())


@pytest.mark.parametrize("kind", [peft.PromptTuningConfig, peft.PrefixTuningConfig])
def test_prompts_that_are_made_outside_of_the_model(kind: Any) -> None:
    """PEFT makes them before the forward: an average would take the mean prompt for every draw."""
    settings = kind(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model = to_bayesian(peft.get_peft_model(plain("llama").float(), settings)).eval()
    with pytest.raises(ValueError, match="prompt and prefix tuning"):
        generate(model, prompt(), mixing="average", max_new_tokens=2)
    found = generate(model, prompt(), num_samples=2, max_new_tokens=2)
    for index, answer in enumerate(found.sequences):
        with fixed_draw(model, index):
            expected = model.generate(**prompt(), max_new_tokens=2)
        assert torch.equal(answer[:, : expected.shape[1]], expected)


def test_scores_of_bad_sequences() -> None:
    posterior, inputs = VariationalPosterior(MODEL), prompt()
    sequences = torch.ones(2, 7).long()
    for changed, message in (
        ({"prompt_length": 0}, "`prompt_length`"),
        ({"prompt_length": 9}, "`prompt_length`"),
        ({"num_samples": 0}, "`num_samples`"),
        ({"sequences": torch.ones(3, 7).long()}, "`sequences`"),
        ({"sequences": torch.ones(7).long()}, "`sequences`"),
    ):
        options: Any = {"sequences": sequences, "inputs": inputs, "prompt_length": 5} | changed
        with pytest.raises(ValueError, match=message):
            score_sequences(posterior, **options)
    with pytest.raises(ValueError, match="`log_probs`"):
        semantic_entropy([0, 1], torch.zeros(3))
