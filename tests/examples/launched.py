"""Started by `accelerate launch`, or by slurm.sh: two steps of a tiny training, and what the process says of itself."""

import json
import os
import sys
from pathlib import Path

import torch.distributed as dist

from tests.training import tiny


def main(folder: Path) -> None:
    trainer = tiny.trainer(folder / "run", tiny.bayesian(), max_steps=2)
    loss = trainer.train().training_loss
    nll = trainer.evaluate(tiny.dataset("single", 10))["eval_nll"]
    names = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR")
    found = {name: os.environ[name] for name in names if name in os.environ}
    found |= {"processes": dist.get_world_size(), "backend": dist.get_backend(), "loss": loss, "nll": nll}
    (folder / f"rank{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # torn down by the interpreter, gloo's threads abort a process now and then


if __name__ == "__main__":
    main(Path(sys.argv[1]))
