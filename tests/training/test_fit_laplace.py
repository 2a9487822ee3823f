"""`fit_laplace`: what a plain `laplace.fit` gives, used by evaluation, saved with the model, dropped by training."""

import copy
import io
import json
import logging
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

import bayeformers
from bayeformers import LaplacePosterior, laplace, to_bayesian
from bayeformers.training import BayesianTrainer
from bayeformers.training.sharding import example_lengths, sharded_batches, share_of
from tests.training import tiny

KINDS = ("single", "multi", "regression", "token", "causal")


def trainer_of(folder: Path, kind: str = "single", model: nn.Module | None = None, **options: Any) -> BayesianTrainer:
    """Of an unconverted model in float64."""
    config = {"problem_type": "multi_label_classification"} if kind == "multi" else {}
    return tiny.trainer(folder, tiny.plain(kind, **config).double() if model is None else model, kind, **options)


def directly(model: nn.Module, data: Any, **options: Any) -> LaplacePosterior:
    """`laplace.fit` on a stock loader with other batches."""
    return laplace.fit(model, DataLoader(data, batch_size=7), progress=False, **options)


def assert_same(one: LaplacePosterior, other: LaplacePosterior, rtol: float = 1e-9) -> None:
    """Curvature, not eigenvectors, whose signs are nobody's choice."""
    assert list(one.layers) == list(other.layers)
    for name, eigen in one.layers.items():
        scale = float(other.layers[name].eigenvalues.abs().max())
        torch.testing.assert_close(
            eigen.eigenvalues, other.layers[name].eigenvalues, rtol=rtol, atol=rtol * scale, msg=name
        )
    ours, theirs = one.variances(), other.variances()
    for a, b in zip(ours.values(), theirs.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e3 * rtol, atol=0)
    assert one.prior_precision == pytest.approx(other.prior_precision, rel=1e3 * rtol)
    assert one.noise_std == pytest.approx(other.noise_std, rel=1e3 * rtol)
    assert one.record.num_data == other.record.num_data
    assert one.record.log_likelihood == pytest.approx(other.record.log_likelihood, rel=rtol)


class Stream(IterableDataset):
    """A dataset without a length."""

    def __init__(self, data: tiny.Rows) -> None:
        self.data = data

    def __iter__(self) -> Any:
        return (self.data[index] for index in range(len(self.data)))


# -------------------------------------------------------------------------------------------- the same as `laplace.fit`


@pytest.mark.parametrize("kind", KINDS)
def test_is_a_plain_fit(kind: str, tmp_path: Path) -> None:
    """Whatever the batches; of a language model by Monte-Carlo labels, which depend on them: the same batches then."""
    trainer = trainer_of(tmp_path, kind, eval_dataset=None)
    found = trainer.fit_laplace(batch_size=7)
    assert_same(found, directly(trainer.model, trainer.train_dataset))
    assert trainer.posterior is found and found.record.num_data == 20
    assert found.record.config.fisher == ("mc" if kind == "causal" else "exact")
    if kind != "causal":
        assert_same(trainer.fit_laplace(batch_size=3), found)


def test_options_reach_the_fit(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "target_modules": ["query", "LayerNorm", "classifier"],
        "exclude_modules": ["bert.embeddings"],
        "curvature": "diagonal",
        "weight_sharing": "reduce",
        "prior_precision": "marglik_per_layer",
        "temperature": 0.5,
    }
    trainer = trainer_of(tmp_path, eval_dataset=None)
    found = trainer.fit_laplace(**options)
    assert_same(found, directly(trainer.model, trainer.train_dataset, **options))
    assert set(found.prior_precision) == set(found.layers) and "classifier" in found.layers
    assert trainer.fit_laplace(subset="last_layer", prior_precision=3.0).prior_precision == 3.0
    assert list(trainer.posterior.layers) == ["classifier"]
    other = tiny.dataset("single", 8, seed=3)
    assert_same(trainer.fit_laplace(other), directly(trainer.model, other))


def test_ekfac(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    found, expected = (
        trainer.fit_laplace(curvature="ekfac"),
        directly(trainer.model, trainer.train_dataset, curvature="ekfac"),
    )
    for name, eigen in found.layers.items():
        assert float(eigen.eigenvalues.sum()) == pytest.approx(float(expected.layers[name].eigenvalues.sum()))


def test_label_smoothing_and_weights_of_the_loss_play_no_part(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, label_smoothing_factor=0.3, eval_dataset=None)
    assert_same(trainer.fit_laplace(), directly(trainer.model, trainer.train_dataset))


def test_num_batches_is_a_random_part_scaled_up(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, eval_dataset=None)
    found = trainer.fit_laplace(num_batches=2, batch_size=3, seed=1)
    chosen = share_of(20, limit=6, seed=1)
    assert len(chosen) == 6 and chosen != list(range(6))
    data = [trainer.train_dataset[index] for index in chosen]
    assert_same(found, directly(trainer.model, data, num_data=20))
    assert found.record.num_data == 20
    assert_same(trainer.fit_laplace(num_data=200), directly(trainer.model, trainer.train_dataset, num_data=200))


def test_a_stream_needs_no_length(tmp_path: Path) -> None:
    data = tiny.dataset()
    trainer = trainer_of(tmp_path, train_dataset=Stream(data), eval_dataset=None)
    assert_same(trainer.fit_laplace(), directly(trainer.model, data))
    with pytest.raises(ValueError, match="num_data"):
        trainer.fit_laplace(num_batches=1)
    assert trainer.fit_laplace(num_batches=1, num_data=40).record.num_data == 40


def test_multi_label_by_its_labels(tmp_path: Path) -> None:
    """A head whose configuration does not say so."""
    trainer = tiny.trainer(tmp_path, tiny.plain(), "multi", train_dataset=tiny.dataset("multi"))
    posterior = trainer.fit_laplace()
    assert posterior.record.config.likelihood == "multilabel"
    assert posterior.predict(tiny.tokens(2)).problem_type == "multi_label_classification"


def test_the_model_and_the_random_state_stay(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    trainer.model.train()
    state, random = copy.deepcopy(trainer.model.state_dict()), torch.get_rng_state()
    trainer.fit_laplace(fisher="mc")
    assert all(torch.equal(value, state[name]) for name, value in trainer.model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random) and trainer.model.training
    assert all(parameter.grad is None and parameter.requires_grad for parameter in trainer.model.parameters())


# -------------------------------------------------------------------------------------------------- choice of the prior


def test_holdout(tmp_path: Path) -> None:
    """The evaluation data by default; least NLL of what `evaluate` reports."""
    trainer = trainer_of(tmp_path)
    found = trainer.fit_laplace(prior_precision="holdout")
    validation = DataLoader(trainer.eval_dataset, batch_size=9)
    expected = directly(trainer.model, trainer.train_dataset, prior_precision="holdout", validation=validation)
    assert_same(found, expected)

    def nll(tau: float) -> float:
        trainer.posterior = found.with_prior_precision(tau)
        return float(trainer.evaluate()["eval_nll"])

    best = nll(found.prior_precision)
    assert all(best < nll(found.prior_precision * factor) for factor in (0.5, 2.0))
    other = tiny.dataset("single", 6, seed=8)
    assert trainer.fit_laplace(prior_precision="holdout", validation_dataset=other).prior_precision != pytest.approx(
        found.prior_precision, rel=1e-3
    )


@pytest.mark.parametrize("kind", ["single", "token"])
def test_the_evaluation_data_choose_unasked_and_a_line_says_so(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = trainer_of(tmp_path, kind)
    with caplog.at_level(logging.WARNING, "bayeformers"):
        found = trainer.fit_laplace()
    (line,) = [record.message for record in caplog.records if record.message.startswith("Laplace posterior:")]
    assert line.startswith(
        "Laplace posterior: curvature of 20 training rows, prior precision tau = "
        f"{found.prior_precision:.4g}, of least held-out NLL on the 9 rows of `eval_dataset`."
    )
    assert found.prior_precision == trainer.fit_laplace(prior_precision="holdout").prior_precision
    assert found.choice.method == "holdout"
    assert all(caveat in line for caveat in found.caveats) and ("Beware" in line) == bool(found.caveats)
    other = tiny.dataset(kind, 6, seed=8)
    caplog.clear()
    trainer.fit_laplace(validation_dataset=other)
    assert "on the 6 rows of `validation_dataset`" in caplog.text
    trainer.fit_laplace(num_batches=2, batch_size=3)
    assert "curvature of 6 of 20 training rows" in caplog.text


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        ("single", {"eval_dataset": None}, "there is no `eval_dataset`"),
        ("single", {"eval_dataset": {"a": tiny.dataset(), "b": tiny.dataset()}}, "several sets, a, b: pass one"),
        ("single", {"eval_dataset": tiny.Rows(**tiny.tokens(6))}, "`eval_dataset` has no labels"),
        ("single", {"eval_dataset": "training"}, "`eval_dataset` is the training data"),
        ("causal", {}, "too many logits"),
        ("causal", {"eval_dataset": None}, "too many logits"),
    ],
)
def test_leverages_or_the_evidence_choose_where_no_held_out_rows_can(
    kind: str, options: dict[str, Any], said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if options.get("eval_dataset") == "training":
        data = tiny.dataset()
        options = {"train_dataset": data, "eval_dataset": data}
    trainer = trainer_of(tmp_path, kind, **options)
    with caplog.at_level(logging.WARNING, "bayeformers"):
        found = trainer.fit_laplace()
    has_many = kind == "causal"
    assert found.choice.method == ("marglik" if has_many else "leverage") and said in caplog.text
    how = "of largest evidence on 20" if has_many else "the least that the evidence and the leverages of 20"
    assert f"{how} training rows" in caplog.text and ", no held-out ones (" in caplog.text
    trainer.fit_laplace(prior_precision=3.0)
    assert "tau = 3, as given." in caplog.text


class MaskTokenizer:
    """As much of a tokenizer as masking asks for."""

    mask_token_id, all_special_ids = 3, [0, 1, 3]

    def save_pretrained(self, folder: str) -> None: ...


def test_masked_words_choose_with_a_tokenizer_that_has_a_mask(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = trainer_of(tmp_path, eval_dataset=None)
    trainer.processing_class = MaskTokenizer()
    with caplog.at_level(logging.WARNING, "bayeformers"):
        found = trainer.fit_laplace()
    assert found.choice.method == "perturbed" and found.choice.num_rows == 20
    assert "on 20 training rows with 15 % of their words masked or values exchanged, no held-out ones" in caplog.text
    mask = laplace.TokenMask(mask_token_id=3, kept=(0, 1, 3))
    same = laplace.tune(found, "perturbed", training=DataLoader(trainer.train_dataset, batch_size=6), token_mask=mask)
    assert found.prior_precision == pytest.approx(same.prior_precision)
    trainer.processing_class.mask_token_id = trainer.model.get_input_embeddings().num_embeddings
    assert trainer.fit_laplace().choice.method == "leverage"  # of a token that the model lacks


def test_noise_of_a_regression(tmp_path: Path) -> None:
    """Given, from the arguments, or by evidence; what the posterior was made with is what evaluation uses."""
    trainer = trainer_of(tmp_path, "regression", noise_std=0.7)
    for given, expected in ((None, 0.7), (0.3, 0.3)):
        posterior = trainer.fit_laplace(noise_std=given)
        assert posterior.noise_std == expected == trainer.noise_std()
        found = trainer.predict(trainer.eval_dataset).uncertainty["aleatoric_variance"]
        np.testing.assert_allclose(found, expected**2)
    by_evidence = trainer_of(tmp_path, "regression").fit_laplace(prior_precision="marglik")
    assert by_evidence.noise_std not in (1.0, 0.7)
    better = [by_evidence.with_noise_std(by_evidence.noise_std * f).log_marginal_likelihood for f in (0.9, 1.1)]
    assert by_evidence.log_marginal_likelihood > max(better)


# ----------------------------------------------------------------------------------------------------------- evaluation


def columns_of(data: tiny.Rows) -> dict[str, Tensor]:
    return {name: data.columns[name] for name in ("input_ids", "attention_mask")}


@pytest.mark.parametrize("kind", ["single", "multi", "regression", "token"])
def test_evaluation_is_linearised_by_default(kind: str, tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, kind)
    posterior = trainer.fit_laplace()
    output = trainer.predict(trainer.eval_dataset, metric_key_prefix="eval")
    contrasts = kind in ("single", "token")  # the same draws of logits
    expected = posterior.predict(columns_of(trainer.eval_dataset), method="glm", contrasts=contrasts)
    assert output.metrics["eval_nll"] == trainer.evaluate()["eval_nll"]
    if kind == "regression":
        np.testing.assert_allclose(output.uncertainty["epistemic_variance"], expected.epistemic_variance, rtol=1e-4)
        np.testing.assert_allclose(output.predictions[:, 0], expected.mean, rtol=1e-5, atol=1e-6)
        return
    log_probs = expected.mean_log_probs
    if kind == "multi":  # as logits
        log_probs = log_probs[..., 1] - log_probs[..., 0]
    attended = trainer.eval_dataset.columns["attention_mask"].bool() if kind == "token" else slice(None)
    np.testing.assert_allclose(output.predictions[attended], log_probs[attended], atol=1e-5)


def test_evaluation_of_a_language_model_samples(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, "causal")
    posterior = trainer.fit_laplace()
    output = trainer.predict(trainer.eval_dataset)
    expected = posterior.predict(columns_of(trainer.eval_dataset), method="sample", num_samples=3)
    attended = trainer.eval_dataset.columns["attention_mask"].bool()
    np.testing.assert_allclose(output.predictions[attended], expected.mean_log_probs[attended], atol=1e-5)


def test_sampling_by_argument(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, eval_method="sample")
    posterior = trainer.fit_laplace()
    expected = posterior.predict(columns_of(trainer.eval_dataset), method="sample", num_samples=3)
    np.testing.assert_allclose(trainer.predict(trainer.eval_dataset).predictions, expected.mean_log_probs, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------- persistence


@pytest.mark.parametrize("kind", ["single", "regression"])
@pytest.mark.parametrize("curvature", ["kfac", "ekfac", "diagonal"])
def test_saved_and_loaded(kind: str, curvature: Any, tmp_path: Path) -> None:
    """The posterior lies beside the model, comes back on it, and a trainer takes it up: the same predictions."""
    trainer = tiny.trainer(tmp_path, tiny.plain(kind), kind)
    expected = trainer.fit_laplace(curvature=curvature).predict(tiny.tokens(5))
    metrics = trainer.evaluate()
    trainer.save_model(str(tmp_path / "saved"))
    model = bayeformers.from_pretrained(tmp_path / "saved")
    assert type(model) is type(trainer.model) and not model.training
    found = bayeformers.predict(model, tiny.tokens(5))
    torch.testing.assert_close(found.logit_mean, expected.logit_mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.logit_covariance, expected.logit_covariance, rtol=1e-4, atol=0)
    again = tiny.trainer(tmp_path, model, kind)
    assert again.posterior is model.posterior
    for name in ("eval_nll", "eval_loss"):
        assert again.evaluate()[name] == pytest.approx(metrics[name], rel=1e-6)
    new = again.fit_laplace(subset="last_layer")
    assert model.posterior is new is again.posterior


def test_no_posterior_in_checkpoints_of_training(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, tiny.plain(), save_strategy="steps", save_steps=1)
    trainer.fit_laplace()
    trainer.train()
    assert (tmp_path / "checkpoint-2").is_dir() and not list(tmp_path.rglob("laplace.safetensors"))


@pytest.mark.parametrize("source", ["another model", "the checkpoint"])
def test_an_unconverted_model_saves_no_record_of_a_conversion(source: str, tmp_path: Path) -> None:
    """`config.bayesian` came from another model of one config object, or with the mean of a converted checkpoint."""
    first = to_bayesian(tiny.plain())
    if source == "another model":
        model = type(first)(first.config)
        assert model.config is first.config
    else:
        first.save_pretrained(tmp_path / "converted")
        model = type(first).from_pretrained(tmp_path / "converted")
    record = model.config.bayesian
    trainer = tiny.trainer(tmp_path, model, save_strategy="steps", save_steps=1)
    trainer.train()
    trainer.fit_laplace()
    trainer.save_model(str(tmp_path / "saved"))
    assert model.config.bayesian is record  # the other model's own
    for folder in ("saved", "checkpoint-1"):
        assert "bayesian" not in json.loads((tmp_path / folder / "config.json").read_text())
    assert isinstance(bayeformers.from_pretrained(tmp_path / "saved").posterior, LaplacePosterior)
    first.save_pretrained(tmp_path / "first")
    assert bayeformers.is_bayesian(bayeformers.from_pretrained(tmp_path / "first"))


@pytest.mark.skipif(torch.accelerator.is_available(), reason="memory is pinned for an accelerator")
def test_no_memory_is_pinned_without_an_accelerator(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, tiny.plain(), dataloader_pin_memory=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*pin_memory.*")
        trainer.fit_laplace(prior_precision="holdout")


def test_training_drops_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny.plain()
    model.posterior = trainer_of(tmp_path, model=model).fit_laplace()
    trainer = trainer_of(tmp_path, model=model)
    assert trainer.posterior is model.posterior
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert "dropped" in caplog.text
    assert trainer.posterior is None and not hasattr(model, "posterior")
    assert "eval_mutual_information" not in trainer.evaluate() or trainer.evaluate()["eval_mutual_information"] == 0
    assert trainer.fit_laplace() is trainer.posterior


def test_a_model_carries_it_along(tmp_path: Path) -> None:
    """Copies and pickles have a posterior of their own weights; a saved folder has it, the state dict has not."""
    model, inputs = tiny.plain(), tiny.tokens(4)
    names = set(model.state_dict())
    model.posterior = tiny.trainer(tmp_path, model).fit_laplace()
    expected = bayeformers.predict(model, inputs)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert other.posterior.model is other
        assert {id(p) for p in other.posterior.random_parameters()} <= {id(p) for p in other.parameters()}
        torch.testing.assert_close(bayeformers.predict(other, inputs).logit_covariance, expected.logit_covariance)
        with other.posterior.draw(0):
            assert not torch.equal(other.classifier.weight, model.classifier.weight)
        assert torch.equal(other.classifier.weight, model.classifier.weight)
    assert set(model.state_dict()) == names
    model.save_pretrained(tmp_path / "plain")
    assert bayeformers.from_pretrained(tmp_path / "plain").posterior.prior_precision == model.posterior.prior_precision


# ---------------------------------------------------------------------------------------------------------- interrupted


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("fisher", ["exact", "mc"])
def test_an_interrupted_pass_goes_on(fisher: Any, tmp_path: Path) -> None:
    """Equal bit for bit: the loader gives the same batches again."""
    file, options = tmp_path / "sums.safetensors", {"fisher": fisher, "batch_size": 4, "prior_precision": 1.0}
    trainer = trainer_of(tmp_path)
    expected, calls = trainer.fit_laplace(**options), []

    def hook(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 5:
            raise Interrupted

    handle = trainer.model.register_forward_hook(hook)
    with pytest.raises(Interrupted):
        trainer.fit_laplace(checkpoint=file, checkpoint_steps=1, **options)
    handle.remove()
    assert laplace.Curvature.load(file).num_batches == 3  # the first call only looks which layers there are
    handle = trainer.model.register_forward_hook(lambda *_: calls.append(1))
    resumed = trainer.fit_laplace(checkpoint=file, **options)
    handle.remove()
    assert len(calls) == 5 + 1 + 2
    for name, eigen in resumed.layers.items():
        assert torch.equal(eigen.eigenvalues, expected.layers[name].eigenvalues)
    with torch.no_grad():
        trainer.model.classifier.weight.mul_(1.1)
    with pytest.raises(ValueError, match="other weights"):
        trainer.fit_laplace(checkpoint=file, **options)


# ------------------------------------------------------------------------------------------------------------- refusals


def refused(folder: Path, match: str, *, model: nn.Module | None = None, kind: str = "single", **options: Any) -> None:
    own = {name: options.pop(name) for name in ("train_dataset", "eval_dataset") if name in options}
    trainer = tiny.trainer(folder, tiny.plain(kind) if model is None else model, kind, **own)
    with pytest.raises(ValueError, match=match):
        trainer.fit_laplace(**options)
    assert is_variational(trainer) or trainer.posterior is None


def is_variational(trainer: BayesianTrainer) -> bool:
    return bayeformers.is_bayesian(trainer.model)


def test_refusals(tmp_path: Path) -> None:
    refused(tmp_path, "to_deterministic", model=to_bayesian(tiny.plain()))
    refused(tmp_path, "DataParallel", model=nn.DataParallel(tiny.plain()))
    refused(tmp_path, "needs data", train_dataset=None)
    refused(tmp_path, "question_answering", kind="question")
    for name in ("num_batches", "batch_size", "num_data"):
        refused(tmp_path, name, **{name: 0})
    refused(tmp_path, "temperature", temperature=0.0)
    refused(tmp_path, "noise_std", kind="regression", noise_std=0.0)
    refused(tmp_path, "a regression's", noise_std=0.5)
    refused(tmp_path, "prior_precision", prior_precision="bayes")
    refused(tmp_path, "target_modules", target_modules=["nothing"])
    trainer = tiny.trainer(tmp_path, tiny.plain())
    with pytest.raises(ValueError, match="`train_dataset` is empty"):
        trainer.fit_laplace([])
    with pytest.raises(ValueError, match="is empty"):
        trainer.fit_laplace(Stream(tiny.dataset("single", 0)))


def test_refusals_of_holdout(tmp_path: Path) -> None:
    refused(tmp_path, "validation_dataset", prior_precision="holdout", eval_dataset=None)
    data = {"a": tiny.dataset(), "b": tiny.dataset()}
    refused(tmp_path, r"one of its \['a', 'b'\]", prior_precision="holdout", eval_dataset=data)
    for kind in ("causal", "masked"):
        refused(tmp_path, "too many logits", prior_precision="holdout", kind=kind)


@pytest.mark.parametrize("engine", ["is_fsdp_enabled", "is_deepspeed_enabled"])
def test_refuses_sharded_parameters(engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = tiny.trainer(tmp_path, tiny.plain())
    monkeypatch.setattr(trainer, engine, True)
    with pytest.raises(ValueError, match="whole parameters"):
        trainer.fit_laplace()


def test_what_the_log_says(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = trainer_of(tmp_path)
    with caplog.at_level(logging.INFO, "bayeformers"):
        trainer.fit_laplace(fisher="empirical")
        trainer.fit_laplace(fisher="empirical")
        posterior = trainer.fit_laplace()
    assert caplog.text.count("no estimate of the curvature") == 1
    assert f"{posterior.log_marginal_likelihood:.2f}" in caplog.text and "8 layers, 1,955 weights" in caplog.text
    assert caplog.text.count("bert.embeddings.word_embeddings") == 3  # one line per reason and fit
    columns = {**tiny.tokens(6)}
    assert math.isnan(trainer.fit_laplace(tiny.Rows(**columns)).record.log_likelihood)


# ------------------------------------------------------------------------------------------------------------- sharding


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("limit", [None, 8])
def test_shares_are_disjoint_and_sorted(world_size: int, limit: int | None) -> None:
    lengths = torch.randint(1, 6, (20,), generator=torch.Generator().manual_seed(0)).tolist()
    shares = [share_of(20, lengths, rank=rank, world_size=world_size, limit=limit) for rank in range(world_size)]
    joined = [index for share in shares for index in share]
    assert len(joined) == len(set(joined)) == (limit or 20)
    assert all([-lengths[i] for i in share] == sorted(-lengths[i] for i in share) for share in shares)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_lengths_are_read_where_that_is_cheap() -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{"input_ids": [1] * n, "labels": 0} for n in (2, 5, 3)]
    assert example_lengths(rows) == [2, 5, 3]
    assert example_lengths(datasets.Dataset.from_list(rows)) == [2, 5, 3]
    assert example_lengths(datasets.Dataset.from_list(rows).with_format("torch").select([1, 2])) == [5, 3]
    assert example_lengths(datasets.Dataset.from_list([{"length": 4, "input_ids": [0]}])) == [4]
    assert example_lengths(tiny.dataset()) is None and example_lengths([1, 2]) is None


def test_neighbours_are_as_long(tmp_path: Path) -> None:
    """So that a batch needs little padding; the factors are those of padded batches."""
    datasets = pytest.importorskip("datasets")
    rows = [{"input_ids": [3 + n % 7] * (2 + n % 4), "attention_mask": [1] * (2 + n % 4), "text": "", "labels": n % 3}
            for n in range(12)]  # fmt: skip

    def collate(examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        assert "text" not in examples[0]  # the model's forward takes none
        seen = [len(example["input_ids"]) for example in examples]
        lengths.append(seen)
        columns = {
            name: [example[name] + [0] * (max(seen) - len(example[name])) for example in examples]
            for name in ("input_ids", "attention_mask")
        }
        columns["labels"] = [example["labels"] for example in examples]
        return {name: torch.tensor(values) for name, values in columns.items()}

    def renamed(batch: dict[str, Any]) -> dict[str, Any]:
        return {"input_ids" if name == "ids" else name: values for name, values in batch.items()}

    lengths: list[list[int]] = []
    data = datasets.Dataset.from_list(rows)
    unknown = data.rename_column("input_ids", "ids").with_transform(renamed)  # no column to read the lengths from
    by_length, as_given = (
        trainer_of(tmp_path, data_collator=collate, train_dataset=data, eval_dataset=None).fit_laplace(batch_size=3)
        for data in (data, unknown)
    )
    assert [set(seen) for seen in lengths[1:5]] == [{5}, {4}, {3}, {2}]
    assert [set(seen) for seen in lengths[-4:]] == [{5}, {4}, {3}, {2}]  # found by collating each row
    assert_same(by_length, as_given)


def test_streams_are_split_by_batches() -> None:
    data = Stream(tiny.dataset("single", 7))
    shares = [list(sharded_batches(data, len, batch_size=2, rank=rank, world_size=2)) for rank in range(2)]
    assert shares == [[2, 2], [2, 1]]
