"""Model cards of the hub that say what a posterior is, what was measured, and how it is loaded."""

from .card import merge_card, model_card
from .results import evaluation_intervals
from .section import CardDetails

__all__ = ["CardDetails", "evaluation_intervals", "merge_card", "model_card"]
