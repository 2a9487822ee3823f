"""Which names stand for one tensor: what is shared decides, not a name's pattern and not the configuration."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import bayeformers
from bayeformers import fixed_draw, kl_divergence, laplace, quantization, to_bayesian, to_deterministic
from bayeformers.nn.base import variational_tensors

SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 16,
}
ENCODERS = ["Bert", "Roberta", "XLMRoberta", "Albert", "DebertaV2", "MPNet", "Electra", "DistilBert"]
IDS = {"input_ids": torch.tensor([[3, 9, 4, 20, 2]])}


def encoder(kind: str) -> nn.Module:
    """A tiny masked language model, its head tied to its table."""
    extra = {"embedding_size": 16} if kind in ("Albert", "Electra") else {}
    if kind == "DistilBert":
        sizes = {"vocab_size": 40, "dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 16}
        return transformers.DistilBertForMaskedLM(transformers.DistilBertConfig(**sizes))
    config = getattr(transformers, f"{kind}Config")(**SIZES, **extra)
    model: nn.Module = getattr(transformers, f"{kind}ForMaskedLM")(config)
    return model


@pytest.mark.parametrize("options", [{}, {"freeze": False}, {"scale": "multiplicative"}], ids=str)
@pytest.mark.parametrize("kind", ENCODERS)
def test_tie_weights_changes_nothing(kind: str, options: dict[str, Any]) -> None:
    """transformers takes "...decoder.bias" as a pattern, which "...decoder.bias_rho" matches too."""
    model = to_bayesian(encoder(kind), **options)
    names = {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}
    kl = kl_divergence(model).item()
    model.tie_weights()
    model.base_model.tie_weights()
    assert {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)} == names
    assert kl_divergence(model).item() == kl


def t5() -> nn.Module:
    """As T5 1.1, Flan-T5 and mT5: a head of its own under a configuration that says tied."""
    sizes = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    config = transformers.T5Config(**sizes, decoder_start_token_id=0, tie_word_embeddings=False)
    return untied(transformers.T5ForConditionalGeneration(config))


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=16)
    return untied(transformers.GPT2LMHeadModel(config))


def llama() -> nn.Module:
    sizes = {**SIZES, "num_key_value_heads": 2}
    return untied(transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, tie_word_embeddings=True)))


def bert() -> nn.Module:
    return untied(encoder("Bert"))


def equal_values() -> nn.Module:
    """A head that was made a tensor of its own and has not moved since."""
    model = llama()
    model.lm_head.weight.data.copy_(model.get_input_embeddings().weight)
    return model


def untied(model: Any) -> nn.Module:
    assert model.config.tie_word_embeddings
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(torch.randn(head.weight.shape) * 0.1)
    return model  # type: ignore[no-any-return]


UNTIED: dict[str, Callable[[], nn.Module]] = {f.__name__: f for f in (t5, gpt2, llama, bert, equal_values)}


def inputs_of(model: nn.Module) -> dict[str, torch.Tensor]:
    is_t5 = model.config.is_encoder_decoder
    return {**IDS, "decoder_input_ids": torch.tensor([[0, 5]])} if is_t5 else IDS


def logits(model: nn.Module, index: int) -> torch.Tensor:
    with torch.no_grad(), fixed_draw(model, index):
        value: torch.Tensor = model.eval()(**inputs_of(model)).logits
    return value


def shaken(model: nn.Module) -> nn.Module:
    """Scales as after a training: no two alike."""
    for tensor in variational_tensors(model):
        tensor.rho.data.add_(torch.rand_like(tensor.rho))
    return model


def forget(folder: Path, *keys: str) -> None:
    """A record as earlier versions wrote it."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for key in keys:
        config["bayesian"].pop(key, None)
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("options", [{}, {"freeze": False}, {"scale": "multiplicative"}], ids=str)
@pytest.mark.parametrize("kind", UNTIED)
def test_an_untied_head_has_its_own_noise_after_a_reload(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = to_bayesian(UNTIED[kind](), **options)
    if options != {"scale": "multiplicative"}:  # there rho starts as one number for all: equal, and not shared
        shaken(model)
    expected, kl = [logits(model, index) for index in range(3)], kl_divergence(model).item()
    names = {tensor.name for tensor in variational_tensors(model)}
    model.save_pretrained(tmp_path)
    again = bayeformers.from_pretrained(tmp_path)
    head, table = again.get_output_embeddings(), again.get_input_embeddings()
    assert head.weight is not table.weight and head.weight_rho is not table.weight_rho
    assert {tensor.name for tensor in variational_tensors(again)} == names
    assert {tensor.spec.name for tensor in variational_tensors(again)} == names
    assert all(torch.equal(logits(again, index), expected[index]) for index in range(3))
    assert kl_divergence(again).item() == kl
    ids = {name: id(p) for name, p in again.named_parameters(remove_duplicate=False)}
    again.tie_weights()
    assert {name: id(p) for name, p in again.named_parameters(remove_duplicate=False)} == ids
    again.save_pretrained(tmp_path / "twice")
    assert torch.equal(logits(bayeformers.from_pretrained(tmp_path / "twice"), 1), expected[1])


@pytest.mark.parametrize("freeze", [True, False])
@pytest.mark.parametrize("kind", ["t5", "gpt2", "bert"])
def test_a_record_without_ties_goes_by_what_is_shared(kind: str, freeze: bool, tmp_path: Path) -> None:
    """Folders of earlier versions: prior centres of the untied head are in the file, the ties are not."""
    model = shaken(to_bayesian(UNTIED[kind](), freeze=freeze))
    model.get_output_embeddings().weight.data.add_(0.01)
    expected, kl = logits(model, 0), kl_divergence(model).item()
    model.save_pretrained(tmp_path)
    forget(tmp_path, "ties", "padding")
    again = bayeformers.from_pretrained(tmp_path)
    assert torch.equal(logits(again, 0), expected) and kl_divergence(again).item() == kl


@pytest.mark.parametrize("kind", ["Bert", "Roberta", "DebertaV2"])
def test_tied_heads_stay_tied(kind: str, tmp_path: Path) -> None:
    model = shaken(to_bayesian(encoder(kind), freeze=False))
    expected, kl = logits(model, 2), kl_divergence(model).item()
    model.save_pretrained(tmp_path)
    for forgotten in ("nothing", "ties"):
        forget(tmp_path, forgotten)
        again = bayeformers.from_pretrained(tmp_path)
        head, table = again.get_output_embeddings(), again.get_input_embeddings()
        assert head.weight is table.weight and head.weight_rho is table.weight_rho
        assert torch.equal(logits(again, 2), expected) and kl_divergence(again).item() == kl


def test_a_tie_that_the_configuration_denies_is_recorded(tmp_path: Path) -> None:
    """A tied model whose configuration was changed: one weight is saved, and two names stand for it again."""
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2))
    model.config.tie_word_embeddings = False
    to_bayesian(model)
    expected = logits(model, 0)
    model.save_pretrained(tmp_path)
    again = bayeformers.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.transformer.wte.weight
    assert torch.equal(logits(again, 0), expected)


@pytest.mark.parametrize("kind", ["t5", "gpt2"])
def test_int8_of_an_untied_head(kind: str, tmp_path: Path) -> None:
    model = to_bayesian(UNTIED[kind](), delta=0.2)
    small = quantization.quantize(model, inputs_of(model))
    small.model.eval()
    with torch.no_grad(), small.draw(1):
        expected = small.model(**inputs_of(model)).logits
    small.save(tmp_path)
    again = quantization.load(tmp_path)
    with torch.no_grad(), again.draw(1):
        assert torch.equal(again.model(**inputs_of(model)).logits, expected)
    with torch.no_grad(), again.draw(2):
        assert not torch.equal(again.model(**inputs_of(model)).logits, expected)


@pytest.mark.parametrize("make", [gpt2, lambda: encoder("Bert")], ids=["untied", "tied"])
def test_undone_ties_are_transformers_own(make: Callable[[], nn.Module]) -> None:
    model = make()
    declared = dict(model.all_tied_weights_keys)
    to_deterministic(to_bayesian(model))
    assert model.all_tied_weights_keys == declared
    assert "get_expanded_tied_weights_keys" not in vars(model)


# -- the padding row ---------------------------------------------------------------------------------------------------


def decoder(**config: Any) -> nn.Module:
    torch.manual_seed(1)
    sizes = {**SIZES, "num_key_value_heads": 2, "tie_word_embeddings": False, "eos_token_id": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**sizes, **config}))


@pytest.mark.parametrize("freeze", [True, False])
def test_a_padding_id_that_was_set_after_loading(freeze: bool, tmp_path: Path) -> None:
    """`config.pad_token_id = eos`: the reload builds the table with a padding row, which had noise."""
    model = decoder()
    model.config.pad_token_id = 2
    shaken(to_bayesian(model, freeze=freeze))
    expected, kl = logits(model, 0), kl_divergence(model).item()
    model.save_pretrained(tmp_path)
    again = bayeformers.from_pretrained(tmp_path)
    assert again.model.embed_tokens.padding_idx is None
    assert torch.equal(logits(again, 0), expected) and kl_divergence(again).item() == kl
    forget(tmp_path, "padding")
    assert bayeformers.from_pretrained(tmp_path).model.embed_tokens.specs["weight"].padding_idx == 2


def test_a_padding_id_that_was_changed_after_loading(tmp_path: Path) -> None:
    model = decoder(pad_token_id=7)
    shaken(to_bayesian(model))
    model.config.pad_token_id = 2
    expected, kl = logits(model, 0), kl_divergence(model).item()
    model.save_pretrained(tmp_path)
    again = bayeformers.from_pretrained(tmp_path)
    assert again.model.embed_tokens.padding_idx == again.model.embed_tokens.specs["weight"].padding_idx == 7
    assert torch.equal(logits(again, 0), expected) and kl_divergence(again).item() == kl


@pytest.mark.parametrize("quantized", [False, True])
def test_a_laplace_posterior_keeps_its_padding_row(quantized: bool, tmp_path: Path) -> None:
    """As above, of the table of a posterior that was fitted to a trained model."""
    model = decoder()
    model.config.pad_token_id = 2
    batch = {**IDS, "labels": IDS["input_ids"]}
    names = ["embed_tokens", "lm_head"]
    posterior = laplace.fit(model, [batch], target_modules=names, prior_precision=10.0, progress=False)
    if quantized:
        posterior = quantization.quantize(posterior, IDS)
        posterior.save(tmp_path)
        again = quantization.load(tmp_path)
    else:
        model.save_pretrained(tmp_path)
        posterior.save(tmp_path)
        again = bayeformers.from_pretrained(tmp_path).posterior
    for one in (posterior, again):
        one.model.eval()
    with torch.no_grad(), posterior.draw(1), again.draw(1):
        expected, found = posterior.model(**IDS).logits, again.model(**IDS).logits
    assert torch.equal(found, expected)


def test_a_tied_end_of_text_has_noise(tmp_path: Path) -> None:
    """pad = eos and one table for words and head: the head predicts that token with weights that are uncertain."""
    model = shaken(to_bayesian(decoder(pad_token_id=2, tie_word_embeddings=True), delta=0.3, freeze=False))
    plain = decoder(pad_token_id=2, tie_word_embeddings=True)
    assert model.lm_head.specs["weight"].padding_idx is None and model.model.embed_tokens.padding_idx == 2
    drawn = drawn_weights(model)
    plain.load_state_dict(drawn, strict=False)
    assert (drawn["lm_head.weight"] - model.lm_head.weight)[2].abs().min() > 0
    torch.testing.assert_close(logits(model, 0), plain.eval()(**IDS).logits)
    model.config.eos_token_id = 5
    expected, kl = logits(model, 0), kl_divergence(model).item()
    model.save_pretrained(tmp_path)
    again = bayeformers.from_pretrained(tmp_path)
    assert torch.equal(logits(again, 0), expected) and kl_divergence(again).item() == kl


def test_gradients_are_torchs_in_a_tied_end_of_text() -> None:
    """Of the lookup of a padding row torch gives none, of the head it does: so here, in means and scales."""
    model = to_bayesian(decoder(pad_token_id=2, tie_word_embeddings=True), delta=0.3, freeze=False).eval()
    plain = decoder(pad_token_id=2, tie_word_embeddings=True).eval()
    plain.load_state_dict(drawn_weights(model), strict=False)
    labels = torch.tensor([[3, 9, 2, 20, 2]])
    with fixed_draw(model, 0):
        model(**IDS, labels=labels).loss.backward()
    plain(**IDS, labels=labels).loss.backward()
    torch.testing.assert_close(model.lm_head.weight.grad, plain.lm_head.weight.grad, rtol=1e-4, atol=1e-7)
    assert model.lm_head.weight_rho.grad[2].abs().min() > 0


def test_a_tied_row_that_only_pads_has_none() -> None:
    for model in (decoder(pad_token_id=0, tie_word_embeddings=True, bos_token_id=1), encoder("Bert")):
        head = to_bayesian(model).get_output_embeddings()
        assert head.specs["weight"].padding_idx == 0


def drawn_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Draw 0, written out: means and scales of the Parameters, noise of the names."""
    state = {name: value.detach().clone() for name, value in model.state_dict().items()}
    for tensor in variational_tensors(model):
        with fixed_draw(model, 0), torch.no_grad():
            drawn = tensor.module.variational(tensor.parameter_name).sample()
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if parameter is tensor.loc:
                state[name] = drawn.clone()
    return state
