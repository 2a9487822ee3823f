"""Runs published snippets with the import path of the package changed and nothing else."""

from __future__ import annotations

import textwrap
from typing import Any


def run(snippet: str, old: str, new: str, namespace: dict[str, Any]) -> dict[str, Any]:
    """Execute ``snippet`` in ``namespace``; in its import lines the package ``old`` is ``new``."""
    lines = textwrap.dedent(snippet).splitlines()
    moved = [line.replace(old, new, 1) if line.startswith((f"from {old}", f"import {old}")) else line for line in lines]
    exec(compile("\n".join(moved), "<snippet>", "exec"), namespace)
    return namespace
