"""Monte-Carlo dropout: what a draw keeps against brute force, and on what it may and may not depend."""

from __future__ import annotations

import hashlib
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import bayeformers
from bayeformers.forward import logits_of, output_field, rows
from bayeformers.posteriors import DropoutPosterior
from bayeformers.posteriors.dropout_masks import keeps, mixed, row_words, words
from tests.cases import CASES, case

INPUTS = 6


class Net(nn.Module):
    """Dropout before one linear layer: its output is linear in the mask."""

    def __init__(self, rate: float = 0.5) -> None:
        super().__init__()
        self.drop, self.linear = nn.Dropout(rate), nn.Linear(INPUTS, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.drop(x))


def net(rate: float = 0.5) -> Net:
    torch.manual_seed(0)
    return Net(rate).double().eval()


def drawn(posterior: DropoutPosterior, inputs: Any, count: int = 3, seed: int = 0) -> Tensor:
    return torch.stack([read(output) for output in posterior.passes(inputs, num_samples=count, seed=seed)])


def read(output: Any) -> Tensor:
    return logits_of(output, "logits" if output_field(output, "start_logits") is None else "start_logits")


def text(name: str) -> dict[str, Any]:
    return {key: value for key, value in case(name).inputs().items() if "label" not in key}


# ---------------------------------------------------------------------------------------------------------- the masks


def hashed(value: int) -> int:
    for _ in range(2):
        value = ((value ^ (value >> 16)) * 0x045D9F3B) % 2**32
    return value ^ (value >> 16)


def test_masks_in_plain_integers() -> None:
    """Word by word and element by element, with Python's whole numbers."""
    keys, sizes, rate = ("a", "b"), (3, 5), 0.3
    start = [int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") for key in keys]
    expected = [[hashed((hashed(i + 1) + s) % 2**32) for i in range(n)] for s, n in zip(start, sizes, strict=True)]
    found = [words(key, n, torch.device("cpu")) for key, n in zip(keys, sizes, strict=True)]
    assert [own.tolist() for own in found] == expected
    mask = keeps(rate, found)
    for i, j in itertools.product(*map(range, sizes)):
        assert bool(mask[i, j]) == (hashed(expected[0][i] ^ expected[1][j]) >= round(rate * 2**32))
    assert torch.equal(keeps(rate, [None, found[1]]), keeps(rate, [found[1]]))


def test_masks_are_independent_coins() -> None:
    """Shares kept, and correlations along each axis, of 2^18 elements: standard errors .001 and .002; 5 of them."""
    mask = keeps(0.3, [words(f"axis {axis}", 64, torch.device("cpu")) for axis in range(3)]).double()
    assert abs(mask.mean() - 0.7) < 5 * math.sqrt(0.21 / 2**18)
    for axis in range(3):
        a, b = mask.narrow(axis, 0, 63), mask.narrow(axis, 1, 63)
        assert abs(((a - 0.7) * (b - 0.7)).mean() / 0.21) < 5 / math.sqrt(63 * 64**2)
        assert ((mask.mean(axis) - 0.7).abs() < 6 * math.sqrt(0.21 / 64)).all()


def test_against_all_masks() -> None:
    """Every draw is one of the 2^6 networks of a linear layer; their average, and spread, in closed form."""
    model, x, count = net(0.25), torch.randn(1, INPUTS, dtype=torch.float64), 300
    masks = torch.tensor(list(itertools.product((0.0, 1.0), repeat=INPUTS)), dtype=torch.float64)
    outputs = functional.linear(masks * x / 0.75, model.linear.weight, model.linear.bias)
    found = drawn(DropoutPosterior(model, masks="element"), x, count)[:, 0]
    nearest = torch.cdist(found, outputs.detach(), compute_mode="donot_use_mm_for_euclid_dist").min(1)
    assert nearest.values.max() < 1e-12
    expected = model(x)[0]
    variance = (0.25 / 0.75 * (model.linear.weight * x).square()).sum(1)  # of sum_i w_i x_i m_i / (1 - p)
    assert ((found.mean(0) - expected).abs() < 5 * (variance / count).sqrt()).all()
    fourth = (outputs - expected).pow(4).T @ (0.75 ** masks.sum(1) * 0.25 ** (INPUTS - masks.sum(1)))
    assert ((found.var(0) - variance).abs() < 5 * ((fourth - variance**2) / count).sqrt()).all()


def test_unit_masks_are_one_network() -> None:
    """All rows and positions of a draw are those of the layer with columns of its weight at 0."""
    model, x = net(), torch.randn(4, 7, INPUTS, dtype=torch.float64)
    for output in drawn(DropoutPosterior(model, masks="unit"), x, 4):
        solved = torch.linalg.lstsq(x.reshape(-1, INPUTS), (output - model.linear.bias).reshape(-1, 2)).solution.T
        ratio = solved / model.linear.weight
        assert torch.allclose(ratio, ratio[:1].expand_as(ratio)) and set(
            ratio[0].detach().round(decimals=6).tolist()
        ) <= {0.0, 2.0}


def test_element_masks_differ_between_rows_and_positions() -> None:
    model, x = net(), torch.ones(4, 7, INPUTS, dtype=torch.float64) * torch.arange(1, 5)[:, None, None]
    output = drawn(DropoutPosterior(model, masks="element"), x, 1)[0] - model.linear.bias
    scaled = output / torch.arange(1, 5)[:, None, None]
    assert len({tuple(row) for row in scaled.detach().reshape(-1, 2).round(decimals=6).tolist()}) > 14  # of 28 of 2^6
    twins = drawn(DropoutPosterior(model, masks="element"), torch.ones(2, INPUTS, dtype=torch.float64), 1)[0]
    assert torch.equal(twins[0], twins[1])  # what a row holds decides


@pytest.mark.parametrize(("kind", "rank"), [(nn.Dropout1d, 1), (nn.Dropout2d, 2), (nn.Dropout3d, 3)])
@pytest.mark.parametrize("masks", ["unit", "element"])
def test_channels(kind: type[nn.Module], rank: int, masks: Any) -> None:
    model = nn.Sequential(kind(0.5), nn.Flatten()).eval()
    x = torch.ones(3, 8, *[2] * rank) + torch.arange(3).reshape(-1, *[1] * (rank + 1))
    output = drawn(DropoutPosterior(model, masks=masks), x, 1)[0].reshape(x.shape) / x
    kept = output.flatten(2)
    assert (kept == kept[..., :1]).all() and set(kept.unique().tolist()) == {0.0, 2.0}
    assert (kept == kept[:1]).all() == (masks == "unit")


def test_attention_against_the_formula() -> None:
    """In float64: softmax weights, their dropout and the values, with masks, causally, and with shared heads."""
    torch.manual_seed(0)

    class Attend(nn.Module):
        def __init__(self, **options: Any) -> None:
            super().__init__()
            self.attention_dropout, self.options = 0.4, options

        def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
            rate = self.attention_dropout if self.training else 0.0
            return functional.scaled_dot_product_attention(q, k, v, mask, dropout_p=rate, **self.options)

    q = torch.randn(2, 4, 3, 5, dtype=torch.float64)
    k, v = torch.randn(2, 2, 2, 3, 5, dtype=torch.float64)
    hidden = torch.tensor([[[[True, True, False]]], [[[True, False, False]]]])
    added = torch.zeros(2, 1, 1, 3, dtype=torch.float64).masked_fill(~hidden, -torch.inf)
    repeated = [t.repeat_interleave(2, 1) for t in (k, v)]
    for options, keys in (({}, repeated), ({"is_causal": True, "scale": 0.3}, repeated), ({"enable_gqa": True}, (k, v)),
                          ({"attn_mask": hidden}, repeated), ({"attn_mask": added}, repeated)):  # fmt: skip
        mask = options.pop("attn_mask", None)
        inputs = (q, *keys) if mask is None else (q, *keys, mask)
        found = drawn(DropoutPosterior(Attend(**options).eval(), masks="element"), inputs, 1)[0]
        scores = q @ repeated[0].mT * options.get("scale", 5**-0.5)
        scores = scores.masked_fill(~torch.ones(3, 3).tril().bool(), -torch.inf) if "is_causal" in options else scores
        scores = scores if mask is None else scores + added
        weights, key = scores.softmax(-1), "0/0//1/1"
        axes = [words(f"{key}/{axis}", size, q.device) for axis, size in enumerate(weights.shape)]
        own = row_words(dict(zip("qkvm", inputs, strict=False)))
        assert own is not None
        parts = words(f"{key}/parts", 1, q.device).repeat(2)
        axes[0] = mixed(own ^ words(f"{key}/rows", 1, q.device) ^ parts)
        torch.testing.assert_close(found, (weights * keeps(0.4, axes) / 0.6) @ repeated[1])


def test_multi_head_attention() -> None:
    """torch's own layer, with and without weights returned: the same network."""
    torch.manual_seed(0)

    class Attend(nn.Module):
        def __init__(self, needs: bool) -> None:
            super().__init__()
            self.attention, self.needs = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True), needs
            self.drop = nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            return self.drop(self.attention(x, x, x, need_weights=self.needs)[0])

    one, other = Attend(False).eval(), Attend(True).eval()
    other.load_state_dict(one.state_dict())
    x = torch.randn(3, 4, 8)
    unit = [drawn(DropoutPosterior(model, masks="unit"), x) for model in (one, other)]
    torch.testing.assert_close(*unit)
    found = drawn(DropoutPosterior(one, masks="element"), x)
    assert not torch.allclose(found[0], found[1])
    torch.testing.assert_close(drawn(DropoutPosterior(one, masks="element"), x.flip(0)).flip(1), found)


# ------------------------------------------------------------------------------------------- on what a draw may depend

REFUSED = {"wav2vec2": "LayerDrop", "convnext": "no dropout"}
SEVERAL = {"clip"}  # rows of images and of texts are no rows of one batch
ONLY_ATTENTION = {"clip", "llama", "llama-lm", "mistral-lm", "qwen2", "mixtral-lm"}


@pytest.mark.parametrize("name", [one.name for one in CASES])
def test_every_architecture(name: str) -> None:
    """Rows in another order and alone, draws in views and in the model, the random state and the model untouched."""
    model, inputs = case(name).build(), text(name)
    if name in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[name]):
            DropoutPosterior(model, 0.2, masks="element")
        return
    state = {key: value.clone() for key, value in model.state_dict().items()}
    generator = torch.get_rng_state()
    for masks in ("element", "unit"):
        posterior = DropoutPosterior(model, 0.2, masks=masks)  # type: ignore[arg-type]
        if masks == "unit" and name in ONLY_ATTENTION:
            with pytest.raises(ValueError, match="leaves alone"):
                drawn(posterior, inputs)
            continue
        found = drawn(posterior, inputs)
        assert not torch.equal(found[0], found[1])
        if name not in SEVERAL:
            order = torch.tensor([2, 0, 1])
            again = drawn(posterior, rows(inputs, order, 3))
            torch.testing.assert_close(again, found[:, order], rtol=1e-4, atol=1e-5)
            alone = drawn(posterior, rows(inputs, slice(1, 2), 3))
            if name != "longformer":  # which attends otherwise to a batch without padding
                torch.testing.assert_close(alone, found[:, 1:2], rtol=1e-4, atol=1e-5)
        with posterior.draw(1), torch.no_grad():
            torch.testing.assert_close(read(model(**inputs)), found[1])
    assert torch.equal(generator, torch.get_rng_state())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not any(module.training or "forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize(("masks", "pad"), [("element", (0, 3)), ("unit", (0, 3)), ("unit", (3, 0))])
def test_padding(masks: Any, pad: tuple[int, int]) -> None:
    """On the right; units, which have no position, also on the left."""
    model = case("bert").build()
    ids = torch.randint(4, 60, (2, 5), generator=torch.Generator().manual_seed(0))
    short = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": torch.arange(5).expand(2, 5)}
    long = {key: functional.pad(value, pad) for key, value in short.items()}
    posterior, token = DropoutPosterior(model, 0.2, masks=masks), pad[0]
    for before, after in zip(posterior.passes(short), posterior.passes(long), strict=True):
        assert before.logits.shape == after.logits.shape
        if token == 0:  # the head reads the first token
            torch.testing.assert_close(before.logits, after.logits, rtol=1e-4, atol=1e-5)
    with posterior.draw(2), torch.no_grad():
        hidden = [model(**batch, output_hidden_states=True).hidden_states[-1] for batch in (short, long)]
    torch.testing.assert_close(hidden[0], hidden[1][:, token : token + 5], rtol=1e-4, atol=1e-5)


def test_implementations_of_attention_agree() -> None:
    model, inputs = case("bert").build(), text("bert")
    for masks in ("element", "unit"):
        posterior = DropoutPosterior(model, 0.2, masks=masks)  # type: ignore[arg-type]
        found = []
        for kernel in ("eager", "sdpa"):
            model.set_attn_implementation(kernel)  # type: ignore[operator]
            found.append(drawn(posterior, inputs))
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_rates_and_seeds() -> None:
    """The model's own, one in their place, and other draws for other seeds; a state of training changes nothing."""
    model, x = net(0.5), torch.ones(1, INPUTS, dtype=torch.float64)

    def share(posterior: DropoutPosterior) -> float:
        model.linear.weight.data.fill_(1 / INPUTS)
        model.linear.bias.data.zero_()
        return (drawn(posterior, x, 100)[:, 0, 0]).var().item()

    for rate, used in (
        (None, 0.5),
        (0.1, 0.1),
        (0.8, 0.8),
    ):  # variance of a mean of 6 coins; 100 draws: 4 errors of 15 %
        assert share(DropoutPosterior(model, rate, masks="element")) == pytest.approx(
            used / (1 - used) / INPUTS, rel=0.6
        )
    posterior = DropoutPosterior(model, masks="element")
    assert torch.equal(drawn(posterior, x, 20), drawn(posterior, x, 20))
    assert not torch.equal(drawn(posterior, x, 20), drawn(posterior, x, 20, seed=1))
    with posterior.draw(3, seed=1):
        assert torch.equal(model(x), drawn(posterior, x, 4, seed=1)[3])
    model.train()
    assert torch.equal(drawn(DropoutPosterior(model, masks="element"), x, 20), drawn(posterior, x, 20))
    with posterior.mean():
        assert not model.drop.training
    assert model.training and model.drop.training
    both = nn.Sequential(nn.Dropout(0.0), nn.Linear(2, 2), nn.Dropout(0.2)).eval()  # a rate of 0 stays
    assert torch.equal(both[1](x[:, :2].float()), both(x[:, :2].float()))
    zero = drawn(DropoutPosterior(both, 0.5, masks="element"), torch.ones(1, 2), 50)
    own = both[1](torch.ones(1, 2))
    assert torch.isclose(zero / own, torch.tensor(2.0)).logical_or(zero == 0).all()


def test_the_model_comes_back() -> None:
    """After an error, from threads, and around a draw within a draw; batch norms stay in `eval()`."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2)).train()
    x, posterior = torch.randn(8, 3), DropoutPosterior(model, masks="element")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = drawn(posterior, x)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with pytest.raises(ZeroDivisionError), posterior.draw(0):
        raise ZeroDivisionError
    with posterior.draw(0), torch.no_grad():
        outer = model(x)
        with DropoutPosterior(model, 0.9, masks="element").draw(0):
            assert not torch.equal(model(x), outer)
        assert torch.equal(model(x), outer) and torch.equal(outer, found[0])
    assert all(module.training and "forward" not in vars(module) for module in model.modules())
    from tests.test_threads import at_once

    answers = at_once([
        lambda: drawn(posterior, x),
        lambda: DropoutPosterior(model, 0.9, masks="element").predict(x).probs,
    ])
    assert all(torch.equal(one, found) for one in answers[0])


def test_every_pass_is_run_whole() -> None:
    """Nothing of one draw is taken for another's, though no Parameter differs between them."""
    embedding = nn.Embedding(9, 4)
    model = nn.Sequential(embedding, nn.Dropout(0.5), nn.Flatten(), nn.Linear(8, 2)).eval()
    posterior, ids = DropoutPosterior(model, masks="element"), torch.tensor([[1, 2], [3, 4]])
    for _ in range(3):
        assert len({tuple(draw.flatten().tolist()) for draw in drawn(posterior, ids, 6)}) == 6


# ------------------------------------------------------------------------------------------------------- saved, refused


def test_saved_beside_the_model(tmp_path: Path) -> None:
    model, inputs = case("bert").build(), text("bert")
    model.posterior = DropoutPosterior(model, 0.3, masks="unit")  # type: ignore[assignment]
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    loaded = bayeformers.from_pretrained(tmp_path)
    assert isinstance(loaded.posterior, DropoutPosterior) and repr(loaded.posterior) == repr(model.posterior)
    assert torch.equal(loaded.posterior.predict(inputs).log_probs, model.posterior.predict(inputs).log_probs)
    own = DropoutPosterior(model, masks="element")
    own.save(tmp_path)
    assert torch.equal(drawn(DropoutPosterior.load(tmp_path, model), inputs), drawn(own, inputs))
    model.dropout.p = 0.25  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"other dropout than .*: dropout 0.25 for 0.1 \(1\)"):
        DropoutPosterior.load(tmp_path, model)
    (tmp_path / "dropout.safetensors").write_bytes(b"{}")
    with pytest.raises(ValueError, match="damaged"):
        DropoutPosterior.load(tmp_path, model)


class _Layered(nn.Module):
    layerdrop = 0.1

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x if self.training and torch.rand(()) < self.layerdrop else self.drop(x)


class OwnDropout(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rand_like(x).round()


@pytest.mark.parametrize(
    ("model", "options", "told"),
    [
        ("bert", {}, r"`model` must be a torch\.nn\.Module, got str"),
        (nn.Linear(2, 2), {}, r"`model` \(Linear\) has no dropout"),
        (nn.Sequential(nn.Dropout(0.0)), {}, "dropout of rate 0 only: it was trained without"),
        (net(), {"rate": 0}, r"`rate` must be a finite number > 0, got 0\."),
        (net(), {"rate": -0.1}, r"`rate` must be a finite number > 0, got -0\.1"),
        (net(), {"rate": 1}, "`rate` must be below 1"),
        (net(), {"rate": math.nan}, "`rate` must be a finite number"),
        (net(), {"rate": "0.1"}, "`rate` must be a finite number"),
        (net(), {"rate": True}, "`rate` must be a finite number"),
        (net(), {"masks": "row"}, "`masks` must be one of .*, got 'row'"),
        (nn.Sequential(nn.LSTM(2, 2, 2, dropout=0.1), nn.Dropout(0.1)), {}, "0 .LSTM. drops between its layers"),
        (nn.Sequential(nn.GRU(2, 2, 2, dropout=0.1)), {}, "GRU. drops between its layers"),
        (nn.Sequential(nn.AlphaDropout(0.1)), {}, "alpha dropout"),
        (_Layered(), {}, "LayerDrop"),
        (nn.Sequential(OwnDropout(), nn.Dropout(0.1)), {}, "a dropout of its own kind"),
        (torch.jit.script(nn.Sequential(nn.Dropout(0.1))), {}, "compiled or scripted"),
    ],
)
def test_refused(model: Any, options: dict[str, Any], told: str) -> None:
    with pytest.raises((TypeError, ValueError), match=told):
        DropoutPosterior(model, **options)


def test_refused_when_used() -> None:
    model, posterior = net(), DropoutPosterior(net(), masks="element")
    for index, seed in ((-1, 0), (0, -1), (0.5, 0)):
        with pytest.raises((TypeError, ValueError), match="`(index|seed)`"), posterior.draw(index, seed):  # type: ignore[arg-type]
            pass
    with pytest.raises(ValueError, match="Gaussian posterior"):
        posterior.predict(torch.ones(1, INPUTS, dtype=torch.float64), method="glm")
    with pytest.raises(ValueError, match="empty"):
        posterior.predict(torch.ones(0, INPUTS, dtype=torch.float64))
    unused = nn.Sequential(nn.Linear(2, 2))
    unused.drop = nn.Identity()
    unused.drop.other = nn.Dropout(0.1)
    with pytest.raises(ValueError, match="dropped nothing"):
        DropoutPosterior(unused, masks="element").predict(torch.ones(1, 2))
    bert, inputs = case("bert").build(), text("bert")
    for module in bert.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="by numbers of its own"):
        DropoutPosterior(bert, masks="element").predict(inputs)
    assert model.drop.p == 0.5
