"""SWAG's moments and covariance against dense algebra in float64; its draws, its file, BatchNorm."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import bayeformers
from bayeformers.posteriors import Moments, RunningMoments, SWAGPosterior
from bayeformers.posteriors.streamed import InMemory, whole
from bayeformers.sampling.generators import normal_of
from tests.posteriors.test_ensemble import equal, inputs, log_probs, state
from tests.training import tiny

SNAPSHOTS, COLUMNS = 7, 4


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2)).double().eval()


def path(number: int = SNAPSHOTS) -> Tensor:
    """Weights along a training (number, 17), a random walk in float64."""
    generator = torch.Generator().manual_seed(4)
    return torch.randn(number, 17, generator=generator, dtype=torch.float64).cumsum(0) / 3 + 1


def named(model: nn.Module, flat: Tensor) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters())
    parts = flat.split([p.numel() for p in parameters.values()])
    return {n: part.view_as(p) for (n, p), part in zip(parameters.items(), parts, strict=True)}


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def posterior_of(model: nn.Module, rank: int = COLUMNS, **options: Any) -> SWAGPosterior:
    running = RunningMoments(rank)
    for weights in path():
        running.add(named(model, weights))
    return SWAGPosterior(model, running.moments(), **options)


def dense(rank: int = COLUMNS) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, diagonal and D by the paper's formulas: running averages of w and of w^2, and w_i less the i-th average."""
    walk = path()
    averages = walk.cumsum(0) / torch.arange(1, SNAPSHOTS + 1)[:, None]
    variance = walk.square().mean(0) - walk.mean(0).square()
    return averages[-1], variance, (walk - averages)[SNAPSHOTS - rank :].T if rank else walk[:0].T


@pytest.mark.parametrize("rank", [0, 2, COLUMNS])
def test_moments(rank: int) -> None:
    model = network()
    posterior = posterior_of(model, rank)
    mean, variance, columns = dense(rank)
    with posterior.mean():
        torch.testing.assert_close(flat(model), mean)
    covariance = torch.diag(variance)
    if rank:
        covariance = (covariance + columns @ columns.T / (rank - 1)) / 2
    found = posterior.variances()
    torch.testing.assert_close(torch.cat([found[p].reshape(-1) for p in model.parameters()]), covariance.diagonal())
    for index in range(3):  # the paper's formula with the same standard normal numbers
        keys = [f"1/{index}/{name}/0" for name, _ in model.named_parameters()]
        parts = zip(keys, model.parameters(), strict=True)
        noise = torch.cat([normal_of(key, [p.numel()]).double() for key, p in parts])
        moved = variance.sqrt() * noise
        if rank:
            moved = (moved + columns @ normal_of(f"1/{index}/deviations", [rank]).double() / (rank - 1) ** 0.5) / 2**0.5
        with posterior.draw(index, seed=1):
            torch.testing.assert_close(flat(model), mean + moved)


def test_sampled_covariance() -> None:
    """Of draws, against the dense matrix."""
    model = network()
    posterior = posterior_of(model, draw_cache_bytes=0)
    mean, variance, columns = dense()
    covariance = (torch.diag(variance) + columns @ columns.T / (COLUMNS - 1)) / 2
    draws = []
    for index in range(400):
        with posterior.draw(index, seed=1):
            draws.append(flat(model))
    samples = torch.stack(draws)
    # n independent Gaussian draws: an entry of their covariance has standard error ((s_ii s_jj + s_ij^2) / n)^1/2
    std = covariance.diagonal().sqrt()
    error = ((torch.outer(std, std).square() + covariance.square()) / len(samples)).sqrt()
    assert bool(((samples.T.cov() - covariance).abs() < 5 * error).all())
    assert bool(((samples.mean(0) - mean).abs() < 5 * std / len(samples) ** 0.5).all())


def test_scale_and_cache() -> None:
    """Twice the scale moves twice as far from the mean; kept draws are the drawn ones."""
    model = network()
    mean = dense()[0]
    posteriors = [posterior_of(model), posterior_of(model, scale=2.0), posterior_of(model, draw_cache_bytes=0)]
    found = []
    for posterior in posteriors:
        for _ in range(2):
            with posterior.draw(2, seed=3):
                found.append(flat(model))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[4]) and torch.equal(found[4], found[5])
    torch.testing.assert_close(found[2] - mean, 2 * (found[0] - mean))
    assert len(posteriors[0]._cache) == 1 and not posteriors[2]._cache
    with posteriors[0].draw(0, seed=4):
        assert list(posteriors[0]._cache) == [(0, 4)]  # of one seed at a time


def test_noise_is_a_function_of_its_key() -> None:
    """Whatever the global generators, the order of the draws and the other Parameters."""
    model = network()
    torch.manual_seed(1)
    with posterior_of(model).draw(5):
        one = flat(model)
    torch.manual_seed(2)
    again = posterior_of(model)
    with again.draw(0), again.draw(5):  # nested: the inner one stands
        assert torch.equal(flat(model), one)
    with again.draw(5, seed=1):
        assert not torch.equal(flat(model), one)


def test_frozen_parameters_are_left_out_and_sums_are_wide() -> None:
    running = RunningMoments(2)
    steps = torch.tensor([1.0, 1.0, 1.0 + 2.0**-7]).bfloat16()
    for value in steps:
        running.add({"w": value.expand(3)})
    found = running.moments().tensors
    mean, variance = (whole(found, [f"{part}/w"])[f"{part}/w"] for part in ("mean", "variance"))
    assert mean.dtype == torch.float32
    torch.testing.assert_close(mean, torch.full((3,), 1 + 2.0**-7 / 3))
    torch.testing.assert_close(variance, torch.full((3,), 2.0**-14 * 2 / 9), rtol=1e-5, atol=0)


def test_small_variances_survive_float32() -> None:
    """Of steps 1e-5 around 1: mean w^2 - (mean w)^2 in float32 has no digit of it."""
    walk = 1 + 1e-5 * torch.randn(50, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    running = RunningMoments(0)
    for weights in walk.float():
        running.add({"w": weights})
    found = whole(running.moments().tensors, ["variance/w"])["variance/w"]
    torch.testing.assert_close(found.double(), walk.float().double().var(0, correction=0), rtol=1e-2, atol=0)
    naive = walk.float().square().mean(0) - walk.float().mean(0).square()
    assert abs(float(naive) / float(found) - 1) > 0.1


def bert(rank: int = 3) -> Any:
    """A classifier with a posterior of its last layers."""
    model = tiny.plain().eval()
    running = RunningMoments(rank)
    chosen = {n: p for n, p in model.named_parameters() if n.startswith(("classifier", "bert.pooler"))}
    generator = torch.Generator().manual_seed(3)
    for _ in range(5):
        running.add({n: p + 0.1 * torch.randn(p.shape, generator=generator) for n, p in chosen.items()})
    model.posterior = SWAGPosterior(model, running.moments())
    return model


def test_linearised_takes_the_diagonal() -> None:
    """J diag(Sigma) J^T by autograd, of a network whose head alone is random."""
    model = bert()
    posterior = model.posterior
    before = state(model)
    mean, covariance = posterior.linearize(inputs())
    assert equal(state(model), before)
    with posterior.mean():
        expected = torch.zeros(3, 3, 3, dtype=torch.float64)
        logits = model(**inputs()).logits
        torch.testing.assert_close(mean.float(), logits.detach(), rtol=0, atol=1e-5)
        for parameter, variance in posterior.variances().items():
            jacobian = torch.stack([
                torch.autograd.grad(logits[b, c], parameter, retain_graph=True)[0].reshape(-1)
                for b in range(3)
                for c in range(3)
            ]).reshape(3, 3, -1)
            weighted = (jacobian * variance.reshape(-1)).double()
            expected += weighted @ jacobian.double().mT
    torch.testing.assert_close(covariance, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert posterior.predict(inputs(), method="glm").mean_log_probs.shape == (3, 3)


def test_reload(tmp_path: Path) -> None:
    model = bert()
    before = state(model)
    model.save_pretrained(tmp_path)
    loaded = bayeformers.from_pretrained(tmp_path)
    assert type(loaded.posterior) is SWAGPosterior and equal(state(loaded), before)
    one, other = (m.posterior.predict(inputs(), num_samples=4, seed=2).log_probs for m in (model, loaded))
    assert torch.equal(one, other) and not torch.equal(one[0], one[1])
    with torch.no_grad():
        loaded.bert.embeddings.word_embeddings.weight.add_(1)
    with pytest.raises(ValueError, match="share have changed"):
        loaded.posterior.save(tmp_path)
    with pytest.raises(ValueError, match="goes with another model"):
        SWAGPosterior.load(tmp_path, loaded)
    trainer = tiny.trainer(tmp_path, bayeformers.from_pretrained(tmp_path), num_eval_samples=4)
    assert type(trainer.posterior) is SWAGPosterior
    assert trainer.evaluate()["eval_mutual_information"] > 0


def test_the_model_moves_through_draws_bit_by_bit() -> None:
    model = bert()
    before, plain = state(model), log_probs(model)
    assert model.posterior.predict(inputs(), num_samples=3).log_probs.shape == (3, 3, 3)
    assert equal(state(model), before) and torch.equal(log_probs(model), plain)


# -- BatchNorm ---------------------------------------------------------------------------------------------------------


def normalised() -> tuple[nn.Module, Moments]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).eval()
    running = RunningMoments(2)
    for _ in range(4):
        running.add({n: p + 0.5 * torch.randn_like(p) for n, p in model.named_parameters()})
    return model, running.moments()


def test_batch_norm(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Statistics of each draw are those of the data under its own weights; they are saved, and end the draws."""
    model, moments = normalised()
    before, data = state(model), [torch.randn(8, 2), torch.randn(8, 2) + 1]
    with caplog.at_level(logging.WARNING, "bayeformers"):
        posterior = SWAGPosterior(model, moments)
    assert "update_batch_norm" in caplog.text and posterior.num_draws is None
    posterior.update_batch_norm(data, num_draws=3, seed=5)
    assert equal(state(model), before) and not model.training and posterior.num_draws == 3
    posterior.save(tmp_path)
    found = []
    for each in (posterior, SWAGPosterior.load(tmp_path, model)):
        for index in range(3):
            with each.draw(index, seed=5), torch.no_grad():
                hidden = [model[0](x) for x in data]
                torch.testing.assert_close(model[1].running_mean, torch.stack([h.mean(0) for h in hidden]).mean(0))
                torch.testing.assert_close(model[1].running_var, torch.stack([h.var(0) for h in hidden]).mean(0))
        found.append(each.predict(data[0], num_samples=16, seed=5).log_probs)
        assert len(found[-1]) == 3
        with pytest.raises(ValueError, match="`seed` is 0"), each.draw(0):
            pass
        assert equal(state(model), before)
    assert torch.equal(*found)
    with pytest.raises(TypeError, match="`batches` must be a list"):
        posterior.update_batch_norm(iter(data))
    with pytest.raises(ValueError, match="one batch at least"):
        posterior.update_batch_norm([])
    assert equal(state(model), before)


# -- bad input ---------------------------------------------------------------------------------------------------------


def moments_of(model: nn.Module, **changed: Any) -> Moments:
    tensors = {"mean/0.bias": torch.zeros(3), "variance/0.bias": torch.ones(3)} | changed.pop("tensors", {})
    return Moments(InMemory(tensors), changed.pop("num_snapshots", 3), changed.pop("num_columns", 0))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"scale": 0}, "`scale` must be a finite number > 0"),
        ({"scale": "1"}, "`scale`"),
        ({"draw_cache_bytes": -1}, "`draw_cache_bytes`"),
        ({"num_columns": 1}, "one column"),
        ({"num_columns": 2}, "`moments` of '0.bias' have the shapes"),
        ({"num_snapshots": 0}, "of no Parameter"),
        ({"tensors": {"mean/2.bias": torch.zeros(3)}}, "which `model` does not have"),
        ({"tensors": {"variance/0.bias": torch.zeros(4)}}, "have the shapes"),
    ],
)
def test_wrong_arguments(changed: dict[str, Any], message: str) -> None:
    model = network()
    options = {key: changed.pop(key) for key in ("scale", "draw_cache_bytes") if key in changed}
    with pytest.raises(ValueError, match=message):
        SWAGPosterior(model, moments_of(model, **changed), **options)


def test_wrong_kinds(tmp_path: Path) -> None:
    model = network()
    for wrong, message in (("bert", "`model`"), (model, "`moments`")):
        with pytest.raises(TypeError, match=message):
            SWAGPosterior(wrong, {} if wrong is model else moments_of(model))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`model` is converted"):
        SWAGPosterior(tiny.bayesian(), moments_of(model))
    for rank in (-1, 1, 2.5):
        with pytest.raises(ValueError, match="`rank`"):
            RunningMoments(rank)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no snapshot"):
        RunningMoments().moments()
    running = RunningMoments(2)
    running.add({"w": torch.ones(1)})
    with pytest.raises(ValueError, match="Other weights train"):
        running.add({"v": torch.ones(1)})
    with pytest.raises(ValueError, match="NaN or infinite values in"):
        running.add({"w": torch.tensor([float("inf")])})
    assert running.num_snapshots == 1
    with pytest.raises(ValueError, match="There is no file"):
        SWAGPosterior.load(tmp_path, model)
    save_file({"x": torch.ones(1)}, tmp_path / "swag.safetensors")
    with pytest.raises(ValueError, match="no bayeformers data"):
        SWAGPosterior.load(tmp_path, model)
    with pytest.raises(ValueError, match="has no BatchNorm layer"):
        posterior_of(model).update_batch_norm([torch.ones(2, 2)])
    posterior_of(model).save(tmp_path)
    content = bytearray((tmp_path / "swag.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "swag.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="is damaged"):
        SWAGPosterior.load(tmp_path, model)
