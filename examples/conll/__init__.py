"""The parts of ``python -m examples.token_classification``: CoNLL files, entities, a generated set, scores."""
