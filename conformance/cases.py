"""Inputs of the ops: a few variants each, of odd sizes and layouts, for any number of tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..platforms.interface import PackedWeight
from ..platforms.ops import DENSE, OPS

Arguments = tuple[Any, ...]
Make = Callable[[int, torch.dtype], Arguments]

SPECIAL = (float("nan"), float("inf"), float("-inf"))
INDEXED = ("embed", "embed_packed", "copy")  # ops whose second argument holds the values
# Ops whose rows are not those of their input.
SPREADS = ("embed", "embed_packed", "gather_rows", "sample", "draw")


def normal(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape).to(dtype)


def dense(rows: int, columns: int, dtype: torch.dtype) -> PackedWeight:
    return PackedWeight(DENSE, (rows, columns), (normal(rows, columns, dtype=dtype),))


def _embed(ids: torch.dtype) -> Make:
    return lambda n, dtype: (torch.randint(0, 50, (n,), dtype=ids), normal(50, 24, dtype=dtype))


def _embed_packed(ids: torch.dtype, vocab: int, hidden: int) -> Make:
    return lambda n, dtype: (torch.randint(0, vocab, (n,), dtype=ids), dense(vocab, hidden, dtype))


def _norm(*shape: int) -> Make:
    size = shape[-1]
    return lambda n, dtype: (5 * normal(n, *shape, dtype=dtype), normal(size, dtype=dtype), 1e-6)


def _norm_of_view(n: int, dtype: torch.dtype) -> Arguments:
    """The heads' queries inside the packed projection."""
    packed = normal(n, 8, 64, dtype=dtype)
    return packed[:, :4], normal(64, dtype=dtype), 1e-6


def _add_norm(size: int) -> Make:
    return lambda n, dtype: (
        normal(n, size, dtype=dtype),
        normal(n, size, dtype=dtype),
        normal(size, dtype=dtype),
        1e-5,
    )


def _linear(out_features: int, in_features: int, bias: bool, view: bool = False) -> Make:
    def make(n: int, dtype: torch.dtype) -> Arguments:
        whole = normal(n, in_features + 24, dtype=dtype)
        x = whole[:, 8 : 8 + in_features] if view else whole[:, :in_features].contiguous()
        summand = normal(out_features, dtype=dtype) if bias else None
        return x, dense(out_features, in_features, dtype), summand

    return make


def _rope(rotary: int) -> Make:
    def make(n: int, dtype: torch.dtype) -> Arguments:
        # Views of one packed projection, as the model hands them over.
        query, key, _ = normal(n, 8, 64, dtype=dtype).split([4, 2, 2], dim=1)
        angles = torch.outer(torch.arange(100.0), torch.rand(rotary // 2))
        table = torch.cat((angles.cos(), angles.sin()), 1)
        return query, key, torch.randint(0, 100, (1, n)), table

    return make


def _gated(size: int) -> Make:
    return lambda n, dtype: (3 * normal(n, 2 * size, dtype=dtype),)


def _two(*shape: int) -> Make:
    return lambda n, dtype: (normal(n, *shape, dtype=dtype), normal(n, *shape, dtype=dtype))


def _gather(n: int, dtype: torch.dtype) -> Arguments:
    return normal(n, 40, dtype=dtype), torch.randint(0, n, (2 * n,))


def _copy(n: int, dtype: torch.dtype) -> Arguments:
    return normal(n, 7, dtype=dtype), normal(n, 7, dtype=torch.float32)


def _scores(vocab: int) -> Make:
    return lambda n, dtype: (normal(n, vocab, dtype=torch.float32).round(),)  # many are equal


def _draw(vocab: int, top_p: float, min_p: float, top_k: int) -> Make:
    """Temperatures around 1, seeds of 64 bits."""

    def make(n: int, dtype: torch.dtype) -> Arguments:
        floats = torch.tensor([[1.0], [top_p], [min_p]]).repeat(1, n)
        floats[0] += torch.rand(n)
        words = torch.randint(0, 1 << 32, (3, n))
        ints = torch.stack((torch.full((n,), top_k), *words[:2], words[2] % 5, words[2] % 9999))
        return 3 * normal(n, vocab, dtype=torch.float32), floats, ints, 8

    return make


def _moe(experts: int, top_k: int, hidden: int, width: int, renormalize: bool = False) -> Make:
    """Weights as large as trained ones, so that what is summed stays near 1."""

    def make(n: int, dtype: torch.dtype) -> Arguments:
        scores = normal(n, experts, dtype=dtype)
        gate_up, down = (
            PackedWeight(DENSE, shape, ((torch.randn(shape) / shape[1] ** 0.5).to(dtype),))
            for shape in ((experts * 2 * width, hidden), (experts * hidden, width))
        )
        return normal(n, hidden, dtype=dtype), scores, gate_up, down, top_k, renormalize

    return make


_GATED: Mapping[str, Make] = {f"size {size}": _gated(size) for size in (1, 48, 65)}

CASES: Mapping[str, Mapping[str, Make]] = {
    "embed": {"int32": _embed(torch.int32), "int64": _embed(torch.int64)},
    "embed_packed": {
        "int32, 96 of 64": _embed_packed(torch.int32, 96, 64),
        "int64, 50 of 33": _embed_packed(torch.int64, 50, 33),
    },
    "rms_norm": {
        "size 64": _norm(64),
        "size 120": _norm(120),
        "heads of 128": _norm(4, 128),
        "heads in a view": _norm_of_view,
    },
    "add_rms_norm": {"size 72": _add_norm(72)},
    "linear": {
        "17 of 64": _linear(17, 64, False),
        "17 of 64, bias": _linear(17, 64, True),
        "96 of 64": _linear(96, 64, False),
        "96 of 64, bias": _linear(96, 64, True),
        "33 of 50, view": _linear(33, 50, True, view=True),
    },
    "rope": {"all of 64": _rope(64), "32 of 64": _rope(32)},
    "silu_mul": _GATED,
    "gelu_mul": _GATED,
    "gelu_tanh_mul": _GATED,
    "add": {"size 7": _two(7), "size 40": _two(40)},
    "moe": {
        "2 of 6": _moe(6, 2, 64, 32),
        "4 of 20, renormalized": _moe(20, 4, 64, 96, True),
        "1 of 3, 40 by 50": _moe(3, 1, 40, 50),
        "all of 5": _moe(5, 5, 64, 32),
    },
    "gather_rows": {"size 40": _gather},
    "copy": {"from float32": _copy, "size 33": _two(33)},
    "sample": {"vocab 300": _scores(300), "vocab 17": _scores(17)},
    "draw": {
        "vocab 300": _draw(300, 1.0, 0.0, 0),
        "vocab 300, top_k": _draw(300, 1.0, 0.0, 7),
        "vocab 301, top_p": _draw(301, 0.8, 0.0, 0),
        "vocab 17, all filters": _draw(17, 0.9, 0.02, 9),
    },
}
"""Op → variant → arguments for a number of tokens in a dtype, from torch's generator."""

CHAIN_CASES: Mapping[str, Make] = {
    "96 of 64": _linear(96, 64, False),
    "96 of 64, bias": _linear(96, 64, True),
    "34 of 50, bias": _linear(34, 50, True),
}
"""Arguments of chains that begin with `linear`."""


def sizes(op: str, args: Arguments) -> dict[str, int]:
    """The static sizes by which models bind `op` for these arguments."""
    first = args[0]
    if op in ("embed", "embed_packed"):
        return {"vocab": args[1].shape[0], "hidden": args[1].shape[1]}
    if op.startswith("linear"):
        out_features, in_features = args[1].shape
        own = {"in_features": in_features, "out_features": out_features}
        # Of a chain, the sizes of all parts (`OpBinder.bind_chain`).
        return own | {"size": out_features // 2} if op.endswith("_mul") else own
    if op == "rope":
        return {"head_dim": first.shape[-1], "rope_dim": args[3].shape[-1]}
    if op == "moe":
        return {
            "hidden": first.shape[-1],
            "width": args[3].shape[1],
            "experts": args[1].shape[-1],
            "top_k": args[4],
        }
    if op in ("sample", "draw"):
        return {"vocab": first.shape[-1]}
    return {"size": first.shape[-1] // 2 if op.endswith("_mul") else first.shape[-1]}


@dataclass(frozen=True)
class OpCase:
    """One call of an op, made anew whenever asked. `special`: the value of one element of the
    second row's (of the only row's) input."""

    op: str
    variant: str
    tokens: int
    dtype: torch.dtype
    seed: int
    special: float | None = None

    def arguments(self) -> Arguments:
        table = CASES.get(self.op, CHAIN_CASES)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            args = table[self.variant](self.tokens, self.dtype)
        if self.special is None:
            return args
        return spoiled(self.op, args, self.special)

    def text(self) -> str:
        """Code that makes the arguments, and what they are."""
        shown = ", ".join(_shown(arg) for arg in self.arguments())
        special = "" if self.special is None else f", special=float({str(self.special)!r})"
        return (
            "import torch; from trimaran.conformance.cases import OpCase\n"
            f"OpCase({self.op!r}, {self.variant!r}, {self.tokens}, {self.dtype}, "
            f"{self.seed}{special}).arguments()\n"
            f"# {self.op}({shown})"
        )


def spoiled(op: str, args: Arguments, value: float) -> Arguments:
    """The arguments with `value` as the first element of the second (of the only) row of the one
    that holds the values, which is copied."""
    at = 1 if op in INDEXED else 0
    given = args[at]
    packed = isinstance(given, PackedWeight)
    bad = same_layout(given.tensors[0] if packed else given)
    bad[min(1, len(bad) - 1)].view(-1)[0] = value
    replaced = dataclasses.replace(given, tensors=(bad,)) if packed else bad
    return (*args[:at], replaced, *args[at + 1 :])


def same_layout(tensor: Tensor) -> Tensor:
    """A copy with the same strides, the gaps of a view included (which `clone` closes)."""
    span = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    whole = tensor.new_zeros(1 + span)
    return whole.as_strided(tensor.shape, tensor.stride()).copy_(tensor)


def _shown(arg: Any) -> str:
    if isinstance(arg, PackedWeight):
        return f"weight {list(arg.shape)}"
    if not isinstance(arg, Tensor):
        return repr(arg)
    name = str(arg.dtype).removeprefix("torch.")
    if arg.numel() <= 6:
        return f"{name} {arg.tolist()}"
    strides = "" if arg.is_contiguous() else f" strides {list(arg.stride())}"
    return f"{name} {list(arg.shape)}{strides}"


assert CASES.keys() == OPS.keys(), "every op has cases"
