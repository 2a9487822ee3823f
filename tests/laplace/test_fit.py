"""`fit` as a procedure: parts of the data, interrupted passes, choosing the prior."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from bayeformers.laplace import LaplacePosterior, fit, tune
from bayeformers.laplace.data import prepare
from bayeformers.laplace.tuning import GRID, holdout_nll, holdout_precision
from tests.laplace.networks import QUIET, batches, built, classes, fitted, mlp, reader, regression_data, state, text
from tests.laplace.reference import close, dense, integers, normal

X, Y = normal(12, 4), classes(12)
FIXED: dict[str, Any] = {"prior_precision": 1.0, **QUIET}


def same(one: LaplacePosterior, two: LaplacePosterior) -> bool:
    """Bit for bit."""
    pairs = zip(one.layers.values(), two.layers.values(), strict=True)
    return one.record == two.record and all(
        (p is None and q is None) or torch.equal(p, q)
        for a, b in pairs
        for p, q in ((a.left, b.left), (a.right, b.right), (a.eigenvalues, b.eigenvalues))
    )


# -------------------------------------------------------------------------------------------------- parts of the data


@pytest.mark.parametrize("kind", ["kfac", "ekfac", "diagonal", "dense"])
def test_a_part_is_scaled_to_the_whole(kind: str) -> None:
    """Two of four batches, N = 30: G is 30 / 6 times what they gave; A, an average, is not."""
    loader, model = batches(X, Y, 3, 3, 3, 3), mlp()
    part = fit(model, loader, num_batches=2, num_data=30, curvature=kind, **FIXED)
    plain = fit(model, loader[:2], curvature=kind, **FIXED)
    assert part.record.num_data == 30
    assert part.record.log_likelihood == pytest.approx(5 * plain.record.log_likelihood)
    for layer, eigen in plain.layers.items():
        close(dense(part.layers[layer]), 5 * dense(eigen), 1e-12)


def test_the_dataset_tells_its_length() -> None:
    loader = DataLoader(TensorDataset(X, Y), batch_size=4)
    posterior = fit(mlp(), loader, num_batches=1, **FIXED)
    assert posterior.record.num_data == 12
    assert fit(mlp(), loader, **FIXED).record.num_data == 12
    assert fit(mlp(), loader, num_batches=99, **FIXED).record.num_data == 12
    with pytest.raises(ValueError, match="`num_batches` needs `num_data`"):
        fit(mlp(), batches(X, Y), num_batches=1, **FIXED)


@pytest.mark.parametrize("fisher", ["exact", "mc", "empirical"])
@pytest.mark.parametrize("kind", ["kfac", "ekfac", "diagonal"])
@pytest.mark.parametrize("pooled", [True, False])
def test_examples_without_a_label_are_as_good_as_not_there(kind: str, fisher: str, pooled: bool) -> None:
    """Their Fisher is 0; what they read must not enter A either, nor they N. The second batch has no other ones."""
    model, inputs = reader(pooled=pooled), text(9)
    labels, ignored = classes(9) if pooled else classes(9, 4), torch.tensor([1, 4, 5, 6])
    labels[ignored] = -100
    kept = [i for i in range(9) if i not in ignored]
    options: dict[str, Any] = {"curvature": kind, "fisher": fisher, "target_modules": "all", **FIXED}
    found = fit(model, batches(inputs, labels, 4, 3, 2), **options)
    plain = fit(model, batches({name: v[kept] for name, v in inputs.items()}, labels[kept]), **options)
    assert found.record == plain.record and found.record.num_data == 5
    for layer, eigen in plain.layers.items():
        close(dense(found.layers[layer]), dense(eigen), 1e-12)


def test_a_part_with_examples_without_a_label() -> None:
    """N counts them, as a dataset's length does: four of six have a label, of twelve eight would."""
    labels = torch.tensor([0, -100, 2, 1, -100, 0])
    data = DataLoader(TensorDataset(X[:6], labels), batch_size=3)
    assert fit(mlp(), data, **FIXED).record.num_data == 4
    assert fit(mlp(), data, num_data=12, **FIXED).record.num_data == 8
    with pytest.raises(ValueError, match="`dataloader` has no label: all those of its 6 examples are -100"):
        fit(mlp(), batches(X[:6], torch.full((6,), -100)), **FIXED)


class Kinked(nn.Module):
    """Finite outputs whose gradient is not: the root of 0."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.body(x)
        return self.head((hidden - hidden.detach()).sqrt())  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", ["kfac", "ekfac", "diagonal", "dense"])
def test_gradients_that_are_not_finite_name_their_layer(kind: str) -> None:
    with pytest.raises(ValueError, match="The gradients of the layer 'body' are not finite"):
        fit(built(Kinked()), batches(X, Y), curvature=kind, **FIXED)


def test_device_of_the_sums() -> None:
    model = mlp()
    assert same(fit(model, batches(X, Y), device="cpu", **FIXED), fit(model, batches(X, Y), **FIXED))


# -------------------------------------------------------------------------------------------------- interrupted passes


class Failing:
    """A loader that breaks after some batches of some pass."""

    def __init__(self, loader: list[Any], passes: int, after: int) -> None:
        self.loader, self.passes, self.after = loader, passes, after

    def __iter__(self) -> Iterator[Any]:
        self.passes -= 1
        for number, batch in enumerate(self.loader):
            if self.passes == 0 and number == self.after:
                raise KeyboardInterrupt
            yield batch


@pytest.mark.parametrize(("kind", "breaks_in"), [("kfac", 2), ("dense", 2), ("ekfac", 2), ("ekfac", 3)])
@pytest.mark.parametrize("fisher", ["exact", "mc"])
def test_a_resumed_pass_gives_the_same_bits(kind: str, fisher: str, breaks_in: int, tmp_path: Path) -> None:
    """Pass 1 is a look at the first batch; pass 2 sums; pass 3 is EKFAC's, which starts anew."""
    loader, model, path = batches(X, Y, 2, 3, 4, 3), mlp(), tmp_path / "sums.safetensors"
    options = {"curvature": kind, "fisher": fisher, **FIXED}
    whole = fit(model, loader, **options)
    before = state(model)
    with pytest.raises(KeyboardInterrupt):
        fit(model, Failing(loader, breaks_in, 3), checkpoint=path, checkpoint_steps=2, **options)
    assert path.exists() and state(model) == before
    assert same(fit(model, loader, checkpoint=path, checkpoint_steps=2, **options), whole)
    assert same(fit(model, loader, checkpoint=path, checkpoint_steps=2, **options), whole)  # a finished pass
    assert [file.name for file in tmp_path.iterdir()] == ["sums.safetensors"]


def test_a_checkpoint_of_another_fit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "sums.safetensors"
    fit(mlp(), batches(X, Y), checkpoint=path, **FIXED)
    for changes in ({"fisher": "empirical"}, {"curvature": "ekfac"}, {"target_modules": ["2"]}, {"seed": 3}):
        with pytest.raises(ValueError, match="holds the sums of another fit"):
            fit(mlp(), batches(X, Y), checkpoint=path, **{**FIXED, **changes})
    with pytest.raises(ValueError, match="holds the sums of other weights"):
        fit(mlp(hidden=7), batches(X, Y), checkpoint=path, **FIXED)
    with pytest.raises(ValueError, match="holds the sums of other weights"):
        fit(built(mlp(), seed=5), batches(X, Y), checkpoint=path, **FIXED)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match="is damaged or no curvature file"):
        fit(mlp(), batches(X, Y), checkpoint=path, **FIXED)


# ------------------------------------------------------------------------------------------------- choosing the prior


def test_evidence_has_its_maximum_there() -> None:
    posterior = fitted(mlp(), X, Y, prior_precision="marglik")
    tau = posterior.prior_precision
    assert isinstance(tau, float)
    for other in (0.9, 1.1):
        assert posterior.with_prior_precision(other * tau).log_marginal_likelihood < posterior.log_marginal_likelihood


def test_one_precision_per_layer_is_no_worse() -> None:
    posterior = fitted(mlp(), X, Y, prior_precision="marglik_per_layer")
    assert isinstance(posterior.prior_precision, dict) and set(posterior.prior_precision) == {"0", "2"}
    assert posterior.log_marginal_likelihood >= tune(posterior, "marglik").log_marginal_likelihood
    for name in ("0", "2"):
        for factor in (0.8, 1.2):
            other = {**posterior.prior_precision, name: factor * posterior.prior_precision[name]}
            assert posterior.with_prior_precision(other).log_marginal_likelihood < posterior.log_marginal_likelihood


@pytest.mark.parametrize("task", ["classification", "multilabel", "regression", "tokens"])
def test_holdout_is_the_least_nll_of_the_predictive(task: str) -> None:
    """Each point of the grid against `predict` at that precision; the minimum lies within a step of the grid's."""
    model, x, y, likelihood = mlp(), 3 * X, Y, task
    if task == "multilabel":
        y = integers(2, 12, 3, seed=8).double()
    if task == "regression":
        x, y = regression_data()
        model = mlp(d_in=3, outputs=2)
    inputs: Any = x
    if task == "tokens":
        model, inputs, likelihood = reader(pooled=False), text(), "classification"
        y = classes(6, 4).masked_fill(inputs["attention_mask"] == 0, -100)
    held_out = batches(inputs, y, len(y) // 2, len(y) // 2)
    posterior = fitted(model, inputs, y, likelihood=likelihood, noise_std=0.5 if task == "regression" else None)
    cpu = torch.device("cpu")
    grid = GRID[::8]
    found = holdout_nll(posterior, (prepare(model, b, cpu) for b in held_out), grid)
    problem = {"tokens": "token_classification", "classification": None, "multilabel": None, "regression": None}[task]
    for tau in grid:
        predicted = posterior.with_prior_precision(tau).predict(
            inputs,
            problem_type=problem,  # type: ignore[arg-type]
            contrasts=task in ("classification", "tokens"),  # the same draws of logits
        )
        scores = predicted.log_prob(y)
        assert found[tau] == pytest.approx(-float(scores[~scores.isnan()].double().mean()), rel=1e-5)
    chosen = tune(posterior, "holdout", noise_std=0.5, validation=held_out, progress=False).prior_precision
    whole = holdout_nll(posterior, (prepare(model, b, cpu) for b in held_out))
    best = min(whole, key=whole.__getitem__)
    assert isinstance(chosen, float) and best / 10**0.25 <= chosen <= best * 10**0.25


def test_parabola_through_the_best_three(caplog: pytest.LogCaptureFixture) -> None:
    nll = {tau: (math.log(tau) - 0.9) ** 2 for tau in GRID}
    assert holdout_precision(nll) == pytest.approx(math.exp(0.9))
    assert caplog.text == ""


@pytest.mark.parametrize(("sign", "end", "side"), [(1, 0, "0.0001 (the smallest"), (-1, -1, "1e+06 (the largest")])
def test_a_minimum_at_the_end_of_the_grid_is_told(
    sign: int, end: int, side: str, caplog: pytest.LogCaptureFixture
) -> None:
    found = holdout_precision({tau: sign * math.log(tau) for tau in GRID})
    assert found == pytest.approx(GRID[end])
    assert f"at the end of its grid, tau = {side}" in caplog.text and len(caplog.records) == 1


def test_holdout_needs_labels() -> None:
    posterior = fitted(mlp(), X, Y)
    with pytest.raises(ValueError, match="`validation` needs labels"):
        tune(posterior, "holdout", validation=batches(X), progress=False)
    with pytest.raises(ValueError, match="`validation` holds no labelled example"):
        tune(posterior, "holdout", validation=[], progress=False)
    with pytest.raises(ValueError, match="needs `validation`"):
        tune(posterior, "holdout", progress=False)


def test_holdout_needs_few_logits() -> None:
    """A masked language model's head is of token classification, over a vocabulary."""
    sizes = {"vocab_size": 9, "hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = hf.BertForMaskedLM(hf.BertConfig(**sizes, intermediate_size=4))
    data = [{"input_ids": torch.tensor([[1, 2]]), "labels": torch.tensor([[3, 4]])}]
    with pytest.raises(ValueError, match="head has too many logits"):
        fit(model, data, prior_precision="holdout", validation=data, progress=False)
    posterior = fit(model, data, fisher="mc", prior_precision=1.0, progress=False)
    with pytest.raises(ValueError, match="head has too many logits"):
        tune(posterior, "holdout", validation=data, progress=False)
    with pytest.raises(ValueError, match="`method`='glm' needs few logits"):
        posterior.predict({"input_ids": torch.tensor([[1, 2]])})


def test_held_out_data_choose_the_prior_where_nothing_is_said() -> None:
    """And the leverages of training rows without them."""
    data = batches(X, Y)
    unsaid = [fit(mlp(), data, validation=held_out, **QUIET).prior_precision for held_out in (None, data)]
    named = [
        fit(mlp(), data, validation=data, prior_precision=name, **QUIET).prior_precision  # type: ignore[arg-type]
        for name in ("leverage", "holdout")
    ]
    assert unsaid == named and named[0] != named[1]


def test_a_prior_mean_moves_the_evidence_and_nothing_else() -> None:
    """|theta* - mu0|^2 in the place of |theta*|^2, over the layers that the other model has in the same shape."""
    model, origin = mlp(), mlp(d_in=7)  # the first layer has another shape there: its mean is 0
    with torch.no_grad():
        for parameter in origin.parameters():
            parameter.add_(0.1)
    plain, centred = (fit(model, batches(X, Y), prior_mean=mean, **FIXED) for mean in (None, origin))
    ours, theirs = dict(model.named_parameters()), dict(origin.named_parameters())
    for target in centred.targets:
        expected = 0.0
        for parameter in target.parameters.values():
            name = next(n for n, p in ours.items() if p is parameter)
            centre = theirs[name] if theirs[name].shape == parameter.shape else torch.zeros_like(parameter)
            expected += float((parameter - centre).detach().square().sum())
        assert centred.spectra[target.name].squared_norm == pytest.approx(expected, rel=1e-12)
    difference = sum(s.squared_norm for s in plain.spectra.values()) - sum(
        s.squared_norm for s in centred.spectra.values()
    )
    assert centred.log_marginal_likelihood - plain.log_marginal_likelihood == pytest.approx(0.5 * difference, rel=1e-9)
    assert torch.equal(centred.predict(X).logit_covariance, plain.predict(X).logit_covariance)
    with pytest.raises(ValueError, match="`prior_mean` has none of the covered layers"):
        fit(model, batches(X, Y), prior_mean=nn.Bilinear(1, 1, 1), **FIXED)


def test_a_prior_mean_is_saved(tmp_path: Path) -> None:
    model = mlp()
    posterior = fit(model, batches(X, Y), prior_mean=mlp(d_in=7), **FIXED)
    posterior.save(tmp_path)
    assert LaplacePosterior.load(tmp_path, model).log_marginal_likelihood == posterior.log_marginal_likelihood
