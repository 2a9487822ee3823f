"""What every test runs under: no network, one thread, a fixed seed."""

import os

# read when the libraries are imported, so they are set before that
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of `known_failures.txt` fail since several changes met: they run, and leave the list as they are mended."""
    listed = set((Path(__file__).parent / "known_failures.txt").read_text(encoding="utf-8").splitlines())
    for item in items:
        if item.nodeid in listed:
            item.add_marker(pytest.mark.xfail(reason="known failure, to be mended", strict=False))
