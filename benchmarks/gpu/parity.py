"""Greedy tokens of tiny random models, each against `transformers` in fp32 on the host."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from helpers.engine_loop import greedy, open_loop
from helpers.generate_reference import describe, greedy_cases

from .part import Bench, Found, Piece

FAMILIES = ("qwen3", "llama3", "mistral")


def parity(bench: Bench) -> Iterator[Piece]:
    for family in FAMILIES[:1] if bench.tiny else FAMILIES:
        yield family, partial(_family, bench, family, 8 if bench.tiny else 16)


def _family(bench: Bench, family: str, count: int) -> Found:
    cases = greedy_cases(family, count, 24)
    options = {"max_model_len": "128", "max_num_seqs": 8, "kv_cache_memory_bytes": "64M"}
    with open_loop(family, platform=bench.platform, dtype="float32", **options) as loop:
        found = loop.run([greedy(str(i), case.prompt, 24) for i, case in enumerate(cases)])
    wrong = [i for i, case in enumerate(cases) if found[str(i), 0].tokens != case.tokens]
    if wrong:
        raise RuntimeError(f"prompts {wrong} of {len(cases)} yield other tokens than transformers")
    return {"token_exact": len(cases), "cases": describe(cases)}
