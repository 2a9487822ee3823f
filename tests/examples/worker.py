"""Run by `torchrun`: several runs of one example, one after the other in the same processes, which start but once."""

import gc
import importlib
import json
import sys


def main(example: str, runs: str) -> None:
    """The arguments of each run are a list in the list ``runs``, as JSON."""
    module = importlib.import_module(f"examples.{example}")
    for arguments in json.loads(runs):
        module.main(arguments)


if __name__ == "__main__":
    gc.freeze()  # as the parent does: accelerate collects garbage at every training
    main(*sys.argv[1:])
