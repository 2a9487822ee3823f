"""The parts of ``python -m examples.regression``: data with a known truth, a network, its posteriors."""
