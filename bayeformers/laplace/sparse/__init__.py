"""Posteriors of lower memory: the low rank of an information-form posterior and its diagonal."""
