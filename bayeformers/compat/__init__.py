"""Names and call patterns of older packages, over this one: one sub-package each, for code that is being moved.

`bayesian_torch` (Intel Labs' bayesian-torch), `bayetorch` (BayeTorch) and `bayeformers` (the older BayeFormers). Every
name gives one `DeprecationWarning` per place of use, which says what to write instead. Nothing else of this package
imports from here.
"""
