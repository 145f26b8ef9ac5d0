"""Fixtures of the op tests."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator

import pytest
import torch

# The GPU hulls' kernels run on the host, too, where Triton is.
if importlib.util.find_spec("triton") and os.environ.get("TRITON_INTERPRET") == "1":
    from helpers import interpreter

    interpreter.mend()


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Thousands of tiny tensors: a pool of threads would spend the time waiting for itself."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets torch's number of threads, for this test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def seed() -> None:
    torch.manual_seed(0)
