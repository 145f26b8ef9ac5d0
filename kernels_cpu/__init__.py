"""x86 CPU kernels: C++ sources, their loader and thin wrappers over tensors."""
