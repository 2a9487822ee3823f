"""All tasks of texts and one label, by name: GLUE's, and those with files of their own."""

from __future__ import annotations

from .clinc import CLINC
from .glue import GLUE_TASKS, GlueTask
from .trec import TREC

TEXT_TASKS: dict[str, GlueTask] = {**GLUE_TASKS, TREC.name: TREC, CLINC.name: CLINC}
"""A task is a row; a command that takes one takes all."""
