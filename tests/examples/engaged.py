"""Runs a module with accelerate's FSDP engaged on CPUs over gloo, as it is on GPUs."""

import runpy
import sys
from typing import Any

import accelerate.state
from accelerate.utils import DistributedType

_INIT = accelerate.state.PartialState.__init__


def _as_on_gpus(self: Any, *args: Any, **kwargs: Any) -> None:
    _INIT(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU


if __name__ == "__main__":
    accelerate.state.PartialState.__init__ = _as_on_gpus
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
