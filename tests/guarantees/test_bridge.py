"""From a posterior and a dataset to sets and intervals: the rows that are read, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification, BertForTokenClassification

import bayeformers
from bayeformers import predict, to_bayesian
from bayeformers.guarantees import PredictionSets, attach_sets, fit_prediction_intervals, fit_prediction_sets, sets_of
from bayeformers.guarantees.labelled import calibration_rows
from bayeformers.posteriors import PointPosterior, VariationalPosterior

SIZE = 24


def bert(kind: Any = BertForSequenceClassification, **options: Any) -> Any:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, **options
    )
    return kind(config).eval()


def dataset(labels: list[Any], length: int = 5) -> Dataset:
    ids = torch.randint(1, 30, (len(labels), length), generator=torch.Generator().manual_seed(1)).tolist()
    return Dataset.from_dict({
        "input_ids": ids,
        "label": labels,
        "text": ["a text"] * len(labels),
        "source": ["web", "book"] * (SIZE // 2),
    })


CLASSES = dataset([i % 3 for i in range(SIZE)])


@pytest.fixture(scope="module")
def posterior() -> Any:
    return VariationalPosterior(to_bayesian(bert(num_labels=3), delta=0.5))


def test_the_rows_are_predicted_in_order_and_other_columns_left_out(posterior: Any) -> None:
    expected = predict(posterior, {"input_ids": torch.tensor(CLASSES["input_ids"])}, num_samples=3, seed=5)
    for source in (CLASSES, list(CLASSES), DataLoader(_Tensors(), batch_size=7)):
        found = calibration_rows(posterior, source, num_samples=3, batch_size=7, seed=5)
        assert torch.allclose(torch.cat([one.probs for one, _ in found.parts]), expected.probs, atol=1e-6)
        assert torch.cat([labels for _, labels in found.parts]).tolist() == CLASSES["label"]
    for source in (CLASSES, list(CLASSES)):
        assert calibration_rows(posterior, source, "source", batch_size=7).groups == ["web", "book"] * (SIZE // 2)


class _Tensors(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, number: int) -> Any:
        row = CLASSES[number]
        return {"input_ids": torch.tensor(row["input_ids"]), "labels": row["label"]}


def test_sets_of_a_posterior_are_those_of_its_probabilities(posterior: Any) -> None:
    sets = fit_prediction_sets(posterior, CLASSES, groups="source", num_samples=3, batch_size=7)
    probs = predict(posterior, {"input_ids": torch.tensor(CLASSES["input_ids"])}, num_samples=3).probs
    plain = fit_prediction_sets(probs, torch.tensor(CLASSES["label"]), groups=CLASSES["source"])
    assert {key: cutoff.num_rows for key, cutoff in sets.cutoffs.items()} == {"web": 12, "book": 12}
    for key, cutoff in plain.cutoffs.items():
        assert sets.cutoffs[key].threshold == pytest.approx(cutoff.threshold, abs=1e-5)
    assert sets.num_samples == 3 and sets.weights is not None and plain.weights is None


def test_rows_of_different_lengths_take_a_collator() -> None:
    model = bert(num_labels=3)
    rows = [{"input_ids": list(range(1, 3 + i % 4)), "labels": i % 3} for i in range(SIZE)]
    with pytest.raises(ValueError, match="`data_collator` must make one batch"):
        fit_prediction_sets(model, rows)

    def pad(batch: list[Any]) -> dict[str, torch.Tensor]:
        ids = [torch.tensor(row["input_ids"]) for row in batch]
        padded = nn.utils.rnn.pad_sequence(ids, batch_first=True)
        labels = torch.tensor([row["labels"] for row in batch])
        return {"input_ids": padded, "attention_mask": (padded > 0).long(), "labels": labels}

    sets = fit_prediction_sets(model, rows, data_collator=pad, batch_size=5)
    one = fit_prediction_sets(model, rows, data_collator=pad, batch_size=1)
    assert sets.cutoffs["all"].threshold == pytest.approx(one.cutoffs["all"].threshold, abs=1e-5)
    assert isinstance(sets, PredictionSets) and sets.num_examples == SIZE


def test_several_labels_and_regressions_of_a_model() -> None:
    model = bert(num_labels=2, problem_type="multi_label_classification")
    rows = dataset([[float(i % 2), float(i % 3 == 0)] for i in range(SIZE)])
    assert fit_prediction_sets(model, rows, promise="fnr").num_classes == 2
    model = to_bayesian(bert(num_labels=1, problem_type="regression"), delta=0.5)
    values = dataset([i / 10 for i in range(SIZE)])
    intervals = fit_prediction_intervals(model, values, scale="epistemic", num_samples=4)
    predictive = predict(model, {"input_ids": torch.tensor(values["input_ids"])}, num_samples=4)
    ends = intervals.predict(predictive)
    covered = (ends[:, 0] <= torch.tensor(values["label"])) & (torch.tensor(values["label"]) <= ends[:, 1])
    assert covered.sum() >= 23  # ceil(25 * 0.9) rows have a score up to the threshold; up to rounding of batches
    with pytest.raises(ValueError, match="is 0 for every row: a point estimate has no epistemic part"):
        fit_prediction_intervals(PointPosterior(bert(num_labels=1)), values, scale="epistemic")


@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        ({"dataset": None}, ValueError, "`dataset` is missing"),
        ({"dataset": 3}, TypeError, "`dataset` must be a dataset of rows"),
        ({"dataset": []}, ValueError, "`dataset` is empty"),
        ({"dataset": DataLoader([torch.ones(3)])}, TypeError, "must give batches with labels"),
        ({"dataset": CLASSES.remove_columns("label")}, ValueError, '`dataset` needs a column "labels"'),
        ({"groups": "author"}, ValueError, "`groups` must be a column of the dataset"),
        ({"dataset": list(CLASSES), "groups": "author"}, ValueError, "`groups` must be a column of the dataset"),
        ({"dataset": DataLoader(_Tensors()), "groups": "source"}, ValueError, "needs a dataset of rows"),
        ({"num_samples": 0}, ValueError, "`num_samples`"),
        ({"batch_size": 0}, ValueError, "`batch_size`"),
    ],
)
def test_bad_input(posterior: Any, change: dict[str, Any], error: type[Exception], told: str) -> None:
    options = {"dataset": CLASSES, "num_samples": 1, **change}
    with pytest.raises(error, match=told):
        fit_prediction_sets(posterior, **options)


def test_heads_of_other_kinds_are_refused_by_name() -> None:
    tokens = dataset([[i % 3] * 5 for i in range(SIZE)])
    with pytest.raises(ValueError, match="one decision per input, got a 'token_classification' head"):
        fit_prediction_sets(bert(BertForTokenClassification, num_labels=3), tokens)
    with pytest.raises(ValueError, match="see `fit_prediction_sets`"):
        fit_prediction_intervals(bert(num_labels=3), CLASSES)
    with pytest.raises(ValueError, match="see `fit_prediction_intervals`"):
        fit_prediction_sets(bert(num_labels=1, problem_type="regression"), dataset([0.5] * SIZE))


def test_a_model_carries_its_sets_into_its_folder_and_back(posterior: Any, tmp_path: Path) -> None:
    model = posterior.model
    sets = fit_prediction_sets(posterior, CLASSES, num_samples=2)
    attach_sets(model, sets)
    model.save_pretrained(tmp_path)
    again = bayeformers.from_pretrained(tmp_path)
    assert sets_of(again) == sets == sets_of(VariationalPosterior(again))
    with torch.no_grad():
        again.classifier.weight.add_(1.0)
    assert sets_of(again) is None
    with pytest.raises(ValueError, match="other weights"):
        attach_sets(again, sets)
    again.save_pretrained(tmp_path)  # the file there is of the former weights
    assert not (tmp_path / "prediction_sets.json").exists()
    attach_sets(model, None)
    assert sets_of(model) is None and sets_of(3) is None
    with pytest.raises(TypeError, match="`sets` must be PredictionSets"):
        attach_sets(model, {"alpha": 0.1})  # type: ignore[arg-type]


def test_intervals_come_back_and_a_damaged_file_only_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = to_bayesian(bert(num_labels=1, problem_type="regression"), delta=0.5)
    values = dataset([i / 10 for i in range(SIZE)])
    intervals = fit_prediction_intervals(model, values, scale="none", num_samples=2)
    attach_sets(model, intervals)
    model.save_pretrained(tmp_path)
    assert sets_of(bayeformers.from_pretrained(tmp_path)) == intervals
    (tmp_path / "prediction_intervals.json").write_text("{")
    assert sets_of(bayeformers.from_pretrained(tmp_path)) is None
    assert "is damaged, or of other weights" in caplog.text
