"""Agreement and semantic entropy, against counts by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from bayeformers import generate
from bayeformers.generation import exact_agreement, semantic_clusters, semantic_entropy
from tests.generation.models import bayesian_lora, prompt


def test_exact_agreement() -> None:
    assert exact_agreement([(1, 2), (1, 2), (1,), (3,)]) == 0.5
    assert exact_agreement(["a"]) == 1.0


def test_both_directions_are_asked() -> None:
    """ "Rome, Italy" entails "Rome", and not the other way round."""
    assert semantic_clusters(["Rome", "Rome, Italy", "Rome"], lambda a, b: b in a) == [0, 1, 0]


def test_semantic_entropy_of_frequencies_and_of_probabilities() -> None:
    shares = (0.5, 0.25, 0.25)
    assert semantic_entropy([0, 0, 1, 2]) == pytest.approx(-sum(p * math.log(p) for p in shares))
    log_probs = torch.tensor([0.1, 0.3, 0.2, 0.2]).log() - 7.0  # a constant cancels
    shares = (0.4 / 0.8, 0.2 / 0.8, 0.2 / 0.8)
    assert semantic_entropy([0, 0, 1, 2], log_probs) == pytest.approx(-sum(p * math.log(p) for p in shares), abs=1e-6)
    assert semantic_entropy([0, 0]) == 0.0


class Letters:
    """A tokenizer whose tokens are letters."""

    def batch_decode(self, rows: list[list[int]], skip_special_tokens: bool) -> list[str]:
        assert skip_special_tokens
        return ["".join(chr(97 + token) for token in row if token > 2) for row in rows]


@pytest.mark.parametrize("each", [1, 2])
def test_of_a_generation(each: int) -> None:
    model, inputs = bayesian_lora("llama"), prompt()
    options: dict[str, Any] = {"max_new_tokens": 2, "do_sample": each > 1, "num_return_sequences": each}
    torch.manual_seed(0)
    found = generate(
        model, inputs, num_samples=4, tokenizer=Letters(), equivalent=lambda a, b: a[:1] == b[:1], **options
    )
    assert found.sequences.shape[:2] == (4, 2 * each) and len(found.text) == 4
    for row in range(2):
        answers = [found.text[s][row * each + k] for s in range(4) for k in range(each)]
        tokens = [
            tuple(found.sequences[s, row * each + k, 5:][found.mask[s, row * each + k]].tolist())
            for s in range(4)
            for k in range(each)
        ]
        assert float(found.agreement[row]) == pytest.approx(exact_agreement(tokens))  # type: ignore[index]
        clusters = semantic_clusters(answers, lambda a, b: a[:1] == b[:1])
        assert found.clusters[row].tolist() == clusters  # type: ignore[index]
        assert float(found.semantic_entropy[row]) == pytest.approx(semantic_entropy(clusters))  # type: ignore[index]


def test_an_average_is_one_answer() -> None:
    found = generate(bayesian_lora("llama"), prompt(), num_samples=2, mixing="average", tokenizer=Letters(),
                     max_new_tokens=2)  # fmt: skip
    assert found.agreement is None and len(found.text) == 2
