"""The parts of ``python -m examples.bert_glue``: arguments, data, the embedded task, training, evaluation, outputs."""
