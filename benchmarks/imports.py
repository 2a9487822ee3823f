"""What importing costs, in processor seconds of fresh interpreters: python -m benchmarks.imports"""

import os
import statistics
import subprocess
import sys

from benchmarks.harness import arguments, interleaved, median_ratio, report

BASELINE = "torch, transformers"
IMPORTS = (BASELINE, "bayeformers", "torch, transformers, bayeformers")


def processor_seconds() -> float:
    """Of all interpreters that have ended."""
    times = os.times()
    return times.children_user + times.children_system


def main() -> None:
    args = arguments(__doc__, 7).parse_args()
    runs = {
        names: lambda names=names: subprocess.run([sys.executable, "-c", f"import {names}"], check=True)
        for names in IMPORTS
    }
    times = interleaved(runs, args.repeats, warmup=1, clock=processor_seconds)
    rows = [
        {"import": name, "CPU seconds": statistics.median(found), "ratio": median_ratio(found, times[BASELINE])}
        for name, found in times.items()
    ]
    report("Imports", rows, args.json)


if __name__ == "__main__":
    main()
