"""`summary`: each distinct tensor once, the reasons for what was skipped, coverage, scale and KL."""

from __future__ import annotations

import pytest
import torch

from bayeformers import NormalPrior, kl_divergence, summary, to_bayesian
from tests.cases import CASES, Case, case


@pytest.mark.protects("sizes_count_weights")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_counts(case: Case) -> None:
    """Distinct weights of the expected layers over all distinct weights of the original."""
    original = case.build()
    random = {id(p): p for p in map(original.get_parameter, case.tensors(original))}.values()
    bayesian = [p.numel() for p in random]
    found = summary(to_bayesian(case.build(), delta=0.1))
    assert found.bayesian_parameters == sum(bayesian)
    assert found.total_parameters == sum(p.numel() for p in original.parameters())
    matrices = [p.numel() for p in original.parameters() if p.dim() > 1]
    assert found.bayesian_matrix_parameters == sum(p.numel() for p in random if p.dim() > 1) == sum(matrices)
    assert found.total_matrix_parameters == sum(matrices) and found.matrix_coverage == 1.0
    assert found.coverage == found.bayesian_parameters / found.total_parameters
    assert len(found.tensors) == len(bayesian)
    for tensor in found.tensors:  # an all-zero tensor has no relative scale; none here
        assert tensor.relative_scale == pytest.approx(0.1, rel=1e-3)
        assert original.get_parameter(tensor.name).shape == tensor.shape


def test_kl_is_the_models() -> None:
    model = to_bayesian(case("bart-lm").build(), prior=NormalPrior(0.5, 0.0))
    assert summary(model).kl == pytest.approx(float(kl_divergence(model).detach()), rel=1e-5)


def test_text() -> None:
    """The table names every tensor and says in words what stayed deterministic."""
    model = to_bayesian(case("bert").build(), exclude_modules=["classifier"])
    found = summary(model)
    text = str(found)
    assert all(tensor.name in text for tensor in found.tensors)
    assert "in exclude_modules" in text and "a normalisation: `norms=True` converts it" in text and "%" in text
    assert found.skipped["classifier"] == "in exclude_modules"


def test_zero_tensor() -> None:
    model = to_bayesian(torch.nn.Linear(2, 2))
    with torch.no_grad():
        model.bias.zero_()
    assert {t.name: t.relative_scale for t in summary(model).tensors}["bias"] == float("inf")
    assert all(t.kl >= -1e-6 for t in summary(model).tensors)
