"""HIP tuning tables, one per gfx architecture, and HIP-only kernels."""
