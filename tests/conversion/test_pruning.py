"""Signal-to-noise ratios and pruning, against loops over single weights."""

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import bayeformers
from bayeformers import VariationalPosterior, posterior_mean, prune, signal_to_noise, to_bayesian
from bayeformers.distributions import MIN_SCALE
from bayeformers.nn import variational_tensors
from tests.training.tiny import bayesian


class Network(nn.Module):
    """A convolution, an embedding with a padding row, and a decoder tied to that table."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4, padding_idx=2)
        self.convolution = nn.Conv1d(4, 4, 3, padding=1)
        self.decoder = nn.Linear(4, 7)
        self.decoder.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.convolution(self.table(ids).transpose(1, 2)).transpose(1, 2)
        output: Tensor = self.decoder(hidden.tanh())
        return output


def network(scale: str = "additive", dtype: torch.dtype = torch.float64) -> nn.Module:
    """Random means and scales, so that no two ratios are alike."""
    torch.manual_seed(0)
    model = to_bayesian(Network().to(dtype), scale=scale, freeze=False)
    for tensor in variational_tensors(model):
        noise = torch.rand(tensor.loc.shape, dtype=dtype)
        tensor.module.set_scale(tensor.parameter_name, 0.05 + noise)
    return model


def ratios_by_hand(model: nn.Module) -> dict[tuple[str, int], float]:
    """(tensor, flat index) -> |mu| / max(softplus(rho), 1e-8) (times max(|mu|, floor)) of every random weight."""
    found = {}
    for tensor in variational_tensors(model):
        flat = zip(tensor.loc.flatten().tolist(), tensor.rho.flatten().tolist(), strict=True)
        for index, (mean, rho) in enumerate(flat):
            if tensor.spec.padding_idx is not None and index // tensor.loc.shape[1] == tensor.spec.padding_idx:
                continue
            sigma = max(math.log1p(math.exp(rho)), MIN_SCALE)
            if tensor.floor is not None:
                sigma *= max(abs(mean), float(tensor.floor))
            found[tensor.name, index] = abs(mean) / sigma
    return found


@pytest.mark.parametrize("scale", ["additive", "multiplicative"])
def test_ratio_of_every_weight(scale: str) -> None:
    model = network(scale)
    ratios = signal_to_noise(model)
    assert set(ratios) == {"table.weight", "convolution.weight", "convolution.bias", "decoder.bias"}
    expected = ratios_by_hand(model)
    assert torch.isinf(ratios["table.weight"][2]).all()
    found = {(name, i): ratios[name].flatten()[i].item() for name, i in expected}
    assert found == pytest.approx(expected, rel=1e-9)  # softplus(rho) = rho from 20 on


@pytest.mark.parametrize("scale", ["additive", "multiplicative"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.99])
def test_the_weights_of_the_lowest_ratios_go_and_no_others(share: float, scale: str) -> None:
    model = network(scale)
    before = copy.deepcopy(model.state_dict())
    matrices = {key: ratio for key, ratio in ratios_by_hand(model).items() if not key[0].endswith("bias")}
    assert len(matrices) == 6 * 4 + 4 * 4 * 3
    gone = sorted(matrices, key=lambda key: matrices[key])[: round(share * len(matrices))]
    assert prune(model, share) is model
    for name, value in model.state_dict().items():
        owner = name.replace("decoder.weight", "table.weight")  # tied
        where = torch.zeros(value.numel(), dtype=torch.bool)
        where[[index for tensor, index in gone if owner in (tensor, f"{tensor}_rho")]] = True
        where = where.view(value.shape)
        assert torch.equal(value[~where], before[name][~where])
        if where.any():
            assert (value[where] == 0).all() if not name.endswith("_rho") else (value[where] < -18).all()
    assert model.decoder.weight is model.table.weight and model.decoder.weight_rho is model.table.weight_rho


def test_every_draw_has_removed_weights_at_zero() -> None:
    model = prune(network(), 0.9)
    removed = model.convolution.weight == 0
    assert 0 < removed.sum() < removed.numel()
    with VariationalPosterior(model).draw(3):
        weight = model.convolution.variational("weight").sample()
    assert weight[removed].abs().max() < 1e-7
    assert weight[~removed].abs().min() > 1e-7


def test_the_cached_draws_of_a_posterior_see_the_pruning() -> None:
    model, ids = network(), torch.arange(7)[None]
    posterior = VariationalPosterior(model.eval())
    posterior.predict(ids, num_samples=2, problem_type="single_label_classification")
    prune(model, 0.9)
    fresh = VariationalPosterior(copy.deepcopy(model))
    kept, made = (p.predict(ids, num_samples=2, problem_type="single_label_classification") for p in (posterior, fresh))
    torch.testing.assert_close(kept.log_probs, made.log_probs)


def test_pruning_in_steps_is_pruning_at_once() -> None:
    once, steps = prune(network(), 0.8), prune(prune(network(), 0.3), 0.8)
    for a, b in zip(once.parameters(), steps.parameters(), strict=True):
        assert torch.equal(a, b)
    assert (signal_to_noise(once)["convolution.weight"][once.convolution.weight == 0] == 0).all()


def test_half_precision_and_frozen_means() -> None:
    torch.manual_seed(0)
    model = to_bayesian(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).bfloat16())
    assert {ratio.dtype for ratio in signal_to_noise(model).values()} == {torch.float32}
    prune(model, 0.5)
    assert sum(int((model[i].weight == 0).sum()) for i in (0, 2)) == (64 + 24) // 2
    assert torch.isfinite(bayeformers.kl_divergence(model))


def test_a_pruned_model_is_saved_and_loaded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = prune(bayesian(), 0.6).eval()
    model.save_pretrained(tmp_path)
    loaded = bayeformers.from_pretrained(tmp_path)
    inputs = {"input_ids": torch.arange(8)[None] % 5 + 1}
    with posterior_mean(model), posterior_mean(loaded):
        assert torch.equal(model(**inputs).logits, loaded(**inputs).logits)
    for name, ratio in signal_to_noise(model).items():
        assert torch.equal(ratio, signal_to_noise(loaded)[name])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))


@pytest.mark.parametrize(
    ("share", "error", "message"),
    [
        (1.0, ValueError, r"`share` must lie in \[0, 1\), got 1.0: 0.9 removes 90 %"),
        (-0.1, ValueError, r"got -0.1"),
        (math.nan, ValueError, r"got nan"),
        ("0.5", TypeError, r"`share` must be a number in \[0, 1\), got '0.5'"),
        (True, TypeError, r"got True"),
    ],
)
def test_a_wrong_share_changes_nothing(share: object, error: type[Exception], message: str) -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        prune(model, share)  # type: ignore[arg-type]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_models_without_anything_to_prune() -> None:
    with pytest.raises(ValueError, match=r"`model` \(Linear\) has no Bayesian layer; call `to_bayesian\(model\)`"):
        signal_to_noise(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"`model` \(Linear\) has no Bayesian layer"):
        prune(nn.Linear(2, 2), 0.5)
    vectors = to_bayesian(nn.Sequential(nn.LayerNorm(4)), norms=True)
    with pytest.raises(ValueError, match=r"has no random tensor of two or more axes"):
        prune(vectors, 0.5)
