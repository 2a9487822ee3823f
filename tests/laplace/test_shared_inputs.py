"""Layers that run on something that all examples share: curvature and predictions do not depend on the batch size."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from bayeformers.laplace import LaplacePosterior, example_gradients, fit
from tests.laplace.networks import QUIET, batches, built, classes, reader, text
from tests.laplace.reference import Inputs, close, ggn, integers, logits_in, normal, part

SIZES = (1, 2, 3, 6)
COUNT = 6


class Relative(nn.Module):
    """`query` reads the hidden states and the positions (1, R, d), as DeBERTa's does; R is a batch size too."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
        self.positions = nn.Parameter(normal(1, 3, 4, seed=5))

    def forward(self, x: Tensor) -> Tensor:
        places = torch.tanh(self.query(self.positions)).repeat(len(x), 1, 1)
        attended = (torch.tanh(self.query(x)) @ places.mT).softmax(-1) @ places
        return self.head(torch.tanh(attended + x).mean(1))  # type: ignore[no-any-return]


class Queries(nn.Module):
    """`read` and `again` run on queries without a batch axis, (Q, d) or (Q, 2, d), of which there are B."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.read, self.again, self.value, self.head = (
            nn.Linear(4, 4),
            nn.Linear(4, 4),
            nn.Linear(4, 4),
            nn.Linear(4, 3),
        )
        self.queries = nn.Parameter(normal(*shape, 4, seed=5))

    def forward(self, x: Tensor) -> Tensor:
        q = self.again(torch.tanh(self.read(self.queries))).flatten(0, -2)
        value = torch.tanh(self.value(x))
        return self.head(torch.tanh((q @ value.mT).softmax(-1) @ value).sum(1))  # type: ignore[no-any-return]


class Classes(nn.Module):
    """A table of kinds is encoded once, and every example takes its own row."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.head = nn.Linear(4, 4), nn.Linear(8, 3)
        self.table = nn.Parameter(normal(2, 4, seed=5))

    def forward(self, x: Tensor) -> Tensor:
        kind = (x[:, 0, 0] > 0).long()
        return self.head(torch.tanh(torch.cat([self.encode(self.table)[kind], x.mean(1)], dim=-1)))  # type: ignore[no-any-return]


class Grid(nn.Module):
    """A convolution of one picture of the coordinates, (1, C, H, W)."""

    def __init__(self) -> None:
        super().__init__()
        self.place, self.read, self.head = nn.Conv2d(2, 3, 2), nn.Conv2d(4, 3, 2), nn.Linear(3, 3)
        self.register_buffer("grid", normal(1, 2, 3, 1, seed=5))

    def forward(self, x: Tensor) -> Tensor:
        image = x.mT.unsqueeze(-1).expand(-1, -1, -1, 2)
        bias = self.place(self.grid.expand(-1, -1, -1, 3)[:, :, :, :2])
        return self.head(torch.tanh(torch.tanh(self.read(image)) + bias).flatten(2).mean(2))  # type: ignore[no-any-return]


class Uniquely(nn.Module):
    """Equal rows of all examples are encoded once."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        rows, places = torch.unique(x.round().flatten(0, 1), dim=0, return_inverse=True)
        return self.head(torch.tanh(self.encode(rows))[places.view(x.shape[:2])].mean(1))  # type: ignore[no-any-return]


class Experts(nn.Module):
    """Every token goes to one of three experts: rows of all examples in one matrix, none of them shared."""

    def __init__(self) -> None:
        super().__init__()
        self.experts, self.head = nn.ModuleList(nn.Linear(4, 4) for _ in range(3)), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        chosen, found = rows[:, :3].argmax(-1), torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            found = found.index_put((torch.where(chosen == number)[0],), torch.tanh(expert(rows[chosen == number])))
        return self.head(found.view_as(x).mean(1))  # type: ignore[no-any-return]


class TimeFirst(nn.Module):
    """Positions stand before the batch, of which there are as many."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inner(x.transpose(0, 1))).mean(0))  # type: ignore[no-any-return]


class Normed(nn.Module):
    """A picture's batch norms, and tokens made of it: torch 2.13 gets gradients wrong where an axis has length 1."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.value, self.head = nn.Conv2d(4, 4, 2, padding=1), nn.Linear(4, 4), nn.Linear(4, 3)
        self.first, self.second = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        for seed, norm in enumerate((self.first, self.second), 6):
            norm.register_buffer("running_var", normal(4, seed=seed).square() + 0.5)
            norm.register_buffer("running_mean", normal(4, seed=seed + 2))

    def forward(self, x: Tensor) -> Tensor:
        picture = torch.tanh(self.value(x)).mT.unsqueeze(-1)
        found = self.second(self.conv(self.first(picture).flatten(1).view(-1, 4, 3, 1))).flatten(2).mT
        tokens = torch.cat([found.mean(1, keepdim=True), found], 1)
        return torch.tanh(self.head(tokens))[:, 1:].square().mean(1)  # type: ignore[no-any-return]


class Formula(nn.Module):
    """A batch norm in `eval()`, written out."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        assert self.norm.running_mean is not None and self.norm.running_var is not None
        scale = self.norm.weight / (self.norm.running_var + self.norm.eps).sqrt()
        return (x - self.norm.running_mean[:, None, None]) * scale[:, None, None] + self.norm.bias[:, None, None]


def written_out(model: nn.Module) -> nn.Module:
    """The same network whose gradients autograd gets right."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_children()):
        if isinstance(module, nn.BatchNorm2d):
            setattr(model, name, Formula(module))
    return model


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "relative": Relative,
    "queries": lambda: Queries(2),
    "as many queries": lambda: Queries(6),
    "blocks of queries": lambda: Queries(3, 2),
    "classes": Classes,
    "grid": Grid,
    "unique": Uniquely,
    "experts": Experts,
    "time first": TimeFirst,
    "normed": Normed,
}
each = pytest.mark.parametrize("name", NETWORKS)


def data(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    return built(NETWORKS[name]()), normal(COUNT, 3, 4, seed=4), classes(COUNT)


def at(size: int, model: nn.Module, x: Inputs, y: Tensor, **options: Any) -> LaplacePosterior:
    """A fit in batches of ``size``."""
    loader = batches(x, y, *[size] * (COUNT // size))
    return fit(model, loader, **{"prior_precision": 1.0, **QUIET, **options})


def agree(found: LaplacePosterior, expected: LaplacePosterior, tolerance: float = 1e-9) -> None:
    assert found.log_marginal_likelihood == pytest.approx(expected.log_marginal_likelihood, rel=tolerance)
    for name, eigen in expected.layers.items():
        close(found.layers[name].diagonal(), eigen.diagonal(), tolerance)
        close(
            found.layers[name].eigenvalues.flatten().sort().values, eigen.eigenvalues.flatten().sort().values, tolerance
        )


# ------------------------------------------------------------------------------------------------------------- toys


@each
@pytest.mark.parametrize("curvature", ["kfac", "ekfac", "diagonal", "dense"])
def test_curvature_is_the_same_for_every_batch_size(name: str, curvature: str) -> None:
    model, x, y = data(name)
    alone = at(1, model, x, y, curvature=curvature)
    for size in SIZES[1:]:
        agree(at(size, model, x, y, curvature=curvature), alone)
    if curvature != "kfac":
        for layer, eigen in alone.layers.items():
            exact = ggn(written_out(model), layer, x, y)
            assert float(eigen.eigenvalues.sum()) == pytest.approx(float(exact.trace()), rel=1e-9)
            if curvature != "ekfac":
                close(eigen.diagonal().flatten() if curvature == "diagonal" else eigen.eigenvalues.sum(),
                      exact.diagonal() if curvature == "diagonal" else exact.trace(), 1e-9)  # fmt: skip


@each
@pytest.mark.parametrize(
    "options", [{"weight_sharing": "reduce"}, {"fisher": "empirical"}, {"fisher": "mc", "num_mc_samples": 2}], ids=str
)
def test_so_are_other_ways_to_measure_it(name: str, options: dict[str, Any]) -> None:
    model, x, y = data(name)
    alone = at(1, model, x, y, curvature="kfac", **options)
    for size in SIZES[1:]:
        agree(at(size, model, x, y, curvature="kfac", **options), alone)


@each
def test_an_examples_prediction_knows_nothing_of_its_batch(name: str) -> None:
    model, x, y = data(name)
    posterior = at(1, model, x, y, curvature="ekfac")
    whole = posterior.predict(x)
    for i in range(COUNT):
        close(whole.logit_covariance[i], posterior.predict(x[i : i + 1]).logit_covariance[0])
        for size in (2, 3):
            few = posterior.predict(x[i : i + size])
            close(few.logit_covariance[0], whole.logit_covariance[i])


@each
def test_nor_does_its_gradient(name: str) -> None:
    model, x, y = data(name)
    posterior = at(1, model, x, y, curvature="diagonal")
    whole = example_gradients(posterior, x, y)
    for i in range(COUNT):
        one = example_gradients(posterior, x[i : i + 1], y[i : i + 1])
        for layer in one.layers:
            close(whole.matrix(layer)[i], one.matrix(layer)[0])


def test_layers_that_keep_examples_apart_stay_in_one_pass() -> None:
    """A mixture's rows belong to one example each: nothing but its exact sums takes them one by one."""
    model, x, y = data("experts")
    fit(model, batches(x, y), curvature="kfac", prior_precision=1.0, **QUIET)  # its structure is known now
    calls: list[int] = []
    handle = model.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    fit(model, batches(x, y), curvature="kfac", prior_precision=1.0, **QUIET)
    handle.remove()
    assert calls == [COUNT, COUNT]  # the first finds the layers, the second is the pass


def test_labels_of_the_model_are_those_of_the_example() -> None:
    """Of tokens too, however long the batch is."""
    model, inputs = reader(pooled=False), text(COUNT)
    y = classes(COUNT, 4).masked_fill(inputs["attention_mask"] == 0, -100)
    alone = at(1, model, inputs, y, curvature="kfac", fisher="mc")
    for size in SIZES[1:]:
        agree(at(size, model, inputs, y, curvature="kfac", fisher="mc"), alone)


# ----------------------------------------------------------------------------------------------- models of transformers

SMALL: dict[str, Any] = {
    "vocab_size": 30, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8,
    "max_position_embeddings": 16, "num_labels": 3, "initializer_range": 0.5,
}  # fmt: skip
RELATIVE: dict[str, Any] = {"relative_attention": True, "position_buckets": 4, "pos_att_type": ["p2c", "c2p"]}
IMAGES: dict[str, Any] = {"image_size": 8, "patch_size": 2, "embed_dim": 8, "window_size": 2, "num_labels": 3}


@cache
def of_transformers(name: str) -> nn.Module:
    torch.manual_seed(0)
    models: dict[str, Callable[[], nn.Module]] = {
        "DeBERTa-v3": lambda: hf.DebertaV2ForSequenceClassification(
            hf.DebertaV2Config(**SMALL, **RELATIVE, share_att_key=True, norm_rel_ebd="layer_norm")
        ),
        "DeBERTa-v2": lambda: hf.DebertaV2ForSequenceClassification(hf.DebertaV2Config(**SMALL, **RELATIVE)),
        "DeBERTa": lambda: hf.DebertaForSequenceClassification(hf.DebertaConfig(**SMALL, **RELATIVE)),
        "SwinV2": lambda: hf.Swinv2ForImageClassification(
            hf.Swinv2Config(**IMAGES, depths=[1, 1], num_heads=[2, 2], initializer_range=0.5)
        ),
        "XLNet": lambda: hf.XLNetForSequenceClassification(
            hf.XLNetConfig(
                vocab_size=30, d_model=8, n_layer=2, n_head=2, d_inner=8, num_labels=3, initializer_range=0.5
            )
        ),
    }
    return models[name]().double().eval()


@pytest.mark.parametrize("name", ["DeBERTa-v3", "DeBERTa-v2", "DeBERTa", "SwinV2", "XLNet"])
def test_models_of_transformers(name: str) -> None:
    model = of_transformers(name)
    inputs: dict[str, Tensor] = {"pixel_values": normal(COUNT, 3, 8, 8)} if name == "SwinV2" else text(COUNT, 6, 30)
    y = classes(COUNT)
    for curvature in ("kfac", "ekfac"):
        alone = at(1, model, inputs, y, curvature=curvature)
        for size in (2, 6):
            agree(at(size, model, inputs, y, curvature=curvature), alone, 1e-8)
    found = alone.predict(inputs).logit_covariance
    close(found[2:4], alone.predict(part(inputs, slice(2, 4))).logit_covariance, 1e-8)
    if name.startswith("DeBERTa-v3"):
        total = sum(float(eigen.eigenvalues.sum()) for eigen in alone.layers.values())
        assert total == pytest.approx(sum(trace(model, layer, inputs) for layer in alone.layers), rel=1e-8)


def trace(model: nn.Module, layer: str, inputs: dict[str, Tensor]) -> float:
    """sum_n tr J_n^T H_n J_n of one layer, by autograd."""
    parameters, total = list(model.get_submodule(layer).parameters()), 0.0
    for n in range(COUNT):
        logits = logits_in(model(**part(inputs, n)))[0]
        rows = [torch.autograd.grad(f, parameters, retain_graph=True) for f in logits]
        j = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
        p = logits.detach().softmax(-1)
        total += float(((p.diag() - p.outer(p)) * (j @ j.mT)).sum())
    return total


def test_as_many_positions_as_tokens() -> None:
    """The attention mask is not that of relative positions, though there may be as many of them."""
    model, y = of_transformers("DeBERTa-v3"), classes(COUNT)
    found = []
    for length in (7, 8):  # 8 relative positions
        inputs = text(COUNT, 7, 30)
        inputs = {k: torch.nn.functional.pad(v, (0, length - 7)) for k, v in inputs.items()}
        found.append(at(1, model, inputs, y, curvature="kfac"))
    agree(*found, 1e-8)


def test_positions_that_a_model_repeats_for_its_batch() -> None:
    class Repeating(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.places, self.head = nn.Embedding(7, 4), nn.Embedding(3, 4), nn.Linear(4, 3)

        def forward(self, ids: Tensor) -> Tensor:
            places = self.places(torch.arange(3)[None]).repeat(len(ids), 1, 1)
            return self.head(torch.tanh(self.words(ids) * places).mean(1))  # type: ignore[no-any-return]

    model, x, y = built(Repeating()), integers(7, COUNT, 3), classes(COUNT)
    for curvature in ("kfac", "diagonal"):
        options = {"curvature": curvature, "target_modules": ["places", "words", "head"]}
        alone = at(1, model, x, y, **options)
        for size in SIZES[1:]:
            agree(at(size, model, x, y, **options), alone)


def test_rounding_reaches_no_position() -> None:
    """The first query of a causal attention has one key and gradient 0, of which rounding may leave a trace."""
    torch.manual_seed(0)
    config = hf.MBartConfig(
        vocab_size=30, d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=8, decoder_ffn_dim=8, max_position_embeddings=16, num_labels=3,
        init_std=0.5, eos_token_id=2, pad_token_id=1,
    )  # fmt: skip
    model, y = hf.MBartForSequenceClassification(config).double().eval(), classes(COUNT)
    ids = integers(26, COUNT, 6, seed=2) + 3
    ids[:, -1] = 2
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for fisher in ("exact", "mc"):
        alone = at(1, model, inputs, y, curvature="kfac", fisher=fisher)
        for size in SIZES[1:]:
            agree(at(size, model, inputs, y, curvature="kfac", fisher=fisher), alone, 1e-8)
