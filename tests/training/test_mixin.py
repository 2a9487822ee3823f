"""`BayesianTrainerMixin` before trainers of transformers and of the user's, and the arguments of both."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn

from bayeformers import BayesianArguments, BayesianTrainer, BayesianTrainerMixin, BayesianTrainingArguments, fixed_draw
from tests.training import steps, tiny, trainers


class Weighted(hf.Trainer):
    """transformers' recipe for class weights."""

    def compute_loss(self, model: nn.Module, inputs: dict, return_outputs: bool = False, *args: Any) -> Any:
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = F.cross_entropy(outputs.logits, labels, torch.tensor([1.0, 2.0, 3.0]), reduction="none").mean()
        return (loss, outputs) if return_outputs else loss


class BayesianWeighted(trainers.Fed, BayesianTrainerMixin, Weighted):
    pass


class Generating(trainers.Fed, BayesianTrainerMixin, hf.Seq2SeqTrainer):
    pass


@dataclass
class GeneratingArguments(BayesianArguments, hf.Seq2SeqTrainingArguments):
    """Of `Generating`."""


def weighted(folder: Path, **kwargs: Any) -> BayesianWeighted:
    args = trainers.arguments(BayesianTrainingArguments, folder, **kwargs)
    data = tiny.dataset("single", 6)
    return BayesianWeighted(tiny.bayesian("single"), args, train_dataset=data, eval_dataset=data)


def summed(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    weights = torch.tensor([1.0, 2.0, 3.0])[batch["labels"]]
    return (weights * F.cross_entropy(logits, batch["labels"], reduction="none")).sum(), len(logits)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_own_loss_of_a_user(accumulation: int, tmp_path: Path) -> None:
    trainers.check_gradients(weighted(tmp_path, gradient_accumulation_steps=accumulation), summed, 6)


def test_own_loss_of_a_user_is_averaged_over_draws(tmp_path: Path) -> None:
    trainer = weighted(tmp_path, per_device_eval_batch_size=6)
    batch = tiny.dataset("single", 6).columns
    with torch.no_grad():
        found = []
        for index in range(3):
            with fixed_draw(trainer.model.eval(), index):
                found.append(float(summed(trainer.model, batch)[0]) / 6)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(sum(found) / 3, rel=1e-5)


@pytest.mark.parametrize("samples", [1, 3])
def test_draws_in_training_share_the_kl(samples: int, tmp_path: Path) -> None:
    """Held, all of a step's draws are one: their mean is each of them."""
    trainers.check_gradients(weighted(tmp_path, num_train_samples=samples), summed, 6)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_trainer_with_the_stock_loss_has_the_likelihood(accumulation: int, tmp_path: Path) -> None:
    args = trainers.arguments(
        GeneratingArguments, tmp_path, gradient_accumulation_steps=accumulation, predict_with_generate=True,
        generation_max_length=5,
    )  # fmt: skip
    data = tiny.dataset("seq2seq", 6)
    trainer = Generating(
        tiny.bayesian("seq2seq"), args, train_dataset=data, eval_dataset=data,
        compute_metrics=lambda found: {"tokens_after": float((found.predictions[:, 5:] > 0).sum())},
    )  # fmt: skip
    trainers.check_gradients(
        trainer,
        lambda model, batch: steps.summed_nll(model, "seq2seq", batch),
        int((data.columns["labels"] != -100).sum()),
    )
    found = trainer.evaluate()
    assert found["eval_tokens_after"] == 0  # what is generated ends there, and is padded
    assert found["eval_mutual_information"] > 0


def test_it_may_stand_alone(tmp_path: Path) -> None:
    class Alone(BayesianTrainerMixin):
        pass

    Alone(tiny.bayesian("single"), tiny.arguments(tmp_path), train_dataset=tiny.dataset("single")).train()


def test_other_order_of_bases_is_refused_at_the_class() -> None:
    with pytest.raises(TypeError, match=r"Write `class Wrong\(BayesianTrainerMixin, Weighted\)`"):

        class Wrong(Weighted, BayesianTrainerMixin):
            pass


def test_arguments_of_the_trainer_behind_are_asked_for(tmp_path: Path) -> None:
    args = hf.TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(TypeError, match="BayesianTrainingArguments|BayesianArguments"):
        BayesianWeighted(tiny.bayesian("single"), args, train_dataset=tiny.dataset("single"))


def test_arguments_alone_are_refused() -> None:
    with pytest.raises(TypeError, match="and then the arguments of a trainer"):
        BayesianArguments()


def test_arguments_in_the_other_order_keep_our_checks(tmp_path: Path) -> None:
    """Behind the stock class ours would check nothing: the dataclass finds no base behind it."""

    @dataclass
    class Reversed(hf.Seq2SeqTrainingArguments, BayesianArguments):
        pass

    with pytest.raises(TypeError, match="whose bases are `BayesianArguments` and then"):
        Reversed(str(tmp_path))


def test_defaults_of_the_other_class_stay() -> None:
    @dataclass
    class Stock(hf.TrainingArguments):
        learning_rate: float = 0.125

    @dataclass
    class Ours(BayesianArguments, Stock):
        pass

    assert Ours("out", use_cpu=True, report_to="none").learning_rate == 0.125
    parsed = hf.HfArgumentParser(Ours).parse_args_into_dataclasses([
        "--output_dir",
        "out",
        "--use_cpu",
        "True",
        "--report_to",
        "none",
        "--num_eval_samples",
        "4",
    ])[0]
    assert (parsed.num_eval_samples, parsed.learning_rate) == (4, 0.125)


def test_a_direction_is_settled_with_other_arguments(tmp_path: Path) -> None:
    args = GeneratingArguments(str(tmp_path), use_cpu=True, report_to="none", metric_for_best_model="nll")
    assert args.greater_is_better is False


def test_the_bayesian_trainer_takes_them_too(tmp_path: Path) -> None:
    args = trainers.arguments(GeneratingArguments, tmp_path, max_steps=1)
    BayesianTrainer(tiny.bayesian("single"), args, train_dataset=tiny.dataset("single")).train()
