"""The ops of the contract: each one's name, plain-torch reference, tolerance and composition.

The reference *is* the definition: an implementation agrees with it within the tolerance, and
places NaN and infinities where it does. The arithmetic follows `transformers` step by step (where
it rounds to the model's dtype and where it stays in fp32), so that fp32 runs agree token by token.
The ops `kv_write` and `attention` are methods of `AttentionImpl`, because they share its layout;
their reference is `ReferenceAttention`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .draw import SHORT as SHORT
from .draw import draw as draw
from .draw import scale as scale
from .interface import DENSE as DENSE
from .interface import INT4_GROUPS, OpImpl, OpSignature, PackedWeight, Support, WeightPacker


class Tolerance(NamedTuple):
    """|found - expected| <= atol + rtol * |expected|."""

    rtol: float
    atol: float


EXACT = Tolerance(0.0, 0.0)

_ROUNDING = {
    torch.float32: Tolerance(1e-5, 1e-6),
    torch.bfloat16: Tolerance(1.6e-2, 1e-3),
    torch.float16: Tolerance(2e-3, 1e-4),
}
# The error function and tanh are good to an ulp near 1; in the gate's tail, 1 - (nearly 1), that
# ulp (6e-8) times gate and up is an error of no relation to the result.
_GELU = {**_ROUNDING, torch.float32: Tolerance(1e-5, 1e-5)}
# x cos ± y sin: the reference rounds each product to the dtype, a fused kernel the sum alone. Where
# the products cancel, what differs is half an ulp of each, whatever the sum: for |x| < 4 (a normal
# deviate) that is at most 2 * 2^-7 = 0.016 in bfloat16, and 2 * 2^-10 = 0.002 in float16.
_ROTATED = {
    torch.float32: _ROUNDING[torch.float32],
    torch.bfloat16: Tolerance(2e-2, 2e-2),
    torch.float16: Tolerance(4e-3, 4e-3),
}
# A sum of products may be taken in any order: its error grows with the terms, not the result.
_ACCUMULATED = {
    torch.float32: Tolerance(1e-4, 1e-4),
    torch.bfloat16: Tolerance(2e-2, 2e-2),
    torch.float16: Tolerance(4e-3, 4e-3),
}
_COPIED = dict.fromkeys(_ROUNDING, EXACT)


@dataclass(frozen=True, slots=True)
class OpSpec:
    """One op. `required` ops must work on every platform; the others may be left out: those with a
    `composition`, standard ops run in order, equal it, and the rest is served by the reference.
    `recordable`: of the reference, see `OpImpl`."""

    name: str
    reference: Callable[..., Any]
    tolerance: Mapping[torch.dtype, Tolerance]
    required: bool = True
    composition: tuple[str, ...] = ()
    recordable: bool = True


# ---------------------------------------------------------------------------------------------
# References
# ---------------------------------------------------------------------------------------------


def embed(ids: Tensor, table: Tensor) -> Tensor:
    """ids `[tokens]` (int32 or int64), table `[vocab, hidden]` -> `[tokens, hidden]`."""
    return F.embedding(ids, table)


def embed_packed(ids: Tensor, weight: PackedWeight) -> Tensor:
    """`embed` where the table is the head as well: ids `[tokens]`, dense weight `[vocab, hidden]`,
    packed as for `linear` -> `[tokens, hidden]`."""
    if weight.format != DENSE:
        raise ValueError(f"The reference of `embed_packed` reads no {weight.format!r} weights.")
    return embed(ids, weight.tensors[0])


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x `[..., size]`, weight `[size]` -> like x: x / sqrt(mean(x^2) + eps) * weight.

    Zhang & Sennrich 2019, eq. 4. As in `transformers` (LlamaRMSNorm, Qwen3RMSNorm) the quotient
    is taken in fp32 and rounded to x's dtype before the weight is multiplied.
    """
    wide = x.float()
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * (wide * scale).to(x.dtype)


def add(a: Tensor, b: Tensor) -> Tensor:
    """a, b of one shape and dtype -> a + b."""
    return a + b


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x, residual `[tokens, hidden]` -> (rms_norm(x + residual), x + residual).

    The sum is rounded to x's dtype before it is normalised.
    """
    total = add(x, residual)
    return rms_norm(total, weight, eps), total


def linear(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """x `[tokens, in]`, dense weight `[out, in]`, bias `[out]` -> x @ weight^T + bias.

    By a quantized weight an implementation multiplies what its codes stand for. It may round x as
    well, per token, to int8 (W8A8, W4A8) and under `fp8` to e4m3, but not under `w4a16`: then it is
    off by `activation_rounding` or `float8_rounding` besides.
    """
    if weight.format != DENSE:
        raise ValueError(f"The reference of `linear` reads dense weights, not {weight.format!r}.")
    return F.linear(x, weight.tensors[0], bias)


def activation_rounding(x: Tensor, weight: Tensor) -> Tensor:
    """x `[tokens, in]`, weight `[out, in]` -> fp32 `[tokens, out]`: the most that x @ weight^T is
    off by when each token is rounded to int8 with the scale max|x| / 127: half a step for each
    input."""
    half_step = x.float().abs().amax(dim=-1, keepdim=True) / 254
    return half_step * weight.float().abs().sum(dim=-1)


def float8_rounding(x: Tensor, weight: Tensor) -> Tensor:
    """As `activation_rounding`, of e4m3 with the scale max|x| / 448: half a step is a sixteenth of
    the number for each input, and half of the least step, 2^-9, where that is more."""
    wide = x.float().abs()
    least = wide.amax(dim=-1, keepdim=True) * (2**-10 / 448)
    return torch.maximum(wide / 16, least) @ weight.float().abs().T


def rope(query: Tensor, key: Tensor, positions: Tensor, cos_sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary embedding (Su et al. 2021, eq. 34), the "rotate half" layout of `transformers`.

    query `[tokens, heads, head_dim]`, key `[tokens, kv_heads, head_dim]`, positions
    `[axes, tokens]` (the first axis is used), cos_sin fp32 `[max_position, rotary_dim]`: the first
    half of a row holds the cosines of the rotary_dim / 2 angles, the second half their sines
    (scaled already, where the model scales them). Channels past rotary_dim pass unchanged. Cosine
    and sine are rounded to the query's dtype before they are multiplied. Returns new tensors.
    """
    row = cos_sin.index_select(0, positions[0])
    cos, sin = (half.repeat(1, 2).to(query.dtype).unsqueeze(1) for half in row.chunk(2, dim=-1))
    return _rotate(query, cos, sin), _rotate(key, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x `[tokens, heads, head_dim]`, cos and sin `[tokens, 1, rotary_dim]`."""
    turned, kept = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((turned, kept), dim=-1) if kept.shape[-1] else turned


def silu_mul(gate_up: Tensor) -> Tensor:
    """gate_up `[tokens, 2 * size]`, gate first -> silu(gate) * up (Shazeer 2020, SwiGLU)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def gelu_mul(gate_up: Tensor) -> Tensor:
    """gate_up `[tokens, 2 * size]`, gate first -> gelu(gate) * up, gelu by the error function."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.gelu(gate) * up


def gelu_tanh_mul(gate_up: Tensor) -> Tensor:
    """As `gelu_mul`, gelu by its tanh approximation (Hendrycks & Gimpel 2016, section 2)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh") * up


def moe(
    x: Tensor,
    scores: Tensor,
    gate_up: PackedWeight,
    down: PackedWeight,
    top_k: int,
    renormalize: bool,
) -> Tensor:
    """x `[tokens, hidden]`, the router's scores `[tokens, experts]` -> `[tokens, hidden]`: the sum
    of the chosen experts' results, down(silu(gate x) * up x), by their shares (Shazeer et al. 2017,
    section 2, with the gates of Fedus et al. 2021: the softmax comes first).

    The experts' weights are stacked: dense gate_up `[experts * 2 * width, hidden]`, of each expert
    the gate's rows before the up projection's, and down `[experts * hidden, width]`. A token takes
    the `top_k` experts with the highest scores, of equal ones the first; their shares are the
    softmax of all its scores, in fp32, with `renormalize` divided by their sum, and rounded to x's
    dtype (Qwen3MoeSparseMoeBlock of `transformers`). Products with shares are summed in fp32.
    Raises ValueError for weights that are not dense; by quantized ones an implementation
    multiplies as `linear` does.
    """
    for weight in (gate_up, down):
        if weight.format != DENSE:
            raise ValueError(f"The reference of `moe` reads dense weights, not {weight.format!r}.")
    experts = scores.shape[1]
    gates_ups = gate_up.tensors[0].chunk(experts)
    downs = down.tensors[0].chunk(experts)
    wide = scores.float()
    chosen = wide.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    shares = wide.softmax(-1).gather(1, chosen)
    if renormalize:
        shares = shares / shares.sum(-1, keepdim=True)
    results = x.new_zeros(*chosen.shape, x.shape[1])
    for expert in sorted(set(chosen.flatten().tolist())):
        tokens, places = (chosen == expert).nonzero(as_tuple=True)
        inner = silu_mul(F.linear(x[tokens], gates_ups[expert]))
        results[tokens, places] = F.linear(inner, downs[expert])
    weighted = results.float() * shares.to(x.dtype).float().unsqueeze(-1)
    return weighted.sum(1).to(x.dtype)


def gather_rows(hidden: Tensor, indices: Tensor) -> Tensor:
    """hidden `[tokens, hidden]`, indices `[rows]` -> `[rows, hidden]`: the rows whose logits are
    wanted, so that no others are computed."""
    return hidden.index_select(0, indices)


def copy(target: Tensor, source: Tensor) -> Tensor:
    """Copy source into target (same shape, dtypes may differ); returns target."""
    return target.copy_(source)


def sample(scores: Tensor) -> Tensor:
    """scores fp32 `[rows, vocab]` -> int64 `[rows]`: the highest score's index, the lowest such. A
    NaN counts as the highest: so the caller finds it.

    With Gumbel noise added to log-probabilities by the caller this draws from the distribution
    (Gumbel 1954; Maddison et al. 2014, section 2); without noise it is greedy.
    """
    return scores.argmax(dim=-1)


OPS: Mapping[str, OpSpec] = {
    spec.name: spec
    for spec in (
        OpSpec("embed", embed, _COPIED),
        OpSpec("rms_norm", rms_norm, _ROUNDING),
        OpSpec("linear", linear, _ACCUMULATED),
        OpSpec("rope", rope, _ROTATED),
        OpSpec("silu_mul", silu_mul, _ROUNDING),
        OpSpec("gelu_mul", gelu_mul, _GELU),
        OpSpec("gelu_tanh_mul", gelu_tanh_mul, _GELU),
        OpSpec("add", add, _ROUNDING),
        OpSpec("gather_rows", gather_rows, _COPIED),
        OpSpec("copy", copy, _COPIED),
        OpSpec("sample", sample, _COPIED),
        OpSpec("embed_packed", embed_packed, _COPIED, False),
        OpSpec("moe", moe, _ACCUMULATED, False, recordable=False),
        OpSpec(
            "draw",
            draw,
            dict.fromkeys(_ROUNDING, _ROUNDING[torch.float32]),
            False,
            recordable=False,
        ),
        OpSpec("add_rms_norm", add_rms_norm, _ROUNDING, False, ("add", "rms_norm")),
    )
}


CHAINS: tuple[tuple[str, ...], ...] = (
    ("linear", "silu_mul"),
    ("linear", "gelu_mul"),
    ("linear", "gelu_tanh_mul"),
)
"""The chains of ops that models run: what a platform's own `Fusion` may stand for."""


def chain(composition: Sequence[str], calls: Sequence[Callable[..., Any]]) -> Callable[..., Any]:
    """`calls`, implementations of the ops of `composition`, as one: the first takes its op's
    number of arguments; each later one the result before it and the rest of its own."""
    counts = [len(inspect.signature(OPS[op].reference).parameters) for op in composition]

    def run(*args: Any) -> Any:
        result = calls[0](*args[: counts[0]])
        position = counts[0]
        for call, count in zip(calls[1:], counts[1:], strict=True):
            result = call(result, *args[position : position + count - 1])
            position += count - 1
        return result

    return run


# ---------------------------------------------------------------------------------------------
# The references as implementations
# ---------------------------------------------------------------------------------------------


class ReferenceOp(OpImpl):
    """An op's reference as an implementation: always supported, never preferred."""

    name = "reference"
    priority = -100

    def __init__(self, spec: OpSpec) -> None:
        self.op = spec.name
        self.recordable = spec.recordable
        self._reference = spec.reference

    def supports(self, sig: OpSignature) -> Support:
        if sig.weight_format != DENSE:
            return Support.no("the reference reads dense weights")
        return Support.yes("plain torch")

    def __call__(self, *args: Any) -> Any:
        return self._reference(*args)


def int4_group(in_features: int) -> int | None:
    """Inputs that share a scale in int4 weights quantized at load; None: they are kept in int8."""
    return next((group for group in INT4_GROUPS if in_features % group == 0), None)


class DensePacker(WeightPacker):
    """Leaves a dense weight as it is; what a platform without packers of its own uses."""

    format = DENSE

    def pack(self, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> PackedWeight:
        return PackedWeight(DENSE, shape, (tensors["weight"],))


def reference_ops() -> dict[str, list[OpImpl]]:
    """Every op by its reference, in the form of `Platform.ops()`."""
    return {name: [ReferenceOp(spec)] for name, spec in OPS.items()}
