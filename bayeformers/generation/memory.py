"""What generation needs in memory, and what there is."""

from __future__ import annotations

import os
from typing import Any

import torch


def bytes_of_row(generator: Any, length: int, *, whole: bool) -> int:
    """Return about what one row takes: its ids, and while it is generated its cache and logits.

    Args:
        generator: the model.
        length: number of tokens.
        whole: whether the row is being generated; False: what is kept of it.
    """
    kept = 8 * 4 * length  # ids, mask, log-probabilities and entropies
    if not whole:
        return kept
    config = generator.config.get_text_config()
    width = (getattr(config, "num_hidden_layers", None) or 1) * (getattr(config, "hidden_size", None) or 1)
    vocabulary = getattr(config, "vocab_size", None) or 1
    return kept + (2 * width * length + 4 * vocabulary) * torch.finfo(generator.dtype).bits // 8


def bytes_of_memory(device: torch.device) -> int:
    """Memory of a device, in bytes."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return int(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return 2**34
