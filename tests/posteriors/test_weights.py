"""Posteriors that say what each draw's weights are: drawn, predicted, saved and found again by their file's name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bayeformers
from bayeformers.posteriors import BasePosterior, WeightsPosterior, register_posterior
from bayeformers.posteriors.files import saved_kinds
from bayeformers.posteriors.weights import Values
from tests.cases import case

FILE = "shifted.txt"


@register_posterior
class Shifted(WeightsPosterior):
    """Draw i adds i + 1 to the head's bias, the mean adds 1/2."""

    file_name = FILE
    num_draws = 3

    def random_parameters(self) -> list[nn.Parameter]:
        return [self.model.get_parameter("classifier.bias")]

    def weights(self, index: int, seed: int) -> Values:
        for parameter in self.random_parameters():
            yield parameter, parameter.detach() + torch.arange(len(parameter)) * (index + 1.0)

    def mean_weights(self) -> Values:
        for parameter in self.random_parameters():
            yield parameter, parameter.detach() + 0.5

    def save(self, directory: Any) -> None:
        Path(directory, FILE).write_text("here")

    @classmethod
    def load(cls, directory: Any, model: nn.Module) -> Shifted:
        return cls(model)


def logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


@pytest.fixture
def model() -> nn.Module:
    return case("bert").build().eval()


@pytest.fixture
def inputs() -> dict[str, Any]:
    return {key: value for key, value in case("bert").inputs().items() if key != "labels"}


def test_draws(model: nn.Module, inputs: dict[str, Any]) -> None:
    posterior, plain = Shifted(model), logits(model, inputs)
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    expected = [plain + torch.arange(plain.shape[-1]) * (index + 1.0) for index in range(3)]
    for index, values in enumerate(expected):
        with posterior.draw(index):
            torch.testing.assert_close(logits(model, inputs), values)
    with posterior.mean():
        torch.testing.assert_close(logits(model, inputs), plain + 0.5)
    with pytest.raises(ZeroDivisionError), posterior.draw(0):
        raise ZeroDivisionError
    predictive = posterior.predict(inputs, num_samples=16)  # in private views, of the three that there are
    torch.testing.assert_close(predictive.log_probs, torch.stack(expected).log_softmax(-1))
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="`index`"), posterior.draw(3):
        pass


def test_saved_beside_the_model(tmp_path: Path, model: Any, inputs: dict[str, Any]) -> None:
    """By the model's own `save_pretrained`; another kind's file, saved there before, goes."""
    (tmp_path / "laplace.safetensors").write_text("of an earlier posterior")
    model.posterior = Shifted(model)
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "laplace.safetensors").exists()
    loaded = bayeformers.from_pretrained(tmp_path)
    assert type(loaded.posterior) is Shifted
    one, other = (bayeformers.predict(m, inputs).log_probs for m in (model, loaded))
    assert torch.equal(one, other)


def test_registration() -> None:
    assert saved_kinds()[FILE] is Shifted and register_posterior(Shifted) is Shifted
    with pytest.raises(ValueError, match="must name the file"):
        register_posterior(WeightsPosterior)
    with pytest.raises(ValueError, match=f"'{FILE}' of Other is that of Shifted already"):
        register_posterior(type("Other", (Shifted,), {}))
    with pytest.raises(TypeError, match=r"`model` must be a torch\.nn\.Module, got str"):
        Shifted("bert")  # type: ignore[arg-type]
    with pytest.raises(NotImplementedError, match="has no `load`"):
        BasePosterior.load("here", nn.Linear(1, 1))


def test_wrappers_are_found_first() -> None:
    """Their inner posterior's file lies in the same folder."""
    kinds = list(saved_kinds().values())
    assert [kind.wraps for kind in kinds] == sorted((kind.wraps for kind in kinds), reverse=True)
