"""Cost of the Bayesian model relative to the deterministic one, each benchmark `python -m benchmarks.<name>`."""
