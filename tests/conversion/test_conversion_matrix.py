"""Every architecture of the matrix: which layers convert, and that the result is exactly a Gaussian over their weights.

References: the *original* deterministic model run on mu + sigma * eps (`torch.func.functional_call`), with eps
recomputed element by element in `tests/reference.py`.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bayeformers import (
    bayesian_config,
    fixed_draw,
    kl_divergence,
    posterior_mean,
    summary,
    to_bayesian,
    to_deterministic,
)
from bayeformers import nn as bnn
from bayeformers.nn.parameters import RandomParameters
from tests.cases import CASES, Case, case
from tests.checkpoint.reload_worker import describe
from tests.reference import gradients, noise_of, probe, run_with, sigma, sigma_slope, tensors_of

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
KINDS = {kind: getattr(bnn, kind) for kind in ("Linear", "Embedding", "Conv1D", "Conv1d", "Conv2d")}
RELOADED = {  # loader arguments and how the folder is written
    "sharded": ({}, {"max_shard_size": "20KB"}),
    "bfloat16": ({"dtype": "bfloat16"}, {}),
    "device_map": ({"device_map": "cpu"}, {}),
    "sharded_device_map": ({"device_map": {"": "cpu"}}, {"max_shard_size": "20KB"}),
}
WITHOUT_EFFECT = {  # the head reads the class token, which Funnel keeps apart from positions and segments
    f"funnel.encoder.blocks.1.0.attention.{name}" for name in ("r_kernel", "r_r_bias", "r_s_bias", "seg_embed")
}
RELOADED_MODELS = ("bert", "bert-mlm", "gpt2-lm", "bart-lm", "mixtral-lm", "deit")


def plain(item: Case) -> nn.Module:
    """The case's model without what else differs between `train()` and `eval()`: SpecAugment, XLNet's memory."""
    model = item.build()
    for option in ("apply_spec_augment", "use_mems_eval"):
        if hasattr(model.config, option):
            setattr(model.config, option, False)
    if item.name.startswith("mixtral"):
        model.config._experts_implementation = "eager"  # the grouped kernel has no float64
    return model


def converted(item: Case, **options: Any) -> nn.Module:
    """The case's model, Bayesian, its scales moved away from their initial values."""
    model = to_bayesian(plain(item), delta=0.2, **options)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_rho"):
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    return model


def negative_log_likelihood(item: Case, output: Any) -> Tensor:
    """The model's own loss; for a model without one, any scalar of its outputs."""
    return output.loss if item.labels() else probe(output)


def batch(item: Case) -> dict[str, Any]:
    """Inputs with labels; a decoder that makes its own inputs from the labels gets none."""
    inputs = item.inputs()
    if item.labels():
        inputs = {k: v for k, v in inputs.items() if not k.startswith("decoder_")}
    return {**inputs, **item.labels()}


def in_double(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same inputs in float64."""
    return {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}


def drawn(original: nn.Module, model: nn.Module, item: Case, index: int, seed: int = 0) -> dict[str, Tensor]:
    """Weights of a draw, from the reference noise in float64: first name -> tensor."""
    noise = noise_of(original, item.layers, index, seed, item.bare)
    scales = {name: sigma(model.get_parameter(f"{name}_rho")) for name in noise}
    return {name: (original.get_parameter(name).double() + scales[name] * eps).float() for name, eps in noise.items()}


def state_of(model: nn.Module) -> dict[str, Any]:
    """All that a conversion may change: tensors, flags, classes, instance attributes, hooks, configuration."""
    return {
        "state": {name: value.clone() for name, value in model.state_dict().items()},
        "flags": {name: p.requires_grad for name, p in model.named_parameters()},
        "identity": {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)},
        "classes": {name: type(m) for name, m in model.named_modules()},
        "attributes": {
            name: {k: v for k, v in vars(m).items() if isinstance(v, (bool, int, float, str))}
            for name, m in model.named_modules()
        },
        "keys": {name: set(vars(m)) for name, m in model.named_modules()},
        "hooks": {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()},
        "always": {name: dict(m._forward_hooks_always_called) for name, m in model.named_modules()},
        "config": model.config.to_dict() if hasattr(model, "config") else None,
        "tied": dict(getattr(model, "all_tied_weights_keys", None) or {}),
    }


def assert_same_state(a: dict[str, Any], b: dict[str, Any]) -> None:
    """Equal bit for bit."""
    assert a.keys() == b.keys()
    for key in a.keys() - {"state"}:
        assert a[key] == b[key], key
    assert a["state"].keys() == b["state"].keys()
    for name, value in a["state"].items():
        assert value.dtype == b["state"][name].dtype, name
        assert torch.equal(value, b["state"][name]), name


def assert_equal(a: list[Tensor], b: list[Tensor]) -> None:
    """Equal bit for bit, tensor by tensor."""
    assert len(a) == len(b) > 0
    for x, y in zip(a, b, strict=True):
        assert x.dtype == y.dtype and torch.equal(x, y), float((x - y).abs().max())


# ------------------------------------------------------------------------------------------------------------- layers


@pytest.mark.protects("conversion_by_class")
@each_case
def test_converts_exactly_the_expected_layers(case: Case) -> None:
    """conversion_by_class, subclass_layers: every layer that is listed, and no other."""
    original, model = case.build(), to_bayesian(case.build())
    found = {name: m for name, m in model.named_modules() if isinstance(m, bnn.BayesianModule)}
    assert set(found) == case.modules == set(bayesian_config(model).modules)
    for name, module in found.items():
        known = name in case.layers and name not in case.read
        assert isinstance(module, KINDS[case.layers[name]] if known else RandomParameters)
        assert isinstance(module, type(original.get_submodule(name)))
        assert all(getattr(module, f"{key}_rho").shape == module.get_parameter(key).shape for key in module.specs)
    assert {f"{n}.{key}".lstrip(".") for n, m in found.items() for key in m.specs} == case.tensors(original)


@each_case
def test_coverage(case: Case) -> None:
    """All matrices are random, of every model; what is not is named with a reason."""
    original, found = case.build(), summary(to_bayesian(case.build()))
    names = {name for name, _ in original.named_parameters(remove_duplicate=False)}
    left = names - case.tensors(original)
    assert all(original.get_parameter(name).dim() < 2 for name in left)
    assert found.matrix_coverage == 1.0 and found.coverage > 0.9
    assert all({name, name.rpartition(".")[0]} & found.skipped.keys() for name in left)
    assert not found.skipped.keys() & (case.modules | case.tensors(original))
    assert all(found.skipped.values())


@each_case
@pytest.mark.parametrize("held", [True, False])
def test_every_random_tensor_is_drawn(case: Case, held: bool) -> None:
    """No tensor has a KL and no noise: each scale has a gradient of the outputs, zeros where an example cancels it."""
    model = converted(case).train(not held)
    with fixed_draw(model, 0) if held else contextlib.nullcontext():
        probe(model(**case.inputs())).backward()
    assert {t.name for t in bnn.variational_tensors(model) if t.rho.grad is None} == case.unused


@each_case
def test_every_bare_tensor_moves_the_output(case: Case) -> None:
    """Each alone: with its scale wide and all others closed, a draw is another network than the mean (in float64)."""
    model = to_bayesian(plain(case), delta=0.5).double()
    inputs = in_double(case.inputs())
    scales = {tensor.name: tensor.rho for tensor in bnn.variational_tensors(model)}
    wide = {name: rho.detach().clone() for name, rho in scales.items()}
    with torch.no_grad(), fixed_draw(model, 0):
        for rho in scales.values():
            rho.fill_(-200.0)
        closed = tensors_of(model(**inputs))
        for name in sorted(case.bare - case.unused - WITHOUT_EFFECT):
            scales[name].copy_(wide[name])
            moved = max(float((a - b).abs().max()) for a, b in zip(tensors_of(model(**inputs)), closed, strict=True))
            assert moved > 1e-9, name
            scales[name].fill_(-200.0)


@pytest.mark.protects("wrapper_loses_api")
@each_case
def test_wrapper_loses_api(case: Case) -> None:
    """wrapper_loses_api: the same object, class and configuration; the old Parameters are the means."""
    model = case.build()
    kind, before = type(model), dict(model.named_parameters(remove_duplicate=False))
    random = case.tensors(model)
    assert to_bayesian(model) is model and type(model) is kind
    after = dict(model.named_parameters(remove_duplicate=False))
    assert all(after[name] is parameter for name, parameter in before.items())
    assert {name for name in after if name not in before} == {f"{name}_rho" for name in random}


@pytest.mark.protects("tied_weights")
@each_case
def test_tied_weights(case: Case) -> None:
    """tied_weights, kl_counted_once: tied means share one rho and one entry of the KL."""
    model = case.build()
    distinct = {id(model.get_parameter(name)) for name in case.tensors(model)}
    assert_ties(to_bayesian(model), case)
    names = [tensor.name for tensor in bnn.variational_tensors(model)]
    assert len(names) == len(set(names))
    assert len(names) == len(distinct)


def assert_ties(model: nn.Module, item: Case) -> None:
    """Means and scales are shared as the case says, and nothing else is."""
    owners: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), set()).add(name)
    scales = [{f"{n}_rho" for n in g if n.rpartition(".")[0] in item.layers} for g in item.tied]
    expected = {frozenset(g) for g in (*item.tied, *scales) if len(g) > 1}
    assert {frozenset(group) for group in owners.values() if len(group) > 1} == expected


# ----------------------------------------------------------------------------------------------------------- exactness


@pytest.mark.protects("mean_mode")
@each_case
def test_mean_mode(case: Case) -> None:
    """mean_mode: `eval()` and `posterior_mean` in `train()` give the original's outputs, bit for bit."""
    original = plain(case)
    for parameter in original.parameters():  # torch's matmul takes another path where no gradient is asked for
        parameter.requires_grad_(False)
    model = converted(case)
    model.requires_grad_(False)
    expected = tensors_of(original(**case.inputs()))
    assert_equal(tensors_of(model(**case.inputs())), expected)
    with posterior_mean(model):
        assert_equal(tensors_of(model.train()(**case.inputs())), expected)


@pytest.mark.protects("same_activations")
@each_case
def test_no_noise_equals_deterministic(case: Case) -> None:
    """Scale -> 0: a draw gives the deterministic logits."""
    original, model = plain(case), converted(case)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_rho"):
                parameter.fill_(-200.0)
    expected = tensors_of(original(**case.inputs()))
    for output in (model(**case.inputs()), model.train()(**case.inputs())):
        torch.testing.assert_close(tensors_of(output), expected, rtol=1e-5, atol=1e-5)
    with fixed_draw(model, 1):
        torch.testing.assert_close(tensors_of(model(**case.inputs())), expected, rtol=1e-5, atol=1e-5)


@each_case
def test_draws_are_the_reference_weights(case: Case) -> None:
    """A draw is the original network at mu + sigma * eps: in `train()` and in `eval()`, whatever was run before."""
    original, model = plain(case), converted(case)
    for index, seed in ((0, 0), (2, 9)):
        weights = drawn(original, model, case, index, seed)
        expected = tensors_of(run_with(original, weights, case.inputs()))
        for mode in (True, False):
            with fixed_draw(model.train(mode), index, seed):
                torch.testing.assert_close(tensors_of(model(**case.inputs())), expected, rtol=2e-4, atol=2e-5)


@each_case
@pytest.mark.parametrize("freeze", [True, False])
def test_rho_gradient_of_the_nll(case: Case, freeze: bool) -> None:
    """d NLL / d rho = sum dL/dw * eps * dsigma/drho, with dL/dw from the original model; dropout is off in `train()`.

    In float64, but the noise (and a table's sigma) is float32: relative errors of some 6e-8 in each weight, which the
    depth of the network multiplies; gradients that cancel (a key's bias) are compared with the largest one.
    """
    original, model = plain(case).double(), converted(case, freeze=freeze).double().train()
    inputs = in_double(batch(case))
    with fixed_draw(model, 3):
        negative_log_likelihood(case, model(**inputs)).backward()
    noise = noise_of(original, case.layers, 3, bare=case.bare)
    weights = {n: original.get_parameter(n) + sigma(model.get_parameter(f"{n}_rho")) * eps for n, eps in noise.items()}
    by_weight = gradients(lambda w: negative_log_likelihood(case, run_with(original, w, inputs)), weights)
    largest = max(float(g.abs().max()) for g in by_weight.values())
    assert largest > 0
    for name, eps in noise.items():
        rho, mean = model.get_parameter(f"{name}_rho"), model.get_parameter(name)
        found = torch.zeros_like(rho) if rho.grad is None else rho.grad
        expected = (by_weight[name] * eps * sigma_slope(rho)).float()
        close = {"rtol": 2e-5, "atol": 2e-6 * largest, "msg": lambda text, name=name: f"{name}: {text}"}
        torch.testing.assert_close(found, expected, **close)
        if freeze or not original.get_parameter(name).requires_grad:
            assert mean.grad is None
        else:
            found = torch.zeros_like(mean) if name in case.unused else mean.grad
            torch.testing.assert_close(found, by_weight[name], **close)


@pytest.mark.protects("kl_has_gradient")
@each_case
def test_kl_has_gradient(case: Case) -> None:
    """kl_has_gradient: away from its minimum every rho is pulled, each by its own tensor's KL alone."""
    model = converted(case)
    kl_divergence(model).backward()
    for tensor in bnn.variational_tensors(model):
        grad, padding = tensor.rho.grad, tensor.spec.padding_idx
        assert grad is not None and torch.isfinite(grad).all()
        pulled = (grad != 0).float()
        if padding is not None:
            assert pulled[padding].sum() == 0
            pulled[padding] = 1
        assert pulled.mean() > 0.99, tensor.name


@pytest.mark.protects("noise_is_fresh")
@each_case
def test_noise_is_fresh(case: Case) -> None:
    """noise_is_fresh: training forwards differ, draws differ from each other, `fixed_draw` repeats bit for bit."""
    model = converted(case)

    def outputs(index: int, seed: int = 0) -> list[Tensor]:
        with torch.no_grad(), fixed_draw(model, index, seed):
            return tensors_of(model(**case.inputs()))

    first = outputs(0)
    model.train()
    with torch.no_grad():
        a, b = tensors_of(model(**case.inputs())), tensors_of(model(**case.inputs()))
    model.eval()
    for other in (a, outputs(1), outputs(0, seed=1)):
        assert not any(torch.equal(x, y) for x, y in zip(first, other, strict=True) if x.numel() > 1)
    assert not any(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert_equal(outputs(0), first)
    with fixed_draw(model, 0):  # with gradients the draw is made another way: the same numbers
        torch.testing.assert_close(tensors_of(model(**case.inputs())), first, rtol=1e-5, atol=1e-6)
    torch.manual_seed(7)
    model.train()
    with torch.no_grad():
        a = tensors_of(model(**case.inputs()))
        torch.manual_seed(7)
        assert_equal(tensors_of(model(**case.inputs())), a)


# ---------------------------------------------------------------------------------------------------------- life after


@each_case
def test_to_deterministic_restores(case: Case) -> None:
    """Everything is as before: tensors, their identity, flags, classes, attributes, dropout, hooks, config."""
    model = case.build().train()
    next(model.parameters()).requires_grad_(False)
    model(**case.inputs())  # some models keep constants of their first forward
    before = state_of(model)
    to_bayesian(model)
    with fixed_draw(model, 0):
        model(**case.inputs())
    model(**case.inputs())
    assert to_deterministic(model) is model
    assert_same_state(state_of(model), before)


@each_case
def test_copies(case: Case) -> None:
    """deepcopy and pickle give the same draws, ties and class, and nothing shared."""
    model = converted(case)
    expected = describe(model, case.inputs())
    with fixed_draw(model, 0):
        copies = [copy.deepcopy(model)]  # in the middle of a draw
    copies[0] = copy.deepcopy(model)
    if case.name != "wav2vec2":  # torch refuses to pickle parametrized modules (its weight norm)
        copies.append(pickle.loads(pickle.dumps(model)))
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        copies.append(torch.load(buffer, weights_only=False))
    for other in copies:
        assert type(other) is type(model)
        assert {n: type(m).__name__ for n, m in other.named_modules()} == {
            n: type(m).__name__ for n, m in model.named_modules()
        }
        assert_same_description(describe(other, case.inputs()), expected)
        assert not {id(p) for p in other.parameters()} & {id(p) for p in model.parameters()}
        assert type(to_deterministic(other)) is type(model)
        assert not any(isinstance(m, bnn.BayesianModule) for m in other.modules())
    assert_same_description(describe(model, case.inputs()), expected)


def assert_same_description(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Same class, ties and flags; scales and the weights of a draw bit for bit; outputs and KL to rounding."""
    assert found.keys() == expected.keys()
    for key in ("class", "ties", "requires_grad"):
        assert found[key] == expected[key], key
    for key in ("rho", "weights 5"):
        assert found[key].keys() == expected[key].keys()
        assert_equal(list(found[key].values()), list(expected[key].values()))
    for key in ("mean", "draw 0", "draw 5"):  # sums may round by where a loaded file lies in memory
        torch.testing.assert_close(found[key], expected[key], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found["kl"], expected["kl"], rtol=1e-5, atol=1e-6)


@each_case
def test_bfloat16(case: Case) -> None:
    """`.to(bfloat16)`: means in bfloat16, rho (and its gradient) in float32, ties intact, a draw runs."""
    model = converted(case)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if name.endswith("_rho"):
            assert torch.equal(parameter, before[name]) and parameter.dtype == torch.float32
        else:
            assert parameter.dtype == torch.bfloat16
    assert_ties(model, case)
    inputs = {k: v.bfloat16() if v.is_floating_point() else v for k, v in case.inputs().items()}
    with fixed_draw(model, 0):
        output = model(**inputs)
    assert all(torch.isfinite(t).all() for t in tensors_of(output))
    probe(output).backward()
    grads = [p.grad for n, p in model.named_parameters() if n.endswith("_rho") and p.grad is not None]
    assert grads and all(g.dtype == torch.float32 and torch.isfinite(g).all() for g in grads)


@each_case
def test_resize_refuses(case: Case) -> None:
    """The new rows would have no scale: refused before anything changes, and possible after `to_deterministic`."""
    model = converted(case)
    before = state_of(model)
    with pytest.raises(RuntimeError, match="to_deterministic"):
        model.resize_token_embeddings(70)
    assert_same_state(state_of(model), before)


# ------------------------------------------------------------------------------------------------------- fresh process


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict[str, Any], dict[str, Any], Path]]:
    """What each model gives before it is saved and, loaded in one fresh process, after: (before, after, folder)."""
    root = tmp_path_factory.mktemp("saved")
    before: dict[str, dict[str, Any]] = {}
    for item in CASES:
        model = converted(item, freeze=len(before) % 2 == 0)
        save(model, item, root / item.name)
        before[item.name] = describe(model, item.inputs())
    for item in map(case, RELOADED_MODELS):
        for kind, (arguments, options) in RELOADED.items():
            name = f"{item.name}-{kind}"
            model = converted(item)
            save(model, item, root / name, arguments, **options)
            before[name] = describe(model.bfloat16() if kind == "bfloat16" else model, item.inputs())
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "tests.checkpoint.reload_worker", str(root)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: (value, torch.load(root / name / "draws.pt"), root / name) for name, value in before.items()}


def save(model: nn.Module, item: Case, folder: Path, arguments: dict[str, Any] | None = None, **options: Any) -> None:
    """Write a checkpoint and what the worker needs."""
    model.save_pretrained(folder, **options)
    torch.save(item.inputs(), folder / "inputs.pt")
    (folder / "arguments.json").write_text(json.dumps(arguments or {}))


@pytest.mark.protects("from_pretrained_restores")
@each_case
def test_from_pretrained_restores(case: Case, saved: Any) -> None:
    """from_pretrained_restores: a fresh process has the same class, ties, flags, KL and draws, bit for bit."""
    before, after, _ = saved[case.name]
    assert_same_description(after, before)


@pytest.mark.parametrize("kind", RELOADED)
@pytest.mark.parametrize("name", RELOADED_MODELS)
def test_reload_options(name: str, kind: str, saved: Any) -> None:
    """Shards, device maps and dtypes: the same draws; rho stays float32."""
    if (name, kind) == ("mixtral-lm", "bfloat16"):
        pytest.skip("`.bfloat16()` rounds the rotary frequencies too, which a loader keeps in float32")
    before, after, folder = saved[f"{name}-{kind}"]
    if "shard" in kind:
        assert len(list(folder.glob("*.safetensors"))) > 2
    assert_same_description(after, before)


@each_case
def test_plain_reload_is_the_posterior_mean(case: Case, saved: Any) -> None:
    """transformers' own `from_pretrained` reads the same folder: the original network, at the mean."""
    _, _, folder = saved[case.name]
    original = case.build()
    model = type(original).from_pretrained(folder)
    assert not any(isinstance(m, bnn.BayesianModule) for m in model.modules())
    expected = original.state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
