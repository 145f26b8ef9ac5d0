"""Loads an engine in a process of its own and says what it then holds: run with the arguments of
`EngineArgs` as JSON; prints the allocator's bytes by tag and the process's own growth."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import psutil

from trimaran.core.args import EngineArgs
from trimaran.core.executor import UniExecutor
from trimaran.core.plan import NewRow, RowSampling, StepPlan
from trimaran.core.resolve import resolve


def resident() -> int:
    return int(psutil.Process().memory_info().rss)


def high_water() -> int:
    """The most resident bytes since the mark was last cleared."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def prefill(executor: UniExecutor, num_tokens: int) -> str | None:
    """One prompt of `num_tokens`, in the blocks from 1 on; the step's error, if any."""
    blocks = list(range(1, 1 + -(-num_tokens // 32)))
    new = NewRow(
        row=0,
        token_ids=[3 + i % 50 for i in range(num_tokens)],
        num_prompt=num_tokens,
        block_ids=[blocks],
        sampling=RowSampling(temperature=0.0),
    )
    plan = StepPlan(0, added=[new], rows=[0], starts=[0], counts=[num_tokens], emits=[True])
    return executor.submit(plan).result().error


def main() -> None:
    values = json.loads(sys.argv[1])
    steps = values.pop("prefill", 0)
    args = EngineArgs(**values)
    config = resolve(args)
    # A small one first: what libraries take once, whatever is loaded, is no part of the plan.
    small = {**values, "hf_overrides": {**values.get("hf_overrides", {}), **TINY}}
    UniExecutor(resolve(EngineArgs(**small))).close()
    before = resident()
    executor = UniExecutor(config)
    loaded = resident()
    found = {"by_tag": dict(executor.device.memory().by_tag), "grown": loaded - before}
    if steps:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        start = resident()
        found["error"] = prefill(executor, steps)
        found["peak"] = high_water() - start
    found["description"] = dict(executor.description)
    executor.close()
    print(json.dumps(found))


TINY = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 1,
    "vocab_size": 512,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 128,
}

if __name__ == "__main__":
    main()
