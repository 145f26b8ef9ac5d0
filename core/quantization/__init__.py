"""Quantized weights: which format a layer is kept in, and its canonical tensors."""
