"""A trainer's card and pushes: its own code reloads the model, a user's words stay, the posterior's files go along."""

import inspect
import re
import shutil
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import EvalResult, HfApi, ModelCard, metadata_load
from torch import nn
from transformers import Trainer

import bayeformers
from bayeformers import (
    BayesianArguments,
    BayesianTrainer,
    BayesianTrainerMixin,
    fixed_draw,
    from_pretrained,
    to_bayesian,
    to_deterministic,
)
from bayeformers.cards import evaluation_intervals
from bayeformers.cards.section import BEGIN, END
from bayeformers.training import sharing
from tests.training import trainers
from tests.training.tiny import bayesian, dataset, plain, tokens, trainer

BLOCK = re.compile(r"^```python\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)
TEST = dataset(num_examples=24, seed=5)


@pytest.fixture(autouse=True)
def quick(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture and a thousand resamples take a second: two tests have pictures, all have fewer resamples."""
    monkeypatch.setattr(sharing, "evaluation_intervals", partial(evaluation_intervals, num_resamples=40))
    if request.node.name not in ("test_a_card_reloads_the_model_bit_for_bit", "test_without_matplotlib_a_line_says_so"):
        monkeypatch.setattr(BayesianTrainer, "_picture", lambda self: None)


def executed(card: Path) -> list[dict[str, Any]]:
    """The namespaces of our section's blocks of code, each run by itself; a name that is not there yet is skipped."""
    found, text = [], card.read_text(encoding="utf-8")
    for code in BLOCK.findall(text[text.index(BEGIN) : text.index(END)]):
        if "bayeformers import pipeline" in code and not hasattr(bayeformers, "pipeline"):
            continue
        namespace: dict[str, Any] = {}
        exec(code, namespace)
        found.append(namespace)
    return found


def same_networks(first: nn.Module, second: nn.Module) -> bool:
    batch, found = tokens(4), []
    for model in (first.eval(), second.eval()):
        with torch.no_grad(), fixed_draw(model, 2, seed=1):
            found.append(model(**batch).logits)
    return torch.equal(*found)


def evaluated(folder: Path, model: nn.Module | None = None, **kwargs: Any) -> BayesianTrainer:
    own = trainer(folder, model, eval_dataset=TEST, **kwargs)
    own.train()
    own.evaluate()
    own.save_model()
    return own


def test_the_signature_is_transformers_own() -> None:
    ours = inspect.signature(BayesianTrainer.create_model_card).parameters
    stock = inspect.signature(Trainer.create_model_card).parameters
    assert [(p.name, p.default) for p in ours.values()][:-1] == [(p.name, p.default) for p in stock.values()]


def test_a_card_reloads_the_model_bit_for_bit(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    own = evaluated(tmp_path, bayesian("single"))
    own.processing_class = trainers.tokenizer()
    own.save_model()
    own.create_model_card("en", "mit", ["mine"], dataset="toy", dataset_tags="me/toy", finetuned_from="some/base")
    data = metadata_load(tmp_path / "README.md")
    assert data is not None
    assert data["license"] == "mit" and data["base_model"] == "some/base" and data["datasets"] == ["me/toy"]
    assert {"mine", "generated_from_trainer", "bayeformers"} <= set(data["tags"])
    card = ModelCard.load(tmp_path / "README.md")
    found = {result.metric_type: result for result in card.data.eval_results}
    assert {"nll", "accuracy", "ece", "brier", "aurc"} <= set(found) and "mutual_information" not in found
    metrics = own.evaluate()
    for name in ("nll", "ece", "brier", "aurc"):
        assert found[name].metric_value == pytest.approx(metrics[f"eval_{name}"], abs=1e-6)
        assert found[name].metric_args["low"] <= found[name].metric_value <= found[name].metric_args["high"]
        assert found[name].dataset_name == "toy" and found[name].dataset_type == "me/toy"
    text = card.text
    assert "On the 24 rows of the evaluation set:" in text and "average over 3 drawn networks, as measured" in text
    assert "| N | 20 items |" in text and (tmp_path / "reliability.png").stat().st_size > 5000
    assert text.index("## Uncertainty") < text.index("## Model description")
    spaces = executed(tmp_path / "README.md")
    assert spaces and same_networks(spaces[0]["model"], own.model)
    assert spaces[0]["predictive"].probs.shape == (1, 3)


def test_an_adapters_card(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    plain().save_pretrained(tmp_path / "base")
    base = type(plain()).from_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"], r=2)
    own = evaluated(tmp_path / "out", to_bayesian(peft.get_peft_model(base, config)))
    assert "Model Card for" in (tmp_path / "out" / "README.md").read_text()  # PEFT's empty template
    own.create_model_card()
    data = metadata_load(tmp_path / "out" / "README.md")
    assert data is not None
    assert data["library_name"] == "peft" and {"lora", "bayeformers"} <= set(data["tags"])
    text = (tmp_path / "out" / "README.md").read_text()
    assert "- PEFT " in text and "Loaded by PEFT alone" in text and "[More Information Needed]" not in text
    assert same_networks(executed(tmp_path / "out" / "README.md")[0]["model"], own.model)
    own.save_model()  # PEFT writes into the card
    own.create_model_card()
    again = (tmp_path / "out" / "README.md").read_text()
    assert again.count("## Uncertainty") == 1 and again.count("## Training procedure") == 1


def test_a_laplace_posterior(tmp_path: Path) -> None:
    own = trainer(tmp_path, plain(), eval_dataset=TEST)
    own.train()
    own.evaluate()
    own.fit_laplace(prior_precision=2.0)
    own.save_model()
    own.create_model_card()
    text = (tmp_path / "README.md").read_text()
    assert "was of other weights, or of another posterior" in text and "On the" not in text
    assert "It achieves the following results" not in text  # which were the point estimate's
    own.evaluate()
    own.create_model_card()
    text = (tmp_path / "README.md").read_text()
    assert (
        "On the 24 rows" in text
        and "| τ | 2, as given |" in text
        and "linearised network (`glm`), no draws" in text
        and "num_samples" not in text
    )
    model = executed(tmp_path / "README.md")[0]["model"]
    assert torch.equal(model.posterior.predict(tokens(4)).probs, own.posterior.predict(tokens(4)).probs)


def test_numbers_of_other_weights_are_left_out(tmp_path: Path) -> None:
    own = evaluated(tmp_path)
    own.args.max_steps = 4
    own.train()
    own.create_model_card()
    assert "was of other weights" in (tmp_path / "README.md").read_text()
    own.evaluate()
    to_deterministic(own.model)
    own.create_model_card()
    text = (tmp_path / "README.md").read_text()
    assert "was of other weights" in text and "point estimate" in text


def test_a_second_training_of_as_many_steps_is_another(tmp_path: Path) -> None:
    own = evaluated(tmp_path)
    own.train()
    own.create_model_card()
    assert "was of other weights" in (tmp_path / "README.md").read_text()


def test_an_edited_cards_metadata_keep_no_numbers_of_other_weights(tmp_path: Path) -> None:
    own = evaluated(tmp_path)
    own.create_model_card()
    path = tmp_path / "README.md"
    edited = ModelCard(path.read_text().replace("## Model description", "## Model description\n\nMy words."))
    edited.data.eval_results = [*edited.data.eval_results, EvalResult("t", "my", "mine", "f1", 0.5)]
    edited.save(path)
    own.args.max_steps = 4
    own.train()
    own.create_model_card()
    card = ModelCard.load(path)
    assert "My words." in card.text and "was of other weights" in card.text
    assert [(of.metric_type, of.metric_value) for of in card.data.eval_results] == [("f1", 0.5)]  # the user's


def test_a_metric_of_ones_own_is_not_overwritten(tmp_path: Path) -> None:
    own = trainer(tmp_path, eval_dataset=TEST, compute_metrics=lambda _: {"accuracy": 73.0})
    own.train()
    found = own.evaluate()
    own.create_model_card()
    results = {of.metric_type: of.metric_value for of in ModelCard.load(tmp_path / "README.md").data.eval_results}
    assert {f"eval_{name}": value for name, value in results.items()} == pytest.approx({
        name: value for name, value in found.items() if name.removeprefix("eval_") in results
    })
    assert results["accuracy"] == 73.0


def test_the_best_models_numbers(tmp_path: Path) -> None:
    for name, better in (("first", False), ("last", True)):
        own = trainer(
            tmp_path / name, eval_dataset=TEST, eval_strategy="steps", eval_steps=1, save_strategy="steps",
            save_steps=1, load_best_model_at_end=True, metric_for_best_model="step", greater_is_better=better,
            compute_metrics=lambda _, seen=[]: seen.append(0) or {"step": float(len(seen))},
        )  # fmt: skip
        own.train()
        own.create_model_card()
        assert ("On the 24 rows" in (tmp_path / name / "README.md").read_text()) == (name == "last")


def test_a_card_without_an_evaluation(tmp_path: Path) -> None:
    own = trainer(tmp_path, plain())
    own.create_model_card()
    text = (tmp_path / "README.md").read_text()
    assert "Nothing was measured: call `trainer.evaluate()`" in text and "point estimate" in text
    assert "This model was trained on an unknown dataset" in text  # not "fine-tuned from" an empty link


def test_token_labels_have_no_intervals(tmp_path: Path) -> None:
    own = trainer(tmp_path, kind="token")
    own.evaluate()
    own.create_model_card()
    results = ModelCard.load(tmp_path / "README.md").data.eval_results
    assert results and all(result.metric_args is None for result in results)


def test_a_users_words_stay(tmp_path: Path) -> None:
    own = evaluated(tmp_path)
    own.create_model_card()
    path = tmp_path / "README.md"
    path.write_text(path.read_text().replace("# ", "# My name for it: ", 1) + "\nBy me.\n")
    own.args.max_steps = 4
    own.train()
    own.evaluate()
    own.create_model_card()
    text = path.read_text()
    assert "By me." in text and "My name for it" in text and text.count("## Uncertainty") == 1
    assert len(ModelCard.load(path).data.eval_results) == 5
    path.write_text("---\nlicense: mit\n---\n\n# All mine\n")
    own.create_model_card(license="apache-2.0", tags="x")
    text = path.read_text()
    assert "# All mine" in text and "## Training procedure" not in text and "license: mit" in text
    assert "## Uncertainty" in text and "- x\n" in text


def test_without_matplotlib_a_line_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = evaluated(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    own.create_model_card()
    text = (tmp_path / "README.md").read_text()
    assert "no reliability picture: matplotlib" in text and "![" not in text


def test_the_process_that_writes_waits_for_no_other(tmp_path: Path) -> None:
    """The rows' order, which the card does not need, is known to all processes together."""
    own = evaluated(tmp_path)

    def together(_: object) -> None:
        raise AssertionError("a collective of all processes, called by one")

    assert own._evaluated is not None
    own._evaluated.columns.sort(together)  # type: ignore[arg-type]
    own.create_model_card()
    assert "On the 24 rows" in (tmp_path / "README.md").read_text()


def test_one_process_writes_and_a_failure_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = evaluated(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(own, "is_world_process_zero", lambda: False)
        own.create_model_card()
    assert not (tmp_path / "README.md").exists()

    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("no card")

    monkeypatch.setattr(sharing, "model_card", fails)
    with pytest.raises(RuntimeError, match="no card"):
        own.create_model_card()
    assert not (tmp_path / "README.md").exists()
    (tmp_path / "README.md").write_text("# Mine\n")
    with pytest.raises(RuntimeError, match="no card"):
        own.create_model_card()
    assert (tmp_path / "README.md").read_text() == "# Mine\n"


# -- pushes ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is uploaded, in order: the folder's copy, and the arguments."""
    uploads: list[Any] = []

    class Repo(str):
        repo_id = "user/tiny"

    class Job:
        def done(self) -> bool:
            return True

    def upload_folder(self: HfApi, **given: Any) -> Any:
        copy = tmp_path / f"upload{len(uploads)}"
        shutil.copytree(given["folder_path"], copy, ignore=shutil.ignore_patterns(*given["ignore_patterns"] or ()))
        uploads.append((copy, given))
        return Job()

    monkeypatch.setattr(HfApi, "create_repo", lambda self, name, **given: uploads.append((name, given)) or Repo("url"))
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    return uploads


def test_a_push_takes_the_card_and_the_posterior(tmp_path: Path, hub: list[Any]) -> None:
    own = trainer(tmp_path / "out", plain(), eval_dataset=TEST, hub_model_id="user/tiny", hub_private_repo=True)
    own.train()
    own.fit_laplace(prior_precision=2.0)
    own.evaluate()
    own.push_to_hub("Done", tags=["mine"], license="mit", token="secret")
    (name, created), (folder, given) = hub
    assert name == "user/tiny" and created == {"token": "secret", "private": True, "exist_ok": True}
    assert given["repo_id"] == "user/tiny" and given["commit_message"] == "Done" and given["token"] == "secret"
    assert {"README.md", "laplace.safetensors", "model.safetensors", "bayesian_digests.json"} <= set(names(folder))
    text = (folder / "README.md").read_text()
    assert 'from_pretrained("user/tiny")' in text and str(tmp_path) not in text and "license: mit" in text
    again = from_pretrained(folder)
    assert torch.equal(again.posterior.predict(tokens(4)).probs, own.posterior.predict(tokens(4)).probs)


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


@pytest.mark.parametrize("kind", ["converted", "adapter"])
def test_a_push_in_training_is_whole(kind: str, tmp_path: Path, hub: list[Any]) -> None:
    model = plain()
    if kind == "adapter":
        peft = pytest.importorskip("peft")
        model.save_pretrained(tmp_path / "base")
        torch.manual_seed(0)
        config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"], r=2)
        model = peft.get_peft_model(type(model).from_pretrained(tmp_path / "base"), config)
    own = trainer(
        tmp_path / "out", to_bayesian(model), save_strategy="steps", save_steps=1, push_to_hub=True,
        hub_model_id="user/tiny", hub_strategy="every_save", rho_learning_rate=0.1,
    )  # fmt: skip
    own.train()
    own.model.eval()
    uploads = hub[1:]
    assert len(uploads) == 2
    for step, (folder, _) in enumerate(uploads, 1):
        saved = from_pretrained(tmp_path / "out" / f"checkpoint-{step}")
        assert same_networks(from_pretrained(folder), saved)
    assert same_networks(from_pretrained(uploads[-1][0]), own.model)


def test_trl_trainers_have_the_section_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    arguments = dataclass(type("SFTArguments", (BayesianArguments, trl.SFTConfig), {"__module__": __name__}))
    monkeypatch.setitem(globals(), "SFTArguments", arguments)  # pickled with a checkpoint, by its name

    class SFT(BayesianTrainerMixin, trl.SFTTrainer):
        pass

    data = datasets.Dataset.from_dict({"prompt": ["w1 w2 w3", "w4"], "completion": [" w6 w7", " w8 w9"]})
    own = SFT(
        model=to_bayesian(trainers.llama()), args=trainers.arguments(arguments, tmp_path, save_strategy="epoch"),
        train_dataset=data, eval_dataset=data, processing_class=trainers.tokenizer(),
    )  # fmt: skip
    own.train()
    own.evaluate()
    own.save_model()
    own.create_model_card(dataset_name="toy", tags=["mine"])
    text = (tmp_path / "README.md").read_text()
    assert "TRL" in text and text.count("## Uncertainty") == 1 and "of the evaluation set" in text
    assert {"trl", "sft", "mine", "bayeformers"} <= set(metadata_load(tmp_path / "README.md")["tags"])  # type: ignore[index]
    (space,) = executed(tmp_path / "README.md")
    assert isinstance(space["model"], nn.Module) and len(space["answers"].text) == 3
