"""Jacobians of a network in its weights, layer by layer: what a layer saw, and the gradients at its output."""

from ..forward import Inputs, batch_size
from .reads import check_reads
from .recording import TensorUse, Use, examples, gradients, record, recording_view
from .rules import TENSOR, LayerRule, register_curvature, rule_of, supported_layers
from .separation import examples_first, separation

__all__ = [
    "TENSOR",
    "Inputs",
    "LayerRule",
    "TensorUse",
    "Use",
    "batch_size",
    "check_reads",
    "examples",
    "examples_first",
    "gradients",
    "record",
    "recording_view",
    "register_curvature",
    "rule_of",
    "separation",
    "supported_layers",
]
