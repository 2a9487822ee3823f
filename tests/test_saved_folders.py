"""Folders that an earlier commit saved (`tests/data/make_saved.py`) load, and give the same draws bit for bit."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import BertForSequenceClassification

from bayeformers import LaplacePosterior, from_pretrained, predict, quantization
from tests.data.make_saved import CONVERTED, DRAWS, INPUTS, SEED, drawn_weights

SAVED = Path(__file__).parent / "data" / "saved"


def expected(name: str) -> dict[str, Tensor]:
    return load_file(SAVED / name / "expected.safetensors")


def assert_same_bits(now: dict[str, Tensor], then: dict[str, Tensor]) -> None:
    assert now.keys() == then.keys()
    for name, value in then.items():
        assert torch.equal(now[name], value), name


@pytest.mark.parametrize("name", CONVERTED)
def test_converted(name: str) -> None:
    model = from_pretrained(SAVED / name).eval()
    then = expected(name)
    probs = then.pop("probs")
    assert_same_bits(drawn_weights(model), then)
    # the forward's own products are of the machine's linear algebra, whose last bits are its own
    torch.testing.assert_close(predict(model, INPUTS, num_samples=DRAWS, seed=SEED).probs, probs)


@pytest.mark.parametrize("curvature", ["ekfac", "diagonal", "full"])
def test_laplace(curvature: str) -> None:
    folder = SAVED / f"laplace_{curvature}"
    model = BertForSequenceClassification.from_pretrained(folder)
    posterior = LaplacePosterior.load(folder, model)
    then, now = expected(folder.name), {}
    for method in ("sample", "glm"):
        probs = posterior.predict(INPUTS, num_samples=DRAWS, seed=SEED, method=method).probs
        # an average over Gaussian logits: which ones may change, and did, by no more than its error of 2e-4 (measured
        # against 4 million draws of these logits, of what was recorded as of what is computed now)
        error = {"atol": 4e-4, "rtol": 0.0} if method == "glm" else {}
        torch.testing.assert_close(probs, then.pop(method), **error)
    for index in range(DRAWS):
        with posterior.draw(index, SEED):
            now |= {f"{name}/{index}": value.detach().clone() for name, value in model.named_parameters()}
    assert_same_bits(now, then)


@pytest.mark.parametrize("name", ["int8", "int8_laplace"])
def test_int8(name: str) -> None:
    small = quantization.load(SAVED / name)
    probs = small.predict(INPUTS, num_samples=DRAWS, seed=SEED).probs
    assert_same_bits({"probs": probs}, expected(name))
