"""`export_draws`: folders that PEFT reads are our draws, one by one and in one mixed batch; all of them, or none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from torch import Tensor, nn

from bayeformers import NormalPrior, export_draws, laplace, to_bayesian, to_deterministic
from bayeformers.posteriors import (
    BasePosterior,
    DropoutPosterior,
    EnsemblePosterior,
    PointPosterior,
    TemperaturePosterior,
    VariationalPosterior,
)

peft = pytest.importorskip("peft")
ADAPTER = r".*\.(lora_[AB]\..*|lora_embedding_[AB])"
DECODER: dict[str, Any] = {"task_type": "CAUSAL_LM", "init_lora_weights": False, "r": 3}


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    return hf.LlamaForCausalLM(config).double()


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = hf.GPT2Config(
        vocab_size=48, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0, pad_token_id=0
    )
    return hf.GPT2LMHeadModel(config).double()


def bert() -> nn.Module:
    torch.manual_seed(0)
    config = hf.BertConfig(
        vocab_size=48, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, num_labels=3,
        initializer_range=0.5,  # a query that matters
    )  # fmt: skip
    return hf.BertForSequenceClassification(config).double()


def adapted(make: Callable[[], nn.Module] = llama, target: str = ADAPTER, **options: Any) -> Any:
    """A converted model whose adapter matters: B is not 0."""
    config = peft.LoraConfig(**{**DECODER, "target_modules": ["q_proj", "v_proj"], **options})
    return to_bayesian(plain(make, config), delta=0.4, freeze=False, target_modules=target)


def plain(make: Callable[[], nn.Module], config: Any) -> Any:
    base = make()
    torch.manual_seed(1)
    return peft.get_peft_model(base, config).double()  # PEFT makes float32 adapters


HEAD = r".*\.modules_to_save\.default"
CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "q and v": (llama, {}),
    "rank-stabilised, ranks of their own": (
        llama,
        {"use_rslora": True, "lora_alpha": 5, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 3}},
    ),
    "embedding": (llama, {"target_modules": ["q_proj", "embed_tokens"]}),
    "transposed weights": (gpt2, {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "a head that trains": (bert, {"task_type": "SEQ_CLS", "target_modules": ["query"]}),
    "a head that is drawn": (
        bert,
        {"task_type": "SEQ_CLS", "target_modules": ["query"], "target": f"{ADAPTER}|{HEAD}"},
    ),
}


def logits(posterior: BasePosterior, inputs: dict[str, Tensor], num_draws: int) -> Tensor:
    """(S B, ...), draw-major."""
    return torch.cat([output.logits for output in posterior.passes(inputs, num_samples=num_draws, seed=5)])


def served(folders: list[Path], make: Callable[[], nn.Module]) -> Any:
    """As a server has them: the base, and every folder an adapter of its name."""
    model = peft.PeftModel.from_pretrained(make(), folders[0], adapter_name=folders[0].name)
    for path in folders[1:]:
        model.load_adapter(path, adapter_name=path.name)
    return model.double().eval()


@pytest.mark.filterwarnings("ignore:Could not find a config file")
@pytest.mark.parametrize("case", CASES)
def test_one_mixed_batch_is_our_draws(case: str, tmp_path: Path) -> None:
    make, options = CASES[case]
    model = adapted(make, **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name and not name.endswith("_rho"):
                parameter.add_(0.3)  # trained since: the base's own head is another one
    posterior, inputs = VariationalPosterior(model), {"input_ids": torch.randint(2, 48, (2, 6))}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    folders = export_draws(posterior, 3, tmp_path, seed=5)
    expected = logits(posterior, inputs, 3)
    names = [path.name for path in folders for _ in range(2)]
    batch = {key: value.repeat(3, *[1] * (value.dim() - 1)) for key, value in inputs.items()}
    with torch.no_grad():
        found = served(folders, make)(**batch, adapter_names=names).logits
    assert float((expected[:2] - expected[2:4]).abs().max()) > 1e-3  # draws differ
    # float64, and the files hold float64: products of other shapes round otherwise, far below 1e-9
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def mixtral() -> nn.Module:
    torch.manual_seed(0)
    config = hf.MixtralConfig(
        vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=2, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    config._experts_implementation = "eager"  # the grouped product knows no float64
    return hf.MixtralForCausalLM(config).double()


ONE_BY_ONE: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "DoRA": (llama, {"use_dora": True}),
    "fused experts": (mixtral, {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}),
    "trained tokens": (llama, {"trainable_token_indices": {"embed_tokens": [3, 4]}}),
    "biases of the adapter": (llama, {"lora_bias": True}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", ONE_BY_ONE)
def test_one_adapter_after_the_other(case: str, tmp_path: Path) -> None:
    """Where PEFT has no mixed batch, `set_adapter` is our draw."""
    make, options = ONE_BY_ONE[case]
    model = to_bayesian(plain(make, peft.LoraConfig(**{**DECODER, "target_modules": ["q_proj"], **options})), delta=0.4)
    posterior, inputs = VariationalPosterior(model), {"input_ids": torch.randint(2, 48, (2, 6))}
    folders = export_draws(posterior, 2, tmp_path, seed=5)
    other, found = served(folders, make), []
    for path in folders:
        other.set_adapter(path.name)
        with torch.no_grad():
            found.append(other(**inputs).logits)
    expected = logits(posterior, inputs, 2)
    assert float((expected[:2] - expected[2:]).abs().max()) > 1e-5
    torch.testing.assert_close(torch.cat(found), expected, rtol=0, atol=1e-9)


def test_random_factors_are_multiplied_into_the_matrices(tmp_path: Path) -> None:
    """Of W o (r s^T) a folder holds the product, and no vector, which PEFT would leave out without a word."""
    config = peft.LoraConfig(**{**DECODER, "target_modules": ["q_proj"]})
    model = plain(llama, config)
    names = {n.rpartition(".")[0] for n, _ in model.named_parameters() if "lora_" in n}
    options = {"prior": NormalPrior(std=0.5, centre=1.0), "parametrization": "rank1", "freeze": False}
    model = to_bayesian(model, delta=0.4, target_modules=sorted(names), **options)
    posterior, inputs = VariationalPosterior(model), {"input_ids": torch.randint(2, 48, (2, 6))}
    folders = export_draws(posterior, 2, tmp_path, seed=5)
    expected = logits(posterior, inputs, 2)
    with torch.no_grad():
        rows = [path.name for path in folders for _ in range(2)]
        found = served(folders, llama)(input_ids=inputs["input_ids"].repeat(2, 1), adapter_names=rows).logits
    assert float((expected[:2] - expected[2:]).abs().max()) > 1e-3
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    assert {name.rpartition(".")[2] for name in load_file(folders[0] / "adapter_model.safetensors")} == {"weight"}


def test_files_are_those_of_a_plain_adapter(tmp_path: Path) -> None:
    model = adapted()
    folder = export_draws(model, 1, tmp_path / "draws")[0]
    to_deterministic(model).save_pretrained(tmp_path / "plain")
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    found, expected = (load_file(path / "adapter_model.safetensors") for path in (folder, tmp_path / "plain"))
    assert found.keys() == expected.keys() and all(found[n].shape == expected[n].shape for n in found)
    written, stock = (json.loads((path / "adapter_config.json").read_text()) for path in (folder, tmp_path / "plain"))
    for config in (written, stock):
        config["target_modules"].sort()  # PEFT writes a set, in the order of its hashes
    assert {**written, "init_lora_weights": False} == stock


def test_names_are_those_of_the_values(tmp_path: Path) -> None:
    """A server keeps prefixes by the adapter's name: the same name means the same values, other values another name."""
    model = adapted()
    first = export_draws(model, 3, tmp_path)
    assert len({path.name for path in first}) == 3 and all(path.name.startswith("default-seed0-draw") for path in first)
    kept = (first[1] / "adapter_model.safetensors").read_bytes()
    assert export_draws(model, 2, tmp_path) == first[:2] and len(list(tmp_path.iterdir())) == 3
    assert (first[1] / "adapter_model.safetensors").read_bytes() == kept
    assert not {path.name for path in export_draws(model, 3, tmp_path, seed=1)} & {path.name for path in first}
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if n.endswith("_rho")).add_(0.1)
    assert not {path.name for path in export_draws(model, 3, tmp_path)} & {path.name for path in first}


def test_the_model_and_the_random_state_stay(tmp_path: Path) -> None:
    model = adapted()
    before, state = {n: t.clone() for n, t in model.state_dict().items()}, torch.get_rng_state()
    export_draws(model, 2, tmp_path)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())


# --- Posteriors of other kinds ---------------------------------------------------------------------------------------
def test_an_ensemble_is_its_members(tmp_path: Path) -> None:
    config = peft.LoraConfig(**{**DECODER, "target_modules": ["q_proj"]})
    members = [plain(llama, config) for _ in range(3)]
    for number, member in enumerate(members):
        with torch.no_grad():
            for name, parameter in member.named_parameters():
                if "lora" in name:
                    parameter.mul_(1 + number)
        member.save_pretrained(tmp_path / f"member{number}")
    posterior = EnsemblePosterior(plain(llama, config), [str(tmp_path / f"member{number}") for number in range(3)])
    with pytest.raises(ValueError, match=r"`num_draws` must be at most the posterior's 3, got 4"):
        export_draws(posterior, 4, tmp_path / "draws")
    for number, path in enumerate(export_draws(posterior, 3, tmp_path / "draws")):
        found, expected = (load_file(f / "adapter_model.safetensors") for f in (path, tmp_path / f"member{number}"))
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_laplace_draws(tmp_path: Path) -> None:
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"], init_lora_weights=False)
    model, inputs = plain(bert, config).eval(), {"input_ids": torch.randint(2, 48, (4, 6))}
    for parameter in (p for n, p in model.named_parameters() if "lora" not in n):
        parameter.requires_grad_(False)
    batches = [{**inputs, "labels": torch.tensor([0, 1, 2, 0])}]
    posterior = laplace.fit(model, batches, target_modules=ADAPTER, prior_precision=10.0, progress=False)
    folders = export_draws(posterior, 2, tmp_path, seed=5)
    expected = logits(posterior, inputs, 2)
    with torch.no_grad():
        names = [path.name for path in folders for _ in range(4)]
        found = served(folders, bert)(input_ids=inputs["input_ids"].repeat(2, 1), adapter_names=names).logits
    assert float((expected[:4] - expected[4:]).abs().max()) > 1e-3
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("method", ["to_blob", "to_scalabl", "tfb_posterior", "fit_core"])
def test_posteriors_of_adapters(method: str, tmp_path: Path) -> None:
    """BLoB, ScalaBL, TFB and the r x r core: whatever a draw is of, the folder holds the A and B that it comes to."""
    adapters = pytest.importorskip("bayeformers.adapters")
    model, inputs = plain(llama, peft.LoraConfig(**{**DECODER, "target_modules": ["q_proj"]})), {}
    inputs["input_ids"] = torch.randint(2, 48, (2, 6))
    arguments: dict[str, tuple[Any, ...]] = {
        "tfb_posterior": (0.05,), "fit_core": ([{**inputs, "labels": inputs["input_ids"]}],),
    }  # fmt: skip
    made = getattr(adapters, method)(model, *arguments.get(method, ()))
    posterior = made if isinstance(made, BasePosterior) else VariationalPosterior(made)
    folders = export_draws(posterior, 2, tmp_path, seed=5)
    expected = logits(posterior, inputs, 2)
    with torch.no_grad():
        rows = [path.name for path in folders for _ in range(2)]
        found = served(folders, llama)(input_ids=inputs["input_ids"].repeat(2, 1), adapter_names=rows).logits
    assert float((expected[:2] - expected[2:]).abs().max()) > 1e-6
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


# --- Refusals --------------------------------------------------------------------------------------------------------
def _point() -> BasePosterior:
    return PointPosterior(to_deterministic(adapted()))


def _dropout() -> BasePosterior:
    return DropoutPosterior(to_deterministic(adapted(lora_dropout=0.1)))


def _two_adapters() -> Any:
    model = adapted()
    model.add_adapter("other", peft.LoraConfig(**{**DECODER, "target_modules": ["q_proj"]}))
    model.base_model.set_adapter(["default", "other"])
    return model


def _merged() -> Any:
    config = peft.LoraConfig(**{**DECODER, "target_modules": ["q_proj"]})
    model = plain(llama, config)
    posterior = EnsemblePosterior(model, [model.state_dict(), {n: 2 * t for n, t in model.state_dict().items()}])
    model.merge_adapter()
    return posterior


def _scaled() -> Any:
    model = adapted()
    for layer in (m for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer)):
        layer.scale_layer(2.0)
    return model


def _trained_norm() -> Any:
    model = adapted()
    model.get_submodule("base_model.model.model.norm").weight.requires_grad_(True)
    return model


def _pissa() -> Any:
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], init_lora_weights="pissa")
    return to_bayesian(peft.get_peft_model(llama().float(), config), freeze=False, target_modules=ADAPTER)


def _ia3() -> Any:
    config = peft.IA3Config(task_type="CAUSAL_LM", target_modules=["q_proj"], feedforward_modules=[])
    return to_bayesian(peft.get_peft_model(llama(), config), freeze=False, target_modules=r".*\.q_proj\.ia3_l")


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "no adapter": (lambda: to_bayesian(llama()), "must be of a `peft.PeftModel`"),
    "a Bayesian base": (lambda: adapted(target="all"), "for which a LoRA folder has no place"),
    "a head that is drawn": (
        lambda: adapted(bert, f"{ADAPTER}|.*classifier", task_type=None, target_modules=["query"]),
        r"Draws change .*classifier.* for which a LoRA folder has no place",
    ),
    "trained beside the adapter": (_trained_norm, r"norm\.weight.*train too"),
    "a base that the adapter changed": (_pissa, "`init_lora_weights`='pissa'"),
    "biases of the base": (lambda: adapted(gpt2, target_modules=["c_attn"], bias="all"), "`bias`='all'"),
    "another kind of adapter": (_ia3, "must be of a LoRA adapter, got 'default' of kind IA3"),
    "two active adapters": (_two_adapters, "one active adapter, got"),
    "a merged adapter": (_merged, "is merged into its base"),
    "a scaled adapter": (_scaled, "was scaled to"),
    "a point estimate": (_point, r"`num_draws` must be at most the posterior's 1"),
    "dropout": (_dropout, "DropoutPosterior draws no weights"),
    "a temperature": (
        lambda: TemperaturePosterior(VariationalPosterior(adapted())),
        "TemperaturePosterior predicts by more than an average",
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_is_written(case: str, tmp_path: Path) -> None:
    make, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        export_draws(make(), 2, tmp_path / "draws")
    assert not (tmp_path / "draws").exists()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_draws": 0}, ValueError, "`num_draws`"),
        ({"num_draws": 2.0}, ValueError, "`num_draws`"),
        ({"seed": -1}, ValueError, "`seed`"),
        ({"seed": "0"}, TypeError, "`seed`"),
        ({"format": "gguf"}, ValueError, "`format` .*peft"),
        ({"directory": None}, TypeError, "`directory`"),
        ({"posterior": "adapter"}, TypeError, "Posterior"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], error: type[Exception], message: str, tmp_path: Path) -> None:
    given = {"posterior": adapted(), "num_draws": 2, "directory": tmp_path / "draws", **arguments}
    with pytest.raises(error, match=message):
        export_draws(**given)
    assert not (tmp_path / "draws").exists()


def test_a_broken_draw_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second draw fails: the first is not left behind, and what lay there before stays."""
    posterior = VariationalPosterior(adapted())
    draw = VariationalPosterior.draw

    def broken(self: VariationalPosterior, index: int, seed: int = 0) -> Any:
        if index == 1:
            raise RuntimeError("out of memory")
        return draw(self, index, seed)

    before = export_draws(posterior, 1, tmp_path / "kept", seed=3)
    monkeypatch.setattr(VariationalPosterior, "draw", broken)
    for name in ("kept", "new"):
        with pytest.raises(RuntimeError, match="out of memory"):
            export_draws(posterior, 2, tmp_path / name)
    assert list((tmp_path / "kept").iterdir()) == before and not (tmp_path / "new").exists()


def test_values_that_are_not_finite_are_named(tmp_path: Path) -> None:
    model = adapted()
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if n.endswith("lora_A.default.weight"))[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"Draw 0 of `seed` 0 has NaN or infinite values in .*lora_A"):
        export_draws(model, 2, tmp_path / "draws")
    assert not (tmp_path / "draws").exists()
