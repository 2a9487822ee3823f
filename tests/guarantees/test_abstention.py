"""`fit_abstention` from models, posteriors and scores to policies, and policies from one run to the next."""

import json
import logging
import math
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import default_data_collator

import bayeformers as bf
from bayeformers import AbstentionPolicy, Predictive, fit_abstention, predict
from bayeformers.guarantees import POLICY_FILE, attach_policy, certified_threshold, errors_of, policy_of, score_of
from bayeformers.guarantees.saving import mismatch, weights_digest
from bayeformers.posteriors import PointPosterior
from tests.adapters.lora import bert
from tests.training import tiny

RISKY: dict[str, Any] = {"max_risk": 0.6, "confidence": 0.6}  # what a random model can keep


def policy(**changes: Any) -> AbstentionPolicy:
    values: dict[str, Any] = {
        "score": "confidence", "threshold": 0.8, "max_risk": 0.05, "confidence": 0.9, "num_examples": 500,
        "coverage": 0.7, "feasible": True, "model_risk": 0.1,
    }  # fmt: skip
    return AbstentionPolicy(**{**values, **changes})


def classes(probs: Any, problem_type: str = "single_label_classification", **more: Any) -> Predictive:
    """Of draws (S, B, ..., C)."""
    return Predictive(problem_type=problem_type, log_probs=torch.tensor(probs, dtype=torch.float64).log(), **more)


# -- scores and errors -----------------------------------------------------------------------------------------------


def test_scores_are_higher_for_the_surer() -> None:
    agreed, disagreed, vague = [0.98, 0.01, 0.01], [0.9, 0.05, 0.05], [0.34, 0.33, 0.33]
    draws = classes([[agreed, disagreed, vague], [agreed, disagreed[::-1], vague]])
    for name in ("confidence", "margin", "entropy"):
        found = score_of(draws, name)
        assert found[0] > found[1] and found[0] > found[2], name
    assert score_of(draws, "mutual_information").argmin() == 1
    assert score_of(draws, "expected_entropy").argmin() == 2
    torch.testing.assert_close(score_of(draws, "confidence"), draws.probs.amax(-1))
    torch.testing.assert_close(score_of(draws, "margin")[0], torch.tensor(0.97, dtype=torch.float64))


def test_several_labels_are_right_together() -> None:
    """Of a multi-label head the product of what each label is sure of, and an error in any is one."""
    probs = [[[[0.9, 0.1], [0.4, 0.6]], [[0.5, 0.5], [0.2, 0.8]]]]
    draws = classes(probs, "multi_label_classification")
    torch.testing.assert_close(score_of(draws), torch.tensor([0.54, 0.4], dtype=torch.float64))
    torch.testing.assert_close(score_of(draws, "margin"), torch.tensor([0.2, 0.0], dtype=torch.float64))
    labels = torch.tensor([[0.0, 1.0], [0.0, 0.0]])
    assert errors_of(draws, labels).tolist() == [0.0, 1.0]
    assert errors_of(draws, torch.tensor([[0, -100], [-100, -100]])).nan_to_num(-1).tolist() == [0.0, -1.0]


def test_spans_are_right_where_both_ends_are() -> None:
    draws = classes([[[[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]]] * 3], "question_answering")
    batch = {"start_positions": torch.tensor([0, 1, 3]), "end_positions": torch.tensor([2, 2, 3])}
    assert errors_of(draws, batch).nan_to_num(-1).tolist() == [0.0, 1.0, -1.0]  # no answer in the third text
    torch.testing.assert_close(score_of(draws)[0], torch.tensor(0.56, dtype=torch.float64))


def test_tokens_are_scored_each_by_itself() -> None:
    mask = torch.tensor([[True, True, False]])
    draws = classes([[[[0.9, 0.1], [0.3, 0.7], [0.5, 0.5]]]], "token_classification", mask=mask)
    torch.testing.assert_close(score_of(draws)[0, :2], torch.tensor([0.9, 0.7], dtype=torch.float64))
    assert score_of(draws)[0, 2].isnan()
    assert errors_of(draws, torch.tensor([[1, 1, 0]])).nan_to_num(-1).tolist() == [[1.0, 0.0, -1.0]]


def test_a_regression_is_wrong_beyond_its_tolerance() -> None:
    draws = Predictive(problem_type="regression", values=torch.tensor([[1.0, 2.0], [3.0, 2.0]]), noise_std=0.5)
    assert errors_of(draws, torch.tensor([2.4, 2.6]), 0.5).tolist() == [0.0, 1.0]
    torch.testing.assert_close(score_of(draws, "epistemic_std"), torch.tensor([-1.0, 0.0]))
    torch.testing.assert_close(score_of(draws, "predictive_std"), -torch.tensor([1.25, 0.25]).sqrt())


# -- from scores -----------------------------------------------------------------------------------------------------


def test_scores_give_the_certified_threshold() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(300, generator=generator)
    errors = ((torch.rand(300, generator=generator) < 0.5) & (scores < 0.4)).double()
    found = fit_abstention(scores, errors=errors, max_risk=0.1)
    assert found.threshold == certified_threshold(scores.double().numpy(), errors.numpy(), 0.1, 0.9)
    assert found.feasible and found.coverage == float((scores.double() >= found.threshold).double().mean())
    assert found.num_examples == 300 and found.model_risk == float(errors.mean())
    assert (found.abstain(scores) == (scores.double() < found.threshold)).all()


def test_an_ignored_row_does_not_count_and_losses_are_rounded() -> None:
    scores = torch.arange(200.0)
    errors = torch.where(scores < 100, torch.nan, 0.0)
    assert fit_abstention(scores, errors=errors).num_examples == 100
    halves = fit_abstention(scores, errors=torch.full((200,), 0.5), seed=3)
    assert 0.35 < halves.model_risk < 0.65 and not halves.feasible  # 0.5 +- 4 standard deviations of a mean of 200
    assert fit_abstention(scores, errors=torch.full((200,), 0.5), seed=3) == halves


def test_one_token_of_each_text_counts() -> None:
    """A text whose tokens are all right and one whose tokens are all wrong are two rows, however long."""
    scores = torch.cat([torch.ones(60, 50), torch.zeros(60, 50)])
    errors = torch.cat([torch.zeros(60, 50), torch.ones(60, 50)])
    errors[:, 25:] = torch.nan
    found = fit_abstention(scores, errors=errors)
    assert found.num_examples == 120 and found.threshold == 0.5
    assert found.abstain(scores[:, :3]).shape == (120, 3)


def test_every_group_has_its_own_threshold() -> None:
    scores = torch.linspace(1, 0, 200).repeat(2)
    groups = ["good"] * 200 + ["bad"] * 200
    errors = torch.cat([torch.zeros(200), (torch.arange(200) >= 100).double()])
    found = fit_abstention(scores, errors=errors, groups=groups)
    assert found.groups is not None and found.groups["good"] == -math.inf and 0.4 < found.groups["bad"] < 0.55
    assert found.abstain([0.1, 0.1, 0.9], ["good", "bad", "new"]).tolist() == [False, True, True]
    with pytest.raises(ValueError, match="`groups` must say"):
        found.abstain([0.1])
    with pytest.raises(ValueError, match="`groups` must have 1 entries"):
        found.abstain([0.1], ["good", "bad"])


def test_predicted_classes_are_groups() -> None:
    probs = torch.tensor([[0.9, 0.1], [0.2, 0.8]]).repeat(100, 1)[None]
    draws = Predictive(problem_type="single_label_classification", log_probs=probs.log())
    errors = torch.tensor([0.0, 1.0]).repeat(100)
    found = fit_abstention(draws, errors=errors, groups="predicted")
    assert found.groups == {0: -math.inf, 1: math.inf} and found.coverage == 0.5
    assert found.abstain(draws)[:4].tolist() == [False, True, False, True]


def test_what_cannot_be_met_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "bayeformers"):
        found = fit_abstention(torch.rand(44), errors=torch.zeros(44))
    assert not found.feasible and found.threshold == math.inf and found.coverage == 0
    assert "at least 45 are needed" in caplog.text and "refuses every input" in caplog.text
    assert found.abstain([1.0, math.inf]).tolist() == [True, False]  # inf >= inf: no score of a model
    caplog.clear()
    with caplog.at_level(logging.WARNING, "bayeformers"):
        fit_abstention(torch.rand(300), errors=torch.ones(300))
    assert "must refuse at least 100.0 %" in caplog.text and "too many errors" in caplog.text
    assert found.describe().startswith("The model refuses every input")


# -- from a model ----------------------------------------------------------------------------------------------------


def rows(number: int = 60, kind: str = "single") -> datasets.Dataset:
    data = tiny.dataset(kind, number, seed=3)
    columns = {name: column.tolist() for name, column in data.columns.items()}
    return datasets.Dataset.from_dict({**columns, "text": ["a"] * number, "source": ["x", "y"] * (number // 2)})


@pytest.mark.parametrize("form", ["dataset", "loader", "batches", "rows"])
def test_a_posterior_predicts_the_rows(form: str) -> None:
    model, data = tiny.bayesian(delta=0.5), tiny.dataset("single", 60, seed=3)
    batches = [{name: column[i : i + 7] for name, column in data.columns.items()} for i in range(0, 60, 7)]
    given = {"dataset": rows(), "loader": DataLoader(data, batch_size=7), "batches": batches, "rows": data}[form]
    found = fit_abstention(model, given, num_samples=3, batch_size=7, seed=5, **RISKY)
    predictive = predict(model, data.columns, num_samples=3, seed=5)
    scores = score_of(predictive).double().numpy()
    errors = errors_of(predictive, data.columns).numpy()
    assert found.threshold == pytest.approx(certified_threshold(scores, errors, 0.6, 0.6), rel=1e-5)
    assert found.model_risk == errors.mean() and found.weights == weights_digest(model)
    assert (found.method, found.num_samples, found.posterior) == ("sample", 3, "VariationalPosterior")


def test_a_column_makes_groups_and_errors_may_be_a_function() -> None:
    model = tiny.plain()
    found = fit_abstention(model, rows(), groups="source", **RISKY)
    assert found.groups is not None and sorted(found.groups) == ["x", "y"] and found.group_by == "source"
    own = fit_abstention(model, rows(), errors=lambda predictive, batch: torch.zeros(len(predictive.probs)), **RISKY)
    assert own.model_risk == 0 and own.coverage == 1
    array = fit_abstention(model, rows(), errors=[1.0] * 60, **RISKY)
    assert array.model_risk == 1


def test_inputs_and_labels_in_pairs() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    x, y = torch.randn(80, 4), torch.arange(80) % 3
    found = fit_abstention(net, TensorDataset(x, y), max_risk=0.9)
    assert found.model_risk == float((net(x).argmax(1) != y).double().mean())


@pytest.mark.parametrize("kind", ["multi", "token", "question", "regression"])
def test_other_heads(kind: str) -> None:
    data = tiny.dataset(kind, 60, seed=3)
    options: dict[str, Any] = {"score": "epistemic_std", "errors": 1.0} if kind == "regression" else {}
    found = fit_abstention(tiny.plain(kind), data, max_risk=0.99, confidence=0.5, **options)
    assert found.num_examples == 60 and found.feasible == (found.model_risk < 0.9)


# -- policies --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given", [policy(), policy(threshold=-math.inf), policy(groups={"a": 0.5, 3: math.inf}, group_by="column")]
)
def test_a_policy_is_read_as_it_was_written(given: AbstentionPolicy, tmp_path: Path) -> None:
    path = given.save(tmp_path)
    assert path.name == POLICY_FILE and AbstentionPolicy.load(tmp_path) == AbstentionPolicy.load(path) == given
    content = json.loads(path.read_text())
    assert AbstentionPolicy.from_dict({**content, "of a newer version": 1}) == given
    assert "Infinity" not in path.read_text()
    assert len(given.describe()) < 600 and "90% confidence" in given.describe()


def test_a_policy_goes_with_its_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny.bayesian()
    found = fit_abstention(model, rows(), num_samples=2, **RISKY)
    assert policy_of(model) is None
    attach_policy(model, found)
    model.save_pretrained(tmp_path)
    again = bf.from_pretrained(tmp_path)
    assert policy_of(again) == found == policy_of(bf.VariationalPosterior(again))
    assert policy_of(PointPosterior(again)) is None and "of a PointPosterior" in caplog.text
    with torch.no_grad():
        next(again.parameters()).add_(1)
    with caplog.at_level(logging.WARNING, "bayeformers"):
        assert policy_of(again) is None and policy_of(again) is None
    assert caplog.text.count("weights have moved") == 1
    again.save_pretrained(tmp_path)
    assert not (tmp_path / POLICY_FILE).exists()  # of the weights that were overwritten
    with pytest.raises(ValueError, match="fitted to other weights"):
        attach_policy(again, found)
    attach_policy(model, None)
    assert policy_of(model) is None


def test_a_policy_of_other_weights_is_not_taken_up(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny.bayesian()
    model.save_pretrained(tmp_path)
    policy(weights="other").save(tmp_path)
    with caplog.at_level(logging.WARNING, "bayeformers"):
        assert policy_of(bf.from_pretrained(tmp_path)) is None
    assert "it is not attached" in caplog.text.replace("\n", " ")


def test_an_adapter_brings_its_policy(tmp_path: Path) -> None:
    model: Any = bf.to_bayesian(bert(), 0.3, prior=bf.RelativePrior(), scale="multiplicative")
    attach_policy(model, policy(weights=weights_digest(model)))
    model.save_pretrained(tmp_path)
    base: Any = bert()
    found = bf.from_pretrained(tmp_path, base_model=base.unload())
    assert policy_of(found) == policy_of(model)


def test_predictions_of_another_kind_are_told_apart() -> None:
    posterior = bf.VariationalPosterior(tiny.bayesian())
    known = policy(posterior="VariationalPosterior", method="sample", num_samples=16)
    assert mismatch(known, posterior, None, 16) is None
    assert mismatch(policy(), None) is None
    for reason, arguments in [
        ("of 8", (posterior, None, 8)),
        ("by 'glm'", (posterior, "glm", 16)),
        ("PointPosterior", (PointPosterior(posterior.model), None, 16)),
    ]:
        assert reason in (mismatch(known, *arguments) or "")


# -- the Trainer -----------------------------------------------------------------------------------------------------


def test_the_trainer_says_what_is_refused(tmp_path: Path) -> None:
    data = tiny.dataset("single", 24, seed=3)
    trainer = tiny.trainer(tmp_path, tiny.bayesian(delta=0.5), eval_dataset=data, per_device_eval_batch_size=24)
    assert trainer.predict(data).abstain is None
    predictive = predict(trainer.model, data.columns, num_samples=3, seed=trainer.args.eval_seed)
    for score in ("confidence", "margin", "entropy", "mutual_information"):
        found = trainer.fit_abstention(score=score, max_risk=0.75, confidence=0.6)
        output = trainer.predict(data)
        assert output.abstain is not None and output.abstain.tolist() == found.abstain(predictive).tolist(), score
        assert found.feasible and output.abstain.mean() == pytest.approx(1 - found.coverage)
    trainer.save_model(str(tmp_path / "saved"))
    assert policy_of(bf.from_pretrained(tmp_path / "saved")) == found


@pytest.mark.parametrize("kind", ["multi", "token", "regression"])
def test_the_trainer_of_other_heads(kind: str, tmp_path: Path) -> None:
    data = tiny.dataset(kind, 40, seed=3)
    trainer = tiny.trainer(
        tmp_path, tiny.bayesian(kind), eval_dataset=data, noise_std=0.5, per_device_eval_batch_size=20
    )
    options: dict[str, Any] = {"score": "predictive_std", "errors": 2.0} if kind == "regression" else {}
    trainer.fit_abstention(max_risk=0.99, confidence=0.5, **options)
    output = trainer.predict(data)
    assert output.abstain is not None and output.abstain.shape == ((40, tiny.LENGTH) if kind == "token" else (40,))


def test_other_draws_than_it_was_fitted_with_are_not_refused_by_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = tiny.dataset("single", 40, seed=3)
    trainer = tiny.trainer(tmp_path, tiny.bayesian(), eval_dataset=data, per_device_eval_batch_size=40)
    trainer.fit_abstention(**RISKY)
    trainer.args.num_eval_samples = 5
    with caplog.at_level(logging.WARNING, "bayeformers"):
        assert trainer.predict(data).abstain is None
    assert "averages of 3 draws, and these are of 5" in caplog.text


# -- bad input -------------------------------------------------------------------------------------------------------

SCORES, ZEROS = torch.rand(50), torch.zeros(50)


def wrong(*arguments: Any, **options: Any) -> Any:
    return lambda: fit_abstention(*arguments, **options)


def uneven() -> list[dict[str, Any]]:
    return [{"input_ids": [1] * n, "labels": 0} for n in (3, 5)]


def with_regression(**options: Any) -> Any:
    return wrong(tiny.plain("regression"), tiny.dataset("regression", 8), **options)


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (wrong(SCORES, errors=ZEROS, max_risk=0), "`max_risk`"),
        (wrong(SCORES, errors=ZEROS, max_risk=1.0), "`max_risk`"),
        (wrong(SCORES, errors=ZEROS, confidence=float("nan")), "`confidence`"),
        (wrong(SCORES, errors=ZEROS, num_samples=0), "`num_samples`"),
        (wrong(SCORES, errors=ZEROS, batch_size=1.5), "`batch_size`"),
        (wrong(SCORES, errors=ZEROS, seed=-1), "`seed`"),
        (wrong(SCORES), "`errors`"),
        (wrong(SCORES, errors=0.5), "`errors`"),
        (wrong(SCORES, errors=ZEROS[:9]), "`errors` must have the scores' shape"),
        (wrong(SCORES, errors=ZEROS + 2), r"`errors` must be in \[0, 1\]"),
        (wrong(SCORES, errors=ZEROS - 1), r"`errors` must be in \[0, 1\]"),
        (wrong(SCORES, errors=ZEROS * math.nan), "no label that counts"),
        (wrong(SCORES[:0], errors=ZEROS[:0]), "one row at least"),
        (wrong(SCORES, [1], errors=ZEROS), "`dataset` goes with a model"),
        (wrong(SCORES, errors=ZEROS, groups="column"), "`groups`='column'"),
        (wrong(SCORES, errors=ZEROS, groups=["a"]), "`groups` must have one entry per row"),
        (wrong("scores", errors=ZEROS), "`posterior_or_scores`"),
        (wrong(None, errors=ZEROS), "`posterior_or_scores`"),
        (wrong(tiny.plain()), "`dataset` must hold"),
        (wrong(tiny.plain(), []), "`dataset` is empty"),
        (wrong(tiny.plain(), 3), "`dataset` must be a dataset"),
        (wrong(tiny.plain(), rows(), score="certainty"), "`score` must be one of"),
        (wrong(tiny.plain(), rows(), score="epistemic_std"), "`score` of a 'single_label"),
        (wrong(tiny.plain(), rows(), groups="nothing"), "`groups` must be a column"),
        (wrong(tiny.plain(), uneven()), "`data_collator` must make one batch"),
        (wrong(tiny.plain(), rows(), errors=0.5), "`tolerance` is a regression's"),
        (wrong(tiny.plain(), rows(), errors=[0.0]), "`errors` must have the scores' shape"),
        (with_regression(score="epistemic_std"), "`tolerance` must be given"),
        (with_regression(errors=1.0), "`score` of a 'regression'"),
        (with_regression(score="epistemic_std", errors=-1.0), "`tolerance`"),
        (lambda: policy(threshold=math.nan), "`threshold`"),
        (lambda: policy(max_risk=2.0), "`max_risk`"),
        (lambda: policy().abstain("scores"), "`predictive_or_scores`"),
        (lambda: AbstentionPolicy.load("nowhere"), "no abstention_policy.json"),
        (lambda: AbstentionPolicy.from_dict({}), "no abstention policy"),
        (lambda: attach_policy(tiny.plain(), "policy"), "`policy`"),  # type: ignore[arg-type]
        (lambda: attach_policy("model", policy()), "`model`"),  # type: ignore[arg-type]
        (lambda: score_of(SCORES), "`predictive`"),  # type: ignore[arg-type]
    ],
)
def test_bad_input_is_named(call: Any, names: str) -> None:
    with pytest.raises((ValueError, TypeError), match=names):
        call()


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / POLICY_FILE
    for text in ("{", "[]", '{"version": 99}', '{"version": 1, "threshold": "a lot"}'):
        path.write_text(text)
        with pytest.raises(ValueError, match="abstention policy|damaged"):
            AbstentionPolicy.load(tmp_path)


def test_an_error_leaves_the_trainers_policy_as_it_was(tmp_path: Path) -> None:
    data = tiny.dataset("single", 40, seed=3)
    trainer = tiny.trainer(tmp_path, tiny.bayesian(), eval_dataset=data, per_device_eval_batch_size=40)
    kept = trainer.fit_abstention(**RISKY)
    for options in ({"score": "epistemic_std"}, {"errors": np.zeros(3)}, {"groups": "none"}, {"max_risk": 2}):
        with pytest.raises(ValueError, match=f"`{next(iter(options))}`"):
            trainer.fit_abstention(**options)
        assert policy_of(trainer.model) == kept
    with pytest.raises(TypeError, match="takes"):
        trainer.fit_abstention(num_samples=3)


def test_changes_through_data_are_noticed() -> None:
    model = tiny.bayesian()
    attach_policy(model, fit_abstention(model, rows(), num_samples=2, **RISKY))
    next(model.parameters()).data.mul_(1.5)  # as `_init_weights` does: no version counts it
    assert policy_of(model) is None


def test_a_policy_of_scores_is_of_the_weights_that_it_is_attached_to(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny.bayesian()
    attach_policy(model, policy())
    found = policy_of(model)
    assert found is not None and found.weights == weights_digest(model)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        next(model.parameters()).add_(1)
    assert policy_of(model) is None
    model.save_pretrained(tmp_path)  # over the folder of the former weights
    assert policy_of(bf.from_pretrained(tmp_path)) is None
    policy().save(tmp_path)
    with caplog.at_level(logging.WARNING, "bayeformers"):
        model.save_pretrained(tmp_path)
    assert "does not say of which weights" in caplog.text


def test_a_policy_is_of_a_prior_precision_and_a_temperature(tmp_path: Path) -> None:
    batches = list(DataLoader(rows(), batch_size=8, collate_fn=default_data_collator))
    posterior = bf.laplace.fit(tiny.plain("single"), batches, subset="last_layer", prior_precision=1.0)
    found = fit_abstention(posterior, rows(), **RISKY)
    assert found.settings is not None and mismatch(found, posterior) is None
    posterior.save(tmp_path)
    assert mismatch(found, type(posterior).load(tmp_path, posterior.model)) is None
    assert AbstentionPolicy.from_dict(found.to_dict()) == found
    assert "prior_precision 3" in str(mismatch(found, posterior.with_prior_precision(3.0)))
    one, other = (bf.posteriors.TemperaturePosterior(posterior, weight=weight) for weight in (1.0, 0.5))
    calibrated = fit_abstention(one, rows(), **RISKY)
    assert mismatch(calibrated, one) is None and "weight 0.5" in str(mismatch(calibrated, other))


def test_rows_that_are_shuffled_have_no_numbers_one_by_one() -> None:
    model, loader = tiny.bayesian(), DataLoader(rows(), shuffle=True, collate_fn=default_data_collator)
    with pytest.raises(ValueError, match="`errors` has one entry per row.*shuffle=False"):
        fit_abstention(model, loader, errors=[0.0] * 60)
    for fit in (fit_abstention, bf.fit_prediction_sets):
        with pytest.raises(ValueError, match="`groups` has one entry per row.*shuffle=False"):
            fit(model, loader, groups=["a", "b"] * 30)


def test_several_labels_have_no_predicted_class() -> None:
    with pytest.raises(ValueError, match="needs one predicted class for each answer"):
        fit_abstention(tiny.plain("multi"), tiny.dataset("multi", 60, seed=3), groups="predicted")
