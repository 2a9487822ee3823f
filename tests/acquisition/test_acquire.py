"""`acquire`: pools in every form, joint draws, ties, heads, and what is refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, BertForTokenClassification, default_data_collator

from bayeformers import acquire, laplace, predict, to_bayesian
from bayeformers.acquisition import STRATEGIES, bald, epig, gaussian_bald
from bayeformers.laplace.linear_draws import linearized_draws
from bayeformers.posteriors import (
    DropoutPosterior,
    EnsemblePosterior,
    MixturePosterior,
    PointPosterior,
    TemperaturePosterior,
)

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(40, 4, generator=GENERATOR)
Y = torch.randint(3, (40,), generator=GENERATOR)
INFORMATION = ("bald", "power_bald", "batchbald", "epig")


def network(seed: int = 0, outputs: int = 3) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, outputs))


def fitted(**options: Any) -> laplace.LaplacePosterior:
    return laplace.fit(network(), [(X, Y)], prior_precision=1.0, progress=False, **options)


def chosen(posterior: Any, pool: Any = X, n: int = 5, strategy: str = "bald", **options: Any) -> list[int]:
    return acquire(posterior, pool, n, strategy, progress=False, **options).indices  # type: ignore[arg-type]


def tiny_bert(kind: type = BertForSequenceClassification, **options: Any) -> Any:
    torch.manual_seed(0)
    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = BertConfig(vocab_size=20, max_position_embeddings=8, num_labels=3, **size, **options)
    return to_bayesian(kind(config).eval(), delta=0.5)


IDS = torch.randint(20, (10, 5), generator=GENERATOR)


# --- Which rows -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_chooses_distinct_rows_again(strategy: str) -> None:
    posterior = fitted()
    first = acquire(posterior, X, 7, strategy, progress=False)  # type: ignore[arg-type]
    assert len(set(first.indices)) == 7 and set(first.indices) <= set(range(40))
    assert first.scores.shape == (7,) and first.scores.dtype == torch.float64
    assert first.indices == chosen(posterior, n=7, strategy=strategy)
    assert sorted(chosen(posterior, n=40, strategy=strategy)) == list(range(40))


def test_scores_are_those_of_the_converted_models_predictions() -> None:
    model = to_bayesian(network(), delta=0.5)
    log_probs = predict(model, X, num_samples=32, method="sample", seed=3).log_probs
    assert log_probs is not None
    found = acquire(model, X, 40, "bald", seed=3, progress=False)
    torch.testing.assert_close(found.scores, bald(log_probs)[found.indices], atol=1e-7, rtol=0)
    targets = acquire(model, X, 40, "epig", targets=X[:6], seed=3, progress=False)
    torch.testing.assert_close(
        targets.scores, epig(log_probs, _first(log_probs, 6))[targets.indices], atol=1e-7, rtol=0
    )
    assert (found.scores.diff() <= 0).all()


def _first(log_probs: Tensor, count: int) -> Tensor:
    return log_probs[:, :count]


@pytest.mark.parametrize("strategy", INFORMATION)
def test_batches_change_nothing(strategy: str) -> None:
    """A draw is one network for all rows, whichever batch they are in."""
    whole, parts = (
        acquire(fitted(), X, 5, strategy, batch_size=size, progress=False)  # type: ignore[arg-type]
        for size in (40, 3)
    )
    assert whole.indices == parts.indices
    torch.testing.assert_close(whole.scores, parts.scores, atol=1e-6, rtol=0)


def test_laplace_draws_are_joint_linearised_ones() -> None:
    """Not those of "glm", drawn row by row, under which two equal rows would tell twice as much as one."""
    posterior = fitted()
    log_probs = linearized_draws(posterior, X, num_samples=32, seed=0).log_softmax(-1)
    found = acquire(posterior, X, 40, progress=False)
    torch.testing.assert_close(found.scores, bald(log_probs)[found.indices], atol=1e-6, rtol=0)
    best = found.indices[0]
    twins = acquire(posterior, X[[best] * 30], 30, "batchbald", progress=False)
    assert float(twins.scores[1]) < 0.9 * float(twins.scores[0])
    assert float(twins.scores.sum()) < float(torch.tensor(32.0).log()), "no more than which draw it is"


def test_a_linear_last_layer_is_its_own_linearisation() -> None:
    posterior = fitted(subset="last_layer", curvature="full")
    linear, sampled = (acquire(posterior, X, 40, method=m, progress=False) for m in ("linearized", "sample"))  # type: ignore[arg-type]
    torch.testing.assert_close(linear.scores, sampled.scores, atol=1e-5, rtol=0)


def test_equal_rows_are_not_taken_from_the_front() -> None:
    pool = X[:1].expand(40, 4)
    found = [chosen(PointPosterior(network()), pool, 3, "entropy", seed=seed) for seed in range(4)]
    assert len({tuple(rows) for rows in found}) == 4


def test_power_bald_takes_rows_in_proportion_to_their_scores() -> None:
    """Two members, whose seed changes no draw: row by row, 300 first choices are within 4 deviations of the shares."""
    posterior = EnsemblePosterior(network(), [network(1), network(2)])
    pool = X[:5]
    scores = acquire(posterior, pool, 5, progress=False)
    firsts = [chosen(posterior, pool, 1, "power_bald", seed=seed)[0] for seed in range(300)]
    for row, share in zip(scores.indices, (scores.scores / scores.scores.sum()).tolist(), strict=True):
        assert abs(firsts.count(row) / 300 - share) < 4 * (share * (1 - share) / 300) ** 0.5


# --- Pools ------------------------------------------------------------------------------------------------------------
class Named(nn.Module):
    """Takes its argument by name."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network()

    def forward(self, x: Tensor) -> Any:
        return {"logits": self.inner(x)}


def test_pools_of_every_form_give_the_same_rows() -> None:
    model = to_bayesian(Named(), delta=0.5)
    columns = {"x": X.tolist(), "labels": Y.tolist(), "text": ["a"] * 40}
    pools = [
        {"x": X, "labels": Y},
        Dataset.from_dict(columns),
        [{"x": x, "label": int(y)} for x, y in zip(X, Y, strict=True)],
    ]
    for strategy in ("bald", "batchbald", "epig"):
        found = [chosen(model, pool, 4, strategy) for pool in pools]
        assert found[0] == found[1] == found[2]
    assert chosen(to_bayesian(network(), delta=0.5), list(X)) == chosen(to_bayesian(network(), delta=0.5), X)


def test_a_collator_sees_rows_of_several_lengths_or_raw_columns() -> None:
    model = tiny_bert()
    rows = [{"input_ids": IDS[i, : 3 + i % 3].tolist(), "labels": 0} for i in range(10)]

    def padded(part: list[dict[str, Any]]) -> dict[str, Tensor]:
        assert all(set(row) == {"input_ids"} for row in part)
        ids = nn.utils.rnn.pad_sequence([torch.tensor(row["input_ids"]) for row in part], batch_first=True)
        lengths = torch.tensor([len(row["input_ids"]) for row in part])
        return {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long()}

    found = chosen(model, rows, 4, "batchbald", data_collator=padded, batch_size=10)
    assert found == chosen(model, rows, 4, "batchbald", data_collator=padded, batch_size=1)
    raw = [{"place": i} for i in range(10)]
    assert (
        len(chosen(model, raw, 2, data_collator=lambda part: {"input_ids": IDS[[row["place"] for row in part]]})) == 2
    )
    with pytest.raises(ValueError, match="`data_collator`"):
        chosen(model, rows, 4, batch_size=10)


# --- Posteriors and heads --------------------------------------------------------------------------------------------
def test_other_posteriors() -> None:
    dropout = nn.Sequential(nn.Linear(4, 32), nn.Dropout(0.5), nn.Linear(32, 3))
    posteriors = [
        DropoutPosterior(dropout),
        EnsemblePosterior(network(), [network(seed) for seed in (1, 2, 3)]),
        MixturePosterior([fitted(), fitted(curvature="diagonal")]),
        TemperaturePosterior(fitted(), weight=0.5),
    ]
    for posterior in posteriors:
        for strategy in INFORMATION:
            assert len(set(chosen(posterior, strategy=strategy))) == 5


def test_a_temperature_flattens_every_draw() -> None:
    log_probs = (linearized_draws(fitted(), X, num_samples=32).log_softmax(-1) * 0.5).log_softmax(-1)
    found = acquire(TemperaturePosterior(fitted(), weight=0.5), X, 40, progress=False)
    torch.testing.assert_close(found.scores, bald(log_probs)[found.indices], atol=1e-6, rtol=0)


def test_labels_are_summed_and_tokens_averaged() -> None:
    pool = {"input_ids": IDS, "attention_mask": (torch.arange(5) < torch.arange(1, 11)[:, None].clamp_max(5)).long()}
    labels = tiny_bert(problem_type="multi_label_classification")
    log_probs = predict(labels, pool, num_samples=32, method="sample").log_probs
    found = acquire(labels, pool, 10, progress=False)
    assert log_probs is not None and log_probs.shape == (32, 10, 3, 2)
    torch.testing.assert_close(found.scores, bald(log_probs).sum(1)[found.indices], atol=1e-7, rtol=0)
    tokens = tiny_bert(BertForTokenClassification)
    log_probs = predict(tokens, pool, num_samples=32, method="sample").log_probs
    assert log_probs is not None
    mask = pool["attention_mask"].double()
    expected = (bald(log_probs) * mask).sum(1) / mask.sum(1)
    found = acquire(tokens, pool, 10, progress=False)
    torch.testing.assert_close(found.scores, expected[found.indices], atol=1e-7, rtol=0)


def regression() -> laplace.LaplacePosterior:
    data = torch.randn(30, 4, generator=torch.Generator().manual_seed(1)) * 0.1
    batches = [(data, data.sum(1, keepdim=True))]
    options: dict[str, Any] = {"likelihood": "regression", "noise_std": 0.1, "prior_precision": 1.0}
    return laplace.fit(network(outputs=1), batches, progress=False, **options)


def test_scores_of_a_regression() -> None:
    posterior = regression()
    values = linearized_draws(posterior, X, num_samples=32)[..., 0]
    found = acquire(posterior, X, 40, progress=False)
    expected = gaussian_bald(values, torch.full((40,), 0.01))
    torch.testing.assert_close(found.scores, expected[found.indices], atol=1e-6, rtol=0)
    for strategy in ("batchbald", "epig", "entropy", "power_bald"):
        assert len(set(chosen(posterior, strategy=strategy))) == 5


# --- Refused ----------------------------------------------------------------------------------------------------------
BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "n larger than the pool": (lambda: chosen(fitted(), n=41), "`n` must be at most the 40 rows"),
    "n of 0": (lambda: chosen(fitted(), n=0), "`n` must be a whole number >= 1, got 0"),
    "n no number": (lambda: chosen(fitted(), n=2.5), "`n` must be a whole number"),  # type: ignore[arg-type]
    "unknown strategy": (lambda: chosen(fitted(), strategy="badge"), "`strategy` must be one of"),
    "unknown method": (lambda: chosen(fitted(), method="glm"), "`method` must be one of"),
    "empty pool": (lambda: chosen(fitted(), X[:0]), "`pool` is empty"),
    "empty list": (lambda: chosen(fitted(), []), "`pool` is empty"),
    "empty targets": (lambda: chosen(fitted(), strategy="epig", targets=X[:0]), "`targets` is empty"),
    "targets of another strategy": (lambda: chosen(fitted(), targets=X), "`targets` are of `strategy`='epig'"),
    "a pool of text": (lambda: chosen(fitted(), "text"), "`pool` must be"),
    "a pool of lists": (lambda: chosen(fitted(), {"x": X.tolist()}), "`pool` must be"),
    "rows of text": (lambda: chosen(fitted(), ["a", "b"], 1), "rows that are mappings or tensors"),
    "an iterator": (lambda: chosen(fitted(), iter(X)), "`pool` must be"),
    "tensors of two lengths": (lambda: chosen(fitted(), {"a": X, "b": X[:3]}), "one number of rows"),
    "one draw": (lambda: chosen(fitted(), num_samples=1), "`num_samples`=1"),
    "no draw": (lambda: chosen(fitted(), num_samples=0), "`num_samples` must be"),
    "a point estimate": (lambda: chosen(PointPosterior(network())), "one draw of PointPosterior"),
    "a plain model": (lambda: chosen(network(), strategy="batchbald"), "every score would be 0"),
    "an ensemble of one": (lambda: chosen(EnsemblePosterior(network(), [network()])), "draws that can disagree"),
    "twins as an ensemble": (
        lambda: chosen(EnsemblePosterior(network(), [network(1), network(1)])),
        "the draws agree on every row",
    ),
    "masks of elements": (
        lambda: chosen(
            DropoutPosterior(nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 3)), masks="element"), strategy="batchbald"
        ),
        "one network for all rows",
    ),
    "linearised dropout": (
        lambda: chosen(DropoutPosterior(nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 3))), method="linearized"),
        "'linearized' draws of a LaplacePosterior",
    ),
    "unequal weights": (
        lambda: chosen(MixturePosterior([fitted(), fitted()], weights=[1, 2])),
        "a mixture of equal `weights`",
    ),
    "rows that are not finite": (lambda: chosen(fitted(), X * torch.nan), "must not be NaN"),
    "values that are not finite": (lambda: chosen(regression(), X * torch.nan), "not finite on 40 of 40 rows"),
    "joint information of tokens": (
        lambda: chosen(tiny_bert(BertForTokenClassification), {"input_ids": IDS}, strategy="batchbald"),
        "'batchbald' needs one class per row",
    ),
    "one configuration": (lambda: chosen(fitted(), num_configurations=1), "`num_configurations`"),
    "a negative seed": (lambda: chosen(fitted(), seed=-1), "`seed`"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(name: str) -> None:
    call, message = BAD[name]
    with pytest.raises((ValueError, TypeError), match=message.replace("(", r"\(")):
        call()


def test_a_default_collator_is_transformers_own() -> None:
    rows = [{"x": x} for x in X]
    model = to_bayesian(Named(), delta=0.5)
    assert chosen(model, rows) == chosen(model, rows, data_collator=default_data_collator)
