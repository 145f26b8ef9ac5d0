"""L3: the real engine on random tiny models, token by token against `transformers`.

Every check runs prompts through scheduler, block manager, runner and sampler on the platform under
test, by one of the roads that they can take. Where the platform has no fp32, tokens are judged by
their log-probabilities instead.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import torch

from ..core.types import PositionLogprobs
from .base import Check, Failed, Subject
from .engines import (
    MAX_LEN,
    Found,
    block_size_of,
    dtype_of,
    limits_of,
    most_tokens,
    open_session,
    request,
    scaled,
    scaled_all,
)
from .models import MODELS, WINDOW, Case, cases, describe, oracle
from .scenarios import Ran, Scenario, judge

NUM_TOKENS = 12
LENGTHS = (2, 9, 16, 24, 31, 49, 61, 77)
"""Prompt lengths: around block and chunk borders, and beyond the sliding window; longer where
blocks cannot be small."""

LOGPROB_TOLERANCE = {"float32": 2e-3, "bfloat16": 0.5, "float16": 0.06}
"""|found - expected| of a log-probability; expected is fp32's. The weights of these models are
large: what rounding does is as well."""

Figures = Mapping[str, float] | None


def checks(subject: Subject) -> list[Check]:
    return [
        _check("models", subject, every_model, "each family, whole prompts in one batch"),
        _check("whole_prefill", subject, whole_prefill, "without chunked prefill"),
        _check("chunked_prefill", subject, chunked_prefill, "over odd budgets, mixed with decode"),
        _check("preemption", subject, preemption, "a cache too small: set back and resumed"),
        _check("prefix_cache", subject, prefix_cache, "from cached blocks, and longer than they"),
        _check("batches", subject, batches, "1, 3 and 8 at once, in any order"),
        _check("run_ahead", subject, run_ahead_or_not, "a step in flight or none"),
        _check("forks", subject, forks, "n > 1: shared blocks, copied when written"),
        _check("sampling", subject, seeded_sampling, "seeded: the same in any company"),
        _check("logprobs", subject, logprobs, "of generated tokens and of prompts"),
        _check("block_sizes", subject, block_sizes, "those that the platform allows"),
        _check("sliding_window", subject, sliding_window, "sequences longer than the window"),
        _check("step_limits", subject, step_limits, "steps as the platform wants them"),
        *(
            Check(f"rounded/{name}", partial(rounded, subject, name), about="near fp32")
            for name in subject.platform().capabilities(subject.device).dtypes
            if name != "float32"
        ),
    ]


def _check(name: str, subject: Subject, run: Callable[[Subject], Figures], about: str) -> Check:
    return Check(name, partial(run, subject), about=about)


def _models(subject: Subject, *quick: str) -> Iterable[str]:
    return quick if subject.quick else MODELS


def _cases(subject: Subject, model: str, count: int = NUM_TOKENS) -> tuple[Case, ...]:
    lengths = scaled_all(subject, LENGTHS)
    return tuple(cases(model, lengths, count, subject.seed_of("L3", model)))


def _few(subject: Subject, model: str) -> tuple[Case, ...]:
    """Half of them in a quick run."""
    return _cases(subject, model)[:: 2 if subject.quick else 1]


# ---------------------------------------------------------------------------------------------
# Roads through the engine
# ---------------------------------------------------------------------------------------------


def every_model(subject: Subject) -> Figures:
    compared: list[Case] = []
    for model in MODELS:
        found = _cases(subject, model)
        judge(subject, Scenario(model, found, {"enable_prefix_caching": False}))
        compared += found
    return describe(compared)


def whole_prefill(subject: Subject) -> Figures:
    longest = most_tokens(subject, scaled(subject, MAX_LEN))
    settings = {
        "enable_chunked_prefill": False,
        "enable_prefix_caching": False,
        "max_model_len": str(longest),
        "max_num_batched_tokens": longest,
        "max_num_seqs": min(8, longest),
        "block_size": block_size_of(subject),
    }
    for model in _models(subject, "llama"):
        fitting = [c for c in _cases(subject, model) if len(c.prompt) + NUM_TOKENS <= longest]
        ran = judge(subject, Scenario(model, tuple(fitting), settings))
        _expect(_num_chunked(ran) == 0, "a prompt was computed in several steps")
    return None


def chunked_prefill(subject: Subject) -> Figures:
    for model in _models(subject, "qwen3", "mistral"):
        for budget in (11,) if subject.quick else (7, 11, 23):
            settings = {
                "max_num_batched_tokens": budget,
                "max_num_seqs": min(7, most_tokens(subject, budget)),
                "enable_prefix_caching": False,
                "block_size": block_size_of(subject),
            }
            found = _cases(subject, model)
            ran = judge(subject, Scenario(model, found, settings, shuffled=subject.seed))
            _expect(_num_chunked(ran) > 0, "no prompt was computed in chunks")
    return None


def preemption(subject: Subject) -> Figures:
    """Sequences that end just before a block border all want another block at once."""
    block = block_size_of(subject)
    lengths = tuple(most for n in (1, 1, 2, 1, 2, 1) for most in [n * block - 3])
    num_preemptions = 0
    for model in ("llama",) if subject.quick else ("llama", "qwen3"):
        found = cases(model, lengths, 10, subject.seed_of("preemption", model))
        settings = {
            "block_size": block,
            "max_model_len": str(2 * block + 10),
            "num_gpu_blocks_override": 6,
            "max_num_seqs": 6,
        }
        for caching in (True,) if subject.quick else (True, False):
            scenario = Scenario(model, tuple(found), settings | {"enable_prefix_caching": caching})
            ran = judge(subject, scenario)
            _expect(ran.num_preemptions > 0, "no sequence was preempted")
            num_preemptions += ran.num_preemptions
    return {"preemptions": num_preemptions}


def prefix_cache(subject: Subject) -> Figures:
    """Everything twice, then prompts longer than what is cached. The last token of a prompt is
    always computed, so that a whole hit leaves one block of it."""
    block, num_cached = block_size_of(subject), 0
    for model in _models(subject, "llama", "mistral"):
        found = _few(subject, model)
        settings = {"block_size": block, "max_num_batched_tokens": 64}
        scenario = Scenario(model, found, settings, rounds=2, shuffled=subject.seed)
        ran = judge(subject, scenario)
        num_cached += sum(one.num_cached for one in ran.last)
        for case, one in zip(found, ran.last, strict=True):
            _expect(
                one.num_cached >= block or len(case.prompt) <= block,
                f"nothing of a prompt of {len(case.prompt)} tokens was found the second time",
            )
        longest = max(found, key=lambda case: len(case.prompt))
        cut = block * ((len(longest.prompt) - 1) // block)
        if cut:
            head = oracle(model).case(longest.prompt[: cut + 1], NUM_TOKENS)
            _longer(subject, model, settings, head, longest, cut)
    _expect(num_cached > 0, "no prompt was longer than a block")
    return {"cached tokens": num_cached}


def _longer(
    subject: Subject,
    model: str,
    settings: Mapping[str, object],
    head: Case,
    longer: Case,
    cut: int,
) -> None:
    """A prompt that begins as another that was served before: its first `cut` tokens are there."""
    with open_session(subject, model, **settings) as session:
        session.run([request("head", head.prompt, NUM_TOKENS)])
        found = session.run([request("longer", longer.prompt, NUM_TOKENS)])["longer", 0]
    _expect(found.num_cached >= cut, f"of {cut} cached tokens {found.num_cached} were found")
    if dtype_of(subject) == "float32" and found.tokens != list(longer.tokens):
        raise Failed(
            f"{model}: a prompt whose first {cut} tokens were cached differs from the reference: "
            f"expected {list(longer.tokens)}, got {found.tokens}",
            case=f"settings: {dict(settings)}\nfirst: {list(head.prompt)}\n"
            f"then: {list(longer.prompt)}",
            seed=subject.seed,
        )


def batches(subject: Subject) -> Figures:
    largest = 0
    for model in _models(subject, "qwen3"):
        for size in (1, 3, 8):
            found = _few(subject, model) if size == 1 else _cases(subject, model)
            settings = {"max_num_seqs": size, "enable_prefix_caching": False}
            ran = judge(subject, Scenario(model, found, settings, shuffled=subject.seed + size))
            largest = max(largest, ran.largest_batch)
        judge(subject, Scenario(model, _cases(subject, model)[::-1]))
    return {"largest batch": largest}


def run_ahead_or_not(subject: Subject) -> Figures:
    """Tokens are the same whether or not the next step is planned while one runs."""
    for model in _models(subject, "llama"):
        for mode in ("on", "off"):
            settings = {"async_scheduling": mode, "max_num_batched_tokens": 48}
            scenario = Scenario(model, _cases(subject, model), settings, shuffled=subject.seed)
            judge(subject, scenario)
    return None


def block_sizes(subject: Subject) -> Figures:
    multiple = block_size_of(subject, 1)
    sizes = [multiple * n for n in ((1, 3) if subject.quick else (1, 2, 3, 5))]
    for model in _models(subject, "llama"):
        for size in sizes:
            judge(subject, Scenario(model, _few(subject, model), {"block_size": size}))
    return None


def sliding_window(subject: Subject) -> Figures:
    """Blocks before the window are given back while a sequence runs, and others take them."""
    windows = (WINDOW - 2, 2 * WINDOW, 5 * WINDOW, 3 * WINDOW + 1, WINDOW + 1)
    lengths = scaled_all(subject, windows)
    _expect(max(lengths) > WINDOW + block_size_of(subject), "no block lies before the window")
    found = tuple(cases("mistral", lengths, 30, subject.seed_of("window")))
    for caching in (False,) if subject.quick else (False, True):
        settings = {
            "block_size": block_size_of(subject),
            "max_num_batched_tokens": 37,
            "enable_prefix_caching": caching,
        }
        judge(subject, Scenario("mistral", found, settings, shuffled=subject.seed))
    return None


def step_limits(subject: Subject) -> Figures:
    """Long prompts and decoding at once, in steps within what `Platform.step_limits` says."""
    limits = limits_of(subject)
    lengths = (5, 150, 33, 101)
    found = tuple(cases("llama", lengths, NUM_TOKENS, subject.seed_of("limits")))
    ran = judge(subject, Scenario("llama", found, {}, shuffled=subject.seed))
    sizes = [sum(row.num_tokens for row in plan) for plan in ran.plans]
    most = most_tokens(subject, max(sizes))
    _expect(max(sizes) <= most, f"a step of {max(sizes)} tokens, where {most} are the limit")
    if not limits.mixed_batches:
        for plan in ran.plans:
            kinds = {row.decodes for row in plan}
            _expect(len(kinds) == 1, "a step mixes prompts and decoding")
    return {"largest step": max(sizes)}


def _num_chunked(ran: Ran) -> int:
    """Rows of steps that go on with a prompt."""
    return sum(row.start > 0 and not row.decodes for plan in ran.plans for row in plan)


def _expect(taken: bool, otherwise: str) -> None:
    """The check proves nothing unless the engine took the road it is about."""
    if not taken:
        raise Failed(f"The engine did not take the road that this check is about: {otherwise}.")


# ---------------------------------------------------------------------------------------------
# Sampling and log-probabilities
# ---------------------------------------------------------------------------------------------


def seeded_sampling(subject: Subject) -> Figures:
    """Alone, and among others in chunks and in another order: the same tokens."""
    distinct: set[int] = set()
    for model in _models(subject, "qwen3"):
        requests = [
            request(str(i), case.prompt, NUM_TOKENS, {"temperature": 0.9, "seed": i + 2**40})
            for i, case in enumerate(_few(subject, model))
        ]
        with open_session(subject, model, max_num_seqs=1) as session:
            alone = session.run(requests)
        budget = {"max_num_batched_tokens": 29, "max_num_seqs": 8}
        with open_session(subject, model, **budget) as session:
            among = session.run(requests, random.Random(subject.seed))
        if dtype_of(subject) != "float32":
            continue  # what rounding does to a draw depends on the batch
        for (name, _), one in alone.items():
            distinct |= set(one.tokens)
            if among[name, 0].tokens != one.tokens:
                raise Failed(
                    f"{model}: request {name}, temperature 0.9, seed {int(name) + 2**40}: alone it "
                    f"yields {one.tokens}, among others {among[name, 0].tokens}",
                    case=f"settings: {budget}\nprompt: {requests[int(name)].prompt.token_ids}",
                    seed=subject.seed,
                )
    return {"distinct tokens": len(distinct)}


def forks(subject: Subject) -> Figures:
    """Children share a prompt's blocks and write their own copy of the last one: the
    log-probabilities of each show whether it read its own past."""
    worst = 0.0
    for model in _models(subject, "llama"):
        prompts = [case.prompt for case in _few(subject, model)]
        params = {"n": 3, "temperature": 1.0, "seed": 5, "logprobs": 1}
        requests = [request(str(i), p, NUM_TOKENS, params) for i, p in enumerate(prompts)]
        with open_session(subject, model, block_size=block_size_of(subject)) as session:
            found = session.run(requests, random.Random(subject.seed))
        for i, prompt in enumerate(prompts):
            children = [found[str(i), index] for index in range(3)]
            if len({tuple(child.tokens) for child in children}) == 1:
                raise Failed(f"{model}: three children of one prompt drew the same tokens")
            for child in children:
                where = f"{model}: a child of the prompt {list(prompt)}"
                worst = max(worst, _compare_generated(subject, model, prompt, child, where))
    return {"largest error": worst}


def logprobs(subject: Subject) -> Figures:
    worst = 0.0
    for model in _models(subject, "llama", "mistral"):
        worst = max(worst, _logprob_error(subject, model, dtype_of(subject)))
    return {"largest error": worst}


def rounded(subject: Subject, dtype: str) -> Figures:
    """Log-probabilities in another dtype agree with fp32's within its bound."""
    return {"largest error": _logprob_error(subject, "qwen3", dtype, dtype=dtype)}


def _logprob_error(subject: Subject, model: str, bound: str, **settings: object) -> float:
    prompts = [case.prompt for case in _few(subject, model)]
    params = {"logprobs": 2, "prompt_logprobs": 1}
    requests = [request(str(i), p, NUM_TOKENS, params) for i, p in enumerate(prompts)]
    worst = 0.0
    with open_session(subject, model, max_num_batched_tokens=40, **settings) as session:
        found = session.run(requests, random.Random(subject.seed))
    for i, prompt in enumerate(prompts):
        one, where = found[str(i), 0], f"{model}: the prompt {list(prompt)}"
        error = _compare_generated(subject, model, prompt, one, where, bound)
        expected = oracle(model).logprobs(prompt)
        prompt_error = _compare(one.prompt_logprobs, expected, prompt[1:], where, bound)
        worst = max(worst, error, prompt_error)
    return worst


def _compare_generated(
    subject: Subject,
    model: str,
    prompt: tuple[int, ...],
    found: Found,
    where: str,
    bound: str | None = None,
) -> float:
    if found.error is not None:
        raise Failed(f"{where} ended with an error: {found.error}", seed=subject.seed)
    expected = oracle(model).logprobs([*prompt, *found.tokens])[len(prompt) - 1 :]
    return _compare(found.logprobs, expected, found.tokens, where, bound or dtype_of(subject))


def _compare(
    found: list[PositionLogprobs],
    expected: torch.Tensor,
    tokens: Sequence[int],
    where: str,
    bound: str,
) -> float:
    """The largest error. `expected` `[positions, vocab]`: what each of `tokens` came from."""
    worst = 0.0
    if len(found) != len(tokens):
        raise Failed(f"{where}: {len(found)} positions have log-probabilities, not {len(tokens)}")
    rows = expected[: len(tokens)]
    for position, (token, entry, row) in enumerate(zip(tokens, found, rows, strict=True)):
        if entry.token_ids[0] != token:
            raise Failed(f"{where}: position {position} tells of token {entry.token_ids[0]}")
        told = torch.tensor(entry.logprobs)
        error = float((told - row[entry.token_ids]).abs().max())
        if not error <= LOGPROB_TOLERANCE[bound]:
            raise Failed(
                f"{where}: log-probabilities of position {position} are off by {error:.3g} "
                f"({LOGPROB_TOLERANCE[bound]} is allowed in {bound})",
                case=f"tokens {entry.token_ids}\nfound {entry.logprobs}\n"
                f"expected {row[entry.token_ids].tolist()}",
            )
        worst = max(worst, error)
    return worst
