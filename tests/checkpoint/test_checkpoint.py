"""`from_pretrained`: whatever was saved comes back, priors, centres, flags, a Laplace posterior; state dicts too.

The matrix of architectures, shards, dtypes and device maps is in `test_conversion_matrix.py`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import bayeformers
from bayeformers import (
    ARDPrior,
    DoubleExponentialPrior,
    EmpiricalBayesPrior,
    LaplacePosterior,
    LogUniformPrior,
    MopedPrior,
    NormalPrior,
    ScaleMixturePrior,
    bayesian_config,
    fixed_draw,
    kl_divergence,
    laplace,
    summary,
    to_bayesian,
    to_deterministic,
    unfreeze,
)
from bayeformers import nn as bnn
from tests.cases import case
from tests.checkpoint.reload_worker import describe
from tests.conversion.test_conversion_matrix import assert_same_description, assert_same_state, state_of

PRIORS = [
    MopedPrior(2.0),
    NormalPrior(0.3),
    NormalPrior(0.3, 0.1),
    EmpiricalBayesPrior(),
    EmpiricalBayesPrior(centre=0.0),
    EmpiricalBayesPrior(per="layer"),
    DoubleExponentialPrior(0.2),
    DoubleExponentialPrior(0.2, centre=0.1),
    LogUniformPrior(),
    ARDPrior(),
    ScaleMixturePrior(0.2, 0.5, 0.01),
    ScaleMixturePrior(quadrature=5),
]
# ties, and tensors that two layers share, matter to priors with a centre and to those of a tensor or a layer
TIED = [MopedPrior(2.0), NormalPrior(0.3), EmpiricalBayesPrior(), EmpiricalBayesPrior(per="layer")]
SAVED = [*(("bert", prior) for prior in PRIORS), *(("bart-lm", prior) for prior in TIED)]


def trained(name: str = "bert", **options: Any) -> nn.Module:
    """Converted, then every Parameter that trains moved."""
    model = to_bayesian(case(name).build(), delta=0.2, **options)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model


def reload(model: nn.Module, folder: Path, **options: Any) -> nn.Module:
    model.save_pretrained(folder)
    return bayeformers.from_pretrained(folder, **options)


@pytest.mark.protects("prior_is_saved")
@pytest.mark.parametrize(("name", "prior"), SAVED, ids=repr)
@pytest.mark.parametrize("freeze", [True, False])
def test_prior_is_saved(name: str, prior: Any, freeze: bool, tmp_path: Path) -> None:
    """prior_is_saved: the same KL, centres, flags and configuration; it trains on and saves again."""
    model = trained(name, prior=prior, freeze=freeze)
    loaded = reload(model, tmp_path / "a")
    assert bayesian_config(loaded) == bayesian_config(model)
    assert_same_description(describe(loaded, case(name).inputs()), describe(model, case(name).inputs()))
    centres = {n: b for n, b in model.named_buffers() if n.endswith("_prior_centre")}
    assert bool(centres) == (prior.needs_centre and not freeze)
    for key, centre in centres.items():
        assert torch.equal(loaded.get_buffer(key), centre)
    again = reload(loaded, tmp_path / "b")
    assert_same_description(describe(again, case(name).inputs()), describe(model, case(name).inputs()))
    again.train()(**case(name).inputs()).logits.sum().backward()
    kl_divergence(again).backward()
    assert all(p.grad is not None for n, p in again.named_parameters() if n.endswith("rho"))


def test_unfrozen_model(tmp_path: Path) -> None:
    """Frozen, unfrozen, trained, saved: the centres are the weights from before, the KL what it was."""
    model = unfreeze(to_bayesian(case("gpt2-lm").build(), delta=0.1))
    original = case("gpt2-lm").build()
    with torch.no_grad():
        model.transformer.wte.weight.add_(0.05)
    loaded = reload(model, tmp_path)
    assert torch.equal(loaded.transformer.wte.weight_prior_centre, original.transformer.wte.weight)
    assert summary(loaded).kl == pytest.approx(summary(model).kl, rel=1e-6)
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    assert loaded.lm_head.weight_rho is loaded.transformer.wte.weight_rho


def test_flags_of_the_user_come_back(tmp_path: Path) -> None:
    """Means that the user had frozen under freeze=False have no stored centre: they are it, frozen after a reload."""
    model = case("bert").build()
    model.bert.embeddings.requires_grad_(False)
    to_bayesian(model, freeze=False)
    loaded = reload(model, tmp_path)
    for tensor in bnn.variational_tensors(loaded):
        assert tensor.loc.requires_grad == (not tensor.name.startswith("bert.embeddings")), tensor.name
    assert summary(loaded).kl == pytest.approx(0, abs=1e-3)


def test_modules_to_save_come_back(tmp_path: Path) -> None:
    model = to_bayesian(case("roberta").build(), modules_to_save=["classifier"])
    loaded = reload(model, tmp_path)
    assert {n: p.requires_grad for n, p in loaded.named_parameters()} == {
        n: p.requires_grad for n, p in model.named_parameters()
    }


def test_dropout_comes_back(tmp_path: Path) -> None:
    """Off after a reload, as it was; `to_deterministic` knows the rates."""
    loaded = reload(to_bayesian(case("bert").build()), tmp_path / "a")
    assert loaded.bert.embeddings.dropout.p == 0.0
    assert to_deterministic(loaded).bert.embeddings.dropout.p == 0.1
    kept = reload(to_bayesian(case("bert").build(), keep_dropout=True), tmp_path / "b")
    assert kept.bert.embeddings.dropout.p == 0.1


def test_to_deterministic_after_a_reload(tmp_path: Path) -> None:
    """A loaded model is undone to what the plain loader gives."""
    model = to_bayesian(case("bert-mlm").build())
    loaded = to_deterministic(reload(model, tmp_path / "a"))
    to_deterministic(model).save_pretrained(tmp_path / "b")
    plain = type(model).from_pretrained(tmp_path / "b")
    a, b = state_of(loaded), state_of(plain)
    for state in (a, b):
        del state["identity"], state["config"]
        for attributes in state["attributes"].values():
            attributes.pop("name_or_path", None)
    assert_same_state(a, b)
    assert not hasattr(loaded.config, "bayesian")
    assert "bayesian" not in json.loads((tmp_path / "b" / "config.json").read_text())


def test_configuration_file(tmp_path: Path) -> None:
    """`config.json` says all that a reload needs, in plain JSON."""
    trained(prior=NormalPrior(0.3), modules_to_save=["classifier"]).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["architectures"] == ["BertForSequenceClassification"]
    bayesian = saved["bayesian"]
    assert bayesian["prior"] == {"type": "normal", "std": 0.3, "centre": "pretrained"}
    assert (bayesian["version"], bayesian["noise_version"], bayesian["delta"], bayesian["freeze"]) == (1, 3, 0.2, True)
    assert bayesian["modules"]["bert.pooler.dense"] == "Linear" and bayesian["modules_to_save"] == ["classifier"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    """Means in the dtype asked for, scales in float32 and equal."""
    model = trained("gpt2-lm")
    loaded = reload(model, tmp_path, dtype=dtype)
    for name, parameter in loaded.named_parameters():
        expected = model.get_parameter(name)
        assert parameter.dtype == (torch.float32 if name.endswith("_rho") else dtype), name
        assert torch.equal(parameter, expected.to(parameter.dtype)), name
    assert torch.isfinite(kl_divergence(loaded))


def test_keyword_arguments_reach_the_loader(tmp_path: Path) -> None:
    trained().save_pretrained(tmp_path)
    loaded, info = bayeformers.from_pretrained(str(tmp_path), output_loading_info=True, attn_implementation="eager")
    assert loaded.config._attn_implementation == "eager" and not loaded.training
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    with pytest.raises(OSError, match="nowhere"):
        bayeformers.from_pretrained(tmp_path / "nowhere")


# ------------------------------------------------------------------------------------------- with a Laplace posterior


def fitted(name: str = "bert", **options: Any) -> tuple[nn.Module, LaplacePosterior]:
    """An unconverted model and its posterior from one batch of the case's inputs."""
    model = case(name).build().eval()
    return model, laplace.fit(model, [case(name).inputs()], fisher="mc", progress=False, **options)


def saved(folder: Path, name: str = "bert", **options: Any) -> tuple[nn.Module, LaplacePosterior]:
    model, posterior = fitted(name, **options)
    model.save_pretrained(folder)
    posterior.save(folder)
    return model, posterior


@pytest.mark.parametrize("name", ["bert", "roberta", "gpt2-lm"])
def test_laplace_posterior_comes_back(name: str, tmp_path: Path) -> None:
    """The model as it was trained, with its posterior as an attribute: the same draws, bit for bit."""
    model, posterior = saved(tmp_path, name, temperature=0.5, prior_precision="marglik_per_layer")
    loaded = bayeformers.from_pretrained(tmp_path)
    found = loaded.posterior
    assert type(loaded) is type(model) and not loaded.training and not bayeformers.is_bayesian(loaded)
    assert isinstance(found, LaplacePosterior) and found.model is loaded
    assert repr(found.record) == repr(posterior.record)  # of unlabelled data: NaN is unequal to itself
    assert found.prior_precision == posterior.prior_precision
    assert (found.temperature, found.noise_std) == (posterior.temperature, posterior.noise_std)
    with found.draw(1, seed=3), posterior.draw(1, seed=3):
        drawn = loaded.state_dict()
        assert all(torch.equal(value, drawn[key]) for key, value in model.state_dict().items())
    inputs = {key: value for key, value in case(name).inputs().items() if key != "labels"}
    one, other = (bayeformers.predict(m, inputs, method="sample", num_samples=2) for m in (loaded, found))
    assert torch.equal(one.log_probs, other.log_probs)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.bfloat16, 0.05), (torch.float64, 1e-4)])
def test_laplace_posterior_in_another_dtype(dtype: torch.dtype, rtol: float, tmp_path: Path) -> None:
    """Its own tensors stay as exact as they were saved; bfloat16 has 8 bits for the network."""
    model, _ = saved(tmp_path)
    loaded = bayeformers.from_pretrained(tmp_path, dtype=dtype)
    assert loaded.classifier.weight.dtype == dtype
    inputs = {key: value for key, value in case("bert").inputs().items() if key != "labels"}
    covariance = loaded.posterior.predict(inputs).logit_covariance
    expected = LaplacePosterior.load(tmp_path, model).predict(inputs).logit_covariance
    error = (covariance - expected).norm() / expected.norm()
    assert float(error) < rtol


def test_a_folder_without_any_posterior(tmp_path: Path) -> None:
    case("bert").build().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"holds no Bayesian model.*fit_laplace"):
        bayeformers.from_pretrained(tmp_path)


def test_a_posterior_of_other_weights(tmp_path: Path) -> None:
    """The model was trained on and saved into the same folder."""
    model, _ = saved(tmp_path)
    with torch.no_grad():
        model.classifier.weight.mul_(1.5)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"other weights.*classifier"):
        bayeformers.from_pretrained(tmp_path)


def test_a_damaged_posterior(tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / "laplace.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="damaged"):
        bayeformers.from_pretrained(tmp_path)


def test_the_variational_layers_win(tmp_path: Path) -> None:
    """A converted model, saved where a posterior of the unconverted one still lies."""
    model, _ = saved(tmp_path)
    to_bayesian(model).save_pretrained(tmp_path)
    loaded = bayeformers.from_pretrained(tmp_path)
    assert bayeformers.is_bayesian(loaded) and not hasattr(loaded, "posterior")


# ----------------------------------------------------------------------------------------------------- without a config


def test_plain_torch_model() -> None:
    """Without a `.config`: the state dict after the same call, strictly."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        return to_bayesian(nn.Sequential(nn.Embedding(5, 4, padding_idx=0), nn.Linear(4, 2)), freeze=False)

    model, other = build(), build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    other.load_state_dict(model.state_dict())
    ids: Tensor = torch.arange(5)
    with fixed_draw(model, 0), fixed_draw(other, 0):
        assert torch.equal(model(ids), other(ids))
    torch.testing.assert_close(kl_divergence(model), kl_divergence(other))


def test_an_attention_of_torch_keeps_its_scales(tmp_path: Path) -> None:
    """transformers initialises what a file lacks module by module; such an attention then resets itself, whole."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.SiglipVisionConfig(**sizes, image_size=8, patch_size=4)
    for scale in ("additive", "multiplicative"):
        model = to_bayesian(transformers.SiglipVisionModel(config), freeze=False, scale=scale)
        with torch.no_grad():
            for value in model.state_dict().values():
                value.add_(torch.rand_like(value))
        model.save_pretrained(tmp_path)
        saved, loaded = model.state_dict(), bayeformers.from_pretrained(tmp_path).state_dict()
        assert "head.attention.in_proj_weight_rho" in saved and saved.keys() == loaded.keys()
        assert all(torch.equal(value, loaded[name]) for name, value in saved.items())
