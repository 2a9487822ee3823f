"""Whether several answers to a question say the same: exact matches, clusters of one meaning, and their entropy."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

Equivalent = Callable[[str, str], bool]
"""Whether the second text follows from the first; two texts mean the same if each follows from the other."""


def exact_agreement(answers: Sequence[Hashable]) -> float:
    """Return the share of the most frequent answer, between 1 / S and 1.

    >>> exact_agreement(["Rome", "Rome", "Paris", "Rome"])
    0.75
    """
    return max(Counter(answers).values()) / len(answers)


def semantic_clusters(texts: Sequence[str], equivalent: Equivalent) -> list[int]:
    """Return each text's cluster, numbered from 0: a text joins the first whose first text it is equivalent to.

    Equivalent in both directions, as in Kuhn et al. 2023 (arXiv 2302.09664, algorithm 1).

    >>> semantic_clusters(["Rome", "rome", "Paris"], lambda a, b: a.lower() == b.lower())
    [0, 0, 1]
    """
    firsts: list[str] = []
    found = []
    for text in texts:
        place = next((n for n, other in enumerate(firsts) if _same(text, other, equivalent)), len(firsts))
        if place == len(firsts):
            firsts.append(text)
        found.append(place)
    return found


def _same(a: str, b: str, equivalent: Equivalent) -> bool:
    return a == b or (bool(equivalent(a, b)) and bool(equivalent(b, a)))


def semantic_entropy(clusters: Sequence[int], log_probs: Tensor | None = None) -> float:
    """Return the entropy over clusters of one meaning, -sum_c p(c) log p(c), in nats: between 0 and log S.

    Without log-probabilities p(c) is the share of the answers in c (Farquhar et al. 2024, Nature 630, "discrete");
    with them it is proportional to the sum of the answers' probabilities (Kuhn et al. 2023, eq. 8).

    Args:
        clusters: number of each answer's cluster, (S,).
        log_probs: of the answers, (S,), of the whole or per token.

    Raises:
        ValueError: there is not one log-probability for each answer.

    >>> round(semantic_entropy([0, 0, 1, 1]), 4)
    0.6931
    """
    places = torch.as_tensor(clusters)
    if log_probs is not None and log_probs.shape != places.shape:
        raise ValueError(f"`log_probs` must have the shape {tuple(places.shape)}, got {tuple(log_probs.shape)}.")
    weights = torch.zeros(len(places), dtype=torch.float64) if log_probs is None else log_probs.double().cpu()
    weights = weights.log_softmax(0)
    masses = [float(weights[places == cluster].logsumexp(0)) for cluster in set(clusters)]
    return -sum(math.exp(mass) * mass for mass in masses if math.isfinite(mass))
