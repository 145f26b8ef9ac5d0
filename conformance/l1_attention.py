"""L1: every attention implementation, over a grid of layers and random batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..platforms.attention_reference import ReferenceAttention, attend
from ..platforms.host_device import HostDevice
from ..platforms.interface import (
    AttentionBatch,
    AttentionImpl,
    AttentionSpec,
    Device,
    LayerKV,
    Platform,
    Support,
)
from ..platforms.ops import Tolerance
from .attention_specs import QUICK, SHAPES, dtypes, kv_dtypes, spec_for
from .base import Check, Failed, Measurements, Skipped, Subject, expect
from .compare import difference
from .lab import as_bits, on_device, opened
from .paged import Action, Program, Step, random_actions, simpler, tolerance_of
from .shrink import smallest
from .speed import seconds_a_call

EASY: tuple[Sequence[Action], ...] = (
    [Step(((0, 1),))],
    [Step(((0, 3),))],
    [Step(((0, 40),)), Step(((0, 1),))],
    [Step(((0, 50), (1, 7), (2, 70))), Step(((1, 1), (0, 1), (2, 30), (3, 33)))],
)
"""Programs tried before the random ones: what fails in them is small already."""

SEEDS, QUICK_SEEDS = 4, 1
LENGTH, QUICK_LENGTH = 12, 7


def checks(subject: Subject) -> list[Check]:
    platform = subject.platform()
    found = []
    for name, spec in _grid(subject, platform):
        candidates = platform.attention(spec)
        usable = [impl for impl in candidates if _supports(impl, spec)]
        required = name.startswith("gqa/") and " over " not in name
        answers = partial(check_supports, spec, candidates)
        found.append(Check(f"attention/{name}", answers, required, "Somebody does such a layer."))
        for impl in usable:
            at = f"attention/{name}/{impl.name}"
            run = partial(check_programs, subject, impl.name, spec)
            found.append(Check(f"{at}/programs", run, about=_about(check_programs)))
            exact = (
                spec.kv_dtype.is_floating_point
            )  # what was quantized does not come back as it was
            if exact and name.partition("/")[0] in ("gqa", "mqa", "head 80"):
                for check in (check_write, check_blocks):
                    what = check.__name__.removeprefix("check_")
                    found.append(
                        Check(
                            f"{at}/{what}",
                            partial(check, subject, impl.name, spec),
                            about=_about(check),
                        )
                    )
    return found


def _about(check: Callable[..., Any]) -> str:
    return (check.__doc__ or "").partition("\n")[0]


def _grid(subject: Subject, platform: Platform) -> list[tuple[str, AttentionSpec]]:
    """All shapes in the first dtype, the quick ones in the others, and caches narrower than the
    queries; block sizes in turn."""
    computed, kept = dtypes(platform, subject.device), kv_dtypes(platform, subject.device)
    grid = []
    for number, dtype in enumerate(computed):
        shapes = QUICK if subject.quick or number else tuple(SHAPES)
        shapes = shapes[:1] if subject.quick and number else shapes
        for turn, shape in enumerate(shapes):
            cached = dtype if dtype in kept else kept[0] if kept else dtype
            spec = spec_for(subject, shape, dtype, cached, turn)
            grid.append((f"{shape}/{_short(dtype)}", spec))
    for cached in kept:
        if cached != computed[0]:
            spec = spec_for(subject, "gqa", computed[0], cached)
            grid.append((f"gqa/{_short(computed[0])} over {_short(cached)}", spec))
    return grid


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _supports(impl: AttentionImpl, spec: AttentionSpec) -> bool:
    """One that raises is taken in, so that `check_supports` tells of it."""
    try:
        return bool(impl.supports(spec))
    except Exception:  # the platform's
        return True


def check_supports(spec: AttentionSpec, candidates: Sequence[AttentionImpl]) -> None:
    reasons = []
    for impl in candidates:
        answer = impl.supports(spec)
        expect(isinstance(answer, Support), f"{impl.name}: supports() returned {answer!r}")
        expect(answer or answer.reason, f"{impl.name} refuses {spec} without a reason")
        reasons.append(f"{impl.name}: {answer.reason}")
    if not any(impl.supports(spec) for impl in candidates):
        raise Skipped("; ".join(reasons) or "no attention offered")


def implementation(platform: Platform, spec: AttentionSpec, name: str) -> AttentionImpl:
    return next(impl for impl in platform.attention(spec) if impl.name == name)


def slot_dtype(platform: Platform, spec: AttentionSpec) -> torch.dtype:
    found = getattr(torch, platform.kv_constraints(spec).slot_dtype)
    assert isinstance(found, torch.dtype)
    return found


# ---------------------------------------------------------------------------------------------
# Programs of sequences
# ---------------------------------------------------------------------------------------------


def check_programs(subject: Subject, name: str, spec: AttentionSpec) -> Measurements | None:
    """Mixed batches over a paged cache equal attention over plain tensors."""
    with opened(subject) as device:
        platform = subject.platform()
        impl = implementation(platform, spec, name)
        slots = slot_dtype(platform, spec)
        length = QUICK_LENGTH if subject.quick else LENGTH
        seeds = [subject.seed_of(name, i) for i in range(QUICK_SEEDS if subject.quick else SEEDS)]
        programs = [(seeds[0], actions) for actions in EASY]
        programs += [(seed, random_actions(seed, length)) for seed in seeds]
        for seed, actions in programs:
            play = partial(replay, device, impl, spec, seed, slots)
            if play(actions):
                least, said = smallest(actions, play, simpler)
                raise Failed(f"{name}: {said}", case=_text(spec, name, least), seed=seed)
        if platform.capabilities(subject.device).deterministic:
            bits = [outputs(device, impl, spec, seeds[0], slots, EASY[-1]) for _ in range(2)]
            same = all(torch.equal(as_bits(a), as_bits(b)) for a, b in zip(*bits, strict=True))
            said = f"{name}: two runs differ, although it claims to be deterministic"
            expect(same, said, case=_text(spec, name, EASY[-1]), seed=seeds[0])
        return _speed(device, impl, spec, slots)


def replay(
    device: Device,
    impl: AttentionImpl,
    spec: AttentionSpec,
    seed: int,
    slots: torch.dtype,
    actions: Sequence[Action],
) -> str:
    """What is wrong after these actions; empty if nothing is."""
    try:
        program = Program(spec, impl, device, seed, slots)
        for number, action in enumerate(actions):
            step = program.act(action)
            if step is None:
                continue
            tolerance = Tolerance(tolerance_of(spec), tolerance_of(spec))
            expected = step.expected.to(spec.dtype)
            said = step.touched or difference(step.found, expected, tolerance)
            if said:
                return f"action {number}: {said}"
    except Exception as error:  # the platform's
        return f"{type(error).__name__}: {error}"
    return ""


def outputs(
    device: Device,
    impl: AttentionImpl,
    spec: AttentionSpec,
    seed: int,
    slots: torch.dtype,
    actions: Sequence[Action],
) -> list[Tensor]:
    """What attention returned in each step."""
    program = Program(spec, impl, device, seed, slots)
    return [step.found for step in map(program.act, actions) if step is not None]


def _text(spec: AttentionSpec, name: str, actions: Sequence[Action]) -> str:
    lines = [f"{spec}", f"implementation {name!r}; (sequence, tokens computed) in each step:"]
    return "\n".join([*lines, *(f"  {action}" for action in actions)])


def _speed(
    device: Device, impl: AttentionImpl, spec: AttentionSpec, slots: torch.dtype
) -> Measurements:
    """One decode step of eight sequences of 256 tokens."""
    count, length = 8, 256
    blocks = -(-length // spec.block_size)
    kv = impl.alloc(device, spec, 1 + count * blocks)
    tables = torch.arange(1, 1 + count * blocks, dtype=torch.int32).view(count, blocks)
    at = tables[:, -1].long() * spec.block_size + (length - 1) % spec.block_size
    there, new = device.to_device(tables), device.to_device(at.to(slots))
    query = device.to_device(torch.ones(count, spec.num_heads, spec.head_dim, dtype=spec.dtype))
    batch = AttentionBatch(list(range(count + 1)), [length] * count, there, new)

    def work() -> None:
        impl.run(query, kv, spec, impl.plan(spec, batch))

    return {"us": round(seconds_a_call(device, work) * 1e6, 1)}


# ---------------------------------------------------------------------------------------------
# Single blocks
# ---------------------------------------------------------------------------------------------


def _values(spec: AttentionSpec, blocks: int, seed: int) -> Tensor:
    """Blocks in the canonical form."""
    generator = torch.Generator().manual_seed(seed)
    shape = (2, blocks, spec.block_size, spec.num_kv_heads, spec.head_dim)
    return torch.randn(shape, generator=generator).to(spec.kv_dtype)


def export_all(
    device: Device, impl: AttentionImpl, kv: LayerKV, spec: AttentionSpec, ids: Sequence[int]
) -> Tensor:
    blocks = device.to_device(torch.tensor(ids, dtype=torch.int64))
    return on_device(device, lambda: device.to_host(impl.export_blocks(kv, spec, blocks)))


def import_all(
    device: Device,
    impl: AttentionImpl,
    kv: LayerKV,
    spec: AttentionSpec,
    ids: Sequence[int],
    canonical: Tensor,
) -> None:
    blocks = device.to_device(torch.tensor(ids, dtype=torch.int64))
    given = device.to_device(canonical)
    on_device(device, lambda: impl.import_blocks(kv, spec, blocks, given))


def check_write(subject: Subject, name: str, spec: AttentionSpec) -> None:
    """A fresh cache is zero; a write changes the slots it names, and none else."""
    tokens = 7
    count = 5 + tokens // spec.block_size
    with opened(subject) as device:
        platform = subject.platform()
        impl = implementation(platform, spec, name)
        kv = impl.alloc(device, spec, count)
        everything = range(count)
        fresh = export_all(device, impl, kv, spec, everything)
        expect(not fresh.float().any(), "a fresh cache is not zero", case=f"{spec}")
        before = _values(spec, count, subject.seed)
        import_all(device, impl, kv, spec, everything, before)
        generator = torch.Generator().manual_seed(subject.seed)
        for used in (1, tokens):
            slots = torch.randperm((count - 1) * spec.block_size, generator=generator)[:used]
            slots = slots + spec.block_size
            shape = (used, spec.num_kv_heads, spec.head_dim)
            new = [torch.randn(shape, generator=generator).to(spec.dtype) for _ in range(2)]
            key, value = (device.to_device(one) for one in new)
            there = device.to_device(slots.to(slot_dtype(platform, spec)))
            on_device(device, partial(impl.write, key, value, kv, there))
            for which in range(2):
                flat = before[which].view(-1, spec.num_kv_heads, spec.head_dim)
                flat[slots] = new[which].to(spec.kv_dtype)
            after = export_all(device, impl, kv, spec, everything)
            case = f"{spec}\nwrite of slots {slots.tolist()} into random blocks"
            if said := _different_blocks(after, before):
                raise Failed(f"{name}: {said} after a write", case=case, seed=subject.seed)


def _different_blocks(found: Tensor, expected: Tensor) -> str:
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return f"export gives {found.dtype} {list(found.shape)}, not {list(expected.shape)}"
    wrong = (as_bits(found) != as_bits(expected)).flatten(3).any(-1).nonzero()
    if not len(wrong):
        return ""
    which, block, offset = wrong[0].tolist()
    what = ("key", "value")[which]
    return f"{len(wrong)} slots differ, the first is the {what} of block {block}, offset {offset}"


def check_blocks(subject: Subject, name: str, spec: AttentionSpec) -> None:
    """Exported and imported blocks are the same, here and on the host, and others stay."""
    with opened(subject) as device:
        impl = implementation(subject.platform(), spec, name)
        kv = impl.alloc(device, spec, 6)
        model = torch.zeros_like(_values(spec, 6, 0))
        for ids in ([3], [5, 1], [4, 2, 0], [1, 3]):
            new = _values(spec, len(ids), subject.seed_of(*ids))
            new[0, 0, 0, 0, 0] = float("inf")
            import_all(device, impl, kv, spec, ids, new)
            model[:, ids] = new
            for asked in ([0, 1, 2, 3, 4, 5], [4, 1], [2]):
                found = export_all(device, impl, kv, spec, asked)
                if said := _different_blocks(found, model[:, asked]):
                    case = f"{spec}\nimport of blocks {ids}, export of {asked}"
                    raise Failed(f"{name}: {said}", case=case, seed=subject.seed)
        _compare_across(subject, device, impl, spec)


def _compare_across(
    subject: Subject, device: Device, impl: AttentionImpl, spec: AttentionSpec
) -> None:
    """Written here, exported, imported by the reference on the host: the same attention."""
    program = Program(spec, impl, device, subject.seed, slot_dtype(subject.platform(), spec))
    program.extend(0, 53)
    table = program.tables[0]
    used = [block for block in table if block]
    host, reference = HostDevice(), ReferenceAttention()
    kv = reference.alloc(host, spec, max(used) + 1)
    canonical = export_all(device, impl, program.kv, spec, used)
    reference.import_blocks(kv, spec, torch.tensor(used), canonical)
    query = program.normal(3, spec.num_heads, spec.head_dim).to(spec.dtype)
    tables = torch.tensor([table], dtype=torch.int32)
    found = reference.run(
        query, kv, spec, AttentionBatch([0, 3], [53], tables, torch.tensor([0, 0, 0]))
    )
    expected = attend(query, program.keys[0], program.values[0], spec)
    tolerance = Tolerance(tolerance_of(spec), tolerance_of(spec))
    if said := difference(found, expected.to(spec.dtype), tolerance):
        raise Failed(f"{impl.name}: its blocks mean something else to the reference: {said}")
