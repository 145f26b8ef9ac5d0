"""An executor without a model: it keeps KV *meaning* instead of values, and checks every read.

Each cache slot remembers which token, at which position, behind which prefix, was written there.
Before a step is taken as good, everything that attention would read must be exactly the row's own.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

import torch

from trimaran.core.config import CacheConfig, CacheGroupConfig, SchedulerConfig
from trimaran.core.engine.messages import BeamOutput, EngineRequest, SequenceOutput
from trimaran.core.kv.manager import KVManager
from trimaran.core.kv.sequence import SequenceKV
from trimaran.core.plan import NewRow, RowSampling, StepOutput, StepPlan
from trimaran.core.sampling_params import BeamSearchParams, SamplingParams
from trimaran.core.scheduler import Scheduler
from trimaran.core.types import FinishReason, PositionLogprobs, Prompt

VOCAB = 50
EOS = 0
NAN = "nan"
Content = tuple[int, int, int] | str


def mix(*values: int) -> int:
    """A deterministic hash of small ints."""
    return zlib.crc32(b"".join(value.to_bytes(8, "little", signed=True) for value in values))


def sampled_token(seed: int, child: int, position: int) -> int:
    """What the null model draws: a pure function of the request and the position. Never EOS for
    even seeds, so that some requests run to their limit."""
    token = mix(seed, child, position) % VOCAB
    return token or (1 if seed % 2 == 0 else 0)


def top_tokens(history: int, count: int) -> PositionLogprobs:
    """The most probable tokens behind a prefix, for beam search."""
    scored = [(-((mix(history, token) % 100_003) / 10_000), token) for token in range(VOCAB)]
    scored.sort(reverse=True)
    best = scored[:count]
    ranks = list(range(1, len(best) + 1))
    return PositionLogprobs([token for _, token in best], [score for score, _ in best], ranks)


def prefix_history(root: bytes, tokens: Iterable[int]) -> list[int]:
    """[i]: a digest of the root and tokens[:i]."""
    histories = [zlib.crc32(root)]
    for token in tokens:
        histories.append(mix(histories[-1], token))
    return histories


class KVError(AssertionError):
    """A row would read something that is not its own KV."""


@dataclass
class Row:
    sampling: RowSampling
    tokens: list[int]
    histories: list[int]
    tables: list[list[int]]
    poisoned: bool = False  # it met NaN: until it is removed, it yields nothing sane


@dataclass
class Flight:
    plan: StepPlan
    output: StepOutput
    # Blocks a row reads or writes in this step → the rows' requests.
    touched: dict[tuple[int, int], set[tuple[int, int]]] = field(default_factory=dict)


class NullExecutor:
    """Executes plans as they come. `roots` and `prompt_lengths` tell by the seed what a request is.

    `fail_rows` and `fail_step` concern the next plan.
    """

    def __init__(self, config: SchedulerConfig, cache: CacheConfig) -> None:
        self.config = config
        self.groups = cache.groups
        self.roots: dict[int, bytes] = {}
        self.prompt_lengths: dict[int, int] = {}
        self.rows: dict[int, Row] = {}
        self.memory: dict[tuple[int, int, int], Content] = {}
        self.in_flight: deque[Flight] = deque()
        self.drawn: set[tuple[int, int, int]] = set()  # (seed, child, position)
        self.fail_rows = False
        self.fail_step = False

    def submit(self, plan: StepPlan) -> None:
        self._check_shape(plan)
        flight = Flight(plan, StepOutput(plan.step_id, [[] for _ in plan.rows]))
        self._apply_deltas(plan)
        for new in plan.added:  # what a row starts from was computed in an earlier step
            start = plan.starts[plan.rows.index(new.row)]
            self._check_content(self.rows[new.row], start, start)
        if not self.config.mixed_batches:
            self._check_kind(plan)
        self._write(flight)
        self._check_reads(plan)
        self._yield_tokens(flight)
        self.in_flight.append(flight)

    def pop(self) -> tuple[StepPlan, StepOutput]:
        flight = self.in_flight.popleft()
        return flight.plan, flight.output

    # ---------------------------------------------------------------- the plan's form

    def _check_shape(self, plan: StepPlan) -> None:
        count = len(plan.rows)
        assert count == len(plan.starts) == len(plan.counts) == len(plan.emits)
        assert len(set(plan.rows)) == count, "a row is scheduled twice"
        assert all(0 <= row < self.config.max_num_seqs for row in plan.rows), "no such row"
        assert plan.num_tokens <= self.config.max_num_batched_tokens, "over the token budget"
        assert all(tokens > 0 for tokens in plan.counts), "a row computes nothing"

    def _apply_deltas(self, plan: StepPlan) -> None:
        for row in plan.removed:
            self.rows.pop(row, None)
        for new in plan.added:
            assert new.row not in self.rows, f"row {new.row} is taken"
            self.rows[new.row] = self._new_row(new)
        assert len(self.rows) <= self.config.max_num_seqs, "more rows than max_num_seqs"
        for row, group, blocks in plan.blocks:
            self.rows[row].tables[group] += blocks
        for group, block in plan.scrubs:
            for slot in range(self.groups[group].block_size):
                self.memory.pop((group, block, slot), None)
        for group, source, target in plan.copies:
            for slot in range(self.groups[group].block_size):
                content = self.memory.get((group, source, slot))
                # A parent may fail in the very step before the copy: that NaN lies behind what
                # the fork reads, and nobody can know of it yet.
                if content is None or content == NAN:
                    self.memory.pop((group, target, slot), None)
                else:
                    self.memory[group, target, slot] = content

    def _new_row(self, new: NewRow) -> Row:
        tables = [list(table) for table in new.block_ids]
        histories = prefix_history(self.roots[new.sampling.seed], new.token_ids)
        return Row(new.sampling, list(new.token_ids), histories, tables)

    def _check_kind(self, plan: StepPlan) -> None:
        """Rows that catch up, or rows that take their next token: never both."""
        started = {new.row for new in plan.added}
        kinds = set()
        for i, row in enumerate(plan.rows):
            num_prompt = self.prompt_lengths[self.rows[row].sampling.seed]
            decodes = row not in started and plan.counts[i] == 1 and plan.emits[i]
            if plan.starts[i] >= num_prompt or not decodes:
                kinds.add(decodes)
        assert len(kinds) < 2, "prompts are computed in a step that decodes"

    # ---------------------------------------------------------------- the cache

    def _write(self, flight: Flight) -> None:
        plan = flight.plan
        for row_id, start, count in zip(plan.rows, plan.starts, plan.counts, strict=True):
            row = self.rows[row_id]
            owner = (row.sampling.seed, row.sampling.child_index)
            assert start + count <= len(row.tokens), "computes a token that nobody knows"
            for g, group in enumerate(self.groups):
                for position in range(start, start + count):
                    block = row.tables[g][position // group.block_size]
                    self._check_write(g, block, owner)
                    content = (row.tokens[position], position, row.histories[position])
                    self.memory[g, block, position % group.block_size] = content
                for block in self._read_blocks(row, g, start, start + count):
                    flight.touched.setdefault((g, block), set()).add(owner)

    def _check_write(self, g: int, block: int, owner: tuple[int, int]) -> None:
        if block == 0:
            raise KVError("writes KV to the scratch block")
        for flight in self.in_flight:
            if flight.touched.get((g, block), {owner}) != {owner}:
                raise KVError(f"block {block} of group {g} is in use by a step in flight")

    def _read_blocks(self, row: Row, g: int, start: int, end: int) -> set[int]:
        group = self.groups[g]
        first = 0 if group.sliding_window is None else max(0, start - group.sliding_window + 1)
        indices = range(first // group.block_size, (end - 1) // group.block_size + 1)
        return {row.tables[g][index] for index in indices}

    def _check_reads(self, plan: StepPlan) -> None:
        for row_id, start, count in zip(plan.rows, plan.starts, plan.counts, strict=True):
            row = self.rows[row_id]
            if row.poisoned:
                continue
            self._check_content(row, start, start + count)
            for g, group in enumerate(self.groups):
                for block in self._read_blocks(row, g, start, start + count):
                    for slot in range(group.block_size):
                        if self.memory.get((g, block, slot)) == NAN:
                            raise KVError(f"block {block} of group {g} still holds NaN")

    def _check_content(self, row: Row, start: int, end: int) -> None:
        """The cache holds what queries from `start` on read of the positions before `end`."""
        for g, group in enumerate(self.groups):
            window = group.sliding_window
            first = 0 if window is None else max(0, start - window + 1)
            table, size = row.tables[g], group.block_size
            for position in range(first, end):
                block = table[position // size]
                found = self.memory.get((g, block, position % size))
                expected = (row.tokens[position], position, row.histories[position])
                if found != expected or block == 0:
                    raise KVError(
                        f"group {g} position {position} block {block}: {found}, not {expected}"
                    )

    def _poison(self, plan: StepPlan, index: int) -> None:
        row = self.rows[plan.rows[index]]
        row.poisoned = True
        for g, group in enumerate(self.groups):
            for position in range(plan.starts[index], plan.starts[index] + plan.counts[index]):
                block = row.tables[g][position // group.block_size]
                self.memory[g, block, position % group.block_size] = NAN

    # ---------------------------------------------------------------- the output

    def _yield_tokens(self, flight: Flight) -> None:
        plan, output = flight.plan, flight.output
        fail_rows, self.fail_rows = self.fail_rows, False
        for i, (row_id, emits) in enumerate(zip(plan.rows, plan.emits, strict=True)):
            row = self.rows[row_id]
            end = plan.starts[i] + plan.counts[i]
            assert emits == (end == len(row.tokens)), "emits is not what the tokens say"
            self._prompt_logprobs(flight, i, row)
            if not emits:
                continue
            if fail_rows or row.poisoned:
                fail_rows = False
                output.failed.append(i)
                self._poison(plan, i)
            if row.sampling.beam_width:
                count = row.sampling.logprobs or 0
                output.logprobs[i] = [top_tokens(row.histories[end], count)]
                continue
            token = sampled_token(row.sampling.seed, row.sampling.child_index, end)
            key = (row.sampling.seed, row.sampling.child_index, end)
            assert key not in self.drawn, f"the token at {key} is drawn twice: its output was lost"
            self.drawn.add(key)
            row.tokens.append(token)
            row.histories.append(mix(row.histories[-1], token))
            output.tokens[i] = [] if i in output.failed else [token]
            if row.sampling.logprobs is not None and output.tokens[i]:
                output.logprobs[i] = [PositionLogprobs([token], [-float(end)], [1])]
        if self.fail_step:
            self.fail_step = False
            for i in range(len(plan.rows)):
                self._poison(plan, i)
            flight.output = StepOutput(
                plan.step_id, [[] for _ in plan.rows], error="RuntimeError: injected"
            )

    def _prompt_logprobs(self, flight: Flight, i: int, row: Row) -> None:
        plan = flight.plan
        if row.sampling.prompt_logprobs is None:
            return
        num_prompt = self.prompt_lengths[row.sampling.seed]
        last = min(plan.starts[i] + plan.counts[i], num_prompt - 1)
        positions = range(plan.starts[i], last)
        if positions:
            flight.output.prompt_logprobs[i] = [
                PositionLogprobs([row.tokens[p + 1]], [-float(p)], [1]) for p in positions
            ]


@dataclass
class Result:
    tokens: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    error: str | None = None
    num_cached: int = 0
    num_preemptions: int = 0
    prompt_logprobs: list[PositionLogprobs] = field(default_factory=list)
    logprobs: list[PositionLogprobs] = field(default_factory=list)


class NullEngine:
    """A scheduler on the null executor, as the engine drives it, with what came out."""

    def __init__(
        self,
        *,
        num_blocks: int = 64,
        block_size: int = 4,
        windows: tuple[int | None, ...] = (None,),
        block_sizes: tuple[int, ...] | None = None,
        prefix_caching: bool = True,
        **config: object,
    ) -> None:
        defaults: dict[str, object] = {
            "max_model_len": 64,
            "max_num_seqs": 4,
            "max_num_batched_tokens": 16,
        }
        self.config = SchedulerConfig(**(defaults | config))  # type: ignore[arg-type]
        sizes = block_sizes or (block_size,) * len(windows)
        groups = tuple(
            CacheGroupConfig(
                name=f"g{g}",
                layers=(g,),
                block_size=size,
                num_blocks=num_blocks,
                sliding_window=window,
            )
            for g, (window, size) in enumerate(zip(windows, sizes, strict=True))
        )
        self.cache = CacheConfig(
            groups=groups, dtype=torch.float32, enable_prefix_caching=prefix_caching
        )
        self.now = 0.0
        self.scheduler = Scheduler(self.config, self.cache, clock=lambda: self.now)
        self.executor = NullExecutor(self.config, self.cache)
        self.results: dict[tuple[str, int], Result] = {}
        self.beams: dict[str, BeamOutput] = {}
        self.requests: dict[str, EngineRequest] = {}

    def add(
        self,
        prompt: list[int],
        *,
        request_id: str | None = None,
        seed: int | None = None,
        salt: int = 0,
        eos: bool = True,
        priority: int = 0,
        beam: BeamSearchParams | None = None,
        **params: object,
    ) -> str:
        """Queue a request; raises what the scheduler raises."""
        number = len(self.requests)
        request_id = request_id or f"r{number}"
        seed = number if seed is None else seed
        settings = {"max_tokens": 8, "seed": seed, "ignore_eos": not eos} | params
        request = EngineRequest(
            request_id,
            Prompt.of_tokens(prompt),
            SamplingParams(**settings),  # type: ignore[arg-type]
            eos_token_ids=[EOS],
            cache_root=salt.to_bytes(32, "little"),
            priority=priority,
            beam=beam,
        )
        self.executor.roots[seed] = request.cache_root
        self.executor.prompt_lengths[seed] = len(prompt)
        self.scheduler.add(request)
        self.requests[request_id] = request
        return request_id

    def plan(self) -> StepPlan:
        """Schedule a step, and execute it unless it is empty."""
        plan = self.scheduler.schedule()
        if not plan.empty:
            self.executor.submit(plan)
        return plan

    def settle(self) -> None:
        """Update the oldest step in flight."""
        self._take(*self.scheduler.update(*self.executor.pop()))

    def step(self) -> StepPlan:
        plan = self.plan()
        in_flight = len(self.executor.in_flight)
        if in_flight and (plan.empty or in_flight > self.config.run_ahead):
            self.settle()
        else:
            self._take(self.scheduler.drain_outputs(), [])
        return plan

    def run(self, limit: int = 4000) -> None:
        """Until nothing is left; a scheduler that stands still is an error."""
        for _ in range(limit):
            if not self.scheduler.has_work:
                self._take(self.scheduler.drain_outputs(), [])
                return
            was_idle = not self.executor.in_flight
            if self.step().empty and was_idle and self.scheduler.has_work:
                raise AssertionError(f"stands still: {self.scheduler.sequences.by_id}")
        raise AssertionError(f"no end after {limit} steps: {self.scheduler.sequences.by_id}")

    def _take(self, outputs: list[SequenceOutput], beams: list[BeamOutput]) -> None:
        for output in outputs:
            result = self.results.setdefault((output.request_id, output.index), Result())
            assert result.finish_reason is None, f"{output} follows the last output"
            result.tokens += output.token_ids
            result.logprobs += output.logprobs or []
            result.prompt_logprobs += output.prompt_logprobs or []
            result.finish_reason = output.finish_reason
            result.stop_reason = output.stop_reason
            result.error = output.error
            result.num_cached += output.num_cached
            result.num_preemptions = output.num_preemptions
        for beam in beams:
            assert beam.request_id not in self.beams
            self.beams[beam.request_id] = beam

    # ---------------------------------------------------------------- what must come out

    def expected(self, request_id: str, index: int) -> tuple[list[int], FinishReason]:
        """The sequence a request must yield, whatever the schedule was."""
        request = self.requests[request_id]
        params, num_prompt = request.params, len(request.prompt)
        limit = self.config.max_model_len - num_prompt
        limit = min(limit, params.max_tokens or limit)
        ends = set(params.stop_token_ids) | (set() if params.ignore_eos else {EOS})
        tokens: list[int] = []
        assert params.seed is not None
        while len(tokens) < limit:
            token = sampled_token(params.seed, index, num_prompt + len(tokens))
            tokens.append(token)
            if token in ends and len(tokens) > params.min_tokens:
                return tokens, FinishReason.STOP
        return tokens, FinishReason.LENGTH

    def check_results(self, cut: Collection[tuple[str, int]] = ()) -> None:
        """Every sequence that ended by itself has exactly its tokens; others (also those of
        `cut`, which were ended by `finish`) a part of them."""
        for request_id, request in self.requests.items():
            if request.beam is not None:
                continue
            for index in range(request.params.n):
                result = self.results[request_id, index]
                tokens, reason = self.expected(request_id, index)
                by_itself = result.finish_reason in (FinishReason.STOP, FinishReason.LENGTH)
                if by_itself and (request_id, index) not in cut:
                    assert (result.tokens, result.finish_reason) == (tokens, reason), request_id
                else:
                    assert result.tokens == tokens[: len(result.tokens)], request_id

    def check_drained(self) -> None:
        """Nothing is held any more, and every pool is sound."""
        assert not self.scheduler.has_work
        assert self.scheduler.kv.usage().used == 0, "blocks leaked"
        assert self.scheduler.num_waiting == self.scheduler.num_running == 0
        queue = self.scheduler.sequences.queue
        assert queue.num_new == queue.num_new_tokens == 0
        check_scheduler(self.scheduler)


def check_scheduler(scheduler: Scheduler) -> None:
    children = [child for group in scheduler.sequences.by_id.values() for child in group]
    check_pools(scheduler.kv, [child.kv for child in children])


def check_pools(
    manager: KVManager, owners: list[SequenceKV], leased: Iterable[tuple[int, int]] = ()
) -> None:
    """free + used = total; the free list is exactly the blocks without lease; counts match the
    owners; the index holds only blocks that say so themselves."""
    leased = list(leased)
    for g, group in enumerate(manager.groups):
        pool = group.pool
        leases = [0] * pool.num_blocks
        for kv in owners:
            for block in kv.tables[g]:
                leases[block] += 1
            for copied, block in kv.copies:
                leases[block] += copied == g
        for held in (held for entries in manager._held.values() for held in entries):
            for block in held.tables[g]:
                leases[block] += 1
            for copied, block in held.copies:
                leases[block] += copied == g
        for lease_group, block in leased:
            leases[block] += lease_group == g
        leases[0] = 0
        assert leases == pool.refs, f"group {g}: leases {leases}, counts {pool.refs}"
        free = pool.free_list()
        assert len(free) == pool.num_free == len(set(free))
        assert sorted(free) == [b for b in range(1, pool.num_blocks) if pool.refs[b] == 0]
        assert pool.num_used + pool.num_free == pool.num_blocks - 1
        indexed = [block for blocks in pool.index.values() for block in blocks]
        assert len(indexed) == len(set(indexed))
        assert all(pool.digests[b] == d for d, blocks in pool.index.items() for b in blocks)
        assert sorted(indexed) == [b for b, d in enumerate(pool.digests) if d is not None]
        assert not pool.tainted.intersection(indexed)


def reference_beams(
    root: bytes, prompt: list[int], params: BeamSearchParams, max_model_len: int
) -> list[tuple[float, list[int]]]:
    """Beam search as `transformers` does it, over the null model: (score, tokens), best first."""
    width, penalty = params.beam_width, params.length_penalty
    ends = set() if params.ignore_eos else {EOS}
    keep = max(2, 1 + len(ends)) * width
    max_length = min(max_model_len, len(prompt) + params.max_tokens)
    running: list[tuple[float, list[int]]] = [(0.0, [])]
    finished: list[tuple[float, list[int]]] = []
    while True:
        flat = []
        for beam, (score, tokens) in enumerate(running):
            top = top_tokens(prefix_history(root, prompt + tokens)[-1], keep)
            for token, logprob in zip(top.token_ids, top.logprobs, strict=True):
                flat.append((score + logprob, beam, token))
        flat.sort(key=lambda entry: (-entry[0], entry[1], entry[2]))
        following, going = flat[:keep], []
        for place, (score, beam, token) in enumerate(following):
            tokens = [*running[beam][1], token]
            if token in ends or len(prompt) + len(tokens) >= max_length:
                if place < width:
                    finished.append((score / len(tokens) ** penalty, tokens))
            else:
                going.append((score, tokens))
        finished = sorted(finished, key=lambda entry: -entry[0])[:width]
        running = going[:width]
        if not running:
            return finished
        best = running[0][0] / len(running[0][1]) ** penalty
        if len(finished) == width and best <= finished[-1][0]:
            return finished
