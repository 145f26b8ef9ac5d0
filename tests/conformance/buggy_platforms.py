"""Platforms with one bug each, and the check of the kit that must be the first to fail them: L0 to
L2. Those whose device is wrong are in `buggy_devices`.

All derive from `strict`, which is right. What is wrong stands in the docstring.
"""

from __future__ import annotations

import dataclasses
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from typing import Any, ClassVar

import torch
from buggy_attention import (
    CachedExport,
    CountsHalf,
    DriftsApart,
    ForgottenRegion,
    HeadsInterleaved,
    KeysAndValuesSwapped,
    NoAlibi,
    NoSoftcap,
    ReadsWholeBlocks,
    RefusesDumbly,
    SortsBlocks,
    TouchesTheNext,
    WindowOffByOne,
    WrongSlot,
)
from buggy_devices import into
from seeded_bugs import FOUND_BY, Quick, bug
from torch import Tensor

from trimaran.core.quantization.codes import dequantize
from trimaran.platforms.attention_reference import ReferenceAttention
from trimaran.platforms.interface import (
    FP8,
    INT4,
    INT8,
    AttentionImpl,
    AttentionSpec,
    Capabilities,
    Device,
    Finding,
    Fusion,
    Graph,
    KVConstraints,
    OpImpl,
    OpSignature,
    PackedWeight,
    Probe,
    StepLimits,
    Support,
    WeightPacker,
)
from trimaran.platforms.ops import DENSE, OPS, DensePacker, ReferenceOp, chain, linear
from trimaran.platforms.strict import StrictPlatform
from trimaran.platforms.strict_device import StrictDevice

# ------------------------------------------------------------------------------ L0: what it says


@bug("L0/probe/pure")
class ProbeStartsThread(Quick):
    """The first probe leaves a thread behind, as of a library it initialised."""

    started: ClassVar[bool] = False

    @classmethod
    def probe(cls) -> Probe:
        if not cls.started:
            cls.started = True
            threading.Thread(target=time.sleep, args=(4,), name="driver", daemon=True).start()
        return super().probe()


@bug("L0/process_env")
class ProcessEnvImpure(Quick):
    """The environment of a worker is another each time."""

    counter = count()

    def process_env(self, rank: int, plan: Mapping[str, Any]) -> Mapping[str, str]:
        return {"PORT": str(next(self.counter))}


@bug("L0/review")
class ReviewMutates(Quick):
    """A plan is adjusted in place."""

    def review(self, plan: Mapping[str, Any]) -> Sequence[Any]:
        changing: Any = plan
        changing["max_num_seqs"] = 8
        return ()


@bug("L0/class")
class SignatureSetLater(Quick):
    """A member of another signature, set where the class definition's check cannot see it."""


def _step_limits(self: Any, plan: Any, vendor_option: bool = False) -> Any:
    return StrictPlatform.step_limits(self, plan)


SignatureSetLater.step_limits = _step_limits  # type: ignore[method-assign]


@bug("L0/capabilities")
class UnknownDtype(Quick):
    """It claims a dtype that nobody has."""

    def capabilities(self, device: int = 0) -> Capabilities:
        return dataclasses.replace(super().capabilities(device), dtypes={"float23": "native"})


@bug("L0/capabilities")
class UnknownStepSizes(Quick):
    """Compiled steps of sizes that nobody asks for."""

    def capabilities(self, device: int = 0) -> Capabilities:
        return dataclasses.replace(super().capabilities(device), step_sizes="powers of two")


@bug("L0/device/open")
class OpensAnything(Quick):
    """A device that does not exist is opened as the first one."""

    def open(self, device: int = 0, num_threads: int | None = None) -> Device:
        return super().open(device if device in range(3) else 0)


@bug("L0/probe")
class ProbeCounts(Quick):
    """Each probe says something else."""

    counter = count()

    @classmethod
    def probe(cls) -> Probe:
        return dataclasses.replace(super().probe(), reason=f"probe number {next(cls.counter)}")


@bug("L0/describe")
class DescribesInNumbers(Quick):
    """A fact is a number."""

    def describe(self) -> Mapping[str, str]:
        cores: Any = 64
        return {"cores": cores}


@bug("L0/parts")
class ListedUnderAnother(Quick):
    """An implementation stands under another op than its own."""

    def ops(self) -> Mapping[str, Sequence[OpImpl]]:
        return {**super().ops(), "add": [VendorOp("copy", OPS["copy"].reference)]}


@bug("L0/review")
class AdjustsForEver(Quick):
    """Adjusts without an end: half of what it is asked about."""

    def review(self, plan: Mapping[str, Any]) -> Sequence[Finding]:
        half = plan["max_num_seqs"] // 2
        return [Finding("adjust", "max_num_seqs", "less is better", half)] if half > 128 else []


@bug("L0/step_limits")
class BucketsFall(Quick):
    """Token buckets, the largest first."""

    def step_limits(self, plan: Mapping[str, object]) -> StepLimits:
        return StepLimits(token_buckets=(64, 16))


@bug("L0/step_limits")
class CompilesWithoutBuckets(Quick):
    """It is to be asked for compiled steps, of no size."""

    def capabilities(self, device: int = 0) -> Capabilities:
        return dataclasses.replace(super().capabilities(device), compiles_steps=True)


@bug("L0/kv_constraints")
class NarrowSlots(Quick):
    """Slots of a type that engines do not make."""

    def kv_constraints(self, spec: AttentionSpec) -> KVConstraints:
        return dataclasses.replace(super().kv_constraints(spec), slot_dtype="int16")


# ------------------------------------------------------------------------------ L1: ops


class VendorOp(OpImpl):
    """The reference, changed by `change`."""

    name = "vendor"
    priority = 10

    def __init__(self, op: str, call: Callable[..., Any]) -> None:
        self.op = op
        self._call = call

    def supports(self, sig: OpSignature) -> Support:
        return Support.yes("everything")

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)


class WithOp(Quick):
    """`call` stands for `op`."""

    op: ClassVar[str]

    @staticmethod
    def call(*args: Any) -> Any:
        raise NotImplementedError

    def ops(self) -> Mapping[str, Sequence[OpImpl]]:
        return {**super().ops(), self.op: [VendorOp(self.op, type(self).call)]}


@bug("L1/silu_mul/vendor/float32")
class SupportsAndRaises(WithOp):
    """Support is promised for every size, odd ones raise."""

    op = "silu_mul"

    @staticmethod
    def call(*args: Any) -> Any:
        if args[0].shape[-1] % 4:
            raise RuntimeError("size must be a multiple of 4")
        return OPS["silu_mul"].reference(*args)


@bug("L1/gelu_mul/vendor/float32")
class LeavesTheRemainder(WithOp):
    """The last elements of rows that are no multiple of 16 are not computed."""

    op = "gelu_mul"

    @staticmethod
    def call(*args: Any) -> Any:
        found = OPS["gelu_mul"].reference(*args)
        found[..., found.shape[-1] // 16 * 16 :] = 0
        return found


@bug("L1/rms_norm/vendor/float32/special")
class NanSwallowed(WithOp):
    """Where a NaN is due stands a zero."""

    op = "rms_norm"

    @staticmethod
    def call(*args: Any) -> Any:
        return OPS["rms_norm"].reference(*args).nan_to_num(0.0)


@bug("L1/add/vendor/float32")
class Overrun(WithOp):
    """One element behind the first operand is written."""

    op = "add"

    @staticmethod
    def call(*args: Any) -> Any:
        a = args[0]
        a.as_strided((1,), (1,), a.storage_offset() + a.numel()).fill_(0)
        return OPS["add"].reference(*args)


@bug("L1/gelu_tanh_mul/vendor/float32")
class WorksInPlace(WithOp):
    """The input is used for the result."""

    op = "gelu_tanh_mul"

    @staticmethod
    def call(*args: Any) -> Any:
        found = OPS["gelu_tanh_mul"].reference(*args)
        args[0][..., : found.shape[-1]] = found
        return found


@bug("L1/rope/vendor/float32")
class RopeTurnsTheWrongHalf(WithOp):
    """The sign of the rotation is that of the other half."""

    op = "rope"

    @staticmethod
    def call(*args: Any) -> Any:
        query, key, positions, table = args
        cos, sin = table.chunk(2, dim=-1)
        return OPS["rope"].reference(query, key, positions, torch.cat((cos, -sin), dim=-1))


@bug("L1/sample/vendor/float32")
class SampleTakesTheLast(WithOp):
    """Of equal scores the last one wins."""

    op = "sample"

    @staticmethod
    def call(*args: Any) -> Any:
        (scores,) = args
        return scores.shape[-1] - 1 - scores.flip(-1).argmax(-1)


@bug("L1/draw/vendor/float32")
class DrawsByHalfTheSeed(WithOp):
    """Seeds that differ only in their upper 32 bits draw the same noise."""

    op = "draw"

    @staticmethod
    def call(*args: Any) -> Any:
        scores, floats, ints, short = args
        lower = ints.clone()
        lower[2] = 0
        return OPS["draw"].reference(scores, floats, lower, short)


@bug("L1/moe/vendor/float32")
class MoeKeepsTheSharesAsTheyAre(WithOp):
    """What the chosen experts have of the softmax is not brought to a sum of 1."""

    op = "moe"

    @staticmethod
    def call(*args: Any) -> Any:
        *others, _ = args
        return OPS["moe"].reference(*others, False)


def off_by_one(op: str) -> Callable[..., Any]:
    """The first element of the first result is one more than it should be."""

    def call(*args: Any) -> Any:
        results = OPS[op].reference(*args)
        first = results[0] if isinstance(results, tuple) else results
        first[(0,) * first.dim()] += 1
        return results

    return call


for _op in ("embed", "embed_packed", "rms_norm", "linear", "add_rms_norm", "gather_rows", "copy"):
    _name = "OffByOne" + _op.title().replace("_", "")
    globals()[_name] = bug(f"L1/{_op}/vendor/float32")(
        type(
            _name,
            (WithOp,),
            {"op": _op, "call": staticmethod(off_by_one(_op)), "__module__": __name__},
        )
    )


@bug("L1/add/vendor/float32/special")
class InfinityClipped(WithOp):
    """Infinities become the greatest number."""

    op = "add"

    @staticmethod
    def call(*args: Any) -> Any:
        found = OPS["add"].reference(*args)
        return torch.where(found.isinf(), found.sign() * torch.finfo(found.dtype).max, found)


@bug("L1/add/vendor/float32")
class AnotherEachTime(WithOp):
    """Deterministic by its word, and not: each call rounds another way."""

    op, counter = "add", count()

    @staticmethod
    def call(*args: Any) -> Any:
        return OPS["add"].reference(*args) * (1 + (next(AnotherEachTime.counter) % 2) * 2**-22)


class Raising(VendorOp):
    def supports(self, sig: OpSignature) -> Support:
        if sig.sizes["size"] > 1000:
            raise KeyError("no such kernel")
        return super().supports(sig)


@bug("L1/add/vendor/supports")
class SupportsRaises(Quick):
    """A size that it does not know is an error, not a refusal."""

    def ops(self) -> Mapping[str, Sequence[OpImpl]]:
        return {**super().ops(), "add": [Raising("add", OPS["add"].reference)]}


class PromisingPacker(DensePacker):
    def packed_bytes(self, dtype: torch.dtype, shape: tuple[int, int]) -> int | None:
        return shape[0] * shape[1]


@bug("L1/packer/dense/float32")
class PackerPromisesLess(Quick):
    """A packed weight takes other memory than was promised."""

    def weight_packers(self) -> Mapping[str, WeightPacker]:
        return {DENSE: PromisingPacker()}


class DroppingPacker(WeightPacker):
    format = DENSE

    def pack(self, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> PackedWeight:
        weight = tensors["weight"].clone()
        weight[shape[0] // 16 * 16 :] = 0
        return PackedWeight(DENSE, shape, (weight,))


@bug("L1/linear/reference/float32")
class PackerDropsRows(Quick):
    """Rows beyond a multiple of 16 are not packed."""

    def weight_packers(self) -> Mapping[str, WeightPacker]:
        return {DENSE: DroppingPacker()}


class PackerOfCodes(WeightPacker):
    """Right: keeps the canonical tensors."""

    def __init__(self, format: str, names: Sequence[str]) -> None:
        self.format = format
        self._names = names

    def pack(self, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> PackedWeight:
        return PackedWeight(self.format, shape, tuple(tensors[name] for name in self._names))


class LinearByCodes(VendorOp):
    """Right: multiplies by what the codes stand for, and reads dense weights too."""

    def __init__(self) -> None:
        super().__init__("linear", self.multiply)

    def multiply(self, x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
        if weight.format != DENSE:
            plain = self.values(weight.tensors).to(x.dtype)
            weight = PackedWeight(DENSE, weight.shape, (plain,))
        return linear(x, weight, bias)

    def values(self, tensors: Sequence[Tensor]) -> Tensor:
        codes, scales, *zeros = tensors
        return dequantize(
            {"codes": codes, "scales": scales, **({"zeros": zeros[0]} if zeros else {})}
        )


class WithCodes(Quick):
    """Right, with `multiplies` for weights in 8 and 4 bits."""

    multiplies: ClassVar[type[LinearByCodes]] = LinearByCodes

    def ops(self) -> Mapping[str, Sequence[OpImpl]]:
        # The reference refuses these formats: nobody may ask it.
        return {**super().ops(), "linear": [type(self).multiplies(), ReferenceOp(OPS["linear"])]}

    def weight_packers(self) -> Mapping[str, WeightPacker]:
        by_row = ("codes", "scales")
        names = {INT8: by_row, FP8: by_row, INT4: (*by_row, "zeros")}
        of_codes = {format: PackerOfCodes(format, tensors) for format, tensors in names.items()}
        return {DENSE: DensePacker(), **of_codes}


class ScaleOfTheNextOutput(LinearByCodes):
    def values(self, tensors: Sequence[Tensor]) -> Tensor:
        codes, scales, *zeros = tensors
        return super().values((codes, scales.roll(-1, 0), *zeros))


@bug("L1/packer/int8/float32/product")
class ScalesOfAnotherOutput(WithCodes):
    """Codes are multiplied by the scale of the output behind theirs."""

    multiplies = ScaleOfTheNextOutput


class BitsOfAnotherEncoding(LinearByCodes):
    def values(self, tensors: Sequence[Tensor]) -> Tensor:
        codes, *rest = tensors
        float8 = codes.dtype == torch.float8_e4m3fn
        return super().values((codes.view(torch.float8_e4m3fnuz) if float8 else codes, *rest))


@bug("L1/packer/fp8/float32/product")
class Float8OfAnotherVendor(WithCodes):
    """The bits of e4m3 are read as those of e4m3fnuz, with the same scales."""

    multiplies = BitsOfAnotherEncoding


class ZeroInTheMiddle(LinearByCodes):
    def values(self, tensors: Sequence[Tensor]) -> Tensor:
        codes, scales, *zeros = tensors
        return super().values((codes, scales, *(torch.full_like(one, 8) for one in zeros)))


@bug("L1/packer/int4/float32/product")
class SymmetricInt4(WithCodes):
    """The zeros of groups are taken to be 8, whatever they are."""

    multiplies = ZeroInTheMiddle


class NeverByCodes(LinearByCodes):
    def multiply(self, x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
        return linear(x, weight, bias)


@bug("L1/packer/int8/float32/product")
class LiesAboutCodes(WithCodes):
    """A `linear` for dense weights says that it supports every format."""

    multiplies = NeverByCodes


class WithFusion(Quick):
    composition: ClassVar[tuple[str, ...]] = ("linear", "silu_mul")

    @staticmethod
    def call(*args: Any) -> Any:
        parts = ("linear", "silu_mul")
        return chain(parts, [OPS[part].reference for part in parts])(*args)

    def fusions(self) -> Sequence[Fusion]:
        impl = VendorOp("+".join(self.composition), type(self).call)
        return (Fusion("vendor", self.composition, impl),)


@bug("L1/fusion/vendor/float32")
class FusionLeavesTheBias(WithFusion):
    """A fused op is not its composition: it leaves out the bias."""

    @staticmethod
    def call(*args: Any) -> Any:
        return WithFusion.call(args[0], args[1], None)


@bug("L1/fusion/vendor/float32")
class FusionNobodyRuns(WithFusion):
    """A fused op for a chain that no model asks for."""

    composition = ("rms_norm", "linear")


# ------------------------------------------------------------------------------ L1, L2: attention


class WithAttention(Quick):
    impl: ClassVar[type[ReferenceAttention]]

    def attention(self, spec: AttentionSpec) -> Sequence[AttentionImpl]:
        return (type(self).impl(),)


ATTENTION: tuple[tuple[str, type[ReferenceAttention]], ...] = (
    ("L0/kv_constraints", CountsHalf),
    ("L1/attention/gqa/bfloat16", RefusesDumbly),
    ("L1/attention/gqa/float32/reference/write", TouchesTheNext),
    ("L1/attention/gqa/float32/reference/programs", DriftsApart),
    ("L1/attention/gqa/float32/reference/blocks", SortsBlocks),
    ("L1/attention/gqa/float32/reference/programs", WrongSlot),
    ("L1/attention/window/float32/reference/programs", WindowOffByOne),
    ("L1/attention/softcap/float32/reference/programs", NoSoftcap),
    ("L1/attention/alibi/float32/reference/programs", NoAlibi),
    ("L1/attention/gqa/float32/reference/programs", HeadsInterleaved),
    ("L1/attention/gqa/float32/reference/programs", ReadsWholeBlocks),
    ("L1/attention/gqa/float32/reference/write", KeysAndValuesSwapped),
    ("L2/programs/gqa/float32/reference", CachedExport),
    ("L2/programs/gqa/float32/reference", ForgottenRegion),
)
for _found_by, _impl in ATTENTION:
    _name = f"Attention{_impl.__name__}"
    globals()[_name] = bug(_found_by)(
        type(
            _name,
            (WithAttention,),
            {"impl": _impl, "__doc__": _impl.__doc__, "__module__": __name__},
        )
    )


class OneStagingBuffer(StrictDevice):
    """Block tables (int32) go through one host buffer, used again before it was read."""

    def to_device(self, host: Tensor) -> Tensor:
        if host.dtype != torch.int32 or host.dim() != 2 or self._inside():
            return super().to_device(host)
        staging = self.__dict__.setdefault("_staging", torch.empty(1 << 16, dtype=torch.int32))
        staging[: host.numel()] = host.flatten()
        target = torch.zeros_like(host)
        self._enqueue(lambda: into(target, staging[: host.numel()].view(host.shape)))
        return target


@bug("L2/programs/gqa/float32/reference")
class StagingReused(Quick):
    """Two steps in flight share the memory through which their block tables are copied."""

    device_class, delay = OneStagingBuffer, 0.002


FOUND_BY["buggy_import:ImportPatches"] = "L0/import"

# ------------------------------------------------------------------------------ not wrong


class RunsAgain(Graph):
    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work

    def replay(self) -> None:
        self._work()


class RunsAgainDevice(StrictDevice):
    def capture(self, work: Callable[[], None]) -> Graph | None:
        return RunsAgain(work)


class ReplaysRight(Quick):
    """Not in the list: its graphs do their work again."""

    device_class = RunsAgainDevice

    def capabilities(self, device: int = 0) -> Capabilities:
        return dataclasses.replace(super().capabilities(device), graph_replay=True)


class Refusing(VendorOp):
    def supports(self, sig: OpSignature) -> Support:
        return Support.no("not today")


class RefusesAll(Quick):
    """Not in the list: it has an op and a fusion of its own, for nothing."""

    def ops(self) -> Mapping[str, Sequence[OpImpl]]:
        return {**super().ops(), "add": [Refusing("add", torch.add)]}

    def fusions(self) -> Sequence[Fusion]:
        composition = ("linear", "silu_mul")
        return (Fusion("vendor", composition, Refusing("+".join(composition), torch.add)),)


# ------------------------------------------------------------------------------ isolation


class CrashesInAdd(WithOp):
    """Not in the list: it ends its process."""

    op = "add"

    @staticmethod
    def call(*args: Any) -> Any:
        signal.raise_signal(signal.SIGSEGV)  # to this thread, as a crash of its own


class HangsInAdd(WithOp):
    """Not in the list: it never returns."""

    op = "add"

    @staticmethod
    def call(*args: Any) -> Any:
        time.sleep(1000)
