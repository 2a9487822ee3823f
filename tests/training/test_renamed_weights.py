"""Checkpoints whose weights have other names than the model's: resume and best model are the checkpoint's, whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from bayeformers import to_bayesian
from bayeformers.training import BayesianTrainer, BayesianTrainingArguments
from bayeformers.training.checkpoints import restore

SIZES: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16
}  # fmt: skip
TEXT = {**SIZES, "vocab_size": 40, "num_key_value_heads": 2, "max_position_embeddings": 16}
IMAGES = {"image_size": 8, "patch_size": 4, "num_labels": 3}


def vit() -> nn.Module:
    return transformers.ViTForImageClassification(transformers.ViTConfig(**SIZES, **IMAGES))


def deit() -> nn.Module:
    return transformers.DeiTForImageClassification(transformers.DeiTConfig(**SIZES, **IMAGES))


def swin() -> nn.Module:
    sizes = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 2, "patch_size": 2, "image_size": 8}
    return transformers.SwinForImageClassification(transformers.SwinConfig(**sizes, num_labels=3))


def gpt_neox() -> nn.Module:
    sizes = {key: value for key, value in TEXT.items() if key != "num_key_value_heads"}
    return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**sizes))


def mixtral() -> nn.Module:
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**TEXT, num_local_experts=2))


def bert() -> nn.Module:
    sizes = {key: value for key, value in TEXT.items() if key != "num_key_value_heads"}
    return transformers.BertForMaskedLM(transformers.BertConfig(**sizes))


def pixio() -> nn.Module:
    """Its file has a "layernorm" and an "encoder.layernorm", the model a "layernorm" and a "pixio.layernorm"."""
    return transformers.PixioBackbone(transformers.PixioConfig(**SIZES, image_size=8, patch_size=4))


MODELS: dict[str, Callable[[], nn.Module]] = {f.__name__: f for f in (vit, deit, swin, gpt_neox, mixtral, bert, pixio)}


def made(kind: str, converted: bool, seed: int) -> nn.Module:
    """With every tensor random: nothing is right by having started so."""
    torch.manual_seed(seed)
    model = MODELS[kind]()
    if converted:
        to_bayesian(model, freeze=False, scale="multiplicative")
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.randn_like(tensor))
    return model


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "8KB"}, {"save_original_format": False}], ids=str)
@pytest.mark.parametrize("converted", [True, False])
@pytest.mark.parametrize("kind", MODELS)
def test_every_tensor_is_the_checkpoints(kind: str, converted: bool, options: dict[str, Any], tmp_path: Path) -> None:
    model, other = made(kind, converted, 0), made(kind, converted, 1)
    parameters = dict(other.named_parameters())
    model.save_pretrained(tmp_path, **options)
    restore(other, tmp_path)
    assert equal(tensors(other), tensors(model))
    assert all(parameters[name] is p for name, p in other.named_parameters())


@pytest.mark.parametrize("converted", [True, False])
def test_a_pickled_checkpoint_and_a_plain_module(converted: bool, tmp_path: Path) -> None:
    def network() -> nn.Module:
        net = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3), nn.BatchNorm1d(3))
        return to_bayesian(net, freeze=False) if converted else net

    first, second, third = network(), network(), network()
    torch.save(first.state_dict(), tmp_path / "pytorch_model.bin")
    restore(second, tmp_path)
    assert equal(tensors(second), tensors(first))
    save_file(first.state_dict(), tmp_path / "model.safetensors")
    restore(third, tmp_path)
    assert equal(tensors(third), tensors(first))


def test_no_pattern_excuses_a_scale(tmp_path: Path) -> None:
    """A model may say that a file need not have its head: that is not said of the head's scales."""
    model = made("vit", True, 0)
    model._keys_to_ignore_on_load_missing = {"classifier.weight"}
    model.save_pretrained(tmp_path)
    changed(tmp_path, lambda state: state.pop("classifier.weight"))
    restore(model, tmp_path)
    changed(tmp_path, lambda state: state.pop("classifier.weight_rho"))
    with pytest.raises(ValueError, match=r"it lacks \['classifier.weight_rho'\]"):
        restore(model, tmp_path)


def test_a_model_that_was_compiled(tmp_path: Path) -> None:
    model = vit()
    names = {f"_orig_mod.{name}": value for name, value in model.state_dict().items()}
    save_file(names, tmp_path / "model.safetensors")
    again = vit()
    restore(again, tmp_path)
    assert equal(tensors(again), tensors(model))


def changed(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("classifier.weight"), r"does not fit the model: it lacks \['classifier.weight'\] \(1\)"),
        (lambda s: s.pop("classifier.weight_rho"), r"model's conversion: it lacks \['classifier.weight_rho'\]"),
        (lambda s: s.update({"extra.weight": torch.ones(2)}), r"and has \['extra.weight'\] \(1\) besides"),
        (
            lambda s: s.update({"classifier.bias": torch.ones(5)}),
            r"'classifier.bias' of shape \(5,\), the model \(3,\)",
        ),
    ],
)
def test_what_does_not_fit_changes_nothing(change: Any, message: str, tmp_path: Path) -> None:
    model = made("vit", True, 0)
    model.save_pretrained(tmp_path)
    changed(tmp_path, change)
    before = tensors(model)
    with pytest.raises(ValueError, match=message):
        restore(model, tmp_path)
    assert equal(tensors(model), before)


def test_a_checkpoint_that_was_not_tied(tmp_path: Path) -> None:
    model, tied = made("bert", False, 0), made("bert", False, 1)
    model.cls.predictions.decoder.weight = nn.Parameter(torch.randn(40, 16))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="which share one in the model"):
        restore(tied, tmp_path)


class Kept(TrainerCallback):
    """All tensors at the start, and at every save."""

    def __init__(self) -> None:
        self.at: dict[int, dict[str, Tensor]] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.at[-1] = tensors(model)

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.at[state.global_step] = tensors(model)


OPTIONS: dict[str, Any] = {
    "max_steps": 3, "save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 4, "learning_rate": 1e-2,
    "report_to": [], "use_cpu": True, "disable_tqdm": True, "logging_strategy": "no",
}  # fmt: skip
BEST = {
    "eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "greater_is_better": True
}  # fmt: skip


def data() -> list[dict[str, Any]]:
    torch.manual_seed(3)
    return [{"pixel_values": torch.randn(3, 8, 8), "labels": i % 3} for i in range(8)]


def trainer(model: nn.Module, folder: Path, **options: Any) -> BayesianTrainer:
    args = BayesianTrainingArguments(str(folder), **OPTIONS, **options)
    return BayesianTrainer(model=model, args=args, train_dataset=data(), eval_dataset=data())


@pytest.mark.parametrize("converted", [True, False])
def test_resume_and_best_model(converted: bool, tmp_path: Path) -> None:
    """The "best" evaluation is not the last step's, as it happens: the least of a converted model, else the worst."""

    def model() -> nn.Module:
        torch.manual_seed(0)
        return to_bayesian(vit(), delta=0.3, freeze=False) if converted else vit()

    options = BEST | {"metric_for_best_model": "eval_loss", "greater_is_better": not converted}
    first, kept = trainer(model(), tmp_path / "a", **options), Kept()
    first.add_callback(kept)
    first.train()
    best = int(str(first.state.best_model_checkpoint).rsplit("-", 1)[1])
    assert best < 3 and equal(tensors(first.model), kept.at[best])
    second, resumed = trainer(model(), tmp_path / "b"), Kept()
    second.add_callback(resumed)
    second.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert equal(resumed.at[-1], kept.at[2]) and equal(tensors(second.model), kept.at[3])


def test_a_checkpoint_of_the_stock_trainer(tmp_path: Path) -> None:
    stock, kept = Trainer(vit(), TrainingArguments(str(tmp_path), **OPTIONS), train_dataset=data()), Kept()
    stock.add_callback(kept)
    stock.train()
    ours, resumed = trainer(vit(), tmp_path / "b"), Kept()
    ours.add_callback(resumed)
    ours.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert equal(resumed.at[-1], kept.at[2])


def test_best_checkpoint_without_weights(tmp_path: Path) -> None:
    ours = trainer(vit(), tmp_path)
    ours.state.best_model_checkpoint = str(tmp_path / "gone")
    with pytest.raises(ValueError, match="holds no weights"):
        ours._load_best_model()


def test_best_adapter(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "query"], modules_to_save=["classifier"])
    model = peft.get_peft_model(vit(), config)
    to_bayesian(model, 0.3, False, target_modules=r".*(lora_[AB]\.default|modules_to_save\.default)")
    first, kept = (
        trainer(model, tmp_path, metric_for_best_model="eval_loss", **{**BEST, "greater_is_better": False}),
        Kept(),
    )
    first.add_callback(kept)
    first.train()
    best = int(str(first.state.best_model_checkpoint).rsplit("-", 1)[1])
    assert best < 3 and equal(tensors(first.model), kept.at[best])
