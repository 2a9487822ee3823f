"""How tau was chosen is known afterwards, also from a file, and so is when the choice speaks against the posterior."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bayeformers import laplace
from bayeformers.laplace import LaplacePosterior, PrecisionChoice
from bayeformers.laplace.tuning import GRID

torch.manual_seed(0)
X = torch.randn(30, 4)
Y = (X[:, 0] > 0).long()


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))


def fitted(x: torch.Tensor = X, y: torch.Tensor = Y, **options: Any) -> LaplacePosterior:
    return laplace.fit(network(), [(x, y)], progress=False, **options)


@pytest.mark.parametrize(
    ("options", "choice"),
    [
        ({"prior_precision": 2.0}, PrecisionChoice()),
        ({"prior_precision": "marglik"}, PrecisionChoice(method="marglik")),
        ({"prior_precision": "marglik_per_layer"}, PrecisionChoice(method="marglik_per_layer")),
        ({"validation": [(X + 0.1, Y)]}, PrecisionChoice(method="holdout")),
    ],
)
def test_the_method_is_known_and_saved(options: dict[str, Any], choice: PrecisionChoice, tmp_path: Path) -> None:
    posterior = fitted(**options)
    assert posterior.choice.method == choice.method
    posterior.save(tmp_path)
    assert LaplacePosterior.load(tmp_path, posterior.model).choice == posterior.choice
    assert posterior.with_temperature(0.5).choice == posterior.choice
    assert posterior.with_prior_precision(3.0).choice == PrecisionChoice()


@pytest.mark.parametrize(("wrong", "end"), [(True, "largest"), (False, "smallest")])
def test_the_end_of_the_grid_is_known(wrong: bool, end: str, caplog: pytest.LogCaptureFixture) -> None:
    """All labels wrong: the widest posterior is best; one confidently right logit per input: the narrowest."""
    net = nn.Linear(4, 2)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[-9.0, 0, 0, 0], [9.0, 0, 0, 0]]))
    labels = Y if wrong else 1 - Y
    with caplog.at_level(logging.WARNING):
        found = laplace.fit(net, [(X, Y)], validation=[(X, labels)], progress=False)
    assert found.choice == PrecisionChoice(method="holdout", at_grid_end=end)
    assert found.prior_precision == (GRID[-1] if end == "largest" else GRID[0])
    assert f"tau lies at the {end} end of the range that was searched" in found.caveats
    assert "at the end of its grid" in caplog.text


def test_evidence_at_its_bound() -> None:
    """Weights that are all at the prior's mean: the evidence grows with tau for ever."""
    net = nn.Linear(4, 2)
    nn.init.zeros_(net.weight), nn.init.zeros_(net.bias)
    found = laplace.fit(net, [(X, Y)], prior_precision="marglik", progress=False)
    assert found.choice == PrecisionChoice(method="marglik", at_grid_end="largest")


def test_more_effective_parameters_than_data() -> None:
    """Kronecker factors of three examples: 56 weights, more than 3 x 2 numbers, at a small tau."""
    few = fitted(X[:3], Y[:3], prior_precision=1e-9)
    assert few.record.num_outputs == 6
    gamma = sum(few.effective_parameters.values())
    assert gamma > 6 and few.exceeds_data
    assert few.caveats == [f"{gamma:,.0f} effective parameters exceed the 6 numbers that the data hold"]
    assert not few.with_prior_precision(1e6).exceeds_data
    dense = fitted(X[:3], Y[:3], prior_precision=1e-9, curvature="dense", subset="last_layer")
    assert not dense.exceeds_data  # the exact GGN has no more directions than the data


def test_numbers_are_counted_without_labels_that_are_ignored() -> None:
    labels = Y.clone()
    labels[:10] = -100
    assert fitted(y=labels).record.num_outputs == 40
    unlabelled = laplace.fit(network(), [X], progress=False, likelihood="classification")
    assert unlabelled.record.num_outputs == 60
    several = laplace.fit(network(), [(X, torch.stack([Y, 1 - Y], 1).float())], progress=False, likelihood="multilabel")
    assert several.record.num_outputs == 60


def test_a_damaged_choice_is_refused() -> None:
    with pytest.raises(ValueError, match="choice of the prior precision must be one of"):
        PrecisionChoice.from_dict({"method": "guess"})
