"""Groups of processes that share one model."""
