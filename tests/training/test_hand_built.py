"""A network that is built by hand from `bayeformers.nn` layers: its ELBO is trained, its draws are evaluated."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bayeformers import (
    fixed_draw,
    from_pretrained,
    is_bayesian,
    kl_divergence,
    posterior_mean,
    summary,
    to_bayesian,
    to_deterministic,
    unfreeze,
)
from bayeformers import nn as bnn
from tests.training import tiny


class Network(nn.Module):
    """Two Bayesian layers of the same table, and one that shares its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = bnn.Linear(4, 4)
        self.outer = bnn.Linear(4, 4, bias=False)
        self.outer.weight, self.outer.weight_rho = self.inner.weight, self.inner.weight_rho
        self.head = bnn.Linear(4, 3)

    def forward(self, features: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.head(torch.tanh(self.outer(torch.tanh(self.inner(features)))))
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


def network() -> Network:
    torch.manual_seed(0)
    model = Network()
    with torch.no_grad():
        for tensor in bnn.variational_tensors(model):
            tensor.module.set_scale(tensor.parameter_name, torch.full_like(tensor.loc, 0.5))
    return model


def rows(number: int = 8) -> tiny.Rows:
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(number, 4, generator=generator)
    return tiny.Rows(features=features, labels=torch.randint(0, 3, (number,), generator=generator))


def trainer(folder: Path, model: nn.Module, **kwargs: Any) -> Any:
    given: dict[str, Any] = {"train_dataset": rows(), "eval_dataset": rows(5), "remove_unused_columns": False}
    return tiny.trainer(folder, model, **{**given, **kwargs})


def test_it_trains_the_elbo(tmp_path: Path) -> None:
    """One step of SGD over all 8 rows at a held draw moves the weights by the gradient of mean NLL + KL / 8."""
    model, direct = network(), network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with fixed_draw(model, 2):
        trainer(
            tmp_path, model, optimizers=(optimizer, None), max_steps=1, per_device_train_batch_size=2,
            gradient_accumulation_steps=4, max_grad_norm=0.0, lr_scheduler_type="constant",
        ).train()  # fmt: skip
    with fixed_draw(direct, 2):
        loss = direct(**rows().columns)["loss"]
    (loss + kl_divergence(direct) / 8).backward()
    for (name, moved), start in zip(model.named_parameters(), direct.parameters(), strict=True):
        torch.testing.assert_close(moved, start - start.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_it_logs_the_kl_and_keeps_no_record(tmp_path: Path) -> None:
    model = network()
    found = trainer(tmp_path, model, max_steps=1)
    expected = kl_divergence(model).item()
    found.train()
    entry = found.state.log_history[0]
    assert entry["kl"] == pytest.approx(expected, rel=1e-5)
    assert entry["loss"] == pytest.approx(entry["nll"] + entry["kl"] / 8, rel=1e-5)


def test_its_draws_are_evaluated(tmp_path: Path) -> None:
    model, data = network(), rows(5)
    output = trainer(tmp_path, model, num_eval_samples=4).predict(data)
    probs = []
    for index in range(4):
        with torch.no_grad(), fixed_draw(model, index):
            probs.append(model(data.columns["features"])["logits"].softmax(-1))
    np.testing.assert_allclose(output.predictions, torch.stack(probs).mean(0).log(), atol=1e-5)
    assert output.metrics["test_mutual_information"] > 1e-3


def test_shared_weights_have_one_training_draw(tmp_path: Path) -> None:
    seen: list[Tensor] = []
    model = network()
    for layer in (model.inner, model.outer):
        layer.register_forward_hook(lambda layer, *_: seen.append(layer.variational("weight").sample().detach()))
    trainer(tmp_path, model, max_steps=1).train()
    assert torch.equal(seen[0], seen[1])


def test_a_way_out_of_every_error() -> None:
    """What `summary` and `to_bayesian` say of it leads somewhere."""
    model = network()
    assert is_bayesian(model)
    found = summary(model)
    assert [tensor.name for tensor in found.tensors] == ["inner.weight", "inner.bias", "head.weight", "head.bias"]
    assert found.kl == pytest.approx(kl_divergence(model).item(), rel=1e-5)
    assert unfreeze(model) is model
    with pytest.raises(ValueError, match=r"has `bayeformers.nn` layers. Call `to_deterministic\(model\)` first"):
        to_bayesian(model)
    with torch.no_grad(), posterior_mean(model):
        mean = model(rows().columns["features"])["logits"]
    assert to_deterministic(model) is model
    assert [type(layer) for layer in model.children()] == [nn.Linear] * 3
    assert not is_bayesian(model)
    torch.testing.assert_close(model(rows().columns["features"])["logits"], mean)
    assert is_bayesian(to_bayesian(model))


def test_a_saved_layer_that_no_reload_would_make_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model: Any = tiny.plain()
    model.classifier = bnn.Linear(model.config.hidden_size, model.config.num_labels)
    with caplog.at_level("WARNING"):
        model.save_pretrained(tmp_path)
    assert "has Bayesian layers that were built by hand" in caplog.text
    with pytest.raises(ValueError, match="with layers built by hand, there never was one"):
        from_pretrained(tmp_path)


def test_a_part_by_hand_and_a_converted_part() -> None:
    model = nn.Sequential(bnn.Linear(4, 4), to_bayesian(nn.Linear(4, 3)))
    to_deterministic(model)
    assert [type(layer) for layer in model] == [nn.Linear] * 2
