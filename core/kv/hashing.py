"""Digests that name KV blocks: equal digest, equal content, whoever computed it.

A block's digest covers the whole prefix up to its end, through its parent's digest. The root of the
chain holds everything else that the KV values depend on, and who may share them.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Sequence

DIGEST_BYTES = 32
_DOMAIN = b"trimaran.kv.1"


def prefix_root(
    *,
    model: str,
    kv_dtype: str,
    adapter: bytes = b"",
    numerics: str = "default",
    key_id: bytes = b"",
    server_secret: bytes = b"",
    cache_salt: str = "",
) -> bytes:
    """The 32-byte root of a request's chain.

    Tenants are apart by default: the key enters as HMAC(server secret, key id), so a digest tells
    nothing about the key. `cache_salt` narrows further; it never replaces another field.
    """
    key = hmac.new(server_secret, key_id, hashlib.sha256).digest()
    fields = (model.encode(), kv_dtype.encode(), adapter, numerics.encode(), key)
    digest = hashlib.sha256(_DOMAIN)
    for value in (*fields, cache_salt.encode("utf-8", "surrogatepass")):
        # Length first: ("ab", "c") and ("a", "bc") must not meet.
        digest.update(len(value).to_bytes(8, "little"))
        digest.update(value)
    return digest.digest()


def block_digest(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """SHA-256(parent digest ‖ int32 little-endian tokens). The parent has a fixed length and a
    chain a fixed block size, so the encoding is unambiguous."""
    return hashlib.sha256(parent + struct.pack(f"<{len(token_ids)}i", *token_ids)).digest()


def extend_chain(
    chain: list[bytes], root: bytes, token_ids: Sequence[int], block_size: int, num_blocks: int
) -> None:
    """Grow `chain` (digest of block 0, 1, …) to `num_blocks` blocks of `token_ids`."""
    parent = chain[-1] if chain else root
    for start in range(len(chain) * block_size, num_blocks * block_size, block_size):
        parent = block_digest(parent, token_ids[start : start + block_size])
        chain.append(parent)
