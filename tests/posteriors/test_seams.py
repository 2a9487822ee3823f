"""Posteriors of one model beside each other, copied, and in threads."""

import copy
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bayeformers.posteriors import (
    DiagonalPosterior,
    EnsemblePosterior,
    MixturePosterior,
    PointPosterior,
    RunningMoments,
    SWAGPosterior,
    TemperaturePosterior,
)

INPUTS = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


def net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 3)).eval()


def swag(model: nn.Module, seed: int = 0) -> SWAGPosterior:
    generator, running = torch.Generator().manual_seed(seed), RunningMoments(rank=2)
    for _ in range(3):
        running.add({n: p + 0.3 * torch.randn(p.shape, generator=generator) for n, p in model.named_parameters()})
    return SWAGPosterior(model, running.moments())


def diagonal(model: nn.Module) -> DiagonalPosterior:
    return DiagonalPosterior(model, {name: torch.full_like(p, 0.1) for name, p in model.named_parameters()})


@pytest.mark.parametrize("method", ["sample", "glm"])
def test_a_view_waits_for_draws_that_are_written_into_the_model(method: str) -> None:
    """Deterministic: a draw is open in the model while the other thread asks."""
    model = net()
    lent, own = swag(model), diagonal(model)
    expected = own.predict(INPUTS, num_samples=2, method=method).mean_log_probs
    found: list[Tensor] = []
    thread = threading.Thread(
        target=lambda: found.append(own.predict(INPUTS, num_samples=2, method=method).mean_log_probs)
    )
    with lent.draw(0):
        thread.start()
        thread.join(0.2)
        assert not found
    thread.join()
    assert torch.equal(found[0], expected)


def test_a_thread_may_ask_inside_its_own_draw() -> None:
    model = net()
    lent, own = swag(model), diagonal(model)
    with lent.draw(0):
        own.predict(INPUTS, num_samples=2)


def test_a_draw_of_one_posterior_leaves_the_others_fresh(tmp_path: Path) -> None:
    model = net()
    heads = [{"2.bias": torch.randn(3)} for _ in range(2)]
    mixture = MixturePosterior([EnsemblePosterior(model, heads), swag(model)])
    mixture.predict(INPUTS, num_samples=4)
    assert mixture.is_of_present_weights()
    mixture.save(tmp_path)
    with torch.no_grad():
        model[0].weight.add_(1)  # type: ignore[operator]
    assert not mixture.is_of_present_weights()


def test_copies_of_a_model_with_posteriors_from_files(tmp_path: Path) -> None:
    model = net()
    MixturePosterior([swag(model), EnsemblePosterior(model, [{"2.bias": torch.randn(3)}] * 2)]).save(tmp_path)
    model.posterior = MixturePosterior.load(tmp_path, model)
    expected = model.posterior.predict(INPUTS).mean_log_probs
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[0].weight.zero_()  # type: ignore[operator, index]
    assert torch.equal(model.posterior.predict(INPUTS).mean_log_probs, expected)
    assert other.posterior.model is other


def test_draws_that_become_few_are_few_in_what_wraps_them() -> None:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).eval()
    posterior = swag(model)
    mixture, calibrated = MixturePosterior([posterior]), TemperaturePosterior(posterior)
    assert mixture.num_draws is calibrated.num_draws is None
    posterior.update_batch_norm([INPUTS], num_draws=3)
    assert mixture.num_draws == calibrated.num_draws == 3
    with pytest.raises(ValueError, match="index"), mixture.draw(3):
        pass


def test_mixture_of_swag_posteriors_around_several_networks() -> None:
    """Multi-SWAG: the average of each network's own draws, of which the networks are as they were."""
    torch.manual_seed(2)
    first, second = (nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)).eval() for _ in range(2))
    components = [swag(first, 0), swag(second, 1)]
    probs = []
    for posterior in components:
        for index in range(3):
            with torch.no_grad(), posterior.draw(index, 5):
                probs.append(posterior.model(INPUTS).softmax(-1))
    before = [p.clone() for model in (first, second) for p in model.parameters()]
    mixture = MixturePosterior(components)
    found = mixture.predict(INPUTS, num_samples=6, seed=5)
    torch.testing.assert_close(found.probs, torch.stack(probs).mean(0))
    outputs = torch.stack([output.softmax(-1) for output in mixture.passes(INPUTS, num_samples=6, seed=5)])
    torch.testing.assert_close(outputs.mean(0), torch.stack(probs).mean(0))
    assert all(map(torch.equal, before, [p for model in (first, second) for p in model.parameters()]))


def test_a_regressions_noise_is_told_when_it_is_calibrated(tmp_path: Path) -> None:
    """Of exact means the factor is the ratio of the targets' standard deviation to the noise."""
    model = nn.Linear(6, 1).double().eval()
    inputs = INPUTS.double()
    signs = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]], dtype=torch.float64)
    rows = [{"input": inputs, "labels": model(inputs).detach() + 0.6 * signs}]
    posterior = PointPosterior(model)
    found = TemperaturePosterior.fit(posterior, rows, problem_type="regression", noise_std=0.3)
    assert found.temperature == pytest.approx(2.0, rel=1e-6)
    found.save(tmp_path)
    for again in (found, TemperaturePosterior.load(tmp_path, model)):  # the model does not say that it regresses
        variance = again.predict(inputs, noise_std=0.3).aleatoric_variance
        torch.testing.assert_close(variance, torch.full_like(variance, 0.36), rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", ["ensemble", "swag"])
def test_draws_follow_a_model_whose_tensors_are_replaced(kind: str) -> None:
    """As `model.to` another device or precision replaces buffers, and loading by assignment Parameters."""

    def network(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
        model(seed + (1 + seed) * INPUTS)
        return model.eval()

    model, posterior = network(0), None
    if kind == "ensemble":
        posterior = EnsemblePosterior(model, [network(1), network(2)])
    else:
        posterior = swag(model)
        posterior.update_batch_norm([INPUTS], num_draws=2)
    expected = posterior.predict(INPUTS).log_probs
    model.double()
    torch.testing.assert_close(posterior.predict(INPUTS.double()).log_probs, expected.double(), rtol=1e-4, atol=1e-5)
    model.float()
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
    before = [value.clone() for value in model.state_dict().values()]
    torch.testing.assert_close(posterior.predict(INPUTS).log_probs, expected)
    assert all(map(torch.equal, before, model.state_dict().values())) and posterior.is_of_present_weights()
