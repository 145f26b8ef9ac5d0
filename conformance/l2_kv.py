"""L2: random programs over one layer's cache against a model of it: a dict from (block, offset) to
the key and value that stand there. Launches are queued as far as the platform lets them run ahead,
and the host writes to its own tensors as soon as it may."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from ..core.errors import PlatformError
from ..core.ops import OpBinder
from ..platforms.attention_reference import attend
from ..platforms.interface import AttentionBatch, AttentionImpl, AttentionSpec, Device, Event
from ..platforms.ops import Tolerance
from .attention_specs import dtypes, kv_dtypes, spec_for
from .base import Check, Failed, Skipped, Subject
from .compare import difference
from .l1_attention import implementation, slot_dtype
from .lab import opened
from .paged import TOLERANCE
from .shrink import smallest

T = TypeVar("T")

BLOCKS = 8  # block 0 is scratch: written by padding, never read
SHAPES = ("gqa", "window")
PROGRAMS, QUICK_PROGRAMS = 25, 5
LENGTH = 30


class Write(NamedTuple):
    """Tokens at these slots, with values from `seed`; slot 0 is padding."""

    slots: tuple[int, ...]
    seed: int


class Move(NamedTuple):
    """Blocks, (source, target) each, as one call."""

    pairs: tuple[tuple[int, int], ...]


class Scrub(NamedTuple):
    """Blocks are filled with 0, through their regions."""

    blocks: tuple[int, ...]


class Import(NamedTuple):
    """Blocks are overwritten, with values from `seed`."""

    blocks: tuple[int, ...]
    seed: int


class Export(NamedTuple):
    """Blocks are read, and compared with the model."""

    blocks: tuple[int, ...]


class Attend(NamedTuple):
    """`queries` at the end of a sequence of `length` tokens in `blocks`."""

    blocks: tuple[int, ...]
    length: int
    queries: int
    seed: int


Operation = Write | Move | Scrub | Import | Export | Attend


def checks(subject: Subject) -> list[Check]:
    platform = subject.platform()
    kept = kv_dtypes(platform, subject.device)
    found = []
    for number, dtype in enumerate(dtypes(platform, subject.device)):
        cached = dtype if dtype in kept or not kept else kept[0]
        for shape in SHAPES[: 1 if number or subject.quick else None]:
            spec = spec_for(subject, shape, dtype, cached, number)
            at = f"programs/{shape}/{str(dtype).removeprefix('torch.')}"
            found.append(_check(subject, OpBinder(platform), at, spec))
    for cached in (one for one in kept if one.itemsize == 1 and one.is_floating_point):
        at = f"programs/gqa/{str(cached).removeprefix('torch.')}"
        found.append(_check(subject, OpBinder(platform), at, spec_for(subject, kv_dtype=cached)))
    return found


def _check(subject: Subject, binder: OpBinder, at: str, spec: AttentionSpec) -> Check:
    """With the implementation that an engine would take. Where there is none, `L1` says whether
    there has to be one."""
    try:
        name = binder.attention(spec).name
    except PlatformError as error:
        return Check(at, partial(_skip, str(error)), required=False)
    run = partial(check_programs, subject, name, spec)
    return Check(f"{at}/{name}", run, about="Random KV programs against a dict.")


def _skip(reason: str) -> None:
    raise Skipped(reason)


def check_programs(subject: Subject, name: str, spec: AttentionSpec) -> None:
    with opened(subject) as device:
        platform = subject.platform()
        impl = implementation(platform, spec, name)
        ahead = platform.capabilities(subject.device).run_ahead
        play = partial(replay, device, impl, spec, slot_dtype(platform, spec), ahead)
        for number in range(QUICK_PROGRAMS if subject.quick else PROGRAMS):
            seed = subject.seed_of("kv", number)
            program = random_program(seed, spec)
            if not play(program):
                continue
            least, said = smallest(program, play, simpler)
            if not said:  # it came and went, as a race does: tell the whole program
                least, said = program, "fails now and then: a race (see the whole program)"
            lines = [f"{spec}", f"implementation {name!r}", *(f"  {one}" for one in least)]
            raise Failed(f"{name}: {said}", case="\n".join(lines), seed=seed)


def random_program(seed: int, spec: AttentionSpec) -> list[Operation]:
    choose = random.Random(seed)
    make: Sequence[Callable[[], Operation]] = (
        lambda: Write(_some_slots(choose, spec), choose.randrange(1 << 30)),
        lambda: Write(_some_slots(choose, spec), choose.randrange(1 << 30)),
        lambda: Move(_some_pairs(choose)),
        lambda: Scrub(_some_blocks(choose)),
        lambda: Import(_some_blocks(choose), choose.randrange(1 << 30)),
        lambda: Export(_some_blocks(choose)),
        lambda: _some_attention(choose, spec),
    )
    return [choose.choice(make)() for _ in range(LENGTH)]


def _some_blocks(choose: random.Random) -> tuple[int, ...]:
    return tuple(choose.sample(range(1, BLOCKS), choose.randrange(1, 5)))


def _some_slots(choose: random.Random, spec: AttentionSpec) -> tuple[int, ...]:
    everything = range(spec.block_size, BLOCKS * spec.block_size)
    slots = choose.sample(everything, choose.randrange(1, min(40, len(everything))))
    return tuple(slots) + (0,) * choose.randrange(3)


def _some_pairs(choose: random.Random) -> tuple[tuple[int, int], ...]:
    """Targets are distinct; a source may be a target too."""
    targets = _some_blocks(choose)
    return tuple((choose.randrange(1, BLOCKS), target) for target in targets)


def _some_attention(choose: random.Random, spec: AttentionSpec) -> Attend:
    blocks = _some_blocks(choose)
    length = choose.randrange(1, len(blocks) * spec.block_size + 1)
    queries = choose.randrange(1, min(length, 20) + 1)
    return Attend(blocks, length, queries, choose.randrange(1 << 30))


def simpler(one: Operation) -> Iterable[Operation]:
    if isinstance(one, Write):
        yield from (one._replace(slots=less) for less in _fewer(one.slots))
    elif isinstance(one, Move):
        yield from (one._replace(pairs=less) for less in _fewer(one.pairs))
    elif isinstance(one, Attend):
        if one.queries > 1:
            yield one._replace(queries=1)
    else:
        yield from (one._replace(blocks=less) for less in _fewer(one.blocks))


def _fewer(items: tuple[T, ...]) -> Iterable[tuple[T, ...]]:
    if len(items) > 1:
        yield items[: len(items) // 2]
        yield items[len(items) // 2 :]
        yield from (items[:i] + items[i + 1 :] for i in range(min(len(items), 8)))


def replay(
    device: Device,
    impl: AttentionImpl,
    spec: AttentionSpec,
    slots: torch.dtype,
    ahead: int,
    program: Sequence[Operation],
) -> str:
    """What is wrong with the cache after this program; empty if nothing is."""
    try:
        cache = Cache(device, impl, spec, slots)
        pending: list[tuple[Event, Callable[[], str]]] = []
        for number, operation in enumerate([*program, Export(tuple(range(1, BLOCKS)))]):
            event, judge = cache.queue(operation)
            pending.append((event, partial(_told, number, operation, judge)))
            while len(pending) > ahead + 1:
                if said := _settle(pending.pop(0)):
                    return said
        return next(filter(None, map(_settle, pending)), "")
    except Exception as error:  # the platform's
        return f"{type(error).__name__}: {error}"
    finally:
        device.synchronize()


def _settle(pending: tuple[Event, Callable[[], str]]) -> str:
    event, judge = pending
    event.wait()
    return judge()


def _told(number: int, operation: Operation, judge: Callable[[], str]) -> str:
    said = judge()
    return f"operation {number}, {type(operation).__name__.lower()}: {said}" if said else ""


class Cache:
    """One layer's cache, and the model of it. The staging tensors on the host are one for each
    kind, written again as soon as `to_device` has returned."""

    def __init__(
        self, device: Device, impl: AttentionImpl, spec: AttentionSpec, slots: torch.dtype
    ) -> None:
        self._device, self._impl, self._spec, self._slots = device, impl, spec, slots
        self._kv = impl.alloc(device, spec, BLOCKS)
        self._model: dict[tuple[int, int], Tensor] = {}
        self._zero = torch.zeros(2, spec.num_kv_heads, spec.head_dim, dtype=spec.kv_dtype)

    def queue(self, operation: Operation) -> tuple[Event, Callable[[], str]]:
        """Launch it and enter it into the model; the second result says, once the event has been
        waited for, what was wrong with what was read."""
        match operation:
            case Write(slots, seed):
                return self._write(slots, seed)
            case Move(pairs):
                self._move(pairs)
                regions = self._kv.regions
                return self._launch(lambda: self._device.move_blocks(regions, pairs))
            case Scrub(blocks):
                for block in blocks:
                    self._set_block(block, None)
                ids = self._send(torch.tensor(blocks))
                return self._launch(lambda: self._scrub(ids))
            case Import(blocks, seed):
                return self._import(blocks, seed)
            case Export(blocks):
                return self._export(blocks)
            case Attend():
                return self._attend(operation)

    def _launch(self, work: Callable[[], object]) -> tuple[Event, Callable[[], str]]:
        def launched() -> None:
            work()

        return self._device.launch(launched), lambda: ""

    def _send(self, staging: Tensor) -> Tensor:
        """A device copy; the host's tensor is spoilt at once."""
        sent = self._device.to_device(staging)
        staging.zero_() if not staging.dtype.is_floating_point else staging.fill_(float("nan"))
        return sent

    def _normal(self, seed: int, *shape: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(shape, generator=generator).to(self._spec.dtype)

    def _write(self, slots: tuple[int, ...], seed: int) -> tuple[Event, Callable[[], str]]:
        spec = self._spec
        both = self._normal(seed, 2, len(slots), spec.num_kv_heads, spec.head_dim)
        for at, slot in enumerate(slots):
            if slot >= spec.block_size:
                self._model[divmod(slot, spec.block_size)] = both[:, at].to(spec.kv_dtype)
        key, value = self._send(both[0].clone()), self._send(both[1].clone())
        there = self._send(torch.tensor(slots, dtype=self._slots))
        return self._launch(lambda: self._impl.write(key, value, self._kv, there))

    def _move(self, pairs: Sequence[tuple[int, int]]) -> None:
        before = dict(self._model)
        for source, target in pairs:
            for offset in range(self._spec.block_size):
                self._model[target, offset] = before.get((source, offset), self._zero)

    def _set_block(self, block: int, content: Tensor | None) -> None:
        """`content` `[2, block_size, kv_heads, head_dim]`, None: zero."""
        for offset in range(self._spec.block_size):
            self._model[block, offset] = self._zero if content is None else content[:, offset]

    def _scrub(self, ids: Tensor) -> None:
        for region in self._kv.regions:
            region.tensor.index_fill_(0, ids, 0)  # as the runner does

    def _import(self, blocks: tuple[int, ...], seed: int) -> tuple[Event, Callable[[], str]]:
        spec = self._spec
        shape = (2, len(blocks), spec.block_size, spec.num_kv_heads, spec.head_dim)
        canonical = self._normal(seed, *shape).to(spec.kv_dtype)
        for at, block in enumerate(blocks):
            self._set_block(block, canonical[:, at].clone())
        given, ids = self._send(canonical), self._send(torch.tensor(blocks))
        return self._launch(lambda: self._impl.import_blocks(self._kv, spec, ids, given))

    def _read(self, blocks: Sequence[int]) -> Tensor:
        """The model's blocks, in the canonical form."""
        offsets = range(self._spec.block_size)
        rows = [
            torch.stack([self._model.get((block, offset), self._zero) for offset in offsets], 1)
            for block in blocks
        ]
        return torch.stack(rows, 1)

    def _export(self, blocks: tuple[int, ...]) -> tuple[Event, Callable[[], str]]:
        expected = self._read(blocks)
        ids = self._send(torch.tensor(blocks))
        copies: list[Tensor] = []

        def work() -> None:
            exported = self._impl.export_blocks(self._kv, self._spec, ids)
            copies.append(self._device.to_host(exported))

        event = self._device.launch(work)
        return event, lambda: difference(copies[0], expected, Tolerance(0.0, 0.0))

    def _attend(self, one: Attend) -> tuple[Event, Callable[[], str]]:
        spec = self._spec
        query = self._normal(one.seed, one.queries, spec.num_heads, spec.head_dim)
        canonical = self._read(one.blocks).flatten(1, 2)[:, : one.length]
        expected = attend(query, canonical[0], canonical[1], spec).to(spec.dtype)
        given = self._send(query)
        tables = self._send(torch.tensor([one.blocks], dtype=torch.int32))
        unused = self._send(torch.zeros(one.queries, dtype=self._slots))
        batch = AttentionBatch([0, one.queries], [one.length], tables, unused)
        copies: list[Tensor] = []

        def work() -> None:
            found = self._impl.run(given, self._kv, spec, self._impl.plan(spec, batch))
            copies.append(self._device.to_host(found))

        tolerance = Tolerance(TOLERANCE[spec.dtype], TOLERANCE[spec.dtype])
        return self._device.launch(work), lambda: difference(copies[0], expected, tolerance)
