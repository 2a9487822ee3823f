"""Benchmark tasks as data: what their files look like, how they are loaded, and how they are scored."""

from .glue import GLUE_TASKS, GlueTask, TsvLayout, read_split, read_task, read_tsv
from .loading import load_glue, load_hub, load_tsv

__all__ = [
    "GLUE_TASKS",
    "GlueTask",
    "TsvLayout",
    "load_glue",
    "load_hub",
    "load_tsv",
    "read_split",
    "read_task",
    "read_tsv",
]
