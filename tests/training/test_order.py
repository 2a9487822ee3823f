"""Evaluation by length: rows, uncertainties, labels, inputs and losses come back in the dataset's order."""

from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    IterableDataset,
    RandomSampler,
    Subset,
    SubsetRandomSampler,
)
from transformers import EvalPrediction, Trainer

from bayeformers.posteriors import VariationalPosterior
from bayeformers.training import BayesianTrainer
from bayeformers.training.order import LengthCache, example_lengths
from tests.training import tiny

NUM = 23


def rows(num: int = NUM, kind: str = "single") -> list[dict[str, Any]]:
    """Examples of 3 to 6 tokens, unpadded."""
    data, found = tiny.dataset(kind, num, seed=3), []
    for row in (data[i] for i in range(num)):
        size = int(row["attention_mask"].sum())
        labels = row["labels"][:size] if kind == "token" else row["labels"]
        found.append({"input_ids": row["input_ids"][:size].tolist(), "labels": labels.tolist()})
    return found


class Made(torch.utils.data.Dataset):
    """A map-style dataset that knows no columns."""

    def __init__(self, examples: list[dict[str, Any]]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.examples[index]


class Stream(IterableDataset):
    def __init__(self, examples: list[dict[str, Any]]) -> None:
        self.examples = examples

    def __iter__(self) -> Any:
        return iter(self.examples)


def collate(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    width = max(len(e["input_ids"]) for e in examples)
    widths.append((len(examples) * width, sum(len(e["input_ids"]) for e in examples)))

    def padded(values: list[int], filler: int) -> list[int]:
        return values + [filler] * (width - len(values))

    labels = [padded(e["labels"], -100) if isinstance(e["labels"], list) else e["labels"] for e in examples]
    return {
        "input_ids": torch.tensor([padded(e["input_ids"], 0) for e in examples]),
        "attention_mask": torch.tensor([padded([1] * len(e["input_ids"]), 0) for e in examples]),
        "labels": torch.tensor(labels),
    }


widths: list[tuple[int, int]] = []


@pytest.fixture(autouse=True)
def _fresh() -> None:
    widths.clear()


def made(folder: Path, kind: str = "single", cls: type = BayesianTrainer, **options: Any) -> Any:
    own = {name: options.pop(name) for name in ("compute_metrics", "preprocess_logits_for_metrics") if name in options}
    args = tiny.arguments(folder, remove_unused_columns=False, **options)
    return cls(model=tiny.bayesian(kind, delta=1.0), args=args, data_collator=collate, **own)


class Row(NamedTuple):
    predictions: np.ndarray
    uncertainty: dict[str, np.ndarray]


@cache
def expected(kind: str = "single") -> list[Row]:
    """Every example alone, in the dataset's order."""
    posterior, found = VariationalPosterior(tiny.bayesian(kind, delta=1.0)), []
    for example in rows(kind=kind):
        one = posterior.predict(collate([example]), num_samples=3)
        names = ("predictive_entropy", "expected_entropy", "mutual_information")
        found.append(Row(one.mean_log_probs.numpy(), {name: getattr(one, name).numpy() for name in names}))
    return found


def check(found: Any, one_by_one: list[Row], labels: list[int]) -> None:
    np.testing.assert_allclose(found.predictions, np.concatenate([o.predictions for o in one_by_one]), atol=1e-5)
    assert found.label_ids.tolist() == labels
    for name, values in found.uncertainty.items():
        np.testing.assert_allclose(values, np.concatenate([o.uncertainty[name] for o in one_by_one]), atol=1e-5)


def datasets(examples: list[dict[str, Any]]) -> dict[str, Any]:
    hub = pytest.importorskip("datasets")
    sized = [{**e, "size": len(e["input_ids"])} for e in examples]
    return {
        "list": examples,
        "made": Made(examples),
        "hub": hub.Dataset.from_list(examples),
        "length column": hub.Dataset.from_list(sized),
        "subset": Subset(Made(examples), range(len(examples))),
        "concatenated": ConcatDataset([Made(examples[:9]), Made(examples[9:])]),
    }


@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
@pytest.mark.parametrize("name", ["list", "made", "hub", "length column", "subset", "concatenated"])
def test_rows_come_back_in_the_datasets_order(tmp_path: Path, name: str, strategy: str) -> None:
    examples = rows()
    data, one_by_one = datasets(examples)[name], expected()
    widths.clear()
    trainer = made(tmp_path, train_sampling_strategy=strategy, length_column_name="size")
    labels = [e["labels"] for e in examples]
    check(trainer.predict(data), one_by_one, labels)
    processed, real = (sum(column) for column in zip(*widths, strict=True))
    assert real / processed > 0.9  # in the dataset's order: .75


def test_metrics_and_user_see_the_datasets_order(tmp_path: Path) -> None:
    examples, seen = rows(), []

    def compute_metrics(found: EvalPrediction) -> dict[str, float]:
        seen.append(found)
        return {"right": float((found.predictions.argmax(-1) == found.label_ids).mean())}

    trainer = made(tmp_path, compute_metrics=compute_metrics, include_for_metrics=["inputs", "loss"])
    metrics = trainer.evaluate(examples)
    (found,) = seen
    assert found.label_ids.tolist() == [e["labels"] for e in examples]
    ids = [[i for i in row if i > 0] for row in found.inputs.tolist()]
    assert ids == [e["input_ids"] for e in examples]
    one_by_one = expected()
    np.testing.assert_allclose(found.predictions, np.concatenate([o.predictions for o in one_by_one]), atol=1e-5)
    assert trainer.compute_metrics is compute_metrics and len(found.losses) >= len(examples)
    nll = [-o.predictions[0, e["labels"]] for o, e in zip(one_by_one, examples, strict=True)]
    assert metrics["eval_nll"] == pytest.approx(np.mean(nll), rel=1e-4)
    by_length = sorted(range(NUM), key=lambda i: -len(examples[i]["input_ids"]))
    for start in range(0, NUM, 4):  # of whose batch a row's loss is
        batch = by_length[start : start + 4]
        np.testing.assert_allclose(found.losses[batch], np.mean([nll[i] for i in batch]), rtol=1e-4)


@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
def test_token_columns_follow(tmp_path: Path, strategy: str) -> None:
    examples = rows(kind="token")
    found = made(tmp_path, "token", train_sampling_strategy=strategy).predict(examples)
    for i, one in enumerate(expected("token")):
        size = len(examples[i]["input_ids"])
        np.testing.assert_allclose(found.predictions[i, :size], one.predictions[0], atol=1e-5)
        assert found.label_ids[i, :size].tolist() == examples[i]["labels"]
        for name, values in found.uncertainty.items():
            np.testing.assert_allclose(values[i, :size], one.uncertainty[name][0], atol=1e-5)
            assert np.isnan(values[i, size:]).all()


class Batches:
    """A batch sampler that is no `BatchSampler`."""

    def __init__(self, order: list[int]) -> None:
        self.order, self.batch_size, self.drop_last = order, 5, False

    def __len__(self) -> int:
        return -(-len(self.order) // 5)

    def __iter__(self) -> Any:
        return iter([self.order[i : i + 5] for i in range(0, len(self.order), 5)])


@pytest.mark.parametrize("how", ["random", "batches", "reversing", "single", "unprepared", "subset"])
def test_loaders_of_ones_own_in_any_order(tmp_path: Path, how: str) -> None:
    examples = rows()
    data = Made(examples)
    order = np.random.default_rng(0).permutation(NUM).tolist()

    class Reversing(BatchSampler):
        def __iter__(self) -> Any:
            *full, rest = super().__iter__()  # accelerate wants the short one last
            return iter([*full[::-1], rest])

    class Own(BayesianTrainer):
        def get_test_dataloader(self, test_dataset: Any) -> Any:
            options: dict[str, Any] = {
                "random": {"batch_size": 4, "shuffle": True},
                "unprepared": {"batch_size": 4, "shuffle": True},
                "batches": {"batch_sampler": Batches(order)},
                "reversing": {"batch_sampler": Reversing(RandomSampler(data), 4, drop_last=False)},
                "single": {"batch_size": None, "sampler": order, "collate_fn": lambda e: collate([e])},
                "subset": {"batch_size": 4, "sampler": SubsetRandomSampler(order[:9])},
            }[how]
            loader = DataLoader(test_dataset, **{"collate_fn": collate, **options})
            return loader if how in ("unprepared", "single") else self.accelerator.prepare(loader)

    one_by_one, labels = expected(), [e["labels"] for e in examples]
    if how == "subset":
        kept = sorted(order[:9])
        one_by_one, labels = [one_by_one[i] for i in kept], [labels[i] for i in kept]
    trainer = made(tmp_path, cls=Own)
    for _ in range(2 if how == "random" else 1):
        check(trainer.predict(data), one_by_one, labels)


@pytest.mark.parametrize(
    "options",
    [
        {"dataloader_num_workers": 2, "dataloader_persistent_workers": True},
        {"dataloader_num_workers": 2, "dataloader_in_order": False},
        {"eval_accumulation_steps": 1},
        {"accelerator_config": {"dispatch_batches": True}},
    ],
    ids=lambda options: next(iter(options)),
)
def test_arguments_of_the_loop(tmp_path: Path, options: dict[str, Any]) -> None:
    examples = rows()
    one_by_one, labels = expected(), [e["labels"] for e in examples]
    trainer = made(tmp_path, **options)
    for _ in range(2):
        check(trainer.predict(Made(examples)), one_by_one, labels)
    trainer.eval_dataset = Made(examples)
    assert trainer.evaluate()["eval_nll"] == pytest.approx(
        np.mean([-o.predictions[0, y] for o, y in zip(one_by_one, labels, strict=True)]), rel=1e-4
    )


def test_what_sees_batches_sees_them_in_the_datasets_order(tmp_path: Path) -> None:
    examples, seen = rows(), []
    labels = [e["labels"] for e in examples]

    def compute_metrics(found: EvalPrediction, compute_result: bool) -> dict[str, float]:
        seen.extend(found.label_ids.tolist())
        return {"count": float(len(seen))} if compute_result else {}

    trainer = made(tmp_path, compute_metrics=compute_metrics, batch_eval_metrics=True,
                   train_sampling_strategy="group_by_length")  # fmt: skip
    assert trainer.evaluate(examples)["eval_count"] == NUM and seen == labels

    def chosen(logits: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
        seen.extend(given.tolist())
        return logits.argmax(-1)

    seen.clear()
    found = made(tmp_path, preprocess_logits_for_metrics=chosen).predict(examples)
    assert seen == labels and found.predictions.shape == (NUM,)

    class Watching(BayesianTrainer):
        def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            seen.extend(inputs["labels"].tolist())
            return super().prediction_step(model, inputs, *args, **kwargs)

    seen.clear()
    made(tmp_path, cls=Watching).predict(examples)
    assert seen == labels
    batches = made(tmp_path, eval_do_concat_batches=False).predict(examples).label_ids
    assert [y for batch in batches for y in batch.tolist()] == labels
    kept = made(tmp_path, dataloader_drop_last=True).predict(examples).label_ids
    assert kept.tolist() == labels[:20]


def test_streams_keep_their_order(tmp_path: Path) -> None:
    examples = rows()
    trainer = made(tmp_path, train_sampling_strategy="group_by_length")
    check(trainer.predict(Stream(examples)), expected(), [e["labels"] for e in examples])


def test_lengths_of_any_dataset() -> None:
    hub = pytest.importorskip("datasets")
    examples, lengths = rows(), [len(e["input_ids"]) for e in rows()]
    for name, data in datasets(examples).items():
        assert example_lengths(data) == lengths, name
        assert example_lengths(data, [4, 2, 11]) == [lengths[i] for i in (4, 2, 11)], name
    texts = ["a b", "a", "a b c"] * 6
    assert example_lengths(hub.Dataset.from_dict({"text": texts})) == [3, 1, 5] * 6
    assert example_lengths(texts) == [3, 1, 5] * 6
    words = lambda rows: {"input_ids": torch.zeros(1, len(rows[0].split()))}  # noqa: E731
    assert example_lengths(texts, collate=words) == [2, 1, 3] * 6
    assert example_lengths([{"length": 0.5, "x": 1}, {"length": None, "x": 1}]) is None
    assert example_lengths(Stream(examples)) is None and example_lengths([]) is None


def test_lengths_make_no_example_in_vain() -> None:
    touched: list[int] = []

    class Watched(Made):
        def __getitem__(self, index: int) -> dict[str, Any]:
            touched.append(index)
            torch.rand(1)
            return super().__getitem__(index)

    state = torch.get_rng_state()
    assert example_lengths(Watched([{"pixel_values": torch.zeros(3, 4, 4)}] * 40)) is None and len(touched) <= 16
    touched.clear()
    assert example_lengths(Watched([{"input_ids": [1, 2]}] * 40)) is None and len(touched) <= 16
    touched.clear()
    known, data = LengthCache(), Watched(rows())
    assert known(data) == known(data) and len(touched) == NUM
    assert torch.equal(state, torch.get_rng_state())


def test_a_plain_trainer_differs_by_nothing_but_the_order(tmp_path: Path) -> None:
    """The stock Trainer's evaluation at the posterior mean."""
    examples = rows()
    model = tiny.plain()
    args = {"remove_unused_columns": False}
    stock = Trainer(model=model, args=tiny.arguments(tmp_path, **args), data_collator=collate).predict(examples)
    ours = BayesianTrainer(model=model, args=tiny.arguments(tmp_path, **args), data_collator=collate).predict(examples)
    expected = torch.tensor(stock.predictions).log_softmax(-1)
    np.testing.assert_allclose(ours.predictions, expected, atol=1e-5)
    assert ours.label_ids.tolist() == stock.label_ids.tolist()
