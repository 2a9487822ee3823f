"""A trained posterior as the next task's prior: values, KL, gradients, chains, checkpoints, and what it refuses."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bayeformers
from bayeformers import (
    MopedPrior,
    PosteriorPrior,
    VariationalPosterior,
    bayesian_config,
    kl_divergence,
    posterior_as_prior,
    to_bayesian,
    to_deterministic,
    unfreeze,
)
from bayeformers.distributions import prior_from_dict
from bayeformers.nn import variational_tensors
from tests.cases import case
from tests.reference import moped_sigma, sigma


class Net(nn.Module):
    """A table with a padding row, tied to a decoder, and a head."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 3, padding_idx=2)
        self.hidden = nn.Linear(3, 3)
        self.decoder = nn.Linear(3, 6, bias=False)
        self.decoder.weight = self.table.weight
        self.head = nn.Linear(6, classes)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.decoder(torch.tanh(self.hidden(self.table(ids)))))


def net(seed: int = 0, classes: int = 4) -> Net:
    torch.manual_seed(seed)
    return Net(classes).double()


def moved(model: nn.Module, seed: int = 5) -> nn.Module:
    """As after training: every Parameter elsewhere."""
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            generator = torch.Generator().manual_seed(seed + number)
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter), alpha=0.2)
    return model


def task_a(**options: Any) -> nn.Module:
    return moved(to_bayesian(net(), 0.2, **{"freeze": False, **options}))


def reference_kl(model: nn.Module, posterior: dict[str, tuple[Tensor, Tensor]]) -> Tensor:
    """Sum over all tensors but the padding row, by torch.distributions, in float64."""
    total = torch.zeros((), dtype=torch.float64)
    for tensor in variational_tensors(model):
        rows = [r for r in range(len(tensor.loc)) if r != tensor.spec.padding_idx]
        centre, scale = posterior[tensor.name]
        q = torch.distributions.Normal(tensor.loc.detach().double()[rows], sigma(tensor.rho)[rows])
        total += torch.distributions.kl_divergence(q, torch.distributions.Normal(centre[rows], scale[rows])).sum()
    return total


def posterior_of(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    return {t.name: (t.loc.detach().double().clone(), sigma(t.rho)) for t in variational_tensors(model)}


@pytest.mark.parametrize("given", ["model", "posterior", "prior"])
@pytest.mark.parametrize("freeze", [True, False])
def test_posterior_becomes_prior(given: str, freeze: bool) -> None:
    """N(mu_A, sigma_A^2) for every tensor that A has; sigma starts there, mu stays the model's own."""
    a, own = task_a(), net(seed=9)
    prior = {"model": a, "posterior": VariationalPosterior(a), "prior": posterior_as_prior(a)}[given]
    b = to_bayesian(net(seed=9), 0.05, freeze=freeze, prior=prior)
    for tensor in variational_tensors(b):
        centre, scale = posterior_of(a)[tensor.name]
        assert torch.equal(tensor.loc, own.get_parameter(tensor.name))
        assert torch.equal(tensor.module.prior_centre(tensor.parameter_name), centre)
        torch.testing.assert_close(tensor.module.prior_scale(tensor.parameter_name), scale, rtol=1e-6, atol=0)
        torch.testing.assert_close(tensor.scale(), scale, rtol=1e-6, atol=0)
    expected = reference_kl(b, posterior_of(a))
    assert float(expected) > 1  # the means differ: a frozen mean is not taken for its prior's centre
    torch.testing.assert_close(kl_divergence(b), expected, rtol=1e-6, atol=1e-6)
    moved(b, 77)
    torch.testing.assert_close(kl_divergence(b), reference_kl(b, posterior_of(a)), rtol=1e-6, atol=1e-6)


def test_gradient() -> None:
    """In every mean and rho against torch.distributions; the padding row has none."""
    a = task_a()
    b = moved(to_bayesian(net(seed=9), freeze=False, prior=a), 33)
    kl_divergence(b).backward()
    for tensor in variational_tensors(b):
        rows = [r for r in range(len(tensor.loc)) if r != tensor.spec.padding_idx]
        mu, rho = (p.detach().double().requires_grad_() for p in (tensor.loc, tensor.rho))
        q = torch.distributions.Normal(mu[rows], torch.nn.functional.softplus(rho)[rows])
        p = torch.distributions.Normal(*(x[rows] for x in posterior_of(a)[tensor.name]))
        torch.distributions.kl_divergence(q, p).sum().backward()
        torch.testing.assert_close(tensor.loc.grad, mu.grad, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(tensor.rho.grad.double(), rho.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("freeze", [True, False])
def test_same_network_after_to_deterministic(freeze: bool) -> None:
    """The posterior is taken first: then KL = 0 at the start of task B, and grows when B moves."""
    a = task_a()
    prior = posterior_as_prior(a)
    b = to_bayesian(to_deterministic(a), freeze=freeze, prior=prior)
    assert b is a
    assert abs(float(kl_divergence(b).detach())) < 1e-9
    moved(b)
    assert float(kl_divergence(b).detach()) > 1


def test_prior_is_a_copy() -> None:
    """Neither training A further nor training B changes the prior."""
    a = task_a()
    prior = posterior_as_prior(a)
    b = to_bayesian(net(seed=9), freeze=False, prior=prior)
    c = to_bayesian(net(seed=9), freeze=False, prior=prior)
    before, kl = posterior_of(a), float(kl_divergence(c).detach())
    moved(a, 50)
    moved(b, 60)
    for tensor in variational_tensors(c):
        assert torch.equal(tensor.module.prior_centre(tensor.parameter_name), before[tensor.name][0])
    assert float(kl_divergence(c).detach()) == kl
    torch.testing.assert_close(kl_divergence(b), reference_kl(b, before), rtol=1e-6, atol=1e-6)
    pointers = {p.data_ptr() for m in (a, b, c) for p in (*m.parameters(), *m.buffers())}
    assert len(pointers) == sum(len([*m.parameters(), *m.buffers()]) for m in (a, b, c))


def test_chain_of_tasks() -> None:
    """A -> B -> C: C's prior is B's posterior, not A's."""
    a = task_a()
    b = moved(to_bayesian(net(seed=9), freeze=False, prior=a), 20)
    expected = posterior_of(b)
    c = to_bayesian(to_deterministic(copy.deepcopy(b)), freeze=False, prior=VariationalPosterior(b))
    assert abs(float(kl_divergence(c).detach())) < 1e-9
    moved(c, 40)
    torch.testing.assert_close(kl_divergence(c), reference_kl(c, expected), rtol=1e-6, atol=1e-6)
    assert not any("prior" in key for key in to_deterministic(c).state_dict())


@pytest.mark.parametrize("freeze", [True, False])
def test_fresh_head(freeze: bool) -> None:
    """Tensors that A has not, or that are excluded, take MopedPrior and the initial scale of delta."""
    a = task_a(exclude_modules=["head"])
    b = to_bayesian(net(seed=9, classes=7), 0.3, freeze=freeze, prior=a)
    assert bayesian_config(b).prior.fresh == ("head.weight", "head.bias")
    other = to_bayesian(
        net(seed=9, classes=7), 0.3, freeze=freeze, prior=posterior_as_prior(task_a(), exclude=["head"])
    )
    for model in (b, other):
        weight = net(seed=9, classes=7).head.weight.detach()
        torch.testing.assert_close(model.head.variational("weight").scale, moped_sigma(weight, 0.3), rtol=1e-6, atol=0)
        assert model.head.prior_scale("weight") is None
        assert ("weight_prior_centre" in dict(model.head.named_buffers())) is not freeze
        known = posterior_of(a)
        fresh = {
            n: (w0.detach(), moped_sigma(w0, 0.3))
            for n, w0 in (("head.weight", weight), ("head.bias", net(9, 7).head.bias))
        }
        torch.testing.assert_close(kl_divergence(model), reference_kl(model, {**known, **fresh}), rtol=1e-6, atol=1e-6)


def test_unfreeze() -> None:
    """A frozen model with a prior elsewhere: unfreezing stores the centres of fresh tensors only."""
    a = task_a(exclude_modules=["head"])
    b = to_bayesian(net(seed=9), 0.3, prior=a)
    before = float(kl_divergence(b).detach())
    unfreeze(b)
    assert float(kl_divergence(b).detach()) == pytest.approx(before, rel=1e-9)
    assert torch.equal(b.hidden.weight_prior_centre, posterior_of(a)["hidden.weight"][0])
    assert torch.equal(b.head.weight_prior_centre, net(seed=9).head.weight)


def test_multiplicative_scales() -> None:
    """sigma_A is taken as it is, whichever way either model writes it."""
    for scale_a in ("additive", "multiplicative"):
        a = task_a(scale=scale_a)
        expected = {t.name: t.scale().detach() for t in variational_tensors(a)}
        for scale_b in ("additive", "multiplicative"):
            b = to_bayesian(net(seed=9), freeze=False, prior=a, scale=scale_b)
            for tensor in variational_tensors(b):
                torch.testing.assert_close(tensor.scale(), expected[tensor.name], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    """Centres follow the means' dtype, scales stay float32; KL is 0 on the same means."""
    a = task_a().float()
    b = to_bayesian(to_deterministic(copy.deepcopy(a)).to(dtype), freeze=False, prior=a).to(dtype)
    assert b.hidden.weight_prior_centre.dtype == dtype and b.hidden.weight_prior_scale.dtype == torch.float32
    kl = kl_divergence(b)
    kl.backward()
    assert abs(float(kl.detach())) < 1e-4
    assert all(torch.isfinite(p.grad).all() for p in b.parameters())


@pytest.mark.parametrize("freeze", [True, False])
@pytest.mark.parametrize("name", ["bert", "gpt2-lm"])
def test_checkpoint(name: str, freeze: bool, tmp_path: Path) -> None:
    """The prior is in B's own checkpoint: values, fresh tensors, KL, and the flags."""
    exclude = {"bert": "classifier", "gpt2-lm": "transformer.h.1.mlp"}[name]
    a = moved(to_bayesian(case(name).build(), 0.2, exclude_modules=[exclude]))
    b = moved(to_bayesian(case(name).build(), 0.2, freeze=freeze, prior=a), 30)
    b.save_pretrained(tmp_path)
    recorded = json.loads((tmp_path / "config.json").read_text())["bayesian"]["prior"]
    assert recorded == {"type": "posterior", "fresh": list(bayesian_config(b).prior.fresh), "relative_scale": 1.0}
    again = bayeformers.from_pretrained(tmp_path)
    assert bayesian_config(again) == bayesian_config(b)
    assert dict(again.state_dict()).keys() == dict(b.state_dict()).keys()
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in b.state_dict().items())
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in b.parameters()]
    torch.testing.assert_close(kl_divergence(again), kl_divergence(b), rtol=1e-6, atol=1e-6)


def test_checkpoint_in_half_precision(tmp_path: Path) -> None:
    a = moved(to_bayesian(case("bert").build(), 0.2))
    to_bayesian(case("bert").build(), 0.2, prior=a, scale="multiplicative").save_pretrained(tmp_path)
    again = bayeformers.from_pretrained(tmp_path, dtype=torch.bfloat16)
    wide = {k for k, v in again.state_dict().items() if k.endswith(("_rho", "_prior_scale", "_scale_floor"))}
    assert {again.state_dict()[key].dtype for key in wide} == {torch.float32}
    assert torch.isfinite(kl_divergence(again))


def test_checkpoint_without_its_prior(tmp_path: Path) -> None:
    """A prior lost on the way is an error, not another prior."""
    from safetensors.torch import load_file, save_file

    model = case("bert").build()
    to_bayesian(model, prior=moved(to_bayesian(case("bert").build(), 0.2))).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    for ending in ("_prior_scale", "_prior_centre"):
        kept = {key: value for key, value in load_file(file).items() if not key.endswith(ending)}
        save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=r"it lacks \['.*_prior_"):
            bayeformers.from_pretrained(tmp_path)
        model.save_pretrained(tmp_path)


def test_configuration_is_small() -> None:
    """The model's configuration and its layers hold no tensors of A; the JSON form is the whole of it."""
    b = to_bayesian(net(seed=9), prior=task_a())
    prior = bayesian_config(b).prior
    assert prior.tensors == {} and all(m.prior is prior for m in (b.table, b.hidden, b.head))
    assert prior_from_dict(json.loads(json.dumps(prior.to_dict()))) == prior


# ------------------------------------------------------------------------------------------------------------ refusals


def fails(prior: Any, match: str, error: type[Exception] = ValueError, **options: Any) -> None:
    """Refused before anything changes."""
    model = net(seed=9, classes=7)
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=match):
        to_bayesian(model, prior=prior, **options)
    assert type(model.hidden) is nn.Linear and model.state_dict().keys() == state.keys()


def test_other_shape_names_the_tensor() -> None:
    fails(task_a(), r"`prior`.*'head\.weight' has shape \(4, 6\).*\(7, 6\).*exclude")


def test_no_tensor_in_common() -> None:
    fails(moved(to_bayesian(nn.Sequential(nn.Linear(2, 2)))), r"`prior`.*no tensor is in both")
    fails(PosteriorPrior(), r"`prior`.*no tensor")
    fails(task_a(target_modules=["head"]), r"`prior`.*no tensor", exclude_modules=["head"])


def test_not_a_posterior() -> None:
    fails(net(), r"`prior`.*Net.*no Bayesian layer.*to_bayesian")
    fails(SimpleNamespace(model=net()), r"`prior`.*SimpleNamespace.*no Bayesian layer")  # as a Laplace posterior
    fails(SimpleNamespace(model="bert"), r"`model` must be a converted model", TypeError)
    fails("task a", r"`prior` must be", TypeError)
    fails(MopedPrior, r"`prior` must be", TypeError)
    fails({"type": "posterior"}, r"`prior` must be", TypeError)
    fails(posterior_as_prior, r"`prior` must be", TypeError)


@pytest.mark.parametrize("exclude", ["head", ["heads"], ["hea"], ["head.weigh"], [""]])
def test_bad_exclude(exclude: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="`exclude`"):
        posterior_as_prior(task_a(), exclude=exclude)


@pytest.mark.parametrize("source", [None, 3, "model", [net()], {"model": 1}])
def test_bad_source(source: Any) -> None:
    with pytest.raises(TypeError, match="`model` must be a converted model"):
        posterior_as_prior(source)
