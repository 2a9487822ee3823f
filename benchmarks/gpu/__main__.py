"""Starts the worker, ends it where it takes too long, starts it again for what is left, and writes the results."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import benchmarks.gpu as package

POLL = 0.1
START = 150.0  # seconds that imports and the first answer of the device may take


def main(argv: Sequence[str] | None = None) -> int:
    """Run the checks; returns 1 if one failed, 2 if there is no such device."""
    args = _parser().parse_args(argv)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    run = Run(args)
    try:
        run.everything()
    except DeviceError as error:
        print(f"python -m benchmarks.gpu: error: {error}", file=sys.stderr)
        return 2
    print(run.table())
    print(json.dumps(run.results()))
    counts = [result["status"] for result in run.found.values()]
    print(", ".join(f"{counts.count(status)} {status}" for status in ("passed", "skipped", "failed")))
    return int("failed" in counts)


class DeviceError(RuntimeError):
    """The worker could not begin."""


class Run:
    """All checks of one call; ``found`` has each one's result, by name."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.found, self.machine = args, dict[str, dict[str, Any]](), dict[str, Any]()
        self.wanted: list[str] = args.only.split(",") if args.only else []  # all, until the worker has said which
        self.limits, self.lines = dict[str, float](), args.output_dir / "lines.jsonl"
        self.end = time.monotonic() + args.seconds

    def everything(self) -> None:
        """Every check once, in as many processes as it takes."""
        left = self.wanted
        while left or not self.limits:
            if time.monotonic() < self.end - 1:
                self._work(left)
            else:
                self.found |= {name: {"status": "skipped", "reason": "no time was left"} for name in left}
            self._write()
            left = [name for name in self.wanted if name not in self.found]

    def _work(self, names: list[str]) -> None:
        """One process, until it has ended or has to be ended; the check that it was at has then failed."""
        self.lines.unlink(missing_ok=True)
        before = len(self.found)
        log = self.args.output_dir / "log.txt"
        with log.open("a", encoding="utf-8") as stream:
            process = subprocess.Popen(self._command(names), stdout=stream, stderr=stream)
            running, since, reason = "", time.monotonic(), ""
            while process.poll() is None and not reason:
                time.sleep(POLL)
                if (at := self._read()) != running:
                    running, since = at, time.monotonic()
                reason = self._overdue(running, since)
            if reason:
                process.kill()
            code = process.wait()
        if running := self._read():
            self.found[running] = {"status": "failed", "reason": reason or f"its process ended with status {code}"}
        elif not self.limits or (code and not reason and len(self.found) == before):
            last = log.read_text(encoding="utf-8").strip().splitlines()[-1:] or ["no answer"]
            raise DeviceError(f"device {self.args.device!r}: {reason or last[0]}")

    def _command(self, names: list[str]) -> list[str]:
        command = [sys.executable, "-m", "benchmarks.gpu.worker", "--device", self.args.device]
        return [*command, "--file", str(self.lines), *(["--tiny"] if self.args.tiny else []), *names]

    def _overdue(self, name: str, since: float) -> str:
        now, limit = time.monotonic(), self.limits.get(name, START)
        if now > self.end:
            return f"no time was left of {self.args.seconds:.0f} s"
        return f"it took longer than {limit:g} s" if now - since > limit else ""

    def _read(self) -> str:
        """Take up the results that are there; the name of the check that is running, or an empty one."""
        running = ""
        for text in self.lines.read_text(encoding="utf-8").splitlines() if self.lines.exists() else ():
            try:
                line = json.loads(text)
            except json.JSONDecodeError:  # half written
                break
            if "checks" in line:
                self.limits, self.machine = line["checks"], line["machine"]
                self.wanted = self.wanted or list(self.limits)
                continue
            name = line.pop("name")
            running = name if line["status"] == "running" else ""
            if not running:
                self.found[name] = line
        return running

    def results(self) -> dict[str, Any]:
        return {**self.machine, "checks": {name: self.found[name] for name in self.wanted if name in self.found}}

    def table(self) -> str:
        """In Markdown."""
        where = ", ".join(str(value) for name, value in self.machine.items() if name != "tiny")
        rows = [f"{where}\n", "| check | | seconds | |", "| --- | --- | --- | --- |"]
        for name, result in self.results()["checks"].items():
            numbers = "; ".join(f"{key} {value:.3g}" for key, value in result.get("numbers", {}).items())
            said = numbers or result.get("reason", "").strip().splitlines()[-1]
            rows.append(f"| {name} | {result['status']} | {result.get('seconds', '')} | {said} |")
        return "\n".join(rows)

    def _write(self) -> None:
        (self.args.output_dir / "results.json").write_text(
            json.dumps(self.results(), indent=1) + "\n", encoding="utf-8"
        )
        (self.args.output_dir / "results.md").write_text(self.table() + "\n", encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=package.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="a torch device")
    parser.add_argument("--tiny", action="store_true", help="tiny models: whether every check runs, not what it costs")
    parser.add_argument("--seconds", type=float, default=470.0, help="limit of all checks together")
    parser.add_argument("--only", help="names of checks, separated by commas")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/gpu"), help="where the results go")
    return parser


if __name__ == "__main__":
    sys.exit(main())
