"""Models that are sharded among processes: FSDP2, and what is gathered to be saved."""

from .fsdp import is_sharded, separate_scales, shard
from .gathering import gathered

__all__ = ["gathered", "is_sharded", "separate_scales", "shard"]
