"""Optimizers whose steps are draws from a posterior, or that learn one."""

from .sghmc import SGHMC

__all__ = ["SGHMC"]
