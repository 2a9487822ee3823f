"""sentence-transformers' trainers behind `BayesianTrainerMixin`: gradients and evaluations by hand."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn

from bayeformers import BayesianArguments, BayesianTrainerMixin, fixed_draw, from_pretrained, is_bayesian, to_bayesian
from tests.training import trainers

st = pytest.importorskip("sentence_transformers")
datasets = pytest.importorskip("datasets")
losses = pytest.importorskip("sentence_transformers.losses")
cross_losses = pytest.importorskip("sentence_transformers.cross_encoder.losses")


@dataclass
class Arguments(BayesianArguments, st.SentenceTransformerTrainingArguments):
    """Of `Sentences`."""


@dataclass
class CrossArguments(BayesianArguments, st.CrossEncoderTrainingArguments):
    """Of `Pairs`."""


class Sentences(trainers.Fed, BayesianTrainerMixin, st.SentenceTransformerTrainer):
    pass


class Pairs(trainers.Fed, BayesianTrainerMixin, st.CrossEncoderTrainer):
    pass


def folder_of(kind: type, folder: Path, **kwargs: Any) -> str:
    """A BERT of one layer with its tokenizer."""
    config = hf.BertConfig(
        vocab_size=trainers.WORDS, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=16, initializer_range=0.3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        pad_token_id=0, **kwargs,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        kind(config).save_pretrained(folder / "base")
    trainers.tokenizer(model_max_length=16).save_pretrained(folder / "base")
    return str(folder / "base")


def rows(number: int = 6, **columns: Any) -> Any:
    texts = {"anchor": [f"w{i} w2 w3" for i in range(number)], "positive": [f"w{i} w{i + 1}" for i in range(number)]}
    return datasets.Dataset.from_dict({**texts, **columns})


def sentences(folder: Path, loss: Any = None, data: Any = None, **kwargs: Any) -> Any:
    model = st.SentenceTransformer(folder_of(hf.BertModel, folder), device="cpu")
    to_bayesian(model.transformers_model, 0.3, freeze=False)
    data = rows() if data is None else data
    args = trainers.arguments(Arguments, folder / "out", **kwargs)
    loss = (loss or losses.MultipleNegativesRankingLoss)(model)
    return Sentences(model, args, train_dataset=data, eval_dataset=data, loss=loss)


def embedded(model: nn.Module, batch: dict[str, Tensor], column: str) -> Tensor:
    """Mean over the tokens, of length 1."""
    ids, mask = (batch[f"{column}_{name}"] for name in ("input_ids", "attention_mask"))
    states = model.transformers_model(input_ids=ids, attention_mask=mask).last_hidden_state
    return F.normalize((states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True), dim=-1)


def ranking_loss(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
    """Which of the batch's positives is an anchor's own, by 20 times their cosine."""
    scores = 20.0 * embedded(model, batch, "anchor") @ embedded(model, batch, "positive").T
    return F.cross_entropy(scores, torch.arange(len(scores)), reduction="sum"), len(scores)


@pytest.mark.parametrize(("batch", "accumulation"), [(4, 1), (2, 2)])
def test_sentence_transformer(batch: int, accumulation: int, tmp_path: Path) -> None:
    """All columns of a batch are embedded by one draw."""
    trainer = sentences(tmp_path, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation)
    trainers.check_gradients(trainer, ranking_loss, 6)


def test_columns_of_a_batch_share_a_live_draw(tmp_path: Path) -> None:
    """The same texts in both columns have the same states in one step, and others in the next."""
    data = datasets.Dataset.from_dict({"anchor": ["w1 w2", "w3 w4"] * 2, "positive": ["w1 w2", "w3 w4"] * 2})
    trainer, seen = sentences(tmp_path, data=data, learning_rate=0.0, rho_learning_rate=1e-12), []
    embeddings = trainer.model.transformers_model.embeddings  # the model's own hooks never run: `forward` is called
    embeddings.register_forward_hook(lambda module, args, output: seen.append(output.detach()))
    trainer.train()
    assert len(seen) == 4
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[2], seen[3])
    assert not torch.allclose(seen[0], seen[2], atol=1e-3)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_cross_encoder(accumulation: int, tmp_path: Path) -> None:
    data = rows(label=[1.0, 0.0, 1.0, 1.0, 0.0, 0.0])
    model = st.CrossEncoder(folder_of(hf.BertForSequenceClassification, tmp_path, num_labels=1), device="cpu")
    to_bayesian(model.transformers_model, 0.3, freeze=False)
    args = trainers.arguments(CrossArguments, tmp_path / "out", gradient_accumulation_steps=accumulation)
    trainer = Pairs(model, args, train_dataset=data, loss=cross_losses.BinaryCrossEntropyLoss(model))

    def summed(model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, int]:
        """The batch is texts, which the loss tokenises."""
        inputs = model.tokenizer(batch["anchor"], batch["positive"], padding=True, return_tensors="pt")
        logits = model.transformers_model(**inputs).logits[:, 0]
        return F.binary_cross_entropy_with_logits(logits, batch["label"], reduction="sum"), len(logits)

    trainers.check_gradients(trainer, summed, 6)


def test_texts_without_labels_are_counted(tmp_path: Path) -> None:
    model = st.CrossEncoder(folder_of(hf.BertForSequenceClassification, tmp_path, num_labels=1), device="cpu")
    to_bayesian(model.transformers_model, 0.3)
    loss = cross_losses.MultipleNegativesRankingLoss(model)
    trainer = Pairs(model, trainers.arguments(CrossArguments, tmp_path / "out"), train_dataset=rows(), loss=loss)
    assert int(trainer.count_items({"anchor": ["w1", "w2", "w3"], "positive": ["w4", "w5", "w6"]})) == 3
    with pytest.raises(ValueError, match="override `count_items`"):
        trainer.count_items({"dataset_name": "one"})


def test_evaluation_is_the_mean_of_the_own_loss_over_draws(tmp_path: Path) -> None:
    trainer = sentences(tmp_path, per_device_eval_batch_size=6)
    batch, found = next(iter(trainer.get_eval_dataloader())), []
    for index in range(3):
        with torch.no_grad(), fixed_draw(trainer.model.eval(), index):
            total, count = ranking_loss(trainer.model, batch)
        found.append(float(total) / count)
    assert len(set(found)) == 3
    assert trainer.evaluate()["eval_loss"] == pytest.approx(sum(found) / 3, rel=1e-5)


def test_several_datasets_are_counted_together(tmp_path: Path) -> None:
    data = datasets.DatasetDict({"one": rows(6), "two": rows(5)})
    trainer = sentences(tmp_path, data=data, max_steps=1)
    trainer.train()
    config = json.loads((Path(trainer.args.output_dir) / "config.json").read_text()) if trainer.save_model() else None
    assert config is None
    assert trainer.model.transformers_model.config.bayesian["num_training_items"] == 11


def test_a_run_goes_on_and_its_inner_model_is_read_back(tmp_path: Path) -> None:
    trainer = sentences(tmp_path, save_strategy="steps", save_steps=1, max_steps=3)
    trainer.train()
    expected = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    again = sentences(tmp_path, save_strategy="steps", save_steps=1, max_steps=3)
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert all(torch.equal(value, expected[name]) for name, value in again.model.state_dict().items())
    trainer.save_model(str(tmp_path / "saved"))
    inner = from_pretrained(tmp_path / "saved")
    assert is_bayesian(inner)
    own = trainer.model.transformers_model.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in inner.state_dict().items())


def test_a_loss_that_is_no_likelihood_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = rows(label=[0.1, 0.9, 0.3, 0.5, 0.2, 0.8])
    sentences(tmp_path, losses.CosineSimilarityLoss, data, max_steps=1).train()
    assert sum("CosineSimilarityLoss is not known" in record.message for record in caplog.records) == 1


def test_a_loss_that_runs_the_model_again_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`loss` must not be CachedMultipleNegativesRankingLoss"):
        sentences(tmp_path, losses.CachedMultipleNegativesRankingLoss)


def test_other_order_of_bases_is_refused() -> None:
    with pytest.raises(TypeError, match=r"BayesianTrainerMixin, "):

        class Wrong(st.SentenceTransformerTrainer, BayesianTrainerMixin):
            pass


def test_stock_arguments_are_refused(tmp_path: Path) -> None:
    args = trainers.arguments(Arguments, tmp_path)
    with pytest.raises(TypeError, match="CrossEncoderTrainingArguments with the fields"):
        Pairs(None, args)
