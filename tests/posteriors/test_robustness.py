"""Linearised predictives of networks, and in surroundings, that are not as simple as could be."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bayeformers import VariationalPosterior, to_bayesian
from bayeformers.laplace import fit
from bayeformers.linearized.captured import covariance, linearize
from bayeformers.posteriors import BasePosterior
from tests.cases import case
from tests.linearized.dense import directions

X, LABELS = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(1)).double(), torch.tensor([0, 2, 1, 1])
METHODS = ("glm", "mc_glm", "one_glm", "lr_glm", "e_glm")


def posterior_of(kind: str, net: nn.Module, x: Tensor = X) -> BasePosterior:
    net = net.double()
    if kind == "variational":
        return VariationalPosterior(to_bayesian(net, delta=0.3).double())
    return fit(net, [(x, LABELS[: len(x)])], prior_precision=0.5, progress=False)


def assert_dense(posterior: BasePosterior, inputs: Any) -> None:
    mean, found = posterior.linearize(inputs)
    with posterior.mean():
        variances, products = directions(posterior.model.eval(), posterior.blocks(), inputs)
    expected = torch.einsum("bck,bdk,k->bcd", products, products, variances)
    assert float(expected.abs().max()) > 1e-8
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-8 * float(expected.abs().max()))


each_kind = pytest.mark.parametrize("kind", ["laplace", "variational"])

# ------------------------------------------------------------------------------------------------------------- networks


class Net(nn.Module):
    """Three layers; subclasses say how they are called."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)).mean(1)

    def body(self, x: Tensor) -> Tensor:
        return torch.tanh(self.second(torch.tanh(self.first(x))))


class EditsOutput(Net):
    def body(self, x: Tensor) -> Tensor:
        y = self.first(x)
        y += 0.5 * x.sum(-1, keepdim=True)
        y.mul_(2)
        return torch.tanh(self.second(y))


class Keywords(Net):
    def body(self, x: Tensor) -> Tensor:
        return torch.tanh(self.second(input=torch.tanh(self.first(input=x))))


class Transposed(Net):
    """Positions first, and not contiguous."""

    def body(self, x: Tensor) -> Tensor:
        return torch.tanh(self.second(torch.tanh(self.first(x.transpose(0, 1))))).transpose(0, 1)


class Flattened(Net):
    """Positions and examples on one axis."""

    def body(self, x: Tensor) -> Tensor:
        return torch.tanh(self.second(torch.tanh(self.first(x.flatten(0, 1))))).unflatten(0, x.shape[:2])


class Sometimes(Net):
    """A layer that some batches do not call, and one that others call twice."""

    def body(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        return self.second(x) if bool(x.sum() > 0) else self.second(torch.tanh(self.second(x)))


class Experts(Net):
    """Each token goes to one of two layers."""

    def body(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        chosen, out = x[..., 0] > 0, torch.zeros_like(x)
        out[chosen] = self.second(x[chosen])
        return out + x


class Dead(Net):
    """The first layer's output reaches nothing; the second's is used under no_grad."""

    def body(self, x: Tensor) -> Tensor:
        self.first(x)
        with torch.no_grad():
            return torch.tanh(self.second(F.pad(x, (0, 1))))


NETS = (Net, EditsOutput, Keywords, Transposed, Flattened, Sometimes, Experts, Dead)


@each_kind
@pytest.mark.parametrize("net", NETS)
def test_ways_to_call_a_layer(net: type[Net], kind: str) -> None:
    posterior = posterior_of(kind, net())
    assert_dense(posterior, X)
    assert_dense(posterior, X[:3, :3])
    assert_dense(posterior, X[:1])


class EditsInput(Net):
    """After a layer has read it, and through a view; with ``keeps`` it does the same to a copy."""

    keeps = False

    def body(self, x: Tensor) -> Tensor:
        x = x.clone()
        y = self.first(self.kept(x))
        x[:, 0].zero_()
        y = torch.sin(y + F.pad(x, (0, 1)))
        z = self.second(self.kept(y))
        y.mul_(3)
        return y + torch.sin(z)

    def kept(self, x: Tensor) -> Tensor:
        return x.clone() if self.keeps else x


@each_kind
def test_inputs_that_change_after_the_call(kind: str) -> None:
    posterior = posterior_of(kind, EditsInput())
    found = posterior.linearize(X)[1]
    posterior.model.keeps = True
    torch.testing.assert_close(found, posterior.linearize(X)[1], rtol=1e-12, atol=0)
    assert_dense(posterior, X)


def test_as_many_positions_as_examples() -> None:
    for net in (Transposed, Flattened, Net):
        assert_dense(posterior_of("laplace", net(), X[:, :4]), X[:, :4])


class Rows(nn.Module):
    """A layer that sees a matrix of positions, shared by all examples."""

    def __init__(self, positions: int) -> None:
        super().__init__()
        self.places = nn.Parameter(torch.randn(positions, 3), requires_grad=False)
        self.mixed, self.head = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(x * self.mixed(self.places)).mean(1))


@each_kind
@pytest.mark.parametrize("length", [4, 5])
def test_a_matrix_of_positions_is_no_batch(length: int, kind: str) -> None:
    """Though it has as many rows."""
    assert_dense(posterior_of(kind, Rows(length), X[:, :length]), X[:, :length])


@pytest.mark.parametrize("method", METHODS)
def test_layers_that_a_batch_does_not_call(method: str) -> None:
    class Choice(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if bool(x.sum() > 0) else x.mean(1)

    x = X.abs()
    posterior = posterior_of("laplace", Choice(), x)
    assert posterior.linearize(x, method=method)[1].shape == (4, 3, 3)
    with pytest.raises(ValueError, match="outputs depend on none of the layers that the posterior covers"):
        posterior.linearize(-x, method=method)


def test_a_layer_that_gives_no_tensor() -> None:
    """By a hook of the user's."""
    net = Net().double()
    posterior = posterior_of("laplace", net)
    net.first.register_forward_hook(lambda module, args, output: (output, None))
    net.second.register_forward_pre_hook(lambda module, args: (args[0],))
    with pytest.raises(ValueError, match="The Jacobian of Linear needs one tensor in and one tensor out"):
        posterior.predict(X)


# --------------------------------------------------------------------------------------------------------- surroundings


def text_posterior(kind: str) -> tuple[BasePosterior, dict[str, Any]]:
    this = case("bert")
    if kind == "variational":
        return VariationalPosterior(to_bayesian(this.build(), delta=0.1)), this.inputs()
    batch = {**this.inputs(), **this.labels()}
    return fit(this.build(), [batch], prior_precision=0.5, progress=False), this.inputs()


AROUND: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "anomaly": torch.autograd.detect_anomaly,
}


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("around", AROUND.values(), ids=AROUND)
@each_kind
def test_contexts_change_nothing(kind: str, around: Callable[[], Any], method: str) -> None:
    posterior, inputs = text_posterior(kind)
    expected = posterior.predict(inputs, method=method)
    with around():
        inputs = {name: value + 0 for name, value in inputs.items()}  # made here
        before = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")
        found = posterior.predict(inputs, method=method)
        assert before == (
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.is_autocast_enabled("cpu"),
        )
    for name in ("logit_mean", "logit_covariance", "log_probs"):
        assert getattr(found, name).dtype == (torch.float64 if name == "logit_covariance" else torch.float32)
        assert torch.equal(getattr(found, name), getattr(expected, name))


def test_images_made_under_inference_mode() -> None:
    this = case("vit")
    posterior = VariationalPosterior(to_bayesian(this.build(), delta=0.1))
    expected = posterior.predict(this.inputs(), method="glm")
    with torch.inference_mode():
        found = posterior.predict({name: value + 0 for name, value in this.inputs().items()}, method="glm")
    assert torch.equal(found.probs, expected.probs)


@pytest.mark.parametrize("around", AROUND.values(), ids=AROUND)
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_a_fit_under_other_contexts(around: Callable[[], Any]) -> None:
    this = case("bert")
    plain = text_posterior("laplace")[0].layers
    model = this.build()
    with around():
        batch = {name: value + 0 for name, value in {**this.inputs(), **this.labels()}.items()}
        found = fit(model, [batch], prior_precision=0.5, progress=False).layers
    for name, eigen in plain.items():
        assert torch.equal(eigen.eigenvalues, found[name].eigenvalues)


@each_kind
def test_half_precision_weights(kind: str) -> None:
    """Logits and probabilities of a bfloat16 model are float32, their covariance float64, and all finite."""
    posterior, inputs = text_posterior(kind)
    exact = posterior.predict(inputs, method="glm").logit_covariance
    posterior.model.bfloat16()
    for method in METHODS:
        found = posterior.predict(inputs, method=method)
        assert found.log_probs.dtype == torch.float32 and found.logit_covariance.dtype == torch.float64
        assert bool(found.logit_covariance.isfinite().all())
    # 8 bits of precision, through 2 layers forward and back
    found = posterior.predict(inputs, method="glm").logit_covariance
    torch.testing.assert_close(found, exact, rtol=0, atol=0.1 * float(exact.abs().max()))


def test_a_fit_of_half_precision_weights() -> None:
    """Its sums are float32."""
    this = case("bert")
    batch = {**this.inputs(), **this.labels()}
    plain = fit(this.build(), [batch], prior_precision=0.5, progress=False).layers
    for curvature in ("kfac", "ekfac", "diagonal"):
        options: Any = {"curvature": curvature, "prior_precision": 0.5, "progress": False}
        for name, eigen in fit(this.build().bfloat16(), [batch], **options).layers.items():
            assert eigen.eigenvalues.dtype == torch.float32
            if curvature == "kfac":
                torch.testing.assert_close(eigen.eigenvalues.sum(), plain[name].eigenvalues.sum(), rtol=0.1, atol=1e-4)


@each_kind
def test_training_mode_and_gradient_checkpointing(kind: str) -> None:
    """Dropout and checkpointing are off inside, and on again."""
    posterior, inputs = text_posterior(kind)
    expected = posterior.predict(inputs, method="glm").logit_covariance
    posterior.model.gradient_checkpointing_enable()
    posterior.model.train()
    assert torch.equal(posterior.predict(inputs, method="glm").logit_covariance, expected)
    assert all(module.training for module in posterior.model.modules())
    assert posterior.model.is_gradient_checkpointing


@each_kind
@pytest.mark.parametrize("fails", [False, True])
def test_requires_grad_is_as_it_was(kind: str, fails: bool) -> None:
    posterior, inputs = text_posterior(kind)
    model = posterior.model
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 3 == 0)
        if number % 2 == 0 and parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)

    def state() -> list[Any]:
        flags = [(p.requires_grad, p.grad is None, p._version) for p in model.parameters()]
        return [*flags, *(len(module._forward_hooks) for module in model.modules())]

    before = state()
    context = pytest.raises(ValueError, match="inputs_embeds") if fails else contextlib.nullcontext()
    with context:
        posterior.predict({**inputs, **({"inputs_embeds": torch.ones(3, 7, 16)} if fails else {})}, method="glm")
    assert state() == before


def test_a_wrapped_model() -> None:
    """A wrapper's layers are the model's own."""
    net = Net().double()
    posterior = posterior_of("laplace", net)
    wrapped = nn.DataParallel(net)  # without a GPU it calls the module
    mean, found = linearize(wrapped, X, posterior.blocks(), covariance, of_softmax=True)
    assert torch.equal(found[0], posterior.linearize(X)[1])


# ----------------------------------------------------------------------------------------- tables that scale their rows


def test_scaled_tables() -> None:
    """BART multiplies what it looks up: its class has a forward of its own, and the table is taken as a tensor."""
    this = case("bart")
    assert_dense(VariationalPosterior(to_bayesian(this.build(), delta=0.1).double()), this.inputs())


def test_without_scaled_tables() -> None:
    this = case("bart")
    model = to_bayesian(this.build(), delta=0.1, exclude_modules=["shared", "embed_tokens", "embed_positions"]).double()
    assert_dense(VariationalPosterior(model), this.inputs())


def test_laplace_skips_scaled_tables_and_says_so() -> None:
    this = case("bart")
    batch = {**this.inputs(), **this.labels()}
    posterior = fit(this.build().double(), [batch], prior_precision=0.5, progress=False)
    assert "BartScaledWordEmbedding" in posterior.record.skipped["model.encoder.embed_tokens"]
    assert_dense(posterior, this.inputs())
    with pytest.raises(ValueError, match="no rule for BartScaledWordEmbedding"):
        fit(this.build(), [batch], target_modules=["embed_tokens"], progress=False)
