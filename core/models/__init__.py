"""The parametric decoder, its families, and the loading of weights."""
