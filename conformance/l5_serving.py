"""L5: serving: requests that are cancelled, memory that is used up, steps that fail, a device that
is lost, and nothing left over after any of them."""

from __future__ import annotations

import asyncio
import gc
import time
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import NamedTuple

import psutil
import torch

from ..core.async_engine import AsyncEngine
from ..core.engine.messages import AbortRequests, AddRequests, EngineRequest
from ..core.errors import EngineDeadError, KVMemoryError
from ..core.sampling_params import OutputKind, SamplingParams
from ..platforms import host
from ..platforms.interface import Device, DeviceLost, DeviceOutOfMemory
from . import l5_server
from .base import Check, Failed, Subject
from .engines import Session, dtype_of, engine_args, open_session, request
from .faults import Fault, with_fault
from .lab import opened
from .models import Case, cases

MODEL = "qwen3"
NUM_TOKENS = 8
LENGTHS = (5, 20, 33, 47)
MEGABYTE = 1e6
RSS_SLACK = 12.0  # MB that caches of allocators and libraries may still grow by
DEVICE_SLACK = 24.0  # the same, of a device's own memory
HELD = ("threads", "file descriptors", "MB of the process", "MB of the device")
HELD_SLACK = (0, 0, RSS_SLACK, DEVICE_SLACK)
PIECE = 1 << 50  # bytes: more than any address space holds
LOST = "the card fell off the bus (a fault of the conformance kit)"

Figures = Mapping[str, float] | None


def checks(subject: Subject) -> list[Check]:
    return [
        _check("out_of_memory", subject, out_of_memory, "asked of the device, and of an engine"),
        _check("failed_step", subject, failed_step, "its requests end, the engine goes on"),
        _check("device_lost/event", subject, lost_in_event, "told by a launch's event", 30),
        _check("device_lost/served", subject, lost_while_serving, "told to every stream", 90),
        _check("cancel", subject, cancel, "in the middle of steps"),
        _check("steady", subject, steady, "hundreds of steps use no more memory"),
        _check("open_close", subject, open_close, "engines leave nothing behind"),
        *l5_server.checks(subject),
    ]


def _check(
    name: str,
    subject: Subject,
    run: Callable[[Subject], Figures],
    about: str,
    seconds: float = 120,
) -> Check:
    return Check(name, partial(run, subject), about=about, seconds=seconds)


# ---------------------------------------------------------------------------------------------
# Memory that is used up, and steps that fail
# ---------------------------------------------------------------------------------------------


def out_of_memory(subject: Subject) -> Figures:
    _ask_for_too_much(subject)
    total = max(subject.cls.probe().devices[0].memory, 1 << 34)
    _must_not_open(subject, kv_cache_memory_bytes=str(64 * total))
    with open_session(subject, MODEL) as session:
        _expect_right(subject, session, "after an engine that found no memory")
    return None


def _ask_for_too_much(subject: Subject) -> None:
    """More than there can be, twice; and the device goes on working."""
    device = subject.platform().open(subject.device, 1)
    held_when_opened = device.memory().by_tag
    try:
        for name, ask in (
            ("alloc", lambda: device.alloc((PIECE,), torch.uint8, "test")),
            ("alloc_kv", lambda: device.alloc_kv((PIECE,), torch.uint8)),
        ):
            try:
                with suppress(DeviceOutOfMemory):
                    ask()
                    raise Failed(f"Device.{name} of 2^50 bytes found room")
            except Exception as error:
                if isinstance(error, Failed):
                    raise
                raise Failed(
                    f"Device.{name} of 2^50 bytes raised {type(error).__name__}, not "
                    f"DeviceOutOfMemory: {error}"
                ) from error
            held = _held_beyond(held_when_opened, device)
            if held:
                raise Failed(f"Device.{name} found no room, but holds bytes for it by tag: {held}")
        found = device.to_host(device.to_device(torch.arange(5)))
        if found.tolist() != [0, 1, 2, 3, 4]:
            raise Failed("the device does not copy any more after it found no room")
    finally:
        device.close()


def _must_not_open(subject: Subject, **settings: object) -> None:
    try:
        session = Session(engine_args(subject, MODEL, **settings))
    except KVMemoryError as error:
        if "ower" not in error.message:  # "Lower …": what to change
            raise Failed(f"the error does not say what to change: {error.message}") from error
        return
    session.close()
    raise Failed(f"an engine whose cache cannot fit ({dict(settings)}) was opened")


def failed_step(subject: Subject) -> Figures:
    """Whatever a launch raises ends the requests of that step, and theirs alone."""
    fault = Fault()
    with open_session(with_fault(subject, fault), MODEL) as session:
        _expect_right(subject, session, "before anything failed")
        for error in (RuntimeError("a kernel failed"), DeviceOutOfMemory("no scratch memory")):
            session.client.send(AddRequests(_requests(subject, 24)))
            for _ in range(3):
                session.poll()
            fault.fail_once = error
            found = session.run([])
            said = {one.error for one in found.values()}
            if not said or not all(text and str(error) in text for text in said):
                raise Failed(
                    f"a launch raised {type(error).__name__}({error}), but its requests ended "
                    f"with {sorted(map(str, said))}"
                )
            _expect_right(subject, session, f"after a launch that raised {type(error).__name__}")
    return None


# ---------------------------------------------------------------------------------------------
# A device that is lost
# ---------------------------------------------------------------------------------------------


def lost_in_event(subject: Subject) -> Figures:
    fault = Fault()
    session = Session(engine_args(with_fault(subject, fault), MODEL))
    try:
        session.client.send(AddRequests(_requests(subject, 50)))
        for _ in range(4):
            session.poll()
        fault.in_work = lambda: DeviceLost(LOST)
        start = time.monotonic()
        try:
            session.run([])
        except EngineDeadError as error:
            _expect_named(error)
        else:
            raise Failed("the device is lost, but the engine goes on")
        with suppress(EngineDeadError):
            session.client.send(AddRequests(_requests(subject, 2)))
            raise Failed("the engine of a lost device takes requests")
    finally:
        session.close()
    seconds = time.monotonic() - start
    with open_session(subject, MODEL) as again:
        _expect_right(subject, again, "on a new engine after a lost device")
    return {"s to the end": seconds}


def _expect_named(error: EngineDeadError) -> None:
    if "the device is lost" not in error.message or LOST not in error.message:
        raise Failed(f"the engine's last error does not name the lost device: {error.message}")


def lost_while_serving(subject: Subject) -> Figures:
    """Every stream ends with an error that names it, and the engine is not ready any more."""
    fault = Fault()
    return asyncio.run(_lose_while_serving(with_fault(subject, fault), fault))


async def _lose_while_serving(subject: Subject, fault: Fault) -> Figures:
    engine = AsyncEngine.from_args(engine_args(subject, "default", dtype="auto"), in_process=True)
    await engine.start()
    try:
        params = SamplingParams(
            max_tokens=100, ignore_eos=True, temperature=0.0, output_kind=OutputKind.DELTA
        )
        streams = [await engine.submit("hello", params) for _ in range(4)]
        for stream in streams:
            await asyncio.wait_for(anext(stream), 30)
        fault.in_work = lambda: DeviceLost(LOST)
        start = time.monotonic()
        for stream in streams:
            try:
                async with asyncio.timeout(20):
                    async for _ in stream:
                        continue
            except EngineDeadError as error:
                _expect_named(error)
            except TimeoutError:
                raise Failed("a stream hangs on the engine of a lost device") from None
            else:
                raise Failed("a stream on a lost device ended without an error")
        seconds = time.monotonic() - start
        try:
            engine.health()
        except EngineDeadError:
            return {"s to the end": seconds}
        raise Failed("the engine of a lost device says that it is ready")
    finally:
        await engine.close()


# ---------------------------------------------------------------------------------------------
# What is left
# ---------------------------------------------------------------------------------------------


def cancel(subject: Subject) -> Figures:
    """Requests that are aborted between any two steps leave no block, and disturb no other."""
    rounds = 4 if subject.quick else 12
    with open_session(subject, MODEL, max_num_batched_tokens=32) as session:
        for number in range(rounds):
            session.client.send(AddRequests(_requests(subject, 30, "cancelled")))
            for _ in range(number % 5 + 1):
                session.poll()
            ids = [one.request_id for one in _requests(subject, 30, "cancelled")]
            session.client.send(AbortRequests(ids[number % 2 :]))
            _expect_right(subject, session, "beside requests that were cancelled")
            held = session.client.engine.scheduler.stats().kv_used
            if held:
                raise Failed(f"{held} KV blocks are in use after the last request was cancelled")
    return None


def steady(subject: Subject) -> Figures:
    """Steps allocate nothing that they do not free."""
    num_rounds, count = (6, 50) if subject.quick else (20, 50)
    process = psutil.Process()
    with open_session(subject, MODEL, enable_prefix_caching=False) as session:
        requests = _requests(subject, count)
        for _ in range(2):
            session.run(requests)
        tags, rss = dict(session.device.memory().by_tag), _settled_rss(process)
        free = _free(subject, session.device)
        before = len(session.plans)
        for _ in range(num_rounds):
            session.run(requests)
        steps = len(session.plans) - before
        session.plans.clear()
        grown = _settled_rss(process) - rss
        now = dict(session.device.memory().by_tag)
        lost = free - _free(subject, session.device)
    if now != tags:
        raise Failed(f"{steps} steps changed the memory that is accounted for: {tags} → {now}")
    if grown > RSS_SLACK:
        raise Failed(f"{steps} steps made the process grow by {grown:.1f} MB")
    if lost > DEVICE_SLACK:
        raise Failed(f"{steps} steps took {lost:.1f} MB of the device's memory")
    return {"steps": steps, "MB grown": grown}


def open_close(subject: Subject) -> Figures:
    """Engines that are opened, used and closed again and again."""
    process = psutil.Process()
    seen: list[_Held] = []
    for _ in range(5 if subject.quick else 9):
        session = Session(engine_args(subject, MODEL))
        device = session.device
        try:
            _expect_right(subject, session, "on an engine opened again")
            if not sum(device.memory().by_tag.values()):
                raise Failed("Device.memory accounts for nothing while a model is loaded")
        finally:
            session.close()
        ended = weakref.ref(session.client.engine)
        del session
        gc.collect()
        if ended() is not None:
            raise Failed("a closed engine is still held by something")
        _expect_freed(device, "an engine that was closed")
        del device
        free = _free_of_new(subject)
        seen.append(_Held(_num_threads(), process.num_fds(), _settled_rss(process), -free))
    first, last = seen[1], seen[-1]  # the first engine loads what stays
    for what, before, after, slack in zip(HELD, first, last, HELD_SLACK, strict=True):
        if after - before > slack:
            more, engines = after - before, len(seen) - 2
            raise Failed(f"{what} grow with every engine: {more:.0f} more after {engines} of them")
    return {"MB grown": last.rss - first.rss}


class _Held(NamedTuple):
    """What the process holds between two engines; `device`: MB of the device, up to a constant."""

    threads: int
    files: int
    rss: float
    device: float


def _free(subject: Subject, device: Device) -> float:
    """MB of the device's memory that nothing takes, whoever keeps account of it. A constant where
    the device's memory is the host's, of which others take and give: there the resident size of
    the process tells."""
    gc.collect()
    memory = device.memory()
    shared = subject.platform().capabilities(subject.device).unified_memory
    if shared or memory.total == host.total_memory():
        return 0.0
    return memory.free / MEGABYTE


def _free_of_new(subject: Subject) -> float:
    """`_free` of a device opened for this: a closed one need not answer."""
    with opened(subject) as device:
        return _free(subject, device)


def _num_threads() -> int:
    """Once those that are ending have ended: the system counts one a moment longer than Python."""
    deadline, fewest = time.monotonic() + 0.2, psutil.Process().num_threads()
    while time.monotonic() < deadline:
        time.sleep(0.02)
        fewest = min(fewest, psutil.Process().num_threads())
    return fewest


def _settled_rss(process: psutil.Process) -> float:
    gc.collect()
    return float(process.memory_info().rss / MEGABYTE)


def _expect_freed(device: Device, after: str) -> None:
    gc.collect()
    try:
        left = _held_beyond({}, device)
    except RuntimeError:  # a closed device need not answer: what is free on a new one tells
        return
    if left:
        raise Failed(f"device memory is still held after {after}: bytes by tag {left}")


def _held_beyond(before: Mapping[str, int], device: Device) -> dict[str, int]:
    now = device.memory().by_tag
    return {tag: size for tag, size in now.items() if size > before.get(tag, 0)}


def _cases(subject: Subject) -> list[Case]:
    return cases(MODEL, LENGTHS, NUM_TOKENS, subject.seed_of("L5"))


def _requests(subject: Subject, count: int, name: str = "request") -> list[EngineRequest]:
    return [request(f"{name} {i}", case.prompt, count) for i, case in enumerate(_cases(subject))]


def _expect_right(subject: Subject, session: Session, when: str) -> None:
    found = session.run(_requests(subject, NUM_TOKENS, "right"))
    for i, case in enumerate(_cases(subject)):
        one = found[f"right {i}", 0]
        exact = dtype_of(subject) == "float32"
        if one.error or (exact and one.tokens != list(case.tokens)):
            raise Failed(
                f"{when}: the prompt of {len(case.prompt)} tokens yields {one.error or one.tokens},"
                f" not {list(case.tokens)}",
                seed=subject.seed,
            )
