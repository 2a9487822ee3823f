"""Every layer class's contribution to the curvature against dense autograd Jacobians, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from bayeformers.laplace import KroneckerEigen, fit
from tests.cases import case
from tests.laplace.networks import Twice, built, classes, fitted, reader, text
from tests.laplace.reference import basis, close, dense, error, ggn, integers, normal, outputs_of


class Pooled(nn.Module):
    """A layer, tanh, the mean over positions, a head."""

    def __init__(self, layer: nn.Module, features: int, axis: int) -> None:
        super().__init__()
        self.layer, self.head, self.axis = layer, nn.Linear(features, 3), axis

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.layer(x))
        return self.head(h.flatten(2).mean(2) if self.axis == 1 else h.flatten(1, -2).mean(1))  # type: ignore[no-any-return]


Build = tuple[Callable[[], nn.Module], int, int, tuple[int, ...]]
LAYERS: dict[str, Build] = {  # layer, its features, their axis, shape of one example
    "linear": (lambda: nn.Linear(4, 5), 5, -1, (3, 4)),
    "linear without bias": (lambda: nn.Linear(4, 5, bias=False), 5, -1, (3, 4)),
    "linear on a plane": (lambda: nn.Linear(4, 5), 5, -1, (2, 3, 4)),
    "Conv1D": (lambda: Conv1D(5, 4), 5, -1, (3, 4)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), 6, 1, (4, 7)),
    "conv1d circular": (lambda: nn.Conv1d(2, 4, 2, dilation=2, padding=2, padding_mode="circular"), 4, 1, (2, 6)),
    "conv2d": (lambda: nn.Conv2d(2, 4, (2, 3), stride=(1, 2), padding=(0, 1)), 4, 1, (2, 4, 5)),
    "conv2d grouped": (lambda: nn.Conv2d(4, 6, 2, groups=2, bias=False), 6, 1, (4, 3, 3)),
    "conv2d depthwise": (lambda: nn.Conv2d(3, 3, 3, groups=3, padding=1, padding_mode="reflect"), 3, 1, (3, 3, 4)),
    "conv2d same, even kernel": (lambda: nn.Conv2d(2, 3, (2, 3), padding="same", dilation=(1, 2)), 3, 1, (2, 4, 5)),
    "conv2d replicate": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="replicate"), 3, 1, (2, 3, 3)),
    "conv3d": (lambda: nn.Conv3d(2, 4, (1, 2, 2), groups=2, padding=(0, 1, 0)), 4, 1, (2, 2, 3, 3)),
    "LayerNorm": (lambda: nn.LayerNorm(4), 4, -1, (3, 4)),
    "LayerNorm without bias": (lambda: nn.LayerNorm(4, bias=False), 4, -1, (3, 4)),
    "LayerNorm on a plane": (lambda: nn.LayerNorm((2, 4)), 4, -1, (3, 2, 4)),
    "RMSNorm": (lambda: nn.RMSNorm(4), 4, -1, (3, 4)),
    "Embedding": (lambda: nn.Embedding(6, 4), 4, -1, (5,)),
    "Embedding with padding": (lambda: nn.Embedding(6, 4, padding_idx=2), 4, -1, (5,)),
}  # fmt: skip
each_layer = pytest.mark.parametrize("name", LAYERS)


def network(name: str, count: int = 5) -> tuple[nn.Module, Tensor, Tensor]:
    """A model, inputs and labels."""
    build, features, axis, shape = LAYERS[name]
    model = built(Pooled(build(), features, axis))
    inputs = integers(6, count, *shape, seed=4) if name.startswith("Emb") else normal(count, *shape, seed=4)
    return model, inputs, classes(count)


# ---------------------------------------------------------------------------------------------------------- exact forms


@each_layer
def test_full_and_diagonal_are_exact(name: str) -> None:
    model, x, y = network(name)
    expected = ggn(model, "layer", x, y)
    full, diagonal = (fitted(model, x, y, target_modules="layer", curvature=kind) for kind in ("dense", "diagonal"))
    close(dense(full.layers["layer"]), expected, 1e-12)
    close(diagonal.layers["layer"].eigenvalues.flatten(), expected.diagonal(), 1e-12)


@each_layer
def test_ekfac_has_the_diagonal_in_its_basis(name: str) -> None:
    model, x, y = network(name)
    eigen = fitted(model, x, y, target_modules="layer", curvature="ekfac").layers["layer"]
    u, expected = basis(eigen), ggn(model, "layer", x, y)
    close(eigen.eigenvalues.flatten(), (u.T @ expected @ u).diagonal(), 1e-12)
    kfac = fitted(model, x, y, target_modules="layer", curvature="kfac").layers["layer"]
    expected = expected * within_blocks(eigen)
    assert error(dense(eigen), expected) <= error(dense(kfac), expected) + 1e-12


def within_blocks(eigen: KroneckerEigen) -> Tensor:
    """1 within each of the K independent blocks: between them the GGN is dropped."""
    blocks, *shape = eigen.eigenvalues.shape
    return torch.block_diag(*[torch.ones(shape[0] * shape[1], shape[0] * shape[1], dtype=torch.float64)] * blocks)


@pytest.mark.parametrize("name", ["linear", "linear on a plane", "Conv1D", "conv2d", "conv2d grouped", "conv3d"])
def test_one_position_of_one_example_is_exact(name: str) -> None:
    """With one loss column too: two classes."""
    build, features, axis, shape = LAYERS[name]
    model = Pooled(build(), features, axis)
    model.head = nn.Linear(features, 2)
    built(model)
    ones = {-1: (1, *(1,) * (len(shape) - 1), shape[-1]), 1: (1, shape[0], *getattr(model.layer, "kernel_size", ()))}
    layer: Any = model.layer
    if axis == 1:
        layer.padding = (0,) * len(layer.kernel_size)
        layer._reversed_padding_repeated_twice = [0] * (2 * len(layer.kernel_size))
    x, y = normal(*ones[axis]), classes(1, outputs=2)
    eigen = fitted(model, x, y, target_modules="layer", curvature="kfac").layers["layer"]
    close(dense(eigen), ggn(model, "layer", x, y) * within_blocks(eigen), 1e-12)


# -------------------------------------------------------------------------------------------------------------- factors


def gradients_after(model: nn.Module, x: Tensor) -> Tensor:
    """g of every example and loss-Hessian column, (N, C, ...): a variable added to the output of `layer`."""
    found = []
    for n in range(len(x)):
        shape = model.layer(x[n : n + 1]).shape[1:]

        def shifted(extra: Tensor, n: int = n) -> Tensor:
            handle = model.layer.register_forward_hook(lambda module, args, output: output + extra)
            try:
                return model(x[n : n + 1])[0]  # type: ignore[no-any-return]
            finally:
                handle.remove()

        rows = torch.autograd.functional.jacobian(shifted, torch.zeros(shape, dtype=torch.float64))
        p = model(x[n : n + 1])[0].softmax(-1).detach()
        root = torch.diag(p.sqrt()) - torch.outer(p, p.sqrt())  # columns sqrt(p_c) (e_c - p)
        found.append(torch.einsum("o...,oc->c...", rows, root))
    return torch.stack(found)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_factors_of_a_linear(sharing: str) -> None:
    """A averages over positions (or over their mean), G sums over data, by Eschenhagen et al.'s definition."""
    model, x, y = network("linear")
    g = gradients_after(model, x)  # (N, C, T, d_out)
    a = torch.cat([x, torch.ones_like(x[..., :1])], -1)
    if sharing == "reduce":
        g, a = g.sum(2, keepdim=True), a.mean(1, keepdim=True)
    expected = torch.einsum("ncti,nctj->ij", g, g), torch.einsum("nti,ntj->ij", a, a) / a[..., 0].numel()
    eigen = fitted(model, x, y, target_modules="layer", curvature="kfac", weight_sharing=sharing).layers["layer"]
    close(dense(eigen), torch.kron(*expected), 1e-12)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_factors_of_a_convolution_are_those_of_its_patches(sharing: str) -> None:
    model, x, y = network("conv2d")
    patches = nn.functional.unfold(x, (2, 3), padding=(0, 1), stride=(1, 2)).mT
    g = gradients_after(model, x).flatten(3).mT  # (N, C, T, d_out)
    a = torch.cat([patches, torch.ones_like(patches[..., :1])], -1)
    if sharing == "reduce":
        g, a = g.sum(2, keepdim=True), a.mean(1, keepdim=True)
    expected = torch.einsum("ncti,nctj->ij", g, g), torch.einsum("nti,ntj->ij", a, a) / a[..., 0].numel()
    eigen = fitted(model, x, y, target_modules="layer", curvature="kfac", weight_sharing=sharing).layers["layer"]
    close(dense(eigen), torch.kron(*expected), 1e-12)


@pytest.mark.protects("padding_adds_no_curvature")
def test_padding_adds_nothing() -> None:
    """Two more columns of padding change no factor; nor does what stands in the padding."""
    model, inputs, y = reader(), text(), classes(6)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    wider = {"input_ids": nn.functional.pad(ids, (0, 2), value=5), "attention_mask": nn.functional.pad(mask, (0, 2))}
    for kind in ("kfac", "ekfac", "diagonal", "dense"):
        for sharing in ("expand", "reduce"):
            posteriors = [
                fitted(model, given, y, curvature=kind, target_modules=".+", weight_sharing=sharing)
                for given in (inputs, wider)
            ]
            for layer in posteriors[0].layers:
                if float(posteriors[0].layers[layer].eigenvalues.max()) < 1e-20:
                    assert (layer, sharing) == ("key", "reduce")  # a softmax does not see what all its inputs share
                    continue
                close(*(dense(p.layers[layer]) for p in posteriors[::-1]), 1e-10)


def test_conv1d_is_a_transposed_linear_and_embedding_a_one_hot_linear() -> None:
    linear, x, y = network("linear")
    conv, *_ = network("Conv1D")
    table, ids, _ = network("Embedding")
    one_hot = built(Pooled(nn.Linear(6, 4, bias=False), 4, -1))
    with torch.no_grad():
        conv.load_state_dict({k: v.T if k == "layer.weight" else v for k, v in linear.state_dict().items()})
        one_hot.load_state_dict({k: v.T if k == "layer.weight" else v for k, v in table.state_dict().items()})
    rows = nn.functional.one_hot(ids, 6).double()
    for kind in ("kfac", "ekfac", "diagonal", "dense"):
        options: dict[str, Any] = {"target_modules": "layer", "curvature": kind}
        first, second = fitted(linear, x, y, **options), fitted(conv, x, y, **options)
        close(dense(second.layers["layer"]), dense(first.layers["layer"]), 1e-12)
        close(second.linearize(x)[1], first.linearize(x)[1], 1e-12)
        first, second = fitted(table, ids, y, **options), fitted(one_hot, rows, y, **options)
        swap = torch.arange(24).reshape(4, 6).T.flatten()  # entry (v, j) of the table is (j, v) of the Linear
        if kind != "ekfac":  # equal counts: any basis of theirs serves, and its diagonals differ
            close(dense(first.layers["layer"]), dense(second.layers["layer"])[swap][:, swap], 1e-12)
            close(first.linearize(ids)[1], second.linearize(rows)[1], 1e-12)
        for weight, other in zip(first.variances().values(), second.variances().values(), strict=True):
            if kind != "ekfac":
                close(weight, other.T, 1e-12)


# -------------------------------------------------------------------------------------------------------- shared layers


@pytest.mark.protects("tied_curvature")
@pytest.mark.parametrize("shape", [(5, 4), (5, 1, 4)])
def test_reused_and_shared_layers(shape: tuple[int, ...]) -> None:
    """One random tensor with one block, whose Jacobian is the sum over all uses."""
    model, x = built(Twice()), normal(*shape)
    y = classes(*shape[:-1], outputs=4)
    full, diagonal, ekfac = (fitted(model, x, y, curvature=kind) for kind in ("dense", "diagonal", "ekfac"))
    assert list(full.layers) == ["again", "first", "head"]
    for layer in full.layers:
        expected = ggn(model, layer, x, y)
        close(dense(full.layers[layer]), expected, 1e-12)
        close(diagonal.layers[layer].eigenvalues.flatten(), expected.diagonal(), 1e-12)
        u = basis(ekfac.layers[layer])
        close(ekfac.layers[layer].eigenvalues.flatten(), (u.T @ expected @ u).diagonal(), 1e-12)


# ------------------------------------------------------------------------------------------- architectures, all at once


@pytest.mark.parametrize("name", ["bert-regression", "albert", "mpnet", "deberta-v2", "gpt2", "qwen2", "swin"])
def test_architectures_are_dense(name: str) -> None:
    """Tables looked up once for all examples, positions first, shared layers, windows, grouped queries."""
    model, inputs = case(name).build().double().eval(), dict(case(name).inputs())
    for key, value in inputs.items():
        inputs[key] = value.double() if value.is_floating_point() else value
    outputs = outputs_of(model, inputs)
    is_regression = name.endswith("regression")
    labels = torch.zeros_like(outputs) if is_regression else torch.zeros(len(outputs)).long()
    posterior = fitted(model, inputs, curvature="dense", fisher="exact", target_modules=".+")
    small = [target for target in posterior.targets if target.num_weights < 100]
    for target in [*small[:: max(1, len(small) // 6)], posterior.targets[0]]:
        options = {"likelihood": "regression" if is_regression else "classification", "names": list(target.parameters)}
        expected = ggn(model, target.name, inputs, labels, **options)
        found = dense(posterior.layers[target.name])
        tolerance = 1e-6 if name == "qwen2" else 1e-10  # its RMSNorm is always in float32
        assert float((found - expected).abs().max()) < tolerance * max(1.0, float(expected.abs().max()))


class Windows(nn.Module):
    """A normalisation over windows: its first axis is examples times windows."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.LayerNorm(3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        seen = torch.tanh(self.norm(x.reshape(-1, 2, 3))).reshape(len(x), -1, 3)
        return self.head(seen.mean(1))


def test_the_windows_of_an_example_add_before_they_are_squared() -> None:
    """Under "kfac" too, where a normalisation has the exact diagonal."""
    model, x, y = built(Windows()), normal(5, 4, 3), classes(5, outputs=2)
    options: dict[str, Any] = {"target_modules": ["norm", "head"], "prior_precision": 1.0, "progress": False}
    together = fit(model, [(x, y)], **options)
    alone = fit(model, [(x[i : i + 1], y[i : i + 1]) for i in range(5)], **options)
    close(together.layers["norm"].eigenvalues, alone.layers["norm"].eigenvalues, 1e-12)
