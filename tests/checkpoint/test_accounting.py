"""Every tensor of a checkpoint is accounted for: what was damaged, changed or mixed up is refused, with one error."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import bayeformers
from bayeformers import bayesian_config, fixed_draw, is_bayesian, to_deterministic
from bayeformers.nn.base import variational_tensors
from bayeformers.storage import digest
from tests.cases import case
from tests.checkpoint.test_checkpoint import trained

DIGESTS, WEIGHTS = "bayesian_digests.json", "model.safetensors"
Tensors = dict[str, Tensor]
Json = dict[str, Any]
HEAD, RHO = "classifier.weight", "classifier.weight_rho"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    trained(freeze=False, scale="multiplicative").save_pretrained(folder)
    return folder


def changed(
    saved: Path,
    folder: Path,
    tensors: Callable[[Tensors], Any] = lambda tensors: None,
    record: Callable[[Json], Any] = lambda config: None,
    *,
    is_old: bool,
) -> Path:
    """A copy of the checkpoint with other contents; ``is_old``: as a version without digests saved it."""
    target = folder / "changed"
    shutil.copytree(saved, target)
    values, config = load_file(target / WEIGHTS), json.loads((target / "config.json").read_text())
    tensors(values), record(config)
    save_file(values, target / WEIGHTS, {"format": "pt"})
    (target / "config.json").write_text(json.dumps(config))
    if is_old:
        (target / DIGESTS).unlink()
    return target


DAMAGED: dict[str, tuple[Callable[[Tensors], Any], str]] = {
    "mean missing": (lambda t: t.pop(HEAD), "lacks 1 weights of the model, such as .'classifier.weight'"),
    "embedding missing": (lambda t: t.pop("bert.embeddings.word_embeddings.weight"), "lacks 1 weights"),
    "norm missing": (lambda t: t.pop("bert.embeddings.LayerNorm.weight"), "lacks 1 weights"),
    "rho missing": (lambda t: t.pop(RHO), "lacks 1 tensors of its posterior.*classifier.weight_rho"),
    "floor missing": (lambda t: t.pop("classifier.weight_scale_floor"), "lacks 1 tensors of its posterior"),
    "NaN rho": (lambda t: t[RHO].view(-1)[:1].fill_(float("nan")), "NaN or infinite values in 'classifier.weight_rho'"),
    "infinite rho": (lambda t: t[RHO].view(-1)[-1:].fill_(float("inf")), "NaN or infinite.*classifier.weight_rho"),
    "NaN mean": (lambda t: t[HEAD].view(-1)[:1].fill_(float("nan")), "NaN or infinite values in 'classifier.weight'"),
    "NaN norm": (lambda t: t["bert.embeddings.LayerNorm.bias"].fill_(float("nan")), "NaN or infinite.*LayerNorm.bias"),
    "NaN centre": (lambda t: t["classifier.weight_prior_centre"].fill_(float("nan")), "NaN.*classifier.weight_prior"),
    "zeroed rho": (lambda t: t[RHO].zero_(), "zeros for the scale of 'classifier.weight'"),
    "unknown rho": (lambda t: t.update({"bert.extra.weight_rho": torch.ones(2)}), "does not record.*bert.extra.weight"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_checkpoint_without_digests_is_refused(name: str, saved: Path, tmp_path: Path) -> None:
    change, message = DAMAGED[name]
    with pytest.raises(ValueError, match=message):
        bayeformers.from_pretrained(changed(saved, tmp_path, change, is_old=True))


@pytest.mark.parametrize("name", [*DAMAGED, "permuted"])
def test_digests_tell_every_change(name: str, saved: Path, tmp_path: Path) -> None:
    change = DAMAGED[name][0] if name in DAMAGED else lambda t: t.update({HEAD: t[HEAD].flip(0).contiguous()})
    with pytest.raises(ValueError, match=r"is not what was saved.*it (lacks|holds besides|has other values in)"):
        bayeformers.from_pretrained(changed(saved, tmp_path, change, is_old=False))


def test_a_short_scale_is_refused(saved: Path, tmp_path: Path) -> None:
    folder = changed(saved, tmp_path, lambda t: t.update({RHO: t[RHO][:2].clone()}), is_old=True)
    with pytest.raises((ValueError, RuntimeError), match="size"):
        bayeformers.from_pretrained(folder)
    with pytest.raises(ValueError, match=r"scales of another size than their weights.*classifier\.weight_rho"):
        bayeformers.from_pretrained(folder, ignore_mismatched_sizes=True)


@pytest.mark.parametrize("is_old", [True, False])
@pytest.mark.parametrize(
    ("record", "message"),
    [
        (lambda c: c.update(bayesian={}), "names no layer"),
        (lambda c: c["bayesian"].update(modules={}), "names no layer"),
        (lambda c: c["bayesian"].pop("modules"), "names no layer"),
        (lambda c: c.update(bayesian=[1]), "names no layer"),
        (lambda c: c["bayesian"]["modules"].pop("classifier"), r"does not record.*classifier\."),
        (lambda c: c.pop("bayesian"), r"no 'bayesian' entry.*scales of 31 Bayesian tensors.*lost the record"),
        (lambda c: c.update(bayesian=None), "lost the record"),
    ],
)
def test_a_record_that_lost_layers_is_refused(
    record: Callable[[Json], Any], message: str, is_old: bool, saved: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        bayeformers.from_pretrained(changed(saved, tmp_path, record=record, is_old=is_old))


def test_what_earlier_versions_saved_is_read(saved: Path, tmp_path: Path) -> None:
    old = bayeformers.from_pretrained(changed(saved, tmp_path, is_old=True)).state_dict()
    new = bayeformers.from_pretrained(saved).state_dict()
    assert old.keys() == new.keys() and all(torch.equal(value, old[name]) for name, value in new.items())


@pytest.mark.parametrize("name", ["bert", "swin", "gpt2-lm"])
def test_digests_of_shards_variants_and_renamed_weights(name: str, tmp_path: Path) -> None:
    """They are of the file's tensors, by the names there; a variant has its own."""
    model = trained(name)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    model.save_pretrained(tmp_path, variant="other")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    expected = {key: digest(value) for shard in shards for key, value in load_file(shard).items()}
    assert json.loads((tmp_path / DIGESTS).read_text())["sha256"] == expected
    for options in ({}, {"variant": "other"}, {"dtype": torch.bfloat16}):
        loaded = bayeformers.from_pretrained(tmp_path, **options)
        assert torch.equal(next(variational_tensors(loaded)).rho, next(variational_tensors(model)).rho)
    values = load_file(shards[1])
    next(iter(values.values())).add_(1)
    save_file(values, shards[1], {"format": "pt"})
    with pytest.raises(ValueError, match="is not what was saved"):
        bayeformers.from_pretrained(tmp_path)
    bayeformers.from_pretrained(tmp_path, variant="other")


def test_saving_again_replaces_the_digests(tmp_path: Path) -> None:
    """The same folder, other weights; then a plain model, which has none."""
    model = trained()
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        model.classifier.weight_rho.add_(1)
    model.save_pretrained(tmp_path)
    assert torch.equal(bayeformers.from_pretrained(tmp_path).classifier.weight_rho, model.classifier.weight_rho)
    to_deterministic(model).save_pretrained(tmp_path)
    assert not (tmp_path / DIGESTS).exists()


def test_a_changed_digest_file_is_told(saved: Path, tmp_path: Path) -> None:
    folder = changed(saved, tmp_path, is_old=False)
    (folder / DIGESTS).write_text("{")
    with pytest.raises(ValueError, match="bayesian_digests.json' is damaged"):
        bayeformers.from_pretrained(folder)


# ---------------------------------------------------------------------------------------------- arguments, as in stock


def test_entries_of_the_configuration(saved: Path, tmp_path: Path) -> None:
    """They change the configuration as transformers' own loader changes it, and the posterior is the same."""
    names = {0: "a", 1: "b", 2: "c"}
    options: Json = {"id2label": names, "label2id": {"a": 0, "b": 1, "c": 2}, "output_hidden_states": True}
    loaded = bayeformers.from_pretrained(saved, **options)
    stock = hf.AutoModelForSequenceClassification.from_pretrained(saved, **options)
    assert loaded.config.id2label == stock.config.id2label == names and loaded.config.output_hidden_states
    assert len(loaded(**case("bert").inputs()).hidden_states) == 3
    assert bayesian_config(loaded) == bayesian_config(bayeformers.from_pretrained(saved))
    loaded.save_pretrained(tmp_path)
    assert bayeformers.from_pretrained(tmp_path).config.id2label == names


def test_a_configuration_of_ones_own_keeps_the_record(saved: Path) -> None:
    own = case("bert").build().config
    own.problem_type = "single_label_classification"
    for config in (own, hf.AutoConfig.from_pretrained(saved), str(saved)):
        assert is_bayesian(bayeformers.from_pretrained(saved, config=config))
    assert not hasattr(own, "bayesian")


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_a_head_of_another_size_starts_afresh(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Deterministic and trainable; equal to what the stock loader makes; the rest is the posterior that was saved."""
    model = trained(name)
    model.save_pretrained(tmp_path / "a")
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        bayeformers.from_pretrained(tmp_path / "a", num_labels=5)
    options: Json = {"num_labels": 5, "ignore_mismatched_sizes": True}
    head = "classifier" if name == "bert" else "classifier.out_proj"
    with caplog.at_level(logging.WARNING):
        loaded, info = bayeformers.from_pretrained(tmp_path / "a", output_loading_info=True, **options)
    assert f"{head}" in caplog.text and "start afresh, deterministic and trainable" in caplog.text
    assert {key for key, *_ in info["mismatched_keys"]} >= {f"{head}.weight", f"{head}.bias"}
    fresh = loaded.get_submodule(head)
    assert type(fresh) is nn.Linear and fresh.weight.shape[0] == 5 and torch.isfinite(fresh.weight).all()
    assert fresh.weight.requires_grad and fresh.bias.requires_grad and loaded.config.num_labels == 5
    before, after = dict(model.named_parameters()), dict(loaded.named_parameters())
    assert after.keys() == {key for key in before if key not in (f"{head}.weight_rho", f"{head}.bias_rho")}
    for key, value in after.items():
        if not key.startswith(head):
            assert torch.equal(value, before[key]) and value.requires_grad == before[key].requires_grad, key
    loaded.save_pretrained(tmp_path / "b")
    again = bayeformers.from_pretrained(tmp_path / "b")
    assert bayesian_config(again) == bayesian_config(loaded) and again.get_submodule(head).weight.requires_grad
    with fixed_draw(again, 1), fixed_draw(loaded, 1):
        inputs = {key: value for key, value in case(name).inputs().items() if key != "labels"}
        assert torch.equal(again(**inputs).logits, loaded(**inputs).logits)


def test_a_tied_table_of_another_size_starts_afresh(tmp_path: Path) -> None:
    trained("gpt2-lm").save_pretrained(tmp_path)
    loaded = bayeformers.from_pretrained(tmp_path, vocab_size=70, ignore_mismatched_sizes=True)
    assert loaded.lm_head.weight is loaded.transformer.wte.weight and loaded.lm_head.weight.shape[0] == 70
    assert type(loaded.lm_head) is nn.Linear and type(loaded.transformer.wte) is nn.Embedding
    assert not any("wte" in tensor.name or "lm_head" in tensor.name for tensor in variational_tensors(loaded))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantization_config": hf.BitsAndBytesConfig(load_in_8bit=True)}, "`quantization_config`.*BitsAndBytes"),
        ({"quantization_config": {"quant_method": "quanto"}}, "`quantization_config` is not for a Bayesian model"),
        ({"load_in_8bit": True}, "`load_in_8bit`"),
        ({"gguf_file": "x.gguf"}, "`gguf_file`"),
        ({"device_map": {"bert": "disk", "classifier": "cpu"}}, "must not offload"),
        ({"device_map": "disk"}, "must not offload"),
    ],
)
def test_arguments_that_would_lose_the_posterior(options: Json, message: str, saved: Path) -> None:
    with pytest.raises(ValueError, match=message):
        bayeformers.from_pretrained(saved, **options)
