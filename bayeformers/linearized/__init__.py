"""Jacobians of a network in its weights, layer by layer: what a layer saw, and the gradients at its output."""

from ..forward import Inputs, batch_size
from .recording import Use, examples, gradients, record, recording_view
from .rules import TENSOR, LayerRule, register_curvature, register_rule, rule_of, supported_layers
from .soundness import check_reads, examples_first, separation

__all__ = [
    "TENSOR",
    "Inputs",
    "LayerRule",
    "Use",
    "batch_size",
    "check_reads",
    "examples",
    "examples_first",
    "gradients",
    "record",
    "recording_view",
    "register_curvature",
    "register_rule",
    "rule_of",
    "separation",
    "supported_layers",
]
