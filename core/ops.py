"""The binding of ops to implementations: chosen once, when a model is built, and recorded.

A platform's candidates are asked in order of priority whether they support the op's signature;
the first that does is called directly from then on. Where none does, a fused op becomes its
composition and any other op its torch reference. Every refusal is kept with its reason.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..platforms.interface import (
    AttentionImpl,
    AttentionSpec,
    Device,
    OpImpl,
    OpSignature,
    PackedWeight,
    Platform,
    Support,
    WeightPacker,
)
from ..platforms.ops import DENSE, OPS, DensePacker, chain
from .errors import PlatformError
from .quantization.codes import quantize, round_trip
from .quantization.scheme import PLAIN, WeightScheme, choose_scheme

logger = logging.getLogger("trimaran.ops")

REFERENCE = "reference"

Candidate = TypeVar("Candidate", OpImpl, AttentionImpl)

Wrap = Callable[[str, Callable[..., Any]], Callable[..., Any]]
"""An op's name and what it is bound to → what is called in its place."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """An implementation that was not chosen, and why."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Binding:
    """One op's choice. `chosen` is an implementation's name, `reference`, or for a fused op
    without one `add + rms_norm`. `recordable`: see `OpImpl`."""

    op: str
    signature: OpSignature | AttentionSpec
    chosen: str
    refused: tuple[Refusal, ...] = ()
    recordable: bool = True


class WeightUse(NamedTuple):
    """The op that reads a packed weight, and its static sizes."""

    op: str
    sizes: Mapping[str, int]

    @classmethod
    def by_linear(cls, shape: tuple[int, int]) -> WeightUse:
        """A linear layer's `[out, in]`."""
        out_features, in_features = shape
        return cls("linear", {"in_features": in_features, "out_features": out_features})


class OpBinder:
    """Binds ops for one platform. Equal signatures are bound once."""

    def __init__(
        self,
        platform: Platform,
        device: Device | None = None,
        wrap: Wrap | None = None,
        quantization: str | None = None,
        attention_backend: str = "auto",
    ) -> None:
        """`device` is where bound ops will run; sizing a cache needs none. `wrap`: see
        `models.trace`. `quantization`: of the weights of linear layers, see `scheme`.
        `attention_backend`: the name of the attention implementation, `auto` for the best."""
        self.platform = platform
        self.quantization = quantization
        self.attention_backend = attention_backend
        self.remarks: dict[str, int] = {}
        """What a user should know of the choices → its level in the log."""
        self._device = device
        self._wrap = wrap
        self._impls = platform.ops()
        self._packers = platform.weight_packers()
        self._bound: dict[tuple[Any, ...], Callable[..., Any]] = {}
        self._attention: dict[AttentionSpec, AttentionImpl] = {}
        self._report: list[Binding] = []
        self._logged: set[tuple[str, str]] = set()

    @property
    def device(self) -> Device:
        if self._device is None:
            raise PlatformError("This binder was opened without a device: it can only size.")
        return self._device

    def bind(
        self, op: str, dtype: torch.dtype, weight_format: str = DENSE, /, **sizes: int
    ) -> Callable[..., Any]:
        """The callable for `op` with `dtype` operands and these static sizes."""
        key = (op, dtype, weight_format, *sorted(sizes.items()))
        if key not in self._bound:
            chosen = self._choose(OpSignature(op, dtype, sizes, weight_format))
            self._bound[key] = self._wrap(op, chosen) if self._wrap else chosen
        return self._bound[key]

    def bind_chain(
        self,
        dtype: torch.dtype,
        *parts: tuple[str, Mapping[str, int]],
        weight_format: str = DENSE,
    ) -> Callable[..., Any]:
        """The callable for a chain of ops, each with its sizes: the platform's own fusion of them
        where it has one for these sizes, else the bound ops one after the other (`ops.chain`)."""
        composition = tuple(op for op, _ in parts)
        sizes = {name: size for _, own in parts for name, size in own.items()}
        signature = OpSignature("+".join(composition), dtype, sizes, weight_format)
        key = (signature.op, dtype, weight_format, *sorted(sizes.items()))
        if key not in self._bound:
            chosen = self._fused(signature, composition)
            if chosen is None:
                formats = [weight_format if op == "linear" else DENSE for op, _ in parts]
                calls = [
                    self.bind(op, dtype, format, **own)
                    for (op, own), format in zip(parts, formats, strict=True)
                ]
                self._bound[key] = chain(composition, calls)
            else:
                self._bound[key] = self._wrap(signature.op, chosen) if self._wrap else chosen
        return self._bound[key]

    def _fused(self, signature: OpSignature, composition: tuple[str, ...]) -> OpImpl | None:
        """The platform's own fusion for this use, if it has one."""
        chosen, refused = _first_supporting(
            [one.impl for one in self.platform.fusions() if one.composition == composition],
            lambda impl: impl.supports(signature),
        )
        if chosen is not None or refused:
            name = chosen.name if chosen else " + ".join(composition)
            recordable = chosen is None or chosen.recordable  # of the parts each is bound by itself
            self._record(Binding(signature.op, signature, name, refused, recordable))
        return chosen

    def attention(self, spec: AttentionSpec) -> AttentionImpl:
        """The attention implementation for `spec`; PlatformError says why there is none."""
        if spec not in self._attention:
            candidates = self._asked(self.platform.attention(spec))
            layouts = self.platform.kv_constraints(spec).layouts
            chosen, refused = _first_supporting(
                candidates, lambda impl: _takes_layout(impl, layouts) and impl.supports(spec)
            )
            if chosen is None:
                reasons = "; ".join(f"{r.name}: {r.reason}" for r in refused) or "none offered"
                raise PlatformError(
                    f"Platform {self.platform.name!r} has no attention for {spec} ({reasons})."
                )
            self._record(Binding("attention", spec, chosen.name, refused))
            self._attention[spec] = chosen
        return self._attention[spec]

    def _asked(self, offered: Sequence[AttentionImpl]) -> Sequence[AttentionImpl]:
        asked = [impl for impl in offered if self.attention_backend in ("auto", impl.name)]
        if not asked:
            raise PlatformError(
                f"Platform {self.platform.name!r} offers no attention {self.attention_backend!r} "
                f"here, but {', '.join(impl.name for impl in offered) or 'none'}: change "
                "--attention-backend, or install what it needs."
            )
        return asked

    def scheme(self, in_features: int, *, head: bool = False) -> WeightScheme:
        """How the weight of a linear layer with so many inputs on this rank is quantized."""
        scheme, reason = choose_scheme(self.quantization, in_features, head=head)
        if reason:
            self.remark(reason, logging.INFO)
        return scheme

    def weight_format(self, scheme: WeightScheme, dtype: torch.dtype, use: WeightUse) -> str:
        """What the op of `use` reads: the scheme's format, or dense weights where the platform has
        no packer or no implementation for it."""
        wanted = scheme.format
        if wanted == DENSE:
            return DENSE
        reason = f"no packer for {wanted}"
        if wanted in self._packers:
            signature = OpSignature(use.op, dtype, use.sizes, wanted)
            chosen, refused = _first_supporting(
                self._impls.get(use.op, ()), lambda impl: impl.supports(signature)
            )
            if chosen is not None:
                return wanted
            reasons = "; ".join(f"{r.name}: {r.reason}" for r in refused)
            reason = reasons or f"no {use.op} of its own"
        self.remark(
            f"platform {self.platform.name!r} does not multiply by {wanted} weights ({reason}): "
            "they are turned back into dense ones after they were quantized, with the same values "
            "and no memory saved",
            logging.WARNING,
        )
        return DENSE

    def remark(self, text: str, level: int) -> None:
        """Say it once; a binder that only sizes keeps it to itself."""
        if text not in self.remarks:
            self.remarks[text] = level
            if self._device is not None:
                logger.log(level, "%s", text)

    def packer(
        self,
        dtype: torch.dtype,
        use: WeightUse,
        reader: Any = None,
        weight_format: str = DENSE,
    ) -> WeightPacker:
        """Who lays out a weight for the op of `use`, or for `reader`, what reads it otherwise (a
        fusion with that op). The torch reference reads the plain tensor."""
        if weight_format != DENSE:
            return self._packers[weight_format]
        bound = self.bind(use.op, dtype, **use.sizes)
        packed = any(isinstance(inspect.unwrap(one), OpImpl) for one in (bound, reader) if one)
        return self._packers.get(DENSE, DensePacker()) if packed else DensePacker()

    def looks_up_packed(self, dtype: torch.dtype, shape: tuple[int, int]) -> bool:
        """Are rows of a dense weight `[vocab, hidden]` to be looked up as it is packed for
        `linear`? Not where packing leaves it as it is: `embed` reads it then."""
        packer = self.packer(dtype, WeightUse.by_linear(shape))
        if packer.packed_bytes(dtype, shape) is None:
            return False
        use = OpSignature("embed_packed", dtype, {"vocab": shape[0], "hidden": shape[1]})
        return any(impl.supports(use) for impl in self._impls.get(use.op, ()))

    def pack(
        self,
        weight: Tensor,
        reader: Any = None,
        scheme: WeightScheme = PLAIN,
        *,
        largest: Tensor | None = None,
        shared: bool = False,
        use: WeightUse | None = None,
    ) -> PackedWeight:
        """The weight `[out, in]`, quantized by `scheme`, as `packer` lays it out; what it holds
        beside the device's own allocations is entered into the device's accounts. `largest`: the
        largest magnitudes of the rows that its rows are parts of. `shared`: the weight serves
        others too and is left as it is. `use`: None for a linear layer's. Raises NotFiniteError for
        what has no codes."""
        shape = (weight.shape[0], weight.shape[1])
        use = use or WeightUse.by_linear(shape)
        format = self.weight_format(scheme, weight.dtype, use)
        tensors = {"weight": weight}
        if format != DENSE:
            tensors = {
                name: self.device.alloc(kind.shape, kind.dtype, tag="weights")
                for name, kind in scheme.tensors(shape).items()
            }
            quantize(weight, scheme, tensors, largest)
        elif scheme != PLAIN:
            if shared:
                tensors["weight"] = self.device.alloc(shape, weight.dtype, tag="weights")
            round_trip(weight, scheme, tensors["weight"], largest)
        packed = self.packer(weight.dtype, use, reader, format).pack(tensors, shape)
        if packed.extra_bytes:
            self.device.account(packed, packed.extra_bytes, tag="weights")
        return packed

    def layouts(self) -> dict[str, str]:
        """The layouts of packed weights that may be kept in a file, by canonical format."""
        return {format: one.layout for format, one in self._packers.items() if one.layout}

    def report(self) -> list[Binding]:
        """Every choice so far, in order."""
        return list(self._report)

    def _choose(self, signature: OpSignature) -> Callable[..., Any]:
        op = signature.op
        chosen, refused = _first_supporting(
            self._impls.get(op, ()), lambda impl: impl.supports(signature)
        )
        if chosen is not None:
            self._record(Binding(op, signature, chosen.name, refused, chosen.recordable))
            return chosen
        composed = self._compose(signature)
        name = " + ".join(OPS[op].composition) if composed else REFERENCE
        recordable = bool(composed) or OPS[op].recordable
        self._record(Binding(op, signature, name, refused, recordable))
        return composed or OPS[op].reference

    def _compose(self, signature: OpSignature) -> Callable[..., Any] | None:
        """A fused op as its parts, each bound by itself; None for an op that has no parts."""
        build = COMPOSITIONS.get(signature.op)
        if build is None:
            return None
        parts = OPS[signature.op].composition
        return build(*(self.bind(part, signature.dtype, **signature.sizes) for part in parts))

    def _record(self, binding: Binding) -> None:
        self._report.append(binding)
        if self._device is None or (binding.op, binding.chosen) in self._logged:
            return  # a binder that only sizes has nothing to announce
        self._logged.add((binding.op, binding.chosen))
        not_taken = "; ".join(f"{r.name}: {r.reason}" for r in binding.refused)
        logger.info(
            "%s: %s%s", binding.op, binding.chosen, f" (not {not_taken})" if not_taken else ""
        )


def _compose_add_rms_norm(add: Callable[..., Any], norm: Callable[..., Any]) -> Callable[..., Any]:
    def add_rms_norm(
        x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        total = add(x, residual)
        return norm(total, weight, eps), total

    return add_rms_norm


COMPOSITIONS: Mapping[str, Callable[..., Callable[..., Any]]] = {
    "add_rms_norm": _compose_add_rms_norm,
}
"""How the parts named by `OPS[op].composition`, in that order, make up a fused op."""


def _takes_layout(impl: AttentionImpl, layouts: Sequence[str]) -> Support:
    if not layouts or impl.layout in layouts:
        return Support.yes()
    return Support.no(
        f"its cache layout {impl.layout} is none of the device's {', '.join(layouts)}"
    )


def _first_supporting(
    candidates: Sequence[Candidate], ask: Callable[[Candidate], Support]
) -> tuple[Candidate | None, tuple[Refusal, ...]]:
    """The supporting candidate of the highest priority, and why not each of the others."""
    chosen: Candidate | None = None
    refused = []
    for candidate in sorted(candidates, key=lambda impl: -impl.priority):
        if chosen is not None:
            refused.append(Refusal(candidate.name, f"outranked by {chosen.name}"))
        elif support := ask(candidate):
            chosen = candidate
        else:
            refused.append(Refusal(candidate.name, support.reason))
    return chosen, tuple(refused)
