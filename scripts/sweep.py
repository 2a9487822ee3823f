"""Every model class of transformers' Auto tables that builds tiny from its configuration, converted and tried.

    python scripts/sweep.py                          # all of them, each in a process of its own
    python scripts/sweep.py --only bert --steps draw,reload
    python scripts/sweep.py --sample 60 --seed 1

Steps: convert, mean (bit for bit), draw (= the plain model at the drawn weights), gradients, reload, resume (and best
model), undo, laplace (heads of classes, at batch size 1 and all at once). A line for each entry that fails, with step
and reason; then those that the conversion refuses, and those that do not build tiny; last line ``N of M pass``.
"""

from __future__ import annotations

import argparse
import gc
import logging
import multiprocessing as mp
import multiprocessing.connection as connection
import os
import random
import re
import sys
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import torch  # noqa: E402
from sweeping.overrides import NOT_BUILT  # noqa: E402
from sweeping.steps import STEPS, Entry, Refused  # noqa: E402
from transformers.models.auto import modeling_auto  # noqa: E402

import bayeformers  # noqa: E402, F401 - imported once, before the processes fork

BASE_TABLE = "MODEL_MAPPING_NAMES"
"""Models without a head, which nearly all lie inside those of the other tables; ``--base`` adds them."""


@dataclass
class Result:
    """What became of one entry."""

    name: str
    status: str = "lost"  # pass, fail, refused, not built, lost
    step: str = "start"
    reason: str = ""
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0


def entries(base: bool = False) -> dict[str, tuple[str, str]]:
    """``"type/Class"`` -> (model type, class name), over all tables; a class that two tables name stands once."""
    found: dict[str, tuple[str, str]] = {}
    for table in sorted(n for n in dir(modeling_auto) if n.startswith("MODEL") and n.endswith("MAPPING_NAMES")):
        if table != BASE_TABLE or base:
            for model_type, classes in getattr(modeling_auto, table).items():
                for name in classes if isinstance(classes, (tuple, list)) else (classes,):
                    found[f"{model_type}/{name}"] = (model_type, name)
    return dict(sorted(found.items()))


def not_built(name: str) -> str | None:
    """Why this entry is known not to build tiny here."""
    return next((reason for pattern, reason in NOT_BUILT.items() if re.fullmatch(pattern, name)), None)


def run_entry(model_type: str, class_name: str, steps: list[str], answers: Any) -> None:
    """In a process of its own: sends the step that begins, and at last what became of the entry."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # load reports and progress bars of many processes
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    torch.set_num_threads(1)
    entry, step = Entry(model_type, class_name), "build"
    try:
        answers.send((step,))
        entry.build()
        for step in steps:
            answers.send((step,))
            STEPS[step](entry)
        answers.send(("pass", step, "", entry.notes))
    except Refused as refusal:
        answers.send(("refused", step, str(refusal), entry.notes))
    except BaseException as error:
        kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
        status = "not built" if step == "build" else "fail"
        answers.send((status, step, kind + (str(error).strip() or "no message"), entry.notes))
    answers.close()
    os._exit(0)


@dataclass
class Running:
    """An entry whose process has been started."""

    process: Any
    answers: Any
    result: Result
    begun: float

    def poll(self, timeout: float) -> bool:
        """Take in what the process has sent; whether it is done, one way or another."""
        try:
            while self.answers.poll():
                message = self.answers.recv()
                if len(message) == 1:
                    self.result.step = message[0]
                else:
                    self.result.status, self.result.step, self.result.reason, self.result.notes = message
        except EOFError:
            self.process.join(5)
        self.result.seconds = time.monotonic() - self.begun
        if self.result.status == "lost" and self.result.seconds > timeout:
            self.process.kill()
            self.result.status, self.result.reason = "fail", f"takes more than {timeout:.0f} s"
        elif self.result.status == "lost" and not self.process.is_alive() and not self.answers.poll():
            self.result.status, self.result.reason = "fail", f"the process ended with code {self.process.exitcode}"
        return self.result.status != "lost"


def sweep(
    chosen: dict[str, tuple[str, str]],
    steps: list[str],
    jobs: int,
    timeout: float,
    enough: int | None = None,
    verbose: bool = False,
) -> list[Result]:
    """One process per entry, ``jobs`` at a time; prints failures as they come. ``enough``: entries that build."""
    context, waiting, running, results = mp.get_context("fork"), list(chosen.items()), [], []
    while True:
        built = len(running) + sum(result.status != "not built" for result in results)
        room = min(jobs - len(running), len(waiting), len(waiting) if enough is None else enough - built)
        for name, entry in [waiting.pop(0) for _ in range(room)]:
            running.append(start(context, name, *entry, steps))
        if not running:
            return results
        connection.wait([item.answers for item in running], timeout=0.5)
        for item in [item for item in running if item.poll(timeout)]:
            running.remove(item)
            item.process.join()
            results.append(item.result)
            report(item.result, verbose)


def start(context: Any, name: str, model_type: str, class_name: str, steps: list[str]) -> Running:
    """Fork a process for an entry."""
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=run_entry, args=(model_type, class_name, steps, theirs))
    process.start()
    theirs.close()
    return Running(process, ours, Result(name), time.monotonic())


def report(result: Result, verbose: bool = False) -> None:
    """One line for a failure, or for every entry."""
    reason = " ".join(result.reason.split())[:400]
    if result.status == "fail":
        print(f"FAIL      {result.name}  {result.step}: {reason}  [{result.seconds:.0f} s]", flush=True)
    elif verbose:
        print(f"{result.status.upper():<9} {result.name}  [{result.seconds:.0f} s]", flush=True)


def choose(arguments: argparse.Namespace) -> dict[str, tuple[str, str]]:
    """The entries that the options name, without those that are known not to build."""
    chosen = {
        name: value
        for name, value in entries(arguments.base).items()
        if re.search(arguments.only, name) and not not_built(name)
    }
    names = list(chosen)
    if arguments.slice:
        number, of = (int(part) for part in arguments.slice.split("/"))
        names = names[number - 1 :: of]
    if arguments.sample:
        random.Random(arguments.seed).shuffle(names)
    return {name: chosen[name] for name in names}


def main() -> int:
    """Exit status 0 if all pass."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="PATTERN", help="regular expression for type/Class")
    parser.add_argument("--slice", metavar="I/N", help="every N-th entry, from the I-th")
    parser.add_argument("--sample", type=int, metavar="K", help="K entries that build, chosen by --seed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", default=",".join(STEPS), help="comma-separated; a step may need those before it")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds for each entry")
    parser.add_argument("--base", action="store_true", help="models without a head too")
    parser.add_argument("--verbose", action="store_true", help="a line for every entry as it ends")
    parser.add_argument("--notes", action="store_true", help="print what was noted of entries that pass")
    arguments = parser.parse_args()
    steps = arguments.steps.split(",")
    if unknown := set(steps) - STEPS.keys():
        parser.error(f"--steps: {', '.join(sorted(unknown))} not known; choose from {', '.join(STEPS)}")
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    gc.collect()
    gc.freeze()  # each process would walk, and so copy, all that the imports made
    begun = time.monotonic()
    results = sweep(choose(arguments), steps, arguments.jobs, arguments.timeout, arguments.sample, arguments.verbose)
    for result in sorted(results, key=lambda r: r.name):
        if result.status in ("refused", "not built"):
            print(f"{result.status.upper():<9} {result.name}  {' '.join(result.reason.split())[:300]}")
        if arguments.notes and result.notes:
            print(f"NOTE      {result.name}  {'; '.join(result.notes)}")
    counted = [result for result in results if result.status != "not built"]
    passed = [result for result in counted if result.status in ("pass", "refused")]
    print(f"{time.monotonic() - begun:.0f} s; {len(results) - len(counted)} do not build")
    print(f"{len(passed)} of {len(counted)} pass")
    return 0 if len(passed) == len(counted) else 1


if __name__ == "__main__":
    sys.exit(main())
