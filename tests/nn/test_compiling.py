"""`torch.compile(fullgraph=True)`: one graph for all draws, one for the mean, one for training; values as eager."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch._dynamo.utils import counters

import bayeformers.nn as bnn
from bayeformers import fixed_draw, kl_divergence, posterior_mean, predict, to_bayesian
from bayeformers.nn import variational_tensors

NAMES = ("bert", "vit", "gpt2", "llama", "t5")
IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 5, 13, 5, 7, 9]])
_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def _tiny(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """A model and its inputs; whatever its loss would look up or set at the first call only is in the configuration."""
    torch.manual_seed(0)
    ids = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    if name == "bert":
        config: Any = hf.BertConfig(vocab_size=40, **_SIZES, problem_type="single_label_classification")
        return hf.BertForSequenceClassification(config), {**ids, "labels": torch.tensor([0, 1])}
    if name == "vit":
        config = hf.ViTConfig(**_SIZES, image_size=16, patch_size=4, problem_type="single_label_classification")
        return hf.ViTForImageClassification(config), {
            "pixel_values": torch.randn(2, 3, 16, 16),
            "labels": IDS[:, 0] % 2,
        }
    if name == "gpt2":
        config = hf.GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2)
        model = hf.GPT2LMHeadModel(config)
        model.loss_type = "ForCausalLM"  # transformers finds none for this class, and warns in the forward
        return model, {**ids, "labels": IDS}
    if name == "llama":
        config = hf.LlamaConfig(vocab_size=40, **_SIZES, num_key_value_heads=2)
        return hf.LlamaForCausalLM(config), {**ids, "labels": IDS}
    config = hf.T5Config(
        vocab_size=40, d_model=32, num_layers=2, num_heads=2, d_kv=16, d_ff=64, decoder_start_token_id=0
    )
    return hf.T5ForConditionalGeneration(config), {**ids, "labels": IDS}


def _converted(name: str, *, training: bool = False) -> tuple[nn.Module, dict[str, Any]]:
    model, inputs = _tiny(name)
    model = to_bayesian(model, delta=0.3).train(training)
    if not training:
        labels = inputs.pop("labels")
        inputs |= {"decoder_input_ids": labels} if name == "t5" else {}
    return model, inputs


def _graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


@pytest.mark.parametrize("name", ["bert", "vit", *(pytest.param(n, marks=pytest.mark.slow) for n in NAMES[2:])])
def test_one_graph_serves_all_draws(name: str) -> None:
    """Held draws are eager's within 1e-5, float32's rounding; the mean takes one more graph, `predict` none."""
    model, inputs = _converted(name)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        logits = []
        for index in range(4):
            with fixed_draw(model, index):
                logits.append(compiled(**inputs).logits)
                torch.testing.assert_close(logits[-1], model(**inputs).logits, rtol=1e-5, atol=1e-5)
        assert _graphs() == 1 and not torch.equal(logits[0], logits[1])
        with posterior_mean(model):
            torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits, rtol=1e-5, atol=1e-5)
        assert _graphs() == 2
    if name in ("bert", "vit"):
        found, expected = (predict(one, inputs, num_samples=5) for one in (compiled, model))
        torch.testing.assert_close(found.log_probs, expected.log_probs, rtol=1e-5, atol=1e-5)
        assert _graphs() == 2


@pytest.mark.parametrize("name", ["vit", *(pytest.param(n, marks=pytest.mark.slow) for n in NAMES if n != "vit")])
def test_training_takes_one_graph(name: str) -> None:
    """Loss and gradients of fresh draws in one graph, whatever was held before; every scale gets its gradient."""
    model, inputs = _converted(name, training=True)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    losses = []
    for _ in range(3):
        loss = compiled(**inputs).loss + kl_divergence(model) / 100
        loss.backward()
        losses.append(float(loss.detach()))
    assert _graphs() == 1 and len(set(losses)) == 3
    assert all(tensor.rho.grad is not None for tensor in variational_tensors(model))


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) for n in ("gpt2", "llama", "t5")])
def test_generates_with_a_static_cache(name: str) -> None:
    """transformers compiles the steps itself: the tokens of each draw are eager's, and all draws share the graphs."""
    model, inputs = _converted(name)
    inputs.pop("decoder_input_ids", None)
    config = hf.CompileConfig(backend="aot_eager", fullgraph=True, mode=None, dynamic=False)
    config._compile_all_devices = True
    options = {"max_new_tokens": 4, "do_sample": False, "cache_implementation": "static", "pad_token_id": 0}
    graphs = []
    for index in range(3):
        with fixed_draw(model, index):
            expected = model.generate(**inputs, **options)
            assert torch.equal(model.generate(**inputs, **options, compile_config=config), expected)
        graphs.append(_graphs())
    assert graphs[0] >= 1 and len(set(graphs)) == 1


class _Net(nn.Module):
    """A table, a matrix that is read by its name, a tied use of the table, and a normalised layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.bag = nn.Embedding(9, 4, padding_idx=1), nn.EmbeddingBag(9, 4)
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.norm = nn.LayerNorm(4)
        self.out = nn.Linear(4, 9)
        self.out.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.table(ids).mean(1) @ self.weight + self.bag(ids)
        return self.out(self.norm(hidden))


def _net() -> tuple[nn.Module, Any, Tensor]:
    torch.manual_seed(0)
    model = to_bayesian(_Net(), delta=0.5, norms=True, freeze=False).eval()
    return model, torch.compile(model, backend="aot_eager", fullgraph=True), torch.tensor([[3, 1, 4], [5, 3, 2]])


def test_gradients_in_a_held_draw() -> None:
    """Under autograd the noise is handed in: gradients of means and scales are eager's, in one graph for all draws."""
    model, compiled, ids = _net()
    for index in range(3):
        found = []
        for run in (compiled, model):
            with fixed_draw(model, index):
                run(ids).square().sum().backward()
            found.append([p.grad for p in model.parameters()])
            model.zero_grad()
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert _graphs() == 1


def test_draws_follow_the_weights() -> None:
    """A step changes what a held draw is, inside of the `with` and for the next one; graphs stay as they are."""
    model, compiled, ids = _net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = None
    with torch.no_grad(), fixed_draw(model, 0):
        for _ in range(2):
            logits = compiled(ids)
            assert torch.allclose(logits, model(ids), atol=1e-6) and (before is None or not torch.equal(logits, before))
            before = logits
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
        torch.testing.assert_close(compiled(ids), model(ids))
    with torch.no_grad():
        model.table.weight.mul_(2)
        with fixed_draw(model, 0):
            torch.testing.assert_close(compiled(ids), model(ids))
    assert _graphs() == 1


def test_a_draw_that_is_set_on_the_layers() -> None:
    """Without `fixed_draw` nothing hands values in beforehand: tracing does."""
    model, compiled, ids = _net()
    for index in (0, 1):
        with torch.no_grad():
            for layer in model.modules():
                if isinstance(layer, bnn.BayesianModule):
                    layer.draw = bnn.variational.Draw(0, index)
            found = compiled(ids)
            with fixed_draw(model, index):
                expected = model(ids)
        torch.testing.assert_close(found, expected)


def test_copies_start_without_what_graphs_need() -> None:
    """A deep copy is compiled anew, and its draws are its own."""
    import copy

    model, compiled, ids = _net()
    with torch.no_grad(), fixed_draw(model, 0):
        compiled(ids)
    twin = copy.deepcopy(model)
    with torch.no_grad(), fixed_draw(twin, 0):
        twin.table.weight.add_(1)
        torch.testing.assert_close(torch.compile(twin, backend="aot_eager", fullgraph=True)(ids), twin(ids))


def test_compiles_the_whole_step() -> None:
    """The loss and its KL in one function, with their gradients, for means that train."""
    model, _, ids = _net()

    @torch.compile(backend="aot_eager", fullgraph=True)
    def loss() -> Tensor:
        return model(ids).square().sum() + kl_divergence(model)

    with posterior_mean(model):
        loss().backward()
        found = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        (model(ids).square().sum() + kl_divergence(model)).backward()
    for parameter, grad in zip(model.parameters(), found, strict=True):
        torch.testing.assert_close(grad, parameter.grad, rtol=1e-5, atol=1e-5)


def test_backward_has_the_noise_of_the_forward() -> None:
    """dL/drho of a sum of weights is (w - mu) / sigma * sigmoid(rho) in every draw; a seed repeats it."""
    torch.manual_seed(0)
    layer = bnn.Linear(3, 4, bias=False, delta=0.5).train()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    drawn = []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        layer.weight_rho.grad = None
        weight = compiled(torch.eye(3)).T
        weight.sum().backward()
        mean, rho = layer.get_parameter("weight"), layer.weight_rho
        expected = (weight - mean) / torch.nn.functional.softplus(rho) * rho.sigmoid()
        torch.testing.assert_close(rho.grad, expected.detach(), rtol=1e-4, atol=1e-6)
        drawn.append(weight.detach())
    assert torch.equal(drawn[0], drawn[2]) and not torch.equal(drawn[0], drawn[1])
