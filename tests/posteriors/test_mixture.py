"""Mixtures of posteriors: predictions, entropies and densities against sums that are written out."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bayeformers
from bayeformers import laplace
from bayeformers.posteriors import DropoutPosterior, MixturePosterior, PointPosterior, VariationalPosterior
from bayeformers.predictive import MixturePredictive, Predictive, mixture_of
from bayeformers.training.columns import score_predictive
from tests.cases import case

SINGLE = "single_label_classification"


def drawn(count: int, seed: int, classes: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 4, classes, generator=generator, dtype=torch.float64).log_softmax(-1)


def entropy(p: Tensor) -> Tensor:
    return -(p * p.log()).sum(-1)


def text() -> dict[str, Any]:
    return {key: value for key, value in case("bert").inputs().items() if key != "labels"}


def net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(0.2), nn.Linear(4, 3)).double().eval()


def fitted(model: nn.Module, likelihood: str = "classification") -> Any:
    x = torch.randn(20, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    y = torch.arange(20) % 3 if likelihood == "classification" else x @ torch.ones(3, 1, dtype=torch.float64)
    return laplace.fit(model, [(x, y)], likelihood=likelihood, prior_precision=2.0)


# ------------------------------------------------------------------------------------------------------ the predictive


@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.7, 0.3)])
def test_entropies_by_sums(weights: tuple[float, float]) -> None:
    """Of 3 and 5 draws, each w_k / S_k: every sum over draws and pairs written out."""
    draws = [drawn(3, 0), drawn(5, 1)]
    found = mixture_of([Predictive(problem_type=SINGLE, log_probs=one) for one in draws], weights)
    per_draw = torch.tensor([weights[0] / 3] * 3 + [weights[1] / 5] * 5, dtype=torch.float64)
    p = torch.cat(draws).exp()
    mean = torch.einsum("s,sbc->bc", per_draw, p)
    expected = torch.einsum("s,sb->b", per_draw, entropy(p))
    pairs = sum(
        per_draw[s] * per_draw[t] * (p[s] * (p[s].log() - p[t].log())).sum(-1) for s in range(8) for t in range(8)
    )
    differs = torch.einsum("s,sb->b", per_draw, (p.argmax(-1) != mean.argmax(-1)).double())
    labels = torch.tensor([0, 1, 2, 0])
    for value, target in (
        (found.probs, mean), (found.predictive_entropy, entropy(mean)), (found.expected_entropy, expected),
        (found.mutual_information, entropy(mean) - expected), (found.expected_pairwise_kl, pairs),
        (found.variation_ratio, differs), (found.log_prob(labels), mean.log()[range(4), labels]),
    ):  # fmt: skip
        torch.testing.assert_close(value, target)
    assert found.num_samples == 8


def test_equal_draws_are_a_plain_predictive() -> None:
    draws = [drawn(4, 0), drawn(4, 1)]
    plain = Predictive(problem_type=SINGLE, log_probs=torch.cat(draws))
    mixed = mixture_of([Predictive(problem_type=SINGLE, log_probs=one) for one in draws], [0.5, 0.5])
    for name in (
        "mean_log_probs",
        "predictive_entropy",
        "mutual_information",
        "expected_pairwise_kl",
        "variation_ratio",
    ):
        torch.testing.assert_close(getattr(mixed, name), getattr(plain, name))


def test_mixtures_within_mixtures() -> None:
    parts = [Predictive(problem_type=SINGLE, log_probs=drawn(n, n)) for n in (2, 3, 4)]
    nested = mixture_of([mixture_of(parts[:2], [0.25, 0.75]), parts[2]], [0.4, 0.6])
    flat = mixture_of(parts, [0.1, 0.3, 0.6])
    for name in ("probs", "predictive_entropy", "mutual_information", "draw_weights"):
        torch.testing.assert_close(getattr(nested, name), getattr(flat, name))


def test_a_closed_form_is_mixed_as_it_is() -> None:
    link = drawn(1, 7)[0]
    linear = Predictive(problem_type=SINGLE, log_probs=drawn(3, 0), link_log_probs=link)
    other = Predictive(problem_type=SINGLE, log_probs=drawn(2, 1))
    found = mixture_of([linear, other], [0.6, 0.4])
    torch.testing.assert_close(found.probs, 0.6 * link.exp() + 0.4 * other.probs)


def test_regression() -> None:
    """Mean, variances and density, of draws and in closed form; joint ones of an example with two outputs."""
    values = torch.randn(5, 4, 2, dtype=torch.float64)
    mean, variance = torch.randn(4, 2, dtype=torch.float64), torch.rand(4, 2, dtype=torch.float64) + 0.1
    sampled = Predictive(problem_type="regression", values=values, noise_std=0.5)
    linear = Predictive(
        problem_type="regression", values=values, noise_std=0.8, logit_mean=mean, logit_covariance=variance.diag_embed()
    )
    found, labels = mixture_of([sampled, linear], [0.3, 0.7]), torch.randn(4, 2, dtype=torch.float64)
    centre = 0.3 * values.mean(0) + 0.7 * mean
    second = 0.3 * values.square().mean(0) + 0.7 * (variance + mean.square())
    torch.testing.assert_close(found.mean, centre)
    torch.testing.assert_close(found.epistemic_variance, second - centre.square())
    torch.testing.assert_close(found.aleatoric_variance, torch.full((4, 2), 0.3 * 0.25 + 0.7 * 0.64).double())
    normal = torch.distributions.Normal
    scores = [normal(values, 0.5).log_prob(labels), normal(mean, (variance + 0.64).sqrt()).log_prob(labels)]
    density = 0.3 * scores[0].exp().mean(0) + 0.7 * scores[1].exp()
    torch.testing.assert_close(found.log_prob(labels).exp(), density)
    joint = 0.3 * scores[0].sum(-1).exp().mean(0) + 0.7 * scores[1].sum(-1).exp()
    batch = score_predictive(found, {"labels": labels}, "regression")
    torch.testing.assert_close((-batch.scores["nll"]).exp(), joint)
    torch.testing.assert_close(batch.uncertainty["epistemic_variance"], found.epistemic_variance)


# ------------------------------------------------------------------------------------------------------- the posterior


def test_predictions_are_the_components() -> None:
    """A Laplace posterior by its linearised network, dropout and a point by their draws, around three models."""
    x, seed = torch.randn(2, 3, dtype=torch.float64), 3
    components = [fitted(net(0)), DropoutPosterior(net(1)), PointPosterior(net(2))]
    mixture = MixturePosterior(components, [2, 1, 1])
    assert mixture.num_draws is None and mixture.default_method == "glm" and mixture.weights == (0.5, 0.25, 0.25)
    found = mixture.predict(x, num_samples=8, seed=seed)
    parts = [one.predict(x, num_samples=n, seed=seed) for one, n in zip(components, (3, 3, 2), strict=True)]
    torch.testing.assert_close(found.probs, 0.5 * parts[0].probs + 0.25 * (parts[1].probs + parts[2].probs))
    assert isinstance(found, MixturePredictive) and found.num_samples == parts[0].num_samples + 3 + 1
    sampled = mixture.predict(x, num_samples=9, method="sample").parts
    assert [part.logit_mean is None for part in sampled] == [True] * 3


def test_draws_take_turns() -> None:
    """Every distinct draw once, each in its own component's model; passes are as many of each component."""
    x = torch.randn(2, 3, dtype=torch.float64)
    points = [PointPosterior(net(seed)) for seed in range(3)]
    mixture = MixturePosterior([points[0], DropoutPosterior(net(1)), points[2]])
    assert [(mixture.components.index(c), j) for c, j in map(mixture.place, range(6))] == [
        (0, 0), (1, 0), (2, 0), (1, 1), (1, 2), (1, 3)
    ]  # fmt: skip
    ensemble = MixturePosterior(points)
    assert ensemble.num_draws == 3 and len(list(ensemble.passes(x, num_samples=16))) == 3
    with torch.no_grad():
        for index, output in enumerate(ensemble.passes(x)):
            with ensemble.draw(index):
                assert torch.equal(output, points[index].model(x))
    average = torch.stack([o.softmax(-1) for o in ensemble.passes(x)]).mean(0)
    torch.testing.assert_close(ensemble.predict(x, num_samples=1).probs, average)
    dropouts = MixturePosterior([DropoutPosterior(net(0)), DropoutPosterior(net(1))])
    assert [len(list(dropouts.passes(x, num_samples=n))) for n in (1, 2, 5, 6)] == [2, 2, 4, 6]
    with pytest.raises(ValueError, match=r"`index` must be in 0\.\.2, got 3"):
        ensemble.draw(3)


def test_one_model_with_several_posteriors() -> None:
    model = net(0)
    mixture = MixturePosterior([fitted(model), DropoutPosterior(model)])
    x, kept = torch.randn(2, 3, dtype=torch.float64), {k: v.clone() for k, v in model.state_dict().items()}
    alone = [component.predict(x, num_samples=4) for component in mixture.components]
    found = mixture.predict(x, num_samples=8)
    assert all(torch.equal(a.probs, b.probs) for a, b in zip(alone, found.parts, strict=True))
    outputs = list(mixture.passes(x, num_samples=4))
    assert torch.equal(outputs[1], next(iter(mixture.components[1].passes(x))))
    assert all(torch.equal(v, kept[k]) for k, v in model.state_dict().items())
    assert mixture.is_of_present_weights()
    with torch.no_grad():
        model[0].weight.add_(1)  # type: ignore[index, operator]
    assert not mixture.is_of_present_weights()


def test_regressions() -> None:
    """Each component knows its noise; a trainer's columns are those of the mixture."""
    torch.manual_seed(0)
    models = [nn.Linear(3, 1).double() for _ in range(2)]
    components = [fitted(model, "regression").with_noise_std(s) for model, s in zip(models, (0.5, 1.0), strict=True)]
    x = torch.randn(4, 3, dtype=torch.float64)
    found = MixturePosterior(components).predict(x)
    parts = [component.predict(x) for component in components]
    torch.testing.assert_close(found.aleatoric_variance, torch.full((4,), (0.25 + 1) / 2).double())
    between = (parts[0].mean - parts[1].mean).square() / 4
    within = (parts[0].epistemic_variance + parts[1].epistemic_variance) / 2
    torch.testing.assert_close(found.epistemic_variance, within + between)


@pytest.mark.parametrize("around", ["one model", "two models"])
def test_saved_and_read(tmp_path: Path, around: str) -> None:
    models = [case("bert").build() for _ in range(2)]
    with torch.no_grad():
        models[1].classifier.weight.mul_(2)  # type: ignore[union-attr, operator]
    batch = {**case("bert").inputs(), **case("bert").labels()}
    first = laplace.fit(models[0], [batch], target_modules="classifier", prior_precision=3.0)
    second = models[0] if around == "one model" else models[1]
    mixture = MixturePosterior([first, DropoutPosterior(second, 0.3), PointPosterior(second)], [0.2, 0.3, 0.7])
    models[0].posterior = mixture  # type: ignore[assignment]
    models[0].save_pretrained(tmp_path)  # type: ignore[operator]
    loaded = bayeformers.from_pretrained(tmp_path).posterior
    assert isinstance(loaded, MixturePosterior) and loaded.weights == mixture.weights
    assert repr(loaded) == repr(mixture)
    found, expected = loaded.predict(text(), num_samples=6), mixture.predict(text(), num_samples=6)
    for name in ("probs", "log_probs", "mutual_information"):
        assert torch.equal(getattr(found, name), getattr(expected, name))
    if around == "two models":
        weights = tmp_path / "component_1" / "model.safetensors"
        models[0].save_pretrained(tmp_path / "other")  # type: ignore[operator]
        weights.write_bytes((tmp_path / "other" / "model.safetensors").read_bytes())
        with pytest.raises(ValueError, match="is not what was saved: of the tensors that were written it has other"):
            MixturePosterior.load(tmp_path, models[0])


@pytest.mark.parametrize(
    ("components", "weights", "told"),
    [
        ("ab", None, "`components` must be a list of posteriors, got str"),
        (PointPosterior(net(0)), None, "`components` must be a list of posteriors, got PointPosterior"),
        ([], None, "`components` must hold at least one posterior"),
        ([net(0)], None, "`components` must be posteriors, got Sequential"),
        ([PointPosterior(net(0))], [1, 1], "`weights` must be 1 numbers"),
        ([PointPosterior(net(0))], 1.0, "`weights` must be 1 numbers"),
        ([PointPosterior(net(0))], [0.0], r"`weights` must be finite numbers > 0, got 0\.0"),
        ([PointPosterior(net(0))], [-1], "`weights` must be finite numbers > 0, got -1"),
        ([PointPosterior(net(0))], [math.nan], "`weights` must be finite numbers > 0, got nan"),
        ([PointPosterior(net(0))], ["1"], "`weights` must be finite numbers > 0, got '1'"),
        (
            [PointPosterior(case("bert").build()), PointPosterior(case("bert-regression").build())],
            None,
            "one kind of head",
        ),
    ],
)
def test_refused(components: Any, weights: Any, told: str) -> None:
    with pytest.raises((TypeError, ValueError), match=told):
        MixturePosterior(components, weights)


def test_refused_when_used(tmp_path: Path) -> None:
    x = torch.randn(2, 3, dtype=torch.float64)
    mixture = MixturePosterior([PointPosterior(net(0)), PointPosterior(net(1))], [1, 2])
    for call, told in (
        (lambda: mixture.passes(x), "`passes` of a mixture needs equal `weights`"),
        (lambda: mixture.predict(x, num_samples=0), "`num_samples` must be"),
        (lambda: mixture.predict(x, method="glm"), "needs a Gaussian posterior"),
        (lambda: mixture.predict(x, method="other"), "`method` must be one of"),
        (lambda: mixture.mean(), "no mean network"),
        (lambda: mixture.save(tmp_path), "of one transformers class, got Sequential and Sequential"),
        (lambda: MixturePosterior.load(tmp_path, net(0)), "no mixture file"),
        (
            lambda: mixture_of([Predictive(problem_type=SINGLE, log_probs=drawn(1, 0))], [0.5, 0.5]),
            "one number for each",
        ),
        (
            lambda: mixture_of([Predictive(problem_type=SINGLE, log_probs=drawn(1, 0, c)) for c in (2, 3)], [0.5, 0.5]),
            "of one kind and shape",
        ),
        (
            lambda: MixturePosterior([VariationalPosterior(bayeformers.to_bayesian(nn.Linear(1, 2)))]).save(tmp_path),
            "a VariationalPosterior is not saved beside its model",
        ),
    ):
        with pytest.raises((ValueError, NotImplementedError), match=told):
            call()
    assert not list(tmp_path.iterdir())
