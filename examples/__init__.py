"""Runnable examples: ``python -m examples.bert_glue``. They use public names of `bayeformers` only."""
