"""`to_bayesian` of a model with PEFT's adapters: what becomes Bayesian, how fresh ones start, and switching them."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from bayeformers import (
    MopedPrior,
    bayesian_config,
    fixed_draw,
    is_bayesian,
    kl_divergence,
    to_bayesian,
    to_deterministic,
    unfreeze,
)
from bayeformers.nn.base import variational_tensors

peft = pytest.importorskip("peft")
IDS = {"input_ids": torch.tensor([[5, 6, 7, 8]])}
TUNED: dict[str, Any] = {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}
PROMPT: dict[str, Any] = {"num_virtual_tokens": 3, "task_type": "SEQ_CLS"}


def bert() -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return hf.BertForSequenceClassification(hf.BertConfig(intermediate_size=32, **sizes)).eval()


def adapted(config: Any, *others: str) -> Any:
    model = peft.get_peft_model(bert(), config)
    for name in others:
        model.add_adapter(name, config)
    return model.eval()


def lora(**options: Any) -> Any:
    return peft.LoraConfig(**{"r": 2, **TUNED, **options})


def random(model: nn.Module) -> list[str]:
    return [tensor.name for tensor in variational_tensors(model)]


@torch.no_grad()
def logits(model: Any, index: int | None = None) -> Tensor:
    if index is None:
        return model(**IDS).logits
    with fixed_draw(model, index):
        return model(**IDS).logits


MOPED: dict[str, Any] = {"prior": MopedPrior(), "scale": "additive"}
BOTH: dict[str, Any] = {"target_modules": r".*lora_(embedding_)?[AB]", **MOPED}
KINDS: dict[str, tuple[Any, set[str]]] = {
    "lora": (lora, {"lora_A.default.weight"}),
    "dora": (lambda: lora(use_dora=True), {"lora_A.default.weight"}),
    "embedding": (lambda: lora(target_modules=["word_embeddings"]), {"lora_embedding_B.default"}),
    "tokens": (
        lambda: lora(trainable_token_indices={"word_embeddings": [5]}),
        {"lora_A.default.weight", "trainable_tokens_delta.default"},
    ),
    "ia3": (lambda: peft.IA3Config(feedforward_modules=[], **TUNED), {"ia3_l.default"}),
    "loha": (lambda: peft.LoHaConfig(r=2, **TUNED), {f"hada_w{i}_{x}.default" for i in (1, 2) for x in "ab"}),
    "lokr": (lambda: peft.LoKrConfig(r=2, **TUNED), {"lokr_w1.default", "lokr_w2.default"}),
    "adalora": (
        lambda: peft.AdaLoraConfig(init_r=3, target_r=2, total_step=9, tinit=1, tfinal=1, **TUNED),
        {"lora_A.default", "lora_E.default"},
    ),
    "oft": (lambda: peft.OFTConfig(oft_block_size=4, **TUNED), {"oft_R.default.weight"}),
    "vera": (lambda: peft.VeraConfig(r=2, **TUNED), {"vera_lambda_b.default", "vera_lambda_d.default"}),
    "shira": (lambda: peft.ShiraConfig(r=2, **TUNED), {"shira_weight.default"}),
    "prompt": (lambda: peft.PromptTuningConfig(**PROMPT), {"default.embedding.weight"}),
    "prefix": (lambda: peft.PrefixTuningConfig(**PROMPT), {"default.embedding.weight"}),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_the_active_adapter_becomes_bayesian_and_nothing_else(kind: str) -> None:
    """It draws and trains; the base and the head stay deterministic, and the head goes on training."""
    make, endings = KINDS[kind]
    model = adapted(make())
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    expected = logits(model)
    to_bayesian(model)
    assert random(model) and all(name.endswith(tuple(endings)) for name in random(model))
    assert {ending for ending in endings if any(name.endswith(ending) for name in random(model))} == endings
    assert {n: p.requires_grad for n, p in model.named_parameters() if not n.endswith("_rho")} == flags
    torch.testing.assert_close(logits(model.eval()), expected)
    with torch.no_grad():  # LoRA's noise is in the matrix that is not 0, and shows once the other has moved
        for parameter in model.parameters():
            if parameter.requires_grad and not bool(parameter.any()):
                parameter.add_(0.1)
    assert not torch.equal(logits(model, 0), logits(model, 1))
    loss = model.train()(**IDS).logits.square().sum() + kl_divergence(model)
    loss.backward()
    assert all(tensor.rho.grad is not None and tensor.loc.grad is not None for tensor in variational_tensors(model))
    to_deterministic(model)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags


# ---------------------------------------------------------------------------------------------------- fresh, all zeros


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"target_modules": ["word_embeddings"]}, {"r": 5}])
@pytest.mark.parametrize("delta", [0.05, 0.3])
def test_a_fresh_lora_gives_the_weight_noise_of_delta_times_its_size(options: dict[str, Any], delta: float) -> None:
    """rms of Delta W over 400 draws of the zero matrix alone, against delta rms(W).

    Delta W has hundreds of entries, correlated within rows and columns of a rank-r product: over 400 draws with about
    r x 16 free numbers each, the mean square is known to sqrt(2 / (400 x 32)) = 1.3 %, its root to 0.6 %; 4 sigma.
    """
    model = to_bayesian(adapted(lora(**options)), delta, **BOTH)
    layer = next(m for m in model.modules() if isinstance(m, peft.tuners.lora.layer.LoraLayer))
    zero = next(t for t in variational_tensors(model) if not bool(t.loc.any()))
    scale = float(zero.scale().mean())
    torch.testing.assert_close(zero.scale(), torch.full_like(zero.scale(), scale))
    total = torch.zeros(())
    with torch.no_grad():
        for _ in range(400):
            zero.loc.copy_(scale * torch.randn(zero.loc.shape))
            total += layer.get_delta_weight("default").square().mean()
    expected = delta * float(layer.get_base_layer().weight.square().mean().sqrt())
    assert math.sqrt(float(total) / 400) == pytest.approx(expected, rel=0.025)


def test_the_priors_scale_is_that_of_the_start_too() -> None:
    """MOPED's prior of LoRA's B: the KL is 0 at the start, before and after the mean has moved and come back."""
    model = to_bayesian(adapted(lora()), **BOTH)
    assert float(kl_divergence(model)) == pytest.approx(0, abs=1e-6)
    tensor = next(t for t in variational_tensors(model) if not bool(t.loc.any()))
    with torch.no_grad():
        tensor.loc.add_(float(tensor.scale().mean()))
    assert float(kl_divergence(model)) == pytest.approx(0.5 * tensor.loc.numel(), rel=1e-4)  # (m - 0)^2 / 2 s^2
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(kl_divergence(copied), kl_divergence(model))


@pytest.mark.parametrize("kind", ["adalora", "loha", "lokr", "oft", "vera"])
def test_other_kinds_start_with_the_same_share(kind: str) -> None:
    """Of the weight as it is used, measured by draws of the zero tensor: within a factor 1.5.

    At least 48 standard normal numbers set the gain (16 values of AdaLoRA's three): a relative error of
    sqrt(1 / 96) = 10 %; 60 draws measure the share, of 180 numbers at least, to 5 %; 1.5 is over 3 sigma.
    """
    model = adapted(KINDS[kind][0]())
    zeros = {name for name, p in model.named_parameters() if p.requires_grad and not bool(p.any())}
    to_bayesian(model, 0.05, **MOPED)
    own = {t.name: t for t in variational_tensors(model) if t.name in zeros and "query" in t.name}
    (tensor,) = own.values()
    layer = next(m for n, m in model.named_modules() if n.endswith("query"))
    weight, square, torch_identity = layer.get_base_layer().weight, torch.zeros(()), torch.eye(16)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        bias = layer.get_base_layer().bias
        for _ in range(60):
            tensor.loc.copy_(tensor.scale() * torch.randn(tensor.loc.shape, generator=generator))
            square += ((layer(torch_identity) - bias).T - weight).square().mean()
    share = math.sqrt(float(square) / 60) / float(weight.square().mean().sqrt())
    assert 0.05 / 1.5 < share < 0.05 * 1.5


# ------------------------------------------------------------------------------------------------------------- by name


def test_pefts_own_names() -> None:
    def named(config: Any, *target: str) -> list[str]:
        return [
            name.partition("self.")[2] for name in random(to_bayesian(adapted(config), target_modules=list(target)))
        ]

    assert named(lora(), "lora_A") == ["query.lora_A.default.weight", "value.lora_A.default.weight"]
    assert named(lora(), "lora_A.default") == named(lora(), "lora_A")
    assert named(lora(), "query.lora_B") == ["query.lora_B.default.weight"]
    assert named(KINDS["ia3"][0](), "ia3_l") == ["query.ia3_l.default", "value.ia3_l.default"]
    assert named(KINDS["adalora"][0](), "query.lora_E") == ["query.lora_E.default"]
    assert random(to_bayesian(adapted(KINDS["prompt"][0]()), target_modules=["prompt_encoder"]))
    assert len(random(to_bayesian(adapted(lora()), target_modules=r".*lora_[AB]"))) == 4
    assert len(random(to_bayesian(adapted(lora()), target_modules="all"))) > 20


@pytest.mark.parametrize(
    ("target", "match"),
    [(["lora_C"], "match no module"), (["lora_dropout"], "nothing to convert"), ([], "nothing")],
)
def test_names_of_nothing(target: list[str], match: str) -> None:
    model = adapted(lora())
    with pytest.raises(ValueError, match=match):
        to_bayesian(model, target_modules=target)
    assert not is_bayesian(model)


def test_freezing_is_for_whole_models() -> None:
    """A fresh adapter must learn; one that is named with its base is frozen with it, as ever."""
    assert not bayesian_config(to_bayesian(adapted(lora()))).freeze
    assert not bayesian_config(to_bayesian(adapted(lora()), target_modules=["lora_B"])).freeze
    assert bayesian_config(to_bayesian(adapted(lora()), target_modules="all")).freeze
    assert bayesian_config(to_bayesian(adapted(lora()), freeze=True)).freeze


# ----------------------------------------------------------------------------------------------------------- switching


def kl_of(model: nn.Module, adapter: str) -> float:
    """By the formula for N(m, s^2) against N(c, d^2), summed over the tensors of one adapter."""
    total = torch.zeros((), dtype=torch.float64)
    for t in variational_tensors(model):
        if f".{adapter}." in t.name:
            centre = t.module.prior_centre(t.parameter_name)
            prior = t.module.initial_scale(t.parameter_name, centre)(centre).double()
            ratio, shift = t.scale().double() / prior, (t.loc - centre).double() / prior
            total += (0.5 * (ratio.square() + shift.square() - 1) - ratio.log()).sum()
    return float(total)


def test_only_the_active_adapter_has_noise_and_a_kl() -> None:
    model = adapted(lora(), "b")
    to_bayesian(model, target_modules=r".*lora_[AB]\.(default|b)", **MOPED)
    with torch.no_grad():
        for tensor in variational_tensors(model):
            tensor.loc.add_(0.02), tensor.rho.add_(0.3 if ".b." in tensor.name else 0.1)
    of_first = logits(model, 0)
    assert float(kl_divergence(model)) == pytest.approx(kl_of(model, "default"), rel=1e-5)
    model.set_adapter("b")
    assert float(kl_divergence(model)) == pytest.approx(kl_of(model, "b"), rel=1e-5)
    assert not torch.equal(logits(model, 0), of_first)
    with model.disable_adapter():
        assert float(kl_divergence(model)) == 0 and torch.equal(logits(model, 0), logits(model, 1))
    assert float(kl_divergence(model)) == pytest.approx(kl_of(model, "b"), rel=1e-5)
    model.set_adapter("default")
    assert torch.equal(logits(model, 0), of_first)


def test_switching_leaves_frozen_means_frozen_until_they_are_unfrozen() -> None:
    model = to_bayesian(adapted(lora(), "b"), target_modules=r".*lora_[AB]\.(default|b)", freeze=True)

    def training() -> set[str]:
        return {name for name, p in model.named_parameters() if p.requires_grad and ".lora_" in name}

    with model.disable_adapter():
        assert float(kl_divergence(model)) == 0
    for name in ("b", "default"):
        model.set_adapter(name)
        assert training() == {n for n, _ in model.named_parameters() if n.endswith("_rho") and f".{name}." in n}
        assert math.isfinite(float(kl_divergence(model)))
    unfreeze(model)
    model.set_adapter("b")
    assert training() == {n for n, _ in model.named_parameters() if ".lora_" in n and ".b." in n}


def test_an_adapter_that_the_default_left_out_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    model = to_bayesian(adapted(lora(), "b"))
    assert not [name for name in random(model) if ".b." in name]
    model.set_adapter("b")
    assert torch.equal(logits(model, 0), logits(model, 1))
    assert len([record for record in caplog.records if "'b'" in record.getMessage()]) == 1


def test_without_an_active_adapter_nothing_changes() -> None:
    model = adapted(lora())
    with model.disable_adapter(), pytest.raises(ValueError, match="no adapter is active"):
        to_bayesian(model)
    assert not is_bayesian(model)


# ------------------------------------------------------------------------------------------------------------- AdaLoRA


def test_adalora_regularises_the_means_alone(tmp_path: Any) -> None:
    """PEFT looks for its matrices by a part of their names, and finds the scales as well."""
    plain = adapted(KINDS["adalora"][0]())
    model = to_bayesian(copy.deepcopy(plain)).eval()
    labels = torch.tensor([1])
    expected = plain(**IDS, labels=labels).loss
    for one in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(one(**IDS, labels=labels).loss, expected)
    with pytest.raises(RuntimeError, match=r"allocate ranks before `to_bayesian`"):
        model.base_model.update_and_allocate(1)
    assert type(to_deterministic(model).base_model) is type(plain.base_model)
