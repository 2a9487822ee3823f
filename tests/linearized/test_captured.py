"""The linearised predictive: its covariance against a dense J Sigma J^T, with J from `torch.func`, in float64."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import BertConfig, BertForMultipleChoice

from bayeformers import VariationalPosterior, posterior_mean, to_bayesian
from bayeformers.linearized.blocks import mean_field_blocks
from bayeformers.linearized.captured import covariance, linearize
from bayeformers.linearized.links import logit_draws
from bayeformers.linearized.methods import METHODS
from bayeformers.nn import variational_tensors
from bayeformers.posteriors import BasePosterior, PointPosterior
from tests.cases import Case, case

NAMES = (
    "bert", "bert-regression", "roberta", "albert", "electra", "distilbert", "mpnet", "deberta-v2", "xlnet", "funnel",
    "gpt2", "qwen2", "vit", "swin", "convnext", "bert-tokens",
)  # fmt: skip
each_case = pytest.mark.parametrize("name", NAMES)
Inputs = dict[str, Any]


def converted(this: Case, **options: Any) -> nn.Module:
    """In float64, with scales that differ from weight to weight."""
    model = to_bayesian(this.build(), delta=0.3, **options)
    with torch.no_grad():
        for tensor in variational_tensors(model):
            tensor.rho.add_(0.3 * torch.randn_like(tensor.rho))
    return model.double().eval()


def doubled(inputs: Mapping[str, Any]) -> Inputs:
    return {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}


def dense(model: nn.Module, inputs: Any) -> Tensor:
    """J Sigma J^T, (B, ..., C, C): Jacobian by reverse mode through the whole network, Sigma from rho by hand."""
    tensors = list(variational_tensors(model))

    def logits(weights: dict[str, Tensor]) -> Tensor:
        args, kwargs = ((inputs,), {}) if isinstance(inputs, Tensor) else ((), inputs)
        output = functional_call(model, weights, args, kwargs, tie_weights=True)
        return output if isinstance(output, Tensor) else output.logits

    with posterior_mean(model), sdpa_kernel(SDPBackend.MATH):  # the fused kernel has no double backward to batch over
        jacobian = jacrev(logits)({t.name: t.loc.detach() for t in tensors})
    total = torch.zeros(())
    for tensor in tensors:
        variance = torch.nn.functional.softplus(tensor.rho.detach().double()).clamp_min(1e-8).square()
        if tensor.spec.padding_idx is not None:
            variance[tensor.spec.padding_idx] = 0
        rows = jacobian[tensor.name].flatten(-tensor.loc.ndim)
        total = total + torch.einsum("...cp,...dp,p->...cd", rows, rows, variance.flatten())
    return total


def assert_covariance(found: Tensor, expected: Tensor, tolerance: float = 1e-8) -> None:
    """Entries may cancel: their error is measured by the largest one."""
    assert found.shape == expected.shape and found.dtype == torch.float64
    expected = expected.detach()
    assert float(expected.abs().max()) > 1e-8
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


# ------------------------------------------------------------------------------------------------------- the covariance


@each_case
@pytest.mark.parametrize("freeze", [True, False])
def test_covariance_is_dense(name: str, freeze: bool) -> None:
    model, inputs = converted(case(name), freeze=freeze), doubled(case(name).inputs())
    mean, covariance = VariationalPosterior(model).linearize(inputs)
    # Qwen2's RMSNorm computes in float32, where gradients of sums of logits are no sums of gradients to the last bit
    assert_covariance(covariance, dense(model, inputs), 1e-6 if name == "qwen2" else 1e-8)
    with torch.no_grad(), posterior_mean(model):
        torch.testing.assert_close(mean, model(**inputs).logits, rtol=1e-10, atol=1e-12)
    assert not mean.requires_grad and not covariance.requires_grad


@each_case
def test_an_example_does_not_depend_on_its_batch(name: str) -> None:
    model, inputs = converted(case(name)), doubled(case(name).inputs())
    posterior = VariationalPosterior(model)
    together = posterior.linearize(inputs)
    for i in range(len(together[0])):
        alone = posterior.linearize({key: value[i : i + 1] for key, value in inputs.items()})
        for whole, one in zip(together, alone, strict=True):
            torch.testing.assert_close(whole[i : i + 1], one, rtol=1e-8, atol=1e-8 * float(one.abs().max()))


@pytest.mark.parametrize("name", ["bert", "albert", "gpt2", "mpnet", "xlnet", "funnel", "electra"])
def test_as_many_examples_as_positions(name: str) -> None:
    """The batch axis is not told by its size."""
    model, inputs = converted(case(name)), case(name).inputs()
    inputs = {key: torch.cat([value, value.flip(0), value[:1]]) for key, value in inputs.items()}
    assert inputs["input_ids"].shape == (7, 7)
    _, covariance = VariationalPosterior(model).linearize(inputs)
    assert_covariance(covariance, dense(model, inputs))


@pytest.mark.parametrize("pattern", [r"classifier", r".*layer\.1\..*", r".*embeddings\..*", r".*query"])
def test_some_layers_only(pattern: str) -> None:
    model, inputs = converted(case("bert"), target_modules=pattern), case("bert").inputs()
    _, covariance = VariationalPosterior(model).linearize(inputs)
    assert_covariance(covariance, dense(model, inputs))


class Twice(nn.Module):
    """Layers in several uses: called twice, one weight in two modules, a table with padding, equal rows in a text."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 4, padding_idx=0)
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.second.weight = self.first.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.tanh(self.first(self.table(ids)))
        x = torch.tanh(self.first(x) + self.second(x) + self.table(ids.flip(-1)))
        return self.head(x.mean(1))


IDS = torch.tensor([[1, 2, 1, 0, 0], [3, 3, 3, 3, 5], [0, 0, 0, 0, 0]])


@pytest.mark.parametrize("freeze", [True, False])
def test_reused_and_tied_layers_have_one_noise(freeze: bool) -> None:
    model = to_bayesian(Twice(), delta=0.5, freeze=freeze).double().eval()
    _, covariance = VariationalPosterior(model).linearize(IDS)
    assert_covariance(covariance, dense(model, IDS))


def test_a_padding_row_has_no_noise() -> None:
    """Though its scale were large: the third example looks up nothing else."""
    model = to_bayesian(Twice(), delta=0.5, target_modules=["table"]).double().eval()
    with torch.no_grad():
        model.table.weight_rho[0] = 50.0
    _, covariance = VariationalPosterior(model).linearize(IDS)
    assert_covariance(covariance, dense(model, IDS))
    assert covariance[2].abs().max() == 0


def test_linear_regression_is_exact() -> None:
    """f = w.x + b: Var f = sum_i sigma_i^2 x_i^2 + sigma_b^2, by hand, and what sampling tends to."""
    model = to_bayesian(nn.Linear(3, 1), delta=0.5).double().eval()
    x = torch.randn(5, 3, dtype=torch.float64)
    softplus = torch.nn.functional.softplus
    variance, bias = softplus(model.weight_rho.double()) ** 2, softplus(model.bias_rho.double()) ** 2
    expected = (x.square() @ variance.mT + bias).detach()
    predictive = VariationalPosterior(model).predict(x, method="glm", problem_type="regression", noise_std=0.1)
    torch.testing.assert_close(predictive.logit_covariance[:, 0], expected, rtol=1e-7, atol=0)
    torch.testing.assert_close(predictive.logit_mean, model(x).detach())
    # a variance of S samples has the relative standard error sqrt(2 / S) = 0.022: five of them
    sampled = VariationalPosterior(model).predict(x, num_samples=4096, problem_type="regression", noise_std=0.1)
    torch.testing.assert_close(sampled.epistemic_variance, expected[:, 0], rtol=0.11, atol=0)


# ------------------------------------------------------------------------------------------------------------ the draws


def test_draws_have_the_mean_and_the_covariance() -> None:
    """Scrambled Sobol points: errors near 1 / S. Five times that of sqrt(S) normals' would be 0.16; allowed is 0.02."""
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(4, 3, 3, generator=generator, dtype=torch.float64)
    mean, covariance = torch.randn(4, 3, generator=generator, dtype=torch.float64), root @ root.mT
    draws = logit_draws(mean, covariance, 1024, seed=0)
    assert draws.shape == (1024, 4, 3)
    scale = covariance.diagonal(dim1=1, dim2=2).sqrt()
    assert ((draws.mean(0) - mean) / scale).abs().max() < 0.02
    for b in range(4):
        error = torch.cov(draws[:, b].mT) - covariance[b]
        assert (error / torch.outer(scale[b], scale[b])).abs().max() < 0.02
    assert torch.equal(draws, logit_draws(mean, covariance, 1024, seed=0))
    assert not torch.equal(draws, logit_draws(mean, covariance, 1024, seed=1))


@pytest.mark.parametrize("rank", [0, 1])
def test_draws_of_a_singular_covariance(rank: int) -> None:
    """Rounding below zero must not become NaN."""
    root = torch.ones(1, 3, 1) * rank
    draws = logit_draws(torch.zeros(1, 3), root @ root.mT, 64, seed=0)
    assert draws.isfinite().all() and draws.dtype == torch.float32
    torch.testing.assert_close(draws, draws[..., :1].expand_as(draws), atol=1e-4, rtol=0)


def test_draws_of_a_batch_are_those_of_its_examples() -> None:
    model, inputs = converted(case("bert")), case("bert").inputs()
    posterior = VariationalPosterior(model)
    whole = posterior.predict(inputs, method="glm").log_probs
    one = posterior.predict({key: value[1:2] for key, value in inputs.items()}, method="glm").log_probs
    torch.testing.assert_close(whole[:, 1:2], one, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", ["bert", "bert-multi-label", "bert-regression"])
def test_predict(name: str) -> None:
    """The problem's own values, of 1,024 draws of the logits; labels are ignored; uncertainties are there."""
    this = case(name)
    model = converted(this)
    posterior = VariationalPosterior(model)
    predictive = posterior.predict({**this.inputs(), **this.labels()}, method="glm", noise_std=0.5)
    covariance = dense(model, this.inputs())
    assert_covariance(predictive.logit_covariance, covariance)
    if name == "bert-regression":
        variance = covariance[:, 0, 0]
        torch.testing.assert_close(predictive.epistemic_variance, variance, rtol=0.02, atol=0)
        torch.testing.assert_close(predictive.mean, predictive.logit_mean[:, 0], rtol=0, atol=0.02)
    else:
        assert (predictive.mutual_information > 0).all()
        assert predictive.log_probs.shape[1:] == ((3, 3, 2) if name == "bert-multi-label" else (3, 3))


def test_it_agrees_with_sampling_where_the_network_is_nearly_linear() -> None:
    """Small scales: the logits' variance over draws is that of the linearised network.

    With S = 1,024 draws its relative standard error is sqrt(2 / S) = 0.044; four of them, and 0.01 of curvature.
    """
    posterior = VariationalPosterior(to_bayesian(Twice(), delta=0.01).double(), draw_cache_bytes=0)
    _, covariance = posterior.linearize(IDS)
    draws = torch.stack(list(posterior.passes(IDS, num_samples=1024)))
    torch.testing.assert_close(draws.var(0), covariance.diagonal(dim1=1, dim2=2), rtol=0.19, atol=0)


# -------------------------------------------------------------------------------------------------------- what is left


def state_of(model: nn.Module) -> dict[str, Any]:
    return {
        "training": {name: m.training for name, m in model.named_modules()},
        "hooks": {name: (len(m._forward_hooks), len(m._backward_hooks)) for name, m in model.named_modules()},
        "flags": {name: (p.requires_grad, p.grad is None, p._version) for name, p in model.named_parameters()},
        "held": {t.name: t.module.draw for t in variational_tensors(model)},
        "random": torch.get_rng_state().tolist(),
        "gradients": torch.is_grad_enabled(),
    }


@pytest.mark.parametrize("enabled", [True, False])
def test_the_model_is_left_as_it_was(enabled: bool) -> None:
    model = converted(case("bert"), freeze=False)
    model.bert.pooler.train()
    with torch.set_grad_enabled(enabled):
        before = state_of(model)
        VariationalPosterior(model).predict(case("bert").inputs(), method="glm")
        assert state_of(model) == before


@pytest.mark.parametrize("call", [1, 2])
def test_an_exception_leaves_it_too(call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the forward, and in a gradient."""
    model, inputs = converted(case("bert")), case("bert").inputs()
    before = state_of(model)

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory")

    if call == 1:
        monkeypatch.setattr(model.classifier, "forward", fail)
    else:
        monkeypatch.setattr(torch.autograd, "grad", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        VariationalPosterior(model).predict(inputs, method="glm")
    assert state_of(model) == before


# --------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("name", "problem"), [("llama-lm", "causal_lm"), ("t5", "seq2seq_lm"), ("bert-qa", "question_ans")]
)
def test_heads_with_many_logits(name: str, problem: str) -> None:
    model = converted(case(name), target_modules=[case(name).matching("last")[0].rpartition(".")[2]])
    before = state_of(model)
    for method in METHODS[2:]:
        with pytest.raises(ValueError, match=f"`method`='{method}' needs few logits .*got a '{problem}"):
            VariationalPosterior(model).predict(case(name).inputs(), method=method)
    assert state_of(model) == before


def test_a_masked_language_model_has_many_logits() -> None:
    """Its head is one of token classification, over a vocabulary."""
    sizes = {"vocab_size": 9, "hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = to_bayesian(hf.BertForMaskedLM(hf.BertConfig(**sizes, intermediate_size=4)), target_modules=["query"])
    ids = torch.tensor([[1, 2, 3]])
    for method in METHODS[2:]:
        with pytest.raises(ValueError, match="needs few logits .*got a 'token_classification' head over a vocabulary"):
            VariationalPosterior(model).predict({"input_ids": ids}, method=method)
    assert VariationalPosterior(model).predict({"input_ids": ids}, num_samples=2).probs.shape == (1, 3, 9)


@pytest.mark.parametrize("shape", [(-1,), (2, 2, 1, 1), (4, 1)])
def test_outputs_of_another_shape(shape: tuple[int, ...]) -> None:
    """A vector, an image, and more rows than examples."""
    net = nn.Sequential(nn.Linear(3, 2), nn.Flatten())
    net.register_forward_hook(lambda module, args, output: output.reshape(shape))
    posterior = VariationalPosterior(to_bayesian(net))
    with pytest.raises(
        ValueError,
        match=r"needs logits \(B, C\) or \(B, T, C\), got \(" + str(torch.ones(2, 2).reshape(shape).shape[0]),
    ):
        posterior.predict(torch.ones(2, 3), method="glm")


def test_an_embedding_tied_to_a_linear_layer() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.table(ids).mean(1))

    model = to_bayesian(Tied(), delta=0.2).double().eval()
    _, covariance = VariationalPosterior(model).linearize(IDS)
    assert_covariance(covariance, dense(model, IDS))


class Mixed(nn.Module):
    """Layers that no rule knows, beside one that has a rule; a bare tensor that is read twice; a frozen flag."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.mix = nn.LSTM(3, 4, batch_first=True), nn.Bilinear(4, 3, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.scores, self.head = nn.Parameter(torch.randn(4, 4)), nn.Linear(4, 3)
        self.scores.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.mix(self.rnn(x)[0], x)
        hidden = self.attention(hidden, hidden, hidden)[0] @ self.scores
        return self.head(torch.tanh(hidden.mean(1) @ self.scores))


@pytest.mark.parametrize("freeze", [True, False])
@pytest.mark.parametrize("contrasts", [True, False])
def test_tensors_without_a_rule(freeze: bool, contrasts: bool) -> None:
    """Recurrent, attention, bilinear and bare weights: J Sigma J^T to rounding; flags and gradients are left alone."""
    torch.manual_seed(0)
    model = to_bayesian(Mixed(), delta=0.3, freeze=freeze).double().eval()
    x, flags = torch.randn(4, 5, 3, dtype=torch.float64), [p.requires_grad for p in model.parameters()]
    _, covariance = VariationalPosterior(model).linearize(x, contrasts=contrasts)
    centre = torch.eye(3).double() - contrasts / 3
    assert_covariance(covariance, centre @ dense(model, x) @ centre)
    assert [p.requires_grad for p in model.parameters()] == flags and all(p.grad is None for p in model.parameters())


def test_posteriors_that_are_not_gaussian() -> None:
    class Two(BasePosterior):
        model, num_draws = nn.Linear(2, 2), 2

        def mean(self) -> Any:
            return contextlib.nullcontext()

        @contextlib.contextmanager
        def draw(self, index: int, seed: int = 0) -> Iterator[None]:
            yield

        def random_parameters(self) -> list[nn.Parameter]:
            return [self.model.weight]

        def save(self, directory: Any) -> None:
            raise NotImplementedError

    for posterior in (PointPosterior(nn.Linear(2, 2)), Two()):
        with pytest.raises(ValueError, match=f"needs a Gaussian posterior, got {type(posterior).__name__}"):
            posterior.predict(torch.ones(1, 2), method="glm")


def test_a_layer_without_a_rule() -> None:
    layer = nn.Bilinear(2, 2, 1)
    other = nn.Linear(2, 1)
    block = mean_field_blocks(other, {other.weight: torch.ones_like(other.weight)})[0]
    object.__setattr__(block, "modules", (layer,))
    with pytest.raises(ValueError, match="no rule for the Jacobian of Bilinear; see `register_rule`"):
        linearize(layer, torch.ones(1, 2), [block], covariance)


def test_an_unknown_method() -> None:
    with pytest.raises(ValueError, match=r"`method` must be one of \('sample', 'nn', 'glm', .*got 'linear'"):
        PointPosterior(nn.Linear(2, 2)).predict(torch.ones(1, 2), method="linear")


def test_the_quasi_random_normals_are_normal() -> None:
    """Deciles of one coordinate: S = 1,024 scrambled Sobol points put S / 10 of them between neighbours, +-2."""
    from scipy.stats import norm

    draws = logit_draws(torch.zeros(1, 2).double(), torch.eye(2)[None].double(), 1024, seed=3)[:, 0]
    counts = np.histogram(norm.cdf(draws.numpy())[:, 0], bins=10, range=(0, 1))[0]
    assert np.abs(counts - 102.4).max() <= 2.6


def test_a_covariance_over_a_vocabulary_is_refused() -> None:
    """Before 20,000 backward passes and 1.6 GB per example; sampling has no such limit."""
    posterior = VariationalPosterior(to_bayesian(nn.Linear(2, 20_000)))
    with pytest.raises(ValueError, match="smaller batches, or, for outputs over a vocabulary, use the method 'sample'"):
        posterior.predict(torch.ones(1, 2), method="glm")
    assert posterior.predict(torch.ones(1, 2), num_samples=2).log_probs.shape == (2, 1, 20_000)


def test_multiple_choice() -> None:
    """(B, choices, T) are B examples of the head, and B x choices rows inside; the position table is looked up once."""
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=30,
        max_position_embeddings=8,
    )  # fmt: skip
    model = to_bayesian(BertForMultipleChoice(config), delta=0.3).double().eval()
    inputs = {"input_ids": torch.randint(5, 30, (3, 4, 6)), "attention_mask": torch.ones(3, 4, 6).long()}
    inputs["attention_mask"][:, 1:, 4:] = 0
    _, covariance = VariationalPosterior(model).linearize(inputs)
    assert_covariance(covariance, dense(model, inputs))
    predictive = VariationalPosterior(model).predict(inputs, method="glm")
    assert predictive.problem_type == "single_label_classification" and predictive.probs.shape == (3, 4)
