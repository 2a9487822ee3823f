"""A density from a model and its data: against a loop by hand; one forward pass; saving; what is refused."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from bayeformers import predict, to_bayesian
from bayeformers.ood import FeatureDensity, Place, fit_density, score_ood
from bayeformers.ood.density import FILE
from bayeformers.ood.features import pooled, read_features
from bayeformers.posteriors import PointPosterior, VariationalPosterior
from tests.training import tiny

Batch = dict[str, Tensor]


def batches(count: int = 6, size: int = 12) -> list[Batch]:
    rows = tiny.dataset("single", count * size)
    return [{name: column[i * size : (i + 1) * size] for name, column in rows.columns.items()} for i in range(count)]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny.plain(num_hidden_layers=2).double().eval()


@pytest.fixture(scope="module")
def held_out() -> list[Batch]:
    rows = tiny.dataset("single", 30, seed=9)
    return [dict(rows.columns)]


def fitted(model: nn.Module, held_out: list[Batch], **options: Any) -> FeatureDensity:
    return fit_density(model, batches(), validation=held_out, progress=False, **options)


def by_hand(model: nn.Module, batch: Batch, layer: int, pooling: str) -> Tensor:
    """Pooled row by row."""
    with torch.no_grad():
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        states = model(**inputs, output_hidden_states=True).hidden_states[layer]
    rows = [state[mask.bool()] for state, mask in zip(states, batch["attention_mask"], strict=True)]
    how = {
        "cls": lambda r: r[0],
        "mean": lambda r: r.mean(0),
        "max": lambda r: r.max(0).values,
        "last": lambda r: r[-1],
    }
    return torch.stack([how[pooling](row) for row in rows])


# -- features ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["cls", "mean", "max", "last"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_pooling_counts_attended_positions_alone(model: nn.Module, pooling: Any, side: str) -> None:
    batch = tiny.tokens(8)
    if side == "left":
        batch = {name: value.flip(1) for name, value in batch.items()}
    found = read_features(model, batch, [Place(1, pooling)])[1][Place(1, pooling)]
    torch.testing.assert_close(found, by_hand(model, batch, 1, pooling))


@pytest.mark.parametrize("pooling", ["cls", "mean", "max", "last"])
def test_what_padding_holds_does_not_matter(pooling: Any) -> None:
    states, mask = torch.randn(2, 4, 3), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    broken = states.masked_fill(mask[..., None] == 0, torch.nan)
    torch.testing.assert_close(
        pooled(broken, {"attention_mask": mask}, pooling), pooled(states, {"attention_mask": mask}, pooling)
    )


def test_feature_maps_are_pooled_over_pixels() -> None:
    maps = torch.randn(2, 3, 4, 5)
    torch.testing.assert_close(pooled(maps, maps, "mean"), maps.mean((2, 3)))
    torch.testing.assert_close(pooled(maps, maps, "max"), maps.amax((2, 3)))


def test_a_named_module_is_the_layer_of_that_number(model: nn.Module) -> None:
    batch = tiny.tokens(5)
    names, numbers = Place("bert.encoder.layer.0", "mean"), Place(1, "mean")
    found = read_features(model, batch, [names, numbers])[1]
    torch.testing.assert_close(found[names], found[numbers])


def test_a_score_needs_one_forward_pass_and_leaves_the_model(model: nn.Module, held_out: list[Batch]) -> None:
    density = fitted(model, held_out)
    assert {part.place.layer for part in density.parts if part.place} == {1, 2}
    calls: list[int] = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    model.train()
    density.score(model, batches(1)[0])
    handle.remove()
    assert calls == [1]
    assert all(module.training for module in model.modules())
    model.eval()


# -- the score --------------------------------------------------------------------------------------------------------


def test_a_score_is_the_sum_of_standardised_log_distances(model: nn.Module, held_out: list[Batch]) -> None:
    new = tiny.tokens(7, seed=4)
    total, spread = torch.zeros(7, dtype=torch.float64), torch.zeros(30, dtype=torch.float64)
    for layer in (1, 2):
        for pooling in ("cls", "mean", "max"):
            train, held, rows = (
                torch.cat([by_hand(model, batch, layer, pooling) for batch in data])
                for data in (batches(), held_out, [new])
            )
            scale, centre, n, p = train.std(0), train.mean(0), len(train) - 1, train.shape[1]
            correlation = torch.corrcoef(train.mT)
            trace, square = float(p), float(correlation.square().sum())
            weight = ((1 - 2 / p) * square + trace**2) / ((n + 1 - 2 / p) * (square - trace**2 / p))
            inverse = torch.linalg.inv((1 - weight) * correlation + weight * torch.eye(p, dtype=torch.float64))
            logs = [
                torch.einsum("ni,ij,nj->n", (x - centre) / scale, inverse, (x - centre) / scale).log()
                for x in (held, rows)
            ]
            deviation = logs[0].std(correction=0)
            logs[1] = torch.maximum(logs[1], logs[0].min())
            spread += (logs[0] - logs[0].mean()) / deviation
            total += (logs[1] - logs[0].mean()) / deviation
    density = fitted(model, held_out, method="marginal_mahalanobis")
    torch.testing.assert_close(density.score(model, new), total / spread.std(correction=0))
    torch.testing.assert_close(density.calibration, spread / spread.std(correction=0))
    assert density.num_rows == 72


@pytest.mark.parametrize("method", ["auto", "mahalanobis", "relative_mahalanobis", "gaussian", "knn"])
def test_a_reload_is_bit_equal(method: Any, model: nn.Module, held_out: list[Batch], tmp_path: Path) -> None:
    density = fitted(model, held_out, method=method)
    density.save(tmp_path)
    again = FeatureDensity.load(tmp_path, tiny.plain(num_hidden_layers=2).double())
    new = tiny.tokens(7, seed=4)
    assert torch.equal(again.score(model, new), density.score(model, new))
    assert torch.equal(again.calibration, density.calibration)
    assert (again.threshold(0.1), again.num_rows, str(again)) == (density.threshold(0.1), 72, str(density))


def test_rows_left_out_of_training_data_calibrate(model: nn.Module) -> None:
    density = fit_density(model, batches(20), progress=False)
    assert density.num_rows + len(density.calibration) == 240
    again = fit_density(model, batches(20), progress=False)
    assert torch.equal(density.calibration, again.calibration)
    assert not torch.equal(density.calibration, fit_density(model, batches(20), seed=1, progress=False).calibration)
    # 24 expected of 240: the binomial's standard deviation is 4.6; five of them
    assert abs(len(density.calibration) - 24) < 23


def test_few_references_are_a_sample_of_the_rows(model: nn.Module, held_out: list[Batch]) -> None:
    density = fitted(model, held_out, method="knn", layer=1, pooling="mean", num_references=10, num_neighbours=2)
    references = density.parts[0].tensors["references"]
    rows = torch.cat([by_hand(model, batch, 1, "mean") for batch in batches()])
    rows = rows / rows.norm(dim=1, keepdim=True)
    assert references.shape == (10, 16)
    assert torch.cdist(references, rows).amin(1).max() < 1e-6  # distances of equal vectors, by a difference of squares


def test_rows_without_a_label_that_counts_are_left_out(model: nn.Module, held_out: list[Batch]) -> None:
    data = batches()
    ignored = [{**batch, "labels": batch["labels"].clone()} for batch in data]
    for batch in ignored:
        batch["labels"][:6] = -100
    halves = [{name: value[6:] for name, value in batch.items()} for batch in data]
    new = tiny.tokens(7, seed=4)
    found, expected = (
        fit_density(model, given, method="mahalanobis", validation=held_out, progress=False)
        for given in (ignored, halves)
    )
    assert found.num_rows == expected.num_rows == 36
    torch.testing.assert_close(found.score(model, new), expected.score(model, new))


def test_a_converted_model_is_scored_at_its_mean(model: nn.Module, held_out: list[Batch]) -> None:
    expected = fitted(model, held_out).score(model, held_out[0])
    converted = to_bayesian(tiny.plain(num_hidden_layers=2).double(), delta=0.5)
    density = fitted(converted, held_out)
    for asked in (converted, VariationalPosterior(converted)):
        torch.testing.assert_close(density.score(asked, held_out[0]), expected)


def test_a_decoder_is_read_at_its_last_position() -> None:
    config = hf.GPT2Config(
        vocab_size=30, n_embd=16, n_layer=2, n_head=2, n_positions=16, num_labels=3, pad_token_id=0,
        bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    decoder = hf.GPT2ForSequenceClassification(config)
    density = fit_density(decoder, batches(), progress=False)
    assert {part.place.pooling for part in density.parts if part.place} == {"last", "mean", "max"}
    assert density.score(decoder, tiny.tokens(3)).isfinite().all()


def test_convolutions_are_read_by_name() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3))
    images = torch.randn(100, 1, 8, 8)
    density = fit_density(network, [(images, torch.arange(100) % 3)], layer=["0", "3"], pooling="mean", progress=False)
    assert (density.score(network, 5 + images[:9]) > density.threshold(0.2)).all()


# -- score_ood --------------------------------------------------------------------------------------------------------


def test_scores_of_a_prediction_are_its_properties(model: nn.Module) -> None:
    new, posterior = tiny.tokens(6, seed=3), VariationalPosterior(to_bayesian(tiny.plain().double(), delta=0.5))
    predictive = predict(posterior, new)
    expected = {
        "max_probability": -predictive.probs.amax(-1),
        "entropy": predictive.predictive_entropy,
        "mutual_information": predictive.mutual_information,
        "energy": -predictive.logits.mean(0).exp().sum(-1).log(),
        "max_logit": -predictive.logits.mean(0).amax(-1),
        "logit_variance": predictive.logit_variance,
        "auto": -predictive.probs.amax(-1),
    }
    for method, values in expected.items():
        torch.testing.assert_close(score_ood(posterior, new, method=method), values)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["mutual_information", "logit_variance"])
def test_a_point_estimate_has_no_draws_that_differ(model: nn.Module, method: Any) -> None:
    """0 for every input would pass for an answer."""
    with pytest.raises(ValueError, match=f"`method`='{method}' is how far draws .* point estimate"):
        score_ood(model, tiny.tokens(6, seed=3), method=method)


def test_auto_takes_the_density_that_is_given(model: nn.Module, held_out: list[Batch]) -> None:
    density = fitted(model, held_out)
    new = tiny.tokens(6, seed=3)
    for method in ("auto", "density"):
        assert torch.equal(score_ood(model, new, method=method, density=density), density.score(model, new))  # type: ignore[arg-type]
    torch.testing.assert_close(
        score_ood(model, new, method="energy", density=density), predict(PointPosterior(model), new).energy
    )


def test_tokens_are_averaged_where_the_mask_admits() -> None:
    tagger = tiny.plain("token").eval()
    new = tiny.tokens(5)
    entropy, mask = predict(PointPosterior(tagger), new).predictive_entropy, new["attention_mask"].bool()
    expected = torch.stack([row[kept].mean() for row, kept in zip(entropy, mask, strict=True)])
    torch.testing.assert_close(score_ood(tagger, new, method="entropy"), expected)


# -- refused ----------------------------------------------------------------------------------------------------------

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "method": ({"method": "nearest"}, "`method` must be one of"),
    "method_none": ({"method": None}, "`method` must be one of"),
    "layer_float": ({"layer": 1.5}, "`layer` must be"),
    "layer_bool": ({"layer": True}, "`layer` must be"),
    "layer_none": ({"layer": None}, "`layer` must be"),
    "layer_nested": ({"layer": [1, [2]]}, "`layer` must be"),
    "layer_beyond": ({"layer": 3}, "must be in -3..2"),
    "layer_below": ({"layer": -4}, "must be in -3..2"),
    "layer_name": ({"layer": "bert.nothing"}, "no module of the model"),
    "layer_uncalled": ({"layer": "bert.encoder.layer"}, "was not called"),
    "layers_empty": ({"layer": []}, "at least one"),
    "pooling": ({"pooling": "sum"}, "`pooling` must be one of"),
    "pooling_none": ({"pooling": None}, "`pooling` must be one of"),
    "neighbours_0": ({"num_neighbours": 0}, "`num_neighbours` must be a whole number"),
    "neighbours_float": ({"num_neighbours": 2.0}, "`num_neighbours` must be a whole number"),
    "neighbours_many": ({"method": "knn", "num_neighbours": 90}, "at most the 72 rows"),
    "neighbours_more": ({"num_neighbours": 20, "num_references": 10}, "at most `num_references`"),
    "references": ({"num_references": -1}, "`num_references` must be a whole number"),
    "seed": ({"seed": -1}, "`seed` must be a whole number"),
    "seed_text": ({"seed": "0"}, "`seed` must be a whole number"),
    "constant": ({"layer": 0, "pooling": "cls", "dataloader": [{"input_ids": torch.full((9, 3), 5)}]}, "the same for"),
    "unlabelled": ({"method": "gaussian", "dataloader": [tiny.tokens(9)]}, "needs classes"),
    "one_class": ({"method": "relative_mahalanobis", "dataloader": [tiny.tokens(9)]}, "needs classes"),
    "labels_beyond": ({"method": "mahalanobis", "dataloader": [{**tiny.tokens(2), "labels": torch.tensor([0, 7])}]},
                      "must be classes 0..2"),
    "labels_missing": ({"method": "mahalanobis", "dataloader": [*batches(1), tiny.tokens(3)]}, "needs a label"),
    "empty": ({"dataloader": []}, "is empty"),
    "iterator": ({"dataloader": iter(batches(1))}, "read more than once"),
    "rows": ({"dataloader": [{"input_ids": [1, 2, 3]}]}, "must give batches of tensors"),
    "number": ({"dataloader": 3}, "must give batches"),
    "one_row": ({"dataloader": [tiny.tokens(1)]}, "at least 2 rows"),
    "one_class_alone": ({"method": "relative_mahalanobis", "dataloader": [{**tiny.tokens(9), "labels": torch.ones(9)}]},
                        "at least 2 classes"),
    "ignored": ({"dataloader": [{**tiny.tokens(9), "labels": torch.full((9,), -100)}]}, "labels other than -100"),
    "outliers_unused": ({"method": "knn", "outliers": batches(1)}, "`outliers` choose the weights"),
    "outliers_empty": ({"outliers": []}, "`outliers` is empty"),
    "validation_empty": ({"validation": []}, "rows are left to standardise"),
    "validation_one": ({"validation": [tiny.tokens(1)]}, "rows are left to standardise"),
    "validation_iterator": ({"validation": iter(batches(1))}, "read more than once"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_argument_of_fit_density_is_refused(name: str, model: nn.Module, held_out: list[Batch]) -> None:
    options, match = WRONG[name]
    given = {"dataloader": batches(), "validation": held_out, "progress": False, **options}
    with pytest.raises((TypeError, ValueError), match=match):
        fit_density(model, **given)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda m, d, x: score_ood(m, x, method="density"), "needs a `density`"),
        (lambda m, d, x: score_ood(m, x, method="novelty"), "`method` must be one of"),
        (lambda m, d, x: score_ood(m, x, density=m), "must be a FeatureDensity"),
        (lambda m, d, x: score_ood("model", x, density=d), "must be a torch.nn.Module"),
        (lambda m, d, x: score_ood(None, x), "must be a torch.nn.Module"),
        (lambda m, d, x: score_ood(m, "text", density=d), "`inputs` must be"),
        (lambda m, d, x: score_ood(m, {"input_ids": [[1, 2]]}, density=d), "must be a tensor"),
        (lambda m, d, x: score_ood(m, {k: v[:0] for k, v in x.items()}, density=d), "empty"),
        (lambda m, d, x: score_ood(m, {"input_ids": x["input_ids"].double()}, density=d), "whole numbers"),
        (lambda m, d, x: score_ood(m, x, method="energy", num_samples=0), "`num_samples`"),
        (lambda m, d, x: score_ood(m, x, method="energy", seed=-1), "`seed`"),
        (lambda m, d, x: score_ood(tiny.plain("regression"), x, method="energy"), "regression"),
        (lambda m, d, x: score_ood(tiny.plain("regression"), x), "regression"),
        (lambda m, d, x: d.score(tiny.plain("single"), x), "fitted to other weights"),
        (lambda m, d, x: d.threshold(0.0), "`false_alarm_rate`"),
        (lambda m, d, x: d.threshold(0.001), "too few .* more `validation` rows"),
        (lambda m, d, x: d.save(3), "`directory`"),
        (lambda m, d, x: FeatureDensity.load("/nowhere/at/all", m), "There is no density file"),
        (lambda m, d, x: FeatureDensity.load("folder", "model"), "`model` must be"),
        (lambda m, d, x: fit_density("model", [x]), "must be a torch.nn.Module"),
        (lambda m, d, x: fit_density(nn.Linear(2, 2), [torch.ones(9, 2)], progress=False), "name a module"),
    ],
)  # fmt: skip
def test_a_wrong_call_is_refused(
    call: Callable[[nn.Module, FeatureDensity, Batch], Any], match: str, model: nn.Module, held_out: list[Batch]
) -> None:
    density = fitted(model, held_out, layer=2, pooling="mean")
    with pytest.raises((TypeError, ValueError), match=match):
        call(model, density, tiny.tokens(3))


def test_another_models_weights_are_refused(model: nn.Module, held_out: list[Batch], tmp_path: Path) -> None:
    fitted(model, held_out).save(tmp_path)
    moved = tiny.plain(num_hidden_layers=2).double()
    with torch.no_grad():
        next(moved.parameters())[0, 0] += 1e-12
    for other in (moved, tiny.plain(num_hidden_layers=2), tiny.plain().double()):
        with pytest.raises(ValueError, match="fitted to other weights"):
            FeatureDensity.load(tmp_path, other)


def test_weights_that_change_after_the_fit_are_refused(held_out: list[Batch]) -> None:
    """In place, as an optimizer changes them; of a wrapped model, and where they are put back, scores stay."""
    model = tiny.plain(num_hidden_layers=2).eval()
    density, rows = fitted(model, held_out, layer=2, pooling="mean"), tiny.tokens(3)
    scores = density.score(model, rows)
    assert torch.equal(density.score(nn.DataParallel(model), rows), scores)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        model.classifier.bias.add_(1)  # type: ignore[union-attr,operator]
    for other in (model, PointPosterior(model)):
        with pytest.raises(ValueError, match="fitted to other weights"):
            density.score(other, rows)
    model.load_state_dict(state)
    assert torch.equal(density.score(model, rows), scores)


@pytest.mark.parametrize("method", ["marginal_mahalanobis", "relative_mahalanobis", "gaussian", "knn"])
def test_features_that_are_not_finite_are_flagged(method: Any) -> None:
    """NaN would be above no threshold."""
    net, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(60, 3)
    density = fit_density(net, [(x, (x[:, 0] > 0).long())], method=method, layer="0", validation=[x], progress=False)
    scores = density.score(net, torch.tensor([[math.nan] * 3, [math.inf] * 3, [0.0] * 3]))
    assert (scores[:2] > density.threshold(0.1)).all() and bool(scores[2].isfinite())


def test_rows_of_one_class_have_no_relative_distance(model: nn.Module, held_out: list[Batch]) -> None:
    """Unasked it is left out; the other families do not need it."""
    one = [{**batch, "labels": torch.ones_like(batch["labels"])} for batch in batches()]
    density = fit_density(model, one, validation=held_out, progress=False)
    assert {part.method for part in density.parts} <= {"marginal_mahalanobis", "energy"}


def test_a_damaged_file_is_refused(model: nn.Module, held_out: list[Batch], tmp_path: Path) -> None:
    fitted(model, held_out).save(tmp_path)
    whole = (tmp_path / FILE).read_bytes()
    for damaged in (whole[:-8], whole[:-1] + bytes([whole[-1] ^ 1]), b"", b"nothing"):
        (tmp_path / FILE).write_bytes(damaged)
        with pytest.raises(ValueError, match="damaged|no density file"):
            FeatureDensity.load(tmp_path, model)


def test_a_failed_fit_leaves_the_model_as_it_was(model: nn.Module) -> None:
    model.train()
    with pytest.raises(ValueError, match="needs a label"):
        fit_density(model, [*batches(1), tiny.tokens(3)], method="mahalanobis", progress=False)
    assert all(module.training for module in model.modules())
    model.eval()
    assert math.isfinite(float(score_ood(model, tiny.tokens(2)).sum()))
