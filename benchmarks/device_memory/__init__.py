"""Memory of a Bayesian model on each of W devices, by closed formulas: python -m benchmarks.device_memory

Prints what a 7B and a 70B decoder need with a LoRA posterior, and with Laplace's posterior of the last layer; other
decoders by `--config config.json`. `--measure` holds the formulas against the tensors of a tiny decoder on two
processes instead. docs/guides/devices.md explains the table.
"""
