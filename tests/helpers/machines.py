"""State machines over the KV manager and over the scheduler, for the tests and the mutants."""

from __future__ import annotations

from dataclasses import dataclass

from helpers.null_model import NullEngine, check_pools, check_scheduler, reference_beams
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from trimaran.core.errors import ContextLengthError, QueueFullError, StepError
from trimaran.core.kv.manager import KVManager
from trimaran.core.kv.sequence import SequenceKV
from trimaran.core.sampling_params import BeamSearchParams
from trimaran.core.types import FinishReason

SHAPES: list[tuple[tuple[int | None, ...], tuple[int, ...]]] = [
    ((None,), (2,)),
    ((None,), (3,)),
    ((4,), (2,)),
    ((None, 3), (2, 2)),
    ((None, 5), (4, 2)),
    ((None, 4, 1), (2, 4, 2)),
]
"""Sliding windows and block sizes of the cache groups."""


def quick(max_examples: int, steps: int, *, shrink: bool = True) -> settings:
    """The same examples every time: what a run finds, the next run finds too."""
    phases = [Phase.explicit, Phase.generate] + ([Phase.shrink] if shrink else [])
    return settings(
        max_examples=max_examples,
        stateful_step_count=steps,
        deadline=None,
        derandomize=True,
        database=None,
        phases=phases,
        suppress_health_check=list(HealthCheck),
    )


def some_prompt(family: int, length: int, tail: int) -> list[int]:
    """Prompts of one family share a prefix; `tail` sets the last token apart. The same tokens come
    back at other positions and behind the other family's first token: only the prefix tells."""
    body = [family, *(position % 4 for position in range(1, length))]
    return [*body[: length - 1], tail]


PROMPTS = st.builds(some_prompt, st.integers(0, 1), st.integers(1, 13), st.integers(0, 2))


class SchedulerMachine(RuleBasedStateMachine):
    """The scheduler on the null executor: anything may happen between two steps."""

    @initialize(
        shape=st.sampled_from(SHAPES),
        num_blocks=st.sampled_from([9, 10, 12, 15, 24]),
        run_ahead=st.sampled_from([0, 1, 1]),
        chunked=st.sampled_from([True, True, False]),
        caching=st.sampled_from([True, True, True, False]),
        threshold=st.sampled_from([0, 0, 3]),
        policy=st.sampled_from(["fcfs", "priority", "sjf"]),
        # max_num_seqs, max_num_batched_tokens, max_num_queued_reqs, max_num_queued_tokens
        limits=st.sampled_from(
            [(3, 8, 100, 999), (2, 5, 3, 999), (4, 16, 100, 30), (1, 3, 100, 999)]
        ),
    )
    def start(
        self,
        shape: tuple[tuple[int | None, ...], tuple[int, ...]],
        num_blocks: int,
        run_ahead: int,
        chunked: bool,
        caching: bool,
        threshold: int,
        policy: str,
        limits: tuple[int, int, int, int],
    ) -> None:
        windows, sizes = shape
        self.engine = NullEngine(
            num_blocks=num_blocks,
            windows=windows,
            block_sizes=sizes,
            prefix_caching=caching,
            run_ahead=run_ahead,
            enable_chunked_prefill=chunked,
            long_prefill_token_threshold=threshold,
            policy=policy,
            max_num_seqs=limits[0],
            max_num_batched_tokens=limits[1],
            max_model_len=20,
            max_num_queued_reqs=limits[2],
            max_num_queued_tokens=limits[3],
        )
        self.queued: dict[str, int] = {}  # requests that were never started → prompt tokens
        self.cuts: dict[tuple[str, int], int] = {}
        self.num_failures = 0

    # ---------------------------------------------------------------- requests

    @rule(
        prompt=PROMPTS,
        max_tokens=st.integers(1, 9),
        n=st.sampled_from([1, 1, 1, 2, 3]),
        salt=st.sampled_from([0, 0, 0, 1]),
        priority=st.integers(0, 2),
        min_tokens=st.sampled_from([0, 0, 2]),
        logprobs=st.sampled_from([None, None, None, 2]),
        prompt_logprobs=st.sampled_from([None, None, None, 0]),
    )
    def add(self, prompt: list[int], min_tokens: int, max_tokens: int, **params: object) -> None:
        min_tokens = min(min_tokens, max_tokens)
        self._add(prompt, max_tokens=max_tokens, min_tokens=min_tokens, **params)

    @rule(
        prompt=PROMPTS,
        width=st.integers(1, 3),
        max_tokens=st.integers(1, 5),
        ignore_eos=st.booleans(),
        salt=st.sampled_from([0, 0, 1]),
    )
    def add_beams(
        self, prompt: list[int], width: int, max_tokens: int, ignore_eos: bool, salt: int
    ) -> None:
        params = BeamSearchParams(
            beam_width=width, max_tokens=max_tokens, ignore_eos=ignore_eos, length_penalty=0.5
        )
        self._add(prompt, beam=params, salt=salt)

    def _add(self, prompt: list[int], **params: object) -> None:
        config = self.engine.config
        full = (
            len(self.queued) + 1 > config.max_num_queued_reqs
            or sum(self.queued.values()) + len(prompt) > config.max_num_queued_tokens
        )
        try:
            request_id = self.engine.add(prompt, **params)
        except QueueFullError as error:
            assert full and error.retry_after > 0
        except ContextLengthError:
            pass
        except StepError:
            assert self.num_failures > 1
        else:
            assert not full, "the queue takes more than its limit"
            self.queued[request_id] = len(prompt)

    def _pick(self, number: int) -> str | None:
        ids = list(self.engine.scheduler.sequences.by_id)
        return ids[number % len(ids)] if ids else None

    @rule(number=st.integers(0, 20))
    def abort(self, number: int) -> None:
        request_id = self._pick(number)
        if request_id is not None:
            self.engine.scheduler.abort(request_id)
            self.queued.pop(request_id, None)

    @rule(number=st.integers(0, 20), index=st.integers(0, 2), at_token=st.integers(0, 6))
    def finish(self, number: int, index: int, at_token: int) -> None:
        request_id = self._pick(number)
        children = self.engine.scheduler.sequences.by_id.get(request_id or "", [])
        for child in children[:]:
            if child.index == index and child.origin.beam is None:
                self.cuts[child.request_id, index] = at_token
                self.engine.scheduler.finish(child.request_id, index, at_token)
                if index == 0:  # it was the one that queued
                    self.queued.pop(child.request_id, None)

    @rule()
    def reset_prefix_cache(self) -> None:
        assert self.engine.scheduler.reset_prefix_cache()

    # ---------------------------------------------------------------- steps

    @precondition(lambda self: len(self.engine.executor.in_flight) <= self.engine.config.run_ahead)
    @rule(fault=st.sampled_from([None] * 20 + ["row", "step"]))
    def schedule(self, fault: str | None) -> None:
        self.engine.executor.fail_rows = fault == "row"
        self.engine.executor.fail_step = fault == "step"
        self.num_failures += fault == "step"
        plan = self.engine.plan()
        self.engine.executor.fail_rows = self.engine.executor.fail_step = False
        self._note_started()
        assert plan.num_tokens <= self.engine.config.max_num_batched_tokens

    @rule()
    def settle(self) -> None:
        if self.engine.executor.in_flight:
            self.engine.settle()

    @rule(steps=st.integers(1, 8))
    def run_steps(self, steps: int) -> None:
        for _ in range(steps):
            while len(self.engine.executor.in_flight) > self.engine.config.run_ahead:
                self.engine.settle()
            self.engine.step()
            self._note_started()

    def _note_started(self) -> None:
        """A request leaves the queue when it gets a row; what has ended is not in it either."""
        by_id = self.engine.scheduler.sequences.by_id
        for request_id in list(self.queued):
            children = by_id.get(request_id, [])
            if not children or any(child.last_step >= 0 for child in children):
                del self.queued[request_id]

    # ---------------------------------------------------------------- truth

    @invariant()
    def pools_are_sound(self) -> None:
        if hasattr(self, "engine"):
            check_scheduler(self.engine.scheduler)
            sequences = self.engine.scheduler.sequences
            orders = [request.order for request in sequences.running]
            assert orders == sorted(orders)
            rows = [request.row for request in sequences.running]
            assert len(set(rows)) == len(rows)

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        engine = self.engine
        engine.run()
        engine.check_results(self.cuts)
        engine.check_drained()
        self._check_counter()
        self._check_beams()

    def _check_counter(self) -> None:
        """Every token that was told is counted, and what `finish` cut off of them."""
        told = cut = 0
        for key, result in self.engine.results.items():
            told += len(result.tokens)
            cut += max(0, len(result.tokens) - self.cuts.get(key, len(result.tokens)))
        for beam in self.engine.beams.values():
            told += sum(len(tokens) for tokens in beam.token_ids)
        stats = self.engine.scheduler.stats()
        assert (stats.generation_tokens, stats.discarded_tokens) == (told, cut)

    def _check_beams(self) -> None:
        for request_id, found in self.engine.beams.items():
            request = self.engine.requests[request_id]
            assert request.beam is not None
            prompt = request.prompt.token_ids
            max_model_len = self.engine.config.max_model_len
            expected = reference_beams(request.cache_root, prompt, request.beam, max_model_len)
            assert found.token_ids == [tokens for _, tokens in expected]
        for (request_id, index), result in self.engine.results.items():
            params = self.engine.requests[request_id].params
            if params.prompt_logprobs is not None and index == 0 and result.tokens:
                positions = [-entry.logprobs[0] for entry in result.prompt_logprobs]
                num_prompt = len(self.engine.requests[request_id].prompt)
                assert positions == list(range(num_prompt - 1))
            if params.logprobs is not None:
                assert len(result.logprobs) == len(result.tokens)
            if result.finish_reason is FinishReason.ERROR:
                assert result.error


@dataclass
class Holder:
    """A live sequence of the KV machine: its tokens and how many are computed."""

    kv: SequenceKV
    root: int
    tokens: list[int]
    computed: int


@dataclass(frozen=True)
class Group:
    block_size: int
    num_blocks: int
    sliding_window: int | None


class KVMachine(RuleBasedStateMachine):
    """The KV manager alone, with simulated memory: slot → (token, position, prefix)."""

    @initialize(
        shape=st.sampled_from(SHAPES),
        num_blocks=st.sampled_from([7, 9, 12, 20]),
        caching=st.sampled_from([True, True, True, False]),
    )
    def start(
        self,
        shape: tuple[tuple[int | None, ...], tuple[int, ...]],
        num_blocks: int,
        caching: bool,
    ) -> None:
        windows, sizes = shape
        self.groups = [Group(s, num_blocks, w) for s, w in zip(sizes, windows, strict=True)]
        self.manager = KVManager(self.groups, caching)
        self.memory: dict[tuple[int, int, int], object] = {}
        self.live: list[Holder] = []
        # What a step in flight may still read: step → (group, block) → contents by slot.
        self.in_flight: dict[int, dict[tuple[int, int], dict[int, object]]] = {}
        # What a transfer may still read.
        self.leases: list[dict[tuple[int, int], dict[int, object]]] = []
        self.step = 0

    def _content(self, holder: Holder, position: int) -> object:
        return (holder.root, tuple(holder.tokens[: position + 1]))

    def _scrub(self) -> None:
        for group, block in self.manager.take_scrubs():
            for slot in range(self.groups[group].block_size):
                self.memory.pop((group, block, slot), None)

    def _write(self, holder: Holder, start: int, end: int) -> None:
        self._scrub()
        for g, group in enumerate(self.groups):
            for position in range(start, end):
                block = holder.kv.tables[g][position // group.block_size]
                assert block != 0, "writes to scratch"
                self.memory[g, block, position % group.block_size] = self._content(holder, position)

    def _snapshot(self, blocks: list[tuple[int, int]]) -> dict[tuple[int, int], dict[int, object]]:
        return {
            (g, block): {
                slot: self.memory[g, block, slot]
                for slot in range(self.groups[g].block_size)
                if (g, block, slot) in self.memory
            }
            for g, block in blocks
        }

    @rule(prompt=PROMPTS, root=st.sampled_from([0, 0, 1]), part=st.integers(1, 13))
    def begin(self, prompt: list[int], root: int, part: int) -> None:
        kv = self.manager.sequence(root.to_bytes(32, "little"))
        hit = self.manager.find_hit(kv, prompt)
        assert hit.num_tokens < len(prompt), "the last token is not left to recompute"
        end = min(len(prompt), hit.num_tokens + part)
        before = self.manager.usage()
        if not self.manager.begin(kv, hit, end):
            assert self.manager.usage() == before and not kv.holds_blocks
            return
        holder = Holder(kv, root, list(prompt), end)
        self.live.append(holder)
        self._write(holder, hit.num_tokens, end)
        self.manager.commit(kv, holder.tokens, end)

    def _pick(self, number: int) -> Holder | None:
        return self.live[number % len(self.live)] if self.live else None

    @rule(number=st.integers(0, 20), count=st.integers(1, 6), token=st.integers(0, 1))
    def advance(self, number: int, count: int, token: int) -> None:
        holder = self._pick(number)
        if holder is None:
            return
        if holder.computed + count > len(holder.tokens):
            holder.tokens += [token] * (holder.computed + count - len(holder.tokens))
        end = holder.computed + count
        before = [table[:] for table in holder.kv.tables]
        if holder.kv.copies:
            # The parent goes on writing behind what is copied.
            sources = {
                (g, block): {
                    slot: self.memory[g, block, slot]
                    for slot in range(holder.computed % self.groups[g].block_size)
                }
                for g, block in holder.kv.copies
            }
            copies = self.manager.unshare(holder.kv, end, self.step)
            if copies is None:
                return
            self._scrub()
            for group, source, target in copies:
                assert self.manager.groups[group].pool.refs[target] == 1, "copies onto shared block"
                for slot in range(self.groups[group].block_size):
                    self.memory[group, target, slot] = self.memory.get((group, source, slot))
            self.in_flight.setdefault(self.step, {}).update(sources)
        elif end > holder.kv.capacity and self.manager.grow(holder.kv, end) is None:
            assert before == holder.kv.tables
            return
        self._write(holder, holder.computed, end)
        holder.computed = end
        self.manager.commit(holder.kv, holder.tokens, end)

    @rule(number=st.integers(0, 20), back=st.integers(0, 1))
    def fork(self, number: int, back: int) -> None:
        source = self._pick(number)
        if source is None or source.kv.copies or source.computed <= back:
            return
        computed = source.computed - back
        kv = self.manager.sequence(source.root.to_bytes(32, "little"))
        if self.manager.fork(source.kv, kv, computed):
            self.live.append(Holder(kv, source.root, source.tokens[:computed], computed))

    @rule(
        number=st.integers(0, 20),
        in_step=st.booleans(),
        taint=st.sampled_from([False] * 5 + [True]),
    )
    def release(self, number: int, in_step: bool, taint: bool) -> None:
        holder = self._pick(number)
        if holder is None:
            return
        self.live.remove(holder)
        if taint:
            self.manager.taint(holder.kv, 0)
        elif in_step:
            read = [(g, b) for g, table in enumerate(holder.kv.tables) for b in table if b]
            self.in_flight.setdefault(self.step, {}).update(self._snapshot(read))
        self.manager.release(holder.kv, self.step if in_step else None)
        assert not holder.kv.holds_blocks

    @rule()
    def end_step(self) -> None:
        self.in_flight.pop(self.step, None)
        self.manager.end_step(self.step)
        self.step += 1

    @rule(number=st.integers(0, 20))
    def lease(self, number: int) -> None:
        holder = self._pick(number)
        if holder is not None:
            full = [
                (g, block)
                for g, group in enumerate(self.groups)
                for block in holder.kv.tables[g][: holder.computed // group.block_size]
                if block
            ]
            for g, block in full:
                self.manager.groups[g].pool.acquire(block)
            self.leases.append(self._snapshot(full))

    @rule()
    def release_lease(self) -> None:
        if self.leases:
            for g, block in self.leases.pop(0):
                self.manager.groups[g].pool.release([block])

    @rule()
    def reset(self) -> None:
        self.manager.reset_prefix_cache()

    @invariant()
    def memory_is_intact(self) -> None:
        if not hasattr(self, "manager"):
            return
        for holder in self.live:
            for g, group in enumerate(self.groups):
                first = 0
                if group.sliding_window is not None:
                    first = max(0, holder.computed - group.sliding_window + 1)
                for position in range(first, holder.computed):
                    index = position // group.block_size
                    table = holder.kv.tables[g]
                    copies = dict(holder.kv.copies)
                    block = table[index] if index < len(table) else copies[g]
                    found = self.memory.get((g, block, position % group.block_size))
                    assert found == self._content(holder, position) and block != 0
        for snapshot in [*self.in_flight.values(), *self.leases]:
            for (g, block), slots in snapshot.items():
                for slot, content in slots.items():
                    assert self.memory.get((g, block, slot)) == content, "a held block changed"

    @invariant()
    def counts_are_exact(self) -> None:
        if not hasattr(self, "manager"):
            return
        owners = [holder.kv for holder in self.live]
        leased = [block for lease in self.leases for block in lease]
        check_pools(self.manager, owners, leased)
        usage = self.manager.usage()
        assert usage.used + usage.free == usage.total

    def teardown(self) -> None:
        if not hasattr(self, "manager"):
            return
        while self.live:
            self.manager.release(self.live.pop().kv, None)
        while self.leases:
            self.release_lease()
        for step in range(self.step + 1):
            self.manager.end_step(step)
        assert self.manager.usage().used == 0, "blocks leaked"
