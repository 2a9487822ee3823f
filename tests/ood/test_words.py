"""What each word adds to the epistemic part: against predictions made one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, BertForTokenClassification, PreTrainedTokenizerFast

from bayeformers import predict, to_bayesian
from bayeformers.ood import word_attributions

WORDS = "the cat sat on a mat dogs bark".split()
SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}


def make_tokenizer() -> Any:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*SPECIAL.values(), *WORDS])}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    pair = "[CLS] $A [SEP] $B [SEP]"
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", pair, [("[CLS]", 2), ("[SEP]", 3)])
    names = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=names, **SPECIAL)


def make_model(kind: Any = BertForSequenceClassification, *, labels: int = 3) -> Any:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=12,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        num_labels=labels,
        initializer_range=1.0,
    )
    return kind(config).double().eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture(scope="module")
def model() -> Any:
    return to_bayesian(make_model(), delta=1.0)


def epistemic(model: Any, tokenizer: Any, *parts: str) -> float:
    inputs = dict(tokenizer(*([part] for part in parts), return_tensors="pt"))
    return predict(model, inputs, num_samples=5, seed=2).mutual_information.item()


def test_a_word_adds_what_the_text_loses_without_it(model: Any, tokenizer: Any) -> None:
    texts = ["the cat  sat", "bark", "dogs bark on the mat"]
    found = word_attributions(model, texts, tokenizer, num_samples=5, batch_size=4, seed=2)
    without = {"the ": "cat  sat", "cat  ": "the sat", "sat": "the cat"}
    whole = epistemic(model, tokenizer, texts[0])
    expected = {word: whole - epistemic(model, tokenizer, rest) for word, rest in without.items()}
    assert dict(found[0]) == pytest.approx(expected, abs=1e-9)
    assert any(abs(value) > 1e-3 for value in expected.values())
    assert found[1] == [("bark", pytest.approx(epistemic(model, tokenizer, "bark"), abs=1e-9))]
    assert "".join(word for word, _ in found[2]) == texts[2]


def test_two_texts_are_one_input(model: Any, tokenizer: Any) -> None:
    (found,) = word_attributions(model, [("the cat", "sat")], tokenizer, num_samples=5, seed=2)
    assert [word for word, _ in found] == ["the ", "cat", " | ", "sat"]
    whole = epistemic(model, tokenizer, "the cat", "sat")
    assert found[1][1] == pytest.approx(whole - epistemic(model, tokenizer, "the", "sat"), abs=1e-9)
    assert found[2][1] == 0.0
    assert found[3][1] == pytest.approx(whole - epistemic(model, tokenizer, "the cat", ""), abs=1e-9)


def test_a_regression_has_a_variance(tokenizer: Any) -> None:
    model = make_model(labels=1)
    model.config.problem_type = "regression"
    to_bayesian(model, delta=1.0)
    (found,) = word_attributions(model, ["the cat"], tokenizer, num_samples=5, seed=2)

    def variance(text: str) -> float:
        inputs = dict(tokenizer(text, return_tensors="pt"))
        return predict(model, inputs, num_samples=5, seed=2).epistemic_variance.item()

    assert found[0][1] == pytest.approx(variance("the cat") - variance("cat"), abs=1e-9)


def test_nothing_to_score(model: Any, tokenizer: Any) -> None:
    assert word_attributions(model, [], tokenizer) == []
    assert word_attributions(model, [""], tokenizer) == [[]]


def test_wrong_input(model: Any, tokenizer: Any) -> None:
    with pytest.raises(TypeError, match="`texts` must be a list of texts, got one text"):
        word_attributions(model, "the cat", tokenizer)
    with pytest.raises(TypeError, match="`texts` must hold texts or tuples of texts, got 3"):
        word_attributions(model, ["the cat", 3], tokenizer)  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"`texts` must be of one or of several texts each, all alike, got \[1, 2\]"):
        word_attributions(model, [("the cat", "sat"), "the cat"], tokenizer)
    with pytest.raises(ValueError, match=r"is a point estimate \(BertForSequenceClassification\)"):
        word_attributions(make_model(), ["the cat"], tokenizer)
    with pytest.raises(ValueError, match="must predict once per text"):
        word_attributions(to_bayesian(make_model(BertForTokenClassification)), ["the cat"], tokenizer)
    with pytest.raises(ValueError, match="`batch_size` must be"):
        word_attributions(model, ["the cat"], tokenizer, batch_size=0)
