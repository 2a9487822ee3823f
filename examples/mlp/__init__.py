"""The parts of ``python -m examples.mlp_mnist``: arguments, the four trainings, removing weights, pictures."""
