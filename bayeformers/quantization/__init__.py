"""INT8 inference of any posterior: means, scales and draws in INT8, predictions as ever."""

from .posterior import QuantizedPosterior
from .quantize import quantize
from .report import LayerReport, Report
from .storage import load

__all__ = ["LayerReport", "QuantizedPosterior", "Report", "load", "quantize"]
