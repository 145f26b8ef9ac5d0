"""Runs a tiny model on the cpu platform in a process of its own, so that the environment chooses
the native library and the instruction set: with the model's folder, a file of prompts and the file
to write; each precision with one thread and with two. What it found: see `Found`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor

from trimaran.core.args import EngineArgs
from trimaran.core.engine.inproc import InprocClient
from trimaran.core.engine.messages import AddRequests, EngineRequest, StepMessage
from trimaran.core.sampling_params import SamplingParams
from trimaran.core.types import PositionLogprobs, Prompt
from trimaran.kernels_cpu.library import ISAS, library

PRECISIONS: dict[str, str | None] = {"bf16": None, "int8": "int8"}
"""Name → quantization; activations and the rest are bf16."""
THREADS = (1, 2)
KERNELS = ("linear_dense", "linear_int8", "attention", "kv_write", "rms_norm", "add_rms_norm")
KERNELS += ("qk_norm_rope", "silu_mul", "take_rows", "sample")
NUM_TOKENS = 12


class Found(TypedDict):
    """Of one precision and number of threads; the tables: log-probabilities `[positions, vocab]`
    of each sequence, after every token but the last."""

    precision: str
    threads: int
    tokens: list[list[int]]
    tables: list[Tensor]
    counts: dict[str, dict[str, int]]  # instruction set → kernel → calls
    tile_uses: int


def table(positions: list[PositionLogprobs]) -> Tensor:
    """The top tokens are all that there are; the first entry is the chosen one."""
    rows = []
    for position in positions:
        row = torch.empty(len(position.token_ids) - 1, dtype=torch.float32)
        row[torch.tensor(position.token_ids[1:])] = torch.tensor(position.logprobs[1:])
        rows.append(row)
    return torch.stack(rows)


def generate(args: EngineArgs, prompts: list[list[int]]) -> tuple[list[list[int]], list[Tensor]]:
    """Greedy tokens and tables of all prompts at once."""
    params = SamplingParams(
        temperature=0.0,
        max_tokens=NUM_TOKENS,
        ignore_eos=True,
        logprobs=-1,
        prompt_logprobs=-1,
    )
    requests = [
        EngineRequest(str(i), Prompt.of_tokens(ids), params, [2]) for i, ids in enumerate(prompts)
    ]
    tokens: list[list[int]] = [[] for _ in prompts]
    positions: list[list[PositionLogprobs]] = [[] for _ in prompts]
    client = InprocClient.from_args(args)
    try:
        client.send(AddRequests(requests))
        while (message := client.poll(0.0)) is not None or client.engine.has_work:
            for output in message.outputs if isinstance(message, StepMessage) else []:
                which = int(output.request_id)
                tokens[which] += output.token_ids
                given = [*(output.prompt_logprobs or []), *(output.logprobs or [])]
                positions[which] += [one for one in given if one is not None]
    finally:
        client.close()
    return tokens, [table(one) for one in positions]


def counts() -> dict[str, dict[str, int]]:
    native = library()
    return {isa: {kernel: native.count(kernel, isa) for kernel in KERNELS} for isa in ISAS[1:]}


def grown(before: dict[str, dict[str, int]]) -> dict[str, dict[str, int]]:
    return {
        isa: {kernel: number - before[isa][kernel] for kernel, number in kernels.items()}
        for isa, kernels in counts().items()
    }


def main() -> None:
    model, asked, target = sys.argv[1:]
    prompts = json.loads(Path(asked).read_text())
    tile_uses = library().entry_points.trimaran_tile_uses
    common: dict[str, Any] = {
        "model": model,
        "platform": "cpu",
        "dtype": "bfloat16",
        "max_model_len": "1024",
        "max_num_seqs": len(prompts),
        "max_logprobs": -1,
        "kv_cache_memory_bytes": "16M",
    }
    found: list[Found] = []
    for precision, quantization in PRECISIONS.items():
        for threads in THREADS:
            before, uses = counts(), tile_uses()
            args = EngineArgs(**common, quantization=quantization, num_threads=threads)
            tokens, tables = generate(args, prompts)
            assert torch.get_num_threads() == threads
            made = Found(
                precision=precision,
                threads=threads,
                tokens=tokens,
                tables=tables,
                counts=grown(before),
                tile_uses=tile_uses() - uses,
            )
            found.append(made)
    torch.save(found, target)


if __name__ == "__main__":
    main()
