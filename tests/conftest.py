"""What every test runs under: no network, one thread, a fixed seed."""

import gc
import os

# read when the libraries are imported, so they are set before that
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """Set aside what the imports made: accelerate collects garbage at every training, and would walk all of it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
