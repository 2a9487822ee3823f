"""Curvature that lives elsewhere than the model: moved to the layer when asked for, and nowhere else.

Without a GPU the layer stands on "meta", whose tensors have a device and no values; the whole path needs CUDA.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from bayeformers.laplace import (
    Curvature,
    CurvatureConfig,
    KroneckerEigen,
    example_gradients,
    fit,
    inner_products,
    natural_gradient,
)
from bayeformers.laplace.accumulate import _near
from bayeformers.laplace.blocks import LaplaceBlock
from bayeformers.laplace.targets import choose_targets
from tests.laplace.networks import QUIET, batches, classes, mlp
from tests.laplace.reference import close, normal

CPU, META = torch.device("cpu"), torch.device("meta")


def block() -> LaplaceBlock:
    """A layer on "meta", its curvature on the CPU."""
    (target,), _ = choose_targets(nn.Linear(3, 2, bias=False, device=META))
    factors = [normal(1, size, size, seed=size) for size in (2, 3)]
    eigen = KroneckerEigen.from_factors(*(f @ f.mT for f in factors))
    return LaplaceBlock(target, eigen, (1.0,))


def test_a_block_gives_what_it_is_asked_for_on_the_layers_device() -> None:
    this = block()
    separable = this.separable(0.1)
    assert this.left is not None and this.right is not None and separable is not None
    given = [this.left, this.right, this.variances(), this.prior_variances(), separable.rows, separable.columns]
    assert {value.device for value in given} == {META}
    assert {value.device for value in (this.eigen.left, this.eigen.right, this.eigen.eigenvalues)} == {CPU}  # type: ignore[union-attr]
    assert {kept.rows.device for kept in this._known.values() if kept} == {CPU}


def test_a_second_pass_moves_one_basis_at_a_time() -> None:
    this = block()
    target = replace(this.target, left=this.eigen.left, right=this.eigen.right)
    near = _near(target)
    assert near.left is not None and near.left.device == META and target.left.device == CPU  # type: ignore[union-attr]


def test_sums_stay_where_they_are() -> None:
    sums = Curvature(CurvatureConfig(), {"head": {"gradients": torch.empty(2, device=META)}}, num_examples=1)
    sums.add("head", "gradients", torch.ones(2))
    assert sums.sums["head"]["gradients"].device == META
    sums.add("head", "inputs", torch.ones(2), META)
    assert sums.sums["head"]["inputs"].device == META


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("curvature", ["kfac", "ekfac", "diagonal", "dense"])
def test_curvature_on_the_cpu_of_a_model_on_the_gpu(curvature: str) -> None:
    model, x, y = mlp(), normal(8, 4), classes(8)
    options = {"curvature": curvature, "prior_precision": 1.0, **QUIET}
    expected = fit(copy.deepcopy(model), batches(x, y), **options)
    found = fit(model.cuda(), batches(x, y), device="cpu", **options)
    assert {eigen.eigenvalues.device for eigen in found.layers.values()} == {CPU}
    close(found.linearize(x.cuda())[1].cpu(), expected.linearize(x)[1], 1e-9)
    pairs = [inner_products(p, *[example_gradients(p, x, y)] * 2).cpu() for p in (found, expected)]
    close(*pairs, 1e-9)
    with found.draw(0):
        assert bool(model(x.cuda()).isfinite().all())
    steps = natural_gradient(found, {p: torch.ones_like(p) for p in model.parameters()})
    assert {value.device.type for value in (*steps.values(), *found.variances().values())} == {"cuda"}
