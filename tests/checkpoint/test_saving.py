"""What `save_pretrained` writes beside the weights, so that no posterior is dropped without a word."""

from __future__ import annotations

import copy
import json
import logging
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import nn

import bayeformers
from bayeformers import LaplacePosterior, bayesian_config, is_bayesian, to_bayesian, unfreeze
from bayeformers.laplace import InfPosterior, inf_posterior
from bayeformers.nn import variational_tensors
from bayeformers.posteriors import VariationalPosterior
from tests.cases import case
from tests.checkpoint.test_checkpoint import fitted, trained
from tests.training import tiny

LAPLACE = "laplace.safetensors"


def inputs(name: str = "bert") -> dict[str, Any]:
    return {key: value for key, value in case(name).inputs().items() if key != "labels"}


def same(one: Any, other: Any) -> None:
    """The same predictions of two draws, bit for bit."""
    a, b = (bayeformers.predict(m, inputs(), method="sample", num_samples=2).log_probs for m in (one, other))
    assert torch.equal(a, b)


# ---------------------------------------------------------------------------------------------- a Laplace posterior


def test_a_models_posterior_is_saved_along(tmp_path: Path) -> None:
    """One that it was given, and one that it brought from a folder; the plain loader still reads the weights."""
    model, posterior = fitted()
    model.posterior = posterior
    model.save_pretrained(tmp_path / "a")
    loaded = bayeformers.from_pretrained(tmp_path / "a")
    same(loaded, posterior)
    loaded.save_pretrained(tmp_path / "b", max_shard_size="20KB")
    again = bayeformers.from_pretrained(tmp_path / "b")
    same(again, posterior)
    plain = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "b")
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in plain.state_dict().items())


def test_a_trainers_posterior_is_saved_along(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, tiny.plain())
    posterior = trainer.fit_laplace(progress=False)
    trainer.model.save_pretrained(tmp_path / "a")
    assert bayeformers.from_pretrained(tmp_path / "a").posterior.prior_precision == posterior.prior_precision
    trainer.posterior = posterior.with_prior_precision(7.0)
    trainer.save_model(str(tmp_path / "b"))
    assert bayeformers.from_pretrained(tmp_path / "b").posterior.prior_precision == 7.0
    trainer.posterior = None
    trainer.model.save_pretrained(tmp_path / "c")
    assert not (tmp_path / "c" / LAPLACE).exists()
    trainer.posterior = posterior
    trainer.train()
    trainer.model.save_pretrained(tmp_path / "d")
    assert not (tmp_path / "d" / LAPLACE).exists()


def test_a_sparse_posterior_comes_back(tmp_path: Path) -> None:
    model, posterior = fitted(curvature="ekfac")
    model.posterior = inf_posterior(posterior, rank=3)
    model.save_pretrained(tmp_path)
    loaded = bayeformers.from_pretrained(tmp_path)
    assert isinstance(loaded.posterior, InfPosterior)
    same(loaded, model)


def test_a_posterior_of_earlier_weights_is_not_saved(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It would be claimed to be of the weights beside it."""
    model, posterior = fitted()
    model.posterior = posterior
    with torch.no_grad():
        model.classifier.weight.copy_(model.classifier.weight.flip(0))  # of the same norm
    with caplog.at_level(logging.WARNING):
        model.save_pretrained(tmp_path)
    assert "have moved since its Laplace posterior was fitted" in caplog.text and not (tmp_path / LAPLACE).exists()
    with pytest.raises(ValueError, match=r"not those that the posterior was fitted to.*classifier"):
        posterior.save(tmp_path)
    with posterior.draw(0), pytest.raises(ValueError, match="a draw that is held"):
        posterior.save(tmp_path)


def test_another_models_posterior_is_not_saved(tmp_path: Path) -> None:
    model, posterior = fitted()
    other = case("bert").build()
    other.posterior = posterior
    other.save_pretrained(tmp_path)
    assert not (tmp_path / LAPLACE).exists()


def test_a_processs_share_of_the_work(tmp_path: Path) -> None:
    """Not the main process: nothing of ours is written."""
    model, posterior = fitted()
    model.posterior = posterior
    model.save_pretrained(tmp_path, is_main_process=False)
    trained().save_pretrained(tmp_path, False)
    assert not list(tmp_path.glob("*.json")) and not (tmp_path / LAPLACE).exists()


# ---------------------------------------------------------------------------------------------- the record


def test_a_plainly_loaded_mean_does_not_claim_to_be_bayesian(tmp_path: Path) -> None:
    trained().save_pretrained(tmp_path / "a")
    plain = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "a")
    plain.save_pretrained(tmp_path / "b")
    assert "bayesian" not in json.loads((tmp_path / "b" / "config.json").read_text())
    with pytest.raises(ValueError, match="holds no Bayesian model"):
        bayeformers.from_pretrained(tmp_path / "b")
    plain.save_pretrained(tmp_path / "a")  # over the converted one
    with pytest.raises(ValueError, match="holds no Bayesian model"):
        bayeformers.from_pretrained(tmp_path / "a")


def test_a_mean_saved_without_bayeformers_is_told(tmp_path: Path) -> None:
    """Where the package is not imported, the record stays; the loader says what happened."""
    trained().save_pretrained(tmp_path / "a")
    code = (
        "import sys; from transformers import AutoModelForSequenceClassification as A\n"
        f"A.from_pretrained({str(tmp_path / 'a')!r}).save_pretrained({str(tmp_path / 'b')!r})\n"
        "assert 'bayeformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert "bayesian" in json.loads((tmp_path / "b" / "config.json").read_text())
    with pytest.raises(ValueError, match=r"saved again from a plainly loaded model.*load that mean with transformers"):
        bayeformers.from_pretrained(tmp_path / "b")


def test_a_replaced_head_is_recorded_as_it_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = trained()
    model.classifier = nn.Linear(16, 3)
    with caplog.at_level(logging.WARNING):
        model.save_pretrained(tmp_path)
    assert "['classifier'] (1) were replaced after the conversion" in caplog.text
    loaded = bayeformers.from_pretrained(tmp_path)
    assert type(loaded.classifier) is nn.Linear and torch.equal(loaded.classifier.weight, model.classifier.weight)
    assert bayesian_config(loaded) == bayesian_config(model) and loaded.classifier.weight.requires_grad
    same(loaded, model)
    caplog.clear()
    model.save_pretrained(tmp_path)
    assert "replaced" not in caplog.text


@pytest.mark.parametrize("name", ["gpt2-lm", "bert-mlm"])
def test_a_replaced_tied_head(name: str, tmp_path: Path) -> None:
    model = trained(name)
    if name == "gpt2-lm":
        model.lm_head = nn.Linear(*reversed(model.lm_head.weight.shape), bias=False)
    else:
        model.cls.predictions.transform.dense = nn.Linear(16, 16)
    model.save_pretrained(tmp_path)
    loaded = bayeformers.from_pretrained(tmp_path)
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key


def test_a_head_replaced_and_saved_without_bayeformers_is_told(tmp_path: Path) -> None:
    """As earlier versions saved it: the record speaks of scales that the file has not."""
    trained().save_pretrained(tmp_path)
    (tmp_path / "bayesian_digests.json").unlink()
    tensors = load_file(tmp_path / "model.safetensors")
    for key in ("weight", "bias"):
        del tensors[f"classifier.{key}_rho"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"no scales for \['classifier'\] \(1 of 17 Bayesian layers\).*were replaced"):
        bayeformers.from_pretrained(tmp_path)


def test_a_bayesian_layer_of_unknown_origin_is_refused(tmp_path: Path) -> None:
    model = trained()
    model.classifier = bayeformers.nn.Linear(16, 3)
    model.extra = bayeformers.nn.Linear(16, 3)
    with pytest.raises(ValueError, match=r"\['extra'\] \(1\) are Bayesian layers that `to_bayesian` did not make"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_converted_part_is_refused_by_the_whole(tmp_path: Path) -> None:
    """Its record names layers of the part. By itself the part is saved."""
    model = case("bert").build()
    to_bayesian(model.bert)
    with pytest.raises(ValueError, match=r"only the part 'bert'.*target_modules=r\"bert"):
        model.save_pretrained(tmp_path / "a")
    assert not (tmp_path / "a").exists()
    model.bert.save_pretrained(tmp_path / "b")
    assert is_bayesian(bayeformers.from_pretrained(tmp_path / "b"))


def test_what_training_adds_is_saved(tmp_path: Path) -> None:
    model = unfreeze(trained())
    VariationalPosterior(model).save(tmp_path)
    assert bayesian_config(bayeformers.from_pretrained(tmp_path)) == bayesian_config(model)


def test_models_are_copied_and_pickled_as_before() -> None:
    """The method is wrapped on the class: nothing of it is in a model."""
    model = trained()
    assert "save_pretrained" not in vars(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert is_bayesian(other)
    assert "max_shard_size" in (hf.PreTrainedModel.save_pretrained.__doc__ or "")


# ---------------------------------------------------------------------------------------------- wrappers


class Wrapper(nn.Sequential):
    """As a SentenceTransformer: modules in a row, each of which saves itself."""

    def __init__(self) -> None:
        super().__init__(case("bert").build().bert, nn.Linear(16, 4))

    def save_pretrained(self, folder: str) -> None:
        self[0].save_pretrained(folder)


def test_a_wrapper_that_saves_itself_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Named: what is lost, and what works."""
    with caplog.at_level(logging.WARNING):
        model = to_bayesian(Wrapper())
    assert "Wrapper was converted as a whole" in caplog.text and "`model.get_submodule('0')`" in caplog.text
    caplog.clear()
    model.save_pretrained(str(tmp_path / "a"))
    assert "was converted as a part of a larger module" in caplog.text
    with pytest.raises(ValueError, match="converted as a part of another module"):
        bayeformers.from_pretrained(tmp_path / "a")
    caplog.clear()
    inner = Wrapper()
    to_bayesian(inner.get_submodule("0"))
    inner.save_pretrained(str(tmp_path / "b"))
    assert not caplog.text
    reloaded = bayeformers.from_pretrained(tmp_path / "b")
    assert all(torch.equal(value, inner[0].state_dict()[name]) for name, value in reloaded.state_dict().items())


def test_adapters_of_transformers_are_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its `save_pretrained` saves them alone; a state dict holds all."""
    peft = pytest.importorskip("peft")

    def built() -> nn.Module:
        model = case("bert").build()
        model.add_adapter(peft.LoraConfig(r=2, target_modules=["query"]))
        return model

    with caplog.at_level(logging.WARNING):
        model = to_bayesian(built(), target_modules="all")
    assert "alone" in caplog.text and "`model.state_dict()`" in caplog.text
    caplog.clear()
    model.save_pretrained(tmp_path / "adapter")
    assert "without the posterior" in caplog.text
    with torch.no_grad():
        for tensor in variational_tensors(model):
            tensor.rho.add_(0.1)
    torch.save(model.state_dict(), tmp_path / "whole.pt")
    other = to_bayesian(built(), target_modules="all")
    other.load_state_dict(torch.load(tmp_path / "whole.pt"))
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())


def test_plain_modules_are_not_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        to_bayesian(nn.Sequential(case("bert").build(), nn.Linear(3, 3)))
        to_bayesian(case("bert").build())
    assert not caplog.text


def test_posterior_files_round_trip_between_precisions(tmp_path: Path) -> None:
    """In narrower and in wider floats, and back: recognised by rounding, for any chain of loads and saves."""
    model, posterior = fitted()
    model.posterior = posterior
    model.save_pretrained(tmp_path / "0")
    chain = [torch.float64, torch.bfloat16, torch.float32, torch.float16]
    for number, dtype in enumerate(chain):
        loaded = bayeformers.from_pretrained(tmp_path / str(number), dtype=dtype)
        assert isinstance(loaded.posterior, LaplacePosterior) and loaded.dtype == dtype
        loaded.save_pretrained(tmp_path / str(number + 1))
    moved = case("bert").build().bfloat16()
    with torch.no_grad():
        moved.classifier.weight.copy_(moved.classifier.weight.flip(0))
    with pytest.raises(ValueError, match=r"other weights.*classifier"):
        LaplacePosterior.load(tmp_path / "0", moved)
