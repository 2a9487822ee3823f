"""Texts by the networks of a posterior, with uncertainties per token and per text."""

from .agreement import exact_agreement, semantic_clusters, semantic_entropy
from .generate import generate
from .result import SEQUENCE_SCORES, Generation
from .scoring import SequenceScores, TokenScores, score_sequences

__all__ = [
    "SEQUENCE_SCORES",
    "Generation",
    "SequenceScores",
    "TokenScores",
    "exact_agreement",
    "generate",
    "score_sequences",
    "semantic_clusters",
    "semantic_entropy",
]
