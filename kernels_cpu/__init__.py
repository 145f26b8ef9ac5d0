"""Native x86 kernels: C++ sources, their build, the loader, and thin wrappers over tensors."""
