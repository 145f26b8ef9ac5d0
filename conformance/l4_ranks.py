"""L4: groups of two to four processes: collectives, and a tensor-parallel engine.

The processes find a platform named `module:Class` where Python looks for modules by itself:
installed, or on PYTHONPATH, which the kit sets for its own children.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial

from ..core.env import child_environment
from .base import Check, Failed, Skipped, Subject
from .engines import Found, dtype_of, open_session, request
from .l4_member import Answer, MemberRequest
from .models import Case, cases
from .scenarios import Scenario, judge

START_SECONDS = 90.0  # for a member to import its libraries and open its device
MISSING_TIMEOUT = 3.0
GRACE = 10.0
"""Seconds beyond its timeout that a collective has to notice that a member is missing."""
NUM_TOKENS = 10
LENGTHS = (3, 17, 30, 44, 58)

Figures = Mapping[str, float] | None


def checks(subject: Subject) -> list[Check]:
    sizes: tuple[int, ...] = (2, 3, 4)
    if subject.quick:  # a tensor-parallel engine is a group of two, too
        sizes = (next((size for size in (4, 3) if _room(subject, size)), 2),)
    return [
        *(
            Check(
                f"collectives/{size}",
                partial(collectives, subject, size),
                required=_room(subject, size),
                about="against arithmetic, in every dtype",
            )
            for size in sizes
        ),
        Check(
            "missing_member",
            partial(missing_member, subject),
            required=_room(subject, 2),
            about="a collective that lacks one fails after the timeout",
        ),
        *(
            Check(
                f"tensor_parallel/{size}",
                partial(tensor_parallel, subject, size),
                required=_room(subject, size),
                about="the tokens of one rank",
            )
            for size in ((2,) if subject.quick else (2, 4))
        ),
    ]


def _room(subject: Subject, size: int) -> bool:
    platform = subject.platform()
    shared = platform.capabilities(subject.device).unified_memory
    return shared or len(platform.probe().devices) >= size


def _need_room(subject: Subject, size: int) -> None:
    if not _room(subject, size):
        count = len(subject.platform().probe().devices)
        raise Skipped(f"{size} ranks, but {count} devices that do not share the host's memory")


# ---------------------------------------------------------------------------------------------
# Collectives
# ---------------------------------------------------------------------------------------------


def collectives(subject: Subject, size: int) -> Figures:
    _need_room(subject, size)
    answers = _run_members(subject, size, "collectives", timeout=60.0)
    for rank, answer in enumerate(answers):
        if answer.mistakes:
            raise Failed(
                f"rank {rank} of {size}: {answer.mistakes[0]} "
                f"({len(answer.mistakes)} of {answer.cases} collectives are wrong)",
                case="\n".join(answer.mistakes[:8]),
                seed=subject.seed,
            )
    for name, digest in answers[0].digests.items():
        if "gather" in name or "reduce" in name or "broadcast" in name:
            found = [answer.digests.get(name) for answer in answers]
            if found != [digest] * size:
                raise Failed(
                    f"{name}: the members' results are not equal bit by bit, so that ranks would "
                    f"draw different tokens (checksums {found})",
                    seed=subject.seed,
                )
    return {"collectives": answers[0].cases}


def missing_member(subject: Subject) -> Figures:
    _need_room(subject, 2)
    (answer, _) = _run_members(subject, 2, "missing", timeout=MISSING_TIMEOUT)
    if not answer.raised:
        raise Failed("an all_reduce in which a member is missing came to an end without an error")
    if answer.seconds > MISSING_TIMEOUT + GRACE:
        raise Failed(
            f"an all_reduce in which a member is missing took {answer.seconds:.0f} s to fail; the "
            f"group's timeout is {MISSING_TIMEOUT:g} s"
        )
    return {"s": answer.seconds}


def _run_members(subject: Subject, size: int, program: str, timeout: float) -> list[Answer]:
    """One process a member, as the engine starts its ranks; what each of them answered."""
    platform = subject.platform()
    plan = {"tensor_parallel_size": size, "num_threads": 1}
    with tempfile.TemporaryDirectory(prefix="trimaran-conform-") as where:
        members = []
        for rank in range(size):
            asked = MemberRequest(
                reference=subject.reference,
                device=subject.device,
                seed=subject.seed,
                program=program,
                rank=rank,
                size=size,
                rendezvous=f"file://{where}/group",
                timeout=timeout,
            )
            members.append(
                subprocess.Popen(
                    [sys.executable, "-m", f"{__package__}.l4_member", json.dumps(asdict(asked))],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                    env=child_environment(platform.process_env(rank, plan)),
                )
            )
        try:
            limit = time.monotonic() + START_SECONDS + timeout
            return [_answer(rank, member, limit) for rank, member in enumerate(members)]
        finally:
            for member in members:
                member.kill()
                member.communicate()


def _answer(rank: int, member: subprocess.Popen[str], limit: float) -> Answer:
    try:
        out, err = member.communicate(timeout=max(1.0, limit - time.monotonic()))
    except subprocess.TimeoutExpired:
        raise Failed(f"rank {rank} does not come to an end") from None
    if not out.strip():
        raise Failed(f"rank {rank} ended with status {member.returncode}: {err.strip()[-800:]}")
    return Answer(**json.loads(out))


# ---------------------------------------------------------------------------------------------
# Engines
# ---------------------------------------------------------------------------------------------


def tensor_parallel(subject: Subject, size: int) -> Figures:
    """Greedy against the reference; sampled against one rank."""
    _need_room(subject, size)
    model = "qwen3"
    found = tuple(cases(model, LENGTHS, NUM_TOKENS, subject.seed_of("L4", model)))
    settings = {"max_num_batched_tokens": 48, "max_num_seqs": 8}
    parallel = settings | {"tensor_parallel_size": size}
    judge(subject, Scenario(model, found, parallel, shuffled=subject.seed))
    if subject.quick or dtype_of(subject) != "float32":
        return None
    drawn = [_sampled(subject, model, found, one) for one in (settings, parallel)]
    for name, alone in drawn[0].items():
        if drawn[1][name].tokens != alone.tokens:
            raise Failed(
                f"{model}: request {name[0]}, temperature 0.9: one rank yields {alone.tokens}, "
                f"{size} ranks {drawn[1][name].tokens}",
                seed=subject.seed,
            )
    return None


def _sampled(
    subject: Subject, model: str, found: tuple[Case, ...], settings: Mapping[str, object]
) -> dict[tuple[str, int], Found]:
    requests = [
        request(str(i), case.prompt, NUM_TOKENS, {"temperature": 0.9, "seed": i})
        for i, case in enumerate(found)
    ]
    with open_session(subject, model, **settings) as session:
        return session.run(requests, random.Random(subject.seed))
