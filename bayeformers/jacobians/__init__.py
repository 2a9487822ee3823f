"""Jacobians of a network in its weights, layer by layer: what a layer saw, and the gradients at its output."""

from .recording import Inputs, Use, are_batched, batch_size, examples, gradients, record
from .rules import LayerRule, register_curvature, rule_of, supported_layers

__all__ = [
    "Inputs",
    "LayerRule",
    "Use",
    "are_batched",
    "batch_size",
    "examples",
    "gradients",
    "record",
    "register_curvature",
    "rule_of",
    "supported_layers",
]
