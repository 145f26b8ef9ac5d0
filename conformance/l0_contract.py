"""L0: the classes, what a platform says of itself, and what it answers about plans."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from ..core.args import EngineArgs
from ..core.env import child_environment
from ..platforms.api import ApiRange, Contract, negotiate
from ..platforms.interface import (
    AttentionImpl,
    Capabilities,
    DeviceInfo,
    Finding,
    Fusion,
    KVConstraints,
    KVRegion,
    OpImpl,
    Platform,
    Probe,
    Roofline,
    StepLimits,
    WeightPacker,
)
from ..platforms.ops import OPS
from . import l0_device
from .attention_specs import spec_for
from .base import Check, Subject, expect, listed, refuse_foreign_members
from .lab import opened
from .purity import purity

CHECKED_DTYPES = frozenset(
    str(dtype).removeprefix("torch.") for spec in OPS.values() for dtype in spec.tolerance
)


def checks(subject: Subject) -> list[Check]:
    capabilities = subject.platform().capabilities(subject.device)
    table = {
        "class": check_class,
        "import": check_import,
        "probe": check_probe,
        "probe/pure": check_probe_is_pure,
        "capabilities": check_capabilities,
        "describe": check_describe,
        "parts": check_parts,
        "process_env": check_process_env,
        "review": check_review,
        "step_limits": check_step_limits,
        "kv_constraints": check_kv_constraints,
        **l0_device.table(capabilities),
    }
    return listed(subject, table)


def check_class(subject: Subject) -> None:
    """Its members have the contract's signatures, nothing is missing, and its version fits."""
    cls = subject.cls
    refuse_foreign_members(cls, Platform)
    missing = sorted(getattr(cls, "__abstractmethods__", ()))
    expect(not missing, f"{cls.__name__} lacks {', '.join(missing)}")
    for name in ("name", "vendor"):
        value = getattr(cls, name, None)
        expect(isinstance(value, str) and value.strip() == value != "", f"{name} is {value!r}")
    expect(isinstance(cls.api, ApiRange), f"api is {cls.api!r}, no ApiRange")
    expect(negotiate(cls.api).accepted, f"it was {negotiate(cls.api).reason}")


def check_import(subject: Subject) -> None:
    """Importing it replaces nothing of the engine or of torch, and leaves the environment alone."""
    changed = purity(subject.reference)["import"]
    expect(not changed, f"importing it {', '.join(changed)}")


def check_probe(subject: Subject) -> None:
    """A probe is well formed, the same each time, and lists the device that is examined."""
    first, second = subject.cls.probe(), subject.cls.probe()
    expect(isinstance(first, Probe), f"probe() returned {first!r}")
    expect(type(first.score) is int and first.score >= 0, f"its score is {first.score!r}")
    expect(isinstance(first.reason, str) and first.reason, "it gives no reason")
    expect(isinstance(first.devices, tuple), f"its devices are {first.devices!r}, no tuple")
    for one in first.devices:
        expect(isinstance(one, DeviceInfo), f"{one!r} is no DeviceInfo")
        expect(one.memory >= 0 and one.name, f"{one} has no name, or less than no memory")
    indices = [one.index for one in first.devices]
    expect(len(set(indices)) == len(indices), f"indices {indices} are not unique")
    expect(subject.device in indices, f"device {subject.device} is not among {indices}")
    expect(first == second, f"two probes differ: {first}, {second}")


def check_probe_is_pure(subject: Subject) -> None:
    """Probing initialises nothing: no thread, no device, nothing of torch's state."""
    did = purity(subject.reference)["probe"]
    expect(not did, f"probe() {', '.join(did)}")


def check_capabilities(subject: Subject) -> None:
    """Capabilities name dtypes that torch knows, and are the same each time."""
    found = subject.platform().capabilities(subject.device)
    expect(isinstance(found, Capabilities), f"capabilities() returned {found!r}")
    expect(found.dtypes, "it computes in no dtype")
    for name, precision in found.dtypes.items():
        expect(name in CHECKED_DTYPES, f"dtype {name!r} is none of {sorted(CHECKED_DTYPES)}")
        expect(precision in ("native", "emulated"), f"{name} is {precision!r}")
    for name in found.kv_dtypes:
        dtype = getattr(torch, name, None)
        known = isinstance(dtype, torch.dtype) and dtype.is_floating_point
        expect(
            known or name == "int8", f"KV dtype {name!r} is no floating dtype of torch, nor int8"
        )
    expect(found.fp8 in (None, "ocp", "fnuz"), f"fp8 is {found.fp8!r}")
    whole = type(found.run_ahead) is int and found.run_ahead >= 0
    expect(whole, f"run_ahead is {found.run_ahead!r}")
    expect("dense" in found.weight_formats, f"weight formats {found.weight_formats} lack dense")
    expect(found.step_sizes in ("buckets", "any"), f"step_sizes is {found.step_sizes!r}")
    for one in dataclasses.fields(found):
        if one.type == "bool":
            expect(type(getattr(found, one.name)) is bool, f"{one.name} is no bool")
    expect(found == subject.platform().capabilities(subject.device), "they differ when asked again")


def check_describe(subject: Subject) -> None:
    """Facts are strings by strings; what is known of devices has figures with a source."""
    platform = subject.platform()
    for key, value in platform.describe().items():
        expect(isinstance(key, str) and isinstance(value, str), f"{key!r}: {value!r} is no text")
    names = [one.name for one in platform.known_devices()]
    expect(len(set(names)) == len(names), f"known devices share a name: {names}")
    found = [(one.name, one.roofline) for one in platform.known_devices()]
    if (here := platform.roofline(subject.device)) is not None:
        found.append(("this device", here))
    for name, roofline in found:
        _check_roofline(name, roofline)


def _check_roofline(name: str, roofline: Roofline) -> None:
    figures = [roofline.bandwidth, *roofline.flops.values()]
    right = all(math.isfinite(one) and one > 0 for one in figures)
    expect(right, f"the roofline of {name} has a figure that is not above zero: {roofline}")
    expect(roofline.source, f"the roofline of {name} names no source")


def check_parts(subject: Subject) -> None:
    """What it offers (ops, attention, packers, fusions) are the contract's classes, each under its
    own name."""
    platform = subject.platform()
    for op, impls in platform.ops().items():
        expect(op in OPS, f"there is no op {op!r}")
        _check_implementations(f"op {op}", impls, OpImpl)
        for impl in impls:
            expect(impl.op == op, f"{impl.name!r} is listed under {op}, and says {impl.op!r}")
    spec = spec_for(subject)
    candidates = platform.attention(spec)
    expect(candidates, f"it offers no attention for {spec}")
    _check_implementations("attention", candidates, AttentionImpl)
    for format, packer in platform.weight_packers().items():
        _check_part(f"packer {format}", packer, WeightPacker)
        expect(packer.format == format, f"packer {format} says {packer.format!r}")
    for fusion in platform.fusions():
        expect(isinstance(fusion, Fusion), f"{fusion!r} is no Fusion")
        _check_part(f"fusion {fusion.name}", fusion.impl, OpImpl)


def _check_implementations(what: str, impls: Sequence[Any], contract: type[Contract]) -> None:
    for impl in impls:
        _check_part(what, impl, contract)
        expect(isinstance(impl.name, str) and impl.name, f"an implementation of {what} has no name")
        expect(isinstance(impl.priority, int), f"{impl.name}: priority {impl.priority!r}")
    names = [impl.name for impl in impls]
    expect(len(set(names)) == len(names), f"implementations of {what} share a name: {names}")


def _check_part(what: str, part: Any, contract: type[Contract]) -> None:
    expect(isinstance(part, contract), f"{what}: {part!r} is no {contract.__name__}")
    refuse_foreign_members(type(part), contract)


Plan = dict[str, Any]

SMALL: Plan = {"max_model_len": 4096, "max_num_seqs": 64, "max_num_batched_tokens": 2048}
LARGE: Plan = {"max_model_len": 1 << 20, "max_num_seqs": 4096, "max_num_batched_tokens": 1 << 17}
"""Beyond what any device takes, so that reviews have something to adjust."""


def plans(subject: Subject) -> Iterator[Plan]:
    """Resolved configurations as `core.resolve.flat_plan` makes them."""
    capabilities = subject.platform().capabilities(subject.device)
    preferred = subject.platform().kv_constraints(spec_for(subject)).preferred_block_size
    for ranks, lengths in itertools.product((1, 2), (SMALL, LARGE)):
        for dtype in capabilities.dtypes:
            decided = {"dtype": dtype, "kv_cache_dtype": dtype, "block_size": preferred}
            yield _asked(subject, ranks) | lengths | decided


def _asked(subject: Subject, ranks: int) -> Plan:
    """The arguments as a user gives them: what he leaves open is None or `auto`."""
    args = EngineArgs(platform=subject.reference, device=subject.device, tensor_parallel_size=ranks)
    return dataclasses.asdict(args)


def _ask(
    what: str, given: Iterable[Plan], ask: Callable[[Plan], Any]
) -> Iterator[tuple[Plan, Any]]:
    """Each plan with its answer. None may change its plan or the environment, or come out another
    way when asked again."""
    for plan in given:
        asked, environment = copy.deepcopy(plan), child_environment({})
        answer = ask(asked)
        changed = sorted(key for key in plan | asked if plan.get(key) != asked.get(key))
        expect(not changed, f"{what} changes the plan: {', '.join(changed)}", case=f"plan {plan}")
        expect(environment == child_environment({}), f"{what} changes the environment")
        again = ask(copy.deepcopy(plan))
        expect(answer == again, f"{what} answers {answer!r}, then {again!r}", case=f"plan {plan}")
        yield plan, answer


def check_process_env(subject: Subject) -> None:
    """The environment of a worker: strings, and the same whenever asked."""
    platform = subject.platform()
    given = [
        {"tensor_parallel_size": ranks, "num_threads": threads}
        for ranks in (1, 2)
        for threads in (None, 3)
    ]
    for rank in (0, 1):
        for _, found in _ask("process_env", given, partial(platform.process_env, rank)):
            expect(isinstance(found, Mapping), f"process_env returned {found!r}")
            for key, value in found.items():
                text = isinstance(key, str) and isinstance(value, str)
                expect(text, f"process_env: {key!r}={value!r} are no strings")


def check_review(subject: Subject) -> None:
    """Findings have a reason, name a field, and adjust to something that they leave as it is."""
    platform = subject.platform()
    for plan, findings in _ask("review", plans(subject), lambda p: tuple(platform.review(p))):
        adjusted = dict(plan)
        for one in findings:
            expect(isinstance(one, Finding), f"{one!r} is no Finding")
            expect(one.kind in ("reject", "adjust", "note"), f"{one} is of no known kind")
            expect(one.reason, f"{one} gives no reason")
            expect(one.kind == "note" or one.field in plan, f"{one} is about no field of a plan")
            if one.kind == "adjust":
                adjusted[one.field] = one.value
        for one in platform.review(adjusted):
            settled = one.kind != "adjust" or adjusted[one.field] == one.value
            expect(settled, f"having been adjusted, the plan is adjusted again: {one}")


def check_step_limits(subject: Subject) -> None:
    """Limits are positive, and token buckets rise; steps are compiled for some, or for any size."""
    platform = subject.platform()
    capabilities = platform.capabilities(subject.device)
    needs_buckets = capabilities.compiles_steps and capabilities.step_sizes == "buckets"
    given = [_asked(subject, ranks) | more for ranks in (1, 2) for more in ({}, SMALL, LARGE)]
    for _, limits in _ask("step_limits", given, platform.step_limits):
        expect(isinstance(limits, StepLimits), f"step_limits returned {limits!r}")
        expect(limits.max_tokens is None or limits.max_tokens > 0, f"{limits}")
        buckets = limits.token_buckets
        rising = list(buckets) == sorted(set(buckets)) and all(one > 0 for one in buckets)
        expect(rising, f"token buckets do not rise from above zero: {buckets}")
        expect(
            buckets or not needs_buckets, "it compiles steps, but names no token buckets for them"
        )


def check_kv_constraints(subject: Subject) -> None:
    """Constraints can be met: some attention has a layout they take, and the preferred block is
    one of the blocks that they allow."""
    platform = subject.platform()
    spec = spec_for(subject)
    found = platform.kv_constraints(spec)
    expect(isinstance(found, KVConstraints), f"kv_constraints returned {found!r}")
    expect(found.block_multiple > 0 and found.alignment > 0, f"{found}")
    expect(found.preferred_block_size > 0, f"{found}")
    whole = found.preferred_block_size % found.block_multiple == 0
    expect(whole, f"the preferred block is no multiple of block_multiple: {found}")
    expect(found.slot_dtype in ("int32", "int64"), f"slot_dtype is {found.slot_dtype!r}")
    candidates = [impl for impl in platform.attention(spec) if impl.supports(spec)]
    expect(candidates, f"no attention supports {spec}")
    layouts = sorted({impl.layout for impl in candidates})
    taken = not found.layouts or set(layouts) & set(found.layouts)
    expect(taken, f"it takes layouts {found.layouts}, its attention has {layouts}")
    with opened(subject, platform) as device:
        for impl in candidates:
            blocks = impl.alloc(device, spec, 2)
            held = sum(region.bytes for region in blocks.regions)
            said = impl.block_bytes(spec)
            expect(held == said, f"{impl.name}: block_bytes says {said}, regions hold {held}")
            for region in blocks.regions:
                _check_region(impl.name, region)


def _check_region(name: str, region: KVRegion) -> None:
    """Its figures are those of its tensor."""
    block, size = region.tensor[0], region.tensor.element_size()
    expect(block.is_contiguous(), f"{name}: a block of a region is no contiguous piece")
    found = (region.tensor.stride(0) * size, block.numel() * size)
    said = (region.stride, region.bytes)
    expect(found == said, f"{name}: a region's stride and bytes are {found}, it says {said}")
