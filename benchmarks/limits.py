"""What the machine and the model's shape allow (the formulas stand in docs/performance.md)."""

from __future__ import annotations

from dataclasses import dataclass

import shapes


@dataclass(frozen=True)
class WeightFormat:
    """How a quantized matrix is stored: `bits` a weight and `scale_bits` a group of a row.

    `group` None is the whole row. The tied head may be in another format (`head`).
    """

    bits: float
    scale_bits: float = 0
    group: int | None = None
    head: WeightFormat | None = None

    def matrix_bytes(self, rows: int, columns: int) -> float:
        groups = columns / (self.group or columns)
        return rows * (columns * self.bits + groups * self.scale_bits) / 8

    def weight_bytes(self, sizes: dict[str, int]) -> float:
        """Bytes that one decode step reads: every matrix of the body, and the tied head."""
        body = sum(self.matrix_bytes(*matrix) for matrix in shapes.layer_matrices(sizes))
        head = (self.head or self).matrix_bytes(sizes["vocab_size"], sizes["hidden_size"])
        return sizes["num_hidden_layers"] * body + head


INT8 = WeightFormat(8, scale_bits=32)
# Q8_0 and Q4_0: a 16-bit scale for 32 weights. Q6_K (the head beside Q4_0): 210 bytes for 256.
WEIGHTS = {
    "bf16": WeightFormat(16),
    "int8": INT8,
    "int4": WeightFormat(4, scale_bits=32, group=128, head=INT8),
    "q8_0": WeightFormat(8, scale_bits=16, group=32),
    "q4_0": WeightFormat(4, scale_bits=16, group=32, head=WeightFormat(210 * 8 / 256)),
}
# A row of a quantized KV cache is one token's key or value of one head: 8 bits each and a scale.
KV_BITS = {"bf16": (16, 0), "int8": (8, 32)}


def kv_bytes(sizes: dict[str, int], kv: str = "bf16") -> float:
    """Bytes of one token in the KV cache."""
    bits, scale_bits = KV_BITS[kv]
    rows = 2 * sizes["num_hidden_layers"] * sizes["num_key_value_heads"]
    return rows * (sizes["head_dim"] * bits + scale_bits) / 8


@dataclass(frozen=True)
class Limits:
    """Bounds for one shape in one precision, at the rates found in a round."""

    sizes: dict[str, int]
    read_gb_s: float
    gemm_gflop_s: float
    weights: str = "bf16"
    kv: str = "bf16"

    def decode_tokens_per_second(self, batch: float, context: float) -> float:
        """Every step reads the weights once and each sequence's KV cache."""
        read = WEIGHTS[self.weights].weight_bytes(self.sizes)
        read += kv_bytes(self.sizes, self.kv) * context * batch
        return batch / (read / (self.read_gb_s * 1e9))

    def prefill_tokens_per_second(self, length: int) -> float:
        attention = 2 * length * self.sizes["num_attention_heads"] * self.sizes["head_dim"]
        flops = 2 * shapes.num_body_parameters(self.sizes)
        flops += attention * self.sizes["num_hidden_layers"]
        return self.gemm_gflop_s * 1e9 / flops

    def seconds_per_context_token(self) -> float:
        """What one more token of context adds to a decode step."""
        return kv_bytes(self.sizes, self.kv) / (self.read_gb_s * 1e9)

    def memory_gib(self, kv_tokens: int) -> float:
        """Weights, and a KV cache of so many tokens."""
        weights = WEIGHTS[self.weights].weight_bytes(self.sizes)
        return (weights + kv_tokens * kv_bytes(self.sizes, self.kv)) / 2**30
