"""Folders of models: what is written beside the weights, and how it is read back and accounted for."""

from .load import from_pretrained

__all__ = ["from_pretrained"]
