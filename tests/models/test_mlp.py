"""MLP: counts of Blundell et al.'s networks, and the forward written out."""

import pytest
import torch

from bayeformers.models import MLPConfig, MLPForImageClassification
from tests.models import tiny


@pytest.mark.parametrize(("width", "count"), [(400, 478_410), (800, 1_276_810), (1200, 2_395_210)])
def test_number_of_parameters(width: int, count: int) -> None:
    """784 -> width -> width -> 10; of weights alone 0.5, 1.3 and 2.4 million in Blundell et al. 2015, table 1."""
    with torch.device("meta"):
        model = MLPForImageClassification(MLPConfig(hidden_sizes=[width, width]))
    assert model.num_parameters() == count == (784 + width + 10) * width + 10 + 2 * width
    weights = 784 * width + width * width + width * 10
    assert round(weights / 1e6, 1) == {400: 0.5, 800: 1.3, 1200: 2.4}[width]


def test_forward() -> None:
    model = tiny.build("mlp").double()
    pixel_values = tiny.images(model.config).double()
    w = model.state_dict()
    x = pixel_values.reshape(4, 2 * 6 * 6)
    for name in ("features.linear1", "features.linear2"):
        x = (x @ w[f"{name}.weight"].T + w[f"{name}.bias"]).clamp_min(0)
    expected = x @ w["classifier.weight"].T + w["classifier.bias"]
    torch.testing.assert_close(model(pixel_values).logits, expected, rtol=1e-12, atol=1e-12)


def test_no_hidden_layer_is_logistic_regression() -> None:
    model = MLPForImageClassification(MLPConfig(hidden_sizes=[], image_size=8))
    assert [name for name, _ in model.named_parameters()] == ["classifier.weight", "classifier.bias"]
    assert model(torch.zeros(2, 1, 8, 8)).logits.shape == (2, 10)


def test_dropout() -> None:
    """Inverted dropout after each hidden layer: at rate p a unit is 0 or 1 / (1 - p) times itself."""
    model = MLPForImageClassification(MLPConfig(hidden_sizes=[1000], image_size=2, dropout=0.25))
    hidden = []
    model.classifier.register_forward_pre_hook(lambda module, inputs: hidden.append(inputs[0][0].detach()))
    pixel_values = torch.ones(1, 1, 2, 2)
    model.eval()(pixel_values)
    model.train()(pixel_values)
    plain, dropped = hidden
    active = plain > 0
    ratio = dropped[active] / plain[active]
    kept = ratio > 0
    torch.testing.assert_close(ratio[kept], torch.full_like(ratio[kept], 4 / 3))
    # a binomial share of about 500 units: five standard deviations
    assert float(kept.float().mean()) == pytest.approx(0.75, abs=5 * (0.75 * 0.25 / len(ratio)) ** 0.5)
