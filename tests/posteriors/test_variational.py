"""The posterior of a converted model: the draws of `fixed_draw`, kept while they stand."""

from __future__ import annotations

import functools
import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bayeformers
from bayeformers import fixed_draw, posterior_mean, to_bayesian
from bayeformers.posteriors import BasePosterior, Posterior, VariationalPosterior, predict
from tests.cases import CASES, Case, Part, case

PARTS: dict[str, tuple[Part, ...]] = {
    "head": ("head",),
    "last+head": ("last", "head"),
    "middle": ("middle",),
    "all": ("head", "last", "middle", "embeddings"),
    "embeddings": ("embeddings",),
}


def converted(this: Case, parts: tuple[Part, ...] = (), delta: float = 0.2) -> nn.Module:
    """The case with Bayesian layers in ``parts``, owners of their tied weights included; no parts: everywhere."""
    names = {name for part in parts for name in this.matching(part)}
    for group in this.tied:
        owners = {name.rpartition(".")[0] for name in group} & set(this.layers)
        names |= owners if owners & names else set()
    if parts and not names:
        pytest.skip("no layer of this part can be converted")
    pattern = "|".join(name.replace(".", r"\.") for name in sorted(names))
    return to_bayesian(this.build(), delta=delta, **({"target_modules": pattern} if parts else {}))


def logits(output: Any) -> Tensor:
    return next(value for value in output.values() if isinstance(value, Tensor) and value.is_floating_point())


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
@pytest.mark.parametrize("this", CASES, ids=lambda case: case.name)
def test_passes_are_fixed_draws(this: Case, parts: tuple[Part, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Shared prefix and kept draws against one plain forward per draw: not one bit differs."""
    monkeypatch.setattr("bayeformers.sampling.batched_passes.MAX_SHARE", 0.0)  # a batch of draws is rounded otherwise
    model = converted(this, parts)
    posterior = VariationalPosterior(model)
    options = {"use_cache": False} if "use_cache" in type(model).forward.__code__.co_varnames else {}
    plain = []
    for index in range(3):
        with torch.no_grad(), fixed_draw(model, index, seed=5):
            plain.append(logits(model(**this.inputs(), **options)))
    for _ in range(2):
        for output, expected in zip(posterior.passes(this.inputs(), num_samples=3, seed=5), plain, strict=True):
            assert torch.equal(logits(output), expected)
    assert not torch.equal(plain[0], plain[1])


def test_it_is_a_posterior() -> None:
    posterior = VariationalPosterior(converted(case("bert")))
    assert isinstance(posterior, Posterior) and isinstance(posterior, BasePosterior)
    assert posterior.num_draws is None


def test_the_mean_is_the_posterior_mean() -> None:
    model, inputs = converted(case("bert")).train(), case("bert").inputs()
    with torch.no_grad():
        with posterior_mean(model):
            expected = model(**inputs).logits
        with VariationalPosterior(model).mean():
            assert torch.equal(model(**inputs).logits, expected)


def test_a_draw_nests_and_restores() -> None:
    model, inputs = converted(case("bert")), case("bert").inputs()
    posterior = VariationalPosterior(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        mean = model(**inputs).logits
        with posterior.draw(0):
            outer = model(**inputs).logits
            with posterior.draw(1):
                inner = model(**inputs).logits
            assert torch.equal(model(**inputs).logits, outer)
        with pytest.raises(RuntimeError, match="on purpose"), posterior.draw(0):
            raise RuntimeError("on purpose")
        assert torch.equal(model(**inputs).logits, mean)
    assert not torch.equal(outer, inner)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_draw_carries_gradients() -> None:
    model, inputs = converted(case("bert")), case("bert").inputs()
    gradients = []
    for context in (VariationalPosterior(model).draw(2, seed=1), fixed_draw(model, 2, seed=1)):
        model.zero_grad()
        with context:
            model(**inputs).logits.square().sum().backward()
        gradients.append(model.classifier.weight_rho.grad.clone())
    assert torch.equal(*gradients) and gradients[0].abs().sum() > 0


# ----------------------------------------------------------------------------------------------------- kept draws


def outputs(posterior: VariationalPosterior, inputs: dict[str, Any], **options: Any) -> list[Tensor]:
    return [logits(output) for output in posterior.passes(inputs, **{"num_samples": 3, **options})]


def made_weights(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of tensors whose noise is made from here on."""
    from bayeformers.nn.variational import Draw

    made: list[str] = []

    def counting(original: Any, self: Draw, spec: Any, loc: Tensor) -> Any:
        value = original(self, spec, loc)
        if value is not None:
            made.append(spec.name)
        return value

    for name in ("_make_noise", "blocks"):
        monkeypatch.setattr(Draw, name, functools.partialmethod(functools.partial(counting, getattr(Draw, name))))
    return made


def test_draws_are_made_once_for_all_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    this = case("bert")
    posterior = VariationalPosterior(converted(this, ("last", "head")))
    made = made_weights(monkeypatch)
    first = outputs(posterior, this.inputs())
    assert made and len(made) == len(set(made)) * 3
    made.clear()
    assert all(map(torch.equal, outputs(posterior, this.inputs()), first))
    assert not made


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_the_first_draws_are_kept_while_they_fit(kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    this = case("bert")
    model = converted(this, ("head",))
    one_draw = 4 * (model.classifier.weight.numel() + model.classifier.bias.numel())
    posterior = VariationalPosterior(model, draw_cache_bytes=kept * one_draw + 1)
    first = outputs(posterior, this.inputs())
    made = made_weights(monkeypatch)
    assert all(map(torch.equal, outputs(posterior, this.inputs()), first))
    assert len(made) == (3 - kept) * 2


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.weight.mul_(2),
        lambda layer: layer.weight_rho.add_(1),
        lambda layer: setattr(layer.weight, "data", layer.weight.data * 2),
        lambda layer: layer.load_state_dict({name: value + 1 for name, value in layer.state_dict().items()}),
        lambda layer: layer.double().float().weight.add_(1),
    ],
    ids=["mean in place", "scale in place", "mean swapped", "state dict", "cast"],
)
def test_kept_draws_are_never_stale(change: Any) -> None:
    this = case("bert")
    model = converted(this, ("head",))
    posterior = VariationalPosterior(model)
    before = outputs(posterior, this.inputs())
    with torch.no_grad():
        change(model.classifier)
    after = outputs(posterior, this.inputs())
    assert all(map(torch.equal, after, outputs(VariationalPosterior(model), this.inputs())))
    assert not torch.equal(before[0], after[0])


def test_another_seed_replaces_the_kept_draws() -> None:
    this = case("bert")
    posterior = VariationalPosterior(converted(this))
    zero, one = (outputs(posterior, this.inputs(), seed=seed) for seed in (0, 1))
    assert not torch.equal(zero[0], one[0])
    assert all(map(torch.equal, outputs(posterior, this.inputs(), seed=0), zero))


def test_clear_cache_frees_the_draws() -> None:
    this = case("bert")
    posterior = VariationalPosterior(converted(this))
    outputs(posterior, this.inputs())
    draws = [weakref.ref(draw) for draw in posterior._cache.values()]
    assert len(draws) == 3
    posterior.clear_cache()
    gc.collect()
    assert all(draw() is None for draw in draws)


# -------------------------------------------------------------------------------------------------- save and predict


def test_save_is_the_models_checkpoint(tmp_path: Path) -> None:
    this = case("bert")
    posterior = VariationalPosterior(converted(this))
    expected = posterior.predict(this.inputs(), num_samples=3)
    posterior.save(tmp_path)
    reloaded = bayeformers.from_pretrained(tmp_path).eval()
    assert torch.equal(predict(reloaded, this.inputs(), num_samples=3).log_probs, expected.log_probs)


def test_a_plain_module_has_no_checkpoint_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`model` is a plain Linear: save its `state_dict\(\)`"):
        VariationalPosterior(to_bayesian(nn.Linear(2, 2))).save(tmp_path)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"`model` \(Linear\) has no Bayesian layer"):
        VariationalPosterior(nn.Linear(2, 2))
    model = to_bayesian(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="`draw_cache_bytes` must be >= 0, got -1"):
        VariationalPosterior(model, draw_cache_bytes=-1)
    posterior = VariationalPosterior(model)
    with pytest.raises(ValueError, match="`index` must be"), posterior.draw(-1):
        pass
    with pytest.raises(TypeError, match=r"`index` must be a whole number, got 0\.5"), posterior.draw(0.5):
        pass
    with pytest.raises(TypeError, match="`seed` must be a whole number, got None"), posterior.draw(0, None):
        pass
