"""A model whose weights are not plain tensors in memory is refused by name, and left as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as hf
from accelerate import cpu_offload, cpu_offload_with_hook, disk_offload, dispatch_model
from torch import Tensor, nn

from bayeformers import is_bayesian, predict, to_bayesian
from bayeformers.conversion.plain_weights import check_plain_weights
from tests.cases import case


class Packed(Tensor):
    """As torchao's and quanto's weights: a Parameter of a class of its own."""


def with_packed() -> nn.Module:
    model = case("bert").build()
    layer = model.bert.encoder.layer[0].output.dense
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Packed), requires_grad=False)
    return model


def of_package(package: str) -> Callable[[], nn.Module]:
    """A layer as a library has it that is not installed here: its weight is a buffer, or of whole numbers."""

    def build() -> nn.Module:
        kind = type("QuantLinear", (nn.Module,), {"__module__": package, "forward": lambda self, x: x @ self.codes})
        layer = kind()
        layer.register_buffer("codes", torch.ones(16, 16, dtype=torch.int8))
        model = case("bert").build()
        model.bert.encoder.layer[1].output.dense = layer
        return model

    return build


def with_buffer() -> nn.Module:
    model = case("bert").build()
    layer = nn.Module()
    layer.register_buffer("qweight", torch.ones(16, 16, dtype=torch.int32))
    model.bert.pooler.dense = layer
    return model


def small(dtype: torch.dtype) -> nn.Module:
    model = case("bert").build()
    layer = model.bert.pooler.dense
    layer.weight = nn.Parameter(torch.ones(16, 16).to(dtype), requires_grad=False)
    return model


def flagged() -> nn.Module:
    model = case("bert").build()
    model.is_quantized, model.quantization_method = True, "gptq"
    return model


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return hf.BertForSequenceClassification(case("bert").build().config)


def offloaded() -> nn.Module:
    model = case("bert").build()
    cpu_offload(model, torch.device("cpu"))
    return model


def lazy() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.LazyLinear(2))


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "tensor subclass": (with_packed, r"layer\.0\.output\.dense.*weight.*no plain tensor but a Packed"),
    "cpu offload": (offloaded, r"bert\.embeddings'.*offloaded by accelerate"),
    "meta": (on_meta, r"meta device, without values"),
    "float8": (lambda: small(torch.float8_e4m3fn), r"pooler\.dense.*quantised \(torch\.float8"),
    "int8": (lambda: small(torch.int8), r"pooler\.dense.*quantised \(torch\.int8\)"),
    "packed buffer": (with_buffer, r"pooler\.dense.*quantised"),
    "flag": (flagged, r"it is quantised \(gptq\)"),
    "lazy": (lazy, r"'1' \(LazyLinear\) has a weight that has no values yet"),
    **{
        package: (of_package(f"{package}.linear"), rf"layer\.1\.output\.dense.*quantised \({package}")
        for package in ("bitsandbytes", "gptqmodel", "awq", "hqq", "optimum.quanto", "torch.ao.nn.quantized.dynamic")
    },
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name_and_left_alone(name: str) -> None:
    build, message = REFUSED[name]
    model = build()
    classes = [type(module) for module in model.modules()]
    names = [parameter for parameter, _ in model.named_parameters()]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(ValueError, match=message) as caught:
        to_bayesian(model)
    assert "Nothing was changed" in str(caught.value)
    assert [type(module) for module in model.modules()] == classes and not is_bayesian(model)
    assert [parameter for parameter, _ in model.named_parameters()] == names
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert not hasattr(getattr(model, "config", None), "bayesian")


def test_disk_offload_is_refused(tmp_path: Path) -> None:
    model = case("bert").build()
    disk_offload(model, tmp_path, torch.device("cpu"))
    with pytest.raises(ValueError, match="offloaded by accelerate"):
        to_bayesian(model)
    # and the model goes on working
    assert torch.isfinite(model.eval()(**case("bert").inputs()).logits).all()


def test_a_device_map_to_disk_is_refused(tmp_path: Path) -> None:
    case("bert").build().save_pretrained(tmp_path / "model")
    placed = {"bert.embeddings": "disk", "bert.encoder": "cpu", "bert.pooler": "cpu", "classifier": "cpu"}
    model = hf.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "model", device_map=placed, offload_folder=tmp_path / "off"
    )
    with pytest.raises(ValueError, match=r"bert\.embeddings.*offloaded"):
        to_bayesian(model)
    to_bayesian(model, target_modules=["classifier"])  # what is in memory can convert


@pytest.mark.parametrize("build", [with_packed, with_buffer, of_package("bitsandbytes.nn.modules"), flagged])
def test_float_layers_beside_quantised_ones_convert_by_name(build: Callable[[], nn.Module]) -> None:
    """As LoRA's on a quantised base; or all but the quantised, by exclusion."""
    model = to_bayesian(build(), target_modules=["classifier"])
    assert model.classifier.weight_rho.shape == (3, 16)
    if build is not flagged:
        kept = ["bert.pooler.dense", "layer.0.output.dense", "layer.1.output.dense"]
        assert is_bayesian(to_bayesian(build(), exclude_modules=kept))


def test_hooks_that_keep_the_weights_are_no_offloading() -> None:
    inputs = {key: value for key, value in case("bert").inputs().items() if key != "labels"}
    expected = predict(to_bayesian(case("bert").build()), inputs, num_samples=2).log_probs
    placed = dispatch_model(case("bert").build(), {"bert": "cpu", "classifier": "cpu"}, force_hooks=True)
    moved, _ = cpu_offload_with_hook(case("bert").build(), torch.device("cpu"))
    for model in (placed, moved):
        assert torch.equal(predict(to_bayesian(model), inputs, num_samples=2).log_probs, expected)


def test_sharded_parameters_are_refused() -> None:
    """DTensor and DeepSpeed's placeholder, by what tells them."""
    layer = nn.Linear(2, 2)
    layer.weight = nn.Parameter(torch.empty(0))
    layer.weight.ds_shape = (2, 2)  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="weight that is sharded by DeepSpeed"):
        check_plain_weights(nn.Sequential(layer), {"0"}, whole=True)
    kind = type("DTensor", (Tensor,), {})
    layer.weight = nn.Parameter(torch.ones(2, 2).as_subclass(kind))
    with pytest.raises(ValueError, match="no plain tensor but a DTensor. Convert the model before it is sharded"):
        to_bayesian(nn.Sequential(layer))


def test_every_plain_case_is_let_through() -> None:
    for name in ("bert", "gpt2-lm", "t5"):
        model = case(name).build()
        check_plain_weights(model, {module for module, _ in model.named_modules()}, whole=True)
