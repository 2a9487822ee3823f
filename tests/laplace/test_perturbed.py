"""tau by perturbed training rows: what is perturbed, the cautious choice, and the NLL by dense Jacobians in float64."""

import logging
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bayeformers import laplace
from bayeformers.laplace import LaplacePosterior, PrecisionChoice, TokenMask
from bayeformers.laplace.data import Batch, prepare
from bayeformers.laplace.perturbed import cautious_precision, is_perturbable, perturbed_rows
from bayeformers.laplace.tuning import GRID, row_nll
from tests.laplace.networks import QUIET, batches, classes, mlp, reader, text
from tests.laplace.reference import close, dense, jacobian, normal

CPU = torch.device("cpu")
X, Y = normal(40, 4, seed=1), classes(40, outputs=2)
MASK = TokenMask(mask_token_id=6, kept=(0, 6))


def rows(model: nn.Module, *data: Any) -> list[Batch]:
    return [prepare(model, batch, CPU) for batch in data]


def network(scale: float = 1.0) -> nn.Module:
    """Two classes; a large ``scale`` of its head makes it certain of what it says."""
    model = mlp(outputs=2)
    with torch.no_grad():
        model[-1].weight.mul_(scale)  # type: ignore[index, union-attr, operator]
    return model


# -------------------------------------------------------------------------------------------------- what is perturbed


def test_words_are_masked() -> None:
    model, ids = reader(), torch.randint(0, 6, (400, 12), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(12) < torch.randint(1, 13, (400, 1), generator=torch.Generator().manual_seed(1))).long()
    inputs = {"input_ids": ids, "attention_mask": mask}
    (found,) = perturbed_rows(rows(model, {**inputs, "labels": classes(400)}), MASK)
    changed = found.inputs["input_ids"] != ids  # type: ignore[call-overload]
    words = (ids != 0) & mask.bool()
    assert not changed[~words].any()
    assert set(found.inputs["input_ids"][changed].tolist()) == {6}  # type: ignore[call-overload]
    share, count = float(changed[words].double().mean()), int(words.sum())
    assert share == pytest.approx(0.15, abs=4 * (0.15 * 0.85 / count) ** 0.5)  # four standard deviations of a binomial
    halves = [{name: value[half] for name, value in inputs.items()} for half in (slice(7), slice(7, 400))]
    again = perturbed_rows(rows(model, *halves), MASK)
    assert torch.equal(torch.cat([b.inputs["input_ids"] for b in again]), found.inputs["input_ids"])  # type: ignore[call-overload]


def test_words_of_several_choices_are_masked() -> None:
    """As (B, choices, T) of multiple choice, each row as the same words in one line."""
    ids = torch.randint(0, 6, (50, 4, 12), generator=torch.Generator().manual_seed(0))
    for given in (ids, ids.mT):
        (found,) = perturbed_rows([Batch({"input_ids": given})], MASK)
        (flat,) = perturbed_rows([Batch({"input_ids": given.flatten(1)})], MASK)
        assert torch.equal(found.inputs["input_ids"].flatten(1), flat.inputs["input_ids"])  # type: ignore[call-overload]
        assert bool((found.inputs["input_ids"] == 6).any())  # type: ignore[call-overload]


def test_masks_of_floating_point_numbers_stay() -> None:
    mask = (torch.arange(8) < torch.randint(1, 9, (30, 1), generator=torch.Generator().manual_seed(1))).double()
    given = {"attention_mask": mask, "inputs_embeds": normal(30, 8, 2)}
    (found,) = perturbed_rows([Batch(given, Y[:30])], None)
    assert list(found.inputs) == list(given)
    assert torch.equal(found.inputs["attention_mask"], mask)  # type: ignore[call-overload]
    assert not torch.equal(found.inputs["inputs_embeds"], given["inputs_embeds"])  # type: ignore[call-overload]
    words = {"tokens": torch.ones(30, 8, dtype=torch.long), "attention_mask": mask}
    assert not is_perturbable(Batch(words, Y[:30]), "classification", None)


def test_one_row_has_no_standard_error() -> None:
    assert cautious_precision(np.array([[0.5], [0.1], [0.9]]), [1.0, 10.0, 100.0]) == 100.0


def test_values_are_exchanged() -> None:
    given = torch.arange(4000.0).view(400, 10)
    one, other = given[:150].clone(), given[150:].clone()
    first, second = perturbed_rows(rows(nn.Linear(10, 2), one, other), None)
    found = torch.cat([first.inputs, second.inputs])  # type: ignore[list-item]
    assert torch.equal(torch.cat([one, other]), given)
    changed = found != given
    assert torch.equal(found[changed], given.roll(1, 0)[changed])
    assert float(changed.double().mean()) == pytest.approx(0.15, abs=4 * (0.15 * 0.85 / 4000) ** 0.5)


def test_rows_of_unlike_shapes_are_exchanged_within_their_batch() -> None:
    long, short, alone = torch.ones(1, 1) * torch.arange(6.0)[:, None].expand(6, 9), torch.ones(4, 3), torch.ones(1, 5)
    found = perturbed_rows(rows(nn.Linear(1, 1), long.clone(), short, alone), None)
    assert [batch.inputs.shape for batch in found] == [(6, 9), (4, 3), (1, 5)]  # type: ignore[union-attr]
    assert not torch.equal(found[0].inputs, long) and torch.equal(found[2].inputs, alone)  # type: ignore[arg-type]


def test_integers_in_a_mapping_stay() -> None:
    """Of several inputs by name the values alone are exchanged; a number a row is a label or a length as often."""
    given = {"pixels": normal(30, 8), "kind": torch.arange(30), "age": normal(30)}
    (found,) = perturbed_rows([Batch(given, Y[:30])], None)
    assert isinstance(found.inputs, dict)
    assert not torch.equal(found.inputs["pixels"], given["pixels"])
    assert torch.equal(found.inputs["kind"], given["kind"]) and torch.equal(found.inputs["age"], given["age"])


@pytest.mark.parametrize(
    ("batch", "likelihood", "mask", "expected"),
    [
        (Batch(X, Y), "classification", None, True),
        (Batch(X, None), "classification", None, False),
        (Batch(X, Y), "regression", None, False),
        (Batch(X, Y[:, None].expand(40, 3)), "classification", None, False),
        (Batch(X[:, 0], Y), "classification", None, False),
        (Batch(text(), classes(6)), "classification", None, False),
        (Batch(text(), classes(6)), "classification", MASK, True),
    ],
)
def test_which_rows_can_be(batch: Batch, likelihood: str, mask: TokenMask | None, expected: bool) -> None:
    assert is_perturbable(batch, likelihood, mask) is expected


# ----------------------------------------------------------------------------------------------------------- the choice


@pytest.mark.parametrize("seed", range(5))
def test_the_cautious_choice_by_hand(seed: int) -> None:
    """By a loop over tau and the textbook's standard error of a mean of paired differences."""
    draw = np.random.default_rng(seed)
    grid, nll = [1.0, 10.0, 100.0, 1000.0], draw.exponential(size=(4, 30))
    best = min(range(4), key=lambda i: sum(nll[i]))
    expected = grid[best]
    for i in range(4):
        changes = [a - b for a, b in zip(nll[i], nll[best], strict=True)]
        mean = sum(changes) / 30
        error = (sum((one - mean) ** 2 for one in changes) / 30) ** 0.5 / 30**0.5
        if mean <= error:
            expected = max(expected, grid[i])
    assert cautious_precision(nll, grid) == expected


def brute_force(posterior: LaplacePosterior, x: Tensor, labels: Tensor, tau: float) -> Tensor:
    """-log of the probit's mean probability, the logits' covariance by dense Jacobians and inverses."""
    variance = torch.zeros(len(x), dtype=torch.float64)
    for layer, eigen in posterior.layers.items():
        precision = dense(eigen) + tau * torch.eye(len(dense(eigen)), dtype=torch.float64)
        one, other = torch.stack(jacobian(posterior.model, layer, x)).flatten(2).unbind(1)
        variance += torch.einsum("bp,pq,bq->b", other - one, torch.linalg.inv(precision), other - one)
    logits = posterior.model(x).detach()
    margin = (logits[:, 1] - logits[:, 0]) / (1 + torch.pi * variance / 8).sqrt()
    return -nn.functional.logsigmoid(torch.where(labels == 1, margin, -margin))


def test_nll_of_rows_is_by_dense_jacobians() -> None:
    posterior, taus = laplace.fit(network(), batches(X, Y), prior_precision=1.0, **QUIET), (0.01, 1.0, 30.0)
    (batch,) = rows(posterior.model, (X, Y))
    found = row_nll(posterior, batch, taus)
    close(found, torch.stack([brute_force(posterior, X, Y, tau) for tau in taus]))


def test_the_posterior_has_the_tau_of_the_rule() -> None:
    """By brute force over the grid; a network that is certain of random labels needs much variance."""
    posterior = laplace.fit(network(8.0), batches(X, Y), **QUIET)
    bound = laplace.tune(posterior, "leverage", training=batches(X, Y), **QUIET).prior_precision
    assert isinstance(bound, float)
    grid = [bound, *(tau for tau in GRID if tau > bound)]
    (changed,) = perturbed_rows(rows(posterior.model, (X, Y)), None)
    assert isinstance(changed.inputs, Tensor)
    nll = torch.stack([brute_force(posterior, changed.inputs, Y, tau) for tau in grid]).numpy()
    assert posterior.prior_precision == pytest.approx(cautious_precision(nll, grid))
    assert posterior.choice == PrecisionChoice(method="perturbed", num_rows=40)
    again = laplace.tune(posterior, "perturbed", training=batches(X, Y, 15, 25), **QUIET)  # batches have no say
    assert again.prior_precision == posterior.prior_precision


def test_an_unsure_network_keeps_its_predictions() -> None:
    """Labels as likely as the network says, logits near 0: noise makes no row's NLL smaller."""
    model = network(0.3)
    labels = torch.distributions.Categorical(logits=3 * model(X).detach()).probs.argmax(-1)  # type: ignore[no-untyped-call]
    found = laplace.fit(model, batches(X, labels), **QUIET)
    assert found.choice == PrecisionChoice(method="perturbed", at_grid_end="largest", num_rows=40)
    assert found.prior_precision == GRID[-1]
    assert any("stays next to the trained network" in caveat for caveat in found.caveats)


# ------------------------------------------------------------------------------------------------ where nothing is said


def test_masked_words_choose_where_a_mask_is_given(caplog: pytest.LogCaptureFixture) -> None:
    data = batches(text(30), classes(30))
    with caplog.at_level(logging.WARNING):
        assert laplace.fit(reader(), data, token_mask=MASK, **QUIET).choice.method == "perturbed"
        assert laplace.fit(reader(), data, **QUIET).choice.method == "leverage"


def test_the_rest_has_the_leverages() -> None:
    assert laplace.fit(mlp(outputs=2), batches(X), **QUIET).choice.method == "leverage"  # no labels
    assert laplace.fit(mlp(outputs=2), batches(X, normal(40, 2)), likelihood="regression", **QUIET).choice.method == (
        "leverage"
    )


def test_rows_without_a_label_are_left_out() -> None:
    labels = Y.clone()
    labels[::2] = -100
    assert laplace.fit(network(), batches(X, labels), **QUIET).choice.num_rows == 20


def test_bad_input_is_refused() -> None:
    posterior = laplace.fit(network(), batches(X, Y), prior_precision=1.0, **QUIET)
    with pytest.raises(ValueError, match='"perturbed" needs `training`: the data of the fit'):
        laplace.tune(posterior, "perturbed", **QUIET)
    for data in (batches(X), []):
        with pytest.raises(ValueError, match='"perturbed" needs training rows of a classification with one label'):
            laplace.tune(posterior, "perturbed", training=data, **QUIET)
    with pytest.raises(ValueError, match='a `token_mask` .* use "leverage"'):
        laplace.fit(reader(), batches(text(), classes(6)), prior_precision="perturbed", **QUIET)


@pytest.mark.parametrize(
    ("mask", "kind", "told"),
    [
        (lambda: {"mask_token_id": 6}, TypeError, "`token_mask` must be a `laplace.TokenMask`, got dict"),
        (lambda: TokenMask(mask_token_id=10**6), ValueError, "beyond the model's vocabulary"),
        (lambda: TokenMask(mask_token_id=-1), ValueError, "`mask_token_id` must be the ids of tokens"),
        (lambda: TokenMask(mask_token_id=6, kept=["[CLS]"]), ValueError, "`kept` must be the ids"),  # type: ignore[list-item]
    ],
)
def test_a_wrong_mask_is_refused_before_the_fit(mask: Any, kind: type[Exception], told: str) -> None:
    model = reader()
    vars(model)["get_input_embeddings"] = lambda: nn.Embedding(7, 2)  # as of a transformers model
    with pytest.raises(kind, match=told):
        laplace.fit(model, [text()], token_mask=mask(), progress=False)
