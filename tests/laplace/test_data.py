"""Batches of every form, and which of their examples and positions count."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from bayeformers.laplace import Curvature, CurvatureConfig, fit
from bayeformers.laplace.accumulate import Accumulator
from bayeformers.laplace.data import Batch, likelihood_of, prepare, real_examples
from bayeformers.laplace.targets import choose_targets
from bayeformers.likelihoods import logits_of
from tests.laplace.networks import QUIET, batches, classes, fitted, mlp, reader, text
from tests.laplace.reference import close, dense, normal
from tests.training.tiny import plain

CPU = torch.device("cpu")
X, Y = normal(6, 4), classes(6)


def prepared(batch: Any, model: nn.Module | None = None, keep: int | None = None) -> Batch:
    return prepare(mlp() if model is None else model, batch, CPU, keep)


@pytest.mark.parametrize("form", [(X, Y), [X, Y], (X,), X, {"x": X}, {"x": X, "labels": Y}, {"x": X, "label": Y}])
def test_forms_of_a_batch(form: Any) -> None:
    batch = prepared(form)
    inputs = batch.inputs if isinstance(batch.inputs, Tensor) else batch.inputs["x"]
    assert torch.equal(inputs, X) and len(batch) == 6
    has_labels = isinstance(form, tuple | list) and len(form) == 2 or isinstance(form, dict) and len(form) == 2
    assert (batch.labels is not None) == has_labels
    assert isinstance(batch.inputs, Tensor) or set(batch.inputs) == {"x"}
    assert batch.attended is None and not batch.has_padding


def test_a_mapping_beside_its_labels() -> None:
    batch = prepared((text(), Y))
    assert torch.equal(batch.labels, Y) and set(batch.inputs) == {"input_ids", "attention_mask"}  # type: ignore[arg-type]
    assert batch.attended is not None and batch.attended.dtype == torch.bool and batch.has_padding


@pytest.mark.parametrize("batch", [3, None, "text", (X, Y, 3), (3, Y), []])
def test_other_batches_are_refused(batch: Any) -> None:
    with pytest.raises(TypeError, match="`dataloader` must give mappings"):
        prepared(batch)


def test_examples_one_by_one() -> None:
    batch = prepared({**text(), "labels": Y})
    for n, one in enumerate(batch.examples()):
        assert len(one) == 1 and torch.equal(one.labels, Y[n : n + 1])  # type: ignore[arg-type]
        assert torch.equal(one.inputs["input_ids"], text()["input_ids"][n : n + 1])  # type: ignore[index]
        assert torch.equal(one.attended, text()["attention_mask"][n : n + 1].bool())  # type: ignore[arg-type]
        assert one.has_padding
    whole = fitted(reader(), text(), Y)
    singly = fit(reader(), batches(text(), Y, *[1] * 6), prior_precision=1.0, **QUIET)
    for layer, eigen in whole.layers.items():
        close(dense(singly.layers[layer]), dense(eigen), 1e-10)


def test_duplicates_are_cut_off() -> None:
    batch = prepared({**text(), "labels": Y, "scale": torch.tensor(2.0), "flag": True}, keep=4)
    assert len(batch) == 4 and torch.equal(batch.labels, Y[:4])  # type: ignore[arg-type]
    assert batch.attended is not None and len(batch.attended) == 4
    assert isinstance(batch.inputs, dict) and batch.inputs["scale"] == 2.0 and batch.inputs["flag"] is True
    pair = prepared((X, Y), keep=2)
    assert len(pair) == 2 and torch.equal(pair.labels, Y[:2])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("count", "ranks", "size"), [(10, 4, 2), (10, 4, 3), (7, 2, 4), (8, 2, 3), (3, 4, 2), (5, 8, 1)]
)
@pytest.mark.parametrize("shuffle", [False, True])
def test_every_example_counts_once(count: int, ranks: int, size: int, shuffle: bool) -> None:
    """torch's DistributedSampler repeats examples so that all processes have as many."""
    data = TensorDataset(torch.arange(count))
    seen: list[int] = []
    for rank in range(ranks):
        sampler = DistributedSampler(data, ranks, rank, shuffle=shuffle)
        loader = DataLoader(data, batch_size=size, sampler=sampler)
        for number, (values,) in enumerate(loader):
            keep = real_examples(loader, number, len(values))
            seen += values[:keep].tolist()
    assert sorted(seen) == list(range(count))


def test_other_loaders_have_no_duplicates() -> None:
    data = TensorDataset(X)
    assert real_examples([X], 0, 6) is None
    assert real_examples(DataLoader(data, batch_size=4), 1, 2) is None
    dropping = DistributedSampler(data, 4, 0, drop_last=True)
    assert real_examples(DataLoader(data, batch_size=4, sampler=dropping), 0, 4) is None


@pytest.mark.parametrize("ranks", [2, 3])
def test_processes_together_are_one(ranks: int) -> None:
    """The shares of a DistributedSampler, summed as processes would, are the whole data."""
    model, data = mlp(), TensorDataset(X[:5], Y[:5])
    total = Curvature(CurvatureConfig())
    for rank in range(ranks):
        loader = DataLoader(data, batch_size=2, sampler=DistributedSampler(data, ranks, rank))
        share = Curvature(CurvatureConfig())
        accumulator = Accumulator(share, model, choose_targets(model)[0], logits_of)
        for number, pair in enumerate(loader):
            batch = prepared(pair, model, real_examples(loader, number, len(pair[0])))
            if len(batch):
                accumulator.add(batch)
        total.merge(share)
    whole = fitted(model, X[:5], Y[:5], curvature="kfac")
    assert total.num_examples == 5
    assert total.log_likelihood == pytest.approx(whole.record.log_likelihood)
    for layer, eigen in whole.layers.items():
        close(dense(total.eigen(layer)), dense(eigen), 1e-12)


# ----------------------------------------------------------------------------------------------- models of transformers


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("single", "classification"), ("multi", "multilabel"), ("regression", "regression"),
        ("token", "classification"), ("causal", "classification"),
    ],
)  # fmt: skip
def test_likelihood_of_a_head(kind: str, expected: str) -> None:
    assert likelihood_of(plain(kind)) == expected


def test_likelihood_of_other_modules() -> None:
    assert likelihood_of(mlp()) == "classification"
    with pytest.raises(ValueError, match="no Laplace posterior for a 'question_answering' head"):
        likelihood_of(plain("question"))


def test_a_language_model_is_scored_on_the_next_token() -> None:
    """As its own loss is: the log-likelihood is minus the mean loss times the number of scored tokens."""
    model = plain("causal").double().eval()
    ids = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 9]])
    labels = ids.clone()
    labels[1, 3] = -100
    batch = prepared({"input_ids": ids, "labels": labels}, model)
    assert batch.labels is not None
    assert batch.labels.tolist() == [[4, 5, 6, -100], [8, 9, -100, -100]]
    posterior = fit(model, [{"input_ids": ids, "labels": labels}], prior_precision=1.0, fisher="mc", **QUIET)
    with torch.no_grad():
        loss = float(model(input_ids=ids, labels=labels).loss)
    assert posterior.record.log_likelihood == pytest.approx(-5 * loss)


def test_an_encoder_decoder_has_no_mask_of_its_positions() -> None:
    config = hf.T5Config(vocab_size=9, d_model=4, d_kv=2, d_ff=4, num_layers=1, num_heads=2, decoder_start_token_id=0)
    model = hf.T5ForConditionalGeneration(config)
    ids = torch.tensor([[1, 2, 3]])
    batch = prepared({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}, model)
    assert batch.attended is None and batch.has_padding
    assert isinstance(batch.inputs, dict) and "decoder_input_ids" in batch.inputs
