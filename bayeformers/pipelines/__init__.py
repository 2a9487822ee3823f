"""transformers' pipelines over posteriors: averaged scores, their uncertainty, and refusal."""

from . import notice as notice  # wraps transformers' own
from .factory import pipeline

__all__ = ["pipeline"]
