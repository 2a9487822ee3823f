"""Square roots of the loss Hessian against autograd Hessians and gradients, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bayeformers.likelihoods.registry import likelihood_of_family

Likelihood = str


def num_columns(num_outputs: int, likelihood: Likelihood) -> int:
    return likelihood_of_family(likelihood).num_columns(num_outputs)


def hessian_columns(logits: Tensor, likelihood: Likelihood) -> Iterator[Tensor]:
    return likelihood_of_family(likelihood).hessian_columns(logits)


def sampled_columns(logits: Tensor, likelihood: Likelihood, **options: Any) -> Iterator[Tensor]:
    return likelihood_of_family(likelihood).sampled_columns(logits, **options)


def empirical_column(logits: Tensor, labels: Tensor, likelihood: Likelihood) -> Tensor:
    return likelihood_of_family(likelihood).empirical_column(logits, labels)


def log_likelihood(logits: Tensor, labels: Tensor, likelihood: Likelihood, noise_std: float = 1.0) -> Tensor:
    return likelihood_of_family(likelihood).log_likelihood(logits, labels, noise_std)


def label_mask(logits: Tensor, labels: Tensor, likelihood: Likelihood) -> Tensor:
    return likelihood_of_family(likelihood).label_mask(logits, labels)


LIKELIHOODS: list[Likelihood] = ["classification", "regression", "multilabel", "ordinal"]


def ordinal(f: Tensor) -> Tensor:
    """P(y = c | f) as differences of cumulative probabilities, (..., C)."""
    steps = torch.cat([f[..., 1:2] - f[..., :1], -F.softplus(f[..., 2:])], dim=-1)
    at_least = steps.cumsum(-1).sigmoid()  # P(y >= 1), P(y >= 2), ...
    ends = torch.ones_like(f[..., :1])
    return torch.cat([ends, at_least], -1) - torch.cat([at_least, 0 * ends], -1)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "classification": lambda f, y: F.cross_entropy(f.flatten(0, -2), y.flatten(), reduction="sum"),
    "regression": lambda f, y: 0.5 * F.mse_loss(f, y, reduction="sum"),
    "multilabel": lambda f, y: F.binary_cross_entropy_with_logits(f, y, reduction="sum"),
    "ordinal": lambda f, y: -ordinal(f).gather(-1, y[..., None]).log().sum(),
}


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels_for(logits: Tensor, likelihood: Likelihood) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    if likelihood in ("classification", "ordinal"):
        return torch.randint(logits.shape[-1], logits.shape[:-1], generator=generator)
    if likelihood == "multilabel":
        return torch.randint(2, logits.shape, generator=generator).double()
    return normal(*logits.shape, seed=5)


def outer_sum(columns: list[Tensor]) -> Tensor:
    return sum((column[..., :, None] * column[..., None, :] for column in columns), torch.zeros(()))


def autograd_hessians(logits: Tensor, labels: Tensor, likelihood: Likelihood) -> Tensor:
    """(items, C, C): the diagonal blocks of the Hessian of the summed loss over all items."""
    hessian = torch.autograd.functional.hessian(lambda f: LOSSES[likelihood](f, labels), logits)
    items, outputs = logits.shape[:-1].numel(), logits.shape[-1]
    blocks = hessian.reshape(items, outputs, items, outputs)
    return torch.stack([blocks[n, :, n] for n in range(items)])


# ---------------------------------------------------------------------------------------------------------------- exact


@pytest.mark.parametrize("classes", [2, 3, 7])
@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0, 300.0])
def test_softmax_columns_are_a_cholesky_factor(classes: int, scale: float) -> None:
    """S S^T = diag(p) - p p^T for uniform, ordinary and saturated p."""
    logits = normal(50, classes, scale=scale)
    p = logits.softmax(-1)
    columns = list(hessian_columns(logits, "classification"))
    assert len(columns) == num_columns(classes, "classification") == classes - 1
    expected = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    torch.testing.assert_close(outer_sum(columns), expected, rtol=0, atol=1e-14)
    factor = torch.stack(columns, -1)
    assert torch.equal(factor.tril(), factor)


@pytest.mark.parametrize("shape", [(4, 3), (2, 3, 4)])
@pytest.mark.parametrize("likelihood", LIKELIHOODS[:3])
def test_columns_match_the_autograd_hessian(likelihood: Likelihood, shape: tuple[int, ...]) -> None:
    logits = normal(*shape, scale=2.0)
    expected = autograd_hessians(logits, labels_for(logits, likelihood), likelihood)
    columns = list(hessian_columns(logits, likelihood))
    assert len(columns) == num_columns(shape[-1], likelihood)
    found = outer_sum(columns)
    torch.testing.assert_close(found.flatten(0, -3), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_ordinal_columns_match_the_expected_hessian(classes: int) -> None:
    """Over all labels: a cumulative logit is no natural parameter, so the Hessian of one label is not H."""
    logits = normal(4, classes, scale=2.0)
    probs, expected = ordinal(logits), torch.zeros(4, classes, classes, dtype=torch.float64)
    fisher = torch.zeros_like(expected)
    for label in range(classes):
        labels = torch.full((4,), label)
        expected += probs[:, label, None, None] * autograd_hessians(logits, labels, "ordinal")
        gradient = empirical_column(logits, labels, "ordinal")
        fisher += probs[:, label, None, None] * gradient[:, :, None] * gradient[:, None, :]
    columns = list(hessian_columns(logits, "ordinal"))
    assert len(columns) == num_columns(classes, "ordinal") == classes - 1
    torch.testing.assert_close(outer_sum(columns), expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(outer_sum(columns), fisher, rtol=0, atol=1e-13)


@pytest.mark.parametrize("hot", [0, 1, 2])
@pytest.mark.parametrize("margin", [20.0, 1e3, 1e30, math.inf])
def test_one_hot_probabilities_in_float32(hot: int, margin: float) -> None:
    """p rounds to one-hot: no NaN, and the columns are the float64 ones, to float32's relative precision."""
    logits = torch.full((1, 3), -margin)
    logits[0, hot] = 0.0
    for column, wide in zip(
        hessian_columns(logits, "classification"), hessian_columns(logits.double(), "classification"), strict=True
    ):
        assert column.dtype == torch.float32
        torch.testing.assert_close(column, wide.float(), rtol=2e-6, atol=1e-37)
    first = next(hessian_columns(logits, "classification"))
    if margin == 20.0:  # 1 - p = 4e-9 is below float32's resolution at 1, its root is not
        assert first.abs().max() > 4e-5


def test_saturated_sigmoid_in_float32() -> None:
    logits = torch.tensor([[25.0, -25.0, 200.0, -torch.inf]])
    found = torch.stack(list(hessian_columns(logits, "multilabel")), -1)
    expected = torch.tensor([math.exp(-12.5), math.exp(-12.5), 0.0, 0.0])
    torch.testing.assert_close(found[0].diagonal(), expected, rtol=1e-6, atol=1e-37)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_half_precision_keeps_its_dtype_and_gradient_is_cut(likelihood: Likelihood) -> None:
    logits = normal(2, 3).bfloat16().requires_grad_()
    labels = labels_for(logits, likelihood)
    generator = torch.Generator().manual_seed(0)
    columns = [
        *hessian_columns(logits, likelihood),
        *sampled_columns(logits, likelihood, num_samples=2, generator=generator),
        empirical_column(logits, labels, likelihood),
    ]
    assert all(column.dtype == torch.bfloat16 and not column.requires_grad for column in columns)
    assert not log_likelihood(logits, labels, likelihood).requires_grad


# -------------------------------------------------------------------------------------------------------------- sampled


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_sampled_columns_estimate_the_hessian(likelihood: Likelihood) -> None:
    """n = 1e6 items with the same logits, one draw each: every entry of the mean within 5 of its standard errors.

    The standard error is that of the products s_i s_j themselves; 9 entries at 5 sigma fail by chance 5e-6 of the time.
    """
    row, n = torch.tensor([0.3, -1.2, 0.8], dtype=torch.float64), 1_000_000
    generator = torch.Generator().manual_seed(6)
    (column,) = sampled_columns(row.expand(n, 3), likelihood, num_samples=1, generator=generator)
    expected = outer_sum(list(hessian_columns(row[None], likelihood)))[0]
    mean = column.T @ column / n
    squares = column.square()
    error = ((squares.T @ squares / n - mean.square()).clamp_min(0) / n).sqrt()
    assert bool(((mean - expected).abs() <= 5 * error + 1e-12).all())
    assert float(error.max()) < 3e-3
    assert float(column.mean(0).abs().max()) < 5 / math.sqrt(n)  # a score has mean 0; its variance is at most 1


def test_expectation_of_class_columns_by_enumeration() -> None:
    """Uniforms on a grid enumerate the distribution: E[(p - e_y)(p - e_y)^T] = H, and each class as often as p says."""
    row, n = torch.tensor([0.1, 2.0, -0.7, -torch.inf], dtype=torch.float64), 200_000
    p = row.softmax(-1)
    generator = torch.Generator().manual_seed(0)
    (column,) = sampled_columns(row.expand(n, 4), "classification", num_samples=1, generator=generator)
    drawn = p - column
    torch.testing.assert_close(drawn, F.one_hot(drawn.argmax(-1), 4).double(), rtol=0, atol=1e-15)
    counts = drawn.sum(0)
    # binomial counts within 5 standard deviations, and an impossible class never
    assert bool(((counts - n * p).abs() <= 5 * (n * p * (1 - p)).sqrt()).all())
    assert float(counts[3]) == 0
    # E over labels by enumeration, with the columns the function gives for each label
    by_label = [column[drawn.argmax(-1) == y][0] for y in range(3)]
    mean = sum(p[y] * torch.outer(s, s) for y, s in enumerate(by_label))
    torch.testing.assert_close(mean, torch.diag(p) - torch.outer(p, p), rtol=0, atol=1e-15)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_samples_are_scaled_seeded_and_independent_of_dtype(likelihood: Likelihood) -> None:
    logits = normal(3, 5, 4)

    def columns(values: Tensor, seed: int, num_samples: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return list(sampled_columns(values, likelihood, num_samples=num_samples, generator=generator))

    four, one = columns(logits, 1, 4), columns(logits, 1, 1)
    torch.testing.assert_close(four[0] * 2, one[0])
    assert len(four) == 4 and not torch.equal(four[0], four[1])
    assert not torch.equal(columns(logits, 2, 1)[0], one[0])
    torch.testing.assert_close(columns(logits.float(), 1, 1)[0].double(), one[0], rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------------- labels: value, slope


@pytest.mark.parametrize("shape", [(4, 3), (2, 3, 4)])
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_empirical_column_is_the_gradient(likelihood: Likelihood, shape: tuple[int, ...]) -> None:
    logits = normal(*shape, scale=2.0).requires_grad_()
    labels = labels_for(logits, likelihood)
    (expected,) = torch.autograd.grad(LOSSES[likelihood](logits, labels), logits)
    torch.testing.assert_close(empirical_column(logits, labels, likelihood), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("noise_std", [1.0, 0.3])
def test_log_likelihood_matches_torch_distributions(likelihood: Likelihood, noise_std: float) -> None:
    logits = normal(2, 5, 3, scale=2.0)
    labels = labels_for(logits, likelihood)
    densities = {
        "classification": torch.distributions.Categorical(logits=logits),
        "multilabel": torch.distributions.Bernoulli(logits=logits),
        "regression": torch.distributions.Normal(logits, noise_std),
        "ordinal": torch.distributions.Categorical(probs=ordinal(logits)),
    }
    found = log_likelihood(logits, labels, likelihood, noise_std)
    assert found.dtype == torch.float64 and found.shape == ()
    torch.testing.assert_close(found, densities[likelihood].log_prob(labels).sum())
    assert log_likelihood(logits.float(), labels, likelihood).dtype == torch.float64


def test_ignored_labels() -> None:
    logits = normal(2, 4, 3)
    labels = labels_for(logits, "classification")
    masked = labels.clone()
    masked[0, 1:] = -100
    kept = torch.tensor([[True, False, False, False], [True] * 4])
    assert torch.equal(label_mask(logits, masked, "classification")[..., 0], kept)
    column, full = (
        empirical_column(logits, masked, "classification"),
        empirical_column(logits, labels, "classification"),
    )
    torch.testing.assert_close(column, full * kept[..., None])
    torch.testing.assert_close(
        log_likelihood(logits, masked, "classification"),
        torch.distributions.Categorical(logits=logits[kept]).log_prob(labels[kept]).sum(),
    )
    assert float(log_likelihood(logits, torch.full_like(labels, -100), "classification")) == 0


def test_ignored_indicators_but_not_ignored_numbers() -> None:
    logits = normal(2, 3)
    labels = labels_for(logits, "multilabel")
    labels[0, 1] = -100
    kept = labels != -100
    assert torch.equal(label_mask(logits, labels, "multilabel"), kept)
    assert float(empirical_column(logits, labels, "multilabel")[0, 1]) == 0
    expected = torch.distributions.Bernoulli(logits=logits[kept]).log_prob(labels[kept]).sum()
    torch.testing.assert_close(log_likelihood(logits, labels, "multilabel"), expected)
    torch.testing.assert_close(empirical_column(logits, labels, "regression"), logits - labels)  # -100 degrees exist
    assert bool(label_mask(logits, labels, "regression").all())


def test_columns_of_labels() -> None:
    """(B,) or (B, 1) for one regression output, and (B, 1) classes, as the models' own losses take them."""
    logits, labels = normal(4, 1), normal(4, seed=1)
    for one in (labels, labels[:, None]):
        torch.testing.assert_close(empirical_column(logits, one, "regression"), logits - labels[:, None])
    classes = torch.tensor([0, 1, 1, 0])
    logits = normal(4, 2)
    torch.testing.assert_close(
        empirical_column(logits, classes[:, None], "classification"),
        empirical_column(logits, classes, "classification"),
    )


# --------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("logits", "labels", "likelihood", "message"),
    [
        (
            torch.zeros(2, 3),
            torch.zeros(2),
            "poisson",
            r"one of \('classification', 'multilabel', 'regression', 'ordinal'\)",
        ),
        (torch.zeros(2, 1), torch.zeros(2).long(), "classification", "at least 2 .*got 1; one sigmoid logit"),
        (torch.zeros(2, 1), torch.zeros(2).long(), "ordinal", "at least 2 .*got 1"),
        (torch.tensor([[0.0, -math.inf]]), torch.zeros(1).long(), "ordinal", "finite, got -inf"),
        (torch.zeros(2, 3), torch.tensor([0, 3]), "ordinal", r"in \[0, 3\) or be -100 \(ignored\), got 3"),
        (torch.zeros(3), torch.zeros(1), "regression", r"`logits` must be floating point \(\.\.\., C\), got .* \(3,\)"),
        (torch.zeros(2, 3).long(), torch.zeros(2), "regression", "got torch.int64"),
        (torch.tensor([[0.0, math.nan]]), torch.zeros(1).long(), "classification", "finite, got nan"),
        (torch.tensor([[0.0, math.inf]]), torch.zeros(1).long(), "classification", "finite, got inf"),
        (torch.full((1, 2), -math.inf), torch.zeros(1).long(), "classification", "finite, got -inf"),
        (torch.tensor([[-math.inf, math.nan]]), torch.zeros(1, 2), "multilabel", "finite, got nan"),
        (torch.tensor([[-math.inf]]), torch.zeros(1, 1), "regression", "finite, got -inf"),
        (torch.zeros(2, 3), torch.zeros(3).long(), "classification", r"shape \(2,\) .*, got \(3,\)"),
        (torch.zeros(2, 3), torch.zeros(2), "classification", "must be integer classes .*, got torch.float32"),
        (torch.zeros(2, 3), torch.tensor([0, 3]), "classification", r"in \[0, 3\) or be -100 \(ignored\), got 3"),
        (torch.zeros(2, 3), torch.tensor([0, -1]), "classification", "got -1"),
        (torch.zeros(2, 3), torch.zeros(2), "regression", r"shape \(2, 3\) .*, got \(2,\)"),
        (torch.zeros(1, 1), torch.tensor([math.nan]), "regression", "must be finite, got nan"),
        (torch.zeros(1, 2), torch.tensor([[0.0, 2.0]]), "multilabel", r"in \[0, 1\] or -100 \(ignored\), got 2"),
        (torch.zeros(1, 2), torch.tensor([[0.0, math.nan]]), "multilabel", "got nan"),
    ],
)
def test_wrong_logits_and_labels(logits: Tensor, labels: Tensor, likelihood: Likelihood, message: str) -> None:
    for function in (empirical_column, log_likelihood, label_mask):
        with pytest.raises(ValueError, match=message):
            function(logits, labels, likelihood)


def test_wrong_arguments() -> None:
    logits, generator = torch.zeros(2, 3), torch.Generator()
    with pytest.raises(ValueError, match="`likelihood` must be one of"):
        hessian_columns(logits, "poisson")  # on the call, not on the first column
    for number in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="`num_samples` must be an integer >= 1"):
            sampled_columns(logits, "regression", num_samples=number, generator=generator)  # type: ignore[arg-type]
    for noise_std in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="`noise_std` must be finite and > 0"):
            log_likelihood(logits, logits, "regression", noise_std)
    with pytest.raises(ValueError, match="at least 1 output"):
        num_columns(0, "regression")
