"""Call patterns of Intel Labs' bayesian-torch, under its module paths: `models.dnn_to_bnn`, `layers`, `utils`.

Read `docs/migration/bayesian_torch.md` for what gives other numbers here, and why.
"""
