"""The linearised predictive of a Laplace posterior: its covariance against a dense J Sigma J^T, in float64.

The Jacobian comes from `torch.func` through the whole network, Sigma from Kronecker products and an inverse.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from bayeformers.laplace import LaplacePosterior, fit
from bayeformers.linearized.captured import covariance, linearize
from tests.cases import CLASSES, case, classes, text
from tests.linearized.dense import jacobians

TEXT = ("bert", "roberta", "gpt2", "albert", "mpnet", "deberta-v2")
IMAGES = ("vit", "swin", "convnext")
Inputs = dict[str, Any]


def doubled(inputs: Any) -> Any:
    if isinstance(inputs, Tensor):
        return inputs.double() if inputs.is_floating_point() else inputs
    return {name: doubled(value) for name, value in inputs.items()}


class ConvNet(nn.Module):
    """Groups, strides, dilation, two kinds of padding, one position, and a layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1, stride=2)
        self.grouped = nn.Conv2d(4, 6, (3, 2), groups=2, padding=2, dilation=2, padding_mode="circular", bias=False)
        self.depthwise = nn.Conv2d(6, 6, 3, groups=6, padding="same")
        self.line = nn.Conv1d(6, 4, 2, groups=2)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.grouped(torch.tanh(self.first(x))))
        x = torch.tanh(self.depthwise(torch.tanh(self.depthwise(x))))
        return self.head(torch.tanh(self.line(x.flatten(2))).mean(-1))


class Twice(nn.Module):
    """One weight in two modules, one of them called twice, and a table with padding and with equal rows in a text."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 4, padding_idx=0)
        self.first, self.second, self.norm, self.head = (
            nn.Linear(4, 4),
            nn.Linear(4, 4),
            nn.LayerNorm(4),
            nn.Linear(4, 3),
        )
        self.second.weight, self.second.bias = self.first.weight, self.first.bias

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.tanh(self.first(self.table(ids)))
        x = self.norm(torch.tanh(self.first(x) + self.second(x) + self.table(ids.flip(-1))))
        return self.head(x.mean(1))


IDS = torch.tensor([[1, 2, 1, 0, 0], [3, 3, 3, 3, 5], [0, 0, 0, 0, 0]])


def t5() -> nn.Module:
    sizes = {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    model = hf.T5ForSequenceClassification(hf.T5Config(**sizes, num_labels=CLASSES, decoder_start_token_id=0))
    return model.eval()


def built(name: str) -> tuple[nn.Module, Any, dict[str, Tensor]]:
    """A model in float64, its inputs and its labels."""
    if name == "t5":
        return t5().double(), text(eos=1), classes()
    if name in ("conv", "twice"):
        net = ConvNet() if name == "conv" else Twice()
        return net.double().eval(), torch.randn(3, 3, 8, 8).double() if name == "conv" else IDS, classes()
    this = case(name)
    return this.build().double(), doubled(this.inputs()), doubled(this.labels())


def fitted(model: nn.Module, inputs: Any, labels: dict[str, Tensor], **options: Any) -> LaplacePosterior:
    batch = (inputs, labels["labels"]) if isinstance(inputs, Tensor) else {**inputs, **labels}
    return fit(model, [batch], **{"prior_precision": 0.5, "progress": False, **options})


# ------------------------------------------------------------------------------------------------- the dense covariance


def dense_sigma(posterior: LaplacePosterior, name: str) -> list[Tensor]:
    """Sigma of each of a layer's K blocks, or of all its weights together."""
    eigen, tau = posterior.layers[name], posterior.prior_precision
    tau = tau if isinstance(tau, float) else tau[name]
    scale = 1 / (posterior.temperature * posterior.noise_std**2)
    found = []
    for k, values in enumerate(eigen.eigenvalues):
        left = torch.eye(values.shape[0]).double() if eigen.left is None else eigen.left[k]
        right = torch.eye(values.shape[1]).double() if eigen.right is None else eigen.right[k]
        basis = torch.kron(left.contiguous(), right.contiguous())
        precision = basis @ torch.diag(scale * values.flatten() + tau) @ basis.mT
        found.append(torch.linalg.inv(precision))
    return found


def dense(posterior: LaplacePosterior, inputs: Any) -> Tensor:
    """J Sigma J^T, (B, C, C) or (B, T, C, C)."""
    model, total = posterior.model, torch.zeros(())
    for target, matrix in zip(posterior.targets, jacobians(model, posterior.blocks(), inputs), strict=True):
        sigmas = dense_sigma(posterior, target.name)
        flat = matrix.flatten(-2) if len(sigmas) == matrix.shape[-3] else matrix.flatten(-3).unsqueeze(-2)
        for k, sigma in enumerate(sigmas):
            total = total + torch.einsum("...cp,pq,...dq->...cd", flat[..., k, :], sigma, flat[..., k, :])
    return total


def assert_dense(posterior: LaplacePosterior, inputs: Any, tolerance: float = 1e-8) -> None:
    """Entries may cancel: their error is measured by the largest one."""
    _, found = posterior.linearize(inputs)
    expected = dense(posterior, inputs)
    assert found.dtype == torch.float64
    assert_close(found, expected, tolerance)


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 1e-8) -> None:
    assert found.shape == expected.shape and float(expected.abs().max()) > 1e-8
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


# ---------------------------------------------------------------------------------------------- architectures and heads


@pytest.mark.parametrize("name", [*TEXT, *IMAGES, "t5", "conv", "twice"])
def test_every_architecture(name: str) -> None:
    model, inputs, labels = built(name)
    assert_dense(fitted(model, inputs, labels), inputs)


@pytest.mark.parametrize("name", ["bert-tokens", "bert-regression", "bert-multi-label"])
@pytest.mark.parametrize("curvature", ["kfac", "diagonal"])
def test_every_head(name: str, curvature: str) -> None:
    model, inputs, labels = built(name)
    posterior = fitted(model, inputs, labels, curvature=curvature, temperature=0.7)
    assert posterior.likelihood_precision == pytest.approx(1 / (0.7 * posterior.noise_std**2))
    assert_dense(posterior, inputs)
    found = posterior.predict({**inputs, **labels})
    assert torch.equal(found.logit_covariance, posterior.linearize(inputs)[1])


@pytest.mark.parametrize("name", ["bert", "conv", "twice"])
@pytest.mark.parametrize("curvature", ["ekfac", "diagonal"])
def test_every_curvature(name: str, curvature: str) -> None:
    model, inputs, labels = built(name)
    assert_dense(fitted(model, inputs, labels, curvature=curvature), inputs)


@pytest.mark.parametrize("curvature", ["dense", "kfac", "ekfac", "diagonal", "auto"])
@pytest.mark.parametrize("name", ["bert", "bert-tokens", "twice"])
def test_the_last_layer(name: str, curvature: str) -> None:
    model, inputs, labels = built(name)
    posterior = fitted(model, inputs, labels, curvature=curvature, subset="last_layer")
    assert [target.name for target in posterior.targets] == ["head" if name == "twice" else "classifier"]
    assert_dense(posterior, inputs)


@pytest.mark.parametrize("layer", ["first", "grouped", "depthwise", "line", "head"])
def test_a_dense_block(layer: str) -> None:
    """All groups of a convolution together, and several positions."""
    model, inputs, labels = built("conv")
    assert_dense(fitted(model, inputs, labels, curvature="dense", target_modules=[layer]), inputs)


@pytest.mark.parametrize("curvature", ["kfac", "ekfac", "diagonal", "dense"])
def test_tables_and_normalisations(curvature: str) -> None:
    model, inputs, labels = built("twice")
    posterior = fitted(model, inputs, labels, curvature=curvature, target_modules=["table", "norm", "first", "second"])
    assert {target.name for target in posterior.targets} >= {"table", "norm"}
    assert_dense(posterior, inputs)


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_all_layers_of_all_classes(name: str) -> None:
    """Word, position and type tables, LayerNorm or RMSNorm, with a tau for each layer."""
    model, inputs, labels = built(name)
    tables, norms = r"embeddings\.\w+|w[tp]e|embed_tokens|shared", r"[nN]orm|layer_norm|ln_\w+"
    pattern = rf".*({tables}|{norms}|query|c_attn|SelfAttention\.q|classifier|score)"
    posterior = fitted(model, inputs, labels, target_modules=pattern)
    kinds = {type(model.get_submodule(target.name)).__name__ for target in posterior.targets}
    assert kinds & {"LayerNorm", "T5LayerNorm"} and (name == "t5" or "Embedding" in kinds)
    taus = {target.name: 0.1 + 0.3 * i for i, target in enumerate(posterior.targets)}
    # T5's normalisation computes in float32, where gradients of sums of logits are no sums of gradients to the last bit
    assert_dense(posterior.with_prior_precision(taus), inputs, 1e-6 if name == "t5" else 1e-8)


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_a_frozen_part_of_a_layer_is_known(frozen: str) -> None:
    model, inputs, labels = built("conv")
    for module in model.children():
        if getattr(module, frozen) is not None:
            getattr(module, frozen).requires_grad_(False)
    assert_dense(fitted(model, inputs, labels), inputs)


def test_other_data_than_the_fits() -> None:
    """A longer padding, other texts, and the attention mask left out."""
    model, inputs, labels = built("bert")
    posterior = fitted(model, inputs, labels, prior_precision="marglik")
    other = {name: torch.cat([value.flip(0), torch.zeros_like(value[:, :2])], dim=1) for name, value in inputs.items()}
    assert_dense(posterior, other)
    assert_dense(posterior, {"input_ids": inputs["input_ids"][:2, :3]})


# ---------------------------------------------------------------------------------------------- batches and their order


@pytest.mark.parametrize("name", [*TEXT, *IMAGES, "bert-tokens", "conv", "twice"])
def test_an_example_does_not_depend_on_its_batch(name: str) -> None:
    model, inputs, labels = built(name)
    posterior = fitted(model, inputs, labels)
    _, together = posterior.linearize(inputs)
    for i in range(3):
        one = (
            {key: value[i : i + 1] for key, value in inputs.items()} if isinstance(inputs, dict) else inputs[i : i + 1]
        )
        _, alone = posterior.linearize(one)
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-10 * float(alone.abs().max()))


@pytest.mark.parametrize("name", ["bert", "roberta", "albert", "t5", "bert-tokens"])
def test_an_example_does_not_depend_on_its_padding(name: str) -> None:
    """Lengths 7, 5 and 3: each without padding, against all padded to 7."""
    model, inputs, labels = built(name)
    posterior = fitted(model, inputs, labels)
    _, together = posterior.linearize(inputs)
    for i, length in enumerate((7, 5, 3)):
        _, alone = posterior.linearize({key: value[i : i + 1, :length] for key, value in inputs.items()})
        padded = together[i : i + 1, :length] if name == "bert-tokens" else together[i : i + 1]
        torch.testing.assert_close(padded, alone, rtol=0, atol=1e-9 * float(alone.abs().max()))


@pytest.mark.parametrize("name", ["bert", "albert", "mpnet", "deberta-v2", "bert-tokens"])
def test_as_many_examples_as_positions(name: str) -> None:
    """The batch axis is not told by its size."""
    model, inputs, labels = built(name)
    posterior = fitted(model, inputs, labels, target_modules="all")
    many = {key: torch.cat([value, value.flip(0), value[:1]]) for key, value in inputs.items()}
    assert many["input_ids"].shape == (7, 7)
    assert_dense(posterior, many)


class OwnPositions(nn.Module):
    """Positions looked up once for all examples, as a vector, and a table read through a layer."""

    def __init__(self, positions: int) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(8, 4), nn.Embedding(positions, 4)
        self.mixed, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        places = self.mixed(self.places(torch.arange(ids.shape[1])))
        return self.head(torch.tanh(self.words(ids) * places).sum(1))


@pytest.mark.parametrize("layers", [["places"], ["mixed"], ["head"], ["words", "places", "mixed", "head"]])
@pytest.mark.parametrize("curvature", ["kfac", "diagonal"])
@pytest.mark.parametrize("length", [2, 5])
def test_positions_as_a_vector(length: int, curvature: str, layers: list[str]) -> None:
    """As many as examples, or not."""
    model = OwnPositions(5).double().eval()
    ids = torch.randint(8, (5, length))
    labels = {"labels": ids[:, 0] % 3}
    posterior = fitted(model, ids, labels, target_modules=layers, curvature=curvature)
    assert_dense(posterior, ids)
    batches = [(ids[i : i + 1], labels["labels"][i : i + 1]) for i in range(5)]
    one = fit(model, batches, target_modules=layers, curvature=curvature, prior_precision=0.5, progress=False)
    if curvature == "diagonal":
        for name, eigen in posterior.layers.items():
            torch.testing.assert_close(eigen.eigenvalues, one.layers[name].eigenvalues)


# ------------------------------------------------------------------------------------------------ several posteriors


@pytest.mark.parametrize("name", ["bert", "conv", "twice", "bert-tokens"])
@pytest.mark.parametrize("curvature", ["kfac", "diagonal"])
def test_one_pass_for_many_priors(name: str, curvature: str) -> None:
    """`blocks_at`: the covariance of each as if it were alone."""
    model, inputs, labels = built(name)
    posterior = fitted(model, inputs, labels, curvature=curvature)
    taus = [0.01, 1.0, 30.0, {target.name: 0.1 + i for i, target in enumerate(posterior.targets)}]
    _, found = linearize(model, inputs, posterior.blocks_at(taus), covariance)
    assert len(found) == len(taus)
    for tau, part in zip(taus, found, strict=True):
        assert_close(part, posterior.with_prior_precision(tau).linearize(inputs)[1])


@pytest.mark.parametrize("name", ["bert", "bert-tokens"])
def test_contrasts_are_the_centred_outputs(name: str) -> None:
    """P S P with P = 1 - 1 1^T / C, for one posterior or several."""
    model, inputs, labels = built(name)
    posterior = fitted(model, inputs, labels)
    centre = torch.eye(CLASSES).double() - 1 / CLASSES
    blocks = posterior.blocks_at([0.5, 2.0])
    whole, found = (linearize(model, inputs, blocks, covariance, contrasts=c) for c in (False, True))
    assert torch.equal(whole[0], found[0])
    assert_close(found[1], centre @ whole[1] @ centre)


@pytest.mark.parametrize("name", ["bert", "gpt2", "albert"])
def test_float32(name: str) -> None:
    """Fitted to one example with a wide prior: there S is far below the prior's, elsewhere it is not."""
    model, inputs, labels = built(name)
    one = [{key: value[:1] for key, value in given.items()} for given in (inputs, labels)]
    exact = fitted(model, *one, prior_precision=1e-4)
    expected = [exact.linearize(given)[1] for given in (one[0], inputs)]
    posterior = fitted(model.float(), *one, prior_precision=1e-4)
    for given, wanted in zip((one[0], inputs), expected, strict=True):
        found = posterior.linearize(given)[1]
        assert found.dtype == torch.float64 and found.isfinite().all()
        torch.testing.assert_close(found.double(), wanted, rtol=0, atol=3e-3 * float(wanted.abs().max()))


@pytest.mark.parametrize("curvature", ["kfac", "ekfac", "dense"])
@pytest.mark.parametrize("classes", [2, 4])
def test_differences_of_logits_beside_what_they_share(classes: int, curvature: Any) -> None:
    """Data do not know what all logits share: at tau = 1e-8 its variance is 1e8 times that of their differences."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, classes)).double()
    x, y = torch.randn(40, 4).double(), torch.randint(classes, (40,))
    exact = fit(net, [(x, y)], prior_precision=1.0, curvature=curvature, subset="last_layer", progress=False)
    posterior = fit(
        net.float(), [(x.float(), y)], prior_precision=1.0, curvature=curvature, subset="last_layer", progress=False
    )
    for tau in (1e-2, 1e-4, 1e-6, 1e-8):
        net.double()
        wanted = exact.with_prior_precision(tau).predict(x[:6], contrasts=True)
        net.float()
        found = posterior.with_prior_precision(tau)
        for link in ("auto", "bridge"):
            predictive = found.predict(x[:6].float(), link=link)  # type: ignore[arg-type]
            for i, j in itertools.combinations(range(classes), 2):
                variances = [
                    s[:, i, i] + s[:, j, j] - 2 * s[:, i, j]
                    for s in (predictive.logit_covariance.double(), wanted.logit_covariance)
                ]
                torch.testing.assert_close(*variances, rtol=2e-2, atol=0)
        torch.testing.assert_close(found.predict(x[:6].float()).probs.double(), wanted.probs, rtol=0, atol=2e-2)
        shared = predictive.logit_covariance.sum((1, 2)) / classes**2
        # the whole covariance is there; below 1e-4 the curvature's own float32 sums bound what is shared
        assert bool((shared > 0.1 / max(tau, 1e-4)).all())


# -------------------------------------------------------------------------------------------------------- what is left


def state_of(model: nn.Module) -> dict[str, Any]:
    return {
        "training": {name: module.training for name, module in model.named_modules()},
        "hooks": {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()},
        "flags": {name: (p.requires_grad, p.grad is None, p._version) for name, p in model.named_parameters()},
        "values": {name: value.tolist() for name, value in model.state_dict().items()},
        "random": torch.get_rng_state().tolist(),
        "gradients": torch.is_grad_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
    }


METHODS = ("glm", "mc_glm", "one_glm", "lr_glm", "e_glm")


@pytest.mark.parametrize("method", METHODS)
def test_the_model_is_left_as_it_was(method: str) -> None:
    model, inputs, labels = built("bert")
    posterior = fitted(model, inputs, labels)
    model.bert.pooler.train()
    model.bert.embeddings.requires_grad_(False)
    before = state_of(model)
    posterior.predict(inputs, method=method, num_samples=3)
    assert state_of(model) == before


@pytest.mark.parametrize("place", ["forward", "grad"])
def test_an_exception_leaves_it_too(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs, labels = built("bert")
    posterior = fitted(model, inputs, labels)
    model.train().bert.embeddings.requires_grad_(False)
    before = state_of(model)

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(
        *((model.bert.pooler.activation, "forward") if place == "forward" else (torch.autograd, "grad")), fail
    )
    with pytest.raises(RuntimeError, match="out of memory"):
        posterior.predict(inputs)
    monkeypatch.undo()
    assert state_of(model) == before
