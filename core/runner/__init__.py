"""The runner: rows, batches, forward, output heads."""
