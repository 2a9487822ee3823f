"""`DiagonalPosterior` and `IVONPosterior`: moments of the draws, files, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bayeformers.optim import IVON
from bayeformers.posteriors import DiagonalPosterior, IVONPosterior


def linear(dtype: torch.dtype = torch.float64) -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(3, 2).to(dtype)


def scales(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    return {"weight": torch.tensor([[0.1, 0.0, 0.3], [0.4, 0.5, 0.6]], dtype=dtype), "bias": torch.ones(2, dtype=dtype)}


def test_draws_have_the_mean_and_the_scale() -> None:
    """n = 1,500 draws: a mean's standard error is s / sqrt(n), a variance's s^2 sqrt(2 / n); five of each."""
    model, n = linear(), 1_500
    posterior, drawn = DiagonalPosterior(model, scales()), []
    for index in range(n):
        with posterior.draw(index, seed=2):
            drawn.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    expected = torch.cat([scales()[name].flatten() for name, _ in model.named_parameters()])
    mean = torch.cat([p.detach().flatten() for p in model.parameters()])
    draws = torch.stack(drawn)
    assert bool(((draws.mean(0) - mean).abs() <= 5 * expected / n**0.5).all())
    assert bool(((draws.var(0) - expected.square()).abs() <= 5 * expected.square() * (2 / n) ** 0.5 + 1e-30).all())


def test_linearised_prediction_is_exact_for_a_linear_model() -> None:
    """Logit c has variance sum_i x_i^2 s_ci^2 + s_c^2, and the two are independent."""
    model, x = linear(), torch.randn(5, 3, dtype=torch.float64)
    posterior = DiagonalPosterior(model, scales())
    mean, covariance = posterior.linearize(x)
    variance = x.square() @ scales()["weight"].square().T + scales()["bias"].square()
    torch.testing.assert_close(mean, model(x).detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(covariance, torch.diag_embed(variance), rtol=1e-10, atol=1e-12)


def test_predictions_leave_the_model_alone_and_agree_with_draws() -> None:
    model, x = linear(torch.float32), torch.randn(5, 3)
    posterior = DiagonalPosterior(model, {"bias": torch.ones(2)})
    before = model.bias.detach().clone()
    predictive = posterior.predict(x, num_samples=3, seed=4)
    for index in range(3):
        with posterior.draw(index, seed=4):
            assert torch.equal(predictive.log_probs[index], model(x).detach().log_softmax(-1))
    assert torch.equal(model.bias, before)


@pytest.mark.parametrize("kind", [DiagonalPosterior, IVONPosterior])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_reload_has_the_same_bits(kind: type[DiagonalPosterior], dtype: torch.dtype, tmp_path: Path) -> None:
    model = linear(dtype)
    posterior = kind(model, scales(torch.promote_types(dtype, torch.float32)))
    posterior.save(tmp_path)
    for path in (tmp_path, tmp_path / str(kind.file_name)):
        again = kind.load(path, model)
        assert type(again) is kind
        assert all(torch.equal(value, again.scales[name]) for name, value in posterior.scales.items())
        with posterior.draw(3, seed=1):
            expected = model.weight.detach().clone()
        with again.draw(3, seed=1):
            assert torch.equal(model.weight, expected)


def test_a_model_in_another_precision_is_recognised(tmp_path: Path) -> None:
    model = linear(torch.float32)
    DiagonalPosterior(model, scales(torch.float32)).save(tmp_path)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        DiagonalPosterior.load(tmp_path, linear(torch.float32).to(dtype))
    with torch.no_grad():
        model.bias[0] += 1
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        with pytest.raises(ValueError, match="other weights"):
            DiagonalPosterior.load(tmp_path, model.to(dtype))


def test_weights_that_moved_are_not_saved(tmp_path: Path) -> None:
    model = linear()
    posterior = DiagonalPosterior(model, scales())
    assert posterior.is_of_present_weights()
    with posterior.draw(0), pytest.raises(ValueError, match="have moved"):
        posterior.save(tmp_path)
    posterior.save(tmp_path)


def test_of_an_optimizer() -> None:
    model = linear()
    model.bias.requires_grad_(False)
    optimizer = IVON(model.parameters(), ess=100, hess_init=0.5, weight_decay=0.1)
    posterior = IVONPosterior.from_optimizer(model, optimizer)
    assert list(posterior.scales) == ["weight"]
    torch.testing.assert_close(posterior.scales["weight"], torch.full((2, 3), 1 / 60**0.5, dtype=torch.float64))


@pytest.mark.parametrize(
    ("given", "error", "told"),
    [
        ([1.0], TypeError, "`scales`"),
        ({}, ValueError, "empty"),
        ({"weight": 0.1}, TypeError, "`scales`"),
        ({"strange": torch.ones(2)}, ValueError, "'strange'"),
        ({"bias": torch.ones(3)}, ValueError, "shape"),
        ({"bias": torch.tensor([1.0, -1.0])}, ValueError, "finite numbers >= 0"),
        ({"bias": torch.tensor([1.0, float("nan")])}, ValueError, "finite numbers >= 0"),
        ({"bias": torch.ones(2, dtype=torch.int64)}, ValueError, "finite numbers >= 0"),
    ],
)
def test_bad_scales(given: Any, error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=told):
        DiagonalPosterior(linear(), given)


def test_bad_uses(tmp_path: Path) -> None:
    posterior = DiagonalPosterior(linear(), scales())
    with pytest.raises(TypeError, match="`model`"):
        DiagonalPosterior("model", scales())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`index`"), posterior.draw(-1):
        pass
    with pytest.raises(ValueError, match="no diagonal file"):
        DiagonalPosterior.load(tmp_path, linear())
    posterior.save(tmp_path)
    with pytest.raises(TypeError, match="`model`"):
        DiagonalPosterior.load(tmp_path, None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'diagonal'"):
        IVONPosterior.load(tmp_path / "diagonal.safetensors", linear())
    with pytest.raises(ValueError, match="other weights"):
        DiagonalPosterior.load(tmp_path, nn.Linear(3, 2, bias=False).double())


def test_bad_optimizers() -> None:
    model = linear()
    with pytest.raises(TypeError, match="`optimizer`"):
        IVONPosterior.from_optimizer(model, torch.optim.SGD(model.parameters()))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="`model`"):
        IVONPosterior.from_optimizer(None, IVON(model.parameters(), ess=1))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`ess`"):
        IVONPosterior.from_optimizer(model, IVON(model.parameters()))
    with pytest.raises(ValueError, match="does not have"):
        IVONPosterior.from_optimizer(model, IVON(linear().parameters(), ess=1))
