"""Optimizers that end in a posterior."""

from .ivon import IVON

__all__ = ["IVON"]
