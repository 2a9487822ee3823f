"""`quantize`: the same draws as the float posterior, whatever the model; and what it leaves alone."""

from __future__ import annotations

import contextlib
import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BartConfig, BartForSequenceClassification

from bayeformers import BayesianTrainer, BayesianTrainingArguments, predict, to_bayesian
from bayeformers import nn as bnn
from bayeformers.posteriors import PointPosterior, VariationalPosterior
from bayeformers.quantization import QuantizedPosterior, quantize
from bayeformers.quantization.layers import QuantizedLayer
from tests.quantization.networks import Named, bert, gpt2, images, masked_lm, mlp, probs, sentences, spread

pytestmark = pytest.mark.filterwarnings("error")


def quantized_layers(posterior: QuantizedPosterior) -> dict[str, QuantizedLayer]:
    return {name: m for name, m in posterior.model.named_modules() if isinstance(m, QuantizedLayer)}


@pytest.mark.parametrize("arithmetic", ["auto", "float"])
@pytest.mark.parametrize("delta", [0.01, 0.05, 0.3])
def test_probabilities_and_spread(delta: float, arithmetic: Any) -> None:
    """Draw by draw: the INT8 error is small against what the draws differ by."""
    model = to_bayesian(mlp(64), delta=delta)
    x, posterior = images(40, 8), VariationalPosterior(model)
    small = quantize(posterior, x, arithmetic=arithmetic)
    p, q = probs(posterior, x), probs(small, x)
    assert (q.mean(0) - p.mean(0)).abs().mean() * 3 < 0.05
    # INT8 arithmetic may add 0.3 of the spread, independent of it: 4.4 % in each of two layers' parts
    assert abs(spread(q) / spread(p) - 1) < 0.05
    deviation = (q - q.mean(0)) - (p - p.mean(0))
    assert spread(deviation) < 0.3 * spread(p)


def test_int8_arithmetic_widens_narrow_draws() -> None:
    """Why "auto" refuses it there: rounding W to max |W| / 127 is of the size of a narrow draw.

    Weights that are uniform within +-m round with an error of m / (127 sqrt(12)); sigma = delta |w| is
    delta m / sqrt(3) in the root mean square. Their ratio at delta = 0.004 is 0.98, which widens the draws by
    sqrt(1 + 0.98^2) = 1.4.
    """
    model = to_bayesian(nn.Sequential(nn.Linear(200, 3)), delta=0.004)
    x, posterior = images(60, 200), VariationalPosterior(model)
    p = probs(posterior, x)
    widened = spread(probs(quantize(posterior, x, arithmetic="int8"), x)) / spread(p)
    kept = quantize(posterior, x)
    assert widened > 1.2
    assert kept.weights[0].arithmetic == "float" and kept.report[0].noise > 0.3
    assert abs(spread(probs(kept, x)) / spread(p) - 1) < 0.02


def test_original_is_untouched() -> None:
    model = to_bayesian(bert(), delta=0.1, freeze=False)
    state, flags = copy.deepcopy(model.state_dict()), [p.requires_grad for p in model.parameters()]
    config, kinds = copy.deepcopy(model.config.to_dict()), [type(m) for m in model.modules()]
    before = probs(VariationalPosterior(model), sentences(), 4)
    small = quantize(model, sentences())
    with torch.no_grad():
        for parameter in small.model.parameters():
            parameter.zero_()
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert flags == [p.requires_grad for p in model.parameters()] and kinds == [type(m) for m in model.modules()]
    assert config == model.config.to_dict()
    assert torch.equal(probs(VariationalPosterior(model), sentences(), 4), before)


def test_memory_of_the_copy_is_its_own_and_small() -> None:
    model = to_bayesian(bert(hidden_size=64, intermediate_size=128), delta=0.1)
    small = quantize(model, sentences())
    own = [*small.model.parameters(), *small.model.buffers(), *small.noise.tensors().values()]
    shared = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert not shared & {tensor.untyped_storage().data_ptr() for tensor in own}
    sizes = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in own}
    assert sum(sizes.values()) < 0.3 * sum(p.nbytes for p in model.parameters())


def test_draw_ends_and_nests() -> None:
    small = quantize(to_bayesian(bert(), delta=0.2), sentences())

    def logits() -> torch.Tensor:
        with torch.no_grad():
            return small.model(**sentences()).logits

    mean = logits()
    with small.draw(0):
        first = logits()
        with small.draw(1):
            assert not torch.equal(logits(), first)
        assert torch.equal(logits(), first)
    with contextlib.suppress(KeyError), small.draw(0):
        raise KeyError
    assert torch.equal(logits(), mean) and not torch.equal(first, mean)
    small.clear_cache()
    with small.draw(0):
        assert torch.equal(logits(), first)


def test_train_mode_changes_nothing() -> None:
    small = quantize(to_bayesian(mlp(), delta=0.2), images(9, 8))
    mean = small.model(images(9, 8))
    assert torch.equal(small.model.train()(images(9, 8)), mean)
    assert all(not parameter.requires_grad for parameter in small.model.parameters())


@pytest.mark.parametrize("cache", [0, 2**30])
def test_cached_draws_and_shared_prefix_give_the_same_numbers(cache: int) -> None:
    """Only the head is random, so all before it runs once; `passes` one by one runs everything."""
    model = to_bayesian(bert(), delta=0.3, target_modules=["classifier"])
    small = quantize(model, sentences())
    small.draw_cache_bytes = cache
    shared = [output.logits for output in small.passes(sentences(), num_samples=4)]
    for index in range(4):
        with small.draw(index), torch.no_grad():
            assert torch.equal(small.model(**sentences()).logits, shared[index])
    assert len(small._cache) == (4 if cache else 0)
    assert torch.equal(probs(small, sentences(), 3), probs(small, sentences(), 3))


def test_tied_weights_are_stored_once() -> None:
    model = to_bayesian(masked_lm(), delta=0.2)
    small = quantize(model, sentences())
    table, decoder = small.model.get_input_embeddings(), small.model.get_output_embeddings()
    assert table.weight_codes is decoder.weight_codes and table.weight_step is decoder.weight_step
    assert next(w for w in small.weights if len(w.owners) > 1).arithmetic == "float"
    with small.draw(0):
        assert torch.equal(table(torch.arange(60)), decoder.weight)
    p, q = probs(VariationalPosterior(model), sentences(), 8), probs(small, sentences(), 8)
    assert (q.mean(0) - p.mean(0)).abs().mean() * 60 < 0.05
    assert abs(spread(q) / spread(p) - 1) < 0.05


def test_generate_under_a_draw() -> None:
    small = quantize(to_bayesian(gpt2(), delta=0.3), {"input_ids": sentences()["input_ids"]})
    assert {type(m).__mro__[1].__name__ for m in quantized_layers(small).values()} >= {"_Product", "QuantizedLayer"}
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    with small.draw(0):
        first = small.model.generate(sentences()["input_ids"], **options)
        assert torch.equal(small.model.generate(sentences()["input_ids"], **options), first)
    assert first.shape == (4, 11)


def test_subclass_that_adds_to_forward() -> None:
    """BART's scaled word embeddings and offset positions hold INT8 below their own forward."""
    sizes = {
        "d_model": 16,
        "encoder_ffn_dim": 16,
        "decoder_ffn_dim": 16,
        "vocab_size": 60,
        "max_position_embeddings": 16,
    }
    heads = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    model = BartForSequenceClassification(BartConfig(**sizes, **heads, scale_embedding=True, eos_token_id=2)).eval()
    inputs = {"input_ids": torch.cat([sentences()["input_ids"], torch.full((4, 1), 2)], dim=1)}
    converted = to_bayesian(copy.deepcopy(model), delta=0.2)
    small = quantize(converted, inputs)
    names = quantized_layers(small)
    assert {"model.shared", "model.encoder.embed_positions"} <= set(names)
    p, q = probs(VariationalPosterior(converted), inputs), probs(small, inputs)
    assert abs(spread(q) / spread(p) - 1) < 0.05
    again = pickle.loads(pickle.dumps(small))
    assert torch.equal(probs(again, inputs, 3), probs(small, inputs, 3))


class Mixed(nn.Module):
    """Layers without INT8 beside layers with it, and a bare Parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 8)
        self.lstm, self.gru = nn.LSTM(8, 8, batch_first=True), nn.GRU(8, 8, batch_first=True)
        self.attention, self.norm = nn.MultiheadAttention(8, 2, batch_first=True), nn.LayerNorm(8)
        self.mixing, self.head = nn.Parameter(torch.randn(8, 8)), nn.Linear(8, 3, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x, _ = self.gru(self.lstm(self.embed(ids))[0])
        x = self.norm(x + self.attention(x, x, x, need_weights=False)[0])
        return self.head((x @ self.mixing).mean(1))


def test_other_layers_stay_float_and_random() -> None:
    model = to_bayesian(Mixed(), delta=0.3, norms=True)
    ids = torch.randint(30, (6, 5))
    small = quantize(model, ids)
    held = {row.name: row.held for row in small.report}
    assert {name for name, how in held.items() if how == "int8"} == {"embed", "head"}
    assert {"", "lstm", "gru", "attention", "norm"} <= set(held)
    assert all(row.reason for row in small.report if row.held == "float")
    random = {name for name in small.noise.names if name.startswith(("lstm", "gru", "attention", "norm", "mixing"))}
    with small.draw(1):
        for name in random:
            expected = dict(VariationalPosterior(model).model.named_parameters())[name]
            assert not torch.equal(small.model.get_parameter(name), expected)
    p, q = probs(VariationalPosterior(model), ids), probs(small, ids)
    assert abs(spread(q) / spread(p) - 1) < 0.05 and (q - p).abs().max() < 0.2 * spread(p) * 10


def test_float_layers_have_exactly_the_float_draw() -> None:
    """With nothing but one excluded layer random, the draws agree bit by bit."""
    model = to_bayesian(Named(nn.LSTM(4, 4)), delta=0.3).eval()
    holder = nn.Sequential(model, nn.Identity())
    with pytest.raises(ValueError, match="no layer for INT8"):
        quantize(VariationalPosterior(holder), images(3, 2, 4))
    converted = to_bayesian(mlp(), delta=0.3)
    small = quantize(converted, images(5, 8), exclude_modules=["0"])
    with small.draw(3), torch.no_grad(), bnn.fixed_draw(converted, 3):
        expected = converted[0].variational("weight").sample()
        assert torch.equal(small.model[0].weight, expected)


def test_hand_built_model() -> None:
    model = nn.Sequential(bnn.Linear(8, 16, delta=0.2), nn.ReLU(), bnn.Linear(16, 3, delta=0.2)).eval()
    p, q = probs(VariationalPosterior(model), images(30, 8)), probs(quantize(model, images(30, 8)), images(30, 8))
    assert abs(spread(q) / spread(p) - 1) < 0.05
    assert isinstance(model[0], bnn.Linear)


def test_multiplicative_scale() -> None:
    model = to_bayesian(mlp(32), delta=0.2, scale="multiplicative")
    p, q = probs(VariationalPosterior(model), images(30, 8)), probs(quantize(model, images(30, 8)), images(30, 8))
    assert abs(spread(q) / spread(p) - 1) < 0.05


def test_point_estimate() -> None:
    model = mlp(32)
    small = quantize(PointPosterior(model), images(40, 8))
    assert small.num_draws == 1 and all(weight.arithmetic == "int8" for weight in small.weights)
    predictive = small.predict(images(40, 8))
    assert predictive.log_probs.shape[0] == 1
    assert (predictive.probs - model(images(40, 8)).softmax(-1)).abs().max() < 0.02
    assert float(predictive.mutual_information.abs().max()) < 1e-6


def test_random_state_and_modes_are_left_alone() -> None:
    model = to_bayesian(bert(), delta=0.1).train()
    state = torch.get_rng_state()
    small = quantize(model, sentences())
    probs(small, sentences(), 3)
    assert torch.equal(torch.get_rng_state(), state) and model.training


def test_copies_are_independent() -> None:
    small = quantize(to_bayesian(mlp(), delta=0.2), images(5, 8))
    expected = probs(small, images(5, 8), 4)
    for copied in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        assert torch.equal(probs(copied, images(5, 8), 4), expected)
        copied.model[0].weight_codes.zero_()
    assert torch.equal(probs(small, images(5, 8), 4), expected)


def test_layer_that_is_too_far_off_stays_float() -> None:
    """One huge weight makes the step of its row so wide that the others vanish; the inputs do not see the huge one."""
    model = mlp(6)
    with torch.no_grad():
        model[0].weight[:, 7] = 1e4
    x = images(20, 8)
    x[:, 7] = 0
    small = quantize(model, x)
    row = next(row for row in small.report if row.name == "0")
    assert row.held == "float" and row.error > 0.05 and "off at the mean" in row.reason
    assert next(row for row in small.report if row.name == "2").held == "int8"
    assert (small.model(x) - model(x)).abs().max() < 0.05


def test_deterministic_layers_before_the_first_random_one_multiply_in_int8() -> None:
    model = to_bayesian(nn.Sequential(*mlp(32), nn.Tanh(), nn.Linear(3, 3)), delta=0.1, target_modules=["2"])
    small = quantize(model, images(30, 8))
    chosen = {weight.name: weight.arithmetic for weight in small.weights}
    assert chosen["0.weight"] == "int8"  # every draw has its rounding, so the draws do not differ by it
    assert chosen["4.weight"] == "float"  # what it rounds differs from draw to draw


def test_report() -> None:
    small = quantize(to_bayesian(bert(), delta=0.1), [sentences(2), sentences(3)])
    text = str(small.report)
    assert "bert.pooler.dense" in text and "no INT8 for LayerNorm" in text and "bytes in weights and scales" in text
    row = next(row for row in small.report if row.name == "bert.pooler.dense")
    assert row.float_bytes == 2 * 4 * 16 * 16 and row.bytes == 2 * 16 * 16 + 3 * 4 * 16
    assert small.report.bytes == sum(row.bytes for row in small.report)
    assert 0 < row.error < 0.05 and 0 < row.noise < 0.3


def test_predict_takes_it() -> None:
    small = quantize(to_bayesian(mlp(), delta=0.1), images(5, 8))
    assert predict(small, images(5, 8), num_samples=3).log_probs.shape == (3, 5, 3)
    assert "2 INT8 weights" in repr(small)


def test_trainer_evaluates_with_it(tmp_path: Path) -> None:
    rows = [{"input_ids": ids, "labels": torch.tensor(n % 3)} for n, ids in enumerate(sentences(6)["input_ids"])]
    model = to_bayesian(bert(), delta=0.1)
    arguments = BayesianTrainingArguments(tmp_path, num_eval_samples=4, report_to="none", use_cpu=True, seed=7)
    found = []
    small = quantize(model, sentences())
    for network, posterior in ((model, None), (small.model, small)):
        trainer = BayesianTrainer(network, arguments, eval_dataset=rows)
        if posterior is not None:
            trainer.posterior = posterior
        found.append(trainer.evaluate())
    assert abs(found[1]["eval_nll"] - found[0]["eval_nll"]) < 0.01
    assert 0.5 < found[1]["eval_mutual_information"] / found[0]["eval_mutual_information"] < 2
