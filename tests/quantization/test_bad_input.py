"""Wrong input to INT8: one clear error that names the argument."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from bayeformers import to_bayesian
from bayeformers.quantization import load, quantize
from tests.quantization.networks import bert, images, mlp, sentences

NAN, INF = float("nan"), float("inf")


def converted() -> nn.Module:
    return to_bayesian(mlp(), delta=0.1)


def with_weight(value: float) -> nn.Module:
    model = mlp()
    with torch.no_grad():
        model[2].weight[1, 1] = value
    return model


def with_rho(value: float) -> nn.Module:
    model = converted()
    with torch.no_grad():
        model[2].weight_rho[1, 1] = value
    return model


X = images(4, 8)
CASES: list[tuple[Callable[[], Any], Any, dict[str, Any], type[Exception], str]] = [
    (lambda: "model", X, {}, TypeError, "model_or_posterior"),
    (lambda: None, X, {}, TypeError, "model_or_posterior"),
    (lambda: quantize(converted(), X), X, {}, TypeError, "`posterior`.*QuantizedPosterior"),
    (lambda: with_weight(NAN), X, {}, ValueError, "'2.weight'.*not finite"),
    (lambda: with_weight(INF), X, {}, ValueError, "'2.weight'.*not finite"),
    (lambda: with_rho(NAN), X, {}, ValueError, "scale of '2.weight'.*not finite"),
    (lambda: nn.Sequential(nn.LSTM(8, 3)), X, {}, ValueError, "no layer for INT8.*LSTM"),
    (lambda: nn.Sequential(nn.ReLU()), X, {}, ValueError, "no layer for INT8"),
    (converted, [], {}, ValueError, "`calibration_inputs` is empty"),
    (converted, iter([]), {}, ValueError, "`calibration_inputs` is empty"),
    (converted, None, {}, TypeError, "`calibration_inputs`.*NoneType"),
    (converted, 5, {}, TypeError, "`calibration_inputs`.*int"),
    (converted, "words", {}, TypeError, "`calibration_inputs`.*str"),
    (converted, [(X, X)], {}, TypeError, "`calibration_inputs`.*tuple"),
    *((converted, X, {"arithmetic": v}, ValueError, "`arithmetic`.*'auto'") for v in ("int4", "", None, 8)),
    *((converted, X, {"max_error": v}, ValueError, "`max_error`") for v in (0, -0.1, NAN, INF, "0.1", True, None)),
    *((converted, X, {"max_noise": v}, ValueError, "`max_noise`") for v in (0.0, -1, NAN, INF, "x", False, [0.3])),
    (converted, X, {"exclude_modules": ["layers.7"]}, ValueError, "`exclude_modules`.*layers.7"),
    (converted, X, {"exclude_modules": ["0", "2"]}, ValueError, "no layer for INT8"),
]


@pytest.mark.parametrize(("make", "inputs", "options", "error", "message"), CASES)
def test_quantize(
    make: Callable[[], Any], inputs: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        quantize(make(), inputs, **options)


@pytest.mark.parametrize(
    ("index", "seed", "error"), [(-1, 0, ValueError), (0.0, 0, TypeError), (0, "0", TypeError), (True, 0, TypeError)]
)
def test_draw(index: Any, seed: Any, error: type[Exception]) -> None:
    small = quantize(converted(), X)
    with pytest.raises(error, match="`index`|`seed`"), small.draw(index, seed):
        pass


def test_point_estimate_has_one_draw() -> None:
    small = quantize(mlp(), X)
    with pytest.raises(ValueError, match="`index` must be in 0..0"), small.draw(1):
        pass


@pytest.mark.parametrize("num_samples", [0, -1, 2.0, True])
def test_predict(num_samples: Any) -> None:
    with pytest.raises(ValueError, match="`num_samples`"):
        quantize(converted(), X).predict(X, num_samples=num_samples)


def test_cache_of_keys_and_values() -> None:
    with pytest.raises(ValueError, match="past_key_values"):
        quantize(to_bayesian(bert(), delta=0.1), {**sentences(), "past_key_values": (1,)})


def test_model_to_load_into(tmp_path: Any) -> None:
    quantize(converted(), X).save(tmp_path)
    with pytest.raises(TypeError, match="`model`.*str"):
        load(tmp_path, "mlp")  # type: ignore[arg-type]


def test_failure_leaves_the_model_alone() -> None:
    model = with_rho(NAN)
    kinds, state = [type(module) for module in model.modules()], list(model.state_dict())
    with pytest.raises(ValueError, match="finite"):
        quantize(model, X)
    assert [type(module) for module in model.modules()] == kinds and list(model.state_dict()) == state
    assert not any(module._forward_hooks for module in model[0].modules())
