"""Posteriors of LoRA adapters, a method per file: BLoB, TFB."""

from .answers import AnswerTokens
from .blob import BlobReweighting, blob_kl_weights, to_blob
from .core import fit_core
from .layers import LoraPair, lora_pairs
from .posterior import AdapterPosterior, LowRankBlock
from .scalabl import to_scalabl
from .tfb import fit_tfb, tfb_posterior

__all__ = [
    "AdapterPosterior",
    "AnswerTokens",
    "BlobReweighting",
    "LoraPair",
    "LowRankBlock",
    "blob_kl_weights",
    "fit_core",
    "fit_tfb",
    "lora_pairs",
    "tfb_posterior",
    "to_blob",
    "to_scalabl",
]
