"""`model_card`: what it says of each posterior, the hub's metadata read back, intervals, and a card that is there."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard, ModelCardData, metadata_load
from huggingface_hub.repocard_data import model_index_to_eval_results
from torch import nn

import bayeformers
from bayeformers import laplace, to_bayesian
from bayeformers.cards import CardDetails, evaluation_intervals, merge_card, model_card
from bayeformers.cards.card import is_untouched, task_of
from bayeformers.cards.facts import facts_of
from bayeformers.guarantees import attach_policy, fit_abstention
from bayeformers.heads import to_vbll
from bayeformers.metrics import BootstrapInterval, accuracy, aurc, brier_score, expected_calibration_error
from bayeformers.posteriors import (
    DiagonalPosterior,
    DropoutPosterior,
    EnsemblePosterior,
    MixturePosterior,
    PointPosterior,
    RunningMoments,
    SWAGPosterior,
    TemperaturePosterior,
)
from bayeformers.posteriors.predict import as_posterior
from tests.training.tiny import labels, plain, tokens

INTERVAL = BootstrapInterval(0.8, 0.7, 0.9, 0.95, 1000, 0)


def laplace_of(model: nn.Module, **options: Any) -> Any:
    batch = tokens(6)
    return laplace.fit(model.eval(), [{**batch, **labels("single", batch)}], progress=False, **options)


def swag_of(model: nn.Module) -> SWAGPosterior:
    moments = RunningMoments(2)
    for step in range(4):
        moments.add({name: parameter.detach() + step for name, parameter in model.named_parameters()})
    return SWAGPosterior(model, moments.moments())


def vbll() -> Any:
    model = plain()
    to_vbll(model)
    return as_posterior(model) if hasattr(model, "posterior") else bayeformers.heads.HeadPosterior(model)


POSTERIORS: dict[str, tuple[Any, str]] = {
    "variational": (lambda: as_posterior(to_bayesian(plain(), delta=0.25)), "0.25"),
    "laplace": (lambda: laplace_of(plain(), prior_precision=3.0), "3, as given"),
    "ensemble": (lambda: EnsemblePosterior(plain(), [plain(seed=1), plain(seed=2)]), "2 networks"),
    "swag": (lambda: swag_of(plain()), "4, 2 columns"),
    "dropout": (lambda: DropoutPosterior(plain(), rate=0.3), "rate 0.3"),
    "diagonal": (lambda: DiagonalPosterior(plain(), {"classifier.bias": torch.ones(3)}), "3 in 1"),
    "head": (vbll, "VBLL"),
    "temperature": (lambda: TemperaturePosterior(laplace_of(plain()), weight=0.5), "T = 2"),
    "mixture": (lambda: MixturePosterior([laplace_of(plain()), laplace_of(plain(seed=1))]), "2 posteriors"),
    "point": (lambda: PointPosterior(plain()), "point estimate"),
}  # fmt: skip


@pytest.mark.parametrize("name", POSTERIORS)
def test_each_posterior_is_described(name: str) -> None:
    make, word = POSTERIORS[name]
    posterior = make()
    facts = facts_of(posterior)
    assert next(iter(facts)) == "method" and any(word in text for text in facts.values())
    assert all(text and "\n" not in text for text in facts.values())
    card = model_card(posterior.model, posterior)
    assert all(text.replace("|", "\\|") in card.text for text in facts.values())
    assert ("bayeformers" in (card.data.tags or [])) == (name != "point")


def test_numbers_of_the_conversion_and_of_the_fit() -> None:
    model = to_bayesian(plain(), delta=0.1, prior=bayeformers.NormalPrior(std=0.5))
    facts = facts_of(as_posterior(model))
    assert facts["δ"].startswith("0.1,") and "0.5" in facts["prior"] and facts["N"].startswith("unknown")
    count = sum(
        tensor.numel() for name, tensor in model.named_parameters() if name + "_rho" in dict(model.named_parameters())
    )
    assert facts["random weights"].startswith(f"{count:,} in")
    posterior = laplace_of(plain())
    facts = facts_of(posterior)
    assert facts["N"] == "6 examples" and f"{posterior.prior_precision:.4g}" in facts["τ"] and "of" in facts["τ"]


# -- metadata --------------------------------------------------------------------------------------------------------


def test_metadata_are_read_back_by_the_hubs_own_client(tmp_path: Path) -> None:
    model = to_bayesian(plain())
    details = CardDetails(
        repo="user/name", dataset=["CoLA"], dataset_id=["nyu-mll/glue"], base_model="bert-base-uncased", license="mit",
        language=["en"], tags=["mine"], measured_on="the 10 rows of a test",
    )  # fmt: skip
    metrics = {"accuracy": INTERVAL, "matthews": 0.5, "mutual_information": 0.1, "nll": float("nan")}
    card = model_card(model, metrics=metrics, details=details)
    card.save(tmp_path / "README.md")
    data = metadata_load(tmp_path / "README.md")
    assert data is not None
    assert data["library_name"] == "transformers" and data["pipeline_tag"] == "text-classification"
    assert data["license"] == "mit" and data["base_model"] == "bert-base-uncased" and data["language"] == ["en"]
    assert data["datasets"] == ["nyu-mll/glue"] and data["tags"] == ["mine", "bayeformers", "bayesian", "uncertainty"]
    name, results = model_index_to_eval_results(data["model-index"])
    assert name == "name" and [result.metric_type for result in results] == ["accuracy", "matthews"]
    assert results[0].metric_value == 0.8 and results[0].task_type == "text-classification"
    assert results[0].metric_args == {"confidence_level": 0.95, "low": 0.7, "high": 0.9, "bootstrap_resamples": 1000}
    assert results[0].dataset_type == "nyu-mll/glue" and results[0].dataset_name == "CoLA"
    again = ModelCard.load(tmp_path / "README.md")
    assert again.data.to_dict() == card.data.to_dict() and again.text == card.text
    ModelCardData(**yaml.safe_load(again.data.to_yaml()))  # strict: unknown shapes of `model-index` raise


def test_a_regressions_code_reads_numbers() -> None:
    model = to_bayesian(plain("regression", problem_type="regression"), delta=0.1)
    text = model_card(model, details=CardDetails(task="text-classification", has_tokenizer=True)).text
    assert "predictive.mean " in text and "predictive.epistemic_variance" in text
    assert "probabilit" not in text and "predictive.probs" not in text


def test_a_policy_is_told_in_its_own_words() -> None:
    class Policy:
        def describe(self) -> str:
            return "It refuses below 0.7. That promises 5 %."

    model = to_bayesian(plain())
    assert "no abstention policy" in model_card(model).text
    assert "It refuses below 0.7." in model_card(model, policy=Policy()).text
    policy = fit_abstention(torch.linspace(0, 1, 200), errors=torch.zeros(200))
    attach_policy(model, policy)
    assert policy.describe() in model_card(model).text and "no abstention policy" not in model_card(model).text


def test_tasks_by_class() -> None:
    expected = {"single": "text-classification", "token": "token-classification", "masked": "fill-mask"}
    expected |= {"causal": "text-generation", "question": "question-answering"}
    assert {kind: task_of(plain(kind)) for kind in expected} == expected
    assert task_of(nn.Linear(2, 2)) is None
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(plain(), peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"], r=2))
    assert task_of(model) == "text-classification" and model_card(model).data.library_name == "peft"


# -- intervals -------------------------------------------------------------------------------------------------------


def test_intervals_are_around_the_metrics_of_the_package() -> None:
    rng = np.random.default_rng(0)
    probs = rng.dirichlet(np.ones(3), 60)
    truth = rng.integers(3, size=60)
    nll = -np.log(probs[np.arange(60), truth])
    found = evaluation_intervals({"probs": probs, "labels": truth, "nll": nll}, num_resamples=200)
    wrong = (probs.argmax(1) != truth).astype(float)
    expected = {
        "nll": nll.mean(), "accuracy": accuracy(probs, truth), "ece": expected_calibration_error(probs, truth),
        "brier": brier_score(probs, truth), "aurc": aurc(probs.max(1), wrong),
    }  # fmt: skip
    assert {name: interval.estimate for name, interval in found.items()} == pytest.approx(expected, abs=1e-12)
    assert all(interval.low <= interval.high for interval in found.values())
    # resampled by hand: accuracy's percentiles of the same indices
    indices = np.random.default_rng(0)
    means = [1 - wrong[indices.integers(60, size=60)].mean() for _ in range(200)]
    assert (found["accuracy"].low, found["accuracy"].high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])))
    squared = rng.random(40)
    assert evaluation_intervals({"squared_error": squared})["rmse"].estimate == pytest.approx(squared.mean() ** 0.5)
    assert evaluation_intervals({}) == {}


def test_fewer_resamples_of_many_items() -> None:
    assert evaluation_intervals({"nll": np.ones(50_000)})["nll"].num_resamples == 400
    with pytest.raises(ValueError, match="`num_resamples` must be a whole number >= 1"):
        evaluation_intervals({"nll": np.ones(3)}, num_resamples=0)


# -- a card that is there --------------------------------------------------------------------------------------------


def test_a_users_words_and_metadata_stay() -> None:
    mine = ModelCard(
        "---\nlicense: apache-2.0\ntags:\n- mine\nmodel-index:\n- name: own\n  results:\n  - task:\n      type: t\n"
        "    dataset:\n      name: d\n      type: d\n    metrics:\n    - type: f1\n      value: 0.5\n---\n"
        "\n# Mine\n\nWords.\n"
    )
    ours = model_card(to_bayesian(plain()), metrics={"accuracy": 0.9}, details=CardDetails(license="mit", repo="a/b"))
    merged = merge_card(mine, ours)
    assert merged.text.startswith("\n# Mine\n\nWords.\n") and "## Uncertainty" in merged.text
    data = merged.data.to_dict()
    assert data["license"] == "apache-2.0" and data["tags"] == ["mine", "bayeformers", "bayesian", "uncertainty"]
    assert data["model-index"][0]["name"] == "own"
    assert [r.metric_type for r in merged.data.eval_results] == ["f1", "accuracy"]
    newer = model_card(to_bayesian(plain()), metrics={"accuracy": 0.95}, details=CardDetails(repo="a/b"))
    twice = merge_card(merged, newer)
    assert twice.text.count("## Uncertainty") == 1 and "Words." in twice.text
    assert [(r.metric_type, r.metric_value) for r in twice.data.eval_results] == [("f1", 0.5), ("accuracy", 0.95)]


def test_an_edit_is_noticed() -> None:
    card = model_card(to_bayesian(plain()))
    assert is_untouched(ModelCard(str(card)))
    assert is_untouched(ModelCard(str(card).replace("\n\n", "\n") + "\n### Framework versions\n\n- PEFT 0.21.2\n"))
    assert not is_untouched(ModelCard(str(card) + "\nA line of mine.\n"))
    assert not is_untouched(ModelCard("---\nlicense: mit\n---\n# Mine\n"))
    assert is_untouched(ModelCard.from_template(ModelCardData()))


# -- bad input -------------------------------------------------------------------------------------------------------

WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "model": ({"model": "bert"}, TypeError, "`model` must be a torch.nn.Module"),
    "posterior": ({"posterior": 3}, TypeError, "`posterior` must be a posterior"),
    "metrics": ({"metrics": [0.9]}, TypeError, "`metrics` must be a mapping"),
    "a metric": ({"metrics": {"accuracy": "high"}}, TypeError, "`metrics` must hold numbers"),
    "policy": ({"policy": 0.7}, TypeError, "`policy` must be an AbstentionPolicy"),
    "details": ({"details": {"repo": "a"}}, TypeError, "`details` must be CardDetails"),
    "language": ({"details": CardDetails(language="en")}, TypeError, "`details.language` must be a list"),
    "tags": ({"details": CardDetails(tags=[3])}, TypeError, "`details.tags` must be a list of strings"),  # type: ignore[list-item]
    "repo": ({"details": CardDetails(repo='a"b')}, ValueError, "`details.repo` must be a name on the hub"),
    "empty repo": ({"details": CardDetails(repo="")}, ValueError, "`details.repo` must be a name on the hub"),
    "draws": ({"details": CardDetails(num_samples=0)}, ValueError, "`details.num_samples` must be a whole number >= 1"),
}


@pytest.mark.parametrize("name", WRONG)
def test_bad_input(name: str) -> None:
    given, error, message = WRONG[name]
    with pytest.raises(error, match=re.escape(message)):
        model_card(**{"model": to_bayesian(nn.Linear(2, 2)), **given})
