"""`--attention-backend`: the named implementation, or none."""

from __future__ import annotations

import pytest
from helpers.engine_loop import greedy, open_loop
from helpers.tiny_models import model_path, prompt

from trimaran.core.args import EngineArgs
from trimaran.core.errors import PlatformError
from trimaran.core.planning.model import read_model
from trimaran.core.planning.planner import plan
from trimaran.core.planning.targets import find_targets


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_the_named_one_is_used(backend: str) -> None:
    found = {}
    for asked in ("auto", backend):
        with open_loop("llama3", platform="cpu", attention_backend=asked, block_size=16) as loop:
            bound = loop.executor.description["op attention"]
            assert (bound == backend) == (asked == backend)
            found[asked] = loop.run([greedy("a", prompt(30), 8)])["a", 0].tokens
    assert found["auto"] == found[backend]


def test_one_that_the_platform_has_not_is_refused() -> None:
    with (
        pytest.raises(PlatformError, match="no attention 'flashinfer' here, but reference: change"),
        open_loop("llama3", platform="strict", attention_backend="flashinfer"),
    ):
        pass
    args = EngineArgs(model=str(model_path("llama3")), attention_backend="flashinfer")
    with pytest.raises(PlatformError, match="offers no attention 'flashinfer'"):
        plan(read_model(args), args, find_targets("strict", "0")[0])
