"""Ways to the covariance of the linearised network, against dense Jacobians and eigenvectors, in float64.

S = sum_k V_k (J v_k)(J v_k)^T over all eigen-directions v_k of all layers, for Laplace and for variational posteriors.
"""

from __future__ import annotations

import copy
import pickle
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bayeformers import VariationalPosterior, to_bayesian
from bayeformers.laplace import LaplacePosterior, fit
from bayeformers.linearized import methods
from bayeformers.linearized.blocks import MeanFieldBlock, block_draw, from_matrix
from bayeformers.linearized.methods import ranks, select
from bayeformers.nn import variational_tensors
from bayeformers.posteriors import BasePosterior
from tests.cases import case
from tests.linearized.dense import directions, forward_product


class Text(nn.Module):
    """A table with equal rows in a text, several positions, a normalisation, a convolution with groups."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.first, self.norm = nn.Embedding(7, 4, padding_idx=0), nn.Linear(4, 4), nn.LayerNorm(4)
        self.line, self.head = nn.Conv1d(4, 4, 2, groups=2), nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(torch.tanh(self.first(self.table(ids))))
        return self.head(torch.tanh(self.line(x.mT)).mean(-1))


IDS = torch.tensor([[1, 2, 1, 0, 0], [3, 3, 3, 3, 5], [4, 6, 2, 2, 0], [1, 5, 4, 6, 0]])
LABELS = torch.tensor([0, 2, 1, 0])
LAYERS = ["table", "first", "norm", "line", "head"]
KINDS = (
    "kfac",
    "ekfac",
    "diagonal",
    "dense",
    "last layer",
    "embedding",
    "taus",
    "variational",
    "bert",
    "variational bert",
)
each_kind = pytest.mark.parametrize("kind", KINDS)


@cache
def made(kind: str) -> tuple[BasePosterior, Any]:
    """A posterior and its inputs."""
    torch.manual_seed(0)
    if kind.endswith("bert"):
        this, some = case("bert"), r".*(query|pooler\.dense|classifier)"
        net, inputs = this.build().double(), this.inputs()
        batch: Any = {**inputs, **this.labels()}
    else:
        net, inputs, some = Text().double().eval(), IDS, "all"
        batch = (IDS, LABELS)
    if kind.startswith("variational"):
        model = to_bayesian(net, delta=0.3, target_modules=some).double().eval()
        with torch.no_grad():
            for tensor in variational_tensors(model):
                tensor.rho.add_(0.3 * torch.randn_like(tensor.rho))
        return VariationalPosterior(model), inputs
    options: dict[str, Any] = {"curvature": kind, "target_modules": LAYERS}
    if kind == "bert":
        options = {"target_modules": some}
    elif kind == "last layer":
        options = {"subset": "last_layer"}
    elif kind in ("embedding", "taus"):
        options = {"target_modules": ["table"] if kind == "embedding" else LAYERS}
    posterior = fit(net, [batch], prior_precision=0.5, progress=False, **options)
    if kind == "taus":
        posterior = posterior.with_prior_precision({name: 0.1 + 0.2 * i for i, name in enumerate(posterior.layers)})
    return posterior, inputs


@cache
def dense(kind: str) -> tuple[Tensor, Tensor]:
    """V (D,) in falling order and J v (B, C, D), of directions that have a variance: none in a padding row."""
    posterior, inputs = made(kind)
    with posterior.mean():
        variances, products = directions(posterior.model, posterior.blocks(), inputs)
    return variances[variances > 0], products[..., variances > 0]


def summed(variances: Tensor, products: Tensor) -> Tensor:
    return torch.einsum("bck,bdk,k->bcd", products, products, variances)


def covariance(kind: str, method: str, **options: Any) -> Tensor:
    posterior, inputs = made(kind)
    return posterior.linearize(inputs, method=method, **options)[1]


def assert_close(found: Tensor, expected: Tensor, relative: float = 1e-10) -> None:
    assert float(expected.abs().max()) > 1e-8
    torch.testing.assert_close(found, expected, rtol=0, atol=relative * float(expected.abs().max()))


def assert_between(low: Tensor, high: Tensor) -> None:
    """low <= high in the order of positive matrices, but for rounding."""
    assert float(torch.linalg.eigvalsh(high - low).min()) >= -1e-10 * float(high.abs().max())


@each_kind
def test_glm_is_the_sum_over_all_directions(kind: str) -> None:
    assert_close(covariance(kind, "glm"), summed(*dense(kind)))


# -------------------------------------------------------------------------------------------------------------- draws


def eta(posterior: BasePosterior, index: int, seed: int) -> dict[nn.Parameter, Tensor]:
    """The deviation of a draw, by Parameter."""
    found = {}
    for block in posterior.blocks():
        parts = from_matrix(block.modules[0], block_draw(block, index, seed), block.parameters)
        padding = getattr(block.modules[0], "padding_idx", None)
        if padding is not None:
            parts["weight"] = parts["weight"].clone().index_fill(0, torch.tensor(padding), 0)
        found |= {block.parameters[name]: value for name, value in parts.items()}
    return found


@each_kind
def test_products_are_those_of_forward_mode(kind: str) -> None:
    """one_glm = (J eta)(J eta)^T with J eta by `torch.func.jvp`; mc_glm is their mean."""
    posterior, inputs = made(kind)
    with posterior.mean():
        products = [forward_product(posterior.model, eta(posterior, k, seed=3), inputs) for k in range(3)]
    outer = [torch.einsum("bc,bd->bcd", p, p) for p in products]
    assert_close(covariance(kind, "one_glm", seed=3), outer[0], 1e-12)
    assert_close(covariance(kind, "mc_glm", seed=3, num_samples=3), sum(outer[1:], outer[0]) / 3, 1e-12)


@each_kind
def test_one_is_the_first_of_many(kind: str) -> None:
    one = covariance(kind, "one_glm", seed=1)
    assert torch.equal(one, covariance(kind, "mc_glm", num_samples=1, seed=1))
    assert torch.equal(one, covariance(kind, "one_glm", num_samples=7, seed=1))
    assert not torch.allclose(one, covariance(kind, "one_glm", seed=2))


@pytest.mark.parametrize("kind", ["kfac", "dense", "embedding", "variational"])
def test_monte_carlo_converges(kind: str) -> None:
    """Each element of (1/K) sum (J eta)(J eta)^T has variance (S_cc S_dd + S_cd^2) / K: within 5 standard errors.

    Of 36 elements in 4 kinds; a normal exceeds 5 in 6e-7 of cases, and the seed is fixed.
    """
    samples = 500
    found, exact = covariance(kind, "mc_glm", num_samples=samples), covariance(kind, "glm")
    diagonal = exact.diagonal(dim1=1, dim2=2)
    error = ((diagonal[:, :, None] * diagonal[:, None, :] + exact.square()) / samples).sqrt()
    assert float(((found - exact).abs() / error).max()) < 5


@pytest.mark.parametrize("method", ["glm", "mc_glm", "one_glm", "lr_glm", "e_glm"])
@each_kind
def test_every_split_into_batches(kind: str, method: str) -> None:
    """The same draws and directions for all examples."""
    posterior, inputs = made(kind)
    whole = posterior.linearize(inputs, method=method, num_samples=3)[1]
    for i in range(len(whole)):
        one = inputs[i : i + 1] if isinstance(inputs, Tensor) else {k: v[i : i + 1] for k, v in inputs.items()}
        alone = posterior.linearize(one, method=method, num_samples=3)[1]
        torch.testing.assert_close(whole[i : i + 1], alone, rtol=0, atol=1e-10 * float(whole.abs().max()))


# --------------------------------------------------------------------------------------------------------- directions


@each_kind
@pytest.mark.parametrize("count", [1, 5, 40])
def test_bounds_enclose_the_covariance(kind: str, count: int) -> None:
    exact = covariance(kind, "glm")
    lower = covariance(kind, "lr_glm", num_samples=count)
    upper = covariance(kind, "lr_glm", num_samples=count, bound="upper")
    assert_between(lower, exact)
    assert_between(exact, upper)
    assert_between(torch.zeros_like(lower), lower)


@each_kind
def test_bounds_tighten_to_the_covariance(kind: str) -> None:
    exact, total = covariance(kind, "glm"), len(dense(kind)[0])
    for bound in ("lower", "upper"):
        for count in (total, total + 5):
            assert_close(covariance(kind, "lr_glm", num_samples=count, bound=bound), exact)
        half, most = (covariance(kind, "lr_glm", num_samples=n, bound=bound) for n in (total // 2, total - total // 10))
        assert_between(*((half, most) if bound == "lower" else (most, half)))


@each_kind
def test_lower_bound_takes_the_largest_variances(kind: str) -> None:
    """Between two different variances, where the set of the largest is unique."""
    variances, products = dense(kind)
    gaps = (variances[:-1] - variances[1:] > 1e-9 * variances[:-1]).nonzero().squeeze(1)[:3] + 1
    assert len(gaps)
    for count in gaps.tolist():
        found = covariance(kind, "lr_glm", num_samples=count)
        torch.testing.assert_close(
            found,
            summed(variances[:count], products[..., :count]),
            rtol=0,
            atol=1e-10 * float(covariance(kind, "glm").abs().max()),
        )


@each_kind
def test_one_direction(kind: str) -> None:
    """By rank from either end, and by quantile; where variances are equal, the directions of all their ranks."""
    variances, products = dense(kind)
    total, scale = len(variances), float(covariance(kind, "glm").abs().max())
    for rank in {0, 1, total // 3, total // 2, total - 2, total - 1}:
        equal = ((variances - variances[rank]).abs() <= 1e-12 * variances[rank]).nonzero().squeeze(1).tolist()
        if len(equal) > 30:
            continue
        expected = summed(variances[equal], products[..., equal])
        found = torch.stack([covariance(kind, "e_glm", direction=k) for k in equal]).sum(0)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10 * scale)
        one = covariance(kind, "e_glm", direction=rank)
        assert torch.equal(covariance(kind, "e_glm", direction=rank - total), one)
        assert torch.equal(covariance(kind, "e_glm", direction=rank / (total - 1)), one)
    assert torch.equal(covariance(kind, "e_glm", direction=1.0), covariance(kind, "e_glm", direction=-1))
    assert torch.equal(covariance(kind, "e_glm", direction=0.0), covariance(kind, "e_glm", direction=0))


def test_directions_add_up_to_the_covariance() -> None:
    """Every rank has a direction of its own, though many variances are equal: those that no data inform."""
    posterior, inputs = made("embedding")
    total = len(dense("embedding")[0])
    assert len(dense("embedding")[0].unique()) <= total / 2
    parts = [posterior.linearize(inputs, method="e_glm", direction=k)[1] for k in range(total)]
    assert_close(torch.stack(parts).sum(0), covariance("embedding", "glm"))


# ------------------------------------------------------------------------------------------------------------- choice


def block(name: str, *values: float) -> MeanFieldBlock:
    return MeanFieldBlock(name, (), {}, torch.tensor([[values]], dtype=torch.float64))


BLOCKS = [block("a", 1, 5, 3), block("b", 4, 5, 2, 5), block("c", 3)]
ORDER = [("a", 1), ("b", 1), ("b", 3), ("b", 0), ("a", 2), ("c", 0), ("b", 2), ("a", 0)]
"""By falling variance; equal ones by block, then by index."""


@pytest.mark.parametrize("start", range(9))
@pytest.mark.parametrize("length", range(9))
def test_select(start: int, length: int) -> None:
    """Across blocks, through ties, from both ends: ranks start .. stop, so that parts are disjoint and complete."""
    stop = min(start + length, 8)
    found = {(name, i) for name, indices in select(BLOCKS, start, stop).items() for i in indices.tolist()}
    assert found == set(ORDER[start:stop])
    if start:
        tail = {(name, i) for name, indices in select(BLOCKS, -start, None).items() for i in indices.tolist()}
        assert tail == set(ORDER[-start:])


def test_equal_variances_alone() -> None:
    same = [block("a", 2, 2, 2), block("b", 2, 2)]
    assert {name: value.tolist() for name, value in select(same, 0, 4).items()} == {"a": [0, 1, 2], "b": [0]}
    assert {name: value.tolist() for name, value in select(same, -2, None).items()} == {"b": [0, 1]}


def test_what_has_no_variance_is_no_direction() -> None:
    some = [block("a", 0, 5, 0), block("b", 0), block("c", 3, 0)]
    assert {name: value.tolist() for name, value in select(some, 0, None).items()} == {"a": [1], "c": [0]}
    assert {name: value.tolist() for name, value in select(some, -1, None).items()} == {"c": [0]}
    assert ranks(some, -1) == ranks(some, 1.0) == (1, 2)
    with pytest.raises(ValueError, match=r"rank \(int, 0\.\.1,"):
        ranks(some, 2)


# --------------------------------------------------------------------------------------------- kept for the next batch


def counted(name: str, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Arguments of every call of a function of `methods`."""
    calls: list[Any] = []
    function = getattr(methods, name)

    def counting(*args: Any) -> Any:
        calls.append(args)
        return function(*args)

    monkeypatch.setattr(methods, name, counting)
    return calls


def fresh(kind: str) -> tuple[BasePosterior, Any]:
    """As `made`, without what earlier calls left."""
    posterior, inputs = made(kind)
    return copy.copy(posterior), inputs


@pytest.mark.parametrize("options", [{"method": "e_glm"}, {"method": "lr_glm"}, {"method": "lr_glm", "bound": "upper"}])
def test_directions_are_chosen_once(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    posterior, inputs = fresh("kfac")
    expected = posterior.linearize(inputs, **options)[1]
    assert isinstance(posterior, LaplacePosterior)
    calls = counted("select", monkeypatch)
    for _ in range(3):
        assert torch.equal(posterior.linearize(inputs, **options)[1], expected)
    assert len(calls) == 0
    whole = posterior.linearize(inputs, method="e_glm", direction=1)[1]
    assert not torch.equal(posterior.linearize(inputs, method="e_glm", direction=1.0)[1], whole)  # rank and quantile
    calls.clear()
    posterior.linearize(inputs, num_samples=2, direction=1, **options)
    narrow = posterior.with_prior_precision(100.0)
    assert float(narrow.linearize(inputs, **options)[1].sum()) != float(expected.sum())
    assert len(calls) == 2


def test_a_posterior_that_trains_chooses_anew() -> None:
    """Its blocks are made at every call: nothing of the former scales is left."""
    posterior, inputs = made("variational")
    posterior = VariationalPosterior(copy.deepcopy(posterior.model))
    before = posterior.linearize(inputs, method="lr_glm", num_samples=4)[1]
    with torch.no_grad():
        for tensor in variational_tensors(posterior.model):
            tensor.rho.sub_(1.0)
    after = posterior.linearize(inputs, method="lr_glm", num_samples=4)[1]
    assert_close(after, VariationalPosterior(posterior.model).linearize(inputs, method="lr_glm", num_samples=4)[1])
    assert float(after.diagonal(dim1=1, dim2=2).sum()) < 0.9 * float(before.diagonal(dim1=1, dim2=2).sum())


@pytest.mark.parametrize("num_kept", [0, 3, 10])
def test_draws_are_made_once_for_all_positions_and_batches(num_kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first draws stay while they fit: here so many of 2 blocks times 2 samples."""
    net, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double(), torch.randn(2, 3, 4).double()
    posterior = fit(net, [(x, torch.zeros(2, 3, dtype=torch.long))], prior_precision=1.0, progress=False)
    posterior.draw_cache_bytes = 8 * 20 * num_kept
    calls = counted("block_draw", monkeypatch)
    first = posterior.linearize(x, method="mc_glm", num_samples=2)[1]
    missed = max(4 - num_kept, 0)
    assert len(calls) == 4 + 2 * missed  # 3 positions
    assert torch.equal(posterior.linearize(x, method="mc_glm", num_samples=2)[1], first)
    assert len(calls) == 4 + (2 + 3) * missed
    assert not torch.equal(posterior.linearize(x, method="mc_glm", num_samples=2, seed=1)[1], first)


def test_a_used_posterior_can_be_pickled_and_copied() -> None:
    posterior, inputs = fresh("kfac")
    expected = posterior.linearize(inputs, method="lr_glm")[1]
    for other in (pickle.loads(pickle.dumps(posterior)), copy.deepcopy(posterior)):
        assert_close(other.linearize(inputs, method="lr_glm")[1], expected, 1e-12)


class Tied(nn.Module):
    """One weight in two layers, each with a bias of its own: three blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(3, 3), nn.Linear(3, 3)
        self.head.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.first(x)))


def test_blocks_of_one_layer_have_names_and_noise_of_their_own() -> None:
    torch.manual_seed(0)
    model, x = to_bayesian(Tied(), delta=0.3).double().eval(), torch.randn(2, 3).double()
    posterior = VariationalPosterior(model)
    blocks = posterior.blocks()
    assert len({block.name for block in blocks}) == len(blocks) == 3
    parts = [posterior.linearize(x, method="e_glm", direction=k)[1] for k in range(9 + 3 + 3)]
    assert_close(torch.stack(parts).sum(0), posterior.linearize(x)[1])


# ---------------------------------------------------------------------------------------------------------- bad input

BAD: list[tuple[dict[str, Any], str]] = [
    ({"method": "laplace"}, r"`method` must be one of \('sample', .*got 'laplace'"),
    ({"method": "lr_glm", "bound": "middle"}, r"`bound` must be one of \('lower', 'upper'\), got 'middle'"),
    ({"method": "e_glm", "direction": 10**6}, r"`direction` must be a rank \(int, 0\.\..*got 1000000"),
    ({"method": "e_glm", "direction": -(10**6)}, "`direction` must be a rank .*got -1000000"),
    ({"method": "e_glm", "direction": 1.5}, r"`direction` .*quantile \(float, 0\.0\.\.1\.0\), got 1\.5"),
    ({"method": "e_glm", "direction": -0.1}, r"`direction` .*got -0\.1"),
    ({"method": "e_glm", "direction": float("nan")}, "`direction` .*got nan"),
    ({"method": "e_glm", "direction": True}, "`direction` .*got True"),
    ({"method": "e_glm", "direction": "first"}, "`direction` .*got 'first'"),
    ({"method": "e_glm", "direction": None}, "`direction` .*got None"),
    ({"method": "mc_glm", "num_samples": 0}, "`num_samples` must be a whole number >= 1, got 0"),
    ({"method": "mc_glm", "num_samples": 2.0}, r"`num_samples` .*got 2\.0"),
    ({"method": "lr_glm", "num_samples": -1}, "`num_samples` .*got -1"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
@pytest.mark.parametrize("kind", ["kfac", "variational"])
def test_bad_arguments(kind: str, options: dict[str, Any], message: str) -> None:
    posterior, inputs = made(kind)
    with pytest.raises(ValueError, match=message):
        posterior.predict(inputs, **options)


@pytest.mark.parametrize("method", ["glm", "mc_glm", "one_glm", "lr_glm", "e_glm"])
@pytest.mark.parametrize("link", ["auto", "mc", "bridge", "probit_diagonal"])
@pytest.mark.parametrize("kind", ["bert", "variational bert"])
def test_every_method_and_link_predicts(kind: str, method: str, link: Any) -> None:
    """The mean is the network's own; a covariance of rank 1 is no obstacle."""
    posterior, inputs = made(kind)
    found = posterior.predict(inputs, method=method, link=link, num_samples=4)
    with torch.no_grad(), posterior.mean():
        torch.testing.assert_close(found.logit_mean, posterior.model(**inputs).logits, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.probs.sum(-1), torch.ones(3, dtype=torch.float64))
    assert torch.equal(found.logit_covariance, covariance(kind, method, num_samples=4))
    assert bool((found.mutual_information >= -1e-12).all())


def test_contrasts_need_a_softmax() -> None:
    posterior = fit(nn.Linear(2, 2), [torch.ones(3, 2)], likelihood="multilabel", prior_precision=1.0, progress=False)
    with pytest.raises(ValueError, match="`contrasts` are for classes"):
        posterior.predict(torch.ones(1, 2), contrasts=True)
