"""llama.cpp as a peer, through its batch interface: one context, many sequences.

llama-cpp-python's own `Llama` class serves one request at a time, so the loop stands here, as in
llama.cpp's `batched-bench` and `parallel` programs: prompts go in first, up to `n_batch` tokens a
call, then all sequences decode together; a prefix that all prompts share is computed once and its
cells are shared by the other sequences. Flash attention and weight repacking are on by default.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from typing import Any

import llama_cpp as cpp
import numpy as np
from protocol import Clock, serve

STATE: dict[str, Any] = {}
MODEL_OPTIONS = ("use_extra_bufts", "use_mmap")
N_BATCH = 2048
MAX_SEQUENCES = 64


def load(
    model: str, threads: int, kv_tokens: int, max_len: int, options: dict[str, Any]
) -> dict[str, Any]:
    """`options`: fields of llama_model_params or llama_context_params."""
    flags = {
        "n_ctx": kv_tokens,
        "n_batch": N_BATCH,
        "n_seq_max": MAX_SEQUENCES,
        "kv_unified": True,
        "n_threads": threads,
        "n_threads_batch": threads,
        **options,
    }
    model_params = cpp.llama_model_default_params()
    context_params = cpp.llama_context_default_params()
    for name, value in flags.items():
        setattr(model_params if name in MODEL_OPTIONS else context_params, name, value)
    start = time.perf_counter()
    cpp.llama_backend_init()
    loaded = cpp.llama_model_load_from_file(model.encode(), model_params)
    context = loaded and cpp.llama_init_from_model(loaded, context_params)
    if not context:
        raise SystemExit(f"llama.cpp did not load {model}.")
    vocabulary = cpp.llama_vocab_n_tokens(cpp.llama_model_get_vocab(loaded))
    STATE.update(
        context=context,
        memory=cpp.llama_get_memory(context),
        batch=cpp.llama_batch_init(N_BATCH, 0, 1),
        vocabulary=vocabulary,
        kept=[],
    )
    built = cpp.llama_print_system_info().decode().strip()
    return {"seconds": time.perf_counter() - start, "flags": flags | {"built": built}}


def _decode(rows: Iterable[tuple[int, int, int, bool]]) -> dict[int, np.ndarray]:
    """Compute (token, position, sequence, wants logits) rows; the logits by sequence."""
    batch, wanted = STATE["batch"], {}
    count = 0
    for i, (token, position, sequence, logits) in enumerate(rows):
        batch.token[i], batch.pos[i] = token, position
        batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        batch.logits[i] = logits
        count = i + 1
        if logits:
            wanted[sequence] = i
    batch.n_tokens = count
    status = cpp.llama_decode(STATE["context"], batch)
    if status:
        raise SystemExit(f"llama_decode answered {status} for {count} tokens.")
    shape = (STATE["vocabulary"],)
    return {
        sequence: np.ctypeslib.as_array(cpp.llama_get_logits_ith(STATE["context"], row), shape)
        for sequence, row in wanted.items()
    }


def _shared(prompts: list[list[int]]) -> int:
    """Tokens that all prompts begin with, the last token of each left out."""
    return len(os.path.commonprefix([prompt[:-1] for prompt in prompts])) if prompts[1:] else 0


def _prefill(prompts: list[list[int]], start: int) -> Iterable[dict[int, np.ndarray]]:
    """Compute the prompts from position `start` on; the logits of each one's last token."""
    shared = max(start, _shared(prompts))
    rows = [(prompts[0][p], p, 0, False) for p in range(start, shared)]
    for at in range(0, len(rows), N_BATCH):
        _decode(rows[at : at + N_BATCH])
    for sequence in range(1, len(prompts)):
        if shared:
            cpp.llama_memory_seq_cp(STATE["memory"], 0, sequence, 0, shared)
    rows = [
        (token, position, sequence, position == len(prompt) - 1)
        for sequence, prompt in enumerate(prompts)
        for position, token in enumerate(prompt)
        if position >= shared
    ]
    for at in range(0, len(rows), N_BATCH):
        yield _decode(rows[at : at + N_BATCH])


def _reuse(prompts: list[list[int]], keep_prefix: bool) -> int:
    """Forget what is cached, but for what the first prompt begins with, if that may be kept."""
    kept = 0
    if keep_prefix:
        kept = len(os.path.commonprefix([STATE["kept"], prompts[0][:-1]]))
    for sequence in range(MAX_SEQUENCES):
        cpp.llama_memory_seq_rm(STATE["memory"], sequence, kept if sequence == 0 else 0, -1)
    STATE["kept"] = prompts[0]
    return kept


def run(prompts: list[list[int]], outputs: list[int], keep_prefix: bool) -> dict[str, Any]:
    clock = Clock(len(prompts))
    kept = _reuse(prompts, keep_prefix)
    cached = kept + (len(prompts) - 1) * max(kept, _shared(prompts))
    tokens: dict[int, int] = {}
    for logits in _prefill(prompts, kept):
        for sequence, row in logits.items():
            tokens[sequence] = int(row.argmax())
            clock.tokens(sequence)
    positions = [len(prompt) for prompt in prompts]
    while rows := [
        (token, positions[sequence], sequence, True)
        for sequence, token in tokens.items()
        if clock.counts[sequence] < outputs[sequence]
    ]:
        for sequence, row in _decode(rows).items():
            tokens[sequence] = int(row.argmax())
            positions[sequence] += 1
            clock.tokens(sequence)
    return clock.measurement(cached)


def score(prompts: list[list[int]]) -> list[dict[str, Any]]:
    answers = []
    for prompt in prompts:
        _reuse([prompt], False)
        _decode((token, position, 0, True) for position, token in enumerate(prompt))
        logits = cpp.llama_get_logits(STATE["context"])
        shape = (len(prompt), STATE["vocabulary"])
        rows = np.ctypeslib.as_array(logits, shape).astype(np.float64)
        logprobs = rows - np.log(np.exp(rows).sum(axis=1, keepdims=True))
        token = int(logprobs[-1].argmax())
        given = logprobs[np.arange(len(prompt) - 1), prompt[1:]].tolist()
        answers.append(
            {"token": token, "logprob": float(logprobs[-1, token]), "prompt_logprobs": given}
        )
    return answers


if __name__ == "__main__":
    serve({"load": load, "run": run, "score": score})
