"""The parts of ``python -m examples.bert_squad``: arguments, articles, data, windows, spans, scores, outputs."""
