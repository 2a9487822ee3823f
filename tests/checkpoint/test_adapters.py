"""Folders of Bayesian adapters: base, adapter and posterior come back bit for bit, and PEFT reads the mean."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from torch import Tensor, nn

import bayeformers
from bayeformers import fixed_draw, kl_divergence, laplace, to_bayesian
from bayeformers.checkpoint.adapters import CONFIG, NOTICE, TENSORS
from bayeformers.nn.base import variational_tensors

peft = pytest.importorskip("peft")
IDS = torch.tensor([[5, 6, 7, 8]])
SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32
}  # fmt: skip
BASES: dict[str, Callable[[], Any]] = {
    "bert": lambda: hf.BertForSequenceClassification(hf.BertConfig(**SIZES)),
    "gpt2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2)
    ),
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, num_key_value_heads=1)),
    "t5": lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(
            vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0
        )
    ),
}  # fmt: skip
TASKS = {"bert": "SEQ_CLS", "gpt2": "CAUSAL_LM", "llama": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM"}
TARGETS = {"bert": ["query", "value"], "gpt2": ["c_attn"], "llama": ["q_proj", "v_proj"], "t5": ["q", "v"]}


def config(kind: str, base: str) -> Any:
    tuned = {"target_modules": TARGETS[base], "task_type": TASKS[base]}
    prompt = {"num_virtual_tokens": 2, "task_type": TASKS[base]}
    return {
        "lora": lambda: peft.LoraConfig(r=2, **tuned),
        "rslora": lambda: peft.LoraConfig(r=2, use_rslora=True, **tuned),
        "dora": lambda: peft.LoraConfig(r=2, use_dora=True, **tuned),
        "embedding": lambda: peft.LoraConfig(r=2, **tuned | {"target_modules": ["word_embeddings"]}),
        "tokens": lambda: peft.LoraConfig(r=2, trainable_token_indices={"word_embeddings": [5, 6]}, **tuned),
        "ia3": lambda: peft.IA3Config(feedforward_modules=[], **tuned),
        "adalora": lambda: peft.AdaLoraConfig(init_r=3, target_r=2, total_step=9, tinit=1, tfinal=1, **tuned),
        "loha": lambda: peft.LoHaConfig(r=2, **tuned),
        "lokr": lambda: peft.LoKrConfig(r=2, **tuned),
        "oft": lambda: peft.OFTConfig(oft_block_size=4, **tuned),
        "vera": lambda: peft.VeraConfig(r=2, **tuned),
        "vblora": lambda: peft.VBLoRAConfig(r=2, num_vectors=16, vector_length=4, topk=2, **tuned),
        "prompt": lambda: peft.PromptTuningConfig(**prompt),
        "prefix": lambda: peft.PrefixTuningConfig(**prompt),
        "projected": lambda: peft.PrefixTuningConfig(prefix_projection=True, encoder_hidden_size=8, **prompt),
        "p-tuning": lambda: peft.PromptEncoderConfig(encoder_hidden_size=8, **prompt),
    }[kind]()


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {}
    for name, build in BASES.items():
        torch.manual_seed(0)
        folders[name] = tmp_path_factory.mktemp(name)
        build().save_pretrained(folders[name])
    return folders


def loaded(folder: Path, base: str = "bert") -> Any:
    return type(BASES[base]()).from_pretrained(folder)


def moved(model: Any) -> Any:
    """As after training: everything that trains is elsewhere."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.eval()


def adapted(folder: Path, kind: str = "lora", base: str = "bert", **options: Any) -> Any:
    return moved(to_bayesian(peft.get_peft_model(loaded(folder, base), config(kind, base)), **options))


@torch.no_grad()
def logits(model: Any, index: int | None = None) -> Tensor:
    is_pair = model.config.is_encoder_decoder
    inputs = {"input_ids": IDS} | ({"decoder_input_ids": torch.tensor([[0, 3, 4]])} if is_pair else {})
    if index is None:
        return model(**inputs).logits
    with fixed_draw(model, index):
        return model(**inputs).logits


def assert_same(one: Any, other: Any) -> None:
    """Every tensor but PEFT's unused original of a head, which no file holds; flags, draws, KL."""
    a, b = one.state_dict(), other.state_dict()
    assert a.keys() == b.keys()
    assert not [name for name in a if not torch.equal(a[name], b[name]) and "original_module" not in name]
    flags = [{name: p.requires_grad for name, p in model.named_parameters()} for model in (one, other)]
    assert flags[0] == flags[1]
    assert torch.equal(logits(one, 3), logits(other, 3)) and torch.equal(logits(one), logits(other))
    assert torch.equal(kl_divergence(one), kl_divergence(other))


OF_BERT = [
    "lora", "rslora", "dora", "embedding", "tokens", "ia3", "adalora", "loha", "lokr", "oft", "vera", "vblora",
    "prompt", "prefix", "projected", "p-tuning",
]  # fmt: skip
OF_OTHERS = ["lora", "dora", "ia3", "adalora", "prompt", "prefix"]


@pytest.mark.parametrize(
    ("base", "kind"), [*(("bert", k) for k in OF_BERT), *((b, k) for b in ("gpt2", "llama", "t5") for k in OF_OTHERS)]
)
def test_reload_bit_for_bit(base: str, kind: str, bases: dict[str, Path], tmp_path: Path) -> None:
    model = adapted(bases[base], kind, base)
    model.save_pretrained(tmp_path)
    assert_same(model, bayeformers.from_pretrained(tmp_path))
    in_pefts_file = load_file(tmp_path / "adapter_model.safetensors")
    assert in_pefts_file and not [name for name in in_pefts_file if name.endswith(("_rho", "_prior_centre"))]


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["lora_A"]},
        {"target_modules": ["lora_B"]},
        {"target_modules": "all"},
        {"freeze": True},
        {"scale": "multiplicative"},
        {"target_modules": ["lora_A", "lora_B", "modules_to_save.default"]},
    ],
)
def test_reload_of_other_conversions(options: dict[str, Any], bases: dict[str, Path], tmp_path: Path) -> None:
    model = adapted(bases["bert"], **options)
    model.save_pretrained(tmp_path)
    assert_same(model, bayeformers.from_pretrained(tmp_path))


@pytest.mark.parametrize("target", ["all", ["query", "value"]])
def test_reload_over_a_bayesian_base(target: Any, bases: dict[str, Path], tmp_path: Path) -> None:
    base = to_bayesian(loaded(bases["bert"]), target_modules=target, freeze=False)
    model = moved(peft.get_peft_model(base, config("lora", "bert")))
    model.save_pretrained(tmp_path)
    assert_same(model, bayeformers.from_pretrained(tmp_path))


def test_several_adapters_together_and_one_alone(bases: dict[str, Path], tmp_path: Path) -> None:
    model = peft.get_peft_model(loaded(bases["bert"]), config("lora", "bert"))
    model.add_adapter("b", config("lora", "bert"))
    moved(to_bayesian(model, target_modules=r".*lora_[AB]\.(default|b)"))
    model.set_adapter("b")
    moved(model).save_pretrained(tmp_path)
    assert_same(model, bayeformers.from_pretrained(tmp_path))
    alone = bayeformers.from_pretrained(tmp_path / "b")
    assert alone.active_adapter == "b" and len(list(variational_tensors(alone))) == 4
    assert torch.equal(logits(alone, 3), logits(model, 3))


def test_several_active_adapters(bases: dict[str, Path], tmp_path: Path) -> None:
    model = peft.get_peft_model(loaded(bases["llama"], "llama"), config("lora", "llama"))
    model.add_adapter("b", config("lora", "llama"))
    model.base_model.set_adapter(["default", "b"])
    moved(to_bayesian(model)).save_pretrained(tmp_path)
    reloaded = bayeformers.from_pretrained(tmp_path)
    assert reloaded.active_adapters == ["default", "b"]
    assert_same(model, reloaded)


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_an_adapter_of_embeddings_whose_file_has_the_base_too(
    target: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    tuned = peft.LoraConfig(r=2, target_modules=["q_proj", target], task_type="CAUSAL_LM")
    model = moved(to_bayesian(peft.get_peft_model(loaded(bases["llama"], "llama"), tuned)))
    model.save_pretrained(tmp_path)
    assert any("base_layer" in name for name in load_file(tmp_path / "adapter_model.safetensors"))
    assert_same(model, bayeformers.from_pretrained(tmp_path))


def test_plain_peft_gets_the_mean_and_one_line_that_names_the_loader(bases: dict[str, Path], tmp_path: Path) -> None:
    """In a process that never imports bayeformers."""
    model = adapted(bases["bert"])
    model.save_pretrained(tmp_path / "adapter")
    code = (
        "import peft, torch, transformers as hf\n"
        f"base = hf.BertForSequenceClassification.from_pretrained({str(bases['bert'])!r})\n"
        f"model = peft.PeftModel.from_pretrained(base, {str(tmp_path / 'adapter')!r}).eval()\n"
        f"torch.save(model(torch.tensor({IDS.tolist()})).logits.detach(), {str(tmp_path / 'logits.pt')!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(NOTICE) == 1 and "missing" not in done.stderr.lower().replace("missing keys", "")
    assert torch.equal(torch.load(tmp_path / "logits.pt"), logits(model))


@pytest.mark.parametrize("by_attribute", [True, False])
def test_a_laplace_posterior_beside_an_adapter(by_attribute: bool, bases: dict[str, Path], tmp_path: Path) -> None:
    model = moved(peft.get_peft_model(loaded(bases["bert"]), config("lora", "bert")))
    data = [{"input_ids": torch.tensor([5, 6, 7, 8 + i]), "labels": torch.tensor(i % 2)} for i in range(4)]
    batches = [{key: value[None] for key, value in item.items()} for item in data]
    posterior = laplace.fit(model, batches, target_modules=["lora_A.default", "lora_B.default"])
    if by_attribute:
        model.posterior = posterior
        bayeformers.checkpoint.adapters.wrap_peft()
    else:
        posterior.save(tmp_path)
    model.save_pretrained(tmp_path)
    again = bayeformers.from_pretrained(tmp_path)
    with posterior.draw(2), again.posterior.draw(2):
        assert torch.equal(logits(model), logits(again))
    assert torch.equal(
        posterior.predict({"input_ids": IDS}).mean_log_probs, again.posterior.predict({"input_ids": IDS}).mean_log_probs
    )


# ---------------------------------------------------------------------------------------------------------- bad folders


@pytest.fixture(scope="module")
def folder(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("adapter")
    adapted(bases["bert"]).save_pretrained(path)
    return path


def changed(folder: Path, copy: Path, name: str, change: Callable[[dict[str, Any]], None]) -> Path:
    copied(folder, copy)
    content = json.loads((copy / name).read_text())
    change(content)
    (copy / name).write_text(json.dumps(content))
    return copy


def copied(folder: Path, copy: Path) -> Path:
    copy.mkdir(exist_ok=True)
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


@pytest.mark.parametrize(
    ("name", "match"),
    [
        (TENSORS, f"lacks '{TENSORS}'"),
        (CONFIG, "PEFT adapter without a posterior"),
        ("adapter_model.safetensors", "lacks the weights of its adapter 'default'"),
        ("adapter_config.json", "lacks 'adapter_config.json'"),
    ],
)
def test_a_file_is_missing(name: str, match: str, folder: Path, tmp_path: Path) -> None:
    copy = copied(folder, tmp_path / "copy")
    (copy / name).unlink()
    with pytest.raises(ValueError, match=match):
        bayeformers.from_pretrained(copy)


@pytest.mark.parametrize("name", [CONFIG, "adapter_config.json", TENSORS, "adapter_model.safetensors"])
def test_a_file_is_damaged(name: str, folder: Path, tmp_path: Path) -> None:
    copy = copied(folder, tmp_path / "copy")
    content = (copy / name).read_bytes()
    (copy / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="damaged"):
        bayeformers.from_pretrained(copy)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda c: c.update(version=99), "version 99"),
        (lambda c: c.update(adapters={}), "names no adapters"),
        (lambda c: c["bayesian"].update(modules={"no.such": "Linear"}), "no such module"),
        (lambda c: c["bayesian"].update(prior={"type": "none"}), "none"),
        (lambda c: c["bayesian"]["modules"].popitem(), "which are not of this model"),
        (lambda c: c["base"].update({"class": "BertModel"}), "made on another BertModel"),
    ],
)
def test_the_record_is_of_another_model(
    change: Callable[[dict[str, Any]], None], match: str, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=match):
        bayeformers.from_pretrained(changed(folder, tmp_path / "copy", CONFIG, change))


def test_the_base_is_missing_or_another_one(folder: Path, bases: dict[str, Path], tmp_path: Path) -> None:
    name, key = "adapter_config.json", "base_model_name_or_path"
    gone = changed(folder, tmp_path / "gone", name, lambda c: c.update({key: "/no/x"}))
    with pytest.raises(ValueError, match=r"base '/no/x' could not be loaded: give `base_model`"):
        bayeformers.from_pretrained(gone)
    none = changed(folder, tmp_path / "none", name, lambda c: c.update({key: None}))
    with pytest.raises(ValueError, match="`base_model` is needed"):
        bayeformers.from_pretrained(none)
    assert torch.equal(
        logits(bayeformers.from_pretrained(gone, base_model=loaded(bases["bert"])), 3),
        logits(bayeformers.from_pretrained(gone, base_model=str(bases["bert"])), 3),
    )
    with pytest.raises(ValueError, match="made on a BertForSequenceClassification, but `base_model` is a Llama"):
        bayeformers.from_pretrained(folder, base_model=loaded(bases["llama"], "llama"))
    wider = hf.BertForSequenceClassification(hf.BertConfig(**SIZES | {"intermediate_size": 48}))
    with pytest.raises(ValueError, match="have other sizes"):
        bayeformers.from_pretrained(folder, base_model=wider)
    with pytest.raises(ValueError, match="has other values"):
        bayeformers.from_pretrained(folder, base_model=BASES["bert"]())
    with pytest.raises(ValueError, match=r"nothing to load with \['dtype'\]"):
        bayeformers.from_pretrained(folder, base_model=loaded(bases["bert"]), dtype=torch.float64)


def test_a_base_in_bfloat16_holds_the_heads_rounded(bases: dict[str, Path], tmp_path: Path) -> None:
    """Of a head that the adapter saved in float32, which PEFT writes into the base's own module."""
    model = moved(adapted(bases["bert"]))
    model.save_pretrained(tmp_path)
    again = bayeformers.from_pretrained(tmp_path, dtype=torch.bfloat16)
    given, held = model.state_dict(), again.state_dict()
    heads = [name for name in held if "modules_to_save" in name]
    assert heads and all(held[name].dtype is torch.bfloat16 for name in heads)
    assert all(torch.equal(held[name], given[name].bfloat16()) for name in heads)


def test_scales_that_are_not_finite(folder: Path, tmp_path: Path) -> None:
    from bayeformers.storage import read, write

    copy = copied(folder, tmp_path / "copy")
    tensors, meta = read(copy / TENSORS, kind="bayesian adapter")
    next(iter(tensors.values())).fill_(float("nan"))
    write(copy / TENSORS, tensors, meta, kind="bayesian adapter")
    with pytest.raises(ValueError, match="NaN or infinite"):
        bayeformers.from_pretrained(copy)


def test_a_head_that_nobody_saved_is_refused(tmp_path: Path) -> None:
    """A base without the head, and an adapter that does not save it: it would be random."""
    torch.manual_seed(0)
    hf.BertModel(hf.BertConfig(**SIZES)).save_pretrained(tmp_path / "base")
    base = hf.BertForSequenceClassification.from_pretrained(tmp_path / "base")
    model: nn.Module = to_bayesian(peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["query"])))
    model.save_pretrained(tmp_path / "adapter")  # type: ignore[operator]
    with pytest.raises(ValueError, match=r"base lacks \['classifier"):
        bayeformers.from_pretrained(tmp_path / "adapter")


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
def test_over_a_quantised_base(bits: int, bases: dict[str, Path], tmp_path: Path) -> None:
    """The adapter's scales start from the unpacked weight; it comes back over the packed base bit for bit."""
    pytest.importorskip("bitsandbytes")
    packed = hf.BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    base = hf.LlamaForCausalLM.from_pretrained(bases["llama"], quantization_config=packed)
    model = moved(to_bayesian(peft.get_peft_model(base, config("lora", "llama"))))
    model.save_pretrained(tmp_path)
    again = bayeformers.from_pretrained(tmp_path, quantization_config=packed)
    assert torch.equal(logits(model, 3), logits(again, 3)) and torch.equal(kl_divergence(model), kl_divergence(again))
    floors = bayeformers.bayesian_config(model).floors_of_zeros
    plain = to_bayesian(peft.get_peft_model(loaded(bases["llama"], "llama"), config("lora", "llama")))
    for name, floor in bayeformers.bayesian_config(plain).floors_of_zeros.items():
        assert floors[name] == pytest.approx(floor, rel=0.3)  # another A of 32 random numbers: 12.5 %, and the packing
