"""A folder holds all that a reload needs, gives the same bits, and is refused where it is not whole."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from bayeformers import laplace, to_bayesian
from bayeformers.models import LeNetConfig, LeNetForImageClassification
from bayeformers.posteriors import PointPosterior, VariationalPosterior
from bayeformers.quantization import QuantizedPosterior, load, quantize
from tests.quantization.networks import bert, gpt2, images, masked_lm, mlp, probs, sentences

pytestmark = pytest.mark.filterwarnings("error")
FILE = "quantized.safetensors"


def fitted() -> QuantizedPosterior:
    batch = {**sentences(12), "labels": torch.arange(12) % 3}
    return quantize(laplace.fit(bert(), [batch], progress=False, prior_precision=50.0), sentences())


MADE: dict[str, Callable[[], QuantizedPosterior]] = {
    "converted": lambda: quantize(to_bayesian(bert(), delta=0.2), sentences()),
    "tied": lambda: quantize(to_bayesian(masked_lm(), delta=0.2), sentences()),
    "16 bits": lambda: quantize(to_bayesian(bert().bfloat16(), delta=0.2), sentences()),
    "head alone": lambda: quantize(to_bayesian(bert(), delta=0.2, target_modules=["classifier"]), sentences()),
    "norms": lambda: quantize(to_bayesian(bert(), delta=0.2, norms=True), sentences(), exclude_modules=["bert.pooler"]),
    "Laplace": fitted,
    "point": lambda: quantize(PointPosterior(bert()), sentences()),
}


@pytest.mark.parametrize("name", MADE)
def test_reload_gives_the_same_bits(name: str, tmp_path: Path) -> None:
    small = MADE[name]()
    small.save(tmp_path)
    state = torch.get_rng_state()
    again = load(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    assert type(again.model).__mro__[0] is type(small.model) and not again.model.training
    assert torch.equal(probs(again, sentences(), 5), probs(small, sentences(), 5))
    assert again.report == small.report and str(again.report) == str(small.report)
    assert again.num_draws == small.num_draws and again.problem_type() == small.problem_type()
    again.save(tmp_path / "twice")
    one, two = load_file(tmp_path / FILE), load_file(tmp_path / "twice" / FILE)
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_model_of_an_auto_class_needs_nothing(tmp_path: Path) -> None:
    """It is not in transformers itself, but registered there."""
    x = torch.randn(4, 1, 28, 28)
    small = quantize(to_bayesian(LeNetForImageClassification(LeNetConfig()), delta=0.2), x)
    small.save(tmp_path)
    again = load(tmp_path)
    assert type(again.model) is LeNetForImageClassification
    assert torch.equal(probs(again, x, 3), probs(small, x, 3))


def test_plain_module_needs_a_skeleton(tmp_path: Path) -> None:
    small = quantize(to_bayesian(mlp(), delta=0.2), images(5, 8))
    small.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [FILE]
    skeleton = mlp()
    before = {name: value.clone() for name, value in skeleton.state_dict().items()}
    assert torch.equal(probs(load(tmp_path, skeleton), images(5, 8)), probs(small, images(5, 8)))
    assert all(torch.equal(value, before[name]) for name, value in skeleton.state_dict().items())
    with pytest.raises(ValueError, match="`model`: one of the same structure"):
        load(tmp_path)


def test_generation_config_comes_along(tmp_path: Path) -> None:
    small = quantize(to_bayesian(gpt2(), delta=0.2), {"input_ids": sentences()["input_ids"]})
    small.model.generation_config.max_new_tokens = 3
    small.model.generation_config.pad_token_id = 0
    small.save(tmp_path)
    again = load(tmp_path)
    with small.draw(1), again.draw(1):
        ids = sentences()["input_ids"]
        assert torch.equal(again.model.generate(ids, do_sample=False), small.model.generate(ids, do_sample=False))
    assert again.model.generation_config.max_new_tokens == 3


def test_noise_of_a_regression_comes_along(tmp_path: Path) -> None:
    x = images(20, 8)
    posterior = laplace.fit(mlp(), [(x, images(20, 3))], likelihood="regression", noise_std=0.4, progress=False)
    quantize(posterior, x).save(tmp_path)
    again = load(tmp_path, mlp())
    assert again.problem_type() == "regression" and again.recorded_noise_std() == 0.4
    assert torch.allclose(again.predict(x).aleatoric_variance, torch.tensor(0.16))


@pytest.mark.parametrize("kind", ["converted", "Laplace"])
def test_file_is_small(kind: str, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "vocab_size": 2000}
    model = bert(**sizes)
    posterior: Any
    if kind == "converted":
        posterior = VariationalPosterior(to_bayesian(model, delta=0.1))
        posterior.save(tmp_path / "float")
    else:
        batch = {**sentences(6), "labels": torch.arange(6) % 3}
        posterior = laplace.fit(model, [batch], progress=False, prior_precision=50.0)
        model.save_pretrained(tmp_path / "float")
        posterior.save(tmp_path / "float")
    quantize(posterior, sentences()).save(tmp_path / "int8")
    before, after = (
        sum(path.stat().st_size for path in (tmp_path / folder).glob("*.safetensors")) for folder in ("float", "int8")
    )
    # the float file of Kronecker factors has two vectors for the eigenvalues, INT8 a code for each
    assert after <= (0.3 if kind == "converted" else 0.4) * before


# ---------------------------------------------------------------------------------------------- what is not whole


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    quantize(to_bayesian(mlp(), delta=0.2), images(5, 8)).save(folder)
    return folder / FILE


def rewritten(
    saved: Path,
    folder: Path,
    change: Callable[[dict[str, torch.Tensor], dict[str, str]], None],
    *,
    is_old: bool = True,
) -> Path:
    """``is_old``: as a version before digests wrote it, so that the tensors alone tell."""
    with safe_open(saved, framework="pt") as file:
        header = dict(file.metadata())
    tensors = load_file(saved)
    if is_old:
        del header["digests"]
    change(tensors, header)
    save_file(tensors, folder / FILE, header)
    return folder


def _without_meta(name: str) -> Callable[[dict[str, torch.Tensor], dict[str, str]], None]:
    def change(tensors: dict[str, torch.Tensor], header: dict[str, str]) -> None:
        meta = json.loads(header["meta"])
        del meta[name]
        header["meta"] = json.dumps(meta)

    return change


DAMAGE: dict[str, tuple[Callable[[dict[str, torch.Tensor], dict[str, str]], None], str]] = {
    "codes": (lambda t, h: t.__delitem__("codes:0.weight"), "damaged.*codes:0.weight"),
    "bias": (lambda t, h: t.__delitem__("float:2.bias"), "other Parameters.*2.bias"),
    "scale": (lambda t, h: t.__delitem__("noise:0.weight/codes"), "damaged"),
    "surplus": (lambda t, h: t.update({"float:3.bias": torch.ones(1)}), "other Parameters.*3.bias"),
    "shape": (lambda t, h: t.update({"float:2.bias": torch.ones(4)}), "2.bias.*shape"),
    "kind": (lambda t, h: h.update(kind="laplace"), "holds 'laplace'"),
    "version": (lambda t, h: h.update(version="9"), "version 9"),
    "meta": (lambda t, h: h.update(meta="{"), "damaged"),
    "unknown scale": (lambda t, h: t.update({"noise:9.weight/scale": torch.ones(1)}), "damaged.*noise:9.weight/scale"),
    "no noise": (lambda t, h: h.update(meta=h["meta"].replace('"mean_field"', '"point"')), "damaged.*noise:"),
    "NaN": (lambda t, h: t["float:2.bias"].fill_(float("nan")), "damaged.*float:2.bias.*NaN"),
    "negative": (lambda t, h: t["noise:0.weight/top"].neg_(), "damaged.*noise:0.weight/top.*negative"),
    "weights": (_without_meta("weights"), "damaged.*weights"),
    "noise": (_without_meta("noise"), "damaged.*noise"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_file_is_refused(name: str, saved: Path, tmp_path: Path) -> None:
    change, message = DAMAGE[name]
    with pytest.raises(ValueError, match=message):
        load(rewritten(saved, tmp_path, change), mlp())


@pytest.mark.parametrize("key", ["codes:0.weight", "float:2.bias", "noise:0.weight/codes", "step:2.weight"])
def test_other_values_are_refused(key: str, saved: Path, tmp_path: Path) -> None:
    """Codes in another order have the same sizes and sums; the header's digests tell."""
    folder = rewritten(saved, tmp_path, lambda t, h: t.update({key: t[key].flip(0).contiguous()}), is_old=False)
    with pytest.raises(ValueError, match=f"damaged: of the tensors that were written it has other values in.*{key}"):
        load(folder, mlp())


def test_a_file_of_an_earlier_version_is_read(saved: Path, tmp_path: Path) -> None:
    old = load(rewritten(saved, tmp_path, lambda t, h: None), mlp())
    assert torch.equal(probs(old, images(5, 8)), probs(load(saved.parent, mlp()), images(5, 8)))


def test_cut_or_missing_file_is_refused(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no quantized file"):
        load(tmp_path, mlp())
    (tmp_path / FILE).write_bytes(saved.read_bytes()[:-50])
    with pytest.raises(ValueError, match="damaged"):
        load(tmp_path, mlp())


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: mlp(13), "shape"),
        (lambda: nn.Sequential(nn.Linear(8, 12)), "no such layer|is of"),
        (lambda: nn.Sequential(nn.Linear(8, 12, bias=False), nn.Tanh(), nn.Linear(12, 3)), "other Parameters"),
        (lambda: nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 3), nn.BatchNorm1d(3)), "other Parameters"),
    ],
)
def test_other_structure_is_refused(saved: Path, model: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(saved.parent, model())


def test_config_is_missing(tmp_path: Path) -> None:
    quantize(to_bayesian(bert(), delta=0.1), sentences()).save(tmp_path)
    os.remove(tmp_path / "config.json")
    with pytest.raises(ValueError, match="config.json"):
        load(tmp_path)


def test_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = quantize(to_bayesian(mlp(), delta=0.2), images(5, 8))
    small.save(tmp_path)
    before = (tmp_path / FILE).read_bytes()

    def fail(*args: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("bayeformers.storage.save_file", fail)
    with pytest.raises(OSError, match="no space"):
        small.save(tmp_path)
    assert (tmp_path / FILE).read_bytes() == before and len(list(tmp_path.iterdir())) == 1
