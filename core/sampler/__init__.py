"""Sampling: counter-based noise, features on stable rows, log-probabilities."""
