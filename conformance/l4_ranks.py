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
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from typing import IO

from ..core.env import child_environment
from .base import Check, Failed, Skipped, Subject
from .engines import Found, dtype_of, open_session, request
from .l4_member import START_SECONDS, Answer, MemberRequest
from .models import Case, cases
from .scenarios import Scenario, judge

MISSING_TIMEOUT = 4.0
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
        raise Skipped(
            f"{size} ranks need {size} devices, because these have memory of their own; "
            f"the platform has {count}"
        )


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


@dataclass
class _Member:
    """The process of one rank. It writes to files: nobody would empty its pipes while another rank
    is read."""

    rank: int
    process: subprocess.Popen[bytes]
    out: IO[bytes]
    err: IO[bytes]

    def expect_well(self) -> None:
        if self.process.poll():
            said = _content(self.err).strip()[-800:]
            raise Failed(f"rank {self.rank} ended with status {self.process.returncode}: {said}")

    def answer(self) -> Answer:
        return Answer(**json.loads(_content(self.out)))

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
        self.out.close()
        self.err.close()


def _content(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


def _run_members(subject: Subject, size: int, program: str, timeout: float) -> list[Answer]:
    """One process a member, as the engine starts its ranks; what each of them answered."""
    with tempfile.TemporaryDirectory(prefix="trimaran-conform-") as where, ExitStack() as undo:
        members = []
        for rank in range(size):
            asked = MemberRequest(
                reference=subject.reference,
                device=subject.device,
                seed=subject.seed,
                program=program,
                rank=rank,
                size=size,
                folder=where,
                timeout=timeout,
            )
            members.append(_started(subject, asked))
            undo.callback(members[-1].close)
        _wait_for(members, time.monotonic() + START_SECONDS + timeout + GRACE)
        return [member.answer() for member in members]


def _started(subject: Subject, asked: MemberRequest) -> _Member:
    plan = {"tensor_parallel_size": asked.size, "num_threads": 1}
    out, err = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115  (closed by close)
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", f"{__package__}.l4_member", json.dumps(asdict(asked))],
        stdin=subprocess.PIPE,
        stdout=out,
        stderr=err,
        env=child_environment(subject.platform().process_env(asked.rank, plan)),
    )
    return _Member(asked.rank, process, out, err)


def _wait_for(members: Sequence[_Member], deadline: float) -> None:
    """Until all have ended well. The last one may wait for its input to end, which it does when
    the others are over."""
    last = members[-1].process
    while running := [member for member in members if member.process.poll() is None]:
        for member in members:
            member.expect_well()
        if running == [members[-1]] and last.stdin and not last.stdin.closed:
            last.stdin.close()
        if time.monotonic() > deadline:
            raise Failed(f"rank {running[0].rank} does not come to an end")
        time.sleep(0.01)
    for member in members:
        member.expect_well()


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
