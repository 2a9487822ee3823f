"""Posteriors that know nothing of adapters work on them: dropout inside LoRA, an ensemble of adapter folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bayeformers.adapters import AnswerTokens, lora_pairs
from bayeformers.posteriors import DropoutPosterior, EnsemblePosterior
from tests.adapters.lora import bert, gpt2, inputs

TOKENS = [4, 11, 30]


def quiet(model: Any, rate: float) -> Any:
    """The base without dropout, so that only what LoRA has is left."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = rate if "lora_dropout" in name else 0.0
    return model


def test_dropout_inside_lora_drops_inputs_of_a_and_nothing_else() -> None:
    """A draw is the network whose A has some columns 0 and the others over 1 - p, as its mask says."""
    model, rate = quiet(bert(lora_dropout=0.4), 0.4), 0.4
    posterior = DropoutPosterior(model)
    seen: dict[str, torch.Tensor] = {}
    hooks = []
    for pair in lora_pairs(model):

        def see(_: Any, args: Any, name: str = pair.down_name) -> None:
            seen[name] = args[0].detach()

        hooks.append(pair.down.register_forward_pre_hook(see))
    with torch.no_grad(), posterior.draw(1, seed=3):
        drawn = model(**inputs()).logits
    masked = dict(seen)
    for hook in hooks:
        hook.remove()
    with torch.no_grad():
        for pair in lora_pairs(model):
            kept = (masked[pair.down_name] != 0).flatten(0, -2).any(0)
            pair.down.weight.mul_(kept.to(pair.down.weight) / (1 - rate))
        torch.testing.assert_close(drawn, model(**inputs()).logits)


def test_dropout_says_that_draws_differ_and_reloads(tmp_path: Path) -> None:
    model = bert(lora_dropout=0.3)
    posterior = DropoutPosterior(model)
    predictive = posterior.predict(inputs(), num_samples=6)
    assert bool((predictive.mutual_information > 0).all())
    posterior.save(tmp_path)
    again = DropoutPosterior.load(tmp_path, bert(lora_dropout=0.3))
    assert torch.equal(again.predict(inputs(), num_samples=6).log_probs, predictive.log_probs)


def test_without_dropout_there_is_none_to_leave_on() -> None:
    with pytest.raises(ValueError, match="dropout"):
        DropoutPosterior(quiet(gpt2(), 0.0))


@pytest.mark.parametrize("make", [bert, gpt2])
def test_an_ensemble_of_adapter_folders(make: Any, tmp_path: Path) -> None:
    """Three adapters of one base, saved by PEFT: their answers are those of the three models."""
    models = [make() for _ in range(3)]
    for number, model in enumerate(models):
        with torch.no_grad():
            for pair in lora_pairs(model):
                pair.up.weight.add_(number)
        model.save_pretrained(tmp_path / str(number))
    posterior = EnsemblePosterior(make(), [tmp_path / str(number) for number in range(3)])
    predictive = posterior.predict(inputs())
    expected = torch.stack([model(**inputs()).logits.log_softmax(-1).detach() for model in models])
    assert predictive.log_probs is not None
    torch.testing.assert_close(predictive.log_probs, expected)
    assert not torch.equal(expected[0], expected[1])


def test_an_ensemble_that_answers_by_tokens() -> None:
    models = [gpt2() for _ in range(2)]
    with torch.no_grad():
        lora_pairs(models[1])[0].up.weight.add_(1)
    members = [AnswerTokens(model, TOKENS) for model in models]
    found = EnsemblePosterior(AnswerTokens(gpt2(), TOKENS), members).predict(inputs()).log_probs
    expected = torch.stack([member(**inputs()).logits.log_softmax(-1).detach() for member in members])
    assert found is not None
    torch.testing.assert_close(found, expected)
