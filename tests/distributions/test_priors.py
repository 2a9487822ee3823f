"""What a prior's name becomes for one tensor, its JSON form, and what it refuses."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from bayeformers.distributions import (
    ARDNormal,
    ARDPrior,
    DiagonalNormal,
    DoubleExponential,
    DoubleExponentialPrior,
    EmpiricalBayesPrior,
    EmpiricalNormal,
    InitialScale,
    LogUniform,
    LogUniformPrior,
    MopedPrior,
    NormalPrior,
    PosteriorPrior,
    Prior,
    ScaleMixture,
    ScaleMixturePrior,
    initial_scale,
    prior_from_dict,
)
from tests.reference import moped_sigma

PRIORS: list[Prior] = [
    MopedPrior(),
    MopedPrior(relative_scale=2.5),
    NormalPrior(),
    NormalPrior(std=0.3, centre=-0.5),
    ScaleMixturePrior(pi=0.2, std1=0.5, std2=0.01),
    ScaleMixturePrior(quadrature=9),
    EmpiricalBayesPrior(),
    EmpiricalBayesPrior(centre=0.0),
    EmpiricalBayesPrior(per="layer"),
    DoubleExponentialPrior(),
    DoubleExponentialPrior(scale=0.1, centre=-0.2),
    LogUniformPrior(),
    ARDPrior(),
    PosteriorPrior(),
    PosteriorPrior(fresh=["classifier.weight"], relative_scale=2.0),
]


@pytest.mark.protects("prior_is_saved")
@pytest.mark.parametrize("prior", PRIORS, ids=repr)
def test_prior_is_saved(prior: Prior) -> None:
    """prior_is_saved: JSON and back is the same prior; keys of newer versions are ignored."""
    data = json.loads(json.dumps(prior.to_dict()))
    assert prior_from_dict(data) == prior
    assert prior_from_dict({**data, "from_the_future": 1}) == prior


@pytest.mark.parametrize("shape", [(7,), (5, 4), (3, 2, 2), (1,)])
@pytest.mark.parametrize("delta", [0.05, 1.0, 3.0])
def test_initial_scale_matches_reference(shape: tuple[int, ...], delta: float) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weight.view(-1)[0] *= 1e-4
    torch.testing.assert_close(initial_scale(weight, delta), moped_sigma(weight, delta), rtol=1e-12, atol=0)
    torch.testing.assert_close(
        initial_scale(weight.float(), delta).double(), moped_sigma(weight, delta), rtol=1e-5, atol=0
    )


@pytest.mark.protects("zero_weights")
def test_zero_weights() -> None:
    """zero_weights: pruned zeros get delta * 0.1 mean|w|, an all-zero tensor delta * 0.02; never 0.69, never 1e-20."""
    pruned = torch.tensor([0.0, 3.0, 0.0, -1.0])
    torch.testing.assert_close(initial_scale(pruned, 0.2), torch.tensor([0.02, 0.6, 0.02, 0.2]))
    torch.testing.assert_close(initial_scale(torch.zeros(3), 0.2), torch.full((3,), 0.004))
    assert initial_scale(torch.zeros(0), 0.2).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_initial_scale_of_half_precision_is_float32(dtype: torch.dtype) -> None:
    """A float16 sum over 100,000 weights would overflow."""
    weight = torch.full((1000, 100), 3.0, dtype=dtype)
    scale = initial_scale(weight, 0.1)
    assert scale.dtype == torch.float32
    torch.testing.assert_close(scale, torch.full((1000, 100), 0.3))


def test_padding_row_plays_no_part() -> None:
    """The floor comes from the other rows, whatever the padding row holds: huge, or the only one that is not zero."""
    for rest in (torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), torch.zeros(4, 3)):
        for value in (0.0, 1e4, 1.234567):
            table = torch.cat([rest[:2], torch.full((1, 3), value), rest[2:]])
            found = InitialScale.of(table, 0.1, padding_idx=2)(rest)
            torch.testing.assert_close(found.double(), moped_sigma(rest, 0.1), rtol=1e-5, atol=0)


def test_densities() -> None:
    """moped_sets_prior: centre at the trained weight, scale r sigma_0; the others as they are named."""
    weight = torch.tensor([1.0, -2.0, 0.0])
    rule = InitialScale.of(weight, 0.1)
    moped = MopedPrior(relative_scale=3.0).for_tensor(weight, rule)
    assert isinstance(moped, DiagonalNormal) and torch.equal(moped.loc, weight)
    torch.testing.assert_close(moped.scale.double(), 3 * moped_sigma(weight, 0.1), rtol=1e-6, atol=0)
    normal = NormalPrior(std=0.5, centre=-1.0).for_tensor(weight, rule)
    assert (float(normal.loc), float(normal.scale)) == (-1.0, 0.5)
    assert torch.equal(NormalPrior().for_tensor(weight, rule).loc, weight)
    assert ScaleMixturePrior(0.2, 0.5, 0.1).for_tensor(weight, rule) == ScaleMixture(0.2, 0.5, 0.1, None)
    empirical = EmpiricalBayesPrior().for_tensor(weight, rule)
    assert isinstance(empirical, EmpiricalNormal) and torch.equal(empirical.loc, weight)
    assert EmpiricalBayesPrior(per="layer").for_tensor(weight, rule).per == "layer"
    double = DoubleExponentialPrior(0.5).for_tensor(weight, rule)
    assert isinstance(double, DoubleExponential) and torch.equal(double.loc, weight) and float(double.scale) == 0.5
    assert float(DoubleExponentialPrior(centre=-1.0).for_tensor(weight, rule).loc) == -1.0
    assert LogUniformPrior().for_tensor(weight, rule) == LogUniform()
    assert ARDPrior().for_tensor(weight, rule) == ARDNormal()


def test_which_priors_need_the_trained_weight() -> None:
    needing = [MopedPrior(), NormalPrior(), EmpiricalBayesPrior(), DoubleExponentialPrior(), PosteriorPrior()]
    others = [NormalPrior(centre=0.0), EmpiricalBayesPrior(centre=1.0), ScaleMixturePrior()]
    others += [DoubleExponentialPrior(centre=0.0), LogUniformPrior(), ARDPrior()]
    assert all(prior.needs_centre for prior in needing) and not any(prior.needs_centre for prior in others)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("make", "arguments", "named"),
    [
        *((MopedPrior, {"relative_scale": v}, "relative_scale") for v in (0, -1.0, NAN, INF, "1", True, None)),
        *((NormalPrior, {"std": v}, "std") for v in (0.0, -0.1, NAN, INF, "wide", False, None)),
        *((NormalPrior, {"centre": v}, "centre") for v in (NAN, INF, "zero", True, None)),
        *((EmpiricalBayesPrior, {"centre": v}, "centre") for v in (NAN, -INF, "w0", None)),
        *((EmpiricalBayesPrior, {"per": v}, "per") for v in ("network", "Tensor", None, 2)),
        *((DoubleExponentialPrior, {"scale": v}, "scale") for v in (0, -0.1, NAN, INF, "wide", True, None)),
        *((DoubleExponentialPrior, {"centre": v}, "centre") for v in (NAN, INF, "zero", True, None)),
        *((PosteriorPrior, {"fresh": v}, "fresh") for v in ("classifier.weight", [1], [None])),
        *((PosteriorPrior, {"relative_scale": v}, "relative_scale") for v in (0, -1.0, NAN, "1", True, None)),
        *((ScaleMixturePrior, {"pi": v}, "pi") for v in (0, 1, -0.1, 1.5, NAN, "half", True)),
        *((ScaleMixturePrior, {"std1": v}, "std1") for v in (0, -1, NAN, INF)),
        *((ScaleMixturePrior, {"std2": v}, "std2") for v in (0, -1, NAN, INF)),
        *((ScaleMixturePrior, {"quadrature": v}, "quadrature") for v in (0, -3, 2.5, "many", True)),
    ],
)
def test_bad_arguments(make: Any, arguments: dict[str, Any], named: str) -> None:
    """The error names the argument and the value."""
    with pytest.raises((ValueError, TypeError)) as error:
        make(**arguments)
    assert f"`{named}`" in str(error.value) and repr(arguments[named]) in str(error.value)


@pytest.mark.parametrize("data", [{}, {"type": "flat"}, {"type": None}, {"std": 1.0}])
def test_unknown_type_is_an_error(data: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"`prior` has unknown type.*moped"):
        prior_from_dict(data)
