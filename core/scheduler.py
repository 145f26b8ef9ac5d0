"""Continuous batching by one rule: each step lets sequences catch up with their known tokens.

There is no prefill and no decode phase. A sequence has known tokens (prompt, generated, and those
still in flight) and computed ones; a step computes some of the difference under a token budget.
Chunked prefill, prefix hits and resumption after a preemption are all that one rule.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from .admission import Admission
from .beam import admit_beams
from .engine.messages import BeamOutput, EngineRequest, EngineStats, SequenceOutput
from .errors import InvalidRequestError
from .fork import admit_fork
from .kv.manager import KVManager
from .kv.sequence import Hit
from .plan import BlockAppend, NewRow, StepOutput, StepPlan
from .policies import choose_policy
from .request import Request
from .sequences import Sequences, StepInFlight
from .settlement import Settlement
from .types import FinishReason

if TYPE_CHECKING:
    from .config import CacheConfig, SchedulerConfig

FEATURES = (admit_fork, admit_beams)
"""Asked in turn whether they take a new request under their control."""


class Scheduler:
    """Plans steps and takes their outputs, in the same order. Not thread-safe.

    A step may be planned while earlier ones are in flight: planning already moves `num_computed`
    and `num_pending`, an update only confirms. So nothing that depends on a token's value may be
    decided in `schedule`.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        cache: CacheConfig,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config = config
        self.kv = KVManager(cache.groups, cache.enable_prefix_caching)
        key = choose_policy(config.policy)
        self.sequences = Sequences(self.kv, key, config.max_num_seqs, clock)
        self.admission = Admission(config, self.kv, self.sequences.queue, clock)
        self.settlement = Settlement(self.kv, self.sequences, self.admission.quarantine)
        self._next_step = 0
        self._turn = 0
        self._caught_up: bool | None = False  # the kind of the last step
        self._budget = 0
        self._num_prompt_tokens = 0
        self._last_step_tokens = 0

    # ---------------------------------------------------------------- requests

    def add(self, request: EngineRequest) -> None:
        """Queue a request. Raises `InvalidRequestError`, `ContextLengthError`, `QueueFullError` or
        `StepError` (quarantine); then nothing has changed."""
        if request.request_id in self.sequences.by_id:
            raise InvalidRequestError(
                f"request id {request.request_id!r} is in use.", param="request_id"
            )
        children = self.admission.admit(request)
        self.sequences.add(children)
        for admit_feature in FEATURES:
            if admit_feature(self.sequences, children):
                break

    def abort(self, request_id: str) -> None:
        """End all sequences of a request, in whatever state they are; unknown ids are ignored.

        The final outputs come with the next `update` or `drain_outputs`.
        """
        self.settlement.end_request(request_id, FinishReason.ABORT)

    def finish(self, request_id: str, index: int, at_token: int) -> None:
        """A stop was found outside: keep `at_token` generated tokens, discard and do not bill the
        rest. Ignored if the sequence has already ended."""
        for child in self.sequences.by_id.get(request_id, ()):
            if child.index == index and not child.origin.beam:
                self.sequences.num_tokens_discarded += child.truncate(at_token)
                self.settlement.end(child, FinishReason.STOP)
                self.admission.quarantine.served(child)
                return

    # ---------------------------------------------------------------- planning

    def schedule(self) -> StepPlan:
        """Plan the next step. An empty plan needs no execution and no update."""
        plan = StepPlan(self._next_step)
        step = StepInFlight(plan)
        self._budget = self.config.max_num_batched_tokens
        num_preemptions = self.sequences.num_preemptions
        for party, catch_up in itertools.product(self._parties(), self._kinds()):
            self._advance_running(step, party, catch_up)
            if catch_up is not False and self.sequences.num_preemptions == num_preemptions:
                self._admit_waiting(step, party)
            if step.requests:
                self._caught_up = catch_up
                break
        plan.removed = self.sequences.take_removed_rows()
        plan.scrubs = self.kv.take_scrubs()
        if not plan.empty:
            self._next_step += 1
            self._last_step_tokens = self.config.max_num_batched_tokens - self._budget
            self.sequences.in_flight.append(step)
        return plan

    def _parties(self) -> list[str]:
        """Who may have this step, in order: the first that has something to compute takes it.

        Nearly always there is one party, everybody. With suspects every other step is offered to
        one of them first, in turn, so that they hold up neither the others nor one another.
        """
        if not self.sequences.suspects:
            return [""]
        head = self.sequences.queue.peek()
        suspects: dict[str, None] = {}
        for request in [*self.sequences.running, *([head] if head else [])]:
            if request.party and len(request.tokens) > request.alone_until:
                request.party = ""  # it got past the place where it is suspected
                self.sequences.suspects.discard(request)
            elif request.party:
                suspects[request.party] = None
        if not suspects:
            return [""]
        self._turn += 1
        order, first = list(suspects), self._turn // 2 % len(suspects)
        order = order[first:] + order[:first]
        return ["", *order] if self._turn % 2 else [*order, ""]

    def _kinds(self) -> list[bool | None]:
        """What the step may do, in order. One for all (None), unless the platform wants steps that
        catch up (True: sequences start, or are several tokens behind) apart from those in which
        running ones take their next token (False). Then they take turns where both are wanted."""
        return [None] if self.config.mixed_batches else [not self._caught_up, self._caught_up]

    def _advance_running(self, step: StepInFlight, party: str, catch_up: bool | None) -> None:
        """Every running sequence of the party catches up, the first in order first. This is the
        hot loop: a decoding sequence with room in its last block takes the short way."""
        plan, scheduled = step.plan, step.requests
        rows, starts, counts, emits = plan.rows, plan.starts, plan.counts, plan.emits
        step_id, budget = plan.step_id, self._budget
        running = self.sequences.running
        position = 0
        while position < len(running) and budget > 0:
            request = running[position]
            position += 1
            if request.party != party:
                continue
            start = request.num_computed
            end = known = len(request.tokens) + request.num_pending
            if known >= request.max_total or known == start:
                continue  # its last token, or a decision of its controller, is on the way
            if catch_up is not None and catch_up != (known - start > 1):
                continue
            if known - start > 1:
                end = start + self._chunk(request, known - start, budget)
                if end == start:
                    continue
            if end > request.kv.capacity:
                end = self._make_room(step, position, start, end)
                if end == start:
                    continue
            rows.append(request.row)  # type: ignore[arg-type]  # running, so it has a row
            starts.append(start)
            counts.append(end - start)
            emits.append(end == known)
            scheduled.append(request)
            if end == known:
                request.num_pending += request.yields
            request.num_computed = end
            request.last_step = step_id
            budget -= end - start
        self._budget = budget

    def _chunk(self, request: Request, wanted: int, budget: int) -> int:
        """How many of the wanted tokens this step may compute; 0 if the request has to wait."""
        config = self.config
        if config.enable_chunked_prefill:
            threshold = config.long_prefill_token_threshold
            return min(wanted, budget, threshold or wanted)
        if wanted <= budget:
            return wanted
        # A prompt is computed whole or waits. What grew past the budget before it was preempted
        # can only come back in parts.
        return budget if wanted > config.max_num_batched_tokens else 0

    # ---------------------------------------------------------------- memory

    def _make_room(self, step: StepInFlight, position: int, start: int, end: int) -> int:
        """Give the running sequence before `position` blocks up to `end`, or as far as they go.

        Those behind it in order, then blocks of sequences that do not run, have to give way.
        Blocks in flight come back at an update: then the sequence sits out this step rather than
        drive out one more. Returns the new end; `start` if there is nothing now.
        """
        running = self.sequences.running
        request = running[position - 1]
        while (room := self.kv.room(request.kv)) <= start:
            if self.kv.relief_in_flight(request.kv, start + 1):
                return start
            if len(running) > position:
                self.sequences.preempt(running[-1])
            elif not self.sequences.reclaim():
                return start
        end = min(end, room)
        added = self.kv.grow(request.kv, end)
        assert added is not None and request.row is not None
        for group, blocks in enumerate(added):
            if blocks:
                step.plan.blocks.append(BlockAppend(request.row, group, blocks))
        return end

    # ---------------------------------------------------------------- admission

    def _admit_waiting(self, step: StepInFlight, party: str) -> None:
        """Start or resume waiting sequences in strict order: if the first cannot, none does. Only
        those that gain by it are passed over for this step (`_gains_by_waiting`)."""
        queue, num_passed = self.sequences.queue, 0
        if not (self._budget > 0 and self.sequences.num_free_rows and queue.peek()):
            return
        pending = self._pending_blocks(party)
        while self._budget > 0 and self.sequences.num_free_rows > num_passed:
            request = queue.peek()
            # Tokens in flight have to be known before the sequence can be resumed.
            if request is None or request.party != party or self.sequences.is_in_flight(request):
                break
            hit = None
            if not request.kv.holds_blocks:
                hit = self.kv.find_hit(request.kv, request.tokens)
            if hit and self._gains_by_waiting(request, hit, pending):
                queue.pass_over()
                num_passed += 1
            elif self._admit(step, request, hit):
                pending.update(self.kv.unpublished(request.kv, request.num_computed))
            else:
                break
        queue.recall()

    def _pending_blocks(self, party: str) -> set[bytes]:
        """Digests of prompts' blocks that steps in flight, or the one in the making, compute."""
        pending: set[bytes] = set()
        for request in self.sequences.running:
            if request.num_computed - request.num_verified > 1 and request.party == party:
                pending.update(self.kv.unpublished(request.kv, request.num_computed))
        return pending

    def _gains_by_waiting(self, request: Request, hit: Hit, pending: set[bytes]) -> bool:
        """Whether most of what this step would compute of a request is being computed for another
        that begins alike. Then it waits for the cache: requests that come together and share a
        prefix compute it once."""
        left = len(request.tokens) - hit.num_tokens
        soon = self.kv.cached_soon(request.kv, hit, pending)
        return 0 < self._chunk(request, left, self._budget) < 2 * soon

    def _admit(self, step: StepInFlight, request: Request, hit: Hit | None) -> bool:
        """Whether to go on: it was placed, or has just lost its own blocks and is asked again.
        `hit`: what is cached for a sequence without blocks; None for one that kept its own."""
        start = hit.num_tokens if hit else request.num_computed
        end = start + self._chunk(request, len(request.tokens) - start, self._budget)
        end = self._room_for_new(step, request, hit, end)
        if end <= start:
            # It may have lost its own forked blocks just now: then it is asked once more.
            return hit is None and request.num_computed < start
        if hit:
            begun = self.kv.begin(request.kv, hit, end)
            assert begun
            self._note_hit(request, hit)
            request.num_computed = start
        else:
            copies = self.kv.unshare(request.kv, end, step.plan.step_id)
            assert copies is not None
            step.plan.copies += copies
        self._place(step, request, start, end)
        return True

    def _room_for_new(self, step: StepInFlight, request: Request, hit: Hit | None, end: int) -> int:
        """How far the waiting request can come; 0 if it has to wait.

        Beside others it is admitted only if all its known tokens have room, or it would soon
        drive somebody out, or be driven out. Alone it may take what there is.
        """
        sequences = self.sequences
        if sequences.running or step.requests or sequences.in_flight:
            chunk = end - (hit.num_tokens if hit else request.num_computed)
            known = len(request.tokens)
            return end if self.kv.fits(request.kv, hit, known, max(1, chunk)) else 0
        while (room := self.kv.room(request.kv, hit)) < end:
            if not sequences.reclaim(keep=request):
                break
        if room <= (hit.num_tokens if hit else request.num_computed):
            # Its own forked blocks and their copies do not fit side by side: compute it all.
            sequences.drop_blocks(request)
            return 0
        return min(end, room)

    def _note_hit(self, request: Request, hit: Hit) -> None:
        if request.is_new:
            self._num_prompt_tokens += request.num_prompt
        if request.num_preemptions == 0 and request.last_step < 0:
            request.num_cached = hit.num_tokens
            self.kv.prefix_queries += request.num_prompt
            self.kv.prefix_hits += hit.num_tokens

    def _place(self, step: StepInFlight, request: Request, start: int, end: int) -> None:
        """The request takes a row and its first tokens of this residence."""
        plan = step.plan
        row = self.sequences.run(request)
        tables = [table[:] for table in request.kv.tables]
        plan.added.append(
            NewRow(row, request.tokens[:], request.num_prompt, tables, request.sampling)
        )
        emits = end == len(request.tokens)
        plan.rows.append(row)
        plan.starts.append(start)
        plan.counts.append(end - start)
        plan.emits.append(emits)
        step.requests.append(request)
        request.num_pending += request.yields if emits else 0
        request.num_computed = end
        request.last_step = plan.step_id
        self._budget -= end - start

    # ---------------------------------------------------------------- updating

    def update(
        self, plan: StepPlan, output: StepOutput
    ) -> tuple[list[SequenceOutput], list[BeamOutput]]:
        """Take a step's output; plans are updated in the order they were made."""
        if plan.empty:
            return self.drain_outputs(), []
        step = self.sequences.in_flight.popleft()
        if not plan.step_id == step.plan.step_id == output.step_id:
            raise RuntimeError(
                f"step {plan.step_id} (output {output.step_id}) updated out of order: "
                f"step {step.plan.step_id} is due"
            )
        self.sequences.updated_step = plan.step_id
        beams = self.settlement.settle(step, output)
        return self.drain_outputs(), beams

    def drain_outputs(self) -> list[SequenceOutput]:
        """Outputs that came up outside an update: of aborted and finished sequences."""
        return self.settlement.drain_outputs()

    # ---------------------------------------------------------------- state

    @property
    def has_work(self) -> bool:
        """Anything unfinished or in flight."""
        return bool(self.sequences.by_id or self.sequences.in_flight)

    @property
    def num_running(self) -> int:
        return len(self.sequences.running)

    @property
    def num_waiting(self) -> int:
        """Sequences that are neither running nor finished."""
        return len(self.sequences.queue) + self.sequences.num_blocked

    def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes. Always possible: sequences that hold blocks now keep them,
        and publish nothing more."""
        return self.kv.reset_prefix_cache()

    def stats(self) -> EngineStats:
        """Gauges now and counters since start."""
        usage = self.kv.usage()
        return EngineStats(
            step_id=self._next_step,
            num_running=self.num_running,
            num_waiting=self.num_waiting,
            num_waiting_tokens=self.sequences.queue.num_new_tokens,
            kv_used=usage.used,
            kv_total=usage.total,
            num_preemptions=self.sequences.num_preemptions,
            prefix_queries=self.kv.prefix_queries,
            prefix_hits=self.kv.prefix_hits,
            prompt_tokens=self._num_prompt_tokens,
            generation_tokens=self.sequences.num_tokens_generated,
            discarded_tokens=self.sequences.num_tokens_discarded,
            last_step_tokens=self._last_step_tokens,
            num_quarantined=self.admission.quarantine.num_quarantined,
        )
