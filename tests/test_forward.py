"""Forwards of several tensors, of one mapping and of one list: predicted, fitted and calibrated as one tensor is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from bayeformers import calibrate_delta, predict, to_bayesian
from bayeformers.forward import batch_size, check_inputs, mapped, rows
from bayeformers.laplace import fit
from tests.training import tiny

X = torch.randn(12, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(12) % 3


class Net(nn.Module):
    """One network, whichever way its input comes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).tanh())  # type: ignore[no-any-return]


class Several(Net):
    def forward(self, left: Tensor, right: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(torch.cat([left, right], -1))


class OneMapping(Net):
    def forward(self, batch: dict[str, Tensor]) -> Tensor:  # type: ignore[override]
        return super().forward(torch.cat([batch["left"], batch["right"]], -1))


class OneList(Net):
    def forward(self, parts: list[Tensor]) -> Tensor:  # type: ignore[override]
        return super().forward(torch.cat(parts, -1))


def by_name(x: Tensor) -> dict[str, Tensor]:
    return {"left": x[:, :2], "right": x[:, 2:]}


WAYS: dict[str, tuple[type[Net], Callable[[Tensor], Any]]] = {
    "several": (Several, lambda x: (x[:, :2], x[:, 2:])),
    "several in a list": (Several, lambda x: [x[:, :2], x[:, 2:]]),
    "by name": (Several, by_name),
    "one mapping": (OneMapping, by_name),
    "one list": (OneList, lambda x: [x[:, :2], x[:, 2:]]),
}
each_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


@each_way
@pytest.mark.parametrize("method", ["sample", "glm"])
def test_prediction(way: Any, method: str) -> None:
    build, given = way
    found = predict(to_bayesian(build(), delta=0.3), given(X), num_samples=4, method=method)
    expected = predict(to_bayesian(Net(), delta=0.3), X, num_samples=4, method=method)
    torch.testing.assert_close(found.mean_log_probs, expected.mean_log_probs)


@each_way
@pytest.mark.parametrize("curvature", ["kfac", "ekfac"])
def test_laplace(way: Any, curvature: Any) -> None:
    """Also with the labels inside a mapping, and last in a TensorDataset's row."""
    build, given = way
    options: dict[str, Any] = {"curvature": curvature, "progress": False}
    expected = fit(Net(), [(X[:8], Y[:8]), (X[8:], Y[8:])], **options)
    loaders: list[Any] = [[(given(X[:8]), Y[:8]), (given(X[8:]), Y[8:])]]
    if isinstance(given(X), dict):
        loaders.append([{**given(X[:8]), "labels": Y[:8]}, {**given(X[8:]), "labels": Y[8:]}])
    elif build is Several:
        loaders.append(DataLoader(TensorDataset(X[:, :2], X[:, 2:], Y), batch_size=8))
    for loader in loaders:
        found = fit(build(), loader, **options)
        assert found.log_marginal_likelihood == pytest.approx(expected.log_marginal_likelihood, rel=1e-5)
        torch.testing.assert_close(found.predict(given(X)).probs, expected.predict(X).probs, rtol=1e-4, atol=1e-5)


@each_way
@pytest.mark.parametrize("method", ["sample", "glm"])
def test_calibration(way: Any, method: Any) -> None:
    build, given = way
    options: dict[str, Any] = {"method": method, "num_samples": 2, "progress": False}
    expected = calibrate_delta(Net(), X, Y, **options)
    assert calibrate_delta(build(), [given(X)], [Y], **options) == pytest.approx(expected, rel=1e-4)
    assert calibrate_delta(build(), [(given(X), Y)], **options) == pytest.approx(expected, rel=1e-4)
    if not isinstance(given(X), list):  # of a list it cannot be told from batches
        assert calibrate_delta(build(), given(X), Y, **options) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("inputs", [None, "text", 3, [], (), ["a", "b"], {1, 2}])
def test_what_is_no_batch(inputs: Any) -> None:
    with pytest.raises(TypeError, match="`inputs` must be"):
        check_inputs(inputs)
    with pytest.raises(TypeError, match="`inputs` must be"):
        predict(nn.Linear(6, 3), inputs)


def test_parts_of_nested_inputs() -> None:
    nested = {"a": [X, {"b": Y}], "scale": torch.tensor(2.0), "name": "x"}
    assert batch_size(nested) == 12
    part: Any = rows(nested, slice(0, 5), 12)
    assert len(part["a"][0]) == len(part["a"][1]["b"]) == 5 and part["scale"] == 2 and part["name"] == "x"
    assert torch.equal(mapped((X,), torch.neg)[0], -X)


# -- what is no batch -------------------------------------------------------------------------------------------------

IDS = torch.randint(2, 30, (4, 6), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("method", ["sample", "glm"])
@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        ({"input_ids": IDS.numpy()}, TypeError, r"`inputs\['input_ids'\]` must be a tensor, got nd"),
        ({"input_ids": IDS.tolist()}, TypeError, r"`inputs\['input_ids'\]` must be a tensor, got list"),
        (
            {"input_ids": IDS, "attention_mask": (IDS > 0).long().tolist()},
            TypeError,
            r"`inputs\['attention_mask'\]`",
        ),
        ({"input_ids": IDS.float()}, TypeError, r"`inputs\['input_ids'\]` must hold whole numbers.*got torch.float32"),
        ({"input_ids": IDS[:0]}, ValueError, r"`inputs\['input_ids'\]` has the shape \(0, 6\): the batch is empty"),
    ],
)
def test_entries_that_are_no_tensors_are_named(inputs: Any, error: type[Exception], message: str, method: str) -> None:
    with pytest.raises(error, match=message):
        predict(tiny.bayesian(), inputs, num_samples=2, method=method)


def test_an_empty_tensor_is_named() -> None:
    with pytest.raises(ValueError, match=r"`inputs` has the shape \(0, 6\): the batch is empty"):
        predict(to_bayesian(Net()), X[:0])


def test_what_is_no_tensor_by_right_is_taken() -> None:
    """Switches, names, sizes, nested tensors, images, labels: a forward may have any of them."""
    given: dict[str, Any] = {
        "input_ids": IDS, "scale": 2.0, "return_dict": True, "nothing": None, "name": "bert", "size": (3, 4),
        "image_sizes": [[480, 640]], "parts": [IDS, IDS], "more": {"mask": IDS}, "texts": ["a", "b"], "labels": [0, 1],
        "images": [object()],
    }  # fmt: skip
    assert check_inputs(given) is given
    images = {"images": [object()], "sizes": [[480, 640]]}
    assert check_inputs(images) is images
    model = tiny.bayesian()
    labelled = {"input_ids": IDS, "labels": [0, 1, 2, 0], "output_attentions": False}
    assert predict(model, labelled, num_samples=2).num_samples == 2
