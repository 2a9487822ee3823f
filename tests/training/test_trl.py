"""trl's trainers behind `BayesianTrainerMixin`: every gradient is that of their loss's mean + KL / N, by hand."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn

from bayeformers import (
    BayesianArguments,
    BayesianTrainer,
    BayesianTrainerMixin,
    fixed_draw,
    from_pretrained,
    predict,
    to_bayesian,
)
from tests.training import trainers

trl = pytest.importorskip("trl")
peft = pytest.importorskip("peft")
datasets = pytest.importorskip("datasets")


@dataclass
class SFTArguments(BayesianArguments, trl.SFTConfig):
    """Of `SFT`."""


@dataclass
class RewardArguments(BayesianArguments, trl.RewardConfig):
    """Of `Reward`."""


@dataclass
class DPOArguments(BayesianArguments, trl.DPOConfig):
    """Of `DPO`."""


class SFT(trainers.Fed, BayesianTrainerMixin, trl.SFTTrainer):
    pass


class Reward(trainers.Fed, BayesianTrainerMixin, trl.RewardTrainer):
    pass


class DPO(trainers.Fed, BayesianTrainerMixin, trl.DPOTrainer):
    pass


PROMPTS = ["w1 w2 w3", "w4", "w5 w6", "w7 w8 w9 w10", "w11 w12", "w2"]
CHOSEN = [" w6 w7", " w8 w9 w3 w1", " w10", " w12 w13", " w4 w4 w9", " w1 w2"]
REJECTED = [" w1", " w2 w2", " w3 w4 w5", " w6", " w7", " w8 w9"]


def texts() -> Any:
    return datasets.Dataset.from_dict({"prompt": PROMPTS, "completion": CHOSEN})


def pairs(**columns: Any) -> Any:
    return datasets.Dataset.from_dict({"prompt": PROMPTS, "chosen": CHOSEN, "rejected": REJECTED, **columns})


def with_adapter(model: nn.Module) -> nn.Module:
    """LoRA whose B is not zero: a fresh one would learn nothing of A in the first step."""
    torch.manual_seed(1)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return peft.get_peft_model(model, config)


def bayesian(model: nn.Module, **kwargs: Any) -> nn.Module:
    return to_bayesian(model, 0.3, freeze=False, **kwargs)


def adapted(model: nn.Module) -> nn.Module:
    return to_bayesian(with_adapter(model), 0.3)


def sft(folder: Path, model: nn.Module, **kwargs: Any) -> Any:
    args = trainers.arguments(SFTArguments, folder, **{"max_length": 32, **kwargs})
    return SFT(model, args, train_dataset=texts(), eval_dataset=texts(), processing_class=trainers.tokenizer())


def reward(folder: Path, data: Any = None, **kwargs: Any) -> Any:
    model = bayesian(trainers.llama(hf.LlamaForSequenceClassification, num_labels=1))
    data = pairs() if data is None else data
    args = trainers.arguments(RewardArguments, folder, **kwargs)
    return Reward(model, args, train_dataset=data, eval_dataset=data, processing_class=trainers.tokenizer())


def dpo(folder: Path, model: nn.Module, reference: nn.Module | None = None, **kwargs: Any) -> Any:
    args = trainers.arguments(DPOArguments, folder, **kwargs)
    return DPO(model, reference, args, train_dataset=pairs(), eval_dataset=pairs(),
               processing_class=trainers.tokenizer())  # fmt: skip


ANSWERS = sum(len(text.split()) + 1 for text in CHOSEN)  # and the end of each


@pytest.mark.parametrize("make", [bayesian, adapted], ids=["whole", "LoRA"])
@pytest.mark.parametrize(("batch", "accumulation"), [(4, 1), (2, 2)])
def test_sft(make: Callable[..., nn.Module], batch: int, accumulation: int, tmp_path: Path) -> None:
    """Completion-only labels; the last step of 6 rows is of two."""
    trainer = sft(
        tmp_path, make(trainers.llama()), per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation
    )
    trainers.check_gradients(trainer, trainers.token_nll, ANSWERS)
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert all(log["loss"] == pytest.approx(log["nll"] + log["kl"] / ANSWERS, rel=1e-5) for log in logs)
    assert {"entropy", "mean_token_accuracy", "num_tokens"} <= logs[0].keys()  # trl's own


def test_sft_of_whole_texts(tmp_path: Path) -> None:
    """Every token after the first is predicted."""
    trainer = sft(tmp_path, bayesian(trainers.llama()), completion_only_loss=False)
    every = ANSWERS + sum(len(text.split()) for text in PROMPTS) - len(PROMPTS)
    trainers.check_gradients(trainer, trainers.token_nll, every)


@pytest.mark.parametrize("packing", [True, False])
def test_sft_without_padding(packing: bool, tmp_path: Path) -> None:
    """Each text in a row of its own gives the same: no label and no attention crosses from one to the next."""
    kwargs = {"packing": True, "max_length": 16} if packing else {"padding_free": True, "max_length": None}
    trainer = sft(tmp_path, bayesian(trainers.llama()), **kwargs)
    if packing:
        assert len(trainer.train_dataset) < len(PROMPTS)
    trainers.check_gradients(trainer, trainers.token_nll, ANSWERS)


def test_sft_averages_draws(tmp_path: Path) -> None:
    """The loss, its tokens and its uncertainty are those of the averaged prediction, from the whole logits."""
    trainer = sft(tmp_path, adapted(trainers.llama()))
    own = copy.deepcopy(trainer.model)
    own.get_base_model().__dict__.pop("forward")  # the fused head, which calls the original
    found, rows = trainer.evaluate(), list(trainer.get_eval_dataloader())
    nll, entropy, expected, count = 0.0, 0.0, 0.0, 0
    for batch in rows:
        draws = []
        for index in range(3):
            with torch.no_grad(), fixed_draw(own.eval(), index):
                logits = own(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            draws.append(logits[:, :-1].softmax(-1))
        probs, labels = torch.stack(draws), batch["labels"][:, 1:]
        mean, kept = probs.mean(0), labels != -100
        nll -= float(mean[kept].gather(-1, labels[kept][:, None]).log().sum())
        entropy -= float((mean * mean.log()).sum(-1)[kept].sum())
        expected -= float((probs * probs.log()).sum(-1).mean(0)[kept].sum())
        count += int(kept.sum())
    assert count == ANSWERS
    assert found["eval_loss"] == pytest.approx(nll / count, rel=1e-5)
    assert found["eval_predictive_entropy"] == pytest.approx(entropy / count, rel=1e-4)
    assert found["eval_mutual_information"] == pytest.approx((entropy - expected) / count, rel=1e-3)
    assert found["eval_mutual_information"] > 1e-3


def pair_loss(batch_of: dict[str, Tensor], model: nn.Module, centring: float) -> tuple[Tensor, int]:
    """The two answers of each pair in a forward of their own."""
    ids, mask, size = batch_of["input_ids"], batch_of["attention_mask"], len(batch_of["input_ids"]) // 2
    chosen, rejected = (
        model(input_ids=ids[rows], attention_mask=mask[rows]).logits[:, 0] for rows in (slice(size), slice(size, None))
    )
    margin = batch_of.get("margin", 0.0)
    return (F.softplus(rejected + margin - chosen) + centring * (chosen + rejected) ** 2).sum(), size


@pytest.mark.parametrize(("batch", "accumulation"), [(4, 1), (2, 2)])
@pytest.mark.parametrize(("margin", "centring"), [(False, None), (True, 0.1)])
def test_reward(batch: int, accumulation: int, margin: bool, centring: float | None, tmp_path: Path) -> None:
    data = pairs(margin=[0.1, 0.5, 0.0, 1.0, 0.2, 0.3]) if margin else None
    trainer = reward(
        tmp_path, data, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation,
        center_rewards_coefficient=centring,
    )  # fmt: skip
    trainers.check_gradients(trainer, lambda model, rows: pair_loss(rows, model, centring or 0.0), len(PROMPTS))
    log = trainer.state.log_history[0]
    assert ("own_terms" in log) is (centring is not None)
    assert log["loss"] == pytest.approx(log["nll"] + log["kl"] / 6 + log.get("own_terms", 0.0), rel=1e-5)


def test_reward_averages_the_probability_of_the_preference(tmp_path: Path) -> None:
    trainer = reward(tmp_path)
    found, probs = trainer.evaluate(), []
    for batch in trainer.get_eval_dataloader():
        size, draws = len(batch["input_ids"]) // 2, []
        for index in range(3):
            with torch.no_grad(), fixed_draw(trainer.model.eval(), index):
                scores = trainer.model(**{n: batch[n] for n in ("input_ids", "attention_mask")}).logits[:, 0].double()
            draws.append((scores[:size] - scores[size:]).sigmoid())
        probs.append(torch.stack(draws))
    drawn = torch.cat(probs, 1)
    mean = drawn.mean(0)
    entropy = torch.distributions.Bernoulli(mean).entropy() - torch.distributions.Bernoulli(drawn).entropy().mean(0)
    assert found["eval_loss"] == pytest.approx(float(-mean.log().mean()), rel=1e-5)
    assert found["eval_brier"] == pytest.approx(float(2 * (1 - mean).square().mean()), rel=1e-5)
    assert found["eval_mutual_information"] == pytest.approx(float(entropy.mean()), rel=1e-3)
    assert trainer.predict(trainer.eval_dataset).uncertainty["mutual_information"].shape == (6,)


def policy_loss(reference: nn.Module, beta: float = 0.1) -> Callable[..., tuple[Tensor, int]]:
    def summed(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
        parts = (batch["input_ids"], batch["attention_mask"], batch["completion_mask"])
        with torch.no_grad():
            before = trainers.answer_log_prob(reference, *parts)
        chosen, rejected = (trainers.answer_log_prob(model, *parts) - before).chunk(2)
        return F.softplus(beta * (rejected - chosen)).sum(), len(chosen)

    return summed


@pytest.mark.parametrize(("batch", "accumulation"), [(4, 1), (2, 2)])
@pytest.mark.parametrize("kind", ["whole", "precomputed", "LoRA", "LoRA on a Bayesian base"])
def test_dpo_has_a_reference_without_noise(kind: str, batch: int, accumulation: int, tmp_path: Path) -> None:
    """The reference is what the model was before training, at its mean, in the second step too."""
    plain, is_whole = trainers.llama(), not kind.startswith("LoRA")
    reference = plain if is_whole else with_adapter(plain)  # trl keeps a copy of a given adapter
    base = trainers.llama() if is_whole else with_adapter(trainers.llama())
    model = to_bayesian(base, 0.3) if kind == "LoRA" else bayesian(base, target_modules="all")
    trainer = dpo(
        tmp_path, model, trainers.llama() if kind == "whole" else None,
        precompute_ref_log_probs=kind == "precomputed", per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
    )  # fmt: skip
    flags = {name: p.requires_grad for name, p in trainer.model.named_parameters()}
    trainers.check_gradients(trainer, policy_loss(reference.eval()), len(PROMPTS))
    assert flags == {name: p.requires_grad for name, p in trainer.model.named_parameters()}
    assert not any(flags[name] for name in flags if ".ref." in name)


def test_dpo_averages_the_probability_of_the_preference(tmp_path: Path) -> None:
    trainer = dpo(tmp_path, bayesian(trainers.llama()), trainers.llama(), beta=0.5)
    found, reference, losses = trainer.evaluate(), trainers.llama().eval(), []
    own = copy.deepcopy(trainer.model)
    own.__dict__.pop("forward")
    for batch in trainer.get_eval_dataloader():
        draws = []
        for index in range(3):
            with fixed_draw(own.eval(), index), torch.no_grad():
                parts = (batch["input_ids"], batch["attention_mask"], batch["completion_mask"])
                ratio = trainers.answer_log_prob(own, *parts) - trainers.answer_log_prob(reference, *parts)
            chosen, rejected = ratio.double().chunk(2)
            draws.append((0.5 * (chosen - rejected)).sigmoid())
        losses.append(-torch.stack(draws).mean(0).log())
    assert found["eval_loss"] == pytest.approx(float(torch.cat(losses).mean()), rel=1e-5)
    assert found["eval_mutual_information"] > 0


def test_a_loss_that_is_no_likelihood_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = dpo(tmp_path, bayesian(trainers.llama()), trainers.llama(), loss_type=["ipo"], max_steps=1)
    trainer.train()
    assert sum("generalised posterior" in record.message for record in caplog.records) == 1
    found = trainer.evaluate()  # the mean of its own loss over the draws
    assert found["eval_loss"] > 0
    assert "eval_nll" not in found


def test_a_plain_model_trains_on_the_own_loss_exactly(tmp_path: Path) -> None:
    """Without a posterior there is no KL, and the micro-batches are weighted by their tokens."""
    trainer = sft(tmp_path, trainers.llama(), gradient_accumulation_steps=3, max_steps=1)
    own = copy.deepcopy(trainer.model).train()
    own.__dict__.pop("forward")
    record = trainers.Gradients()
    trainer.add_callback(record)
    trainer.train()
    total, count = (sum(parts) for parts in zip(*(trainers.token_nll(own, b) for b in trainer.fed[0]), strict=True))
    (total / count).backward()
    expected = {name: p.grad for name, p in own.named_parameters()}
    assert trainers.relative_error(record.steps[0]["grads"], expected) < 1e-5


def test_the_stock_defaults_of_trl_stay() -> None:
    stock, ours = trl.SFTConfig("out", use_cpu=True), SFTArguments("out", use_cpu=True)
    differing = {
        n for n in vars(stock) if getattr(ours, n) != getattr(stock, n) and n not in ("logging_dir", "run_name")
    }
    assert {name for name in differing if not name.startswith("_")} <= {"distributed_state", "accelerator_config"}


# ------------------------------------------------------------------------------------------------------ bad input


def test_other_order_of_bases_is_refused() -> None:
    with pytest.raises(TypeError, match=r"Write `class Wrong\(BayesianTrainerMixin, SFTTrainer\)`"):

        class Wrong(trl.SFTTrainer, BayesianTrainerMixin):
            pass


def test_a_trainer_without_labelled_items_is_refused() -> None:
    with pytest.raises(TypeError, match="stands before trl's `GRPOTrainer`"):

        class Sampled(BayesianTrainerMixin, trl.GRPOTrainer):
            pass


@pytest.mark.parametrize("args", [None, trl.SFTConfig("out", use_cpu=True, bf16=False, report_to="none")])
def test_arguments_of_another_class_are_refused(args: Any) -> None:
    with pytest.raises(TypeError, match=r"@dataclass class BayesianSFTConfig\(BayesianArguments, SFTConfig\)"):
        SFT(bayesian(trainers.llama()), args, train_dataset=texts(), processing_class=trainers.tokenizer())


def test_arguments_of_another_trainer_are_refused(tmp_path: Path) -> None:
    args = trainers.arguments(RewardArguments, tmp_path)
    with pytest.raises(TypeError, match="`args` must be a SFTConfig"):
        SFT(bayesian(trainers.llama()), args, train_dataset=texts(), processing_class=trainers.tokenizer())


def test_no_dataclass_is_refused(tmp_path: Path) -> None:
    class Forgotten(BayesianArguments, trl.SFTConfig):
        pass

    with pytest.raises(TypeError, match="Write `@dataclass`"):
        trainers.arguments(Forgotten, tmp_path)


def test_an_argument_given_twice_is_refused(tmp_path: Path) -> None:
    args = trainers.arguments(SFTArguments, tmp_path)
    with pytest.raises(TypeError, match="`args` was given twice"):
        SFT(trainers.llama(), args, args=args)


def test_an_adapter_after_the_conversion_is_refused(tmp_path: Path) -> None:
    args = trainers.arguments(SFTArguments, tmp_path)
    with pytest.raises(ValueError, match="`peft_config` must be None for a Bayesian model"):
        SFT(bayesian(trainers.llama()), args, train_dataset=texts(), peft_config=peft.LoraConfig())


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"loss_type": "dft"}, '`loss_type` must be "nll"'),
        ({"label_smoothing_factor": 0.1}, "`label_smoothing_factor` must be 0"),
        ({"calibration_loss": "avuc"}, "`calibration_loss`='avuc' reads logits"),
        ({"num_eval_samples": 0}, "`num_eval_samples`"),
    ],
)
def test_sft_refuses(kwargs: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        sft(tmp_path, bayesian(trainers.llama()), **kwargs)


def test_dpo_refuses_a_reference_that_follows(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`sync_ref_model` must be False"):
        dpo(tmp_path, bayesian(trainers.llama()), trainers.llama(), sync_ref_model=True)


def test_a_reward_has_no_laplace(tmp_path: Path) -> None:
    model = trainers.llama(hf.LlamaForSequenceClassification, num_labels=1)
    args = trainers.arguments(RewardArguments, tmp_path)
    trainer = Reward(model, args, train_dataset=pairs(), processing_class=trainers.tokenizer())
    with pytest.raises(ValueError, match="pairwise_preference"):
        trainer.fit_laplace()


def test_the_mixin_is_a_bayesian_trainer() -> None:
    assert issubclass(SFT, BayesianTrainer)


def test_sft_with_lora_goes_on_and_comes_back(tmp_path: Path) -> None:
    """A resumed run is the uninterrupted one, and the folder is read by `from_pretrained`: one posterior."""
    trainers.llama().save_pretrained(tmp_path / "base")

    def made() -> Any:
        base = hf.LlamaForCausalLM.from_pretrained(tmp_path / "base")
        return sft(tmp_path / "out", adapted(base), save_strategy="steps", save_steps=1, max_steps=2)

    trainer, again = made(), made()
    trainer.train()
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))
    expected = dict(trainer.model.named_parameters())
    assert all(torch.equal(p, expected[name]) for name, p in again.model.named_parameters())
    trainer.save_model(str(tmp_path / "saved"))
    batch = next(iter(trainer.get_eval_dataloader()))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    found, kept = (predict(m, inputs, num_samples=3) for m in (trainer.model, from_pretrained(tmp_path / "saved")))
    assert torch.equal(found.log_probs, kept.log_probs)
    assert float(found.mutual_information.max()) > 0
