"""`export_mean`: an ordinary folder, loaded by transformers or PEFT alone, with the logits of the posterior's mean."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import bayeformers
from bayeformers import LaplacePosterior, export_mean, laplace, posterior_mean, to_bayesian
from bayeformers.heads import to_sngp, to_vbll
from bayeformers.posteriors import (
    DropoutPosterior,
    EnsemblePosterior,
    MixturePosterior,
    Posterior,
    RunningMoments,
    SWAGPosterior,
    TemperaturePosterior,
)
from tests.training.tiny import labels, plain, tokens

BATCH = tokens(5)
POSTERIOR_FILES = ("bayesian", "laplace", "swag", "ensemble", "abstention")


def moved(model: nn.Module, seed: int = 3) -> nn.Module:
    """With means and scales away from where the conversion put them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model


def logits(model: nn.Module, **inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(**(inputs or BATCH)).logits


def laplace_of(model: nn.Module) -> LaplacePosterior:
    batch = {**BATCH, **labels("single", BATCH)}
    return laplace.fit(model.eval(), [batch], prior_precision=2.0, progress=False)


def check_plain(folder: Path) -> None:
    assert not [name for name in folder.iterdir() if name.name.startswith(POSTERIOR_FILES)]
    config = json.loads((folder / "config.json").read_text())
    assert "bayesian" not in config
    assert not [name for name in load_file(folder / "model.safetensors") if name.endswith("_rho")]


@pytest.mark.parametrize("kind", ["single", "regression", "token", "question", "masked", "causal", "llama", "seq2seq"])
def test_a_converted_model_becomes_the_plain_one_at_its_mean(kind: str, tmp_path: Path) -> None:
    model = moved(to_bayesian(plain(kind), freeze=False))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [parameter.requires_grad for parameter in model.parameters()]
    folder = export_mean(model, tmp_path / "mean")
    check_plain(folder)
    again, info = type(model).from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert not bayeformers.is_bayesian(again)
    assert again.config.to_dict().get("dropout_rate") == model.config.to_dict().get("dropout_rate")
    inputs = {**BATCH, **({"decoder_input_ids": BATCH["input_ids"]} if kind == "seq2seq" else {})}
    key = {"question": "start_logits"}.get(kind, "logits")
    with torch.no_grad(), posterior_mean(model):
        assert torch.equal(model.eval()(**inputs)[key], again.eval()(**inputs)[key])
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(value, after[name]) for name, value in before.items())
    assert flags == [parameter.requires_grad for parameter in model.parameters()] and bayeformers.is_bayesian(model)
    assert [path.name for path in tmp_path.iterdir()] == ["mean"]


@pytest.mark.parametrize("options", [{"parametrization": "rank1"}, {"scale": "multiplicative"}, {"norms": True}])
def test_every_kind_of_conversion(options: dict[str, Any], tmp_path: Path) -> None:
    model = to_bayesian(plain(), freeze=False, **options)
    again = type(model).from_pretrained(export_mean(model, tmp_path / "mean"))
    with posterior_mean(model):
        assert torch.equal(logits(model), logits(again))
    assert again.config.hidden_dropout_prob == 0.1 and again.bert.embeddings.dropout.p == 0.1


def test_an_adapter_becomes_pefts_own_folder(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"], r=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = moved(to_bayesian(peft.get_peft_model(plain(), config)))
    folder = export_mean(model, tmp_path / "mean")
    assert {path.name for path in folder.iterdir()} == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert "posterior" not in (folder / "adapter_config.json").read_text()
    base = plain()
    with torch.no_grad():  # the base moved too, which no adapter's folder holds
        base.load_state_dict({k: v for k, v in bayeformers_free(model).items() if k in base.state_dict()}, strict=False)
    again = peft.PeftModel.from_pretrained(base, folder)
    with posterior_mean(model):
        assert torch.equal(logits(model), logits(again))


def bayeformers_free(model: Any) -> dict[str, Tensor]:
    """The base's own tensors by the names that they had without adapters."""
    state = model.get_base_model().state_dict()
    return {name.replace(".base_layer", "").replace(".original_module", ""): value for name, value in state.items()}


def test_posteriors_at_the_trained_weights(tmp_path: Path) -> None:
    model = moved(plain())
    for name, posterior in {"laplace": laplace_of(model), "dropout": DropoutPosterior(model)}.items():
        folder = export_mean(posterior, tmp_path / name)
        check_plain(folder)
        assert torch.equal(logits(type(model).from_pretrained(folder)), logits(model))


def test_a_model_that_carries_its_posterior_keeps_it(tmp_path: Path) -> None:
    model = moved(plain())
    model.posterior = laplace_of(model)
    folder = export_mean(model, tmp_path / "mean")
    check_plain(folder)
    assert isinstance(model.posterior, LaplacePosterior)
    model.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "laplace.safetensors").is_file()


def test_swag_writes_the_average_and_leaves_the_model_where_it_stands(tmp_path: Path) -> None:
    model, moments = moved(plain()), RunningMoments(2)
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for step in (-1.0, 0.0, 1.0, 2.0):
        moments.add({name: value + step for name, value in start.items()})
    folder = export_mean(SWAGPosterior(model, moments.moments()), tmp_path / "mean")
    check_plain(folder)
    found = type(model).from_pretrained(folder)
    for name, parameter in found.named_parameters():
        torch.testing.assert_close(parameter, start[name] + 0.5, atol=1e-6, rtol=1e-6)
    assert all(torch.equal(parameter, start[name]) for name, parameter in model.named_parameters())


def test_a_vbll_head_becomes_a_plain_layer(tmp_path: Path) -> None:
    model = plain()
    reference = logits(model)
    to_vbll(model)
    folder = export_mean(model, tmp_path / "mean")
    again, info = type(model).from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        mean = model.eval()(**BATCH).logits
    torch.testing.assert_close(logits(again), mean, atol=1e-6, rtol=1e-5)
    assert reference.shape == mean.shape and type(model.classifier).__name__ == "VariationalHead"


def ensemble(model: nn.Module) -> EnsemblePosterior:
    return EnsemblePosterior(model, [moved(plain(), seed) for seed in (1, 2)])


WRONG: dict[str, tuple[Any, str]] = {
    "point estimate": (lambda: plain(), "point estimate"),
    "ensemble": (lambda: ensemble(plain()), r"2 members \(0 to 1\)"),
    "mixture": (lambda: MixturePosterior([laplace_of(plain()), laplace_of(plain())]), "one of its `components`"),
    "temperature": (lambda: TemperaturePosterior(laplace_of(plain())), "export its `base`"),
    "sngp": (lambda: _sngp(), "no mean that a plain model"),
    "no folder": (lambda: to_bayesian(nn.Linear(2, 2)), "models? of transformers"),
}


def _sngp() -> nn.Module:
    model = plain()
    to_sngp(model)
    return model


@pytest.mark.parametrize("name", WRONG)
def test_what_has_no_mean_network_is_refused(name: str, tmp_path: Path) -> None:
    make, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        export_mean(make(), tmp_path / "mean")
    assert not list(tmp_path.iterdir())


def test_wrong_kinds_and_folders(tmp_path: Path) -> None:
    model: nn.Module | Posterior = to_bayesian(plain())
    with pytest.raises(TypeError, match="must be a torch.nn.Module or a Posterior"):
        export_mean("model", tmp_path / "mean")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="`directory` must be the path of a folder"):
        export_mean(model, 3)  # type: ignore[arg-type]
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="must be a folder, got the file"):
        export_mean(model, tmp_path / "file")
    with pytest.raises(ValueError, match="must be new or empty"):
        export_mean(model, tmp_path)
    (tmp_path / "empty").mkdir()
    export_mean(model, tmp_path / "empty")
    assert {path.name for path in tmp_path.iterdir()} == {"file", "empty"}


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = to_bayesian(plain())

    def fails(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(type(model), "save_pretrained", fails)
    with pytest.raises(OSError, match="disk full"):
        export_mean(model, tmp_path / "mean")
    assert not list(tmp_path.iterdir()) and bayeformers.is_bayesian(model)
