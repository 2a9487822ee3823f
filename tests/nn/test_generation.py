"""`generate` in `train()` is one network; a model left in `train()` says so once."""

from __future__ import annotations

import copy
import inspect
import logging
import pickle

import peft
import pytest
import torch
from torch import Tensor, nn

from bayeformers import fixed_draw, to_bayesian, to_deterministic
from bayeformers.nn import noise, training_draw
from bayeformers.nn.draws import OneDraw
from tests.cases import case

NAMES = ["gpt2-lm", "t5", "bart-lm", "whisper"]


def converted(name: str, **options: object) -> tuple[nn.Module, dict[str, Tensor]]:
    this = case(name)
    given = this.inputs()
    return to_bayesian(this.build(), delta=0.5, **options), {k: v for k, v in given.items() if "decoder" not in k}  # type: ignore[arg-type]


def generate(model: nn.Module, inputs: dict[str, Tensor], **options: object) -> Tensor:
    found: Tensor = model.generate(
        **inputs, max_new_tokens=6, min_new_tokens=6, pad_token_id=0, use_cache=True, output_scores=True,
        return_dict_in_generate=True, **options,
    )  # type: ignore[operator]  # fmt: skip
    return found


@pytest.mark.parametrize("estimator", ["reparameterization", "local_reparameterization", "flipout"])
@pytest.mark.parametrize("name", ["gpt2-lm", "t5"])
def test_one_draw_in_train(name: str, estimator: str, caplog: pytest.LogCaptureFixture) -> None:
    """Scores with the cache are those of the whole sequence under the same draw, which the seed decides."""
    model, inputs = converted(name, estimator=estimator)
    model.train()
    outputs = []
    for _ in range(2):
        torch.manual_seed(4)
        with caplog.at_level(logging.WARNING):
            cached = generate(model, inputs, do_sample=False)
        torch.manual_seed(4)
        whole = generate(model, inputs, do_sample=False, **{"num_beams": 1})
        outputs.append(cached)
        assert torch.equal(cached.sequences, whole.sequences)
    torch.manual_seed(4)
    with torch.no_grad():
        plain = model.generate(
            **inputs, max_new_tokens=6, min_new_tokens=6, pad_token_id=0, use_cache=False, output_scores=True,
            return_dict_in_generate=True, do_sample=False,
        )  # type: ignore[operator]  # fmt: skip
    for a, b in zip(outputs[0].scores, plain.scores, strict=True):
        kept = b.isfinite()
        torch.testing.assert_close(a[kept], b[kept], atol=1e-4, rtol=1e-4)
    said = [record.getMessage() for record in caplog.records if "generates in train()" in record.getMessage()]
    assert len(said) == 1 and "eval()" in said[0] and "fixed_draw" in said[0]
    torch.manual_seed(5)
    other = generate(model, inputs, do_sample=False)
    assert not torch.equal(torch.cat(outputs[0].scores[:1]), torch.cat(other.scores[:1]))


@pytest.mark.parametrize("name", NAMES)
def test_as_ever_in_eval_and_in_a_draw(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """No seed is taken and nothing said; a draw that the caller holds is the one."""
    model, inputs = converted(name)
    plain = case(name).build()
    state = torch.get_rng_state()
    with caplog.at_level(logging.WARNING, logger="bayeformers"):
        assert torch.equal(generate(model.eval(), inputs).sequences, generate(plain, inputs).sequences)
        with fixed_draw(model, 0):
            held = generate(model, inputs)
            again = generate(model.train(), inputs)
    assert torch.equal(held.scores[0], again.scores[0])
    assert torch.equal(state, torch.get_rng_state())
    assert not [record for record in caplog.records if record.name.startswith("bayeformers")]


def test_it_is_a_method_like_the_models_own() -> None:
    """Copies, pickles, signatures, PEFT; `to_deterministic` leaves no trace."""
    model, inputs = converted("gpt2-lm")
    plain = case("gpt2-lm").build()
    assert inspect.signature(model.generate) == inspect.signature(plain.generate)  # type: ignore[arg-type]
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(vars(other)["generate"], OneDraw) and vars(other)["generate"]._module is other
        torch.manual_seed(1)
        expected = generate(model.train(), inputs)
        torch.manual_seed(1)
        assert torch.equal(generate(other.train(), inputs).scores[-1], expected.scores[-1])
    assert set(vars(to_deterministic(model))) == set(vars(plain))


def test_adapters() -> None:
    model = peft.get_peft_model(case("gpt2-lm").build(), peft.LoraConfig(r=2, init_lora_weights=False))
    to_bayesian(model, delta=0.9, target_modules=["lora_A.default", "lora_B.default"]).train()
    inputs = case("gpt2-lm").inputs()
    torch.manual_seed(2)
    first = generate(model, inputs, do_sample=False)
    torch.manual_seed(2)
    with torch.no_grad():
        second = model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, pad_token_id=0, use_cache=False,
            output_scores=True, return_dict_in_generate=True, do_sample=False)  # fmt: skip
    torch.testing.assert_close(first.scores[-1][:, 1:], second.scores[-1][:, 1:], atol=1e-4, rtol=1e-4)


def test_a_forward_in_train_without_gradients_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    """As of a pipeline after `trainer.train()`; not of a training step, `eval()`, or a draw."""
    torch.manual_seed(0)
    model, x = to_bayesian(nn.Sequential(nn.Linear(4, 3)), delta=0.1), torch.randn(2, 4)
    model.train()(x)
    with torch.no_grad(), caplog.at_level(logging.WARNING, logger="bayeformers"):
        with fixed_draw(model, 0):
            model(x)
        with training_draw(model):
            model(x)
        model.eval()(x)
        assert not caplog.records
        model.train()
        model(x), model(x)
    with torch.inference_mode():
        model(x)
    (record,) = caplog.records
    assert all(word in record.getMessage() for word in ("Sequential", "train()", "eval()", "fixed_draw"))


def test_a_held_draw_is_made_once_for_all_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tensor's noise once per `with`; a step of the optimizer inside makes the weights anew."""
    model, inputs = converted("gpt2-lm")
    model.eval()
    made: list[str] = []
    for name in ("_make_noise", "blocks"):
        own = getattr(noise.Draw, name)
        monkeypatch.setattr(
            noise.Draw, name, lambda self, spec, like, own=own: made.append(spec.name) or own(self, spec, like)
        )
    with fixed_draw(model, 0):
        first = generate(model, inputs, do_sample=False)
        generate(model, inputs, do_sample=False)
        assert made and len(made) == len(set(made))
        model.train()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        rhos = [p for n, p in model.named_parameters() if n.endswith("_rho") and p.grad is not None]
        assert rhos and any(bool(p.grad.abs().sum() > 0) for p in rhos if p.grad is not None)
        model.eval()
        torch.optim.SGD(model.parameters(), lr=50.0).step()
        again = generate(model, inputs, do_sample=False)
        assert not torch.equal(first.scores[0], again.scores[0])
    with fixed_draw(model, 0):
        fresh = generate(model, inputs, do_sample=False)
    assert all(torch.equal(a, b) for a, b in zip(again.scores, fresh.scores, strict=True))
