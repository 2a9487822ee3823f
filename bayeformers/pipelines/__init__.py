"""transformers' pipelines over posteriors: averaged scores, their uncertainty, and refusal."""

from .factory import pipeline

__all__ = ["pipeline"]
