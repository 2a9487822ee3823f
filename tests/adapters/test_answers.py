"""A language model as a classifier over answer tokens, and Laplace on it against dense Jacobians."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import bayeformers
from bayeformers import laplace
from bayeformers.adapters import AnswerTokens, fit_tfb, lora_pairs
from bayeformers.posteriors import PointPosterior
from tests.adapters.lora import bert, gpt2, inputs, labels, llama

TOKENS = [7, 3, 21]


def last_positions(mask: Tensor) -> Tensor:
    return torch.tensor([int(row.nonzero().max()) for row in mask])


@pytest.mark.parametrize("left", [False, True])
def test_logits_are_the_vocabularys_at_the_last_token(left: bool) -> None:
    model, batch = llama(), inputs(left=left)
    whole = model(**batch).logits
    expected = whole[torch.arange(4), last_positions(batch["attention_mask"])][:, TOKENS]
    found = AnswerTokens(model, TOKENS)(**batch, labels=labels())
    torch.testing.assert_close(found.logits, expected, rtol=1e-5, atol=1e-6)  # its norms are float32
    torch.testing.assert_close(found.loss, -expected.log_softmax(-1)[torch.arange(4), labels()].mean())
    unmasked = {"input_ids": batch["input_ids"]}
    expected = model(**unmasked).logits[:, -1, TOKENS]
    torch.testing.assert_close(AnswerTokens(model, TOKENS)(**unmasked).logits, expected, rtol=1e-5, atol=1e-6)


def test_padding_on_either_side_says_the_same() -> None:
    """As far as the model's own positions do: rotary positions are relative."""
    model = AnswerTokens(llama(), TOKENS)
    right, left = inputs(), inputs(left=True)
    for row in range(4):
        own = [batch["input_ids"][row][batch["attention_mask"][row] == 1] for batch in (right, left)]
        assert torch.equal(*own) or len(own[0]) == len(own[1])
        alone = model(input_ids=own[0][None]).logits[0]
        torch.testing.assert_close(model(**right).logits[row], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("left", [False, True])
def test_absolute_positions_are_counted_from_the_first_token(left: bool) -> None:
    model, batch = gpt2(), inputs(left=left)
    found = AnswerTokens(model, TOKENS)(**batch).logits
    for row, mask in enumerate(batch["attention_mask"].bool()):
        alone = model(input_ids=batch["input_ids"][row][mask][None]).logits[0, -1, TOKENS]
        torch.testing.assert_close(found[row], alone)


def test_virtual_tokens_in_front_are_not_counted() -> None:
    peft = pytest.importorskip("peft")
    prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model, batch = peft.get_peft_model(llama().unload(), prompt).double().eval(), inputs()
    found = AnswerTokens(model, TOKENS)(**batch).logits
    for row, mask in enumerate(batch["attention_mask"].bool()):
        alone = model(input_ids=batch["input_ids"][row][mask][None]).logits[0, -1, TOKENS]
        torch.testing.assert_close(found[row], alone, rtol=1e-5, atol=1e-6)  # its norms are float32


@pytest.mark.parametrize("curvature", ["kfac", "dense"])
@pytest.mark.parametrize("left", [False, True])
def test_linearised_laplace_is_that_of_dense_jacobians(curvature: Any, left: bool) -> None:
    """Sigma = J (K + tau)^-1 J^T, block by block, with J by autograd and K made of J alone for "dense".

    One layer is covered, so that the dense block's GGN is sum_n J_n^T (diag(p) - p p^T) J_n.
    """
    model = AnswerTokens(gpt2(), TOKENS)
    batch = inputs(left=left)
    name = f"{lora_pairs(model)[1].down_name}"
    posterior = laplace.fit(
        model, [(batch, labels())], curvature=curvature, fisher="exact", prior_precision=2.0, progress=False,
        target_modules=[name],
    )  # fmt: skip
    weight = model.get_parameter(f"{name}.weight")

    def logits(value: Tensor) -> Tensor:
        own = {f"{name}.weight": value}
        return torch.func.functional_call(model, own, kwargs=batch).logits  # type: ignore[no-any-return]

    jacobian = torch.autograd.functional.jacobian(logits, weight.detach()).flatten(2)  # (B, K, r d_in)
    precision = 2.0 * torch.eye(weight.numel(), dtype=torch.float64)
    if curvature == "dense":
        p = model(**batch).logits.softmax(-1).detach()
        hessian = torch.diag_embed(p) - p[:, :, None] * p[:, None]
        precision += torch.einsum("bkp,bkl,blq->pq", jacobian, hessian, jacobian)
    else:
        eigen = posterior.layers[name]
        assert eigen.left is not None
        assert eigen.right is not None
        basis = torch.kron(eigen.left[0], eigen.right[0])
        precision += basis @ torch.diag(eigen.eigenvalues.flatten()) @ basis.mT
    expected = jacobian @ torch.linalg.inv(precision) @ jacobian.mT
    found = posterior.predict(batch, method="glm")
    assert found.logit_covariance is not None
    torch.testing.assert_close(found.logit_covariance, expected, rtol=1e-7, atol=1e-12)
    torch.testing.assert_close(found.logit_mean, model(**batch).logits.detach())


def test_laplace_lora_covers_both_matrices_and_reloads(tmp_path: Any) -> None:
    """All trained layers, which are the adapter's: A and B of query and value of two blocks."""
    model = AnswerTokens(llama(), TOKENS)
    posterior = laplace.fit(model, [(inputs(), labels())], prior_precision=5.0, progress=False)
    assert len(posterior.layers) == 8
    assert all("lora_" in name for name in posterior.layers)
    posterior.save(tmp_path)
    found = laplace.LaplacePosterior.load(tmp_path, AnswerTokens(llama(), TOKENS))
    expected = posterior.predict(inputs())
    assert torch.equal(found.predict(inputs()).mean_log_probs, expected.mean_log_probs)
    assert bool((expected.mutual_information > 0).all())


def test_every_posterior_takes_it() -> None:
    model = AnswerTokens(llama(), TOKENS)
    point = PointPosterior(model).predict({**inputs(), "labels": labels()})
    assert point.mean_log_probs.shape == (4, 3)
    posterior = fit_tfb(model, inputs(), bounds=(1e-3, 1e3), num_samples=2, progress=False)
    assert posterior.predict(inputs(), num_samples=2).log_probs.shape == (2, 4, 3)  # type: ignore[union-attr]
    bayeformers.to_bayesian(model, target_modules=["lora_A.default"], freeze=False)
    assert bayeformers.predict(model, inputs(), num_samples=2).mutual_information.shape == (4,)


@pytest.mark.parametrize(
    ("token_ids", "error", "told"),
    [
        ([3], ValueError, "at least 2"),
        ([3, 3], ValueError, "different"),
        ([3, 40], ValueError, r"0 ... 39"),
        ([3, -1], ValueError, r"0 ... 39"),
        ([3, None], TypeError, "whole numbers"),
        (["A", "B"], TypeError, "whole numbers"),
        ("AB", TypeError, "sequence"),
        (3, TypeError, "sequence"),
    ],
)
def test_bad_tokens(token_ids: Any, error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=told):
        AnswerTokens(llama(), token_ids)


def test_models_without_a_vocabulary() -> None:
    for model in (bert(), torch.nn.Linear(2, 2)):
        with pytest.raises(ValueError, match="no head over a vocabulary"):
            AnswerTokens(model, TOKENS)
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        AnswerTokens("llama", TOKENS)  # type: ignore[arg-type]


def test_a_trainer_trains_and_evaluates_it(tmp_path: Any) -> None:
    """As a head of 3 classes: the ELBO's N, the metrics of averaged probabilities, and `fit_laplace`."""
    row = inputs(left=True)
    rows = [{"input_ids": row["input_ids"][i], "attention_mask": row["attention_mask"][i], "labels": int(labels()[i])}
            for i in range(4)]  # fmt: skip
    args = bayeformers.BayesianTrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True, num_eval_samples=3,
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    model = AnswerTokens(gpt2().float(), TOKENS)
    bayeformers.to_bayesian(model, prior=bayeformers.RelativePrior(), scale="multiplicative")
    assert all("lora_" in name for name, module in model.named_modules() if hasattr(module, "specs"))
    trainer = bayeformers.BayesianTrainer(model=model, args=args, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    found = trainer.evaluate()
    assert {"eval_nll", "eval_ece", "eval_mutual_information"} <= found.keys()
    assert trainer.predict(rows).predictions.shape == (4, 3)
    plain = bayeformers.BayesianTrainer(
        model=AnswerTokens(gpt2().float(), TOKENS), args=args, train_dataset=rows, eval_dataset=rows
    )
    plain.fit_laplace(prior_precision=1.0)
    assert plain.evaluate()["eval_mutual_information"] > 0
