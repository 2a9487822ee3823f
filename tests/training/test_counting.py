"""N counts the items that the steps count, whatever the problem type: rows without a label are none."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

from bayeformers import to_bayesian
from bayeformers.training.elbo import count_label_column, infer_num_items
from tests.training import tiny
from tests.training.test_elbo import Stream

UNLABELLED = {"labels": -100, "start_positions": 99, "end_positions": 99}  # a position outside the text is ignored


def half_labelled(kind: str) -> tuple[tiny.Rows, tiny.Rows]:
    """Twenty rows, of which the last ten have no label, and the first ten alone."""
    columns = {name: column.clone() for name, column in tiny.dataset(kind, 20).columns.items()}
    for name in set(columns) & set(UNLABELLED):
        columns[name][10:] = UNLABELLED[name]
    return tiny.Rows(**columns), tiny.Rows(**{name: column[:10] for name, column in columns.items()})


@pytest.mark.parametrize("kind", ["single", "question"])
def test_rows_without_a_label_do_not_weaken_the_kl(kind: str, tmp_path: Path) -> None:
    """One step over all rows: with the unlabelled ones it is the step without them."""
    losses = []
    for data in half_labelled(kind):
        model = tiny.bayesian(kind)
        for name, parameter in model.named_parameters():
            if name.endswith("rho"):
                parameter.data += 1.0  # away from the prior
        trainer = tiny.trainer(tmp_path, model, kind, train_dataset=data, per_device_train_batch_size=20, max_steps=1)
        trainer.train()
        assert trainer.model.config.bayesian["num_training_items"] == 10
        entry = trainer.state.log_history[0]
        losses.append(entry["loss"] - entry["nll"])
        assert losses[-1] == pytest.approx(entry["kl"] / 10, rel=1e-4)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and losses[0] > 10


def segmenter() -> Any:
    config = hf.SegformerConfig(
        num_encoder_blocks=1, depths=[1], sr_ratios=[1], hidden_sizes=[8], patch_sizes=[7], strides=[4],
        num_attention_heads=[1], mlp_ratios=[1], decoder_hidden_size=8, num_labels=3,
    )  # fmt: skip
    return hf.SegformerForSemanticSegmentation(config)


def pixels() -> tiny.Rows:
    labels = torch.randint(0, 3, (12, 8, 8))
    return tiny.Rows(
        pixel_values=torch.randn(12, 3, 16, 16), labels=labels.masked_fill(torch.rand(12, 8, 8) < 0.4, 255)
    )


@pytest.mark.parametrize(
    "kind", ["single", "multi", "regression", "token", "masked", "causal", "seq2seq", "question", "pixels"]
)
def test_n_is_the_sum_of_what_an_epochs_steps_count(kind: str, tmp_path: Path) -> None:
    if kind == "pixels":
        model, data = to_bayesian(segmenter()), pixels()
    elif kind in ("multi", "regression"):
        model, data = tiny.bayesian(kind), tiny.dataset(kind, 20)
    else:
        model, data = tiny.bayesian(kind), half_labelled(kind)[0]
    trainer = tiny.trainer(tmp_path, model, train_dataset=data, max_steps=-1, num_train_epochs=1, noise_std=0.5)
    counted, count = [], trainer.count_items

    def counting(inputs: Any) -> Tensor:
        counted.append(int(count(inputs)))
        return count(inputs)

    batches = trainer.get_batch_samples

    def samples(*args: Any) -> Any:
        found = batches(*args)
        for batch in found[0]:
            counting(batch)
        return found

    trainer.get_batch_samples = samples
    trainer.train()
    assert trainer.model.config.bayesian["num_training_items"] == sum(counted) > 0


def test_labels_of_another_name_are_counted(tmp_path: Path) -> None:
    from tests.training.test_own_terms import Targets

    data = half_labelled("single")[0].columns
    renamed = tiny.Rows(input_ids=data["input_ids"], targets=data["labels"])
    trainer = tiny.trainer(tmp_path, Targets(), label_names=["targets"], train_dataset=renamed)
    trainer.train()
    assert trainer._objective.record.num_items == 10


@pytest.mark.parametrize("name", ["labels", "label", "label_ids"])
def test_a_column_is_read_without_making_a_row(name: str, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    columns = {key: value.tolist() for key, value in half_labelled("single")[0].columns.items()}
    columns[name] = columns.pop("labels")
    made = []

    def transform(rows: Any) -> Any:
        made.append(len(rows["input_ids"]))
        return {key: [torch.tensor(value) for value in values] for key, values in rows.items()}

    data = datasets.Dataset.from_dict(columns).with_transform(transform)
    assert count_label_column(data) == 10 and not made
    trainer = tiny.trainer(tmp_path, train_dataset=data, max_steps=1)
    trainer.train()
    assert trainer.model.config.bayesian["num_training_items"] == 10
    assert sum(made) <= 8, "the rows of one or two batches"


def test_a_column_that_is_no_class_per_row_is_not_read() -> None:
    datasets = pytest.importorskip("datasets")
    none = {"text": ["a", "b"]}
    for labels in ({}, {"labels": [0.5, 1.0]}, {"labels": [[1], [1, 2]]}, {"label": [0, 1], "labels": [0, 1]}):
        assert count_label_column(datasets.Dataset.from_dict({**none, **labels})) is None
    assert count_label_column([{"labels": 1}]) is None
    assert count_label_column(datasets.Dataset.from_dict({"target": [3, -100]}), ["target"]) == 1


def test_a_stream_of_known_length_is_counted_by_it() -> None:
    class Sized(Stream):
        def __len__(self) -> int:
            return 8

    assert infer_num_items(Sized(), "single_label_classification", count=lambda: pytest.fail("cannot")) == 8


def test_no_row_has_a_label(tmp_path: Path) -> None:
    data = tiny.dataset("single", 8)
    data.columns["labels"] = torch.full_like(data.columns["labels"], -100)
    with pytest.raises(ValueError, match="`train_dataset` has no label to learn from"):
        tiny.trainer(tmp_path, train_dataset=data).train()
