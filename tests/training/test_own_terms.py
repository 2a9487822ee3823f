"""Terms that a model's own loss holds besides the likelihood are trained along; labels and sums that would vanish."""

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn
from transformers.utils import ModelOutput

from bayeformers import fixed_draw, kl_divergence, to_bayesian
from bayeformers import nn as bnn
from bayeformers.training.own_terms import has_own_terms, own_terms
from tests.training import tiny
from tests.training.steps import LiveGradients

SMALL = {
    "vocab_size": tiny.VOCABULARY, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 16, "initializer_range": 0.3,
}  # fmt: skip


def mixtral(**kwargs: Any) -> nn.Module:
    config = hf.MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2, **kwargs)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return hf.MixtralForCausalLM(config)


class ClassWeights(hf.BertForSequenceClassification):
    """A model whose own loss is weighted."""

    def forward(self, labels: Tensor | None = None, **inputs: Any) -> Any:  # type: ignore[override]
        outputs = super().forward(**inputs)
        if labels is not None:
            outputs.loss = F.cross_entropy(outputs.logits, labels, torch.tensor([1.0, 5.0, 9.0]))
        return outputs


def class_weights() -> nn.Module:
    torch.manual_seed(0)
    return ClassWeights(tiny.plain().config)


def segmenter(name: str, auxiliary: bool = True) -> nn.Module:
    """Logits are upsampled to the labels, by BEiT and DPT in the loss and by UperNet in the forward."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 16}
    kwargs = {"num_labels": 3, "use_auxiliary_head": auxiliary}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if name == "upernet":
            stages = [f"stage{i}" for i in range(1, 5)]
            backbone = hf.ConvNextConfig(hidden_sizes=[8] * 4, depths=[1] * 4, out_features=stages)
            small = {"hidden_size": 8, "pool_scales": [1, 2], "auxiliary_channels": 8, "auxiliary_in_channels": 8}
            return hf.UperNetForSemanticSegmentation(hf.UperNetConfig(backbone_config=backbone, **small, **kwargs))
        images = {"image_size": 32, "patch_size": 8, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        if name == "beit":
            small = {"out_indices": [1, 2, 3, 4], "auxiliary_channels": 8, "pool_scales": [1, 2], "drop_path_rate": 0.0}
            return hf.BeitForSemanticSegmentation(hf.BeitConfig(**sizes, **images, **small, **kwargs))
        small = {
            "backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [8] * 4, "fusion_hidden_size": 8,
            "semantic_classifier_dropout": 0.0, "is_hybrid": False,
        }  # fmt: skip
        model = hf.DPTForSemanticSegmentation(hf.DPTConfig(**sizes, **images, **small, **kwargs))
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0  # the auxiliary head's has no setting
        return model


def images(kind: str, num_examples: int = 4) -> tiny.Rows:
    """Images with a class per pixel, a third of them without one."""
    generator = torch.Generator().manual_seed(0)
    size = 64 if kind == "upernet" else 32
    labels = torch.randint(0, 3, (num_examples, size, size), generator=generator)
    labels = labels.masked_fill(torch.rand(labels.shape, generator=generator) < 0.3, 255)
    return tiny.Rows(pixel_values=torch.randn(num_examples, 3, size, size, generator=generator), labels=labels)


class WeightedSpan(hf.BertForQuestionAnswering):
    """A model whose own loss holds a term besides the span's."""

    def forward(self, start_positions: Tensor | None = None, **inputs: Any) -> Any:  # type: ignore[override]
        outputs = super().forward(start_positions=start_positions, **inputs)
        if start_positions is not None:
            outputs.loss = outputs.loss + outputs.start_logits.square().mean()
        return outputs


def weighted_span() -> nn.Module:
    torch.manual_seed(0)
    return WeightedSpan(tiny.plain("question").config)


CASES = {
    "mixtral": (lambda: mixtral(output_router_logits=True, router_aux_loss_coef=10.0), "causal"),
    "class weights": (class_weights, "single"),
    "beit": (lambda: segmenter("beit"), "beit"),
    "upernet": (lambda: segmenter("upernet"), "upernet"),
    "dpt": (lambda: segmenter("dpt"), "dpt"),
}


@pytest.mark.parametrize("name", CASES)
def test_the_gradient_is_that_of_the_models_own_loss_and_the_kl(name: str, tmp_path: Path) -> None:
    """One step over four rows at a held draw: own loss + KL / N by autograd, all parameters as one vector."""
    build, kind = CASES[name]
    model, record = to_bayesian(build(), freeze=False), LiveGradients()
    data = images(kind) if kind == name else tiny.dataset(kind, 4)
    trainer = tiny.trainer(
        tmp_path, model, train_dataset=data, callbacks=[record], max_steps=1, max_grad_norm=0.0, num_training_items=10,
        train_sampling_strategy="sequential", remove_unused_columns=False,
    )  # fmt: skip
    with fixed_draw(model, 1):
        trainer.train()
    direct = to_bayesian(build(), freeze=False).train()
    with fixed_draw(direct, 1):
        loss = direct(**data.columns).loss
    (loss + kl_divergence(direct) / 10).backward()
    grads = {name: p.grad for name, p in direct.named_parameters() if p.grad is not None}
    means = torch.cat([grads[name].flatten() for name in sorted(grads) if not name.endswith("rho")])
    torch.testing.assert_close(record.steps[0]["means"], means, rtol=1e-3, atol=1e-5)
    entry = trainer.state.log_history[0]
    assert entry["loss"] == pytest.approx(entry["nll"] + entry["kl"] / 10 + entry["own_terms"], rel=1e-5)
    assert entry["loss"] == pytest.approx((loss + kl_divergence(direct) / 10).item(), rel=1e-3)
    assert abs(entry["own_terms"]) > 0.1


def test_a_spans_own_terms_are_what_its_mean_leaves() -> None:
    """Padding competes in the heads' own loss, and a position outside the text is left out of its mean."""
    data = tiny.dataset("question", 6).columns
    data["start_positions"][0], data["end_positions"][0], data["end_positions"][1] = 99, 99, -1
    plain, model = tiny.plain("question"), weighted_span()
    assert not has_own_terms(plain, data, data, "question_answering")
    assert has_own_terms(model, data, data, "question_answering")
    outputs = model.eval()(**data)
    found = own_terms(outputs, data, "question_answering")
    torch.testing.assert_close(found, outputs.start_logits.square().mean())


@pytest.mark.parametrize("name", ["beit", "upernet", "dpt"])
def test_segmentation_without_an_auxiliary_head_has_none(name: str) -> None:
    model, batch = segmenter(name, auxiliary=False), images(name).columns
    assert not has_own_terms(model, batch, batch, "semantic_segmentation")
    assert has_own_terms(segmenter(name), batch, batch, "semantic_segmentation")


def test_a_micro_batch_without_labels_leaves_the_others_theirs(tmp_path: Path) -> None:
    """The own loss of an image without a labelled pixel is a mean over nothing: NaN."""
    data = images("beit")
    data.columns["labels"][2:] = 255
    trainer = tiny.trainer(
        tmp_path, to_bayesian(segmenter("beit")), train_dataset=data, per_device_train_batch_size=2, max_steps=1,
        gradient_accumulation_steps=2, train_sampling_strategy="sequential",
    )  # fmt: skip
    trainer.train()
    entry = trainer.state.log_history[0]
    assert math.isfinite(entry["loss"]) and entry["own_terms"] > 0.1


def test_vilts_loss_is_the_likelihood(tmp_path: Path) -> None:
    """It multiplies the mean over an example's labels by their number, which is the sum."""
    config = hf.ViltConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32, patch_size=8,
        vocab_size=30, num_labels=5, max_position_embeddings=16, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = to_bayesian(hf.ViltForQuestionAnswering(config), freeze=False)
    ids, pixels, scores = torch.randint(2, 30, (4, 6)), torch.randn(4, 3, 32, 32), torch.rand(4, 5)
    data = tiny.Rows(input_ids=ids, pixel_values=pixels, labels=scores)
    trainer = tiny.trainer(tmp_path, model, train_dataset=data, max_steps=1)
    with fixed_draw(model, 1):
        expected = model(**data.columns).loss.item()
        trainer.train()
    entry = trainer.state.log_history[0]
    assert "own_terms" not in entry
    assert entry["nll"] == pytest.approx(expected, rel=1e-5)
    assert entry["loss"] == pytest.approx(expected + entry["kl"] / 4, rel=1e-5)


def test_evaluation_is_the_likelihood_alone(tmp_path: Path) -> None:
    data = tiny.dataset("causal", 4)
    with_terms, without = (
        tiny.trainer(tmp_path, to_bayesian(mixtral(output_router_logits=flag, router_aux_loss_coef=10.0)), "causal")
        for flag in (True, False)
    )
    assert with_terms.evaluate(data)["eval_loss"] == pytest.approx(without.evaluate(data)["eval_loss"], rel=1e-5)


@pytest.mark.parametrize("kind", ["single", "multi", "regression", "token", "masked", "causal", "llama", "seq2seq"])
def test_ordinary_heads_have_none(kind: str) -> None:
    """Their own loss is the plain mean, of which nothing is left; otherwise every step would compute it again."""
    model = tiny.plain(kind)
    batch = tiny.dataset("causal" if kind == "llama" else kind, 6).columns
    from bayeformers.likelihoods import resolve_problem_type

    problem = resolve_problem_type(model, batch["labels"])
    assert not has_own_terms(model, batch, batch, problem)
    assert not has_own_terms(model.to(torch.bfloat16), batch, batch, problem)


def test_labels_that_are_not_shifted_are_no_other_term() -> None:
    """BART's decoder alone, and TrOCR's, Whisper's, Marian's, ...: the same likelihood at other positions."""
    config = hf.BartConfig(
        vocab_size=tiny.VOCABULARY, d_model=16, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=16,
        max_position_embeddings=16, init_std=0.3,
    )  # fmt: skip
    model, batch = hf.BartForCausalLM(config), tiny.dataset("causal", 4).columns
    assert not has_own_terms(model, batch, batch, "causal_lm")


def test_the_trial_leaves_modes_and_generators_alone() -> None:
    model, batch = to_bayesian(mixtral(output_router_logits=True)).train(), tiny.dataset("causal", 4).columns
    model.lm_head.eval()
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    assert has_own_terms(model, batch, batch, "causal_lm")
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


# -- labels ----------------------------------------------------------------------------------------------------------


class Targets(nn.Module):
    """A head whose labels have a name of their own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = hf.PretrainedConfig(num_labels=3, problem_type="single_label_classification")
        self.table, self.head = bnn.Embedding(tiny.VOCABULARY, 8), bnn.Linear(8, 3)

    def forward(self, input_ids: Tensor, targets: Tensor | None = None) -> ModelOutput:
        return ModelOutput(logits=self.head(self.table(input_ids).mean(1)))


def test_label_names_are_honoured(tmp_path: Path) -> None:
    data = tiny.dataset("single", 8)
    renamed = tiny.Rows(input_ids=data.columns["input_ids"], targets=data.columns["labels"])
    trainer = tiny.trainer(
        tmp_path, Targets(), label_names=["targets"], train_dataset=renamed, eval_dataset=renamed, max_steps=1
    )
    trainer.train()
    assert trainer.state.log_history[0]["nll"] > 0
    output = trainer.predict(renamed)
    assert output.label_ids.tolist() == data.columns["labels"].tolist()
    chosen = output.predictions[range(8), data.columns["labels"].numpy()]
    assert output.metrics["test_nll"] == pytest.approx(-chosen.mean(), rel=1e-5)


def test_several_label_names_of_one_likelihood(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`label_names` must name one label"):
        tiny.trainer(tmp_path, label_names=["labels_a", "labels_b"]).train()


def none_of(kind: str) -> tiny.Rows:
    data = tiny.dataset(kind, 8)
    data.columns["labels"] = torch.full_like(data.columns["labels"], -100)
    return data


@pytest.mark.parametrize("kind", ["token", "causal", "single"])
def test_no_label_that_counts_has_no_loss(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As the stock Trainer: NaN. It was 0.0, the best loss that there is."""
    trainer = tiny.trainer(tmp_path, kind=kind, eval_dataset=none_of(kind))
    with caplog.at_level(logging.WARNING):
        found = trainer.evaluate()
    assert math.isnan(found["eval_loss"]) and math.isnan(found["eval_nll"])
    assert sum("No label of the evaluated data counts" in record.message for record in caplog.records) == 1


def test_no_label_wins_no_best_model(tmp_path: Path) -> None:
    trainer = tiny.trainer(
        tmp_path, kind="token", eval_dataset=none_of("token"), eval_strategy="steps", eval_steps=1,
        save_strategy="steps", save_steps=1, metric_for_best_model="loss", max_steps=1,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_global_step is None and not trainer.state.best_metric < 1e9


# -- auto_find_batch_size --------------------------------------------------------------------------------------------


def test_smaller_batches_begin_anew(tmp_path: Path) -> None:
    """Out of memory at the third micro-batch: the logs are those of the training that goes on."""
    model, calls = tiny.bayesian(freeze=True), []

    def fail_once(*_: Any) -> None:
        calls.append(0)
        if len(calls) == 3:
            raise RuntimeError("CUDA out of memory.")

    model.classifier.register_forward_hook(fail_once)
    trainer = tiny.trainer(
        tmp_path, model, auto_find_batch_size=True, gradient_accumulation_steps=2, per_device_train_batch_size=8,
        max_steps=1, num_training_items=1000,
    )  # fmt: skip
    hooks = [len(module._forward_hooks) for module in model.modules()]
    expected = kl_divergence(model).item()
    trainer.train()
    entry = next(entry for entry in trainer.state.log_history if "nll" in entry)
    assert entry["kl"] == pytest.approx(expected, rel=0.05)
    assert entry["loss"] == pytest.approx(entry["nll"] + entry["kl"] / 1000, rel=1e-4)
    assert [len(module._forward_hooks) for module in model.modules()] == hooks


# -- 16 bits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "freeze", "rate", "warns"),
    [
        (torch.bfloat16, False, 2e-5, True),
        (torch.bfloat16, False, 10.0, False),
        (torch.bfloat16, True, 2e-5, False),
        (torch.float32, False, 2e-5, False),
    ],
)
def test_steps_that_16_bits_lose_are_said(
    dtype: torch.dtype, freeze: bool, rate: float, warns: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = to_bayesian(tiny.plain().to(dtype), freeze=freeze)
    with caplog.at_level(logging.WARNING):
        trainer = tiny.trainer(tmp_path, model, learning_rate=rate, max_steps=1)
        trainer.train()
    said = [record.message for record in caplog.records if "leaves" in record.message]
    assert len(said) == warns
    if warns:
        assert "torch.bfloat16" in said[0] and "dtype=torch.float32" in said[0]


def test_the_share_is_what_adam_leaves_unmoved() -> None:
    """Against one step of the optimizer itself, at a constant gradient."""
    from bayeformers.training.records import lost_steps

    layer = to_bayesian(nn.Linear(200, 100).to(torch.bfloat16), freeze=False)
    before = layer.weight.detach().clone()
    share, dtype = lost_steps(layer, 2e-4)
    layer.weight.grad, layer.bias.grad = torch.ones_like(layer.weight), torch.ones_like(layer.bias)
    torch.optim.SGD([layer.weight, layer.bias], lr=2e-4).step()
    assert dtype == torch.bfloat16
    assert share == pytest.approx(float((layer.weight == before).float().mean()), abs=0.03)
