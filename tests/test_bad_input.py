"""Wrong input to the core: one clear error that names the argument, before anything changes."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bayeformers
from bayeformers import (
    BayesianConfig,
    bayesian_config,
    fixed_draw,
    is_bayesian,
    kl_divergence,
    posterior_mean,
    register_layer,
    summary,
    to_bayesian,
    to_deterministic,
    unfreeze,
)
from bayeformers import nn as bnn
from tests.cases import case
from tests.conversion.test_conversion_matrix import assert_same_state, state_of

NAN, INF = float("nan"), float("inf")


def bert() -> nn.Module:
    return case("bert").build()


def poisoned() -> nn.Module:
    model = bert()
    with torch.no_grad():
        model.classifier.weight[0, 0] = NAN
    return model


def infinite() -> nn.Module:
    model = bert()
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.bias[3] = -INF
    return model


CONVERSIONS: list[tuple[Callable[[], nn.Module], dict[str, Any], tuple[str, ...]]] = [
    *((bert, {"delta": v}, ("`delta`", repr(v))) for v in (0, 0.0, -0.1, NAN, INF, -INF, "0.05", True, [0.1])),
    *((bert, {"freeze": v}, ("`freeze`", repr(v))) for v in ("no", 0.05)),
    *((bert, {"keep_dropout": v}, ("`keep_dropout`", repr(v))) for v in ("yes", 0.1)),
    *((bert, {"prior": v}, ("`prior`", repr(v))) for v in ("moped", 1.0, bayeformers.MopedPrior, {"type": "moped"})),
    *((bert, {"estimator": v}, ("`estimator`", "reparameterization", repr(v))) for v in ("flipot", None, 3, "")),
    (bert, {"target_modules": ["querry"]}, ("`target_modules`", "querry", "classifier")),
    (bert, {"target_modules": ["query", "nothing_like_it"]}, ("`target_modules`", "nothing_like_it")),
    (bert, {"target_modules": "query"}, ("`target_modules`", "'query'")),  # a string is one full regular expression
    (bert, {"target_modules": r".*(query"}, ("`target_modules`", "regular expression")),
    (bert, {"target_modules": []}, ("`target_modules`", "nothing to convert")),
    (bert, {"target_modules": 3}, ("`target_modules`", "3")),
    (bert, {"target_modules": [1]}, ("`target_modules`", "[1]")),
    (bert, {"target_modules": ["LayerNorm"]}, ("`target_modules`", "LayerNorm", "torch.Linear")),
    (bert, {"target_modules": ["query", "LayerNorm"]}, ("`target_modules`", "LayerNorm")),
    (bert, {"target_modules": ["encoder"]}, ("`target_modules`", "encoder")),
    (bert, {"target_modules": r"bert\.encoder"}, ("`target_modules`", "nothing to convert")),
    (bert, {"exclude_modules": ["querry"]}, ("`exclude_modules`", "querry")),
    (bert, {"exclude_modules": "clasifier"}, ("`exclude_modules`", "clasifier")),
    (
        bert,
        {
            "exclude_modules": "[",
        },
        ("`exclude_modules`", "regular expression"),
    ),
    (bert, {"exclude_modules": {"classifier": 1}}, ("`exclude_modules`", "classifier")),
    (bert, {"exclude_modules": ".*"}, ("nothing to convert",)),
    (bert, {"modules_to_save": ["clasifier"]}, ("`modules_to_save`", "clasifier")),
    (bert, {"modules_to_save": "classifier"}, ("`modules_to_save`", "classifier")),
    (bert, {"modules_to_save": [2]}, ("`modules_to_save`", "[2]")),
    (bert, {"target_modules": ["classifier"], "modules_to_save": ["classifier"]}, ("`target_modules`", "classifier")),
    (poisoned, {}, ("`model`", "classifier.weight")),
    (infinite, {}, ("`model`", "bert.encoder.layer.1.output.dense.bias")),
    (lambda: nn.LayerNorm(4), {}, ("nothing to convert", "LayerNorm")),
    (lambda: nn.Sequential(nn.ReLU()), {}, ("nothing to convert",)),
    (lambda: nn.Embedding(5, 3, max_norm=1.0), {}, ("max_norm",)),
    (lambda: nn.Embedding(5, 3, sparse=True), {}, ("sparse",)),
    (lambda: nn.Embedding(5, 3, scale_grad_by_freq=True), {}, ("scale_grad_by_freq",)),
    (lambda: case("gpt2-lm").build(), {"exclude_modules": ["lm_head"]}, ("lm_head", "transformer.wte", "tied")),
    (lambda: case("gpt2-lm").build(), {"target_modules": ["wte"]}, ("lm_head", "transformer.wte", "tied")),
    (lambda: case("t5").build(), {"target_modules": ["shared"]}, ("shared", "tied")),
    (lambda: case("t5").build(), {"modules_to_save": ["lm_head"]}, ("shared", "lm_head", "tied")),
    (lambda: to_bayesian(bert()), {}, ("`model`", "twice", "to_deterministic")),
    (lambda: to_bayesian(bert()), {"target_modules": ["classifier"]}, ("`model`", "twice")),
    (lambda: nn.Sequential(to_bayesian(bert())), {}, ("`model`", "twice")),
    (lambda: nn.Sequential(bnn.Linear(2, 2), nn.Linear(2, 2)), {}, ("`model`", "Bayesian already")),
]


@pytest.mark.parametrize(
    ("make", "options", "named"), CONVERSIONS, ids=[f"{i}-{o}"[:60] for i, (_, o, _) in enumerate(CONVERSIONS)]
)
def test_conversion_refuses(make: Callable[[], nn.Module], options: dict[str, Any], named: tuple[str, ...]) -> None:
    """The message names the argument and the value; the model is bit-identical, its flags and dropout too."""
    model = make()
    was_bayesian = any(isinstance(m, bnn.BayesianModule) for m in model.modules())
    before = state_of(model)
    with pytest.raises((ValueError, TypeError)) as error:
        to_bayesian(model, **options)
    missing = [text for text in named if text not in str(error.value)]
    assert not missing, f"{missing} not in: {error.value}"
    after = state_of(model)
    with_nan = before["state"].keys() == after["state"].keys() and any(
        not torch.isfinite(v).all() for v in before["state"].values()
    )
    if with_nan:
        before["state"], after["state"] = ({k: v.nan_to_num() for k, v in s["state"].items()} for s in (before, after))
    assert_same_state(after, before)
    assert any(isinstance(m, bnn.BayesianModule) for m in model.modules()) == was_bayesian


@pytest.mark.parametrize("model", ["bert-base-uncased", None, 3, torch.zeros(2), {"model": 1}])
def test_model_is_a_module(model: Any) -> None:
    with pytest.raises(TypeError, match="`model` must be a torch.nn.Module"):
        to_bayesian(model)


@pytest.mark.parametrize("function", [to_deterministic, unfreeze, summary, bayesian_config, kl_divergence])
def test_needs_a_bayesian_model(function: Callable[[nn.Module], Any]) -> None:
    model = bert()
    before = state_of(model)
    with pytest.raises(ValueError, match=r"`model` \(BertForSequenceClassification\).*to_bayesian"):
        function(model)
    assert_same_state(state_of(model), before)
    assert not is_bayesian(model)


@pytest.mark.parametrize(
    ("index", "seed", "named", "kind"),
    [
        (-1, 0, "index", ValueError),
        (1.0, 0, "index", TypeError),
        ("0", 0, "index", TypeError),
        (None, 0, "index", TypeError),
        (True, 0, "index", TypeError),
        (torch.tensor(1), 0, "index", TypeError),
        (0, 0.5, "seed", TypeError),
        (0, None, "seed", TypeError),
        (0, -1, "seed", ValueError),
    ],
)
def test_fixed_draw_refuses(index: Any, seed: Any, named: str, kind: type[Exception]) -> None:
    model = to_bayesian(bert())
    with pytest.raises(kind, match=f"`{named}`"), fixed_draw(model, index, seed):
        raise AssertionError("entered")
    assert all(m.draw is None for m in model.modules() if isinstance(m, bnn.BayesianModule))


def test_nothing_to_draw() -> None:
    """A draw of a model without any Bayesian layer would be the deterministic model, silently; its mean it is."""
    with (
        pytest.raises(ValueError, match=r"`model` \(BertForSequenceClassification\).*to_bayesian"),
        fixed_draw(bert(), 0),
    ):
        raise AssertionError("entered")
    with posterior_mean(bert()):
        pass


def test_parts_converted_one_by_one() -> None:
    """Their tensors have the same names, so the same noise: a draw of the whole is refused, of a part it is not."""
    model = nn.ModuleList([to_bayesian(nn.Sequential(nn.Linear(3, 3))) for _ in range(2)])
    with pytest.raises(ValueError, match=r"`model`.*'0\.weight'.*one call of `to_bayesian`"), fixed_draw(model, 0):
        raise AssertionError("entered")
    with fixed_draw(model[0], 0):
        pass


def test_register_layer_refuses() -> None:
    class NotBayesian(nn.Linear):
        pass

    with pytest.raises(TypeError, match=r"register_layer\(Linear\).*NotBayesian"):
        register_layer(nn.Linear)(NotBayesian)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"register_layer\(Embedding\).*Linear"):
        register_layer(nn.Embedding)(bnn.Linear)


# -------------------------------------------------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"delta": 0}, "`delta`"),
        ({"delta": "wide"}, "`delta`"),
        ({"prior": {"type": "flat"}}, "`prior`"),
        ({"prior": None}, "`prior`"),
        ({"prior": {"type": "normal", "std": -1}}, "`std`"),
        ({"version": 99}, "bayesian.version"),
        ({"noise_version": 99}, "bayesian.noise_version"),
        ({"version": "new"}, "bayesian.version"),
        ({"version": None}, "bayesian.version"),
    ],
)
def test_configuration_refuses(changes: dict[str, Any], named: str) -> None:
    with pytest.raises((ValueError, TypeError), match=named):
        BayesianConfig.from_dict({**BayesianConfig().to_dict(), **changes})


# ----------------------------------------------------------------------------------------------------------- checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "saved"
    to_bayesian(bert()).save_pretrained(path)
    return path


def edited(folder: Path, target: Path, edit: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of a checkpoint with its configuration changed."""
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    config = json.loads((target / "config.json").read_text())
    edit(config)
    (target / "config.json").write_text(json.dumps(config))
    return target


def rename(config: dict[str, Any]) -> None:
    config["bayesian"]["modules"]["bert.nowhere"] = "Linear"


def rekind(config: dict[str, Any]) -> None:
    config["bayesian"]["modules"]["classifier"] = "Embedding"


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (lambda c: c.pop("bayesian"), "`directory`.*no Bayesian model"),
        (rename, "bert.nowhere.*no such module"),
        (rekind, "classifier.*Embedding.*Linear"),
        (lambda c: c["bayesian"].update(version=7), "bayesian.version.*7.*upgrade"),
        (lambda c: c["bayesian"].update(noise_version=4), "bayesian.noise_version.*4.*upgrade"),
        (lambda c: c["bayesian"].update(prior={"type": "of the future"}), "`prior`.*of the future"),
        (lambda c: c["bayesian"].update(delta=-1), "`delta`"),
        (lambda c: c["bayesian"].update(estimator="of the future"), "`estimator`.*of the future"),
        (lambda c: c.update(architectures=["BertForMindReading"]), "architectures.*BertForMindReading"),
        (lambda c: c.update(architectures=None), "architectures"),
    ],
)
def test_checkpoint_refuses(edit: Any, named: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=named):
        bayeformers.from_pretrained(edited(folder, tmp_path / "edited", edit))


def test_checkpoint_of_a_plain_model(tmp_path: Path) -> None:
    bert().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`directory`.*no Bayesian model.*to_bayesian"):
        bayeformers.from_pretrained(tmp_path)


def test_checkpoint_without_its_rho(folder: Path, tmp_path: Path) -> None:
    """Saved again from a plainly loaded model, which holds the mean alone, and does not claim more."""
    type(bert()).from_pretrained(folder).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds no Bayesian model"):
        bayeformers.from_pretrained(tmp_path)


def test_checkpoint_that_lacks_one_rho(folder: Path, tmp_path: Path) -> None:
    model = bayeformers.from_pretrained(folder)
    state = {k: v for k, v in model.state_dict().items() if k != "classifier.bias_rho"}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match=r"lacks 1 tensors.*classifier\.bias_rho"):
        bayeformers.from_pretrained(tmp_path)


def test_resized_behind_its_back() -> None:
    """A layer whose weight was replaced by one of another shape says so instead of broadcasting."""
    model = to_bayesian(bert()).train()
    model.classifier.weight = nn.Parameter(torch.zeros(5, 16))
    with pytest.raises(RuntimeError, match=r"classifier\.weight.*\(5, 16\).*to_deterministic"):
        model(**case("bert").inputs())
    assert torch.isfinite(copy.deepcopy(model).bert(**case("bert").inputs()).pooler_output).all()


@pytest.mark.parametrize("ids", [[-1], [-100], [64], [3, -5]])
def test_embedding_ids_out_of_range(ids: list[int]) -> None:
    """As torch's: a negative id is an error, never a row from the end; in every mode."""
    model = to_bayesian(nn.Embedding(64, 4))
    for mode in (model.train, model.eval):
        mode()
        with pytest.raises(IndexError):
            nn.Embedding.forward(copy.deepcopy(model).eval(), torch.tensor(ids))
        with fixed_draw(model, 0):
            for context in (torch.no_grad(), torch.enable_grad()):
                with context, pytest.raises(IndexError):
                    model(torch.tensor(ids))
            with torch.no_grad():
                model.variational("weight").sample()  # keeps the table
                with pytest.raises(IndexError):
                    model(torch.tensor(ids))
    with pytest.raises(IndexError):
        model.train()(torch.tensor(ids))


# ------------------------------------------------------------------------------- layers by hand, estimators and priors

LAYERS: dict[str, Callable[..., nn.Module]] = {
    "Linear": lambda **options: bnn.Linear(3, 2, **options),
    "Rank1Linear": lambda **options: bnn.Rank1Linear(3, 2, **options),
    "RankLinear": lambda **options: bnn.RankLinear(3, 2, **options),
    "Conv1D": lambda **options: bnn.Conv1D(3, 2, **options),
    "Bilinear": lambda **options: bnn.Bilinear(2, 2, 2, **options),
    "Conv1d": lambda **options: bnn.Conv1d(2, 2, 3, **options),
    "Conv2d": lambda **options: bnn.Conv2d(2, 2, 3, **options),
    "Conv3d": lambda **options: bnn.Conv3d(2, 2, 3, **options),
    "ConvTranspose1d": lambda **options: bnn.ConvTranspose1d(2, 2, 3, **options),
    "ConvTranspose2d": lambda **options: bnn.ConvTranspose2d(2, 2, 3, **options),
    "ConvTranspose3d": lambda **options: bnn.ConvTranspose3d(2, 2, 3, **options),
    "Embedding": lambda **options: bnn.Embedding(5, 2, **options),
    "EmbeddingBag": lambda **options: bnn.EmbeddingBag(5, 2, **options),
    "GRU": lambda **options: bnn.GRU(3, 2, **options),
    "LSTM": lambda **options: bnn.LSTM(3, 2, **options),
    "LayerNorm": lambda **options: bnn.LayerNorm(4, **options),
    "RMSNorm": lambda **options: bnn.RMSNorm(4, **options),
    "MultiheadAttention": lambda **options: bnn.MultiheadAttention(4, 2, **options),
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("delta", (0, -0.1, NAN, INF, "0.05", True, None)),
        ("prior", ("normal", None, 1.0, bayeformers.NormalPrior, {"type": "normal"})),
        ("estimator", ("flipot", None, 3, ["flipout"], {"0": "flipout"})),
    ],
)
def test_layer_refuses(layer: str, name: str, values: tuple[Any, ...]) -> None:
    """Every layer checks its own three arguments as `to_bayesian` does."""
    for value in values:
        with pytest.raises((ValueError, TypeError)) as error:
            LAYERS[layer](**{name: value})
        assert f"`{name}`" in str(error.value) and repr(value) in str(error.value)


def test_every_layer_is_tested() -> None:
    plain = {name for name in bnn.__all__ if isinstance(getattr(bnn, name), type)}
    layers = {name for name in plain if issubclass(getattr(bnn, name), bnn.BayesianModule)}
    assert layers - {"BayesianModule", "FactorLinear"} == set(LAYERS)


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"estimator": {"0": "flipout", "9": "flipout"}}, "`estimator`.*'9'.*matches no converted layer"),
        ({"estimator": {"1": "flipout"}}, "`estimator`.*'1'.*matches no converted layer"),  # a normalisation
        ({"estimator": {"": "flipout"}}, "`estimator`.*''.*matches no converted layer"),
        ({"estimator": {"0": ["flipout"]}}, r"`estimator`.*\['flipout'\]"),
        ({"estimator": {"*": "flipout"}}, "`estimator`.*regular expression"),
        ({"estimator": {"0": "flipout", 2: "flipout"}}, "`estimator`.*strings.*2"),
        ({"estimator": ("flipout",)}, r"`estimator`.*\('flipout',\)"),
        ({"estimator": "Flipout"}, "`estimator`.*flipout.*'Flipout'"),
        ({"estimator": True}, "`estimator`.*True"),
        ({"estimator": {"0": "flipout"}, "exclude_modules": ["0"]}, "`estimator`.*'0'.*matches no converted layer"),
        ({"norms": 1}, "`norms` must be True or False, got 1"),
        ({"norms": "yes"}, "`norms` must be True or False, got 'yes'"),
        ({"norms": None}, "`norms` must be True or False, got None"),
        ({"norms": ["1"]}, "`norms` must be True or False"),
        ({"target_modules": ["1"]}, "`target_modules`.*`norms=True`"),
        ({"scale": "relative"}, "`scale` must be one of.*'relative'"),
        ({"scale": 1}, "`scale` must be one of.*1"),
        ({"scale": ["additive"]}, r"`scale` must be one of.*\['additive'\]"),
        ({"prior": bayeformers.ARDPrior}, "`prior` must be a Prior.*ARDPrior"),
        ({"prior": [bayeformers.ARDPrior()]}, r"`prior` must be a Prior.*\[ARDPrior"),
        ({"prior": {"type": "ard"}}, "`prior` must be a Prior.*ard"),
        ({"prior": nn.Linear(2, 2)}, "`prior`.*Linear.*no Bayesian layer.*to_bayesian"),
    ],
)
def test_new_options_refuse(options: dict[str, Any], named: str) -> None:
    """Named, before anything changes."""
    model = net()
    before = state_of(model)
    with pytest.raises((ValueError, TypeError), match=named):
        to_bayesian(model, **options)
    assert_same_state(state_of(model), before)


@pytest.mark.parametrize("shapes", [(9, 4), (4, 9)])
def test_prior_of_another_shape(shapes: tuple[int, int]) -> None:
    """A posterior of other shapes is no prior for this model; the error names the tensor and the way out."""
    other = to_bayesian(nn.Sequential(nn.Linear(*shapes), nn.LayerNorm(4), nn.Linear(4, 2)))
    model = net()
    with pytest.raises(ValueError, match=r"`prior`.*'0\.weight'.*exclude="):
        to_bayesian(model, prior=other)
    assert not is_bayesian(model)


@pytest.mark.parametrize("estimator", sorted(bnn.ESTIMATORS))
@pytest.mark.parametrize(
    "x", [torch.ones(4, 5), torch.tensor(1.0), torch.ones(4, 3).long(), torch.ones(4, 3).double()], ids=str
)
def test_input_of_a_linear(estimator: str, x: torch.Tensor) -> None:
    """Another width, no axis, another dtype: torch's own error, whatever the estimator."""
    with pytest.raises(RuntimeError) as expected:
        nn.Linear(3, 2)(x)
    with pytest.raises(RuntimeError) as found:
        bnn.Linear(3, 2, estimator=estimator).train()(x)
    assert str(found.value) == str(expected.value)


@pytest.mark.parametrize("estimator", sorted(bnn.ESTIMATORS))
@pytest.mark.parametrize(
    ("ids", "kind"),
    [(torch.tensor([[5]]), IndexError), (torch.tensor([[-1]]), IndexError), (torch.ones(2, 2), RuntimeError)],
)
def test_ids_of_an_embedding(estimator: str, ids: torch.Tensor, kind: type[Exception]) -> None:
    with pytest.raises(kind):
        bnn.Embedding(5, 2, estimator=estimator).train()(ids)


@pytest.mark.parametrize("estimator", sorted(bnn.ESTIMATORS))
def test_an_empty_batch_is_no_error(estimator: str) -> None:
    assert bnn.Linear(3, 2, estimator=estimator).train()(torch.ones(0, 3)).shape == (0, 2)
    for shape in ((0, 3), (2, 0)):
        ids = torch.zeros(shape, dtype=torch.long)
        assert bnn.Embedding(5, 2, estimator=estimator).train()(ids).shape == (*shape, 2)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"norms": "yes"}, "`norms` must be True or False, got 'yes'"),
        ({"freeze": "no"}, "`freeze` must be True or False, got 'no'"),
        ({"freeze": None}, "`freeze` must be True or False, got None"),
        ({"scale": "relative"}, "`scale` must be one of"),
        ({"prior": {"type": "double_exponential", "scale": -1}}, "`scale` must be a finite number > 0"),
        ({"prior": {"type": "empirical_bayes", "per": "network"}}, "`per`"),
    ],
)
def test_configuration_refuses_new_values(changes: dict[str, Any], named: str) -> None:
    with pytest.raises((ValueError, TypeError), match=named):
        BayesianConfig.from_dict({**BayesianConfig().to_dict(), **changes})
