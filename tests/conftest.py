"""One torch thread for every test: the machines that run them share their cores."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Small products are slower, and timings noisier, on more threads."""
    torch.set_num_threads(1)
