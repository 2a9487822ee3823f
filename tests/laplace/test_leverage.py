"""Leverages of training rows by dense Jacobians, the bound of an exact posterior, and the tau that they allow."""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.utils.data import DataLoader, SubsetRandomSampler, TensorDataset

from bayeformers import laplace
from bayeformers.laplace import LaplacePosterior, PrecisionChoice
from bayeformers.laplace.data import Batch, Loader, prepare
from bayeformers.laplace.leverage import MAX_ROWS, items_apart, leverages, safe_precision, training_rows
from bayeformers.laplace.tuning import GRID
from tests.laplace.networks import QUIET, batches, built, classes, fitted, mlp, reader, regression_data, text
from tests.laplace.reference import Inputs, close, dense, jacobian, loss_hessian, normal, outputs_of

CPU = torch.device("cpu")
TAUS = (0.01, 1.0, 30.0)
X, Y = normal(40, 4, seed=1), classes(40)


def prepared(posterior: LaplacePosterior, *data: Any) -> list[Batch]:
    return items_apart(posterior, [prepare(posterior.model, batch, CPU) for batch in data])


def brute_force(posterior: LaplacePosterior, inputs: Inputs, tau: float, likelihood: str) -> list[Tensor]:
    """H^{1/2} J S J^T H^{1/2} / (T s^2) of each row, all outputs flattened, by dense Jacobians and inverses."""
    outputs = outputs_of(posterior.model, inputs)
    count = len(outputs)
    size = outputs[0].numel()
    covariance = torch.zeros(count, size, size, dtype=torch.float64)
    for layer, eigen in posterior.layers.items():
        precision = posterior.likelihood_precision * dense(eigen)
        precision = precision + tau * torch.eye(len(precision), dtype=torch.float64)
        rows = torch.stack(jacobian(posterior.model, layer, inputs)).flatten(2)
        covariance += torch.einsum("bcp,pq,bdq->bcd", rows, torch.linalg.inv(precision), rows)
    labels = {
        "classification": torch.zeros(outputs.shape[:-1], dtype=torch.long),
        "multilabel": torch.zeros_like(outputs),
        "regression": torch.zeros_like(outputs),
    }[likelihood]  # no Hessian depends on them
    found = []
    for n in range(count):
        values, vectors = torch.linalg.eigh(loss_hessian(outputs[n : n + 1], labels[n : n + 1], likelihood))
        root = vectors @ values.clamp_min(0).sqrt().diag() @ vectors.T
        found.append(posterior.likelihood_precision * root @ covariance[n] @ root)
    return found


@pytest.mark.parametrize("curvature", ["kfac", "ekfac", "diagonal", "dense"])
def test_leverages_of_classes_are_those_of_dense_jacobians(curvature: str) -> None:
    """Also at a temperature, which divides the curvature: it divides the row's own part too."""
    posterior = fitted(mlp(), X, Y, curvature=curvature, temperature=0.7)
    found = leverages(posterior, prepared(posterior, X[:9], (X[9:15], Y[9:15])), TAUS)
    for tau, row in zip(TAUS, found, strict=True):
        expected = [one.trace() for one in brute_force(posterior, X[:15], tau, "classification")]
        close(torch.tensor(row), torch.stack(expected), 1e-10)


@pytest.mark.parametrize("likelihood", ["multilabel", "regression"])
def test_leverages_of_numbers_and_labels(likelihood: str) -> None:
    x, y = regression_data(d_in=4, outputs=3)
    labels = y if likelihood == "regression" else (y > 0).double()
    options = {"noise_std": 0.4} if likelihood == "regression" else {}
    posterior = fitted(mlp(), x, labels, likelihood=likelihood, **options)
    (found,) = leverages(posterior, prepared(posterior, (x, labels)), (0.3,))
    expected = [one.trace() for one in brute_force(posterior, x, 0.3, likelihood)]
    close(torch.tensor(found), torch.stack(expected), 1e-10)


def test_leverages_of_tokens_are_of_each_token_that_counts() -> None:
    """Each of the blocks on the diagonal of the row's matrix, of up to four tokens with a label; every fourth row."""
    inputs, labels = text(count=5, length=6), classes(5, 6)
    labels[inputs["attention_mask"] == 0] = -100
    labels[0, 1:3] = -100
    posterior = fitted(reader(pooled=False), inputs, labels, likelihood="classification")
    rows = prepared(posterior, {**inputs, "labels": labels})
    assert [len(row) for row in rows] == [1, 1]
    (found,) = leverages(posterior, rows, (0.3,))
    blocks = brute_force(posterior, inputs, 0.3, "classification")
    expected: list[list[float]] = []
    for n in (0, 4):
        kept = (labels[n] != -100).nonzero().flatten().tolist()
        own = [blocks[n][3 * t : 3 * t + 3, 3 * t : 3 * t + 3] for t in kept]
        expected.append([float(one.trace()) for one in own])
    counts = [min(4, len(own)) for own in expected]
    assert counts[0] == 4 - (len(expected[0]) < 4) * (4 - len(expected[0])) and found.shape == (sum(counts),)
    first, second = found[: counts[0]], found[counts[0] :]
    for own, every in ((first, expected[0]), (second, expected[1])):
        assert all(min(abs(value - other) for other in every) < 1e-10 for value in own)


def test_many_classes_are_looked_at_where_their_loss_curves_most() -> None:
    """Of 9 classes the matrix between the 4 eigenvectors of H with the largest eigenvalues: a lower bound."""
    posterior = fitted(mlp(outputs=9), X[:10], classes(10, outputs=9))
    (found,) = leverages(posterior, prepared(posterior, X[:10]), (1.0,))
    blocks = brute_force(posterior, X[:10], 1.0, "classification")
    outputs, expected = outputs_of(posterior.model, X[:10]), []
    for n, block in enumerate(blocks):
        hessian = loss_hessian(outputs[n : n + 1], torch.zeros(1, dtype=torch.long), "classification")
        steepest = torch.linalg.eigh(hessian)[1][:, -4:]  # H^{1/2} keeps its own eigenvectors apart
        expected.append((steepest.T @ block @ steepest).trace())
        assert found[n] <= block.trace()
    close(torch.tensor(found), torch.stack(expected), 1e-9)


def test_no_leverage_of_an_exact_posterior_reaches_one() -> None:
    """One layer with its dense Gauss-Newton matrix is the whole posterior; factors of two layers are not."""
    model, labels = built(nn.Linear(4, 2)), classes(40, outputs=2)
    exact = fitted(model, 3 * X, labels, curvature="dense")
    found = leverages(exact, prepared(exact, 3 * X), GRID)
    assert found.max() < 1 and found.min() > 0
    assert (np.diff(found, axis=0) < 0).all()  # each falls with tau
    traces = leverages(exact, prepared(exact, 3 * X), [1.0]).sum()  # over the rows of the fit: gamma
    assert traces == pytest.approx(sum(exact.effective_parameters.values()), rel=1e-9)
    kfac = fitted(mlp(outputs=2), 4 * X, labels)
    broken = leverages(kfac, prepared(kfac, 4 * X), GRID)
    assert broken.max() > 1 and (np.diff(broken, axis=0) < 0).all()
    three = fitted(built(nn.Linear(4, 3)), 3 * X, Y, curvature="dense")
    blocks = torch.stack(brute_force(three, 3 * X, GRID[0], "classification"))
    assert float(torch.linalg.eigvalsh(blocks).max()) < 1 < float(blocks.diagonal(dim1=1, dim2=2).sum(1).max())


@pytest.mark.parametrize(
    ("largest", "expected"),
    [([0.9, 0.5, 0.1], 1.0), ([100.0, 10.0, 2.0], 100.0), ([100.0, 10.0, 0.1], 10**1.5), ([1.0, 0.5, 0.1], 1.0)],
)
def test_the_least_safe_precision(largest: Sequence[float], expected: float) -> None:
    """Straight lines in the logarithms; the grid's ends where all, or none, are safe."""
    others = 0.01 * np.array(largest)
    assert safe_precision(np.stack([others, largest], 1), [1.0, 10.0, 100.0]) == pytest.approx(expected)


def test_leverages_raise_the_precision_of_the_evidence() -> None:
    """At the tau that is chosen the largest leverage is 1, up to a straight line over a decade of the grid."""
    posterior = laplace.fit(mlp(), batches(4 * X, Y), prior_precision="leverage", **QUIET)
    evidence = laplace.tune(posterior, "marglik", **QUIET)
    assert posterior.choice == PrecisionChoice(method="leverage", num_rows=40)
    assert posterior.prior_precision > evidence.prior_precision  # type: ignore[operator]
    rows = prepared(posterior, 4 * X)
    at_choice = leverages(posterior, rows, [float(posterior.prior_precision)]).max()  # type: ignore[arg-type]
    assert at_choice == pytest.approx(1, abs=0.25)
    again = laplace.tune(evidence, "leverage", training=batches(4 * X), **QUIET)  # no label is read
    assert again.prior_precision == pytest.approx(posterior.prior_precision, rel=1e-9)


def test_the_evidence_stays_where_no_leverage_forbids_it() -> None:
    """As of a dense last layer, whose leverages stay below 1 for every tau."""
    options = {"subset": "last_layer", "prior_precision": "leverage", **QUIET}
    posterior = laplace.fit(mlp(outputs=2), batches(X, classes(40, outputs=2)), **options)
    assert posterior.record.config.curvature == "dense" and posterior.choice.method == "leverage"
    assert posterior.prior_precision == laplace.tune(posterior, "marglik", **QUIET).prior_precision


def test_nothing_safe_is_said(caplog: pytest.LogCaptureFixture) -> None:
    """Curvature of other data than the rows: no tau of the grid keeps their leverages below 1."""
    posterior = fitted(built(nn.Linear(4, 3)), 1e-4 * X, Y)
    unsure = torch.linalg.svd(posterior.model.weight.detach())[2][-1]  # of which the logits know nothing
    with caplog.at_level(logging.WARNING):
        found = laplace.tune(posterior, "leverage", training=[1e5 * unsure[None]], **QUIET)
    assert found.choice == PrecisionChoice(method="leverage", at_grid_end="largest", num_rows=1)
    assert found.prior_precision == GRID[-1] and "stays next to the trained network" in caplog.text
    assert any("stays next to the trained network" in caveat for caveat in found.caveats)


def test_the_evidences_own_end_is_not_laid_to_the_leverages(caplog: pytest.LogCaptureFixture) -> None:
    """A prior around the weights themselves has no largest evidence; no leverage forbids the end of its range."""
    net = mlp()
    with caplog.at_level(logging.WARNING):
        found = laplace.fit(net, batches(4 * X, Y), prior_mean=net, prior_precision="leverage", **QUIET)
    assert found.choice == PrecisionChoice(method="leverage", at_grid_end="largest", num_rows=40)
    assert "leverages" not in caplog.text + "".join(found.caveats)


def test_rows_without_a_label_are_not_counted() -> None:
    labels = Y.clone()
    labels[::2] = -100
    assert laplace.fit(mlp(), batches(4 * X, labels), prior_precision="leverage", **QUIET).choice.num_rows == 20


# ------------------------------------------------------------------------------------------------------------ the rows


def numbered(source: Any) -> Loader:
    return Loader(nn.Linear(1, 2), source, None, None, False)


def rows_of(loader: Loader, seed: int = 0) -> list[float]:
    return [float(x) for batch in training_rows(loader, seed) for x in batch.inputs]  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", ["dataset", "sampler", "batches", "small"])
def test_rows_are_distinct_and_random(kind: str) -> None:
    values = torch.arange(1000.0)[:, None]
    dataset = TensorDataset(values, torch.zeros(1000).long())
    sampler = SubsetRandomSampler(range(0, 1000, 2))
    source: Any = {
        "dataset": DataLoader(dataset, batch_size=32, shuffle=True),
        "sampler": DataLoader(dataset, batch_size=32, sampler=sampler),
        "batches": list(values.split(30)),
        "small": list(values[:100].split(7)),
    }[kind]
    loader, state = numbered(source), torch.get_rng_state()
    found = rows_of(loader)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(set(found)) == len(found)
    if kind == "small":
        assert sorted(found) == list(range(100))
        return
    assert abs(len(found) - MAX_ROWS) <= (0 if kind == "dataset" else 16)  # batches may be smaller than others
    assert kind != "sampler" or all(x % 2 == 0 for x in found)
    # the mean of n of 1,000 has a standard error of 289 / sqrt(16 batches of neighbours): 5 of them at most
    assert abs(np.mean(found) - 499.5) < 5 * 289 / 4
    if kind != "sampler":
        assert found == rows_of(numbered(source)) != rows_of(numbered(source), seed=1)


def test_rows_do_not_depend_on_how_they_are_batched() -> None:
    dataset = TensorDataset(torch.arange(1000.0)[:, None])
    each = [sorted(rows_of(numbered(DataLoader(dataset, batch_size=size, shuffle=size > 9)))) for size in (8, 50)]
    assert each[0] == each[1]


# -------------------------------------------------------------------------------------------- where there are none


def test_bad_input() -> None:
    posterior = fitted(mlp(), X, Y)
    with pytest.raises(ValueError, match='"leverage" needs `training`: the data of the fit'):
        laplace.tune(posterior, "leverage", **QUIET)
    with pytest.raises(ValueError, match="`training` holds no row with a loss term"):
        laplace.tune(posterior, "leverage", training=[(X, torch.full_like(Y, -100))], **QUIET)
    with pytest.raises(ValueError, match="must be one of .*given.*leverage"):
        PrecisionChoice.from_dict({"method": "leverage", "num_rows": "many"})


def test_a_head_with_too_many_logits_has_the_evidence() -> None:
    """Before any pass where leverages are asked for; unasked, the evidence."""
    sizes = {"vocab_size": 9, "hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = hf.BertForMaskedLM(hf.BertConfig(**sizes, intermediate_size=4))
    data = [{"input_ids": torch.tensor([[1, 2]]), "labels": torch.tensor([[3, 4]])}]
    with pytest.raises(ValueError, match="head has too many logits"):
        laplace.fit(model, data, prior_precision="leverage", **QUIET)
    assert laplace.fit(model, data, fisher="mc", **QUIET).choice.method == "marglik"
