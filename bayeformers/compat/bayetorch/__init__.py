"""Call patterns of BayeTorch, under its module paths: `layers`, `models`, `metrics`, `convert`.

Read `docs/migration/bayetorch.md` for what gives other numbers here, and why.
"""
