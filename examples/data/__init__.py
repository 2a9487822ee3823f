"""Data that the examples make themselves, one file a data set, so that each of them runs without a download."""
