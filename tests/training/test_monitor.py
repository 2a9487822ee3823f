"""`PosteriorMonitor`: its numbers against sums by hand, alarms once each, and a training that does not notice it."""

import logging
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Trainer, TrainerState, TrainingArguments

from bayeformers import NormalPrior, kl_divergence, predict, to_bayesian
from bayeformers.conversion.record import update_config
from bayeformers.nn import variational_tensors
from bayeformers.training import PosteriorMonitor
from bayeformers.training import monitor as monitoring
from bayeformers.training.health import DrawnRows, drawn_rows, effective_draws, group_name, layer_groups
from tests.training.tiny import bayesian, dataset, plain, tokens, trainer

MODEL = to_bayesian(torch.nn.Linear(2, 2))
update_config(MODEL, num_training_items=100)


class Writer:
    """What TensorBoard would be given."""

    def __init__(self) -> None:
        self.histograms: dict[tuple[str, int], Any] = {}
        self.scalars: dict[tuple[str, int], float] = {}

    def add_histogram(self, name: str, values: Any, step: int) -> None:
        self.histograms[name, step] = values

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars[name, step] = value

    def add_text(self, *_: Any) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...


# -- numbers ---------------------------------------------------------------------------------------------------------


def test_effective_draws_by_hand() -> None:
    p = torch.rand(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(effective_draws(p.log()), p.sum(0).square() / p.square().sum(0))
    assert effective_draws(torch.full((6, 1), -2000.0)).item() == pytest.approx(6)  # no underflow
    assert effective_draws(torch.tensor([[0.0], [-1000.0], [-1000.0]])).item() == pytest.approx(1)


@pytest.mark.parametrize("kind", ["single", "causal", "token"])
def test_groups_add_up(kind: str) -> None:
    model = bayesian(kind)
    with torch.no_grad():
        for tensor in variational_tensors(model):
            tensor.rho.add_(0.3)
    groups = layer_groups(model)
    assert sum(group.kl for group in groups.values()) == pytest.approx(kl_divergence(model).item(), rel=1e-5)
    found: dict[str, list[Tensor]] = {}
    for tensor in variational_tensors(model):
        loc, scale = tensor.loc.detach().flatten(), tensor.scale().detach().flatten()
        found.setdefault(group_name(tensor.name), []).append((scale / loc.abs())[loc != 0])
    assert found.keys() == groups.keys()
    for name, values in found.items():
        torch.testing.assert_close(groups[name].relative_scales, torch.cat(values))


def test_names_of_groups() -> None:
    assert group_name("base_model.model.bert.encoder.layer.11.attention.self.query.lora_A.default.weight") == (
        "bert.encoder.layer.11"
    )
    assert group_name("bert.embeddings.word_embeddings.weight") == "bert.embeddings"
    assert group_name("classifier.weight") == "classifier" and group_name("weight") == "model"


def test_rows_are_predict_s() -> None:
    model, rows = bayesian("single"), {**tokens(6), "labels": dataset(num_examples=6).columns["labels"]}
    model.train()
    before = torch.get_rng_state()
    found = drawn_rows(model, rows, 5)
    assert found is not None and torch.equal(before, torch.get_rng_state()) and model.training
    inputs = {name: value for name, value in rows.items() if name != "labels"}
    predictive = predict(model, inputs, num_samples=5)
    assert found.mutual_information == pytest.approx(float(predictive.mutual_information.mean()))
    assert found.entropy == pytest.approx(float(predictive.predictive_entropy.mean()))
    assert predictive.log_probs is not None
    p = predictive.log_probs.exp()[:, torch.arange(6), rows["labels"]]
    assert found.effective_draws == pytest.approx(float((p.sum(0).square() / p.square().sum(0)).mean()), rel=1e-5)
    classes = predictive.probs.argmax(-1)
    assert found.predicted_share == pytest.approx(float((classes == found.largest_class).float().mean()))
    assert found.label_share == pytest.approx(float((rows["labels"] == found.largest_class).float().mean()))


def test_padding_and_ignored_labels_do_not_count() -> None:
    model, columns = bayesian("token"), dataset("token", 4).columns
    found = drawn_rows(model, columns, 3)
    assert found is not None and found.num_items == int((columns["labels"] != -100).sum())
    inputs = {name: value for name, value in columns.items() if name != "labels"}
    information = predict(model, inputs, num_samples=3).mutual_information[columns["attention_mask"].bool()]
    assert found.mutual_information == pytest.approx(float(information.mean()), rel=1e-5)


@pytest.mark.parametrize("kind", ["regression", "causal", "masked", "question"])
def test_heads_without_few_probabilities_have_no_rows(kind: str, tmp_path: Path) -> None:
    own = trainer(tmp_path, kind=kind, callbacks=[PosteriorMonitor()], max_steps=1)
    own.train()
    entry = next(entry for entry in own.state.log_history if "loss" in entry)
    assert [name for name in entry if name.startswith("kl/")] and "draws_entropy" not in entry


# -- in training -----------------------------------------------------------------------------------------------------


def logged(own: Trainer, prefix: str) -> list[dict[str, float]]:
    entries = [entry for entry in own.state.log_history if "loss" in entry]
    return [{name: value for name, value in entry.items() if name.startswith(prefix)} for entry in entries]


def test_a_training_is_the_same_with_it(tmp_path: Path) -> None:
    trained = []
    for callbacks in ([], [PosteriorMonitor(num_rows=5)]):  # each made, and so seeded, before it trains
        trained.append(trainer(tmp_path, bayesian("single"), callbacks=callbacks))
        trained[-1].train()
    plainly, watched = trained
    pairs = zip(plainly.model.parameters(), watched.model.parameters(), strict=True)
    assert all(torch.equal(first, second) for first, second in pairs)
    first, second = logged(watched, "kl/")
    assert first and first.keys() == second.keys() and logged(plainly, "kl/") == [{}, {}]
    own = [entry for entry in watched.state.log_history if "loss" in entry]
    stock = [entry for entry in plainly.state.log_history if "loss" in entry]
    assert [{name: entry[name] for name in other} for entry, other in zip(own, stock, strict=True)] == stock
    assert 0 < own[0]["draws_effective"] <= 1 and own[0]["draws_entropy"] > own[0]["draws_mutual_information"]
    # the last look is at the model as it is now
    assert sum(second.values()) == pytest.approx(kl_divergence(watched.model).item(), rel=1e-4)


def test_every_second_log_and_no_rows(tmp_path: Path) -> None:
    own = trainer(tmp_path, callbacks=[PosteriorMonitor(every=2, num_rows=0)], max_steps=4)
    own.train()
    assert [bool(entry) for entry in logged(own, "kl/")] == [True, False, True, False]
    assert logged(own, "draws") == [{}] * 4


def test_trackers_and_histograms(tmp_path: Path) -> None:
    class Tracker(monitoring.TrainerCallback):
        tb_writer = Writer()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            for name, value in logs.items():
                self.tb_writer.add_scalar(name, value, state.global_step)

    own = trainer(tmp_path, callbacks=[Tracker(), PosteriorMonitor(num_rows=0)])
    own.train()
    groups = layer_groups(own.model)
    assert {name for name, _ in Tracker.tb_writer.histograms} == {f"log10_relative_scale/{name}" for name in groups}
    assert {step for _, step in Tracker.tb_writer.histograms} == {1, 2}
    for name, group in groups.items():
        values = torch.as_tensor(Tracker.tb_writer.histograms[f"log10_relative_scale/{name}", 2])
        torch.testing.assert_close(values, group.relative_scales.log10())
        assert Tracker.tb_writer.scalars[f"kl/{name}", 2] == pytest.approx(group.kl, rel=1e-4)


def test_tensorboard_has_them_in_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto import event_pb2

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    own = trainer(tmp_path, callbacks=[PosteriorMonitor(num_rows=4)], report_to="tensorboard")
    own.train()
    data = b"".join(file.read_bytes() for file in (tmp_path / "board").iterdir())
    kinds, start = set(), 0
    while start < len(data):  # records: length (8 bytes), its check (4), an event, its check (4)
        (length,) = struct.unpack("<Q", data[start : start + 8])
        event = event_pb2.Event.FromString(data[start + 12 : start + 12 + length])
        kinds |= {(value.tag, value.WhichOneof("value")) for value in event.summary.value}
        start += 16 + length
    for name in layer_groups(own.model):
        assert (f"log10_relative_scale/{name}", "histo") in kinds
        assert (f"train/kl/{name}", "simple_value") in kinds
    assert ("train/draws_mutual_information", "simple_value") in kinds


def test_one_process_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = trainer(tmp_path, callbacks=[PosteriorMonitor()])
    monkeypatch.setattr(own, "is_world_process_zero", lambda: False)
    own.train()
    assert logged(own, "kl/") == [{}, {}]


def test_a_model_that_is_made_for_each_training(tmp_path: Path) -> None:
    own = trainer(tmp_path, model_init=lambda: to_bayesian(plain()), callbacks=[PosteriorMonitor(num_rows=4)])
    own.train()
    own.train()
    assert all(logged(own, "draws"))


def test_another_trainer_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    args = TrainingArguments(
        str(tmp_path), max_steps=2, logging_steps=1, report_to="none", use_cpu=True, disable_tqdm=True
    )
    Trainer(bayesian("single"), args, train_dataset=dataset(), callbacks=[PosteriorMonitor(num_rows=0)]).train()
    assert caplog.text.count("sees the logs of a `BayesianTrainer` alone") == 1


# -- alarms ----------------------------------------------------------------------------------------------------------


def looks(monitor: PosteriorMonitor, num: int, drawn: DrawnRows | None, logs: dict[str, float] | None = None) -> None:
    """Looks at a model of N = 100 whose rows are as given."""
    monitor._drawn = lambda _: drawn  # type: ignore[method-assign]
    for step in range(num):
        monitor.look(MODEL, TrainerState(global_step=50 + step, max_steps=100), logs or {})


def rows(**changes: Any) -> DrawnRows:
    healthy = {"num_items": 32, "num_draws": 8, "mutual_information": 0.1, "entropy": 0.6, "effective_draws": 7.0}
    return DrawnRows(**{**healthy, "largest_class": 1, "predicted_share": 0.6, "label_share": 0.5, **changes})


ILL: dict[str, tuple[DrawnRows | None, dict[str, float], str]] = {
    "collapse": (rows(predicted_share=1.0), {}, "Collapse: class 1 is predicted for 100% of 32 training items"),
    "agreement": (rows(mutual_information=1e-5), {}, "mutual information is 1e-05 nats, 0.00% of the entropy"),
    "kl": (None, {"kl": 700.0, "nll": 0.5}, "kl_weight * kl / N = 7 nats per item, the NLL 0.5"),
}
WELL: dict[str, tuple[DrawnRows | None, dict[str, float]]] = {
    "a class that most labels are": (rows(predicted_share=1.0, label_share=0.95), {}),
    "few items": (rows(predicted_share=1.0, num_items=8), {}),
    "labels without a choice": (rows(largest_class=None), {}),
    "both certain": (rows(mutual_information=1e-9, entropy=1e-4), {}),
    "a KL that weighs": (None, {"kl": 400.0, "nll": 0.5}),
    "other logs": (None, {}),
}


@pytest.mark.parametrize("name", ILL)
def test_an_alarm_is_one_line(name: str, caplog: pytest.LogCaptureFixture) -> None:
    drawn, logs, message = ILL[name]
    monitor = PosteriorMonitor(patience=3)
    looks(monitor, 2, drawn, logs)
    assert not caplog.records
    looks(monitor, 4, drawn, logs)
    (record,) = [record for record in caplog.records if "PosteriorMonitor" in record.message]
    assert record.levelno == logging.WARNING and message in record.message and "step 50" in record.message
    assert "`" in record.message  # what to do names an argument


@pytest.mark.parametrize("name", WELL)
def test_no_alarm(name: str, caplog: pytest.LogCaptureFixture) -> None:
    looks(PosteriorMonitor(patience=1), 3, *WELL[name])
    assert not caplog.records


def test_no_alarm_after_a_good_look_or_early(caplog: pytest.LogCaptureFixture) -> None:
    monitor, ill = PosteriorMonitor(patience=2), rows(predicted_share=1.0)
    for drawn in (ill, rows(), ill, rows()):
        looks(monitor, 1, drawn)
    looks(PosteriorMonitor(patience=1, after=0.9), 3, ill)
    assert not caplog.records


def test_a_collapsed_training_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = plain()
    with torch.no_grad():
        model.classifier.bias[2] = 30.0
    data = dataset(num_examples=40)
    own = trainer(
        tmp_path, to_bayesian(model, delta=1e-4), train_dataset=data, max_steps=4,
        callbacks=[PosteriorMonitor(patience=2)],
    )  # fmt: skip
    own.train()
    said = [record.message for record in caplog.records if "PosteriorMonitor" in record.message]
    assert len(said) == 1 and "Collapse: class 2" in said[0]  # and no word of draws that agree: both are certain


def test_a_heavy_kl_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = to_bayesian(plain(), prior=NormalPrior(std=0.01, centre=0.0))
    trainer(tmp_path, model, callbacks=[PosteriorMonitor(num_rows=0, patience=2)], max_steps=4).train()
    said = [record.message for record in caplog.records if "PosteriorMonitor" in record.message]
    assert len(said) == 1 and "The KL outweighs the data" in said[0] and "N = 20" in said[0]


def test_a_resumed_training_is_watched_and_says_nothing_twice(tmp_path: Path) -> None:
    own = trainer(tmp_path, callbacks=[PosteriorMonitor(num_rows=4)], save_strategy="steps", save_steps=1)
    own.train()
    whole = logged(own, "draws")
    monitor = PosteriorMonitor(num_rows=7)
    again = trainer(
        tmp_path, callbacks=[monitor], save_strategy="no", restore_callback_states_from_checkpoint=True
    )  # fmt: skip
    state = TrainerState.load_from_json(str(tmp_path / "checkpoint-1" / "trainer_state.json"))
    state.stateful_callbacks["PosteriorMonitor"]["attributes"]["said"] = ["collapse"]
    state.save_to_json(str(tmp_path / "checkpoint-1" / "trainer_state.json"))
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert logged(again, "draws") == whole
    restored = next(c for c in again.callback_handler.callbacks if isinstance(c, PosteriorMonitor))
    assert restored.num_rows == 4 and restored.said == ["collapse"]


# -- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "`every` must be a whole number >= 1"),
        ({"num_rows": -1}, "`num_rows` must be a whole number >= 0"),
        ({"num_draws": 1}, "`num_draws` must be a whole number >= 2"),
        ({"patience": 0}, "`patience` must be a whole number >= 1"),
        ({"after": 1.5}, "`after` must be a finite number >= 0 and <= 1"),
        ({"histograms": "yes"}, "`histograms` must be True or False"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PosteriorMonitor(**options)


def test_a_model_without_a_posterior_is_refused(tmp_path: Path) -> None:
    own = trainer(tmp_path, plain(), callbacks=[PosteriorMonitor()])
    with pytest.raises(ValueError, match="watches the scales of a converted model"):
        own.train()


@pytest.mark.parametrize(
    "collate",
    [
        lambda rows: [row["labels"] for row in rows],
        lambda rows: {"input_ids": torch.stack([r["input_ids"] for r in rows])},
    ],
)
def test_rows_that_cannot_be_read_are_left_out(collate: Callable[[Any], Any]) -> None:
    class Loader:
        dataset, collate_fn = dataset(num_examples=4), staticmethod(collate)

    assert monitoring._rows_of(Loader, 3, None) is None
    assert monitoring._rows_of(None, 3, None) is None
