"""CUDA-only kernels and tuning tables; `portable` holds the Triton sources shared with ROCm."""
