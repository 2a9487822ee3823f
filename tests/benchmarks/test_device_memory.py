"""Formulas of memory: byte for byte what two processes hold, within 1 % the peak of a training step."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft")

from torch.profiler import ProfilerActivity, profile
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

import bayeformers
from bayeformers import BayesianTrainer, BayesianTrainingArguments
from benchmarks.device_memory import measure
from benchmarks.device_memory.__main__ import main
from benchmarks.device_memory.formulas import (
    ENGINES,
    SIZES,
    Decoder,
    Lora,
    Weight,
    activations,
    draws,
    full_weights,
    held,
    laplace,
    lora_weights,
    loss_gradient,
    training,
)

OTHER = Decoder(vocabulary=101, hidden=64, intermediate=96, layers=3, heads=4, kv_heads=4, tied=True)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return measure.measured(tmp_path_factory.mktemp("two_processes"))


# --- What is held ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_two_processes_hold_the_bytes_of_the_formula(engine: Any, ranks: list[dict[str, Any]]) -> None:
    for rank, found in enumerate(ranks):
        formula = asdict(measure.expected(engine, 2, rank))
        assert {name: found[engine][name] for name in formula} == formula
    assert engine == "ddp" or ranks[0][engine] != ranks[1][engine]  # an odd number of rows


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_pieces_add_up(engine: Any, world: int) -> None:
    """What is sharded is there once in all; the rest once on each device."""
    weights = [Weight((5, 3), 4, True), Weight((7,), 2, False), Weight((), 4, True)]
    alone = held(weights, engine, 1)
    parts = [held(weights, engine, world, rank) for rank in range(world)]
    copies = {"ddp": (world, world), "zero1": (world, world), "zero2": (world, 1), "zero3": (1, 1), "fsdp2": (1, 1)}
    assert sum(part.parameters for part in parts) == copies[engine][0] * alone.parameters
    assert sum(part.gradients for part in parts) == copies[engine][1] * alone.gradients
    steps = 2 * 4  # a count of steps per trained tensor
    moments = sum(part.optimizer - steps for part in parts)
    assert moments == (world if engine == "ddp" else 1) * (alone.optimizer - steps)
    assert max(part.total for part in parts) == parts[0].total


def test_deepspeed_keeps_half_precision_parameters_once_more() -> None:
    """Rajbhandari et al. 2020: 2 + 2 + 12 bytes per parameter."""
    sums = held([Weight((10, 10), 2, True)], "zero1", 1)
    assert (sums.parameters, sums.gradients, sums.optimizer) == (200, 200, 1200 + 4)


# --- Sizes -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", list(SIZES))
def test_decoders_have_the_published_number_of_parameters(name: str) -> None:
    size = SIZES[name]
    config = LlamaConfig(
        vocab_size=size.vocabulary, hidden_size=size.hidden, intermediate_size=size.intermediate,
        num_hidden_layers=size.layers, num_attention_heads=size.heads, num_key_value_heads=size.kv_heads,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    shapes = sorted(tuple(parameter.shape) for parameter in model.parameters())
    assert sorted(size.shapes) == shapes
    assert Decoder.from_config({**config.to_dict(), "tie_word_embeddings": False}) == size
    assert (
        sum(parameter.numel() for parameter in model.parameters()) == {"7B": 6_738_415_616, "70B": 68_976_648_192}[name]
    )


@pytest.mark.parametrize("both", [True, False])
def test_an_adapter_has_the_weights_of_the_formula(both: bool) -> None:
    lora = Lora(3, ("q_proj", "v_proj", "down_proj"), both)
    found = [
        Weight(tuple(parameter.shape), parameter.element_size(), parameter.requires_grad)
        for parameter in measure.tiny(OTHER, lora, itemsize=2).parameters()
    ]
    assert sorted(map(str, found)) == sorted(map(str, lora_weights(OTHER, lora, itemsize=2)))


@pytest.mark.parametrize("trains_means", [True, False])
def test_a_whole_model_has_the_weights_of_the_formula(trains_means: bool) -> None:
    config = LlamaConfig(
        vocab_size=67, hidden_size=48, intermediate_size=84, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    model = bayeformers.to_bayesian(LlamaForCausalLM(config), freeze=not trains_means)
    found = [Weight(tuple(p.shape), 4, p.requires_grad and p.dim() == 2) for p in model.parameters()]
    expected = [
        Weight(one.shape, 4, one.trained and len(one.shape) == 2) for one in full_weights(measure.TINY, 4, trains_means)
    ]
    assert sorted(map(str, found)) == sorted(map(str, expected))


# --- Activations -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("decoder", [measure.TINY, OTHER], ids=["grouped", "tied"])
@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("q_proj",)], ids=["qv", "q"])
def test_a_forward_keeps_the_bytes_of_the_formula(decoder: Decoder, itemsize: int, targets: tuple[str, ...]) -> None:
    """What is Bayesian costs its draws besides, at most so many bytes as the other formula says."""
    lora = Lora(5, targets)
    bayesian = measure.tiny(decoder, lora, itemsize)
    _, kept = measure.kept(bayesian, measure.tokens(decoder))
    _, plain = measure.kept(bayeformers.to_deterministic(bayesian).train(), measure.tokens(decoder))
    formula = activations(decoder, measure.BATCH, measure.LENGTH, lora, itemsize)
    assert plain == pytest.approx(formula, rel=0.005)
    random = decoder.layers * sum(a * b for a, b in lora.bayesian(decoder))
    assert 0 < kept - plain <= draws(random)


def peak(step: Any, file: Path) -> int:
    """The most bytes that were allocated at once and are not there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    profiler.export_chrome_trace(str(file))
    events = [event for event in json.loads(file.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        now += event["args"]["Bytes"]
        most = max(most, now)
    return most


@pytest.mark.parametrize("itemsize", [2, 4])
def test_a_step_of_the_trainer_peaks_at_the_formula(itemsize: int, tmp_path: Path) -> None:
    """With a vocabulary that is large beside a layer, as those of language models are."""
    decoder = Decoder(4001, 48, 84, 2, 4, 2)
    inputs = measure.tokens(decoder)
    rows = [{name: value[i] for name, value in inputs.items()} for i in range(measure.BATCH)]
    args = BayesianTrainingArguments(
        str(tmp_path), use_cpu=True, per_device_train_batch_size=measure.BATCH, max_steps=2, disable_tqdm=True,
        report_to="none", save_strategy="no", logging_strategy="no",
    )  # fmt: skip
    trainer = BayesianTrainer(model=measure.tiny(decoder, measure.LORA, itemsize), args=args, train_dataset=rows)
    step, peaks = trainer.training_step, []

    def watched(*arguments: Any, **options: Any) -> Any:
        found: list[Any] = []
        peaks.append(peak(lambda: found.append(step(*arguments, **options)), tmp_path / "trace.json"))
        return found[0]

    trainer.training_step = watched  # type: ignore[method-assign]
    trainer.train()
    size = (measure.BATCH, measure.LENGTH)
    formula = activations(decoder, *size, measure.LORA, itemsize) + loss_gradient(decoder, *size, itemsize)
    assert peaks[-1] == pytest.approx(formula, rel=0.01)


def test_checkpointing_keeps_less() -> None:
    size = SIZES["7B"]
    plain, less = (activations(size, 1, 2048, Lora(), checkpointing=on) for on in (False, True))
    assert less == plain - 31 * (plain - activations(Decoder(32_000, 4096, 11_008, 31, 32, 32), 1, 2048, Lora())) + (
        32 * 2048 * 4096 * 2
    )


# --- Laplace, and the command ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("curvature", ["kfac", "ekfac", "diagonal", "dense"])
def test_a_fitted_head_has_the_bytes_of_the_formula(curvature: Any) -> None:
    config = BertConfig(
        vocab_size=30, hidden_size=12, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=5
    )
    torch.manual_seed(0)
    model = BertForSequenceClassification(config).eval()
    batch = {"input_ids": torch.randint(30, (4, 6)), "labels": torch.tensor([0, 1, 2, 4])}
    options = {"subset": "last_layer", "prior_precision": 1.0, "progress": False, "curvature": curvature}
    (eigen,) = bayeformers.laplace.fit(model, [batch], **options).layers.values()
    tensors = [eigen.left, eigen.right, eigen.eigenvalues, *(eigen.factors or ())]
    if curvature == "dense":  # its one block has no second factor, and its factors' eigenvalues are the block's
        tensors = [eigen.right, eigen.eigenvalues]
    found = sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)
    assert found == laplace(5, 13, curvature)


def test_the_command_prints_tables(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    main(["--devices", "4"])
    assert "70B, 4 devices, 1 x 2048 tokens each, GiB on one device" in capsys.readouterr().out
    settings = {"vocab_size": 67, "hidden_size": 48, "intermediate_size": 84, "num_hidden_layers": 2,
                "num_attention_heads": 4}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(settings))
    main(["--config", str(tmp_path / "config.json"), "--targets", "q_proj,o_proj"])
    assert capsys.readouterr().out.count("LoRA r = 16") == 6


def test_numbers_of_the_guide() -> None:
    """docs/guides/devices.md has them, to two places."""
    text = (Path(__file__).parents[2] / "docs" / "guides" / "devices.md").read_text(encoding="utf-8")
    for name, decoder in SIZES.items():
        for engine, checkpointing in (("ddp", False), ("fsdp2", False), ("fsdp2", True)):
            total = training(decoder, Lora(), engine, 8, checkpointing=checkpointing).total / 2**30
            assert f"{total:.1f}" in text, (name, engine, checkpointing)
