"""The parts of ``python -m examples.hyperparameter_search``: arguments, space, study, trials, confirmation, outputs."""
