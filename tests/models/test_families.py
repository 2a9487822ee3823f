"""What every family does: loss, initialization, round trips, Auto classes, conversion, one step of either training."""

import importlib
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForImageClassification
from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention

import bayeformers
from bayeformers import BayesianTrainer, BayesianTrainingArguments, fixed_draw, models, summary, to_bayesian
from bayeformers.training.items import item_nll
from tests.models import tiny

ROOT = Path(__file__).parents[2]
every_family = pytest.mark.parametrize("family", tiny.FAMILIES)
own_family = pytest.mark.parametrize("family", tiny.OWN)


def logits(model: Any, pixel_values: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(pixel_values).logits


def matrices(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.dim() > 1 and not name.endswith("_rho")}


# -------------------------------------------------------------------------------------------------------------- forward


@own_family
def test_loss_is_the_cross_entropy(family: str) -> None:
    model = tiny.build(family).double()
    pixel_values, labels = tiny.images(model.config).double(), torch.tensor([0, 2, 1, 1])
    output = model(pixel_values, labels=labels)
    assert type(output) is ImageClassifierOutputWithNoAttention
    assert output.logits.shape == (4, tiny.CLASSES)
    expected = -torch.stack([row.log_softmax(0)[label] for row, label in zip(output.logits, labels, strict=True)])
    torch.testing.assert_close(output.loss, expected.mean(), rtol=1e-12, atol=0)
    torch.testing.assert_close(item_nll(output, {"labels": labels}, "single_label_classification").values, expected)
    # the Trainer divides by the labels of all accumulated batches
    part = model(pixel_values, labels=labels, num_items_in_batch=torch.tensor(10)).loss
    torch.testing.assert_close(part, expected.sum() / 10, rtol=1e-12, atol=0)


@own_family
def test_outputs_as_tuples(family: str) -> None:
    model = tiny.build(family)
    pixel_values = tiny.images(model.config)
    output = model(pixel_values, labels=torch.tensor([0, 2, 1, 1]))
    loss, values = model(pixel_values, labels=torch.tensor([0, 2, 1, 1]), return_dict=False)
    assert torch.equal(loss, output.loss) and torch.equal(values, output.logits)
    (alone,) = model(pixel_values, return_dict=False)
    assert torch.equal(alone, output.logits)
    assert model(pixel_values).loss is None


@own_family
def test_images_of_another_shape_are_refused(family: str) -> None:
    model = tiny.build(family)
    pixel_values = tiny.images(model.config)
    for wrong in (pixel_values[:, :, 1:], pixel_values[0], pixel_values.repeat(1, 2, 1, 1), pixel_values.flatten(1)):
        with pytest.raises(ValueError, match=r"`pixel_values` must have shape \(B, "):
            model(wrong)


def test_initialization() -> None:
    """Weights N(0, 2 / fan_in): the standard deviation of n of them has the relative error 1 / sqrt(2 n)."""
    model = models.VGGForImageClassification(models.VGGConfig(depth=11, image_size=32, hidden_sizes=[64], num_labels=9))
    layers = [module for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    assert len(layers) == 10
    for layer in layers:
        assert not layer.bias.any()
        weights = layer.weight.numel()
        expected = math.sqrt(2 / layer.weight[0].numel())
        assert float(layer.weight.detach().std()) == pytest.approx(expected, rel=5 / math.sqrt(2 * weights)), layer
        assert abs(float(layer.weight.detach().mean())) < 5 * expected / math.sqrt(weights)


# ---------------------------------------------------------------------------------------------- saving and Auto classes


@every_family
def test_round_trip(family: str, tmp_path: Path) -> None:
    model = tiny.build(family)
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert type(reloaded) is type(model)
    pixel_values = tiny.images(model.config)
    assert torch.equal(logits(reloaded, pixel_values), logits(model, pixel_values))
    written = AutoConfig.from_pretrained(tmp_path)
    assert type(written) is type(model.config)
    ignored = {"dtype", "_name_or_path"}
    assert {k: v for k, v in written.to_dict().items() if k not in ignored} == {
        k: v for k, v in model.config.to_dict().items() if k not in ignored
    }


@own_family
@pytest.mark.parametrize("num_labels", [2, 10, 1000])
def test_number_of_classes_is_saved(family: str, num_labels: int, tmp_path: Path) -> None:
    """Two of them is transformers' own default, which it leaves out of files."""
    config_class = type(tiny.build(family).config)
    config_class(num_labels=num_labels).save_pretrained(tmp_path)
    assert config_class.from_pretrained(tmp_path).num_labels == AutoConfig.from_pretrained(tmp_path).num_labels
    assert config_class.from_pretrained(tmp_path).num_labels == num_labels
    names = {0: "cat", 1: "dog"}
    assert config_class(id2label=names, label2id={"cat": 0, "dog": 1}).num_labels == 2
    assert config_class(id2label=names).id2label == names


def test_new_head_on_trained_features(tmp_path: Path) -> None:
    model = tiny.build("lenet")
    model.save_pretrained(tmp_path)
    other = models.LeNetForImageClassification.from_pretrained(tmp_path, num_labels=5, ignore_mismatched_sizes=True)
    assert other.config.num_labels == other.num_labels == len(other.classifier.bias) == 5
    for name, value in model.features.state_dict().items():
        assert torch.equal(other.features.state_dict()[name], value)


def test_names_are_free_in_transformers() -> None:
    """Neither the model types nor the class names can be taken for transformers' own."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    for name in models.__all__:
        assert not hasattr(transformers, name)
    types = [type(tiny.build(family).config).model_type for family in tiny.OWN]
    assert len(set(types)) == len(tiny.OWN) - 1  # both VGGs are one family
    assert not set(types) & set(CONFIG_MAPPING_NAMES)


def test_import_twice() -> None:
    """A notebook reloads modules; registering again must not fail."""
    importlib.reload(models)
    importlib.reload(models)


FRESH = """
import sys
from pathlib import Path
import torch
import bayeformers
from transformers import AutoModelForImageClassification
for folder in sorted(Path(sys.argv[1]).iterdir()):
    x = torch.load(folder / "x.pt")
    plain = AutoModelForImageClassification.from_pretrained(folder / "plain").eval()
    bayesian = bayeformers.from_pretrained(folder / "bayesian").eval()
    with torch.no_grad(), bayeformers.fixed_draw(bayesian, 3):
        found = [type(plain).__name__, plain(x).logits, type(bayesian).__name__, bayesian(x).logits]
    torch.save(found, folder / "y.pt")
"""


def test_fresh_process(tmp_path: Path) -> None:
    """A process that only imports bayeformers loads every family, deterministic and converted."""
    expected = {}
    for family in tiny.FAMILIES:
        folder, model = tmp_path / family, tiny.build(family)
        model.save_pretrained(folder / "plain")
        x = tiny.images(model.config)
        torch.save(x, folder / "x.pt")
        name, mean = type(model).__name__, logits(model, x)
        to_bayesian(model, delta=0.2).save_pretrained(folder / "bayesian")
        with fixed_draw(model, 3):
            expected[family] = [name, mean, name, logits(model, x)]
        assert not torch.equal(expected[family][1], expected[family][3])
    done = subprocess.run(
        [sys.executable, "-c", FRESH, str(tmp_path)], capture_output=True, text=True, timeout=300, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    for family, values in expected.items():
        found = torch.load(tmp_path / family / "y.pt")
        assert found[::2] == values[::2]
        assert torch.equal(found[1], values[1]) and torch.equal(found[3], values[3]), family


# ----------------------------------------------------------------------------------------------------------- conversion


@every_family
def test_conversion(family: str, tmp_path: Path) -> None:
    """All matrices become random, the mean is the old model bit for bit, only scales train; and back."""
    model, plain = tiny.build(family), tiny.build(family)
    x = tiny.images(model.config)
    to_bayesian(model, delta=0.1, freeze=True)
    assert summary(model).matrix_coverage == 1.0
    random = {name.removesuffix("_rho") for name, _ in model.named_parameters() if name.endswith("_rho")}
    assert random >= matrices(model) == matrices(plain)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {f"{name}_rho" for name in random}
    assert torch.equal(logits(model, x), logits(plain, x))
    with fixed_draw(model, 0):
        drawn = logits(model, x)
    assert (drawn - logits(plain, x)).abs().amin() > 0

    model.save_pretrained(tmp_path)
    reloaded = bayeformers.from_pretrained(tmp_path)
    assert type(reloaded) is type(model)
    with fixed_draw(reloaded, 0):
        assert torch.equal(logits(reloaded, x), drawn)
    mean = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(logits(mean, x), logits(plain, x))

    bayeformers.to_deterministic(model)
    assert torch.equal(logits(model, x), logits(plain, x))
    assert {n: p.requires_grad for n, p in model.named_parameters()} == dict.fromkeys(
        dict(plain.named_parameters()), True
    )
    rates = [[m.p for m in net.modules() if isinstance(m, nn.modules.dropout._DropoutNd)] for net in (model, plain)]
    assert rates[0] == rates[1]


@every_family
@pytest.mark.parametrize("bayesian", [False, True], ids=["deterministic", "bayesian"])
def test_one_step(family: str, bayesian: bool, tmp_path: Path) -> None:
    """The likelihood is found from the configuration; the step moves what trains; evaluation averages probabilities."""
    model = tiny.build(family)
    if bayesian:
        to_bayesian(model, delta=0.1, freeze=True, prior=bayeformers.NormalPrior(std=1.0))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    rows = tiny.Rows(model.config)
    args = BayesianTrainingArguments(
        str(tmp_path),
        max_steps=1,
        num_eval_samples=2,
        use_cpu=True,
        disable_tqdm=True,
        report_to=[],
        save_strategy="no",
    )
    trainer = BayesianTrainer(model=model, args=args, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {name for name in before if name.endswith("_rho") or not bayesian}
    if bayesian:
        prediction = bayeformers.predict(model, {"pixel_values": rows.pixel_values}, num_samples=2)
        log_probs = prediction.mean_log_probs
    else:
        log_probs = logits(model.eval(), rows.pixel_values).log_softmax(1)
    expected = float(F.nll_loss(log_probs, rows.labels))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_classes_that_users_register(tmp_path: Path) -> None:
    """`from_pretrained` finds any class that is registered with an Auto class."""

    class OwnConfig(models.MLPConfig):
        model_type = "test_models_own"

    class OwnForImageClassification(models.MLPForImageClassification):
        config_class = OwnConfig

    model = to_bayesian(OwnForImageClassification(OwnConfig(image_size=4, hidden_sizes=[3])))
    model.save_pretrained(tmp_path)
    AutoConfig.register("test_models_own", OwnConfig)
    with pytest.raises(ValueError, match="names 'OwnForImageClassification', which transformers does not have"):
        bayeformers.from_pretrained(tmp_path)
    AutoModelForImageClassification.register(OwnConfig, OwnForImageClassification)
    assert type(bayeformers.from_pretrained(tmp_path)) is OwnForImageClassification
