"""Every portable Triton kernel against its op's reference: on a card where there is one, otherwise
in Triton's interpreter (tests/conftest.py asks for it), where bfloat16 is rounded towards zero."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.runtime import interpreter  # noqa: E402

from trimaran.kernels_cuda.portable import tuning  # noqa: E402


def _let_one_number_be_an_index() -> None:
    """Triton 3.6's interpreter asks int() of an array with one dimension, which numpy refuses since
    2.4: `range` of a kernel's argument would fail."""
    patch = interpreter._patch_lang_tensor

    def patch_more(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_more


if triton.__version__.startswith("3.6."):
    _let_one_number_be_an_index()

TABLES = Path(tuning.__file__).parents[1] / "tuning"


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def table() -> tuning.Table:
    """The table of any GPU. (Each entry of each table is compiled by another row of CI.)"""
    return tuning.load(TABLES / "generic.toml").constants_only()


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
