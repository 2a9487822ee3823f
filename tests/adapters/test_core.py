"""The r x r core: its Laplace posterior against dense Jacobians in the core, and that nothing of it stays behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bayeformers.adapters import AdapterPosterior, AnswerTokens, fit_core, fit_tfb, lora_pairs, to_blob
from tests.adapters.lora import bert, gpt2, inputs, labels


def fitted(model: Any, **options: Any) -> AdapterPosterior:
    own = {"prior_precision": 3.0, "progress": False, "fisher": "exact", **options}
    return fit_core(model, [(inputs(), labels())], **own)


def core_jacobian(model: Any, pair: Any) -> Tensor:
    """Of the logits in C at the identity, (B, K, r^2), by autograd."""
    a = pair.down.weight.detach()

    def logits(core: Tensor) -> Tensor:
        own = {f"{pair.down_name}.weight": core @ a}
        return torch.func.functional_call(model, own, kwargs=inputs()).logits  # type: ignore[no-any-return]

    return torch.autograd.functional.jacobian(logits, torch.eye(len(a), dtype=a.dtype)).flatten(2)


@pytest.mark.parametrize("answers", [False, True])
def test_linearised_covariance_of_a_dense_core(answers: bool) -> None:
    """Sigma = sum over layers of J (sum_n J_n^T (diag(p) - p p^T) J_n + tau)^-1 J^T."""
    model: Any = AnswerTokens(gpt2(), [5, 9, 2]) if answers else bert()
    posterior = fitted(model)
    p = model(**inputs()).logits.softmax(-1).detach()
    hessian, expected = torch.diag_embed(p) - p[:, :, None] * p[:, None], torch.zeros(4, 3, 3, dtype=torch.float64)
    for pair in lora_pairs(model):
        jacobian = core_jacobian(model, pair)
        precision = torch.einsum("bkp,bkl,blq->pq", jacobian, hessian, jacobian)
        precision += 3.0 * torch.eye(len(precision), dtype=torch.float64)
        expected += jacobian @ torch.linalg.inv(precision) @ jacobian.mT
    found = posterior.predict(inputs())
    assert found.logit_covariance is not None
    torch.testing.assert_close(found.logit_covariance, expected, rtol=1e-7, atol=1e-12)
    assert posterior.scale_found == pytest.approx(3.0**-0.5)


@pytest.mark.parametrize("curvature", ["dense", "kfac", "diagonal"])
def test_draws_have_the_stated_moments(curvature: Any) -> None:
    """n = 400 draws of A; a mean's standard error is s / sqrt(n), a variance's v sqrt(2 / n): five of each."""
    model = bert()
    posterior, pair, n = fitted(model, curvature=curvature), lora_pairs(model)[2], 400
    a, drawn = pair.down.weight, []
    mean = a.detach().clone()
    for index in range(n):
        with posterior.draw(index, seed=4):
            drawn.append(a.detach() - mean)
    values, variance = torch.stack(drawn), posterior.variances()[a]
    assert bool((values.mean(0).abs() <= 5 * (variance / n).sqrt()).all())
    assert bool(((values.square().mean(0) - variance).abs() <= 5 * variance * (2 / n) ** 0.5).all())
    rows = torch.linalg.lstsq(mean.mT, values[0].mT).solution  # a draw is C A: it lies in the rows of A
    torch.testing.assert_close((mean.mT @ rows).mT, values[0], rtol=1e-8, atol=1e-10)


def test_kronecker_and_dense_core_agree_where_one_example_has_one_position() -> None:
    """KFAC is exact only there; here both have the same trace of precision up to that, so the variances are close."""
    dense, kfac = (fitted(bert(), curvature=kind).predict(inputs()).logit_covariance for kind in ("dense", "kfac"))
    assert dense is not None
    assert kfac is not None
    ratio = kfac.diagonal(dim1=-2, dim2=-1).sum() / dense.diagonal(dim1=-2, dim2=-1).sum()
    assert 0.5 < float(ratio) < 2


def test_the_model_stays_as_it_is(tmp_path: Path) -> None:
    model = bert()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    kinds = [(name, type(module), module.training) for name, module in model.named_modules()]
    posterior = fitted(model)
    with pytest.raises(ValueError, match="likelihood"):
        fitted(model, likelihood="nonsense")
    assert kinds == [(name, type(module), module.training) for name, module in model.named_modules()]
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    posterior.save(tmp_path)
    found = AdapterPosterior.load(tmp_path, bert())
    assert (found.method, found.default_method) == ("core", "glm")
    expected, again = posterior.predict(inputs()), found.predict(inputs())
    assert torch.equal(expected.mean_log_probs, again.mean_log_probs)
    draws = [each.predict(inputs(), method="sample", num_samples=2).log_probs for each in (posterior, found)]
    assert torch.equal(*draws)  # type: ignore[arg-type]


def test_damaged_files_are_told(tmp_path: Path) -> None:
    from bayeformers.storage import read, write

    fitted(bert()).save(tmp_path)
    path = tmp_path / "adapter_posterior.safetensors"
    tensors, meta = read(path, kind="adapter posterior")
    name = next(name for name in tensors if name.endswith("variance"))
    for wrong in ({name: -tensors[name]}, {name: tensors[name][..., :-1]}):
        write(path, {**tensors, **wrong}, meta, kind="adapter posterior")
        with pytest.raises(ValueError, match="damaged"):
            AdapterPosterior.load(tmp_path, bert())
    write(path, {key: value for key, value in tensors.items() if key != name}, meta, kind="adapter posterior")
    with pytest.raises(ValueError, match="variance"):
        AdapterPosterior.load(tmp_path, bert())


def test_what_is_refused() -> None:
    for options in ({"target_modules": ["lora_A"]}, {"exclude_modules": ["query"]}):
        with pytest.raises(ValueError, match="cannot be given"):
            fitted(bert(), **options)
    with pytest.raises(ValueError, match="Bayesian already"):
        fitted(to_blob(bert()))
    with pytest.raises(TypeError, match="no option"):
        fitted(bert(), sigma=1.0)
    with pytest.raises(ValueError, match="`blocks` is empty"):
        AdapterPosterior(bert(), [], method="none")


def test_dora_is_refused_whose_gradient_leaves_its_norm_out() -> None:
    model = bert(use_dora=True)
    pair, slopes = lora_pairs(model)[0], []
    weight = pair.down.get_parameter("weight")
    for step in (1e-4, -1e-4):  # along A itself
        with torch.no_grad():
            weight.mul_(1 + step)
            slopes.append(float(model(**inputs()).logits[0, 0]) / 2e-4)
            weight.div_(1 + step)
    (gradient,) = torch.autograd.grad(model(**inputs()).logits[0, 0], weight)
    assert (
        abs(float((gradient * weight.detach()).sum() / (slopes[0] - slopes[1])) - 1) > 0.05
    )  # PEFT's is no derivative
    with pytest.raises(ValueError, match="DoRA"):
        fit_core(model, [(inputs(), labels())], progress=False)


def test_the_searches_agree_on_what_a_posterior_is() -> None:
    """TFB's and the core's are one class, whose blocks add to nothing else of the model."""
    model = bert()
    names = {pair.down_name for pair in lora_pairs(model)}
    for posterior in (fitted(model), fit_tfb(model, inputs(), num_samples=2, bounds=(1e-3, 1e-2), progress=False)):
        assert {target.name for target in posterior.targets} == names
        assert len(list(posterior.random_parameters())) == len(names)
        assert posterior.is_of_present_weights()
