"""KV cache blocks: pool, prefix index, block manager. Knows block ids only; no torch."""
