"""PEFT's adapters: draws reach adapters of bare parameters, and merging never loses or changes a posterior silently."""

from __future__ import annotations

import contextlib
import copy
import pickle
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

from bayeformers import fixed_draw, is_bayesian, kl_divergence, posterior_mean, summary, to_bayesian, to_deterministic
from bayeformers import nn as bnn
from bayeformers.nn.draws import training_draw

peft = pytest.importorskip("peft")
IDS = {"input_ids": torch.tensor([[5, 6, 7, 8]])}
ADAPTERS = r".*lora_[AB]\.default"


def mixtral(**lora: Any) -> Any:
    torch.manual_seed(0)
    config = hf.MixtralConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    lora = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]} | lora
    base = hf.MixtralForCausalLM(config).eval()
    return peft.get_peft_model(base, peft.LoraConfig(init_lora_weights=False, r=2, **lora)).eval()


def bert(**lora: Any) -> Any:
    torch.manual_seed(0)
    config = hf.BertConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    options = {"target_modules": ["query"], "init_lora_weights": False, "r": 2} | lora
    base = hf.BertForSequenceClassification(config).eval()
    return peft.get_peft_model(base, peft.LoraConfig(**options)).eval()


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(**IDS).logits


@torch.no_grad()
def at_draw(plain: nn.Module, model: nn.Module, index: int) -> torch.Tensor:
    with fixed_draw(model, index):
        for tensor in bnn.variational_tensors(model):
            plain.get_parameter(tensor.name).copy_(tensor.module.variational(tensor.parameter_name).sample())
    return logits(plain)


@pytest.mark.parametrize("options", [{"target_modules": ADAPTERS}, {}])
def test_adapters_of_bare_parameters_draw(options: dict[str, Any]) -> None:
    """Their matrices, by default A, are read and never called; the experts that they adapt stay deterministic."""
    count = 2 if options else 1
    plain = mixtral()
    model = to_bayesian(mixtral(), delta=0.5, **options).eval()
    random = [tensor.name for tensor in summary(model).tensors]
    assert sum("experts.lora_" in name for name in random) == count and not any(
        n.endswith("gate_up_proj") for n in random
    )
    assert "target_parameters" in summary(model).skipped["base_model.model.model.layers.0.mlp.experts.base_layer"] or (
        options != {}
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for index in range(3):
        with fixed_draw(model, index):
            torch.testing.assert_close(logits(model), at_draw(copy.deepcopy(plain), model, index))
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    model.train()
    model(**IDS).logits.sum().backward()
    grads = {t.name: t.rho.grad for t in bnn.variational_tensors(model) if "experts.lora_" in t.name}
    assert len(grads) == count and all(g is not None and bool(g.abs().sum() > 0) for g in grads.values())


def test_adapting_converted_experts_is_refused_before_the_mean_is_lost() -> None:
    """PEFT would keep the draw in the Parameter's place."""
    base = to_bayesian(mixtral().unload(), delta=0.5)
    config = peft.LoraConfig(target_modules=[], target_parameters=["mlp.experts.gate_up_proj"], r=2)
    model = peft.get_peft_model(base, config).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for index in range(2):
        match = "gate_up_proj.*target_parameters.*before `to_bayesian`"
        with fixed_draw(model, index), pytest.raises(RuntimeError, match=match):
            logits(model)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    logits(model)  # the mean goes on


@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
@pytest.mark.parametrize("index", [None, 2])
def test_merging_gives_the_mean_or_the_held_draw(
    merge: str, index: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    """And one line says which, however many layers are merged."""
    model = to_bayesian(bert(target_modules=["query", "value"]), delta=0.5).eval()
    with contextlib.nullcontext() if index is None else fixed_draw(model, index):
        expected = logits(model)
        merged = getattr(model, merge)() or model
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=0)
    (told,) = [record.getMessage() for record in caplog.records if "merged at" in record.getMessage()]
    assert ("posterior mean" in told) if index is None else ("draw 2 of seed 0" in told)


def test_unmerging_gives_the_posterior_back_bit_for_bit() -> None:
    """The weights beside it too, though (w + d) - d is not w in floats; a merged adapter has no noise and no KL."""
    model = to_bayesian(bert(), delta=0.5).eval()
    before, kl = {name: value.clone() for name, value in model.state_dict().items()}, kl_divergence(model)
    for index in (0, 1):
        with fixed_draw(model, index):
            model.merge_adapter()
        assert not all(torch.equal(before[name], value) for name, value in model.state_dict().items())
        with fixed_draw(model, 5):
            drawn = logits(model)
        assert torch.equal(drawn, logits(model)) and float(kl_divergence(model)) == 0
        model.unmerge_adapter()
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
        assert torch.equal(kl_divergence(model), kl)


@pytest.mark.parametrize("how", ["merge_and_unload", "unload"])
def test_nothing_of_the_conversion_is_left_after_unloading(how: str) -> None:
    model = to_bayesian(bert(), delta=0.5).eval()
    plain = getattr(model, how)()
    assert not list(bnn.variational_tensors(plain)) and getattr(plain.config, "bayesian", None) is None
    assert not is_bayesian(to_deterministic(to_bayesian(plain)))


def test_converting_a_merged_adapter_is_refused() -> None:
    model = bert()
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"adapter of .*query.* merged.*unmerge_adapter"):
        to_bayesian(model, target_modules=ADAPTERS)
    assert not list(bnn.variational_tensors(model))
    model.unmerge_adapter()
    assert float(kl_divergence(to_bayesian(model, target_modules=ADAPTERS))) >= 0


@pytest.mark.parametrize("first", ["adapter", "conversion"])
def test_merging_dora_into_a_bayesian_layer_is_refused(first: str) -> None:
    """It would scale the mean and not the scale beside it; a plain sum leaves the draws as they are."""
    options = {"target_modules": ["query"], "init_lora_weights": False, "r": 2}
    for is_dora in (True, False):
        if first == "adapter":
            model = to_bayesian(bert(use_dora=is_dora), delta=0.5, target_modules=r".*base_layer").eval()
        else:
            base = to_bayesian(bert().unload(), delta=0.5).eval()
            model = peft.get_peft_model(base, peft.LoraConfig(use_dora=is_dora, **options)).eval()
        with fixed_draw(model, 0):
            expected = logits(model)
        if is_dora:
            with pytest.raises(RuntimeError, match="cannot be merged.*draws would change"):
                model.merge_and_unload()
            continue
        merged = model.merge_and_unload()
        with fixed_draw(merged, 0):
            torch.testing.assert_close(logits(merged), expected)


def test_merging_into_a_draw_is_refused() -> None:
    """PEFT would add to the copy that a reading gives: the adapter would be gone, and `unmerge` change the mean."""
    model = to_bayesian(bert(), delta=0.5, target_modules="all", exclude_modules=["default"]).eval()
    models = {"model": model, "copy": copy.deepcopy(model), "pickle": pickle.loads(pickle.dumps(model))}
    for one in models.values():
        before, expected = {name: value.clone() for name, value in one.state_dict().items()}, logits(one)
        with fixed_draw(one, 0), pytest.raises(RuntimeError, match=r"`merge` .*query.* is drawn.*outside"):
            one.merge_adapter()
        with training_draw(one.train()), pytest.raises(RuntimeError, match="`merge` .* is drawn"):
            one.merge_adapter()
        one.eval()
        assert all(torch.equal(before[name], value) for name, value in one.state_dict().items())
        one.merge_adapter()
        torch.testing.assert_close(logits(one), expected)
        with fixed_draw(one, 0), pytest.raises(RuntimeError, match="`unmerge` .* is drawn"):
            one.base_model.model.bert.encoder.layer[0].attention.self.query.unmerge()


def test_merging_in_a_held_mean_is_allowed() -> None:
    model = to_bayesian(bert(), delta=0.5, target_modules="all", exclude_modules=["default"]).eval()
    expected = logits(model)
    with posterior_mean(model):
        model.merge_adapter()
    torch.testing.assert_close(logits(model), expected)


def test_merging_under_a_scale_relative_to_the_mean_is_refused() -> None:
    model = to_bayesian(
        bert(), delta=0.5, scale="multiplicative", target_modules="all", exclude_modules=["default"]
    ).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"query.*cannot be merged.*relative to the mean.*draws would change"):
        model.merge_adapter()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def two_adapters() -> Any:
    model = bert()
    model.add_adapter("b", peft.LoraConfig(target_modules=["query"], init_lora_weights=False, r=2))
    return model


@pytest.mark.parametrize("forward", ["held", "training"])
def test_an_adapter_after_the_conversion_is_told_of_once(forward: str, caplog: pytest.LogCaptureFixture) -> None:
    model = to_bayesian(two_adapters(), delta=0.5, target_modules=r".*lora_[AB]\..*").eval()
    model.add_weighted_adapter(["default", "b"], [0.5, 0.5], "c", combination_type="linear")

    def told() -> list[str]:
        caplog.clear()
        for _ in range(2):
            if forward == "training":
                model.train()(**IDS)
            else:
                with fixed_draw(model.eval(), 0):
                    logits(model)
        return [record.getMessage() for record in caplog.records if "deterministic" in record.getMessage()]

    assert not told()
    model.set_adapter("c")
    with posterior_mean(model):
        logits(model)
    (message,) = told()
    assert "'c'" in message and "to_deterministic" in message
    assert not told()
    to_bayesian(to_deterministic(model), delta=0.5, target_modules=r".*lora_[AB]\..*")
    with fixed_draw(model.eval(), 0):
        drawn = logits(model)
    assert not torch.equal(drawn, logits(model)) and not told()


def test_an_adapter_that_was_left_out_is_not_told_of(caplog: pytest.LogCaptureFixture) -> None:
    model = to_bayesian(two_adapters(), delta=0.5, target_modules=ADAPTERS).eval()
    model.set_adapter("b")
    with fixed_draw(model, 0):
        logits(model)
    assert not [record for record in caplog.records if "deterministic" in record.getMessage()]


def test_an_adapter_of_bare_parameters_after_the_conversion(caplog: pytest.LogCaptureFixture) -> None:
    options = {"r": 2, "target_modules": ["query"], "init_weights": False}
    model = peft.get_peft_model(bert().unload(), peft.LoHaConfig(**options))
    to_bayesian(model, delta=0.5, target_modules=r".*hada_.*")
    model.add_adapter("b", peft.LoHaConfig(**options))
    model.set_adapter("b")
    with fixed_draw(model.eval(), 0):
        logits(model)
    assert len([record for record in caplog.records if "'b'" in record.getMessage()]) == 1
