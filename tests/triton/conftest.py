"""Every portable Triton kernel against its op's reference: on a card where there is one, otherwise
in Triton's interpreter (tests/conftest.py asks for it)."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")

from helpers import interpreter  # noqa: E402

from trimaran.core.runner import recorded  # noqa: E402
from trimaran.kernels_cuda.portable import tuning  # noqa: E402
from trimaran.platforms.gpu_kernels import GENERIC, table_for  # noqa: E402

if triton.knobs.runtime.interpret:
    interpreter.mend()


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def table() -> tuning.Table:
    """The table of any GPU. (Each entry of each table is compiled by another row of CI.)"""
    return table_for(GENERIC).constants_only()


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def recorded_as_they_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """None at start: the interpreter takes seconds a step."""
    monkeypatch.setattr(recorded, "PREPARED", 0)
