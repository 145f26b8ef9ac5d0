"""One member of a group: `python -m trimaran.conformance.l4_member REQUEST`, started by L4 only.

It runs every collective on its device and compares what came of it with plain arithmetic: each
member knows what the others gave. The answer is one line of JSON on the standard output.
"""

from __future__ import annotations

import json
import os
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..platforms.interface import Communicator, Device, GroupSpec
from .base import Failed, Subject
from .l0_contract import refuse_foreign_members

START_SECONDS = 90.0  # for a member to import its libraries and open its device
SHAPES = ((1,), (5, 3), (2, 129), (64, 128))
IN_A_ROW = 20
LATE_SECONDS = 0.1


@dataclass(frozen=True)
class MemberRequest:
    """`program`: "collectives", or "missing" (the last member does not come to a collective).
    `folder` is one that all members see."""

    reference: str
    device: int
    seed: int
    program: str
    rank: int
    size: int
    folder: str
    timeout: float

    @property
    def rendezvous(self) -> str:
        return f"file://{self.folder}/group"


@dataclass
class Answer:
    """`mistakes`: in words. `digests`: case → a checksum of its result, equal on every member.
    `seconds`: how long a collective without its member took, and `raised` what it raised."""

    mistakes: list[str] = field(default_factory=list)
    digests: dict[str, int] = field(default_factory=dict)
    cases: int = 0
    seconds: float = 0.0
    raised: str = ""


class Member:
    def __init__(self, request: MemberRequest) -> None:
        self.request = request
        platform = Subject(request.reference).platform()
        indices = [info.index for info in platform.probe().devices]
        index = indices[(indices.index(request.device) + request.rank) % len(indices)]
        self.device: Device = platform.open(index, 1)
        self._show("ready")  # imports take long, and are no part of the group's timeout
        self._wait_for_all("ready")
        group = GroupSpec(request.rank, request.size, request.rendezvous, request.timeout)
        self.comm: Communicator = platform.communicator(group, self.device)
        self.dtypes = [getattr(torch, name) for name in platform.capabilities(index).dtypes]
        self.answer = Answer()

    def close(self) -> None:
        self.comm.close()
        self.device.close()

    def collectives(self) -> None:
        self._check_class()
        for dtype in self.dtypes:
            for shape in SHAPES:
                self._all_reduce(shape, dtype)
                for dim in {0, len(shape) - 1}:
                    self._all_gather(shape, dtype, dim)
                for source in range(self.request.size):
                    self._broadcast(shape, dtype, source)
        self._barrier()
        self._in_a_row()

    def missing(self) -> None:
        """All meet once; then the last one stays away until the others have given up."""
        self._on_device(lambda tensor: self.comm.all_reduce(tensor), torch.ones(4))
        if self.request.rank == self.request.size - 1:
            sys.stdin.read()
            return
        start = time.monotonic()
        try:
            self._on_device(lambda tensor: self.comm.all_reduce(tensor), torch.ones(4))
        except Exception as error:  # of whatever kind the library raises
            self.answer.raised = f"{type(error).__name__}: {error}"[:300]
        self.answer.seconds = time.monotonic() - start

    def _check_class(self) -> None:
        if (self.comm.rank, self.comm.size) != (self.request.rank, self.request.size):
            self.answer.mistakes.append(
                f"the communicator of rank {self.request.rank} of {self.request.size} says that it "
                f"is {self.comm.rank} of {self.comm.size}"
            )
        try:
            refuse_foreign_members(type(self.comm), Communicator)
        except Failed as error:
            self.answer.mistakes.append(error.message)

    # -- what members see of each other beside the group ---------------------------------------

    def _show(self, what: str) -> None:
        Path(self.request.folder, f"{what} {self.request.rank}").touch()

    def _missing(self, what: str) -> list[int]:
        """The members that have not shown it."""
        files = (Path(self.request.folder, f"{what} {rank}") for rank in range(self.request.size))
        return [rank for rank, file in enumerate(files) if not file.exists()]

    def _wait_for_all(self, what: str) -> None:
        deadline = time.monotonic() + START_SECONDS
        while missing := self._missing(what):
            if time.monotonic() > deadline:
                raise TimeoutError(f"rank {missing[0]} is not {what}")
            time.sleep(0.005)

    # -- the collectives -----------------------------------------------------------------------

    def _all_reduce(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        name = f"all_reduce {dtype} {list(shape)}"
        given = list(self._given(name, shape, dtype))
        found = self._run(name, lambda mine: self.comm.all_reduce(mine), given[self.request.rank])
        wide = torch.stack(given).double()
        # Each of the size - 1 sums may be rounded to the type.
        slack = wide.abs().sum(0) * torch.finfo(dtype).eps * self.request.size
        self._compare(name, found, wide.sum(0), slack)

    def _all_gather(self, shape: tuple[int, ...], dtype: torch.dtype, dim: int) -> None:
        """A view with strides of its own: what is not contiguous must be gathered as well."""
        name = f"all_gather {dtype} {list(shape)} along {dim}"
        given = list(self._given(name, shape, dtype))
        mine = given[self.request.rank].T.contiguous() if len(shape) > 1 else given[0].clone()
        if len(shape) == 1:
            mine.copy_(given[self.request.rank])
        turned = len(shape) > 1
        found = self._run(
            name, lambda part: self.comm.all_gather(part.T if turned else part, dim), mine
        )
        self._compare(name, found, torch.cat(given, dim).double(), None)

    def _broadcast(self, shape: tuple[int, ...], dtype: torch.dtype, source: int) -> None:
        name = f"broadcast {dtype} {list(shape)} from {source}"
        given = list(self._given(name, shape, dtype))
        found = self._run(
            name, lambda mine: self.comm.broadcast(mine, source), given[self.request.rank]
        )
        self._compare(name, found, given[source].double(), None)

    def _barrier(self) -> None:
        """Each in turn comes later than the others, which must wait for it."""
        for late in range(self.request.size):
            if self.request.rank == late:
                time.sleep(LATE_SECONDS)
            self._show(f"barrier {late}")
            self._run("barrier", lambda _: self.comm.barrier(), torch.zeros(1))
            if missing := self._missing(f"barrier {late}"):
                self.answer.mistakes.append(
                    f"rank {self.request.rank} passed a barrier that rank {missing[0]} had not "
                    "come to"
                )

    def _in_a_row(self) -> None:
        """As the layers of a model do: many in one launch, each of the result of the one before."""
        name = f"{IN_A_ROW} all_reduce in a row"
        dtype = torch.float32 if torch.float32 in self.dtypes else self.dtypes[0]
        given = list(self._given(name, (8, 16), dtype))

        def work(tensor: Tensor) -> Tensor:
            for _ in range(IN_A_ROW):
                tensor = self.comm.all_reduce(tensor) / self.request.size
            return tensor

        found = self._run(name, work, given[self.request.rank])
        wide = torch.stack(given).double()
        # The first sum as any other; after that all give the same, and each time is rounded once.
        slack = wide.abs().sum(0) * torch.finfo(dtype).eps * (self.request.size + IN_A_ROW)
        self._compare(name, found, wide.mean(0), slack)

    # -- inside --------------------------------------------------------------------------------

    def _given(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[Tensor]:
        """What each member gives, in their order."""
        for rank in range(self.request.size):
            seed = zlib.crc32(f"{self.request.seed}/{name}/{rank}".encode())
            yield torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)

    def _run(self, name: str, collective: Callable[[Tensor], Any], mine: Tensor) -> Tensor | None:
        found = self._on_device(collective, mine)
        self.answer.cases += 1
        if found is not None:
            content = found.contiguous().view(torch.uint8).numpy().tobytes()
            self.answer.digests[name] = zlib.crc32(content)
        return found

    def _on_device(self, collective: Callable[[Tensor], Any], mine: Tensor) -> Tensor | None:
        """As in a step: inside a launch, the result copied to the host there."""
        staged = self.device.to_device(mine)
        copies: list[Tensor] = []

        def work() -> None:
            found = collective(staged)
            if found is not None:
                copies.append(self.device.to_host(found))

        self.device.launch(work).wait()
        return copies[0] if copies else None

    def _compare(
        self, name: str, found: Tensor | None, expected: Tensor, slack: Tensor | None
    ) -> None:
        if found is None or found.shape != expected.shape:
            shape = None if found is None else list(found.shape)
            self.answer.mistakes.append(f"{name}: shape {shape}, not {list(expected.shape)}")
            return
        error = (found.double() - expected).abs()
        wrong = ~(error <= (torch.zeros(()) if slack is None else slack))
        if bool(wrong.any()):
            at = wrong.nonzero()[0].tolist()
            self.answer.mistakes.append(
                f"{name}: {int(wrong.sum())} of {wrong.numel()} values are wrong, first at {at}: "
                f"{found[tuple(at)].item():.6g}, not {expected[tuple(at)].item():.6g}"
            )


def main() -> int:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not mix with the answer
    torch.set_num_threads(1)
    member = Member(MemberRequest(**json.loads(sys.argv[1])))
    try:
        getattr(member, member.request.program)()
        print(json.dumps(vars(member.answer)), file=answers, flush=True)
        if member.request.program == "missing":
            os._exit(0)  # what is left of a collective that was given up may never end
    finally:
        member.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
