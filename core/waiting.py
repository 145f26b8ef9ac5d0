"""The waiting queue: ordered by the policy, bounded, and able to say when to come back."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable

from .policies import OrderKey
from .request import Request

RATE_WINDOW = 128
"""Starts of requests that the measured rate looks back over."""
RETRY_UNKNOWN, RETRY_MIN, RETRY_MAX = 1.0, 0.1, 60.0
"""Seconds to wait when no rate is known yet, and the bounds of the advice."""


class WaitingQueue:
    """Sequences in state `waiting`, best key first.

    `num_new` and `num_new_tokens` count requests that have never been started, which is what the
    limits of the queue are about: what was preempted or forked is not refused any more.
    Removal is lazy: an entry counts only while its request still names it.
    """

    def __init__(self, key: OrderKey, clock: Callable[[], float]) -> None:
        self._key = key
        self._clock = clock
        self._heap: list[tuple[tuple[int, ...], int, Request]] = []
        self._passed: list[tuple[tuple[int, ...], int, Request]] = []
        self._num_entries = 0
        self._size = 0
        self.num_new = 0
        self.num_new_tokens = 0
        self._starts: deque[tuple[float, int]] = deque(maxlen=RATE_WINDOW)

    def __len__(self) -> int:
        return self._size

    def push_new(self, request: Request) -> None:
        request.is_new = True
        self.num_new += 1
        self.num_new_tokens += request.num_prompt
        self.push(request)

    def push(self, request: Request) -> None:
        self._num_entries += 1
        self._size += 1
        request.queue_entry = self._num_entries
        request.order = self._key(request)
        heapq.heappush(self._heap, (request.order, self._num_entries, request))

    def peek(self) -> Request | None:
        while self._heap:
            _, entry, request = self._heap[0]
            if request.queue_entry == entry:
                return request
            heapq.heappop(self._heap)
        return None

    def pass_over(self) -> None:
        """The head keeps its place, but `peek` shows who comes after it until `recall`."""
        self._passed.append(heapq.heappop(self._heap))

    def recall(self) -> None:
        for entry in self._passed:
            heapq.heappush(self._heap, entry)
        self._passed.clear()

    def start(self, request: Request) -> None:
        """The request leaves the queue to run."""
        now = self._clock()
        request.first_scheduled = request.first_scheduled or now
        if request.is_new:
            self._starts.append((now, request.num_prompt))
        self.discard(request)

    def discard(self, request: Request) -> None:
        """Take a request out; nothing happens if it is not in."""
        if request.is_new:
            request.is_new = False
            self.num_new -= 1
            self.num_new_tokens -= request.num_prompt
        if request.queue_entry:
            request.queue_entry = 0
            self._size -= 1
            if len(self._heap) > 64 and len(self._heap) > 2 * self._size:
                self._heap = [entry for entry in self._heap if entry[2].queue_entry == entry[1]]
                heapq.heapify(self._heap)

    def retry_after(self, num_requests: int, num_tokens: int) -> float:
        """Seconds until so many queued requests and tokens have started, at the recent rate."""
        if not self._starts:
            return RETRY_UNKNOWN
        elapsed = max(1e-3, self._clock() - self._starts[0][0])
        per_request = elapsed / len(self._starts)
        per_token = elapsed / max(1, sum(tokens for _, tokens in self._starts))
        seconds = max(num_requests * per_request, num_tokens * per_token)
        return min(RETRY_MAX, max(RETRY_MIN, seconds))
