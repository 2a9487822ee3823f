"""`to_bayesian` and its inverse on models of one's own: what is chosen, what is left alone and why, what comes back."""

from __future__ import annotations

import copy
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn
from torch.nn.utils import prune

import bayeformers
from bayeformers import (
    MopedPrior,
    NormalPrior,
    bayesian_config,
    fixed_draw,
    is_bayesian,
    kl_divergence,
    posterior_mean,
    register_layer,
    summary,
    to_bayesian,
    to_deterministic,
    unfreeze,
)
from bayeformers import nn as bnn
from bayeformers.conversion.registry import _BAYESIAN
from bayeformers.nn.parameters import RandomParameters
from tests.cases import case
from tests.conversion.test_conversion_matrix import assert_same_state, state_of
from tests.reference import moped_sigma, sigma, tensors_of

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


def converted_names(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, bnn.BayesianModule)}


# -------------------------------------------------------------------------------------------------------- initial state


def test_scales_are_relative_to_the_weights() -> None:
    """sigma = delta max(|w|, mean|w| / 10): in float32 to the precision of rho, (1 + |rho|) 6e-8."""
    model = to_bayesian(case("bert").build(), delta=0.1)
    for tensor in bnn.variational_tensors(model):
        rows = [i for i in range(len(tensor.loc)) if i != tensor.spec.padding_idx]
        torch.testing.assert_close(
            sigma(tensor.rho)[rows], moped_sigma(tensor.loc[rows], 0.1), rtol=3e-6, atol=1e-12, msg=tensor.name
        )


@pytest.mark.protects("zero_weights")
def test_zero_weights() -> None:
    """zero_weights: a zero bias gets delta * 0.02, pruned weights delta * 0.1 mean|w|."""
    layer = nn.Linear(4, 2)
    with torch.no_grad():
        layer.bias.zero_()
        layer.weight[0] = 0.0
    mean = float(layer.weight.detach().abs().mean())
    to_bayesian(layer, delta=0.3)
    torch.testing.assert_close(sigma(layer.bias_rho).float(), torch.full((2,), 0.3 * 0.02))
    torch.testing.assert_close(
        sigma(layer.weight_rho[0]).float(), torch.full((4,), 0.3 * 0.1 * mean), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("cast", ["half", "double", "bfloat16", "float"])
def test_rho_stays_float32(cast: str) -> None:
    """Through every cast, before and after a backward; small steps of rho are kept; the padding row stays silent."""
    model = to_bayesian(nn.Sequential(nn.Embedding(6, 4, padding_idx=1), nn.Linear(4, 2)), delta=0.2).train()
    model(torch.tensor([0, 1, 2])).sum().backward()
    before = [p.detach().clone() for p in (model[0].weight_rho, model[1].weight_rho)]
    getattr(model, cast)()
    for rho, old in zip((model[0].weight_rho, model[1].weight_rho), before, strict=True):
        assert rho.dtype == rho.grad.dtype == torch.float32 and torch.equal(rho, old)
    output = model(torch.tensor([0, 1, 2]))
    assert (
        output.dtype
        == model[1].weight.dtype
        == getattr(torch, {"half": "float16", "double": "float64"}.get(cast, cast))
    )
    output.float().sum().backward()
    assert model[0].weight_rho.grad[1].abs().max() == 0
    with torch.no_grad():
        model[1].weight_rho.add_(1e-5)
    assert not torch.equal(model[1].weight_rho, before[1])
    assert torch.isfinite(kl_divergence(model))


# ------------------------------------------------------------------------------------------------------------- choosing


def test_target_and_exclude() -> None:
    """PEFT's rules: suffixes at a dot, one full regular expression; whoever excludes a container means its layers."""
    build = case("roberta").build
    everything = set(case("roberta").layers)
    queries = {n for n in everything if n.endswith(".query")}
    assert converted_names(to_bayesian(build(), target_modules=["query"])) == queries
    assert converted_names(to_bayesian(build(), target_modules=r".*\.query")) == queries
    assert converted_names(to_bayesian(build(), target_modules=["self.query", "out_proj"])) == queries | {
        "classifier.out_proj"
    }
    heads = {"classifier.dense", "classifier.out_proj"}
    for exclude in (["classifier"], "classifier", r"classifier\..*", ["classifier.dense", "classifier.out_proj"]):
        assert converted_names(to_bayesian(build(), exclude_modules=exclude)) == everything - heads, exclude
    assert converted_names(to_bayesian(build(), exclude_modules=["dense"])) == {
        n for n in everything if not n.endswith("dense")
    }
    assert converted_names(to_bayesian(build(), exclude_modules=[])) == everything
    head_only = to_bayesian(build(), target_modules=["dense"], exclude_modules=["roberta"])
    assert converted_names(head_only) == {"classifier.dense"}
    assert set(summary(head_only).skipped.values()) >= {"in exclude_modules", "not in target_modules"}


def test_modules_to_save() -> None:
    """A fresh head stays deterministic and trains, all inside it; everything else but the scales is frozen."""
    model = to_bayesian(case("roberta").build(), modules_to_save=["classifier"])
    assert not any(name.startswith("classifier") for name in converted_names(model))
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (name.endswith("_rho") or name.startswith("classifier.")), name
    assert bayesian_config(model).modules_to_save == ["classifier"]


@pytest.mark.parametrize("freeze", [True, False])
def test_freeze(freeze: bool) -> None:
    """freeze=False leaves flags as the user set them; rho trains in both; `unfreeze` gives the user's flags back."""
    model = case("bert").build()
    model.bert.embeddings.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    to_bayesian(model, freeze=freeze)
    for name, parameter in model.named_parameters():
        expected = True if name.endswith("_rho") else before[name] and not freeze
        assert parameter.requires_grad == expected, name
    assert any(n.endswith("_prior_centre") for n, _ in model.named_buffers()) is not freeze
    assert unfreeze(model) is model
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (True if name.endswith("_rho") else before[name]), name
    assert bayesian_config(model).freeze is model.config.bayesian["freeze"] is False
    with torch.no_grad():
        model.classifier.weight.add_(0.1)
    assert summary(model).kl > 1
    assert {n: p.requires_grad for n, p in to_deterministic(model).named_parameters()} == before


@pytest.mark.protects("memory")
def test_memory() -> None:
    """memory: one more tensor per weight while means are frozen, two more when they train; noise is not stored."""
    for freeze, copies in ((True, 2), (False, 3)):
        model = case("bert").build()
        weights = sum(model.get_submodule(n).weight.numel() for n in case("bert").layers)
        before = sum(v.numel() for v in model.state_dict().values())
        to_bayesian(model, freeze=freeze).train()(**case("bert").inputs())
        after = sum(v.numel() for v in model.state_dict().values())
        biases = sum(p.numel() for n, p in model.named_parameters() if n.endswith("bias_rho"))
        assert after - before == (copies - 1) * (weights + biases)


class Scaled(nn.Module):
    """Scales by 1 - rate in `eval()` instead of by its inverse in `train()`, as two models of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.token_dropout, self.drop_prob = nn.Linear(3, 2), 0.2, 0.1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layer(nn.functional.dropout(x, self.drop_prob, self.training))
        if not self.training:
            x *= 1 - self.token_dropout
        return x


def test_a_rate_that_scales_the_mean_stays() -> None:
    """It is no dropout: without it every output of `eval()` would be another."""
    model, x = Scaled().eval(), torch.randn(4, 3)
    with torch.no_grad():
        expected = model(x)
        to_bayesian(model)
        assert torch.equal(model(x), expected)
    assert model.drop_prob == 0 and model.token_dropout == 0.2
    to_deterministic(model)
    assert model.drop_prob == 0.1 and model.token_dropout == 0.2


@pytest.mark.parametrize("name", ["pp_lcnet", "nllb_moe"])
def test_models_that_scale_by_their_dropout(name: str) -> None:
    if name == "pp_lcnet":
        model = hf.PPLCNetForImageClassification(hf.PPLCNetConfig(scale=0.25, class_expand=16)).eval()
        inputs: dict[str, Any] = {"pixel_values": torch.randn(1, 3, 32, 32)}
    else:
        sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "num_experts": 2, "vocab_size": 32}
        more = {f"{p}_{n}": v for p in ("encoder", "decoder") for n, v in (("ffn_dim", 8), ("attention_heads", 2))}
        steps = {"encoder_sparse_step": 1, "decoder_sparse_step": 1}
        model = hf.NllbMoeForConditionalGeneration(hf.NllbMoeConfig(**sizes, **more, **steps)).eval()
        inputs = {"input_ids": torch.tensor([[5, 6, 2]]), "decoder_input_ids": torch.tensor([[2, 7]])}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        expected = tensors_of(model(**inputs))[0]
        assert torch.equal(tensors_of(to_bayesian(model)(**inputs))[0], expected)


def test_prior_and_dropout_are_recorded() -> None:
    model = to_bayesian(case("bert").build(), 0.2, prior=NormalPrior(0.3), keep_dropout=True)
    config = bayesian_config(model)
    assert (config.delta, config.prior, config.dropout, config.freeze) == (0.2, NormalPrior(0.3), {}, True)
    assert model.config.bayesian == config.to_dict()
    assert model.bert.embeddings.dropout.p == 0.1
    model = to_bayesian(case("bert").build())
    assert model.bert.embeddings.dropout.p == 0 and bayesian_config(model).prior == MopedPrior()
    assert bayesian_config(model).dropout["bert.embeddings.dropout"] == 0.1


def test_root_module() -> None:
    """A layer by itself, its device-free attributes, mode and flags kept."""
    layer = nn.Linear(4, 2).eval()
    assert to_bayesian(layer) is layer and isinstance(layer, bnn.Linear) and not layer.training
    assert bayesian_config(layer).modules == {"": "Linear"}
    assert [t.name for t in bnn.variational_tensors(layer)] == ["weight", "bias"]
    assert (layer.in_features, layer.out_features) == (4, 2) and "prior=Moped" in repr(layer)
    assert type(to_deterministic(layer)) is nn.Linear


def test_bias_free_layer() -> None:
    layer = to_bayesian(nn.Linear(4, 2, bias=False)).train()
    assert layer.bias is None and not hasattr(layer, "bias_rho") and layer(X).shape == (5, 2)


def test_shared_module_is_converted_once() -> None:
    layer = nn.Linear(4, 4)
    model = to_bayesian(nn.Sequential(layer, nn.Tanh(), layer))
    assert [t.name for t in bnn.variational_tensors(model)] == ["0.weight", "0.bias"]
    with fixed_draw(model, 0):
        model(X)
    to_deterministic(model)


def test_untied_by_hand() -> None:
    """A head that its user untied has its own scale and its own draw, whatever the model's class declares."""
    model = case("gpt2-lm").build()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    to_bayesian(model)
    assert model.lm_head.weight_rho is not model.transformer.wte.weight_rho
    assert {"lm_head.weight", "transformer.wte.weight"} <= {t.name for t in bnn.variational_tensors(model)}


# --------------------------------------------------------------------------------------------- what would bypass a draw


@pytest.mark.protects("subclass_layers")
def test_subclass_layers() -> None:
    """subclass_layers: one that adds to `super().forward` draws in its layer's way, one that reads its weight by it."""

    class Scaled(nn.Embedding):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * 3.0

    class Direct(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return F.linear(input, self.weight)

    class Both(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) + self.weight.sum()

    class Hidden(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            weight = self.weight
            return super().forward(input) @ weight

    class ByName(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) + getattr(self, "weight").sum()  # noqa: B009

    class ByMethod(nn.Linear):
        def own(self) -> Tensor:
            return self.weight.sum()

        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) + self.own()

    class ByProperty(nn.Linear):
        @property
        def own(self) -> Tensor:
            return self.weight.sum()

        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) + self.own

    class Inner(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) + sum(self.weight.sum() for _ in range(1))

    class Unchanged(nn.Linear):
        pass

    scaled = to_bayesian(nn.Sequential(Scaled(6, 4), nn.Linear(4, 4)), delta=0.5)
    assert isinstance(scaled[0], Scaled) and isinstance(scaled[0], bnn.Embedding)
    with fixed_draw(scaled, 0):
        rows = scaled[0].variational("weight").sample()
        torch.testing.assert_close(scaled[0](torch.arange(6)), 3 * rows)
        assert torch.equal(rows, scaled[0].weight) and not torch.equal(rows, scaled[0].get_parameter("weight"))
    assert type(copy.deepcopy(scaled)[0]).__name__ == "Scaled"
    assert type(to_deterministic(scaled)[0]) is Scaled
    for kind in (Direct, Both, Hidden, ByName, ByMethod, ByProperty, Inner, Unchanged):
        layer, x = kind(4, 4), torch.randn(2, 4)
        model = to_bayesian(nn.Sequential(copy.deepcopy(layer), nn.Linear(4, 4)), delta=0.5)
        assert isinstance(model[0], RandomParameters) and isinstance(model[0], kind), kind
        with fixed_draw(model, 0):
            weights = {name: model[0].variational(name).sample() for name in ("weight", "bias")}
            torch.testing.assert_close(model[0](x), torch.func.functional_call(layer, weights, (x,)))
        assert type(to_deterministic(model)[0]) is kind


def test_fused_transformer_layer_draws() -> None:
    """`nn.TransformerEncoderLayer` has a fused path in `eval()` that reads weights: a draw must not be lost there."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    original = nn.TransformerEncoder(layer, 2).eval()
    model = to_bayesian(copy.deepcopy(original), delta=0.5).eval()
    names = ("linear1", "linear2", "self_attn", "self_attn.out_proj")
    assert converted_names(model) == {f"layers.{i}.{name}" for i in (0, 1) for name in names}
    x, mask = torch.randn(2, 3, 8), torch.tensor([[False, False, False], [False, False, True]])
    for padding in (None, mask):
        arguments = {"src": x, "src_key_padding_mask": padding}
        with fixed_draw(model, 0):
            weights = {t.name: t.module.variational(t.parameter_name).sample() for t in bnn.variational_tensors(model)}
            for gradient in (True, False):
                with torch.set_grad_enabled(gradient):
                    found = model(**arguments)
                expected = torch.func.functional_call(original.train(), weights, kwargs=arguments)
                torch.testing.assert_close(found[:, :2], expected[:, :2], rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            torch.testing.assert_close(
                model(**arguments)[:, :2], original.eval()(**arguments)[:, :2], rtol=1e-4, atol=1e-5
            )
    restored = to_deterministic(model)
    assert restored.use_nested_tensor == original.use_nested_tensor
    assert [m.activation_relu_or_gelu for m in restored.layers] == [m.activation_relu_or_gelu for m in original.layers]


def test_replaced_forward_is_reported() -> None:
    """An instance-level `forward` of the user's own would bypass the draw: skipped, with the reason."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].forward = lambda x: x
    model[1].forward = types.MethodType(lambda self, x: F.linear(x, self.weight), model[1])
    to_bayesian(model)
    assert converted_names(model) == {"2"}
    assert all("replaced on the instance" in summary(model).skipped[n] for n in "01")


@pytest.mark.parametrize("removed", ["", "before", "after"])
def test_accelerate_hooks(removed: str) -> None:
    """Layers with accelerate's hooks draw, restore, and survive the hooks' removal, which leaves a bound forward."""
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    class Count(ModelHook):
        calls = 0

        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            Count.calls += 1
            return args, kwargs

    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    original = copy.deepcopy(model)
    for index in (0, 2):
        add_hook_to_module(model[index], Count())
        if removed == "before":
            remove_hook_from_module(model[index])
    to_bayesian(model, delta=0.5)
    assert converted_names(model) == {"0", "2"}
    if removed == "after":
        for index in (0, 2):
            remove_hook_from_module(model[index])
    Count.calls = 0
    assert not torch.equal(model.train()(X), model(X))
    with fixed_draw(model, 0):
        expected = F.linear(X, model[0].variational("weight").sample(), model[0].variational("bias").sample())
        torch.testing.assert_close(model[0](X), expected)
    assert Count.calls == (0 if removed else 5)
    model.eval()
    with posterior_mean(model):
        assert torch.equal(model(X), original(X))
    to_deterministic(model)
    assert torch.equal(model(X), original(X)) and type(model[0]) is nn.Linear


@pytest.mark.parametrize(
    "wrap",
    [
        torch.nn.utils.weight_norm,
        torch.nn.utils.spectral_norm,
        lambda m: prune.l1_unstructured(m, "weight", 0.5),
        lambda m: prune.l1_unstructured(m, "bias", 0.5),
        lambda m: m.to(torch.complex64),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_computed_weights_are_left_alone(wrap: Any) -> None:
    """conversion_by_class: a weight that is no Parameter is skipped with the reason; no half-converted model."""
    model = nn.Sequential(nn.Linear(4, 4), wrap(nn.Linear(4, 4)))
    to_bayesian(model)
    assert converted_names(model) == {"0"} and summary(model).skipped["1"]


def test_a_parametrized_weight_is_computed_from_drawn_tensors() -> None:
    """torch keeps the tensors behind a parametrization in a module of their own, which reads them by name."""
    model = nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), nn.Linear(3, 3))
    names = {f"0.parametrizations.weight.original{i}" for i in (0, 1)}
    to_bayesian(model, delta=0.5)
    assert converted_names(model) == {"0.parametrizations.weight", "1"}
    assert "computed from other parameters" in summary(model).skipped["0"]
    with fixed_draw(model, 0):
        drawn = {t.name: t.module.variational(t.parameter_name).sample() for t in bnn.variational_tensors(model)}
        g, v = (drawn[name] for name in sorted(names))
        weight = g * v / v.norm(dim=1, keepdim=True)
        torch.testing.assert_close(model[0](X), F.linear(X, weight, model[0].bias))
    model.train()(X).sum().backward()
    assert all(t.rho.grad is not None for t in bnn.variational_tensors(model))
    assert len({model[0](X)[0, 0].item() for _ in range(3)}) == 3
    to_deterministic(model)


def test_register_layer() -> None:
    """A layer of one's own converts by its exact class."""

    class Mine(nn.Linear):
        pass

    class MineBayesian(bnn.Linear, Mine):
        torch_class = Mine

    assert register_layer(Mine)(MineBayesian) is MineBayesian
    try:
        model = to_bayesian(nn.Sequential(Mine(4, 4)))
        assert type(model[0]) is MineBayesian and not torch.equal(model.train()(X), model(X))
        assert type(to_deterministic(model)[0]) is Mine
    finally:
        del _BAYESIAN[Mine]


# ------------------------------------------------------------------------------------------------------------- wrappers


class Wrapper(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, **inputs: Any) -> Any:
        return self.module(**inputs)


def test_wrapped_model_is_found() -> None:
    """Through a wrapper (as DDP's) `unfreeze` and `to_deterministic` see the model's own flags."""
    inner = case("bert").build()
    inner.bert.embeddings.requires_grad_(False)
    before = state_of(inner)
    model = Wrapper(to_bayesian(inner))
    assert is_bayesian(model) and bayesian_config(model) is bayesian_config(inner)
    assert unfreeze(model) is model
    assert {n: p.requires_grad for n, p in inner.named_parameters() if not n.endswith("rho")} == before["flags"]
    assert to_deterministic(model) is model
    assert_same_state(state_of(inner), before)
    assert not is_bayesian(model)


def test_hooks_stay() -> None:
    """wrapper_loses_api: the user's own hooks fire before, during and after."""
    calls: list[str] = []
    model = nn.Sequential(nn.Linear(4, 4))
    model.register_forward_hook(lambda *_: calls.append("model"))
    model[0].register_forward_pre_hook(lambda *_: calls.append("layer"))
    for step in (lambda: None, lambda: to_bayesian(model), lambda: to_deterministic(model)):
        step()
        calls.clear()
        model(X)
        assert calls == ["layer", "model"]


def test_convert_again_after_undoing() -> None:
    model = case("gpt2-lm").build()
    expected = to_bayesian(copy.deepcopy(model), delta=0.2)
    to_bayesian(to_deterministic(to_bayesian(model)), delta=0.2)
    with torch.no_grad(), fixed_draw(model, 0), fixed_draw(expected, 0):
        assert torch.equal(model(**case("gpt2-lm").inputs()).logits, expected(**case("gpt2-lm").inputs()).logits)


@pytest.mark.parametrize("after", [True, False])
def test_peft(after: bool) -> None:
    """LoRA first, its factors made Bayesian: they train, the base does not, and B = 0 is uncertain."""
    peft = pytest.importorskip("peft")
    base = case("bert").build()
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"], r=2, lora_dropout=0.1)
    if not after:  # the other order: base layers are Bayesian, LoRA wraps them
        model = peft.get_peft_model(to_bayesian(base, target_modules=["query", "value"]), config)
        assert is_bayesian(model) and torch.isfinite(kl_divergence(model))
        with fixed_draw(model, 0):
            a = model(**case("bert").inputs()).logits
        with fixed_draw(model, 1):
            assert not torch.equal(a, model(**case("bert").inputs()).logits)
        return
    model = peft.get_peft_model(base, config)
    to_bayesian(model, target_modules=r".*\.lora_[AB]\.default", freeze=False)
    assert len(converted_names(model)) == 8
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert all("lora" in n or "classifier" in n for n in trainable) and any(n.endswith("_rho") for n in trainable)
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    a, b = model(**case("bert").inputs()).logits, model(**case("bert").inputs()).logits
    assert not torch.equal(a, b)
    (a.square().sum() + kl_divergence(model)).backward()
    rhos = [p for n, p in model.named_parameters() if n.endswith("lora_B.default.weight_rho")]
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in rhos)
    optimizer.step()
    assert float(kl_divergence(model)) > 0


# ----------------------------------------------------------------------------------------------- generate and pipelines


@pytest.mark.parametrize("name", ["gpt2-lm", "llama-lm", "t5"])
def test_generate(name: str) -> None:
    """Under a fixed draw one network speaks: the same tokens with and without cache; `eval()` is the mean's."""
    model = case(name).build()
    inputs = {k: v[:1, :4] for k, v in case(name).inputs().items() if not k.startswith("decoder")}
    options = {"max_new_tokens": 8, "do_sample": False, "min_new_tokens": 8}
    plain = model.generate(**inputs, **options)
    to_bayesian(model, delta=0.5)
    assert torch.equal(model.generate(**inputs, **options), plain)
    spoken = set()
    for index in range(4):
        with fixed_draw(model, index):
            cached = model.generate(**inputs, **options)
            assert torch.equal(cached, model.generate(**inputs, **options, use_cache=False))
            assert torch.equal(cached[:1], model.generate(**inputs, **options, num_beams=1))
        spoken.add(tuple(cached[0].tolist()))
    assert len(spoken) > 1


def test_pipeline(tmp_path: Path) -> None:
    """`pipeline` takes the converted model, and its answers are the posterior mean's, twice the same."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "good", "bad", "film"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = hf.BertTokenizer(str(tmp_path / "vocab.txt"))
    model = case("bert").build()
    expected = hf.pipeline("text-classification", model=model, tokenizer=tokenizer, top_k=None)(["a good film"])[0]
    to_bayesian(model, delta=0.5)
    pipe = hf.pipeline("text-classification", model=model, tokenizer=tokenizer, top_k=None)
    for _ in range(2):
        answer = pipe(["a good film"])[0]
        assert [a["label"] for a in answer] == [e["label"] for e in expected]
        assert [a["score"] for a in answer] == pytest.approx([e["score"] for e in expected], rel=1e-6)
    with fixed_draw(model, 0):
        assert [a["score"] for a in pipe(["a good film"])[0]] != pytest.approx([e["score"] for e in expected], rel=1e-6)


def test_public_names() -> None:
    assert all(hasattr(bayeformers, name) for name in bayeformers.__all__)
