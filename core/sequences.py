"""Where every sequence is: queue, row, blocks. All moves between states are made here."""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from operator import attrgetter

from .kv.manager import KVManager
from .plan import StepPlan
from .policies import OrderKey
from .request import Request, Status
from .types import FinishReason
from .waiting import WaitingQueue

_order = attrgetter("order")


@dataclass(slots=True)
class StepInFlight:
    """A plan that was handed out. `requests` is parallel to its rows.

    `stale` are those that gave up their blocks since: their tokens still count, what they
    computed does not. Of those in `void` not even the tokens count.
    """

    plan: StepPlan
    requests: list[Request] = field(default_factory=list)
    stale: set[Request] = field(default_factory=set)
    void: set[Request] = field(default_factory=set)


class Sequences:
    """The queue, the rows and the blocks of all unfinished sequences.

    Invariants: a sequence has a row iff it is running; `running` is sorted by the policy's key;
    whoever holds blocks without running is in `holders`; a finished sequence holds nothing.
    """

    def __init__(
        self,
        kv: KVManager,
        key: OrderKey,
        max_num_seqs: int,
        clock: Callable[[], float],
    ) -> None:
        self.kv = kv
        self.queue = WaitingQueue(key, clock)
        self.running: list[Request] = []
        self.holders: dict[Request, None] = {}
        self.by_id: dict[str, list[Request]] = {}
        self.suspects: set[Request] = set()  # those whose party is their own (see `Quarantine`)
        self.in_flight: deque[StepInFlight] = deque()
        # The last step whose output was taken. What a later step uses must outlive that step.
        self.updated_step = -1
        self.num_blocked = 0
        self.num_preemptions = 0
        # What a stop string cuts off later stays counted here, and is counted there too: a counter
        # never steps back.
        self.num_tokens_generated = 0
        self.num_tokens_discarded = 0
        self._free_rows = list(range(max_num_seqs))
        self._removed_rows: list[int] = []

    # ---------------------------------------------------------------- entering

    def add(self, children: list[Request]) -> None:
        """A new request: its first child queues, the others wait for it (see `core.fork`)."""
        self.by_id[children[0].request_id] = children
        self.note_suspects(children)
        self.queue.push_new(children[0])

    def note_suspects(self, children: list[Request]) -> None:
        self.suspects.update(child for child in children if child.party)

    def wake(self, request: Request) -> None:
        """A blocked sequence may run again."""
        if request.status is Status.BLOCKED:
            self.num_blocked -= 1
            request.move_to(Status.WAITING)
            self.queue.push(request)

    def block(self, request: Request, reason: str) -> None:
        """The sequence waits for something else than its turn. It gives up its row, so that those
        it waits for can have one, and keeps its blocks as long as nobody needs them."""
        self.queue.discard(request)
        self._leave_row(request)
        request.move_to(Status.BLOCKED, reason)
        self.num_blocked += 1
        self.note_holder(request)

    def note_holder(self, request: Request) -> None:
        if request.status is not Status.RUNNING and request.kv.holds_blocks:
            self.holders[request] = None

    # ---------------------------------------------------------------- running

    @property
    def num_free_rows(self) -> int:
        return len(self._free_rows)

    def run(self, request: Request) -> int:
        """The sequence, which has its blocks, leaves the queue and takes the lowest free row."""
        self.queue.start(request)
        self.holders.pop(request, None)
        request.move_to(Status.RUNNING)
        request.row = heapq.heappop(self._free_rows)
        insort(self.running, request, key=_order)
        return request.row

    def take_removed_rows(self) -> list[int]:
        rows, self._removed_rows = self._removed_rows, []
        return rows

    def remove_again(self, rows: list[int]) -> None:
        """A plan that removed `rows` failed, perhaps before it was applied: say it once more."""
        self._removed_rows += [
            row for row in rows if row in self._free_rows and row not in self._removed_rows
        ]

    def is_in_flight(self, request: Request) -> bool:
        return request.last_step > self.updated_step

    def preempt(self, request: Request) -> None:
        """Back to the queue, to be computed again from its tokens. Tokens still in flight are
        appended when they arrive; only then can the sequence be resumed."""
        self._leave_row(request)
        request.move_to(Status.WAITING)
        request.num_preemptions += 1
        self.num_preemptions += 1
        self.drop_blocks(request)
        self.queue.push(request)

    def reclaim(self, keep: Request | None = None) -> bool:
        """Take the blocks of one sequence that is not running: the last in order, never `keep`."""
        candidates = [request for request in self.holders if request is not keep]
        if not candidates:
            return False
        self.drop_blocks(max(candidates, key=_order))
        return True

    def drop_blocks(self, request: Request) -> None:
        """The sequence gives up its blocks; while a step uses them, that step holds them."""
        self.holders.pop(request, None)
        in_flight = self.is_in_flight(request)
        if in_flight:
            for step in self.in_flight:
                step.stale.add(request)
        self.kv.release(request.kv, request.last_step if in_flight else None)
        request.num_computed = 0
        request.num_verified = 0

    def fork(self, source: Request, target: Request, num_computed: int) -> None:
        """`target` (blocked, without blocks) starts with what `source` has computed of the tokens
        they share; it computes everything itself if that is not possible."""
        if self.kv.fork(source.kv, target.kv, num_computed):
            target.num_computed = target.num_verified = num_computed
            self.note_holder(target)

    # ---------------------------------------------------------------- leaving

    def end(self, request: Request, reason: FinishReason) -> None:
        """The one place where a sequence ends, whatever the reason: all it holds is released."""
        if request.status is Status.BLOCKED:
            self.num_blocked -= 1
        self.queue.discard(request)
        self._leave_row(request)
        request.move_to(Status.FINISHED)
        request.finish_reason = reason
        self.drop_blocks(request)
        self.suspects.discard(request)
        children = self.by_id[request.request_id]
        children.remove(request)
        if not children:
            del self.by_id[request.request_id]
        controller, request.controller = request.controller, None
        if controller is not None:
            controller.ended(request)

    def _leave_row(self, request: Request) -> None:
        if request.row is None:
            return
        del self.running[bisect_left(self.running, request.order, key=_order)]
        heapq.heappush(self._free_rows, request.row)
        self._removed_rows.append(request.row)
        request.row = None
