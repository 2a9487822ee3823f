"""Benchmark tasks as data: what their files look like and how they are scored."""

from bayeformers.tasks.glue import GLUE_TASKS, GlueTask, TsvLayout, read_split, read_task, read_tsv

__all__ = ["GLUE_TASKS", "GlueTask", "TsvLayout", "read_split", "read_task", "read_tsv"]
