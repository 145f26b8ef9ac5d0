"""transformers' `generate` beside us, in this process and on this device: A B A B."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import shapes
import torch
import transformers_worker as worker
import workloads

from . import engine
from .part import Bench, Found, Piece

ROUNDS = 5
GENERATIONS: dict[str, dict[str, Any]] = {
    "transformers": {},
    "transformers, static cache": {"cache_implementation": "static"},
}
"""A static cache makes `generate` compile its step on cards: its best, if it works there."""


def peer(bench: Bench) -> Iterator[Piece]:
    """Equal prompts and lengths for all of a batch: nothing is padded for the peer."""
    prompt, output = (8, 4) if bench.tiny else (128, 128)
    room = {} if bench.tiny else {"kv_cache_memory_bytes": "8G"}
    llm = engine.opened(bench, max_model_len=str(4 * (prompt + output)), max_num_seqs=32, **room)
    for count in (1,) if bench.tiny else (1, 32):
        for name, options in GENERATIONS.items():
            sizes = (count, prompt, output)
            yield f"{count} at once, {name}", partial(_rounds, bench, llm, options, sizes)


def _rounds(
    bench: Bench, llm: Callable[[], Any], options: dict[str, Any], sizes: tuple[int, int, int]
) -> Found:
    theirs = _transformers(bench, llm())
    count, prompt, output = sizes
    vocab = shapes.SHAPES[bench.shape]["vocab_size"]
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    for seed in range(-1, 1 if bench.tiny else ROUNDS):  # one to warm up
        works = [workloads.batch_one(vocab, seed * count + i, prompt, 1) for i in range(count)]
        prompts = [work.prompts[0] for work in works]
        ours = engine.run(llm(), prompts, [output] * count)
        other = theirs(prompts, [output] * count, False, **options)
        if seed >= 0:
            seconds["ours"].append(ours["seconds"])
            seconds["theirs"].append(other["seconds"])
    ratios = [b / a for a, b in zip(seconds["ours"], seconds["theirs"], strict=True)]
    return {
        "speed_of_ours_over": statistics.median(ratios),
        "range": [min(ratios), max(ratios)],
        "ours_tok_s": count * output / statistics.median(seconds["ours"]),
        "theirs_tok_s": count * output / statistics.median(seconds["theirs"]),
        "flags": {"dtype": "bfloat16", "attn_implementation": "sdpa", **options},
    }


def _transformers(bench: Bench, llm: Any) -> Callable[..., Found]:
    """The peer's `run`; its model is loaded once, onto the engine's own device."""
    if "model" not in worker.STATE:
        device = "cuda" if bench.on_card else "cpu"
        path = str(engine.checkpoint(bench))
        worker.load(path, torch.get_num_threads(), 0, 0, {"device": device})
    return worker.run
