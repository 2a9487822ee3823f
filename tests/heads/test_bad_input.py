"""What the heads refuse: one error that names the argument and the value, and nothing changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

import bayeformers
from bayeformers.heads import (
    HeadPosterior,
    SNGPConfig,
    VBLLConfig,
    fit_covariance,
    head_loss,
    head_of,
    to_plain_head,
    to_sngp,
    to_vbll,
)
from bayeformers.heads.config import head_config
from tests.heads.worker import batches, fitted, made, rows, trainer
from tests.training import tiny

OPTIONS: list[tuple[Any, dict[str, Any], str]] = [
    (to_vbll, {"covariance": "full"}, r"`covariance` must be one of .*'dense'.*got 'full'"),
    (to_vbll, {"bound": "upper"}, "`bound` must be one of .*got 'upper'"),
    (to_vbll, {"rank": 0}, "`rank` must be a whole number >= 1, got 0"),
    (to_vbll, {"rank": 2.0}, "`rank` must be a whole number"),
    (to_vbll, {"prior_std": 0.0}, "`prior_std` must be a finite number > 0"),
    (to_vbll, {"prior_std": "wide"}, "`prior_std` must be a finite number > 0, got 'wide'"),
    (to_vbll, {"bias_prior_std": float("inf")}, "`bias_prior_std` must be a finite number"),
    (to_vbll, {"initial_std": -1}, "`initial_std` must be a finite number > 0, got -1"),
    (to_vbll, {"noise_std": float("nan")}, "`noise_std` must be a finite number >= 0, got nan"),
    (to_vbll, {"noise_dof": 0}, "`noise_dof` must be a finite number > 0"),
    (to_vbll, {"noise_prior_variance": True}, "`noise_prior_variance` must be a finite number"),
    (to_vbll, {"num_features": 8}, r"Unknown options \['num_features'\]: `VBLLConfig` has"),
    (to_vbll, {"config": SNGPConfig()}, "`config` must be a VBLLConfig, got SNGPConfig"),
    (to_vbll, {"head": "pooler"}, "`head` must be the name of a layer, such as 'classifier', got 'pooler'"),
    (to_vbll, {"head": 3}, "`head` must be the name of a layer, .* got 3"),
    (to_vbll, {"head": "bert.pooler"}, "`head` must be an nn.Linear, got 'bert.pooler', a BertPooler"),
    (to_vbll, {"head": "bert.pooler.dense"}, "`head` 'bert.pooler.dense' has 16 outputs, for `num_labels`=3"),
    (to_sngp, {"num_features": 0}, "`num_features` must be a whole number >= 1"),
    (to_sngp, {"length_scale": 0}, "`length_scale` must be a finite number > 0"),
    (to_sngp, {"kernel_variance": -2.0}, "`kernel_variance` must be a finite number > 0"),
    (to_sngp, {"normalize": "yes"}, "`normalize` must be True or False, got 'yes'"),
    (to_sngp, {"covariance": "diagonal"}, "`covariance` must be one of .*'per_class'.* got 'diagonal'"),
    (to_sngp, {"spectral_bound": 0.0}, "`spectral_bound` must be a finite number > 0"),
    (to_sngp, {"seed": -1}, "`seed` must be a whole number >= 0"),
    (to_sngp, {"spectral_layers": ("x",)}, r"Unknown options \['spectral_layers'\]"),
    (to_sngp, {"layers": ["nothing"]}, r"`spectral_layers` names \['nothing'\], which match no module"),
    (to_sngp, {"layers": ["LayerNorm"]}, "`spectral_layers` must match Linear layers only"),
    (to_sngp, {"layers": ["pooler.dense"], "spectral_bound": None}, "`layers` must be None where `spectral_bound` is"),
]


@pytest.mark.parametrize(("make", "options", "message"), OPTIONS)
def test_options(make: Any, options: dict[str, Any], message: str) -> None:
    """Before anything changes."""
    model = tiny.plain("single")
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    with pytest.raises((ValueError, TypeError), match=message):
        make(model, **options)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before
    assert not hasattr(model.config, "bayesian_head") and not hasattr(model, "posterior")


def _several() -> Any:
    model = tiny.plain("single")
    model.other = torch.nn.Linear(16, 3)
    return model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: torch.nn.Linear(4, 3), "`model` must be a PreTrainedModel of transformers, got Linear"),
        (lambda: tiny.bayesian("single"), "has Bayesian layers: call `to_deterministic"),
        (lambda: made("vbll"), "has such a head already"),
        (lambda: tiny.plain("masked"), "a VBLL or SNGP head is for one of"),
        (lambda: tiny.plain("causal"), "has a head of the kind 'causal_lm'"),
        (lambda: tiny.plain("question"), "has a head of the kind 'question_answering'"),
        (lambda: hf.BertModel(tiny.plain("single").config), "has a head of the kind 'unknown'"),
        (_several, r"`head` must name the linear layer with the 3 outputs of .* there are \['classifier', 'other'\]"),
        (lambda: tiny.plain("token", num_labels=1), "`model` must have at least 2 classes, got `num_labels`=1"),
    ],
)
@pytest.mark.parametrize("make", [to_vbll, to_sngp])
def test_models(make: Any, model: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        make(model())


def test_no_noise_in_a_regression() -> None:
    with pytest.raises(ValueError, match="`noise_std` must be > 0 for a regression, got 0"):
        to_vbll(tiny.plain("regression"), noise_std=0)


def test_models_without_a_head() -> None:
    plain = tiny.plain("single")
    for ask in (head_of, to_plain_head, HeadPosterior, lambda model: head_loss(model, {}, 1)):
        with pytest.raises(ValueError, match="has no VBLL or SNGP head"):
            ask(plain)
    with pytest.raises(TypeError, match=r"`model` must be a torch\.nn\.Module, got str"):
        head_of("bert")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="must be a PreTrainedModel"):
        to_plain_head(torch.nn.Linear(2, 2))  # type: ignore[arg-type]


def test_covariance() -> None:
    with pytest.raises(ValueError, match="`fit_covariance` is for an SNGP head"):
        fit_covariance(made("vbll"), batches())
    with pytest.raises(ValueError, match="`dataloader` is empty"):
        fit_covariance(made("sngp"), [])
    unlabelled = [{**batch, "labels": torch.full_like(batch["labels"], -100)} for batch in batches()]
    with pytest.raises(ValueError, match="`dataloader` must have items that count"):
        fit_covariance(made("sngp"), unlabelled)


class Cubed(hf.BertForSequenceClassification):
    """A model that does something with its logits."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output["logits"] = output["logits"] ** 3
        return output


@pytest.mark.parametrize("kind", ["vbll", "sngp"])
def test_changed_logits(kind: str, tmp_path: Path) -> None:
    model = made(kind, Cubed(tiny.plain("single").config))
    with torch.no_grad():
        head_of(model).weight.normal_()
    trained = tiny.trainer(tmp_path, model, remove_unused_columns=False)
    with pytest.raises(ValueError, match="must return its head's outputs as its logits: it changes them"):
        trained.train()
    if kind == "sngp":
        with pytest.raises(ValueError, match="it changes them"):
            fit_covariance(model, batches())


def test_predictions() -> None:
    posterior = HeadPosterior(fitted("sngp"))
    with pytest.raises(ValueError, match="`method` must be one of .*'head'.* got 'lr_glm'"):
        posterior.predict(rows(), method="lr_glm")
    with pytest.raises(ValueError, match="`link`"):
        posterior.predict(rows(), link="probit")
    with pytest.raises(ValueError, match="`problem_type` is 'regression', but this head was made for classes"):
        posterior.predict(rows(), problem_type="regression")
    with pytest.raises(ValueError, match='got "head"'):
        HeadPosterior(to_vbll(tiny.plain("regression"))).predict(rows(), noise_std="head")
    with pytest.raises(ValueError, match="batch is empty"):
        posterior.predict({name: value[:0] for name, value in rows().items()})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise_std": 0.5}, "`noise_std`=0.5 is the head's own"),
        ({"label_smoothing_factor": 0.1}, "`label_smoothing_factor` must be 0"),
        ({"calibration_loss": "avuc"}, "calibration"),
    ],
)
def test_training_arguments(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, "vbll", **options).train()


def test_trainer(tmp_path: Path) -> None:
    def own(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
        return outputs["logits"].sum()

    with pytest.raises(ValueError, match="`compute_loss_func` must be None"):
        tiny.trainer(tmp_path, made("vbll"), compute_loss_func=own).train()
    with pytest.raises(ValueError, match="is a posterior already"):
        trainer(tmp_path, "vbll").fit_laplace()
    model = made("vbll")
    model.config.problem_type = "regression"
    values = tiny.trainer(tmp_path, model, "regression")
    with pytest.raises(ValueError, match="`problem_type` is 'regression', but this head was made for classes"):
        values.train()
    mixed = made("vbll")
    bayeformers.to_bayesian(mixed.bert)
    with pytest.raises(ValueError, match="VBLL or SNGP head and Bayesian layers"):
        tiny.trainer(tmp_path, mixed).train()
    without = trainer(tmp_path, "sngp")
    without.train_dataset = None
    with pytest.raises(ValueError, match="`fit_covariance` needs data"):
        without.fit_covariance()


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("vbll", "must be a mapping"),
        ({"version": 2, "kind": "vbll"}, "has version 2, this bayeformers reads up to 1"),
        ({"version": 1, "kind": "gp"}, "must be of a kind in"),
        ({"version": 1, "kind": "vbll", "rank": -1}, "`rank`"),
    ],
)
def test_records(record: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        head_config(record)


def test_damaged_folders(tmp_path: Path) -> None:
    model = fitted("sngp")
    model.save_pretrained(tmp_path)
    for change, message in (({"module": None}, "names no layer"), ({"is_regression": None}, "`is_regression`"),
                            ({"module": "nowhere"}, "`head` must be the name of a layer")):  # fmt: skip
        config = hf.AutoConfig.from_pretrained(tmp_path)
        config.bayesian_head = {**config.bayesian_head, **change}
        with pytest.raises(ValueError, match=message):
            bayeformers.from_pretrained(tmp_path, config=config)
    with pytest.raises(ValueError, match="are of another size: a fresh head has no posterior"):
        bayeformers.from_pretrained(tmp_path, num_labels=4, ignore_mismatched_sizes=True)
    plain = tiny.plain("single")
    plain.save_pretrained(tmp_path / "plain")  # the weights of another model under this record
    with pytest.raises(ValueError, match="lacks"):
        bayeformers.from_pretrained(tmp_path / "plain", config=model.config)


def test_configurations_are_json() -> None:
    import json

    for config in (VBLLConfig(prior_std=0.1, rank=3), SNGPConfig(spectral_layers=("a.b",), seed=4)):
        assert head_config(json.loads(json.dumps(config.to_dict()))) == config
    assert head_config({"version": 1, "kind": "sngp", "of_a_newer_version": 1}) == SNGPConfig()


@pytest.mark.parametrize("kind", ["vbll", "sngp"])
def test_no_other_posterior_around_a_head(kind: str) -> None:
    """Their layers would leave the head out, or scatter its mean."""
    model = fitted(kind)
    for call in (bayeformers.to_bayesian, lambda model: bayeformers.laplace.fit(model, batches(), progress=False)):
        with pytest.raises(ValueError, match="VBLL or SNGP head"):
            call(model)
    assert bayeformers.predict(model, rows()).logit_covariance is not None


def test_a_covariance_of_former_weights_is_dropped(caplog: pytest.LogCaptureFixture) -> None:
    """A loss that is only looked at leaves it."""
    model, batch = fitted("sngp"), batches()[0]
    with torch.no_grad():
        head_loss(model, batch, 18)
    assert head_of(model).is_fitted
    head_loss(model, batch, 18).backward()
    covariance = bayeformers.predict(model, rows()).logit_covariance
    assert covariance is not None and float(covariance.abs().max()) == 0 and "no covariance yet" in caplog.text
