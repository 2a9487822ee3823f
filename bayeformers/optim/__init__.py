"""Optimizers whose steps are draws from a posterior, or that learn one."""

from .ivon import IVON
from .sghmc import SGHMC

__all__ = ["IVON", "SGHMC"]
