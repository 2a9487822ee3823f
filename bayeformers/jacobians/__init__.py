"""Jacobians of a network in its weights, layer by layer: what a layer saw, and the gradients at its output."""

from .recording import Inputs, TensorUse, Use, are_batched, batch_size, differentiable, examples, gradients, record
from .rules import TENSOR, LayerRule, register_curvature, rule_of, supported_layers

__all__ = [
    "TENSOR",
    "Inputs",
    "LayerRule",
    "TensorUse",
    "Use",
    "are_batched",
    "batch_size",
    "differentiable",
    "examples",
    "gradients",
    "record",
    "register_curvature",
    "rule_of",
    "supported_layers",
]
