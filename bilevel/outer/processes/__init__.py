"""Processes: one run in several of them, by JAX's own distributed runtime."""
